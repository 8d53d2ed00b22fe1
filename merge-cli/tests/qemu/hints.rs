//! Every kind of hint, provoked by hand and typed in a shell: it does what it says.

use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::process::Command;

use self::kind::HintKind;
use kit::{Holder, Lab, Run, qemu_is_here, run};

use crate::support::{Article, Patch, binary, lab};
use crate::traps::forget_backing_format;

#[path = "../../src/hint/kind.rs"]
mod kind;

const M: u64 = 1 << 20;

/// Where a kind of hint is tried.
enum Tried {
    /// Here: the call that provokes it, and the exit code of what it says.
    Here(Run, Here),
    /// Advice has no command.
    NoCommand(Run),
    /// By another test, which has what provokes it; its folder or connection types the hint, too.
    By(&'static str),
}

/// What becomes of a command that is typed.
#[derive(Clone, Copy, PartialEq)]
enum Here {
    /// It succeeds.
    Succeeds,
    /// It answers, as `check` does with its codes, or fails until something is put right, and changes nothing.
    ChangesNothing,
    /// It saves what can be read, and says with 9 that it is not all.
    Salvages,
}

fn json(folder: &Lab, args: &[&str]) -> Run {
    run(folder.dir(), binary(), &[args, &["--json"]].concat())
}

/// A new kind of hint does not compile without a line here.
fn provoke(kind: HintKind, chain: &Article) -> Tried {
    use Here::{ChangesNothing, Salvages, Succeeds};
    let folder = &chain.folder;
    let commit = |more: &[&str]| json(folder, &[&["commit", "c.qcow2"], more].concat());
    let shared = || {
        folder.overlay("other.qcow2", "base.qcow2", "qcow2", None, "");
        commit(&[])
    };
    match kind {
        HintKind::Advice => {
            folder.img(&["create", "-q", "-f", "qcow2", "-o", "data_file=d.raw", "with-data.qcow2", "1M"]);
            fs::remove_file(folder.join("d.raw")).unwrap();
            Tried::NoCommand(json(folder, &["commit", "with-data.qcow2"]))
        }
        HintKind::Again => {
            fs::rename(folder.join("a.qcow2"), folder.join("elsewhere")).unwrap();
            Tried::Here(commit(&[]), ChangesNothing)
        }
        HintKind::AgainAsRoot => Tried::By("ways::system::tests of the engine"),
        HintKind::GoOn => Tried::By("resume::ctrl_c_says_how_much_is_kept"),
        HintKind::Help => Tried::Here(json(folder, &["flatten", "c.qcow2"]), Succeeds),
        HintKind::Info => {
            folder.img(&["rebase", "-u", "-F", "qcow2", "-b", "c.qcow2", "base.qcow2"]);
            Tried::Here(json(folder, &["info", "--chain", "c.qcow2"]), Succeeds)
        }
        HintKind::InfoChain => Tried::Here(commit(&["--base", "nothing"]), Succeeds),
        HintKind::Check => {
            let patch = Patch::of(folder, "c.qcow2");
            patch.set_u64(patch.l1_offset(), 0x200);
            Tried::Here(json(folder, &["flatten", "c.qcow2", "-o", "new.qcow2"]), ChangesNothing)
        }
        HintKind::Salvage => {
            let patch = Patch::of(folder, "c.qcow2");
            patch.set_u64(patch.l1_offset(), 0x200);
            Tried::Here(json(folder, &["flatten", "c.qcow2", "-o", "new.qcow2"]), Salvages)
        }
        HintKind::Repair => {
            Patch::of(folder, "base.qcow2").set_bits(72, 2);
            Tried::Here(commit(&[]), Succeeds)
        }
        HintKind::Flatten | HintKind::AllowSharedBase => Tried::Here(shared(), Succeeds),
        HintKind::AllowSnapshotChange => {
            folder.img(&["snapshot", "-c", "before", "b.qcow2"]);
            Tried::Here(commit(&[]), Succeeds)
        }
        HintKind::DropBitmaps => {
            folder.img(&["bitmap", "--add", "b.qcow2", "dirty"]);
            Tried::Here(commit(&[]), Succeeds)
        }
        HintKind::AllowDir => {
            fs::create_dir(folder.join("trusted")).unwrap();
            Tried::Here(commit(&["--allow-dir", "trusted"]), Succeeds)
        }
        HintKind::BackingFormat => {
            forget_backing_format(folder, "a.qcow2");
            Tried::Here(commit(&[]), Succeeds)
        }
        HintKind::Format => {
            folder.img(&["create", "-q", "-f", "vmdk", "disk.vmdk", "1M"]);
            Tried::Here(json(folder, &["flatten", "disk.vmdk", "-o", "flat.qcow2"]), Succeeds)
        }
        HintKind::Restart => Tried::By("resume::a_base_that_was_written_by_others_meanwhile_is_not_touched"),
        HintKind::AllowCopy => Tried::By("restore"),
        HintKind::Abort => Tried::By("resume::a_base_that_was_written_by_others_meanwhile_is_not_touched"),
        HintKind::Finish => Tried::By("resume"),
        HintKind::MergeLower => Tried::By("traps"),
        HintKind::OtherOutput => {
            Tried::Here(json(folder, &["flatten", "c.qcow2", "-o", "b.qcow2", "--to", "raw"]), Succeeds)
        }
        HintKind::NewName => {
            fs::create_dir(folder.join("sub")).unwrap();
            folder.overlay("sub/top.qcow2", "../base.qcow2", "qcow2", None, "");
            fs::rename(folder.join("base.qcow2"), folder.join("sub/base.qcow2")).unwrap();
            Tried::Here(json(folder, &["commit", "sub/top.qcow2"]), Succeeds)
        }
        HintKind::Trust => {
            fs::rename(folder.join("base.qcow2"), folder.join("moved.qcow2")).unwrap();
            Tried::Here(json(folder, &["relink", "a.qcow2", "--backing", "moved.qcow2"]), Succeeds)
        }
        HintKind::Demo => Tried::Here(json(folder, &["demo", "--size", "1"]), Succeeds),
        HintKind::LiveMerge | HintKind::LiveLook => {
            let mut daemon = Command::new("qemu-storage-daemon");
            daemon.current_dir(folder.dir()).args([
                "--chardev",
                "socket,id=q,path=q.sock,server=on,wait=off",
                "--monitor",
                "q",
                "--blockdev",
                "driver=qcow2,node-name=n,file.driver=file,file.filename=c.qcow2",
                "--nbd-server",
                "addr.type=unix,addr.path=n.sock",
                "--export",
                "type=nbd,id=e,node-name=n,name=x,writable=on",
            ]);
            let socket = folder.join("n.sock");
            let _holder = Holder::start(daemon, || socket.exists());
            let run = if kind == HintKind::LiveMerge {
                commit(&[])
            } else {
                json(folder, &["check", "--repair", "all", "c.qcow2"])
            };
            // The daemon is not seen through the overlay of the folder: the words are looked at, and typed by the suites of
            // live merges.
            let text = hint(&run, kind).unwrap_or_else(|| panic!("no hint {}:\n{run}", kind.name()))["text"]
                .to_string();
            assert!(text.contains("qmerge live ") && text.contains("q.sock"), "{text}");
            Tried::By("live")
        }
        HintKind::AllowPlaintext
        | HintKind::AllowStale
        | HintKind::Delete
        | HintKind::Active
        | HintKind::BelowActive
        | HintKind::Converge
        | HintKind::LivePull
        | HintKind::LiveEnd
        | HintKind::LiveCancel => Tried::By("live::hints"),
        HintKind::Offline | HintKind::Forget => Tried::By("recover"),
        HintKind::NoLock => Tried::By("formats"),
        HintKind::OntoDevice => Tried::By("devices"),
        HintKind::Virsh => Tried::By("libvirt"),
        HintKind::Recover => Tried::By("recover"),
    }
}

/// The hint of this kind in the error event.
fn hint(run: &Run, kind: HintKind) -> Option<serde_json::Value> {
    let error = run.json_lines().pop()?;
    let hints = error["hints"].as_array()?.iter();
    hints.clone().find(|hint| hint["kind"] == kind.name()).cloned()
}

#[test]
fn every_kind_of_hint_does_what_it_says_when_it_is_typed() {
    if !qemu_is_here() {
        return;
    }
    for &kind in HintKind::ALL {
        let chain = Article::new("hint", "qcow2");
        let (run, here) = match provoke(kind, &chain) {
            Tried::Here(run, here) => (run, here),
            Tried::NoCommand(run) => {
                assert!(hint(&run, kind).is_some_and(|hint| hint["command"].is_null()), "{run}");
                continue;
            }
            Tried::By(test) => {
                assert!(!test.is_empty());
                continue;
            }
        };
        let Some(hint) = hint(&run, kind) else { panic!("no hint {}:\n{run}", kind.name()) };
        let text = hint["text"].as_str().unwrap();
        let line = match kind {
            HintKind::Help => text,
            _ => kit::shell::command(text).unwrap_or_else(|| panic!("no command in '{text}'")),
        };
        assert!(text.ends_with(line) && run.stderr.contains(text), "{run}");
        let Some(typed) = kit::shell::type_line(&chain.folder, line) else { continue };
        if kind != HintKind::Help {
            typed.assert_harmless(&run);
        }
        assert!(here != Here::Succeeds || typed.code == 0, "{}: {typed:?}\nafter:\n{run}", kind.name());
        assert!(here != Here::Salvages || typed.code == 9 && !typed.changed.is_empty(), "{typed:?}");
        assert!(
            here != Here::ChangesNothing || typed.changed.is_empty(),
            "{}: {typed:?}\nafter:\n{run}",
            kind.name()
        );
    }
}

#[test]
fn hints_are_typed_whatever_the_names_of_files_are() {
    if !qemu_is_here() {
        return;
    }
    let names = [
        &b"a disk"[..],
        b"-f",
        b"it's \"x\" $HOME `id`",
        b"two\nlines",
        b"caf\xe9.img",
        "x\u{202e}y".as_bytes(),
        b"*?[1]#~;&|",
    ];
    for name in names {
        let folder = lab("names");
        folder.create("base", M, "");
        for top in ["top", "other"] {
            folder.overlay(top, "base", "qcow2", None, "");
        }
        let name = Path::new(std::ffi::OsStr::from_bytes(name));
        fs::rename(folder.join("top"), folder.dir().join(name)).unwrap();
        let run =
            run(folder.dir(), binary(), &["commit".as_ref(), "--".as_ref(), name.as_os_str()]).expect(6);
        assert!(!run.text().contains(|c: char| c != '\n' && (c.is_control() || c == '\u{202e}')), "{run}");
        let hints: Vec<_> = run.stderr.lines().filter_map(|line| line.strip_prefix("hint: ")).collect();
        assert!(run.stderr.lines().count() == hints.len() + 1 && hints.len() >= 2, "{run}");
        for hint in hints {
            let Some(typed) =
                kit::shell::type_line(&folder, kit::shell::command(hint).unwrap_or_else(|| panic!("{hint}")))
            else {
                return;
            };
            assert!(typed.code == 0, "{typed:?}\nafter:\n{run}");
        }
    }
}

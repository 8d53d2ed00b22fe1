//! `qmerge relink`, judged by QEMU: names change after a move, and nothing else does.

use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::symlink;
use std::sync::atomic::{AtomicBool, Ordering};

use kit::{Lab, Run, qemu_is_here, run};

use crate::support::lab;

const M: u64 = 1 << 20;

/// Names as they stand in headers, and the images that have them; all lie in `vms`.
const IMAGES: [&[u8]; 7] = [
    b"plain.qcow2",
    b"file.qcow2",
    b"json.qcow2",
    b"a b.qcow2",
    b"x:y.qcow2",
    b"caf\xe9.qcow2",
    b"data.qcow2",
];

fn call<S: AsRef<OsStr>>(folder: &Lab, program: &str, args: &[S]) -> Run {
    run(folder.dir(), program, args)
}

/// `vms/base.raw` and images on it, each with bytes of its own, by every spelling that QEMU writes.
fn vms(name: &str) -> Lab {
    let folder = lab(name);
    fs::create_dir(folder.join("vms")).unwrap();
    folder.raw("vms/base.raw", 2 * M, M, 1);
    let base = folder.arg("vms/base.raw");
    for (n, image) in IMAGES.iter().enumerate() {
        let below = match *image {
            b"file.qcow2" => format!("file:{base}"),
            b"json.qcow2" => {
                format!(r#"json:{{"driver":"raw","file":{{"driver":"file","filename":"{base}"}}}}"#)
            }
            _ => base.clone(),
        };
        let path = folder.join("vms").join(OsStr::from_bytes(image));
        let mut args: Vec<&OsStr> =
            ["create", "-q", "-f", "qcow2", "-F", "raw", "-b"].map(OsStr::new).to_vec();
        let data = format!("data_file={}", folder.arg("vms/disk of data"));
        args.push(below.as_ref());
        if *image == b"data.qcow2" {
            args.extend(["-o".as_ref(), OsStr::new(&data)]);
        }
        args.push(path.as_os_str());
        call(&folder, "qemu-img", &args).ok();
        let write = format!("write -P {} {}k 70k", n + 2, 64 * n);
        call(
            &folder,
            "qemu-io",
            &["-f".as_ref(), "qcow2".as_ref(), "-c".as_ref(), OsStr::new(&write), path.as_os_str()],
        )
        .ok();
    }
    // One more layer, which names the one below by its full path.
    let (below, top) = (folder.arg("vms/plain.qcow2"), "vms/top.qcow2");
    folder.img(&["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", &below, top]);
    folder.io("qcow2", top, &["write -P 99 1M 9k"]);
    folder
}

/// What QEMU reads of an image in a folder.
fn seen(folder: &Lab, dir: &str, image: &[u8]) -> Vec<u8> {
    let (path, out) = (folder.join(dir).join(OsStr::from_bytes(image)), folder.scratch());
    let args = ["convert", "-f", "qcow2", "-O", "raw"].map(OsStr::new);
    call(folder, "qemu-img", &[&args[..], &[path.as_os_str(), out.as_os_str()]].concat()).ok();
    fs::read(out).unwrap()
}

fn all() -> Vec<&'static [u8]> {
    IMAGES.iter().copied().chain([&b"top.qcow2"[..]]).collect()
}

#[test]
fn a_folder_that_moved_is_corrected_and_only_its_headers_change() {
    if !qemu_is_here() {
        return;
    }
    let folder = vms("relink-moved");
    let shown: Vec<_> = all().iter().map(|image| seen(&folder, "vms", image)).collect();
    fs::rename(folder.join("vms"), folder.join("new place")).unwrap();
    let bytes = |image: &[u8]| fs::read(folder.join("new place").join(OsStr::from_bytes(image))).unwrap();
    let before: Vec<_> = all().iter().map(|image| bytes(image)).collect();
    let moved = format!("{}={}", folder.arg("vms"), folder.arg("new place"));
    let args = ["relink", "--moved", &moved, "."];
    let files = folder.files();
    let planned = folder.qmerge(&[&args[..], &["--dry-run"]].concat()).ok().says("to relink: 8 images");
    folder.assert_unchanged(&files, &planned);
    folder.qmerge(&args).ok().says("relinked: 8 images");
    for ((image, shown), before) in all().iter().zip(&shown).zip(&before) {
        assert!(seen(&folder, "new place", image) == *shown, "{}", image.escape_ascii());
        let after = bytes(image);
        assert!(
            after.len() == before.len() && after[1 << 16..] == before[1 << 16..],
            "{}",
            image.escape_ascii()
        );
        assert!(after != *before, "{}", image.escape_ascii());
    }
    let after = folder.files();
    for untouched in ["new place/base.raw", "new place/disk of data"] {
        assert_eq!(after.get(untouched), files.get(untouched));
    }
    assert!(after.len() == files.len(), "{after:?}");
    let again = folder.qmerge(&args).ok().says("nothing to do");
    folder.assert_unchanged(&after, &again);
    let chain = folder.img(&["info", "--backing-chain", "new place/top.qcow2"]).text();
    assert!(chain.matches("new place").count() > 3 && !chain.contains("vms"), "{chain}");
}

#[test]
fn what_is_not_proved_is_left_and_named() {
    if !qemu_is_here() {
        return;
    }
    let folder = vms("relink-left");
    fs::rename(folder.join("vms"), folder.join("new")).unwrap();
    fs::rename(folder.join("new/plain.qcow2"), folder.join("new/renamed")).unwrap();
    // Larger than what lies on it: not the base of that.
    folder.img(&["resize", "-q", "-f", "raw", "new/base.raw", "3M"]);
    let moved = format!("{}={}", folder.arg("vms"), folder.arg("new"));
    let files = folder.files();
    let left = folder.qmerge(&["relink", "--moved", &moved, "new"]);
    folder.assert_unchanged(&files, &left);
    assert!(left.code != 0 && left.stderr.matches("left: ").count() == 8, "{left}");
    assert!(left.text().contains("relinked: 0 images; 8 images left"), "{left}");
    folder.img(&["resize", "-q", "-f", "raw", "--shrink", "new/base.raw", "2M"]);
    let most = folder.qmerge(&["relink", "--moved", &moved, "new"]);
    assert!(most.code == 1 && most.text().contains("relinked: 7 images; 1 image left"), "{most}");
}

#[test]
fn a_wrong_file_needs_the_word_of_the_user() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("relink-wrong");
    folder.raw("base.raw", M, M / 2, 1);
    folder.raw("wrong.raw", M, M / 2, 2);
    folder.overlay("top.qcow2", "base.raw", "raw", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 3 64k 64k"]);
    let gold = folder.view("qcow2", "top.qcow2");
    fs::copy(folder.join("base.raw"), folder.join("-copy of it")).unwrap();
    let relink = |more: &[&str]| folder.qmerge(&[&["relink", "top.qcow2"], more].concat());
    folder.refused(&["relink", "top.qcow2", "--backing", "wrong.raw"], &[6]).says("holds other bytes");
    folder.refused(&["relink", "top.qcow2", "--backing", "top.qcow2"], &[6]);
    folder.refused(&["relink", "top.qcow2", "--backing", "no file"], &[1]).says("begins at the folder");
    folder.refused(&["relink", "top.qcow2", "--backing", "nbd://host/x"], &[6]);
    relink(&["--backing=./-copy of it"]).ok().says("the same bytes");
    folder.view("qcow2", "top.qcow2").assert_same(&gold, "the guest");
    relink(&["--backing=./-copy of it"]).ok().says("nothing to do");
    fs::remove_file(folder.join("-copy of it")).unwrap();
    for there in ["wrong.raw", "base.raw"] {
        folder.refused(&["relink", "top.qcow2", "--backing", there], &[6]).says("nothing is left");
    }
    relink(&["--backing", "wrong.raw", "--trust"]).ok().says("on your word");
    folder.refused(&["relink", "top.qcow2", "--backing", "base.raw"], &[6]);
    relink(&["--backing", "base.raw", "--trust"]).ok();
    folder.view("qcow2", "top.qcow2").assert_same(&gold, "the guest");
    folder.check_clean("top.qcow2");
    folder.img(&["create", "-q", "-f", "vmdk", "disk.vmdk", "1M"]);
    folder.refused(&["relink", "top.qcow2", "--backing", "disk.vmdk", "--trust"], &[6]);
}

#[test]
fn a_merge_that_was_stopped_keeps_its_names() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("relink-unfinished");
    folder.create("base.qcow2", 4 * M, "");
    folder.overlay("a.qcow2", "base.qcow2", "qcow2", None, "");
    folder.io("qcow2", "a.qcow2", &["write -P 2 0 1M"]);
    folder.overlay("c.qcow2", "a.qcow2", "qcow2", None, "");
    assert!(folder.killed_at_sync(5, &["commit", "c.qcow2", "--top", "a.qcow2"]));
    let name = folder.arg("a.qcow2");
    // A copy of the layer reads through the same base; one of the whole chain does not.
    folder.sh("mkdir copy; cp base.qcow2 a.qcow2 copy; cp a.qcow2 a2.qcow2");
    for name in [&name, "a2.qcow2", "copy/a.qcow2"] {
        let refused = folder.refused(&["relink", "c.qcow2", "--backing", name], &[6]);
        assert!(refused.stderr.contains("base.qcow2: a merge was stopped"), "{refused}");
    }
    folder.sh("rm -r copy a2.qcow2");
    folder.qmerge(&["commit", "c.qcow2", "--top", "a.qcow2"]).ok();
    folder.qmerge(&["relink", "c.qcow2", "--backing", &folder.arg("base.qcow2")]).ok().says("the same file");
}

#[test]
fn a_relink_that_was_killed_can_be_typed_again() {
    if !qemu_is_here() {
        return;
    }
    for call in 1.. {
        let folder = lab("relink-killed");
        folder.raw("base.raw", M, M, 1);
        folder.overlay("top.qcow2", "base.raw", "raw", None, "");
        let gold = folder.view("qcow2", "top.qcow2");
        let name = format!("{}{}", "./".repeat(200), "base.raw");
        let args = ["relink", "top.qcow2", "--backing", &name];
        let was_killed = folder.killed_at_sync(call, &args);
        folder.view("qcow2", "top.qcow2").assert_same(&gold, "the guest behind the kill");
        folder.qmerge(&args).ok();
        folder.view("qcow2", "top.qcow2").assert_same(&gold, "the guest");
        assert_eq!(folder.backing_of("top.qcow2").unwrap().0, name);
        assert!(folder.names().iter().all(|name| !name.contains("qmerge")), "{:?}", folder.names());
        if !was_killed {
            assert!(call > 2, "{call}");
            break;
        }
    }
}

/// Somebody exchanges the new file, the image and what lies beside it for links to files elsewhere, all the time.
#[test]
fn names_that_are_exchanged_meanwhile_lead_nowhere_else() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("relink-races");
    for dir in ["vm", "outside"] {
        fs::create_dir(folder.join(dir)).unwrap();
    }
    folder.raw("vm/base", M, M, 1);
    fs::copy(folder.join("vm/base"), folder.join("vm/copy")).unwrap();
    folder.overlay("vm/top", "base", "raw", None, "");
    fs::copy(folder.join("vm/top"), folder.join("outside/top")).unwrap();
    folder.raw("outside/secret", M, M, 7);
    let outside = || ["outside/top", "outside/secret"].map(|name| fs::read(folder.join(name)).unwrap());
    let (before, stop) = (outside(), AtomicBool::new(false));
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let spare = folder.join("vm/spare");
            while !stop.load(Ordering::Relaxed) {
                for (name, target) in [("vm/copy", "../outside/secret"), ("vm/top", "../outside/top")] {
                    // The link takes the name for a moment; then the file has it again.
                    let (name, away) = (folder.join(name), folder.join("vm/away"));
                    symlink(target, &spare).unwrap();
                    fs::rename(&name, &away).unwrap();
                    fs::rename(&spare, &name).unwrap();
                    fs::rename(&away, &name).unwrap();
                }
                let _ = symlink("../outside/secret", folder.join("vm/.top.qmerge-switch"));
                let _ = fs::remove_file(folder.join("vm/.top.qmerge-switch"));
            }
        });
        for n in 0..30 {
            let backing = if n % 2 == 0 { "copy" } else { "base" };
            let done = folder.qmerge(&["relink", "vm/top", "--backing", backing]);
            assert!(done.code != 101 && !done.text().contains("panicked"), "{done}");
        }
        stop.store(true, Ordering::Relaxed);
    });
    // The image outside is a whole image, and may be relinked by its link; nothing else there changes.
    assert!(outside()[1] == before[1]);
    let _ = fs::remove_file(folder.join("vm/spare"));
    let top = seen(&folder, "vm", b"top");
    assert!(top == fs::read(folder.join("vm/base")).unwrap());
}

//! The hints where another process holds an image.

use std::path::Path;

use qcow2::error::{Holder, shown};
use qmp_client::{is_machine, monitor_of};

use super::{Command, Hint, HintKind, Hints};
use crate::call::{Call, VerbName};

/// The hints for an image that `holders` hold.
pub(super) fn hints(path: &Path, holders: &[Holder], call: &Call) -> Hints {
    let again = |why: &str| Hint::command(HintKind::Again, why, call.again());
    if holders.is_empty() {
        return match rustix::process::geteuid().is_root() {
            true => again(&format!(
                "no process here shows who holds it: look on other hosts and in containers that use {}; when it is free, again",
                shown(path)
            )),
            // Other users' processes are visible to root only.
            false => Hint::command(HintKind::Advice, "who holds it, as root", Command::of("sudo").word("lsof").file(path)),
        }
        .into();
    }
    let wait = if holders.iter().any(is_machine) {
        "shut the virtual machine down, then again"
    } else {
        "let it finish, or end it in its own way, then again"
    };
    Hints::from(again(wait)).or(live(holders, call))
}

/// How to do the same to the images as QEMU runs, where one of the holders shows a monitor.
fn live(holders: &[Holder], call: &Call) -> Option<Hint> {
    let address = holders.iter().find_map(monitor_of)?;
    let command = match call.verb {
        VerbName::Commit => live_commit(call),
        _ => Command::qmerge(["live", "list"]),
    };
    let command = command.option("--qmp", address.to_string());
    Some(match call.verb {
        VerbName::Commit => Hint::command(HintKind::LiveMerge, "or merge as it runs", command),
        _ => Hint::command(HintKind::LiveLook, "its disks, as it runs", command),
    })
}

/// The words of a commit as `live commit` takes them: a disk answers to its active image too.
fn live_commit(call: &Call) -> Command {
    let mut line = Command::qmerge(["live", "commit"]).file(&call.image);
    let mut words = call.words.iter();
    let mut whole = true;
    while let Some(option) = words.next() {
        let text = option.to_string_lossy();
        let (name, value) =
            text.split_once('=').map_or((&*text, None), |(name, value)| (name, Some(value.into())));
        match name {
            "--base" | "--top" | "--scan" => {
                whole &= name != "--top";
                let value = value.or_else(|| words.next().cloned()).unwrap_or_default();
                line = line.option(name, value);
            }
            "--shallow" | "--delete" | "--drop-bitmaps" | "--allow-shared-base" | "--dry-run" => {
                line = line.word(name);
            }
            _ => {}
        }
    }
    if whole && call.words.iter().any(|word| word == "--keep-active") {
        line.word("--keep-overlay")
    } else if whole {
        line.options(["--active", "--pivot"])
    } else {
        line
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::path::PathBuf;

    #[test]
    fn holders_decide_what_to_do() {
        let words = ["commit", "c.qcow2"].map(Into::into).to_vec();
        let call = Call { verb: VerbName::Commit, image: "c.qcow2".into(), words };
        let holder = |name: &str| Holder { pid: 42, name: name.into(), command_line: Vec::new() };
        let used = |holders: &[Holder]| hints(Path::new("b.qcow2"), holders, &call).to_string();
        assert!(used(&[holder("/usr/bin/qemu-system-x86_64")]).starts_with("shut the virtual machine down"));
        for name in ["qemu-nbd", "qemu-storage-daemon"] {
            let text = used(&[holder(name)]);
            assert!(text.ends_with(": qmerge commit c.qcow2") && !text.contains("kill"), "{text}");
        }
    }

    #[test]
    fn a_commit_is_told_as_it_is_typed_for_a_running_qemu() {
        let live = |words: &[&str]| {
            let words = words.iter().map(Into::into).collect();
            live_commit(&Call { verb: VerbName::Commit, image: PathBuf::from("c.img"), words }).to_string()
        };
        assert_eq!(live(&["commit", "c.img"]), "qmerge live commit c.img --active --pivot");
        assert_eq!(
            live(&["commit", "--verify", "c.img", "--base=[1]", "--top", "b.img", "--delete"]),
            "qmerge live commit c.img --base '[1]' --top b.img --delete"
        );
        assert_eq!(
            live(&["commit", "c.img", "--keep-active", "--shallow"]),
            "qmerge live commit c.img --shallow --keep-overlay"
        );
    }
}

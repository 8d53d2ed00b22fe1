//! The hints if another process uses an image.

use qcow2::error::Holder;
use qmp_client::{is_machine, monitor_of};

use super::{Command, Hint, HintKind, Hints};
use crate::call::{Call, VerbName};

/// The hints for an image that `holders` use. A machine that shows its monitor can be looked at while it runs.
pub(super) fn hints(holders: &[Holder], call: &Call) -> Hints {
    let wait = match holders.iter().any(is_machine) {
        true => "shut the virtual machine down, then again",
        false => "let it finish, or end it in its own way, then again",
    };
    // A commit has the command that does the same there.
    let monitor = holders.iter().find_map(monitor_of).filter(|_| call.verb != VerbName::Commit);
    let disks = monitor.map(|address| {
        let list = Command::qmerge(["live", "list"]).option("--qmp", address.to_string());
        Hint::command(HintKind::LiveLook, "its disks, as it runs", list)
    });
    Hints::from(Hint::command(HintKind::Again, wait, call.again())).or(disks)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn holders_decide_what_to_do() {
        let words = ["commit", "c.qcow2"].map(Into::into).to_vec();
        let call = Call { verb: VerbName::Commit, image: "c.qcow2".into(), words };
        let holder = |name: &str| Holder { pid: 42, name: name.into(), command_line: Vec::new() };
        let used = |holders: &[Holder]| hints(holders, &call).to_string();
        assert!(used(&[holder("/usr/bin/qemu-system-x86_64")]).starts_with("shut the virtual machine down"));
        for name in ["qemu-nbd", "qemu-storage-daemon"] {
            let text = used(&[holder(name)]);
            assert!(text.ends_with(": qmerge commit c.qcow2") && !text.contains("kill"), "{text}");
        }
    }
}

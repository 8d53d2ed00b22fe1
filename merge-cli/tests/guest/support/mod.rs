//! What every test needs: a guest, its disks, and the judge of what they hold.

mod guest;
mod initrd;
mod oracle;
mod process;
mod qemu;
#[path = "../../../../testdata/guest/record.rs"]
mod record;
mod saved;

pub(crate) use guest::{Guest, Lab};
pub(crate) use oracle::Oracle;
pub(crate) use qemu::{MachineLine, Qemu};

use std::process::{Command, Stdio};

/// Whether QEMU is here; says so when it is not, and fails where `CI` is set.
pub(crate) fn qemu_present() -> bool {
    ["qemu-system-x86_64", "qemu-img", "qemu-io"].into_iter().all(present)
}

/// Whether the program is here; says so when it is not, and fails where `CI` is set.
pub(crate) fn present(program: &str) -> bool {
    let run = Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status();
    let found = run.is_ok_and(|status| status.success());
    if !found {
        skipped(&format!("{program} is not installed"));
    }
    found
}

/// Whether QEMU and a kernel for a guest are here; says so when they are not, and fails where `CI` is set.
pub(crate) fn guest_possible() -> bool {
    if !qemu_present() {
        return false;
    }
    let kernel = saved::folder().join("vmlinuz");
    if !kernel.is_file() {
        skipped(&format!("{} is missing; testdata/guest/fetch-kernel gets it", kernel.display()));
    }
    kernel.is_file()
}

/// Reports a test that cannot run here; fails where `CI` is set.
pub(crate) fn skipped(why: &str) {
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    assert!(std::env::var_os("CI").is_none(), "{test}: {why}; with CI set nothing may be skipped");
    crate::skipped::skipped(&format!("{why}: the tests that need it pass without having tried anything"));
}

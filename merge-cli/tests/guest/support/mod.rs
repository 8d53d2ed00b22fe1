//! What every test needs: a guest, its disks, and the judge of what they hold.

mod guest;
mod initrd;
mod oracle;
mod process;
mod qemu;
#[path = "../../../../testdata/guest/record.rs"]
mod record;
mod saved;

use kit::random;

pub(crate) use guest::{Guest, Lab};
pub(crate) use oracle::Oracle;
pub(crate) use qemu::{MachineLine, Qemu};

/// Whether QEMU is here; says so when it is not, and fails where `CI` is set.
pub(crate) fn qemu_present() -> bool {
    kit::are_here(&["qemu-system-x86_64", "qemu-img", "qemu-io"])
}

/// Whether QEMU and a kernel for a guest are here; says so when they are not, and fails where `CI` is set.
pub(crate) fn guest_possible() -> bool {
    if !qemu_present() {
        return false;
    }
    let kernel = saved::folder().join("vmlinuz");
    if !kernel.is_file() {
        kit::skipped(&format!("{} is missing; testdata/guest/fetch-kernel gets it", kernel.display()));
    }
    kernel.is_file()
}

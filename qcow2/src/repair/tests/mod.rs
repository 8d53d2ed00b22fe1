//! Repairs, and the way back from them, against damage made on purpose and `qemu-img`.

mod mends;
pub(crate) mod repair;
mod repair_crash;
mod restore;
mod restore_crash;

use std::path::Path;

use super::{RepairMode, repair_with_backup};
use crate::check::CheckOptions;
use crate::fuzzing::repair::seeds as damaged_images;
use crate::storage::{Access, Host};

/// Repairs the image of a host, with a backup.
fn repaired(host: &dyn Host, mode: RepairMode) {
    let (image, backup) = (Path::new(restore::IMAGE), Path::new(restore::BACKUP));
    let file = host.open(image, Access::ReadWrite).unwrap();
    repair_with_backup(image, &*file, None, mode, host, backup, &CheckOptions::default()).unwrap();
}

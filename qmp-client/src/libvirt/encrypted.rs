//! Which images are encrypted, where no QEMU can be asked.

use std::path::Path;

use qcow2::image;
use qcow2::storage::{Access, Host, OsHost};

/// Whether an image is encrypted, by its first bytes; false for one that cannot be read.
pub fn is_encrypted(path: &Path) -> bool {
    OsHost.open(path, Access::Read).is_ok_and(|file| image::is_encrypted(path, &*file).unwrap_or(false))
}

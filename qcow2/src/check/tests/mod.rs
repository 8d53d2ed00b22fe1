//! Our check against damage made on purpose, and against `qemu-img check`.

mod damage;
mod faults;
mod memory;
pub(crate) mod qemu;
pub(crate) mod random;

use std::path::Path;

use super::{CheckOptions, CheckReport, check};
use crate::fuzzing::repair::seeds as damaged_images;
use crate::storage::{Access, Host, OsHost};

/// Our report of an image file, with its data file if it has one.
fn ours_with(path: &Path, data_file: Option<&Path>) -> CheckReport {
    let host = OsHost;
    let file = host.open(path, Access::Read).unwrap();
    let data = data_file.map(|path| host.open(path, Access::Read).unwrap());
    check(path, &*file, data.as_deref(), &CheckOptions::default()).unwrap()
}

/// Our report of an image file.
pub(crate) fn ours(path: &Path) -> CheckReport {
    ours_with(path, None)
}

/// Our report, made in many passes.
fn ours_in_windows(path: &Path, words: u64) -> CheckReport {
    let file = OsHost.open(path, Access::Read).unwrap();
    let subject = super::Subject::open(path, &*file, None, None).unwrap();
    super::check_subject(&subject, words).unwrap()
}

/// Where the encryption header of an image lies.
fn luks_header(path: &Path) -> u64 {
    let file = OsHost.open(path, Access::Read).unwrap();
    super::Subject::open(path, &*file, None, None).unwrap().encryption.unwrap().0.get()
}

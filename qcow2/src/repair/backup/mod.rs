//! Keeps a copy of an image's metadata and of everything that a repair changes, and restores it.
//!
//! The file begins with the 16 bytes `qmerge-metadata2`; records follow. A record is a head of 40 bytes and its
//! content. All numbers are big-endian. The head holds the kind of record (4 bytes of text), the length of the
//! content (4), two numbers (8 and 8), the offset of the record before (8; 0 if there is none) and its checksum
//! (4; 0), and the CRC-32 of these 36 bytes and the content (4).
//!
//! | text | is | first number | second number | content |
//! | --- | --- | --- | --- | --- |
//! | `imag` | the image | its length in bytes | 1 for a block device | device (8), inode (8), path |
//! | `kept` | metadata | its host offset | 0 | the bytes |
//! | `full` | the end of the metadata | the number of `kept` records | 0 | |
//! | `chng` | sectors that the repair is about to change | their host offset | counts barriers | the bytes before, then the bytes after |
//! | `done` | the end of the repair | the number of `chng` records | 0 | |
//! | `back` | a restore begins | 0 | 0 | |
//! | `home` | the restore has ended | 0 | 0 | |
//!
//! `imag` to `full` are durable before the repair writes anything, and each `chng` is durable before its
//! change. So whenever the repair is stopped, every sector of the metadata holds what one of these records
//! says. If one does not, somebody else has written it. The first record whose checksum is wrong, or that does
//! not follow the record that it names, ends the file: a power cut may leave such bytes behind the last record.
//! The first record behind a barrier begins at a multiple of 4096.
//!
//! A restore goes through the `chng` records from the last to the first, with a barrier wherever the repair had
//! one. Meanwhile the image (of version 3) is marked corrupt, so that nobody else writes to it. Only while it
//! is marked may a sector have unknown content, because a power cut may have torn it.
//!
//! A repair with a backup punches no holes, so that freed clusters can be taken back with their content.

mod judge;
mod keep;
mod record;
mod recorded;
mod restore;
mod saved;
mod sectors;

use std::path::Path;

use crate::check::CheckOptions;
use crate::error::Result;
use crate::storage::{Host, Storage};

pub(super) use recorded::Recorded;
pub use restore::{RestoreOptions, RestorePlan, plan_restore, restore};

/// The unit that a disk writes wholly or not at all, in bytes.
const SECTOR: u64 = 512;

/// Copies the metadata of the image in `file` to the new file `to`, and returns the image wrapped so that every
/// write is recorded there, too.
///
/// # Errors
/// A file `to` that exists; those of a check, and of reading and writing. An incomplete file is removed.
pub(super) fn record<'a>(
    path: &Path,
    file: &'a dyn Storage,
    host: &dyn Host,
    to: &Path,
    options: &CheckOptions<'_>,
) -> Result<Recorded<'a>> {
    Ok(Recorded::over(file, keep::keep(path, file, host, to, options)?))
}

//! A copy of an image's metadata, and of all that a repair changes; and the way back.
//!
//! The file: the 16 bytes `qmerge-metadata2`, then records. A record is a head of 40 bytes, and its content. All
//! numbers are big-endian. The head: what the record is (4 bytes of text), the length of the content (4), two
//! numbers (8 and 8), where the record before begins (8; 0 if there is none) and its checksum (4; 0),
//! and the CRC-32 of these 36 bytes and the content (4).
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
//! `imag` to `full` are durable before the repair writes anything, and each `chng` before what it is about. So
//! every sector of the metadata is at any time what one of these records says, whenever the repair is stopped; where
//! one is not, somebody else has written. What has no right checksum, or not the record before it that it
//! names, ends the file: a power cut may leave such bytes behind the last record. What is
//! written behind a barrier begins at the next multiple of 4096.
//!
//! The way back goes through the `chng` records from the last to the first, with a barrier where the repair had one. Meanwhile
//! the image (of version 3) is marked corrupt, so that nobody else writes to it half-way: only
//! then may a sector be anything, since a power cut may have torn it.
//!
//! A repair with a backup gives no blocks to the file system, so that what it frees can be taken back.

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

/// What a disk writes wholly or not at all, in bytes.
const SECTOR: u64 = 512;

/// Keeps the metadata of the image in `file` in the new file `to`, and gives the image so that all that is written to it is
/// kept as well.
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

//! The lists that an image keeps beside its tables: internal snapshots and persistent bitmaps.

use std::path::Path;

use super::qcow2::read_or_zero;
use crate::error::{Error, FileOp, Result};
use crate::format::{
    Bitmap, Cluster0, Header, Snapshot, decode_bitmap_directory, decode_snapshots, snapshot_table_bound,
};
use crate::storage::Storage;
use crate::units::HostOffset;

/// The internal snapshots of the image in `file`, in the order of its table. Limits of the single
/// entries are the caller's matter ([`Snapshot::validate`]).
///
/// # Errors
/// A table that cannot be read, is broken, or does not end inside the file.
pub(crate) fn read_snapshots(path: &Path, file: &dyn Storage, header: &Header) -> Result<Vec<Snapshot>> {
    if header.snapshots == 0 {
        return Ok(Vec::new());
    }
    let at = header.snapshots_offset;
    let bytes = read(path, file, at, snapshot_table_bound(header.snapshots))?;
    let (snapshots, _) =
        decode_snapshots(&bytes, header.snapshots, at.get()).map_err(|e| Error::format(path, e))?;
    Ok(snapshots)
}

/// The persistent bitmaps of the image in `file`; none if the header says that they do not agree with
/// the data. Limits of the single entries are the caller's matter ([`Bitmap::validate`]).
///
/// # Errors
/// A directory that cannot be read or is broken.
pub(crate) fn read_bitmaps(path: &Path, file: &dyn Storage, cluster0: &Cluster0) -> Result<Vec<Bitmap>> {
    let format = |e| Error::format(path, e);
    let Some(extension) = cluster0.bitmaps().map_err(format)? else { return Ok(Vec::new()) };
    let bytes = read(path, file, extension.directory_offset, extension.directory_size)?;
    decode_bitmap_directory(&bytes, &extension).map_err(format)
}

/// At most `len` bytes from `at`, fewer where the file ends; `len` does not matter for memory beyond that.
fn read(path: &Path, file: &dyn Storage, at: HostOffset, len: u64) -> Result<Vec<u8>> {
    let io = |e| Error::io(path, FileOp::Read, Some(at.get()), e);
    let len = len.min(file.size().map_err(io)?.saturating_sub(at.get()));
    let mut bytes = vec![0; usize::try_from(len).unwrap_or_default()];
    read_or_zero(file, at, &mut bytes).map_err(io)?;
    Ok(bytes)
}

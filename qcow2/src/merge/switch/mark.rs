//! Opens one merged layer again by its stamp, locked for writing; marks it, or removes it.

use std::os::unix::ffi::OsStrExt;
use std::path::Path;
use std::sync::Arc;

use crate::error::{Error, FileOp, Refusal, Result};
use crate::format::{Mark, is_qcow2, plan_mark};
use crate::image::Qcow2;
use crate::stamp::{Difference, Stamp};
use crate::storage::{Access, Host, LockMode, Place, Storage, lock, may_be_unlocked};
use crate::units::GuestOffset;

/// Opens the image of a stamp, and locks it in `mode`. It must be the same file. With `no_locks` its file
/// system need not have locks; then only the caller can know that nobody else uses it.
///
/// # Errors
/// [`Error::InUse`]; [`Refusal::NotAsKnown`] for another file; the system's.
pub(crate) fn open(
    host: &dyn Host,
    image: &Stamp,
    mode: LockMode,
    no_locks: bool,
) -> Result<Arc<dyn Storage>> {
    let access = match mode {
        LockMode::Read => Access::Read,
        LockMode::Write => Access::ReadWrite,
    };
    let io = |op| move |e| Error::io(&image.path, op, None, e);
    let file = host.open(&image.path, access).map_err(io(FileOp::Open))?;
    lock(host, &image.path, &*file, mode)?;
    may_be_unlocked(host, &image.path, image.id, &*file, access, no_locks)?;
    if !image.is_same_file(&Stamp::of(host, &image.path, &*file)?) {
        return Err(refusal(&image.path, Difference::OtherFile));
    }
    Ok(file)
}

/// Refuses a file that has changed since its stamp was taken.
///
/// # Errors
/// [`Refusal::NotAsKnown`] with the first thing that is different; the system's.
pub(crate) fn require_unchanged(host: &dyn Host, image: &Stamp, file: &dyn Storage) -> Result<()> {
    match image.difference(&Stamp::of(host, &image.path, file)?) {
        Some(difference) => Err(refusal(&image.path, difference)),
        None => Ok(()),
    }
}

fn refusal(path: &Path, difference: Difference) -> Error {
    Error::refused(path, Refusal::NotAsKnown { what: difference.to_string() })
}

/// Marks an image, whose file is held under lock, as merged into `base`; false if its header has no room for that.
///
/// # Errors
/// An I/O error; an image that is damaged.
pub(crate) fn mark(path: &Path, file: Arc<dyn Storage>, base: &Path) -> Result<bool> {
    let mut magic = [0; 4];
    file.read_exact_or_zero(&mut magic, 0).map_err(|e| Error::io(path, FileOp::Read, Some(0), e))?;
    if !is_qcow2(&magic) {
        return Ok(false);
    }
    let header = Qcow2::read_cluster0(path, &*file)?.header;
    let mut cluster = vec![0; header.geometry().cluster_size() as usize];
    let io = |op, at| move |e| Error::io(path, op, Some(at), e);
    file.read_exact_or_zero(&mut cluster, 0).map_err(io(FileOp::Read, 0))?;
    // The tables tell whether it is empty, so its data file need not be opened.
    let mark = mark_of(&Qcow2::open(path, file.clone(), Some(file.clone()))?)?;
    let Ok(switch) = plan_mark(&cluster, base.as_os_str().as_bytes(), mark) else { return Ok(false) };
    // Mark it only if one sector holds the change: a power cut could tear more, and the image is obsolete
    // anyway.
    if !switch.atomic {
        return Ok(false);
    }
    for write in &switch.writes {
        file.write_all_at(&write.bytes, write.offset).map_err(io(FileOp::Write, write.offset))?;
        file.sync().map_err(|e| Error::barrier(path, e))?;
    }
    Ok(true)
}

/// The mark that a merged image gets.
///
/// # Errors
/// A table that cannot be read.
pub(crate) fn mark_of(image: &Qcow2) -> Result<Mark> {
    let is_empty = image.header().snapshots == 0 && image.next_allocated(GuestOffset::ZERO)?.is_none();
    Ok(if is_empty { Mark::MergedEmpty } else { Mark::Merged })
}

/// Removes the file at a place durably.
///
/// # Errors
/// The system's.
pub(crate) fn unlink(host: &dyn Host, place: &Place) -> Result<()> {
    place.unlink(host).map_err(|e| Error::io(&place.path(), FileOp::Remove, None, e))?;
    place.sync(host).map_err(|e| Error::barrier(place.folder().path(), e))
}

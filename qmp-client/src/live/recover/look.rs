//! Reads the headers of a merge's images, without locks.

use std::path::{Path, PathBuf};

use qcow2::chain::BackingName;
use qcow2::error::FileOp;
use qcow2::image::{Cluster0, ImageFormat, Qcow2};
use qcow2::storage::{Access, FileId, Host, OsHost, leads_nowhere};
use qcow2::{Error, Result};

use crate::state::StateLayer;

/// The existing folders in which a file lies: by its given name, and with links followed.
pub(super) fn folders_of(path: &Path) -> Vec<PathBuf> {
    let names = [path.canonicalize().ok(), path.is_absolute().then(|| path.to_owned())];
    let folders = names.into_iter().flatten().filter_map(|path| path.parent().map(Path::to_owned));
    folders.filter(|folder| folder.is_dir()).collect()
}

/// The format of a layer.
pub(super) fn format(layer: &StateLayer) -> ImageFormat {
    ImageFormat::from_name(&layer.format).unwrap_or(ImageFormat::Qcow2)
}

/// The header of a qcow2 image, read without a lock; `None` for another image.
pub(super) fn header(path: &Path) -> Result<Option<Cluster0>> {
    let file = OsHost.open(path, Access::Read).map_err(|e| Error::io(path, FileOp::Open, None, e))?;
    if ImageFormat::detect(path, &*file)? != ImageFormat::Qcow2 {
        return Ok(None);
    }
    Qcow2::read_cluster0(path, &*file).map(Some)
}

/// The backing name of an image, and the file to which it leads, if there is one.
pub(super) fn backing(path: &Path) -> Result<(Option<String>, Option<FileId>)> {
    let Some(name) = header(path)?.and_then(|cluster0| cluster0.backing_name) else {
        return Ok((None, None));
    };
    let leads_to = match BackingName::parse(&name) {
        Ok(name) => id(&name.resolve(path))?,
        Err(_) => None,
    };
    Ok((Some(String::from_utf8_lossy(&name).into_owned()), leads_to))
}

/// The file that a name leads to, if there is one.
pub(super) fn id(path: &Path) -> Result<Option<FileId>> {
    match OsHost.stat(path) {
        Ok(stat) => Ok(Some(stat.id)),
        Err(e) if leads_nowhere(&e) => Ok(None),
        Err(e) => Err(Error::io(path, FileOp::Stat, None, e)),
    }
}

/// Whether an image is an empty overlay on the file `base`, as an earlier clean-up leaves it. Only its header
/// and its L1 table are read, without a lock.
pub(super) fn is_empty_on(path: &Path, base: FileId) -> Result<bool> {
    let (Some(cluster0), (_, leads_to)) = (header(path)?, backing(path)?) else { return Ok(false) };
    if leads_to != Some(base) {
        return Ok(false);
    }
    let file = OsHost.open(path, Access::Read).map_err(|e| Error::io(path, FileOp::Open, None, e))?;
    let (mut at, mut obsolete) = (cluster0.header.l1_offset.get(), cluster0.header.l1_bytes());
    let mut buffer = vec![0; 1 << 16];
    while obsolete > 0 {
        let part = obsolete.min(buffer.len() as u64) as usize;
        let Some(part) = buffer.get_mut(..part) else { break };
        file.read_exact_or_zero(part, at).map_err(|e| Error::io(path, FileOp::Read, Some(at), e))?;
        if part.iter().any(|byte| *byte != 0) {
            return Ok(false);
        }
        (at, obsolete) = (at.saturating_add(part.len() as u64), obsolete - part.len() as u64);
    }
    Ok(true)
}

/// Whether an earlier clean-up has begun to empty an image, and nobody else has opened it for writing since.
pub(super) fn is_sealed(path: &Path) -> Result<bool> {
    Ok(header(path)?.is_some_and(|cluster0| cluster0.header.is_sealed()))
}

/// Whether QEMU may write to an image when it closes it, even if the guest wrote nothing: it clears the dirty
/// bit of lazy refcounts, and stores bitmaps.
pub(super) fn is_written_by_closing(layer: &StateLayer) -> Result<bool> {
    Ok(header_of(layer)?.is_some_and(|cluster0| cluster0.header.lazy_refcounts() || cluster0.has_bitmaps()))
}

/// Whether the guest's writes to an image go to an external data file. Then the times of the image do not show
/// them.
pub(super) fn has_data_file(layer: &StateLayer) -> Result<bool> {
    Ok(header_of(layer)?.is_some_and(|cluster0| cluster0.header.has_data_file()))
}

/// The header of a layer that is a qcow2 image by its recorded format. A raw layer has none, even if the guest
/// wrote one into it.
fn header_of(layer: &StateLayer) -> Result<Option<Cluster0>> {
    match format(layer) {
        ImageFormat::Qcow2 => header(Path::new(&layer.file)),
        ImageFormat::Raw | ImageFormat::Foreign(_) => Ok(None),
    }
}

/// Whether an image carries the mark of one that was merged.
pub(super) fn is_marked(path: &Path) -> Result<bool> {
    Ok(header(path)?.is_some_and(|cluster0| cluster0.merged_into().is_some()))
}

/// Checks that nobody holds one of the files.
pub(super) fn free<'a>(layers: impl Iterator<Item = &'a StateLayer>) -> Result<()> {
    for layer in layers {
        let path = Path::new(&layer.file);
        let file = match OsHost.open(path, Access::Read) {
            Err(e) if leads_nowhere(&e) => continue,
            opened => opened.map_err(|e| Error::io(path, FileOp::Open, None, e))?,
        };
        let used = file.used_by_others().map_err(|e| Error::io(path, FileOp::ReadLocks, None, e))?;
        if used.is_some() {
            let id = file.stat().map_err(|e| Error::io(path, FileOp::Stat, None, e))?.id;
            return Err(Error::InUse { path: path.to_owned(), holders: OsHost.holders(id) });
        }
    }
    Ok(())
}

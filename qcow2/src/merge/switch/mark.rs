//! One merged layer, held as its only user: known again, marked, or removed.

use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, FileOp, Refusal, Result};
use crate::format::{Mark, is_qcow2, plan_mark};
use crate::image::Qcow2;
use crate::storage::{Access, FileId, FileStat, Host, LockError, LockMode, Place, Storage, may_be_unlocked};

/// An image that the caller has seen before, and what must still be true of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Known {
    /// Its name.
    pub path: PathBuf,
    /// Which file it was.
    pub id: FileId,
    /// Its length in bytes, if it must be the same.
    pub len: Option<u64>,
    /// When it was last written, in nanoseconds since 1970, if that must be the same.
    pub modified_ns: Option<i128>,
    /// When it was last changed in any way, which no program can set back. Only looked at where the time of the write must be
    /// the same.
    pub changed_ns: Option<i128>,
    /// Whether it may be changed though its file system has no locks: then only the caller knows that nobody else uses it.
    pub no_locks: bool,
}

impl Known {
    /// The file that the name leads to now, as it is now.
    ///
    /// # Errors
    /// A name that leads to nothing.
    pub fn now(host: &dyn Host, path: &Path) -> Result<Self> {
        let stat = host.stat(path).map_err(|e| Error::io(path, FileOp::Open, None, e))?;
        let (len, modified_ns) = (Some(stat.len), Some(stat.modified_ns));
        let changed_ns = Some(stat.changed_ns);
        Ok(Self { path: path.to_owned(), id: stat.id, len, modified_ns, changed_ns, no_locks: false })
    }

    /// Opens the file and locks it; then it must be the known one, unchanged.
    pub(crate) fn open(&self, host: &dyn Host, mode: LockMode) -> Result<Arc<dyn Storage>> {
        let access = match mode {
            LockMode::Read => Access::Read,
            LockMode::Write => Access::ReadWrite,
        };
        let io = |op| move |e| Error::io(&self.path, op, None, e);
        let file = host.open(&self.path, access).map_err(io(FileOp::Open))?;
        file.lock(mode).map_err(|e| match e {
            LockError::Held { .. } => {
                Error::InUse { path: self.path.clone(), holders: host.holders(self.id) }
            }
            LockError::Io(e) => Error::io(&self.path, FileOp::Lock, None, e),
        })?;
        may_be_unlocked(host, &self.path, self.id, &*file, access, self.no_locks)?;
        self.judge(&file.stat().map_err(io(FileOp::Stat))?)?;
        Ok(file)
    }

    /// Whether a file is the known one, unchanged.
    ///
    /// # Errors
    /// [`Refusal::NotAsKnown`] with the first thing that is different.
    pub(crate) fn judge(&self, stat: &FileStat) -> Result<()> {
        let what = if stat.id != self.id {
            "its name leads to another file now".to_owned()
        } else if let Some(len) = self.len.filter(|&len| len != stat.len) {
            format!("it was {len} bytes long, and is {} bytes long now", stat.len)
        } else if self.modified_ns.is_some_and(|then| then != stat.modified_ns) {
            "it was written to since".to_owned()
        } else if self.modified_ns.and(self.changed_ns).is_some_and(|then| then != stat.changed_ns) {
            "it was changed since".to_owned()
        } else {
            return Ok(());
        };
        Err(Error::refused(&self.path, Refusal::NotAsKnown { what }))
    }
}

/// Marks an image, whose file is held under lock, as merged into `base`; false if its header has no room for that.
///
/// # Errors
/// An I/O error; an image that is damaged.
pub(crate) fn mark(image: &Known, file: Arc<dyn Storage>, base: &Path) -> Result<bool> {
    let mut magic = [0; 4];
    file.read_exact_or_zero(&mut magic, 0).map_err(|e| Error::io(&image.path, FileOp::Read, Some(0), e))?;
    if !is_qcow2(&magic) {
        return Ok(false);
    }
    let header = Qcow2::read_cluster0(&image.path, &*file)?.header;
    let mut cluster = vec![0; header.geometry().cluster_size() as usize];
    let io = |op, at| move |e| Error::io(&image.path, op, Some(at), e);
    file.read_exact_or_zero(&mut cluster, 0).map_err(io(FileOp::Read, 0))?;
    let Ok(switch) = plan_mark(&cluster, base.as_os_str().as_bytes(), Mark::Merged) else { return Ok(false) };
    // An image that nobody needs is not worth a write that a power cut may tear.
    if !switch.atomic {
        return Ok(false);
    }
    for write in &switch.writes {
        file.write_all_at(&write.bytes, write.offset).map_err(io(FileOp::Write, write.offset))?;
        file.sync().map_err(|e| Error::barrier(&image.path, e))?;
    }
    Ok(true)
}

/// Removes what lies at a place; that is durable afterwards.
///
/// # Errors
/// The system's.
pub(crate) fn unlink(host: &dyn Host, place: &Place) -> Result<()> {
    place.unlink(host).map_err(|e| Error::io(&place.path(), FileOp::Remove, None, e))?;
    place.sync(host).map_err(|e| Error::barrier(place.folder().path(), e))
}

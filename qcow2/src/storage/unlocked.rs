//! Files that are locked, and files on file systems without locks.

use std::path::Path;

use super::{Access, FileId, Host, LockError, LockMode, Storage};
use crate::error::{Error, FileOp, Refusal, Result};

/// Locks a file, or says who holds it.
///
/// # Errors
/// [`Error::InUse`]; the system's.
pub(crate) fn lock(host: &dyn Host, path: &Path, file: &dyn Storage, mode: LockMode) -> Result<()> {
    file.lock(mode).map_err(|e| match e {
        LockError::Held { .. } => {
            let holders = file.stat().map(|stat| host.holders(stat.id)).unwrap_or_default();
            Error::InUse { path: path.to_owned(), holders }
        }
        LockError::Io(e) => Error::io(path, FileOp::Lock, None, e),
    })
}

/// Lets a file pass that is locked, or that lies on a file system without locks: to be read, or if the caller `allowed`
/// that and no process is seen that has it open. To be called when a lock was asked for.
///
/// # Errors
/// [`Refusal::NoLocks`]; [`Error::InUse`].
pub(crate) fn may_be_unlocked(
    host: &dyn Host,
    path: &Path,
    id: FileId,
    file: &dyn Storage,
    access: Access,
    allowed: bool,
) -> Result<()> {
    if file.has_locks() || access == Access::Read {
        return Ok(());
    }
    if !allowed {
        return Err(Error::refused(path, Refusal::NoLocks));
    }
    let holders = host.holders(id);
    if holders.is_empty() { Ok(()) } else { Err(Error::InUse { path: path.to_owned(), holders }) }
}

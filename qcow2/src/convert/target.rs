//! A new file that has a temporary name until it is complete.

use std::ffi::OsString;
use std::io::ErrorKind;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::exists;
use crate::error::{Error, FileOp, Refusal, Result};
use crate::image::create::dir_of;
use crate::storage::{FileKind, Host, LockMode, Place, Storage, lock};

/// The most bytes of the output's name that the temporary name repeats, so that the whole stays below the limit
/// of file systems, 255 bytes.
const MAX_NAME: usize = 200;

/// How many temporary names are tried. Some may belong to files of processes that were killed.
const ATTEMPTS: u32 = 1000;

/// A new file beside the output. It is removed when dropped, unless it got the output's name. Until then only
/// its owner may read it.
#[derive(Debug)]
pub(super) struct Temporary<'a> {
    host: &'a dyn Host,
    place: Place,
    path: PathBuf,
    file: Arc<dyn Storage>,
    named: bool,
}

impl<'a> Temporary<'a> {
    /// Creates and locks a file in the directory of `output`.
    ///
    /// # Errors
    /// An I/O error.
    pub(super) fn create(host: &'a dyn Host, output: &Path) -> Result<Self> {
        let folder = Place::named(host, output).map_err(|e| Error::io(output, FileOp::Create, None, e))?;
        for attempt in 0..ATTEMPTS {
            let place = folder.beside(name(output, attempt));
            let path = output.with_file_name(place.name());
            match place.create(host) {
                Ok(file) => {
                    let this = Self { host, place, path, file, named: false };
                    lock(host, &this.path, &*this.file, LockMode::Write)?;
                    return Ok(this);
                }
                Err(e) if e.kind() == ErrorKind::AlreadyExists => {}
                Err(e) => return Err(Error::io(&path, FileOp::Create, None, e)),
            }
        }
        let path = output.with_file_name(name(output, 0));
        Err(Error::io(&path, FileOp::Create, None, ErrorKind::AlreadyExists.into()))
    }

    /// The temporary name.
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The file.
    pub(super) fn file(&self) -> &Arc<dyn Storage> {
        &self.file
    }

    /// Gives the file, which must be durable, the rights of the first of `inputs`, as far as the others allow
    /// them. Then gives it its final name, durably, in the folder in which it was made.
    ///
    /// # Errors
    /// An I/O error; [`Error::Refused`] if there is a file of that name by now.
    pub(super) fn give_name(mut self, output: &Path, inputs: &[&dyn Storage]) -> Result<()> {
        self.file.take_rights(inputs);
        let name = output.file_name().unwrap_or_default();
        self.place.rename_new(self.host, name).map_err(|e| match e.kind() {
            ErrorKind::AlreadyExists => exists(output),
            _ => Error::io(output, FileOp::Rename, None, e),
        })?;
        self.named = true;
        self.place.sync(self.host).map_err(|e| {
            // The name may not survive a power cut, so the flatten has failed; and the file would stop the next
            // try.
            let _ = self.place.beside(name).unlink_file(self.host, &*self.file);
            Error::barrier(dir_of(output), e)
        })
    }
}

impl Drop for Temporary<'_> {
    fn drop(&mut self) {
        if !self.named {
            // It is dropped early only because of an error, which is the one to report.
            let _ = self.place.unlink_file(self.host, &*self.file);
        }
    }
}

/// Refuses an output that exists, whatever it is.
///
/// # Errors
/// [`Error::Refused`]; an I/O error if it cannot be told.
pub(super) fn refuse_existing(host: &dyn Host, output: &Path) -> Result<()> {
    match host.stat(output) {
        Ok(stat) if stat.kind == FileKind::Block => Err(Error::refused(output, Refusal::DeviceIsThere)),
        Ok(_) => Err(exists(output)),
        Err(e) if e.kind() == ErrorKind::NotFound => {
            let dir = dir_of(output);
            host.stat(dir).map_err(|e| Error::io(dir, FileOp::Open, None, e)).map(drop)
        }
        Err(e) => Err(Error::io(output, FileOp::Stat, None, e)),
    }
}

/// The temporary name for an attempt: hidden, and recognisable by users.
fn name(output: &Path, attempt: u32) -> OsString {
    let own = output.file_name().unwrap_or_default().as_bytes();
    let mut name = vec![b'.'];
    name.extend(own.iter().take(MAX_NAME));
    name.extend(format!(".qmerge-{}-{attempt}", std::process::id()).bytes());
    OsString::from_vec(name)
}

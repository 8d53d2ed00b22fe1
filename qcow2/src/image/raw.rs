//! Raw images: the guest's bytes as they are.

use crate::error::shown;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::{Extent, Mapping, push};
use crate::error::{Error, FileOp, Result};
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// An opened raw image. Holes of the file are zeros; everything else is data.
#[derive(Debug)]
pub struct Raw {
    path: PathBuf,
    file: Arc<dyn Storage>,
    size: u64,
}

/// QEMU sees raw images in sectors: a file of odd length reads as zeros up to the next one.
const SECTOR: u64 = 512;

impl Raw {
    /// Opens a raw image.
    ///
    /// # Errors
    /// The file's length cannot be read.
    pub(crate) fn open(path: &Path, file: Arc<dyn Storage>) -> Result<Self> {
        let len = file.size().map_err(|e| Error::io(path, FileOp::Size, None, e))?;
        let size = len
            .checked_next_multiple_of(SECTOR)
            .ok_or_else(|| Error::Usage(format!("{}: the file is too long", shown(path))))?;
        Ok(Self { path: path.to_owned(), file, size })
    }

    /// The size of the guest's disk in bytes: the file's length, rounded up to a sector as QEMU does.
    pub(crate) fn virtual_size(&self) -> u64 {
        self.size
    }

    /// The image's path, as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The image file.
    pub(crate) fn file(&self) -> &Arc<dyn Storage> {
        &self.file
    }

    /// Goes on with another storage for the image's file, which holds the same image.
    pub(crate) fn replace_file(&mut self, file: Arc<dyn Storage>) -> Result<()> {
        *self = Self::open(&self.path, file)?;
        Ok(())
    }

    /// See [`super::Image::map`].
    ///
    /// # Errors
    /// The file's holes cannot be asked for.
    pub(crate) fn map(&self, range: GuestRange, out: &mut Vec<Extent>) -> Result<()> {
        let end = range.end().get().min(self.size);
        let mut at = range.start.get();
        while at < end {
            let data = self.next_data(at)?.unwrap_or(end..end);
            let from = data.start.clamp(at, end);
            let to = data.end.clamp(from, end);
            push(out, GuestOffset::new(at), from - at, Mapping::Zero { host: Some(HostOffset::new(at)) });
            push(out, GuestOffset::new(from), to - from, Mapping::Data { host: HostOffset::new(from) });
            at = to;
        }
        Ok(())
    }

    /// See [`super::Image::next_allocated`]; zeros of holes count as nothing here.
    ///
    /// # Errors
    /// The file's holes cannot be asked for.
    pub(crate) fn next_allocated(&self, from: GuestOffset) -> Result<Option<GuestOffset>> {
        Ok(self.next_data(from.get())?.map(|data| from.max(GuestOffset::new(data.start))))
    }

    fn next_data(&self, from: u64) -> Result<Option<std::ops::Range<u64>>> {
        self.file.next_data(from).map_err(|e| Error::io(&self.path, FileOp::FindData, Some(from), e))
    }
}

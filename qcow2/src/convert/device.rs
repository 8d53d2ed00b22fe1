//! A block device that takes a whole disk.

use std::path::Path;
use std::sync::Arc;

use crate::chain::Chain;
use crate::error::{Error, FileOp, Result, shown};
use crate::storage::{FileKind, Host, LockMode, Storage, lock};

/// The sector that holds a qcow2 image's magic: without it there is no image.
const SECTOR: usize = 512;

/// A device that is to be written, held so that nobody else begins to use it.
#[derive(Debug)]
pub(super) struct Device {
    file: Arc<dyn Storage>,
}

impl Device {
    /// Opens and locks the device that is called `output`, which no layer of the chain may lie on.
    ///
    /// # Errors
    /// [`Error::Usage`] if it is no block device, or a layer; [`Error::InUse`] if it is mounted or in use in another way;
    /// an I/O error.
    pub(super) fn open(host: &dyn Host, output: &Path, chain: &Chain) -> Result<Self> {
        let stat = host.stat(output).map_err(|e| Error::io(output, FileOp::Stat, None, e))?;
        if stat.kind != FileKind::Block {
            return Err(Error::Usage(format!("{} is no block device", shown(output))));
        }
        if chain.files().contains(&stat.id) {
            return Err(Error::Usage(format!("{} holds a layer of the chain itself", shown(output))));
        }
        let file = host.open_unused(output).map_err(|e| match e.kind() {
            std::io::ErrorKind::ResourceBusy => {
                Error::InUse { path: output.to_owned(), holders: host.holders(stat.id) }
            }
            _ => Error::io(output, FileOp::Open, None, e),
        })?;
        let is_the_same = file.stat().is_ok_and(|opened| opened.id == stat.id);
        if !is_the_same {
            return Err(Error::Usage(format!("{} is another device by now", shown(output))));
        }
        lock(host, output, &*file, LockMode::Write)?;
        Ok(Self { file })
    }

    /// The device.
    pub(super) fn file(&self) -> &Arc<dyn Storage> {
        &self.file
    }

    /// Refuses a device with fewer than `needed` bytes.
    ///
    /// # Errors
    /// [`Error::NoSpace`].
    pub(super) fn judge_size(&self, output: &Path, needed: u64) -> Result<()> {
        let available = self.file.size().map_err(|e| Error::io(output, FileOp::Size, None, e))?;
        match available < needed {
            true => Err(Error::NoSpace { path: output.to_owned(), needed, available }),
            false => Ok(()),
        }
    }

    /// Has the device read as zeros from `start` on, up to `end` or to its own end.
    ///
    /// # Errors
    /// An I/O error.
    pub(super) fn clear(&self, output: &Path, start: u64, end: Option<u64>) -> Result<()> {
        /// How much is cleared by one call, in bytes.
        const PIECE: u64 = 256 << 20;
        let size = self.file.size().map_err(|e| Error::io(output, FileOp::Size, None, e))?;
        let end = end.unwrap_or(size).min(size);
        let mut at = start;
        while at < end {
            let len = PIECE.min(end - at);
            let failed = |e| Error::io(output, FileOp::Write, Some(at), e);
            self.file.write_zeroes(at, len).map_err(failed)?;
            at += len;
        }
        Ok(())
    }

    /// Takes the first sector of the image away, so that the device holds none until it is whole; gives it.
    ///
    /// # Errors
    /// An I/O error.
    pub(super) fn take_magic(&self, output: &Path) -> Result<[u8; SECTOR]> {
        let mut sector = [0; SECTOR];
        let read = self.file.read_exact_or_zero(&mut sector, 0);
        read.map_err(|e| Error::io(output, FileOp::Read, Some(0), e))?;
        self.write_magic(output, &[0; SECTOR])?;
        Ok(sector)
    }

    /// Writes the first sector, durably.
    ///
    /// # Errors
    /// An I/O error; a barrier that failed.
    pub(super) fn write_magic(&self, output: &Path, sector: &[u8; SECTOR]) -> Result<()> {
        let written = self.file.write_all_at(sector, 0);
        written.map_err(|e| Error::io(output, FileOp::Write, Some(0), e))?;
        self.file.sync().map_err(|e| Error::barrier(output, e))
    }
}

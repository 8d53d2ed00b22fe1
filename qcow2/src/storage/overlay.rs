//! A file whose changes wait in memory, for work on tables. Its owner decides what a barrier does.

use std::fmt;
use std::io;
use std::ops::Range;
use std::sync::{PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use super::pages::{Pages, end_of, pieces};
use super::{CopyError, FileStat, Storage};

/// What every [`Storage`] around another one in its field `file` passes on: the locks and the file system are the file's.
macro_rules! locks_of_its_file {
    () => {
        fn file_system(&self) -> Option<u64> {
            self.file.file_system()
        }

        fn lock(&self, mode: $crate::storage::LockMode) -> Result<(), $crate::storage::LockError> {
            self.file.lock(mode)
        }

        fn has_locks(&self) -> bool {
            self.file.has_locks()
        }

        fn used_by_others(&self) -> std::io::Result<Option<$crate::storage::LockMode>> {
            self.file.used_by_others()
        }
    };
}
pub(crate) use locks_of_its_file;

/// Decides what happens to the changes.
pub(crate) trait Flush: Send + Sync + fmt::Debug {
    /// Told before one more page is held; may write pages, and drop them.
    ///
    /// # Errors
    /// The system's.
    fn make_room(&mut self, file: &dyn Storage, pages: &mut Pages<()>) -> io::Result<()>;

    /// Makes durable what was written, as far as anything is to be.
    ///
    /// # Errors
    /// The system's.
    fn barrier(&mut self, file: &dyn Storage, pages: &mut Pages<()>) -> io::Result<()>;
}

/// A file with changes that are held in memory; `F` decides what happens to them.
///
/// Copies and changes of the length are not supported. Punching a hole changes nothing.
#[derive(Debug)]
pub(crate) struct PageOverlay<'a, F> {
    file: &'a dyn Storage,
    held: RwLock<Held<F>>,
}

#[derive(Debug)]
struct Held<F> {
    pages: Pages<()>,
    flush: F,
}

impl<'a, F: Flush> PageOverlay<'a, F> {
    /// An overlay without changes.
    pub(crate) fn new(file: &'a dyn Storage, flush: F) -> Self {
        Self { file, held: RwLock::new(Held { pages: Pages::new(|_| ()), flush }) }
    }

    /// Ends the overlay with one more barrier, and returns its `F`.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn end(self) -> io::Result<F> {
        self.sync()?;
        Ok(self.held.into_inner().unwrap_or_else(PoisonError::into_inner).flush)
    }

    fn read(&self) -> RwLockReadGuard<'_, Held<F>> {
        self.held.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> RwLockWriteGuard<'_, Held<F>> {
        self.held.write().unwrap_or_else(PoisonError::into_inner)
    }
}

fn unsupported<T>() -> io::Result<T> {
    Err(io::ErrorKind::Unsupported.into())
}

impl<F: Flush> Storage for PageOverlay<'_, F> {
    fn size(&self) -> io::Result<u64> {
        Ok(self.read().pages.size_over(self.file.size()?))
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.read().pages.read(self.file, buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut held = self.write();
        let Held { pages, flush } = &mut *held;
        for piece in pieces(offset..end_of(offset, buf.len() as u64)?) {
            flush.make_room(self.file, pages)?;
            let part = (piece.start - offset) as usize..(piece.end - offset) as usize;
            let part = buf.get(part).unwrap_or_default();
            pages.edit(self.file, piece.clone(), |bytes| bytes.copy_from_slice(part))?;
            // Also what is there already: a longer file may end in it.
            pages.mark(&piece);
        }
        Ok(())
    }

    fn write_zeroes(&self, _offset: u64, _len: u64) -> io::Result<()> {
        unsupported()
    }

    fn punch_hole(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Ok(())
    }

    fn copy_from(&self, _: &dyn Storage, _: u64, at: u64, _: u64) -> Result<(), CopyError> {
        unsupported().map_err(CopyError::write(at))
    }

    fn set_len(&self, _len: u64) -> io::Result<()> {
        unsupported()
    }

    fn sync(&self) -> io::Result<()> {
        let mut held = self.write();
        let Held { pages, flush } = &mut *held;
        flush.barrier(self.file, pages)
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        Ok(self.read().pages.next_data(offset, self.file.next_data(offset)?))
    }

    fn stat(&self) -> io::Result<FileStat> {
        Ok(FileStat { len: self.size()?, ..self.file.stat()? })
    }

    locks_of_its_file!();

    fn drop_cache(&self) -> io::Result<()> {
        self.file.drop_cache()
    }
}

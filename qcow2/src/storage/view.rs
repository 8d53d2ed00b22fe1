//! Read-only views of whole files: the one module of the engine with `unsafe` code.
//!
//! A mapped file must keep its length: reading a page that was cut off kills the process with SIGBUS.
//! That is why a view is made only of a file that is held under lock (see
//! [`Storage::view`](super::Storage::view)), which keeps QEMU and this engine from shortening it, and
//! why the engine itself never shortens a file that it has a view of. What another program does to the
//! file behind the locks cannot be prevented, here as little as in QEMU.
//!
//! A page on a bad sector is a SIGBUS as well. So the kernel is asked to read the pages in before they are touched
//! (`MADV_POPULATE_READ`), and says so if it cannot: then there is no view of them, and reading them by position tells
//! the error. The same holds for kernels before 5.14, which cannot be asked. Positional reads are used wherever a view is
//! not measurably better.
#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use memmap2::{Advice, Mmap};

/// A regular file's bytes in memory, from its start to the end that it had when the view was made.
#[derive(Debug)]
pub struct FileView {
    map: Mmap,
}

impl FileView {
    /// Maps a whole file, which must be a regular one that is held under lock.
    pub(super) fn of(file: &File) -> io::Result<Self> {
        // SAFETY: the mapping is private to this value, read-only, and lives as long as the slices that
        // borrow from it. The file is held under lock for as long as it is open (the callers in this
        // module's parent see to that), so that no well-behaved process shortens it; see the module's
        // text for the others. The bytes are only ever interpreted by code that accepts any bytes.
        let map = unsafe { Mmap::map(file)? };
        Ok(Self { map })
    }

    /// The bytes of a range; `None` if it does not lie in the file, or if the system cannot read all of its pages.
    pub fn bytes(&self, offset: u64, len: usize) -> Option<&[u8]> {
        let start = usize::try_from(offset).ok()?;
        let bytes = self.map.get(start..start.checked_add(len)?)?;
        if len > 0 {
            self.map.advise_range(Advice::PopulateRead, start, len).ok()?;
        }
        Some(bytes)
    }
}

//! Copies between files: inside the kernel where it can, through a bounded buffer otherwise.

use std::cell::RefCell;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;

use super::Storage;

/// Why a copy failed, and on which side.
#[derive(Debug, thiserror::Error)]
pub enum CopyError {
    /// The source cannot be read.
    #[error("reading at offset {offset:#x}: {source}")]
    Read {
        /// The first sector of the source that cannot be read, as an offset in bytes.
        offset: u64,
        /// The system's answer.
        source: io::Error,
    },
    /// The target cannot be written.
    #[error("writing at offset {offset:#x}: {source}")]
    Write {
        /// Where in the target.
        offset: u64,
        /// The system's answer.
        source: io::Error,
    },
}

impl CopyError {
    /// The target cannot be written at an offset.
    pub(crate) fn write(offset: u64) -> impl Fn(io::Error) -> Self {
        move |source| Self::Write { offset, source }
    }

    /// The source cannot be read somewhere in a range, where the first bad sector is looked for.
    pub(crate) fn read(src: &dyn Storage, offset: u64, len: u64) -> impl Fn(io::Error) -> Self {
        move |source| Self::Read { offset: first_unreadable(src, offset, len), source }
    }
}

/// The first offset of a range that cannot be read, to the page: where reading the range has failed. If each page can be
/// read by now, the start of the range.
pub(crate) fn first_unreadable(file: &dyn Storage, offset: u64, len: u64) -> u64 {
    const PAGE: u64 = 4096;
    let end = offset.saturating_add(len);
    let mut page = [0; PAGE as usize];
    let mut at = offset;
    while at < end {
        let next = (at / PAGE + 1).saturating_mul(PAGE).min(end);
        let part = page.get_mut(..(next - at) as usize).unwrap_or_default();
        if file.read_at(part, at).is_err() {
            return at;
        }
        at = next;
    }
    offset
}

/// Reads what can be read of a range, where reading it as a whole has failed, page by page. Gives the parts of `buf` that
/// could not be, which are zeros then; what lies behind the end of the file is zeros, too.
pub(crate) fn read_around(file: &dyn Storage, buf: &mut [u8], offset: u64) -> Vec<Range<usize>> {
    const PAGE: u64 = 4096;
    let mut unreadable: Vec<Range<usize>> = Vec::new();
    let mut at = 0;
    while at < buf.len() {
        let len = PAGE - (offset + at as u64) % PAGE;
        let next = (at + len as usize).min(buf.len());
        let page = buf.get_mut(at..next).unwrap_or_default();
        if file.read_exact_or_zero(page, offset + at as u64).is_err() {
            page.fill(0);
            match unreadable.last_mut() {
                Some(last) if last.end == at => last.end = next,
                _ => unreadable.push(at..next),
            }
        }
        at = next;
    }
    unreadable
}

/// The most that one `copy_file_range` call is asked to move, in bytes: large enough to share many
/// blocks at once, small enough for every 32-bit length inside a file system.
const KERNEL_CHUNK: u64 = 1 << 30;

/// The size of the buffer of a plain copy, in bytes.
const BUFFER: usize = 1 << 20;

/// The least that is worth sharing on XFS, in bytes: each shared piece is an extent of its own, and for
/// a single block that took twice the time of moving the bytes. On btrfs it made no difference.
const LEAST_SHARED: u64 = 32 << 10;

/// The least that is left to the kernel to copy into this file, in bytes. Where blocks are not shared,
/// its copy is never slower.
pub(super) fn least_kernel_copy(file: &File) -> u64 {
    const XFS: u64 = 0x5846_5342;
    match rustix::fs::fstatfs(file) {
        Ok(stat) if stat.f_type as u64 == XFS => LEAST_SHARED,
        _ => 0,
    }
}

/// Copies with `copy_file_range` from `src` to `dst` as far as that works; returns how many bytes it
/// moved. Fewer than `len` means that the rest needs a plain copy (which also knows what to do at the
/// end of `src`). `unsupported` remembers that `dst` cannot be copied to in the kernel at all.
pub(super) fn copy_in_kernel(
    src: &File,
    src_offset: u64,
    dst: &File,
    dst_offset: u64,
    len: u64,
    unsupported: &AtomicBool,
) -> u64 {
    let mut done = 0;
    while done < len && !unsupported.load(Ordering::Relaxed) {
        let (Some(mut from), Some(mut to)) = (src_offset.checked_add(done), dst_offset.checked_add(done))
        else {
            break;
        };
        let chunk = usize::try_from((len - done).min(KERNEL_CHUNK)).unwrap_or(usize::MAX);
        match rustix::fs::copy_file_range(src, Some(&mut from), dst, Some(&mut to), chunk) {
            Ok(0) => break,
            Ok(n) => done += n as u64,
            Err(Errno::INTR) => {}
            Err(Errno::NOSYS | Errno::OPNOTSUPP | Errno::BADF) => unsupported.store(true, Ordering::Relaxed),
            // Some depend on the pair of files or on the range, and cost next to nothing to meet again. Of the others
            // the plain copy finds out which side has failed.
            Err(_) => break,
        }
    }
    done
}

/// Copies through a buffer of this thread. Bytes behind the end of `src` are copied as zeros.
pub(super) fn copy_plain(
    src: &dyn Storage,
    src_offset: u64,
    dst: &dyn Storage,
    dst_offset: u64,
    len: u64,
) -> Result<(), CopyError> {
    thread_local! {
        static REUSED: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
    }
    // Taken out of its cell, so that a storage that copies inside a read or a write finds it free.
    let mut buf = REUSED.take();
    let wanted = usize::try_from(len).unwrap_or(BUFFER).min(BUFFER);
    if buf.len() < wanted {
        buf.resize(wanted, 0);
    }
    let result = copy_through(&mut buf, src, src_offset, dst, dst_offset, len);
    REUSED.set(buf);
    result
}

fn copy_through(
    buf: &mut [u8],
    src: &dyn Storage,
    src_offset: u64,
    dst: &dyn Storage,
    dst_offset: u64,
    len: u64,
) -> Result<(), CopyError> {
    let mut done = 0;
    while done < len {
        let size = usize::try_from(len - done).unwrap_or(BUFFER).min(buf.len());
        let Some(piece) = buf.get_mut(..size) else { break };
        let (from, to) = (src_offset.saturating_add(done), dst_offset.saturating_add(done));
        let n = src.read_at(piece, from).map_err(CopyError::read(src, from, size as u64))?;
        if n == 0 {
            return dst.write_zeroes(to, len - done).map_err(CopyError::write(to));
        }
        dst.write_all_at(piece.get(..n).unwrap_or_default(), to).map_err(CopyError::write(to))?;
        done += n as u64;
    }
    Ok(())
}

/// Where a range ends, if all of it fits into the offsets of a file.
pub(super) fn checked_end(offset: u64, len: u64) -> io::Result<u64> {
    offset.checked_add(len).filter(|&end| i64::try_from(end).is_ok()).ok_or_else(out_of_range)
}

/// The error for a range that does not fit into the offsets of a file.
pub(super) fn out_of_range() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidInput, "the range reaches past the largest offset of a file")
}

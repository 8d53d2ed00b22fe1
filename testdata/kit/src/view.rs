//! What a guest would read, as a raw file.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use rustix::fs::SeekFrom;

/// The bytes of a disk, kept in a sparse raw file.
#[derive(Debug)]
pub struct View {
    path: PathBuf,
    file: File,
    len: u64,
}

impl View {
    /// The raw file `path` as it is now.
    pub fn new(path: PathBuf) -> Self {
        let file = File::open(&path).unwrap();
        let len = file.metadata().unwrap().len();
        Self { path, file, len }
    }

    /// Its path as an argument.
    pub fn arg(&self) -> &str {
        self.path.to_str().unwrap()
    }

    /// The size of the disk in bytes.
    #[expect(clippy::len_without_is_empty, reason = "nobody asks")]
    pub fn len(&self) -> u64 {
        self.len
    }

    /// The bytes from `start`; zeros past the end.
    pub fn bytes(&self, start: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        let held = self.len.saturating_sub(start).min(count as u64) as usize;
        self.file.read_exact_at(&mut bytes[..held], start).unwrap();
        bytes
    }

    /// Fails unless both disks have one size and the same bytes.
    #[track_caller]
    pub fn assert_same(&self, other: &Self, what: &str) {
        assert!(self.len == other.len, "{what}: sizes differ, {} and {}", self.len, other.len);
        self.assert_same_range(other, 0, self.len, what);
    }

    /// Fails unless both disks hold the same bytes from `start` to `end`; past its end a disk holds zeros.
    #[track_caller]
    pub fn assert_same_range(&self, other: &Self, start: u64, end: u64, what: &str) {
        if let Some((at, ours, theirs)) = self.first_difference(other, start, end) {
            panic!("{what}: first difference at {at:#x}: {ours:#04x} and {theirs:#04x}");
        }
    }

    /// The first byte from `start` to `end` that differs, with both values.
    pub fn first_difference(&self, other: &Self, start: u64, end: u64) -> Option<(u64, u8, u8)> {
        const PIECE: u64 = 1 << 20;
        let mut ranges = data_ranges(&self.file);
        ranges.extend(data_ranges(&other.file));
        ranges.sort_unstable();
        let mut done = start;
        for (from, to) in ranges {
            let mut at = from.max(done);
            let to = to.min(end);
            while at < to {
                let count = (to - at).min(PIECE) as usize;
                let (ours, theirs) = (self.bytes(at, count), other.bytes(at, count));
                if let Some(index) = (0..count).find(|index| ours[*index] != theirs[*index]) {
                    return Some((at + index as u64, ours[index], theirs[index]));
                }
                at += count as u64;
            }
            done = done.max(at);
        }
        None
    }

    /// Fails unless every byte from `start` to `end` is `value`.
    #[track_caller]
    pub fn assert_all(&self, start: u64, end: u64, value: u8, what: &str) {
        assert!(end <= self.len, "{what}: the disk ends at {}", self.len);
        let bytes = self.bytes(start, (end - start) as usize);
        if let Some(index) = bytes.iter().position(|byte| *byte != value) {
            let found = bytes[index];
            panic!("{what}: {found:#04x} instead of {value:#04x} at {:#x}", start + index as u64);
        }
    }
}

/// Where a file holds data, as (start, end) in file order; the rest are holes.
pub(crate) fn data_ranges(file: &File) -> Vec<(u64, u64)> {
    let mut ranges = Vec::new();
    let mut at = 0;
    // The seek fails when no data follows.
    while let Ok(start) = rustix::fs::seek(file, SeekFrom::Data(at)) {
        let end = rustix::fs::seek(file, SeekFrom::Hole(start)).unwrap();
        ranges.push((start, end));
        at = end;
    }
    ranges
}

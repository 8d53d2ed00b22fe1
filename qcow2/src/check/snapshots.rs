//! Reads the snapshot table entry by entry.

use crate::error::Result;
use crate::format::{FormatError, MAX_SNAPSHOT_TABLE, Snapshot, SnapshotLengths, snapshot_table_bound};

use super::finding::{Structure, Unread};
use super::subject::Subject;

/// Bytes of the table that are read at once.
const CHUNK: u64 = 1 << 20;

/// An entry of the table, or why no more entries follow.
pub(crate) enum Entry {
    /// An entry that can be read. It may break a rule, though its meaning is known: see `wrong`.
    Known {
        /// The entry. If there is too much extra data, it has the first 1024 bytes of it.
        snapshot: Box<Snapshot>,
        /// The rule that it breaks: there is too much extra data.
        wrong: Option<FormatError>,
    },
    /// Bytes that are no entry. Its length is unknown, so nothing behind it can be read.
    Broken {
        /// Where it begins.
        at: u64,
        /// What is wrong.
        error: FormatError,
    },
    /// The next entry would make the table longer than it can be. It took this many bytes so far.
    TooLong(u64),
    /// It cannot be read.
    Unread(Unread),
}

/// Calls `visit` with each entry; anything but [`Entry::Known`] is the last. Returns the length of the known
/// entries in bytes.
///
/// # Errors
/// Cancellation, and those of `visit`.
pub(crate) fn for_each_snapshot(
    subject: &Subject<'_>,
    mut visit: impl FnMut(Entry) -> Result<()>,
) -> Result<u64> {
    let (count, start) = (subject.header.snapshots, subject.header.snapshots_offset.get());
    let mut window = Window::default();
    let mut at = start;
    for _ in 0..count {
        subject.may_go_on()?;
        let (entry, len) = read(subject, &mut window, at);
        if at.saturating_add(len) > start.saturating_add(MAX_SNAPSHOT_TABLE) {
            visit(Entry::TooLong(at - start))?;
            break;
        }
        let is_last = !matches!(entry, Entry::Known { .. });
        visit(entry)?;
        if is_last {
            break;
        }
        at += len;
    }
    Ok(at - start)
}

/// Reads the entry at a host offset; returns it with its length in bytes.
fn read(subject: &Subject<'_>, window: &mut Window, at: u64) -> (Entry, u64) {
    let bytes = match window.from(subject, at, snapshot_table_bound(1)) {
        Ok(bytes) => bytes,
        Err(unread) => return (Entry::Unread(unread), 0),
    };
    let lengths = SnapshotLengths::of(bytes);
    let error = match Snapshot::decode(bytes, at) {
        Ok((snapshot, len)) => {
            return (Entry::Known { snapshot: Box::new(snapshot), wrong: None }, len as u64);
        }
        Err(error) if lengths.is_too_long() && lengths.entry() <= MAX_SNAPSHOT_TABLE => error,
        Err(error) => return (Entry::Broken { at, error }, 0),
    };
    let mut strings = vec![0; lengths.strings as usize];
    if let Err(unread) =
        subject.read(Structure::SnapshotTable, &mut strings, at.saturating_add(lengths.strings_at()))
    {
        return (Entry::Unread(unread), 0);
    }
    match Snapshot::decode_cut(bytes, &strings, at) {
        Ok(snapshot) => (Entry::Known { snapshot: Box::new(snapshot), wrong: Some(error) }, lengths.entry()),
        Err(error) => (Entry::Broken { at, error }, 0),
    }
}

/// A buffered piece of the file, for entries whose length is not known in advance.
#[derive(Default)]
struct Window {
    start: u64,
    bytes: Vec<u8>,
}

impl Window {
    /// At least `least` bytes from `at`; what lies behind the end of the file reads as zeros.
    fn from(&mut self, subject: &Subject<'_>, at: u64, least: u64) -> std::result::Result<&[u8], Unread> {
        let have = self.start.saturating_add(self.bytes.len() as u64).saturating_sub(at);
        if at < self.start || have < least {
            self.bytes.resize(CHUNK.max(least) as usize, 0);
            self.start = at;
            subject.read(Structure::SnapshotTable, &mut self.bytes, at)?;
        }
        Ok(self.bytes.get((at - self.start) as usize..).unwrap_or_default())
    }
}

//! Encodes and decodes the records of a backup, and reads and appends them in a file.

use crate::error::shown;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, FileOp, Refusal, Result};
use crate::storage::Storage;

/// The first bytes of a backup.
pub(super) const MAGIC: &[u8; 16] = b"qmerge-metadata2";
/// The most bytes of an image in one record.
pub(super) const PIECE: u64 = 1 << 20;
const HEAD: usize = 40;
/// The first record behind a barrier begins a block of its own, so that a power cut during its write cannot
/// tear records that are durable.
const BLOCK: u64 = 4096;
/// The longest content: sectors before a change and after it, a piece each.
const LONGEST: u32 = 2 << 20;

/// The kind of a record; see [`super`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum RecordKind {
    Image,
    Kept,
    Full,
    Change,
    Repaired,
    Restoring,
    Restored,
}

const KINDS: [(RecordKind, [u8; 4]); 7] = [
    (RecordKind::Image, *b"imag"),
    (RecordKind::Kept, *b"kept"),
    (RecordKind::Full, *b"full"),
    (RecordKind::Change, *b"chng"),
    (RecordKind::Repaired, *b"done"),
    (RecordKind::Restoring, *b"back"),
    (RecordKind::Restored, *b"home"),
];

/// Refers to a record by its offset and its checksum.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Link {
    pub(super) at: u64,
    pub(super) crc: u32,
}

/// A position between two records: the record before it, and where the next one may begin.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct RecordPosition {
    pub(super) last: Link,
    pub(super) end: u64,
}

impl RecordPosition {
    /// The position before the first record.
    pub(super) const START: Self = Self { last: Link { at: 0, crc: 0 }, end: MAGIC.len() as u64 };
}

/// A record as it was read.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct BackupRecord {
    pub(super) kind: RecordKind,
    pub(super) first: u64,
    pub(super) second: u64,
    pub(super) before: Link,
    pub(super) content: Vec<u8>,
    pub(super) link: Link,
}

impl BackupRecord {
    /// The position behind this record.
    pub(super) fn place(&self) -> RecordPosition {
        RecordPosition { last: self.link, end: self.link.at + (HEAD + self.content.len()) as u64 }
    }
}

/// Where the next block begins.
fn block(at: u64) -> u64 {
    at.checked_next_multiple_of(BLOCK).unwrap_or(at)
}

fn crc_of(head: &[u8], content: &[&[u8]]) -> u32 {
    let mut crc = crc32fast::Hasher::new();
    crc.update(head);
    content.iter().for_each(|part| crc.update(part));
    crc.finalize()
}

/// Reads a backup record by record, so that memory does not depend on their number.
#[derive(Debug)]
pub(super) struct BackupReader<'a> {
    path: &'a Path,
    file: &'a dyn Storage,
    len: u64,
}

impl<'a> BackupReader<'a> {
    /// # Errors
    /// The system's, and a file that is no backup.
    pub(super) fn of(path: &'a Path, file: &'a dyn Storage) -> Result<Self> {
        let len = file.size().map_err(|e| Error::io(path, FileOp::Size, None, e))?;
        let this = Self { path, file, len };
        let mut magic = [0; MAGIC.len()];
        this.read(&mut magic, 0)?;
        if &magic != MAGIC {
            return Err(this.damaged(0, "it does not begin as a backup that check --repair has made"));
        }
        Ok(this)
    }

    fn read(&self, buf: &mut [u8], at: u64) -> Result<()> {
        self.file.read_exact_or_zero(buf, at).map_err(|e| Error::io(self.path, FileOp::Read, Some(at), e))
    }

    /// The record at an offset; `None` if there is no whole one.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn at(&self, at: u64) -> Result<Option<BackupRecord>> {
        let mut head = [0; HEAD];
        let room = self.len.saturating_sub(at).saturating_sub(HEAD as u64);
        if self.len.saturating_sub(at) < HEAD as u64 {
            return Ok(None);
        }
        self.read(&mut head, at)?;
        let Some(head) =
            Head::decode(&head).filter(|head| head.len <= LONGEST && u64::from(head.len) <= room)
        else {
            return Ok(None);
        };
        let mut content = vec![0; head.len as usize];
        self.read(&mut content, at + HEAD as u64)?;
        if crc_of(&head.bytes, &[&content]) != head.crc {
            return Ok(None);
        }
        let Head { kind, first, second, before, crc, .. } = head;
        Ok(Some(BackupRecord { kind, first, second, before, content, link: Link { at, crc } }))
    }

    /// The next record; `None` if none follows.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn next(&self, place: RecordPosition) -> Result<Option<BackupRecord>> {
        let follows = |record: &BackupRecord| record.before == place.last;
        match self.at(place.end)?.filter(follows) {
            // A barrier came between them.
            None => Ok(self.at(block(place.end))?.filter(follows)),
            found => Ok(found),
        }
    }

    /// The length of the file in bytes.
    pub(super) fn len(&self) -> u64 {
        self.len
    }

    /// An error about this backup.
    pub(super) fn damaged(&self, offset: u64, what: impl Into<String>) -> Error {
        Error::refused(self.path, Refusal::BackupDamaged { offset, what: what.into() })
    }
}

/// A head as it was read.
struct Head {
    kind: RecordKind,
    len: u32,
    first: u64,
    second: u64,
    before: Link,
    crc: u32,
    /// The bytes of the head that the checksum covers.
    bytes: [u8; HEAD - 4],
}

impl Head {
    fn decode(head: &[u8; HEAD]) -> Option<Self> {
        let (bytes, crc) = head.split_last_chunk::<4>()?;
        let (tag, rest) = bytes.split_first_chunk::<4>()?;
        let (len, rest) = rest.split_first_chunk::<4>()?;
        let (first, rest) = rest.split_first_chunk::<8>()?;
        let (second, rest) = rest.split_first_chunk::<8>()?;
        let (at, rest) = rest.split_first_chunk::<8>()?;
        let before_crc: [u8; 4] = rest.try_into().ok()?;
        Some(Self {
            kind: KINDS.iter().find(|(_, known)| known == tag)?.0,
            len: u32::from_be_bytes(*len),
            first: u64::from_be_bytes(*first),
            second: u64::from_be_bytes(*second),
            before: Link { at: u64::from_be_bytes(*at), crc: u32::from_be_bytes(before_crc) },
            crc: u32::from_be_bytes(*crc),
            bytes: bytes.try_into().ok()?,
        })
    }
}

/// Appends records to a backup.
#[derive(Debug)]
pub(super) struct BackupWriter {
    path: PathBuf,
    file: Arc<dyn Storage>,
    /// Records that are not yet written, and the offset where they go.
    waiting: Vec<u8>,
    at: u64,
    last: Link,
}

impl BackupWriter {
    /// Begins a backup in a new file.
    pub(super) fn new(path: &Path, file: Arc<dyn Storage>) -> Self {
        Self { path: path.to_owned(), file, waiting: MAGIC.to_vec(), at: 0, last: Link::default() }
    }

    /// Goes on behind a record of a backup, and overwrites whatever lies there.
    pub(super) fn behind(path: &Path, file: Arc<dyn Storage>, place: RecordPosition) -> Self {
        Self { path: path.to_owned(), file, waiting: Vec::new(), at: block(place.end), last: place.last }
    }

    /// Adds a record, which may wait in memory until the next barrier.
    ///
    /// # Errors
    /// The system's; it names the backup.
    pub(super) fn put(
        &mut self,
        kind: RecordKind,
        first: u64,
        second: u64,
        content: &[&[u8]],
    ) -> io::Result<()> {
        let tag = KINDS.iter().find(|(known, _)| *known == kind).map(|(_, tag)| *tag);
        let len: usize = content.iter().map(|part| part.len()).sum();
        let link = self.at + self.waiting.len() as u64;
        let mut head = tag.unwrap_or_default().to_vec();
        // This cannot overflow: a record holds at most two pieces of 1 MiB.
        head.extend((len as u32).to_be_bytes());
        head.extend(first.to_be_bytes());
        head.extend(second.to_be_bytes());
        head.extend(self.last.at.to_be_bytes());
        head.extend(self.last.crc.to_be_bytes());
        let crc = crc_of(&head, content);
        self.waiting.extend(head);
        self.waiting.extend(crc.to_be_bytes());
        content.iter().for_each(|part| self.waiting.extend_from_slice(part));
        self.last = Link { at: link, crc };
        if self.waiting.len() as u64 >= PIECE { self.write() } else { Ok(()) }
    }

    fn write(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.waiting, self.at).map_err(|e| self.named(e))?;
        self.at += self.waiting.len() as u64;
        self.waiting.clear();
        Ok(())
    }

    /// Makes all records durable.
    ///
    /// # Errors
    /// The system's; it names the backup.
    pub(super) fn sync(&mut self) -> io::Result<()> {
        self.write()?;
        self.at = block(self.at);
        self.file.sync().map_err(|e| self.named(e))
    }

    fn named(&self, e: io::Error) -> io::Error {
        io::Error::new(e.kind(), format!("the backup {}: {e}", shown(&self.path)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Access, Host, MemHost};

    #[test]
    fn records_are_a_chain_that_ends_where_a_byte_is_wrong() {
        let (host, path) = (MemHost::new(), Path::new("/b"));
        let mut writer = BackupWriter::new(path, host.create_new(path).unwrap());
        let parts: [&[u8]; 2] = [b"before", b"after!"];
        writer.put(RecordKind::Image, 7, 1, &[b"who"]).unwrap();
        writer.put(RecordKind::Change, u64::MAX, 2, &parts).unwrap();
        writer.sync().unwrap();
        writer.put(RecordKind::Repaired, 1, 0, &[]).unwrap();
        writer.sync().unwrap();
        let whole = host.content(path).unwrap();
        let read = |bytes: &[u8]| {
            let host = MemHost::new();
            host.add(path, bytes).unwrap();
            let file = host.open(path, Access::Read).unwrap();
            let reader = BackupReader::of(path, &*file)?;
            let (mut records, mut place) = (Vec::new(), RecordPosition::START);
            while let Some(record) = reader.next(place)? {
                place = record.place();
                records.push(record);
            }
            Ok::<_, Error>(records)
        };
        let records = read(&whole).unwrap();
        assert_eq!(
            records.iter().map(|r| r.kind).collect::<Vec<_>>(),
            [RecordKind::Image, RecordKind::Change, RecordKind::Repaired]
        );
        assert_eq!((records[1].first, records[1].second), (u64::MAX, 2));
        assert_eq!(records[1].content, b"beforeafter!");
        assert_eq!((records[2].link.at, records[2].place().end), (BLOCK, whole.len() as u64));
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 1;
            let left = read(&flipped).map_or(0, |records| records.len());
            let is_gap = (records[1].place().end..BLOCK).contains(&(at as u64));
            let expected = records.iter().filter(|r| is_gap || r.place().end <= at as u64).count();
            assert_eq!(left, if at < 16 { 0 } else { expected }, "byte {at}");
            let cut = records.iter().filter(|r| r.place().end <= at as u64).count();
            assert_eq!(read(&whole[..at]).map_or(0, |r| r.len()), if at < 16 { 0 } else { cut }, "{at}");
        }
        // A record that is whole, but of another file, does not follow.
        let (image, change) = (records[0].place().end as usize, records[1].place().end as usize);
        assert_eq!(read(&[&whole[..image], &whole[change..]].concat()).unwrap().len(), 1);
        let skipped = [&whole[..image], &vec![0; BLOCK as usize - image], &whole[BLOCK as usize..]].concat();
        assert_eq!(read(&skipped).unwrap().len(), 1);
    }
}

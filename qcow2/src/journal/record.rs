//! Encodes and decodes what a journal file holds. There is no I/O here, so that a test can try any bytes.
//!
//! All numbers are big-endian. Headers and records have the same envelope: a magic of 8 bytes, the length of
//! the payload (8), the CRC-32 of both and of the payload (4), the payload. An envelope that does not fit, or
//! has another CRC, is ignored: a power cut during its write leaves such bytes.

use std::path::PathBuf;

use super::bytes::{ByteReader, ByteWriter};
pub(crate) use super::obsolete::{ObsoleteFile, ObsoleteKind};
pub(crate) use super::sample::Sample;
use crate::stamp::{Stamp, Times};
use crate::storage::Boot;

/// The size of the blocks that a journal keeps whole, in bytes. Disks are written in such blocks.
pub(crate) const BLOCK: u64 = 4096;
/// The unit that a disk writes wholly or not at all, in bytes.
pub(crate) const SECTOR: usize = 512;
/// The sectors of a block.
pub(crate) const SECTORS: usize = BLOCK as usize / SECTOR;
/// The most files that a work writes under one journal: an image, and its data file.
const MAX_TARGETS: usize = 2;
/// The most blocks of one record that any journal asks for.
pub(crate) const MAX_BLOCKS: usize = 2048;

/// The version of the format, which its magics hold.
pub(crate) const VERSION: u32 = 4;
const HEADER_MAGIC: &[u8; 8] = b"qmgJH004";
const RECORD_MAGIC: &[u8; 8] = b"qmgJR004";
/// The beginning of the header of any version but the first; three digits follow.
const HEADER_OF_ANY: &[u8; 5] = b"qmgJH";
/// The beginning of the header of version 1.
const HEADER_OF_1: &[u8; 8] = b"qmergeJH";
/// Magic, length and CRC.
pub(crate) const ENVELOPE: usize = 20;
/// The longest payload of a header, in bytes.
pub(crate) const MAX_HEADER: usize = 2 << 20;
/// The longest payload of a record, in bytes.
pub(crate) const MAX_RECORD: usize = record_room(MAX_BLOCKS) + 2 * MAX_HEADER;

/// The longest payload of a record with this many blocks, without its list of obsolete files, in bytes.
pub(crate) const fn record_room(blocks: usize) -> usize {
    256 + blocks * (8 + 4 * SECTORS + BLOCK as usize)
}

/// The kind of work under a journal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    /// Layers are merged down into the image.
    Merge,
    /// The image, once active, becomes an empty overlay.
    Empty,
    /// Data of the layers below moves up into the image.
    Pull,
    /// The image gets other layers below it, and takes in what it would not show any more.
    Rebase,
    /// Cluster 0 of the image is edited.
    Header {
        /// Whether the header is either the old or the new one even if only some sectors were written.
        atomic: bool,
    },
}

impl Purpose {
    /// Whether data moves up: the image shows the same at every instant, whatever lies below it by then.
    pub(crate) fn is_up(self) -> bool {
        matches!(self, Self::Pull | Self::Rebase)
    }
}

/// How a write by somebody else is noticed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Guard {
    /// Its dirty bit was set, and QEMU's first act as a writer is to clear it.
    DirtyBit {
        /// Whether refcounts were lazy before, and are to be lazy again.
        lazy: bool,
    },
    /// By its times, because the image has no such bit (raw, or version 2).
    Stamp,
}

/// The header of a journal: the work that it belongs to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    /// Ties the records to this header.
    pub nonce: u64,
    /// The kind of work.
    pub purpose: Purpose,
    /// The most blocks of a record: that many are kept in memory.
    pub max_blocks: u32,
    /// How foreign writes are noticed.
    pub guard: Guard,
    /// The run of the system in which the journal was made, where that is known.
    pub boot: Option<Boot>,
    /// The image that is written, as it was before the work; then its external data file, if it has one.
    pub targets: Vec<Stamp>,
    /// The layers above it, from the one above it up to top, with their data files.
    pub layers: Vec<Stamp>,
    /// The image that takes the data.
    pub base: PathBuf,
    /// The chain's uppermost image that is merged.
    pub top: PathBuf,
    /// Top's number in the chain, from 1 at the bottom, when the work was first begun.
    pub top_index: u32,
    /// The chain's active image.
    pub active: PathBuf,
    /// The size of the disk when the work is done, in bytes.
    pub new_size: u64,
    /// The end of the range in which zeros hide base's old content, in bytes.
    pub zero_until: u64,
    /// How many bytes the whole work writes.
    pub total: u64,
    /// The layers that stop being restore points.
    pub restore_points_lost: Vec<PathBuf>,
    /// Whether earlier work had already emptied layers when this work began. Then only the image holds their
    /// data.
    pub has_emptied: bool,
    /// Samples of what the image holds when the work is done.
    pub samples: Vec<Sample>,
}

/// The progress of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Phase {
    /// Only the header's first sector is being written, to set the dirty bit.
    Arming,
    /// Data moves; no other image is touched.
    Moving,
    /// The image holds everything. The chain above it is being changed.
    Switching,
    /// Everything is done, except that the image is not released yet.
    Done,
    /// The image is released, and anybody may write to it. Obsolete files are being removed.
    Removing,
}

/// A block of a target: its old checksums and its new content.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Block {
    /// Its number: its offset divided by [`BLOCK`].
    pub number: u64,
    /// The CRC-32 of each sector before the write.
    pub before: [u32; SECTORS],
    /// The new content; [`BLOCK`] bytes.
    pub bytes: Box<[u8]>,
}

/// One step of the work.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Record {
    /// The nonce of the header.
    pub nonce: u64,
    /// The number of the record. Of two whole records, the one with the higher number counts.
    pub sequence: u64,
    /// The progress of the work.
    pub phase: Phase,
    /// The guest offset below which everything is done and durable.
    pub watermark: u64,
    /// How many bytes were written for that.
    pub done: u64,
    /// Whether the work was stopped in good order, with the targets as in `known`.
    pub stopped: bool,
    /// Length and times of each target when the work last looked, behind a barrier; empty if it has not looked
    /// yet.
    pub known: Vec<Times>,
    /// Whether the files may be others than the work's, although their times are those in `known`: a torn
    /// header in them was mended since, and the times were noted then.
    pub is_doubtful: bool,
    /// The run of the system in which the work wrote this, where that is known.
    pub boot: Option<Boot>,
    /// The files to be removed when the work is done, the uppermost layer first. `None` if they stay, or if the
    /// work has not finished with them yet.
    pub obsolete: Option<Vec<ObsoleteFile>>,
    /// Which target the blocks belong to.
    pub target: u8,
    /// The length of that target with these blocks, in bytes. The last block is cut there.
    pub len: u64,
    /// What is written in place once this record is durable.
    pub blocks: Vec<Block>,
}

/// The CRC-32 of each sector of a block.
pub(crate) fn sector_crcs(block: &[u8]) -> [u32; SECTORS] {
    let mut crcs = [0; SECTORS];
    for (crc, sector) in crcs.iter_mut().zip(block.chunks(SECTOR)) {
        *crc = crc32fast::hash(sector);
    }
    crcs
}

/// The length of the payload that an envelope of this kind announces, if it can be one.
fn announced(bytes: &[u8], magic: &[u8; 8], most: usize) -> Option<usize> {
    let mut head = ByteReader::new(bytes.get(..ENVELOPE)?);
    if head.bytes(8)? != magic {
        return None;
    }
    usize::try_from(head.u64()?).ok().filter(|&len| len <= most)
}

fn seal(magic: &[u8; 8], payload: Vec<u8>) -> Vec<u8> {
    let mut out = ByteWriter::with_capacity(ENVELOPE + payload.len());
    out.put(magic);
    out.u64(payload.len() as u64);
    out.u32(crc(magic, &payload));
    out.put(&payload);
    out.into_bytes()
}

fn crc(magic: &[u8; 8], payload: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(magic);
    hasher.update(&(payload.len() as u64).to_be_bytes());
    hasher.update(payload);
    hasher.finalize()
}

fn open<'a>(bytes: &'a [u8], magic: &[u8; 8], most: usize) -> Option<ByteReader<'a>> {
    let len = announced(bytes, magic, most)?;
    let payload = bytes.get(ENVELOPE..)?.get(..len)?;
    let stored = ByteReader::new(bytes.get(16..ENVELOPE)?).u32()?;
    (stored == crc(magic, payload)).then(|| ByteReader::new(payload))
}

/// The version of the journal that starts with `bytes`; `None` if it is the one that this program writes, or no
/// journal.
pub(crate) fn other_version(bytes: &[u8]) -> Option<u32> {
    let version = match bytes.get(..8)?.split_at_checked(HEADER_OF_ANY.len())? {
        (start, digits) if start == HEADER_OF_ANY => std::str::from_utf8(digits).ok()?.parse().ok()?,
        _ if bytes.starts_with(HEADER_OF_1) => 1,
        _ => return None,
    };
    (version != VERSION).then_some(version)
}

/// How many bytes the header that starts with `bytes` has, if they can be the start of one.
pub(crate) fn header_len(bytes: &[u8]) -> Option<usize> {
    announced(bytes, HEADER_MAGIC, MAX_HEADER).map(|len| len + ENVELOPE)
}

/// How many bytes the record that starts with `bytes` has, if they can be the start of one.
pub(crate) fn record_len(bytes: &[u8]) -> Option<usize> {
    announced(bytes, RECORD_MAGIC, MAX_RECORD).map(|len| len + ENVELOPE)
}

impl Header {
    /// Encodes the header; `None` if its paths are too long.
    pub(crate) fn encode(&self) -> Option<Vec<u8>> {
        let mut out = ByteWriter::with_capacity(1024);
        out.u64(self.nonce);
        out.u8(match self.purpose {
            Purpose::Merge => 0,
            Purpose::Empty => 1,
            Purpose::Header { atomic: false } => 2,
            Purpose::Header { atomic: true } => 3,
            Purpose::Pull => 4,
            Purpose::Rebase => 5,
        });
        out.u8(match self.guard {
            Guard::Stamp => 0,
            Guard::DirtyBit { lazy: false } => 1,
            Guard::DirtyBit { lazy: true } => 2,
        });
        out.u32(self.max_blocks);
        out.boot(self.boot);
        for list in [&self.targets, &self.layers] {
            out.u32(u32::try_from(list.len()).ok()?);
            list.iter().for_each(|identity| identity.encode(&mut out));
        }
        out.path(&self.base);
        out.path(&self.top);
        out.u32(self.top_index);
        out.path(&self.active);
        out.u64(self.new_size);
        out.u64(self.zero_until);
        out.u64(self.total);
        out.u32(u32::try_from(self.restore_points_lost.len()).ok()?);
        self.restore_points_lost.iter().for_each(|path| out.path(path));
        out.u8(self.has_emptied.into());
        out.u32(u32::try_from(self.samples.len()).ok()?);
        self.samples.iter().for_each(|sample| sample.encode(&mut out));
        let payload = out.into_bytes();
        (payload.len() <= MAX_HEADER).then(|| seal(HEADER_MAGIC, payload))
    }

    /// Decodes the header at the start of `bytes`; `None` if it is not whole.
    pub(crate) fn parse(bytes: &[u8]) -> Option<Self> {
        let mut from = open(bytes, HEADER_MAGIC, MAX_HEADER)?;
        let nonce = from.u64()?;
        let purpose = match from.u8()? {
            0 => Purpose::Merge,
            1 => Purpose::Empty,
            2 => Purpose::Header { atomic: false },
            3 => Purpose::Header { atomic: true },
            4 => Purpose::Pull,
            5 => Purpose::Rebase,
            _ => return None,
        };
        let guard = match from.u8()? {
            0 => Guard::Stamp,
            1 => Guard::DirtyBit { lazy: false },
            2 => Guard::DirtyBit { lazy: true },
            _ => return None,
        };
        let max_blocks = from.u32().filter(|&most| (1..=MAX_BLOCKS as u32).contains(&most))?;
        let boot = from.boot()?;
        let targets = from.list(Stamp::decode)?;
        let layers = from.list(Stamp::decode)?;
        if targets.is_empty() || targets.len() > MAX_TARGETS {
            return None;
        }
        let header = Self {
            nonce,
            purpose,
            max_blocks,
            guard,
            boot,
            targets,
            layers,
            base: from.path()?,
            top: from.path()?,
            top_index: from.u32()?,
            active: from.path()?,
            new_size: from.u64()?,
            zero_until: from.u64()?,
            total: from.u64()?,
            restore_points_lost: from.list(ByteReader::path)?,
            has_emptied: from.flag()?,
            samples: from.list(Sample::decode)?,
        };
        from.is_empty().then_some(header)
    }
}

impl Record {
    /// Encodes the record.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = ByteWriter::with_capacity(128 + self.blocks.len() * (BLOCK as usize + 64));
        out.u64(self.nonce);
        out.u64(self.sequence);
        out.u8(self.phase as u8);
        out.u64(self.watermark);
        out.u64(self.done);
        out.u8(self.stopped.into());
        out.u32(self.known.len() as u32);
        self.known.iter().for_each(|times| times.encode(&mut out));
        out.u8(self.is_doubtful.into());
        out.boot(self.boot);
        out.u8(self.obsolete.is_some().into());
        let obsolete = self.obsolete.as_deref().unwrap_or_default();
        out.u32(obsolete.len() as u32);
        obsolete.iter().for_each(|file| file.encode(&mut out));
        out.u8(self.target);
        out.u64(self.len);
        out.u32(self.blocks.len() as u32);
        for block in &self.blocks {
            out.u64(block.number);
            block.before.iter().for_each(|crc| out.u32(*crc));
            out.put(&block.bytes);
        }
        seal(RECORD_MAGIC, out.into_bytes())
    }

    /// Decodes the record at the start of `bytes`; `None` if it is not whole, or does not belong to the header
    /// with that nonce. Its blocks are in ascending order and at offsets that a file can have; its numbers can
    /// be counted on without an overflow.
    pub(crate) fn parse(bytes: &[u8], nonce: u64) -> Option<Self> {
        let mut from = open(bytes, RECORD_MAGIC, MAX_RECORD)?;
        if from.u64()? != nonce {
            return None;
        }
        let sequence = from.u64()?;
        let phase = match from.u8()? {
            0 => Phase::Arming,
            1 => Phase::Moving,
            2 => Phase::Switching,
            3 => Phase::Done,
            4 => Phase::Removing,
            _ => return None,
        };
        let (watermark, done) = (from.u64()?, from.u64()?);
        let stopped = from.flag()?;
        let known = from.list(Times::decode)?;
        let (is_doubtful, boot) = (from.flag()?, from.boot()?);
        let has_obsolete = from.flag()?;
        let obsolete = from.list(ObsoleteFile::decode)?;
        let (target, len) = (from.u8()?, from.u64()?);
        let blocks = from.list(Block::decode)?;
        let ascend = blocks.windows(2).all(|two| matches!(two, [a, b] if a.number < b.number));
        let fit = blocks.last().is_none_or(|last| last.number < i64::MAX as u64 / BLOCK)
            && [sequence, done, len].iter().all(|&number| i64::try_from(number).is_ok());
        (from.is_empty() && ascend && fit && known.len() <= MAX_TARGETS && blocks.len() <= MAX_BLOCKS)
            .then_some(Self {
                nonce,
                sequence,
                phase,
                watermark,
                done,
                stopped,
                known,
                is_doubtful,
                boot,
                obsolete: has_obsolete.then_some(obsolete),
                target,
                len,
                blocks,
            })
    }
}

impl Block {
    fn decode(from: &mut ByteReader<'_>) -> Option<Self> {
        let number = from.u64()?;
        let mut before = [0; SECTORS];
        for crc in &mut before {
            *crc = from.u32()?;
        }
        Some(Self { number, before, bytes: from.bytes(BLOCK as usize)?.into() })
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;
    use crate::storage::FileId;

    const BOOT: Boot = Boot { id: 6, started_ns: -7 };

    pub(crate) fn stamp(name: &str) -> Stamp {
        Stamp {
            path: name.into(),
            id: FileId { device: 7, inode: 9 },
            is_device: false,
            file_system: Some(3),
            born_ns: Some(-9),
            times: Times { len: 12345, modified_ns: -5, changed_ns: -4 },
            head_crc: 77,
        }
    }

    pub(crate) fn header() -> Header {
        Header {
            nonce: 42,
            purpose: Purpose::Merge,
            max_blocks: 7,
            guard: Guard::DirtyBit { lazy: true },
            boot: Some(BOOT),
            targets: vec![stamp("/base"), stamp("/data")],
            layers: vec![stamp("/a"), stamp("/b")],
            base: "/base".into(),
            top: "/b".into(),
            top_index: 3,
            active: "/c".into(),
            new_size: 1 << 40,
            zero_until: 1 << 39,
            total: 99,
            restore_points_lost: vec!["/base".into(), "/a".into()],
            has_emptied: true,
            samples: vec![Sample { offset: 1 << 40, len: Sample::MOST, crc: 8, was_held: true }],
        }
    }

    pub(crate) fn obsolete() -> Vec<ObsoleteFile> {
        let kinds = [ObsoleteKind::Marked, ObsoleteKind::DataFile, ObsoleteKind::Unmarked];
        kinds.map(|kind| ObsoleteFile { file: stamp("/b"), kind }).into()
    }

    fn record() -> Record {
        let block = |number| Block {
            number,
            before: sector_crcs(&[3; BLOCK as usize]),
            bytes: vec![number as u8; BLOCK as usize].into(),
        };
        Record {
            nonce: 42,
            sequence: 5,
            phase: Phase::Moving,
            watermark: 1 << 30,
            done: 1 << 29,
            stopped: true,
            known: vec![Times { len: 1, modified_ns: -2, changed_ns: 3 }; 2],
            is_doubtful: true,
            boot: Some(BOOT),
            obsolete: Some(obsolete()),
            target: 1,
            len: 1 << 20,
            blocks: vec![block(0), block(7)],
        }
    }

    #[test]
    fn what_is_written_is_read_back() {
        let bytes = header().encode().unwrap();
        assert_eq!(header_len(&bytes), Some(bytes.len()));
        assert_eq!(Header::parse(&bytes), Some(header()));
        let empty = Header { guard: Guard::Stamp, purpose: Purpose::Empty, ..header() };
        assert_eq!(Header::parse(&empty.encode().unwrap()), Some(empty));
        let bytes = record().encode();
        assert_eq!(record_len(&bytes), Some(bytes.len()));
        assert_eq!(Record::parse(&bytes, 42), Some(record()));
        assert_eq!(Record::parse(&bytes, 43), None, "the nonce of another journal");
        for (phase, obsolete) in [(Phase::Done, None), (Phase::Removing, Some(Vec::new()))] {
            let bare = Record { stopped: false, obsolete, blocks: Vec::new(), phase, ..record() };
            assert_eq!(Record::parse(&bare.encode(), 42), Some(bare));
        }
    }

    #[test]
    fn a_damaged_byte_or_a_missing_one_makes_it_nothing() {
        let header = header().encode().unwrap();
        for at in 0..header.len() {
            let mut bad = header.clone();
            bad[at] ^= 1;
            assert_eq!(Header::parse(&bad), None, "byte {at}");
            assert_eq!(Header::parse(&header[..at]), None, "cut at {at}");
        }
        let record = record().encode();
        for at in (0..record.len()).step_by(13) {
            let mut bad = record.clone();
            bad[at] ^= 0x80;
            assert_eq!(Record::parse(&bad, 42), None, "byte {at}");
            assert_eq!(Record::parse(&record[..at], 42), None, "cut at {at}");
        }
    }

    #[test]
    fn a_sealed_lie_is_refused() {
        let same = Record { blocks: vec![record().blocks[0].clone(); 2], ..record() };
        assert_eq!(Record::parse(&same.encode(), 42), None, "blocks that do not ascend");
        let mut far = record();
        far.blocks[1].number = u64::MAX;
        assert_eq!(Record::parse(&far.encode(), 42), None, "a block behind every file");
        for endless in [
            Record { sequence: u64::MAX, ..record() },
            Record { done: u64::MAX, ..record() },
            Record { len: u64::MAX, ..record() },
        ] {
            assert_eq!(Record::parse(&endless.encode(), 42), None, "a number that cannot be counted on from");
        }
        for (offset, len) in [(0, Sample::MOST + 1), (u64::MAX, 1)] {
            let sample = Sample { offset, len, crc: 0, was_held: false };
            let endless = Header { samples: vec![sample], ..header() };
            assert_eq!(
                Header::parse(&endless.encode().unwrap()),
                None,
                "a sample of {len} bytes at {offset:#x}"
            );
        }
        let none = Header { targets: Vec::new(), ..header() };
        assert_eq!(Header::parse(&none.encode().unwrap()), None);
        // A list that claims more than there is allocates nothing for it.
        let mut long = ByteWriter::with_capacity(64);
        (0..5).for_each(|_| long.u64(0));
        long.u32(u32::MAX);
        assert_eq!(Record::parse(&seal(RECORD_MAGIC, long.into_bytes()), 0), None);
        let mut huge = RECORD_MAGIC.to_vec();
        huge.extend([0xff; 12]);
        assert_eq!((record_len(&huge), header_len(&huge)), (None, None));
    }
}

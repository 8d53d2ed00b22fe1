//! What a journal that was found means for the image as it is now.

use std::io;

use super::file::Journal;
use super::record::{BLOCK, Guard, Phase, Record, SECTOR};
use crate::error::{Error, FileOp, Result};
use crate::format::{Cluster0, FormatError};
use crate::storage::Storage;

/// How much later than the journal's last sign of life an image may have been written by the same process.
pub(super) const SLACK_NS: i128 = 1_000_000_000;

/// What a journal means.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Verdict {
    /// The work has not begun, or is over: the journal can go.
    Over,
    /// The work is over but for the image's dirty bit.
    Finished,
    /// The work was stopped, and nobody has written to the image since.
    Pending,
    /// The work was stopped; whether somebody has written to the image since is not known, but nothing that
    /// the record holds has been changed by others.
    Unsure,
    /// Somebody has written to the image since.
    Foreign,
}

/// Judges the journal of the image in `file`, whose dirty bit is `dirty` (`None`: its header is broken, or it
/// has no such bit).
///
/// # Errors
/// The system's.
pub(crate) fn judge(
    journal: &Journal,
    last: Option<&Record>,
    file: &dyn Storage,
    dirty: Option<bool>,
) -> Result<Verdict> {
    let Some(last) = last else { return Ok(Verdict::Over) };
    let is_stamped = journal.header().guard == Guard::Stamp;
    match (is_stamped, dirty, last.phase) {
        (_, _, Phase::Removing)
        | (true, _, Phase::Done)
        | (false, Some(false), Phase::Arming | Phase::Done) => {
            return Ok(Verdict::Over);
        }
        (false, Some(false), _) => return Ok(Verdict::Foreign),
        (false, _, Phase::Done) => return Ok(Verdict::Finished),
        _ => {}
    }
    let failed = |e| Error::io(journal.path(), FileOp::CompareWith, None, e);
    let stat = file.stat().map_err(failed)?;
    if let Some(then) = last.stopped {
        return Ok(match (then == (stat.len, stat.modified_ns), stat.modified_ns < then.1) {
            _ if !is_stamped => Verdict::Pending,
            (true, _) => Verdict::Pending,
            // A power cut has taken what was not durable, the time of change among it.
            (false, true) => Verdict::Unsure,
            (false, false) => Verdict::Foreign,
        });
    }
    if stat.modified_ns <= journal.modified_ns()?.saturating_add(SLACK_NS) {
        return Ok(Verdict::Pending);
    }
    Ok(match foreign(last, file).map_err(failed)? {
        true => Verdict::Foreign,
        false if is_stamped => Verdict::Unsure,
        false => Verdict::Pending,
    })
}

/// Whether `file` holds a sector that is neither as before the record nor as it is to be.
fn foreign(record: &Record, file: &dyn Storage) -> io::Result<bool> {
    Ok(compare(record, file)?.foreign > 0)
}

/// The sectors of a record's blocks as they are in the file.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Sectors {
    /// Changed by the record, and as before.
    pub(super) old: usize,
    /// Changed by the record, and as they are to be.
    pub(super) new: usize,
    /// Neither.
    pub(super) foreign: usize,
    /// Those of them that the record does not change.
    pub(super) beside: usize,
}

pub(super) fn compare(record: &Record, file: &dyn Storage) -> io::Result<Sectors> {
    let mut sectors = Sectors::default();
    let mut now = vec![0; BLOCK as usize];
    for block in &record.blocks {
        file.read_exact_or_zero(&mut now, block.number * BLOCK)?;
        let new = block.bytes.chunks(SECTOR);
        for (((now, new), before), n) in now.chunks(SECTOR).zip(new).zip(&block.before).zip(0..) {
            // Behind the end of the file nothing is written.
            let behind = block.number * BLOCK + n * SECTOR as u64 >= record.len;
            match (now == new, crc32fast::hash(new) == *before, crc32fast::hash(now) == *before) {
                _ if behind => {}
                (true, true, _) => {}
                (true, false, _) => sectors.new += 1,
                (false, false, true) => sectors.old += 1,
                (false, is_unchanged, _) => {
                    sectors.foreign += 1;
                    sectors.beside += usize::from(is_unchanged);
                }
            }
        }
    }
    Ok(sectors)
}

/// Whether the image in `file` has a header of qcow2 that can be read.
pub(super) fn has_header(file: &dyn Storage) -> io::Result<bool> {
    Ok(match cluster0(file)? {
        Some(Ok(_)) => true,
        Some(Err(e)) => e.is_unsupported(),
        None => false,
    })
}

/// Whether the names in the header of the image in `file` are text.
pub(super) fn has_clean_names(file: &dyn Storage) -> io::Result<bool> {
    let Some(Ok(cluster0)) = cluster0(file)? else { return Ok(false) };
    Ok(are_names_clean(&cluster0))
}

/// Whether the names in a header are text.
pub(crate) fn are_names_clean(cluster0: &Cluster0) -> bool {
    let clean = |name: &[u8]| {
        std::str::from_utf8(name)
            .is_ok_and(|name| !name.contains(|c: char| c.is_control() || c == '\u{fffd}'))
    };
    let format = cluster0.backing_format().unwrap_or_default();
    clean(cluster0.backing_name.as_deref().unwrap_or_default()) && clean(format.as_bytes())
}

/// Cluster 0 as a reader sees it; `None` if it does not begin like one.
fn cluster0(file: &dyn Storage) -> io::Result<Option<std::result::Result<Cluster0, FormatError>>> {
    let mut bytes = vec![0; BLOCK as usize];
    file.read_exact_or_zero(&mut bytes, 0)?;
    let Ok(cluster0) = Cluster0::decode(&bytes) else { return Ok(None) };
    bytes.resize(cluster0.header.geometry().cluster_size() as usize, 0);
    file.read_exact_or_zero(&mut bytes, 0)?;
    Ok(Some(Cluster0::parse(&bytes)))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::file::tests::at;
    use super::super::record::tests::header;
    use super::super::record::{Block, Header, sector_crcs};
    use super::*;
    use crate::storage::{Host, MemHost};

    fn last(phase: Phase) -> Record {
        let bytes = vec![1; BLOCK as usize];
        let block = Block { number: 0, before: sector_crcs(&[0; BLOCK as usize]), bytes: bytes.into() };
        Record {
            nonce: 42,
            sequence: 1,
            phase,
            watermark: 0,
            done: 0,
            stopped: None,
            spent: None,
            target: 0,
            len: BLOCK,
            blocks: vec![block],
        }
    }

    #[test]
    fn the_dirty_bit_decides() {
        let host = MemHost::new();
        let journal = Journal::create(&host, &at(&host, "/j"), header()).unwrap();
        host.add("/i", b"").unwrap();
        let file = host.open(Path::new("/i"), crate::storage::Access::ReadWrite).unwrap();
        let judged = |phase, dirty| judge(&journal, Some(&last(phase)), &*file, dirty).unwrap();
        for (phase, dirty, verdict) in [
            (Phase::Arming, Some(false), Verdict::Over),
            (Phase::Arming, Some(true), Verdict::Pending),
            (Phase::Moving, Some(true), Verdict::Pending),
            (Phase::Moving, None, Verdict::Pending),
            (Phase::Moving, Some(false), Verdict::Foreign),
            (Phase::Switching, Some(false), Verdict::Foreign),
            (Phase::Done, Some(false), Verdict::Over),
            (Phase::Done, Some(true), Verdict::Finished),
            // The image was released: the bit is somebody else's.
            (Phase::Removing, Some(true), Verdict::Over),
            (Phase::Removing, Some(false), Verdict::Over),
        ] {
            assert_eq!(judged(phase, dirty), verdict, "{phase:?} {dirty:?}");
        }
        assert_eq!(judge(&journal, None, &*file, Some(true)).unwrap(), Verdict::Over);
    }

    #[test]
    fn without_a_dirty_bit_sectors_and_times_decide() {
        let host = MemHost::new();
        let bare = Header { guard: Guard::Stamp, ..header() };
        let journal = Journal::create(&host, &at(&host, "/j"), bare).unwrap();
        host.add("/i", &[0; BLOCK as usize]).unwrap();
        let file = host.open(Path::new("/i"), crate::storage::Access::ReadWrite).unwrap();
        let mut record = last(Phase::Moving);
        let judged = |record: &Record| judge(&journal, Some(record), &*file, None).unwrap();
        assert_eq!(judged(&record), Verdict::Pending);
        let stat = file.stat().unwrap();
        record.stopped = Some((stat.len, stat.modified_ns));
        assert_eq!(judged(&record), Verdict::Pending);
        file.write_all_at(&[1; 512], 512).unwrap();
        assert_eq!(judged(&record), Verdict::Foreign, "written after a stop in good order");
        assert!(!foreign(&record, &*file).unwrap(), "one sector is new, the rest is old");
        file.write_all_at(&[2], 600).unwrap();
        assert!(foreign(&record, &*file).unwrap());
        assert_eq!(judged(&last(Phase::Done)), Verdict::Over);
    }
}

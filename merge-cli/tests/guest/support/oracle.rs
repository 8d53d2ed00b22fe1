//! The judge: what a disk must hold after the guest's acknowledged writes.

use std::collections::BTreeMap;
use std::fs;

use super::guest::Lab;
use super::record::{BLOCK, Write, journal_writes};
#[cfg(test)]
use super::record::{PAIRS, journal_block};

/// What a disk held before the guest wrote, and the writes to it that were acknowledged.
pub(crate) struct Oracle {
    initial: Vec<u8>,
    /// In the order in which they were made.
    writes: Vec<Write>,
}

impl Oracle {
    /// With the journal that lies in the lab; `disk` is the guest's number of it.
    pub(crate) fn new(lab: &Lab, initial: Vec<u8>, disk: u64) -> Self {
        let writes = journal(lab).into_iter().filter(|w| w.disk == disk).collect();
        Self { initial, writes }
    }

    /// What the disk holds after those of the acknowledged writes whose number is at most `last`.
    pub(crate) fn expected(&self, last: u64) -> Vec<u8> {
        let mut bytes = self.initial.clone();
        for write in self.writes.iter().filter(|w| w.seq <= last) {
            block_mut(&mut bytes, write.lba).copy_from_slice(&write.block().0);
        }
        bytes
    }

    /// Every byte of the image is as expected, by `qemu-img` and by our own reader. The guest must have ended, or
    /// paused, without a crash.
    #[track_caller]
    pub(crate) fn exact(&self, lab: &Lab, image: &str) {
        assert!(!self.writes.is_empty());
        fs::write(lab.dir().join("expected.raw"), self.expected(u64::MAX)).unwrap();
        let format = if image.ends_with(".raw") { "raw" } else { "qcow2" };
        lab.run(&["qemu-img", "compare", "-f", "raw", "-F", format, "expected.raw", image]);
        lab.qmerge(&["compare", "expected.raw", image]).ok();
        fs::remove_file(lab.dir().join("expected.raw")).unwrap();
    }

    /// After a crash: every acknowledged write is in the image, or one that the guest made later to the same block;
    /// every other block is what it was, or has such a write. The same by `qemu-img` and by our own reader.
    #[track_caller]
    pub(crate) fn nothing_lost(&self, lab: &Lab, image: &str) {
        let bytes = lab.bytes(image);
        let wrong = self.wrong(&bytes);
        assert!(
            wrong.is_empty(),
            "{image}: {} blocks are wrong: {:?}",
            wrong.len(),
            &wrong[..wrong.len().min(8)]
        );
        fs::write(lab.dir().join("found.raw"), bytes).unwrap();
        lab.qmerge(&["compare", "found.raw", image]).ok();
        fs::remove_file(lab.dir().join("found.raw")).unwrap();
    }

    /// The number of the last write that is seen in these bytes.
    pub(crate) fn last_in(&self, bytes: &[u8]) -> u64 {
        bytes.chunks(BLOCK).filter_map(Write::of).map(|w| w.seq).max().unwrap_or(0)
    }

    /// The blocks that are not as they must be after a crash.
    pub(crate) fn wrong(&self, bytes: &[u8]) -> Vec<u64> {
        assert_eq!(bytes.len(), self.initial.len());
        assert!(!self.writes.is_empty());
        let last = self.writes.last().map_or(0, |w| w.seq);
        let acknowledged: BTreeMap<u64, u64> = self.writes.iter().map(|w| (w.lba, w.seq)).collect();
        let disk = self.writes[0].disk;
        let right = |(lba, (found, initial)): (u64, (&[u8], &[u8]))| {
            let write = Write::of(found).filter(|w| w.disk == disk && w.lba == lba);
            match (acknowledged.get(&lba), write) {
                (Some(&seq), Some(write)) => write.seq == seq || write.seq > last,
                (None, Some(write)) => write.seq > last,
                (Some(_), None) => false,
                (None, None) => found == initial,
            }
        };
        let blocks = bytes.chunks(BLOCK).zip(self.initial.chunks(BLOCK));
        (0..).zip(blocks).filter(|block| !right(*block)).map(|(lba, _)| lba).collect()
    }
}

/// All acknowledged writes, in their order.
pub(crate) fn journal(lab: &Lab) -> Vec<Write> {
    let bytes = fs::read(lab.dir().join("journal.raw")).unwrap();
    let blocks = (0..).zip(bytes.chunks(BLOCK)).map_while(|(number, block)| journal_writes(number, block));
    blocks.flatten().collect()
}

fn block_mut(bytes: &mut [u8], lba: u64) -> &mut [u8] {
    let at = usize::try_from(lba).unwrap() * BLOCK;
    &mut bytes[at..at + BLOCK]
}

#[test]
fn a_lost_write_is_seen() {
    let write = |lba, seq| Write { disk: 0, lba, seq };
    let oracle = Oracle { initial: vec![7; 8 * BLOCK], writes: vec![write(1, 1), write(2, 2), write(1, 3)] };
    let right = oracle.expected(3);
    assert!(oracle.wrong(&right).is_empty());
    // Not made, made before another, made elsewhere, torn, made where nobody asked for it.
    let mut lost = right.clone();
    block_mut(&mut lost, 2).fill(7);
    assert_eq!(oracle.wrong(&lost), [2]);
    assert_eq!(oracle.wrong(&oracle.expected(2)), [1]);
    for (lba, wrong) in [(2, write(3, 9)), (5, write(5, 2))] {
        let mut moved = right.clone();
        block_mut(&mut moved, lba).copy_from_slice(&wrong.block().0);
        assert_eq!(oracle.wrong(&moved), [lba]);
    }
    let mut torn = right.clone();
    block_mut(&mut torn, 1)[BLOCK / 2..].fill(7);
    assert_eq!(oracle.wrong(&torn), [1]);
    // Later writes, which the crash left unacknowledged, may be there.
    let mut later = right;
    block_mut(&mut later, 6).copy_from_slice(&write(6, 4).block().0);
    assert!(oracle.wrong(&later).is_empty());
}

#[test]
fn the_journal_ends_with_its_last_block() {
    let writes = [Write { disk: 1, lba: 2, seq: 3 }; PAIRS];
    let block = journal_block(5, &writes);
    assert_eq!(journal_writes(5, &block.0).as_deref(), Some(&writes[..]));
    assert_eq!(journal_writes(4, &block.0), None);
    assert_eq!(journal_writes(0, &[0; BLOCK]), None);
}

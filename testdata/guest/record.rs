//! The records that the guest writes; shared by the guest's init and by the tests that read them on the host.

use super::random::Random;

/// Bytes of a record, and of the blocks that the guest writes.
pub(crate) const BLOCK: usize = 4096;
/// Pairs that a block of the journal can hold.
pub(crate) const PAIRS: usize = (BLOCK - 32) / 24;

const RECORD: u64 = u64::from_be_bytes(*b"qmergerc");
const JOURNAL: u64 = u64::from_be_bytes(*b"qmergejl");

/// A block in memory, aligned as O_DIRECT wants it.
#[derive(Clone)]
#[repr(C, align(4096))]
pub(crate) struct Block(pub(crate) [u8; BLOCK]);

/// One write: the `seq`-th of all, at block `lba` of disk number `disk`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Write {
    pub(crate) disk: u64,
    pub(crate) lba: u64,
    pub(crate) seq: u64,
}

impl Write {
    /// The whole block that this write leaves; every word depends on all three numbers.
    pub(crate) fn block(&self) -> Block {
        let mut block = Block([0; BLOCK]);
        let head = [RECORD, self.disk, self.lba, self.seq];
        let seed = self.seq ^ self.lba.rotate_left(24) ^ self.disk.rotate_left(56) ^ RECORD;
        let mut random = Random::new(seed);
        for (at, bytes) in block.0.chunks_exact_mut(8).enumerate() {
            let word = if at < head.len() { head[at] } else { random.next() };
            bytes.copy_from_slice(&word.to_be_bytes());
        }
        block
    }

    /// What a block claims to be; `None` if it is not the whole block of a write.
    pub(crate) fn of(block: &[u8]) -> Option<Self> {
        let write = Self { disk: word(block, 1)?, lba: word(block, 2)?, seq: word(block, 3)? };
        (block == write.block().0).then_some(write)
    }
}

/// One block of the journal: writes that were acknowledged, in their order.
pub(crate) fn journal_block(number: u64, writes: &[Write]) -> Block {
    let mut block = Block([0; BLOCK]);
    let head = [JOURNAL, number, writes.len() as u64, 0];
    let pairs = writes.iter().flat_map(|w| [w.disk, w.lba, w.seq]);
    for (bytes, word) in block.0.chunks_exact_mut(8).zip(head.into_iter().chain(pairs)) {
        bytes.copy_from_slice(&word.to_be_bytes());
    }
    block
}

/// The writes that the journal's block `number` holds; `None` past its end.
pub(crate) fn journal_writes(number: u64, block: &[u8]) -> Option<Vec<Write>> {
    let count = usize::try_from(word(block, 2)?).ok().filter(|count| *count <= PAIRS)?;
    if (word(block, 0)?, word(block, 1)?) != (JOURNAL, number) {
        return None;
    }
    let write = |i: usize| {
        let at = 4 + 3 * i;
        Some(Write { disk: word(block, at)?, lba: word(block, at + 1)?, seq: word(block, at + 2)? })
    };
    (0..count).map(write).collect()
}

fn word(block: &[u8], at: usize) -> Option<u64> {
    let bytes = block.get(8 * at..8 * at + 8)?;
    Some(u64::from_be_bytes(bytes.try_into().ok()?))
}

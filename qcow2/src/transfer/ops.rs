//! The list of copies that a merge makes into the base, and how it is run on all cores.

use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use rayon::prelude::*;

use super::origin::Origin;
use crate::error::{Error, FileOp, Result};
use crate::image::{ClusterCache, Image};
use crate::journal::Journal;
use crate::journal::record::Phase;
use crate::storage::{CopyError, Storage};
use crate::units::{GuestOffset, HostOffset};

/// The most bytes that one worker moves in one piece: all of them stay busy, and the device soon has something to do.
const PIECE: u64 = 4 << 20;

/// Pieces of at least this size are sent to the device as soon as they are copied.
const EARLY: u64 = 1 << 20;

/// Inflated clusters come one by one, and are sent in stretches of this size.
const STRETCH: u64 = 4 << 20;

/// One operation: brings bytes to the offset `to` in the file with the base's data.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Op {
    /// Where the first byte goes.
    pub(crate) to: HostOffset,
    /// How many bytes.
    pub(crate) len: u64,
    /// Where they come from.
    pub(crate) origin: Origin,
}

/// Operations with disjoint targets, in the order in which they were planned.
#[derive(Debug, Default)]
pub(crate) struct Ops {
    list: Vec<Op>,
    bytes: u64,
}

impl Ops {
    /// Adds an operation, and joins it to the last one if it continues that.
    pub(crate) fn push(&mut self, to: HostOffset, len: u64, origin: Origin) {
        if len == 0 {
            return;
        }
        self.bytes += len;
        if let Some(last) = self.list.last_mut()
            && last.to + last.len == to
            && last.origin.advance(last.len) == origin
        {
            last.len += len;
            return;
        }
        self.list.push(Op { to, len, origin });
    }

    /// How many operations there are.
    pub(crate) fn len(&self) -> usize {
        self.list.len()
    }

    /// The bytes of all operations.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Runs all operations, on all cores.
    ///
    /// # Errors
    /// The first failure of a read or a write, or [`Error::Cancelled`]. Some operations may have been
    /// done then.
    pub(crate) fn run(&self, layers: &[&Image], target: &Target<'_>, run: &Run<'_>) -> Result<()> {
        let pieces: Vec<Op> = self.list.iter().flat_map(Op::pieces).collect();
        pieces.par_iter().with_min_len((pieces.len() / 64).clamp(1, 32)).try_for_each_init(
            ClusterCache::new,
            |cache, op| {
                if run.cancel.load(Ordering::Relaxed) {
                    return Err(Error::Cancelled);
                }
                op.run(layers, target, cache)?;
                op.send_early(target);
                let done = run.done.fetch_add(op.len, Ordering::Relaxed) + op.len;
                run.progress.written(done, run.total);
                Ok(())
            },
        )
    }
}

/// The file that operations write to.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Target<'a> {
    /// The image that the file belongs to, for error messages.
    pub(crate) path: &'a Path,
    /// The file that holds the image's plain data.
    pub(crate) file: &'a dyn Storage,
}

/// Told how far a merge is.
pub trait Progress: Sync {
    /// `done` of `total` bytes have been written. Called often, from many threads.
    fn written(&self, done: u64, total: u64);
}

/// Nobody is told.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Progress for Silent {
    fn written(&self, _done: u64, _total: u64) {}
}

/// How a merge is carried out: who is told, and who may stop it.
pub(crate) struct Run<'a> {
    /// Is told.
    pub(crate) progress: &'a dyn Progress,
    /// All bytes that will be written.
    pub(crate) total: u64,
    /// Bytes written so far.
    pub(crate) done: AtomicU64,
    /// Set by whoever wants the merge to stop.
    pub(crate) cancel: &'a AtomicBool,
    /// Where it is noted how far the merge is.
    pub(crate) journal: Option<&'a Journal>,
}

impl Run<'_> {
    /// All is done and durable below the guest offset `end`.
    ///
    /// # Errors
    /// The journal cannot be written.
    pub(crate) fn note(&self, end: GuestOffset) -> Result<()> {
        match self.journal {
            Some(journal) => journal.note(Phase::Moving, end.get(), self.done.load(Ordering::Relaxed)),
            None => Ok(()),
        }
    }
}

impl Op {
    fn pieces(&self) -> impl Iterator<Item = Op> {
        let op = *self;
        (0..op.len.div_ceil(PIECE)).map(move |n| Op {
            to: op.to + n * PIECE,
            len: PIECE.min(op.len - n * PIECE),
            origin: op.origin.advance(n * PIECE),
        })
    }

    /// Lets the system begin to write the copied data, so that the device works while the processors go on.
    fn send_early(&self, target: &Target<'_>) {
        let (start, end) = (self.to.get(), self.to.get() + self.len);
        if self.len >= EARLY {
            target.file.start_writing(start, self.len);
        } else if matches!(self.origin, Origin::Compressed { .. }) && start / STRETCH < end / STRETCH {
            let border = end / STRETCH * STRETCH;
            target.file.start_writing(border - STRETCH, STRETCH);
        }
    }

    fn run(&self, layers: &[&Image], target: &Target<'_>, cache: &mut ClusterCache) -> Result<()> {
        let failed = |e| Error::io(target.path, FileOp::Write, Some(self.to.get()), e);
        match self.origin {
            Origin::Zeros => target.file.write_zeroes(self.to.get(), self.len).map_err(failed),
            Origin::Plain { layer, host } => {
                let image = layers.get(layer).ok_or_else(not_planned)?;
                let copied = target.file.copy_from(&**image.data_file(), host.get(), self.to.get(), self.len);
                copied.map_err(|e| match e {
                    CopyError::Read { offset, source } => image.unreadable_at(offset, source),
                    CopyError::Write { offset, source } => {
                        Error::io(target.path, FileOp::Write, Some(offset), source)
                    }
                })
            }
            Origin::Compressed { layer, part, guest } => {
                let image = layers.get(layer).and_then(|image| image.as_qcow2()).ok_or_else(not_planned)?;
                let cluster = cache.cluster(image, layer, &part, guest)?;
                let from = part.skip as usize;
                let bytes = cluster.get(from..from + self.len as usize).ok_or_else(not_planned)?;
                target.file.write_all_at(bytes, self.to.get()).map_err(failed)
            }
        }
    }
}

/// The error for an operation that its layer cannot supply: no data may be skipped silently.
fn not_planned() -> Error {
    Error::Broken { invariant: "an operation fits the layer that it reads" }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn operations_that_go_on_are_joined() {
        let mut ops = Ops::default();
        let plain = |host| Origin::Plain { layer: 1, host: HostOffset::new(host) };
        ops.push(HostOffset::new(0), 10, plain(100));
        ops.push(HostOffset::new(10), 10, plain(110));
        ops.push(HostOffset::new(20), 10, plain(500));
        ops.push(HostOffset::new(30), 10, Origin::Zeros);
        ops.push(HostOffset::new(40), 10, Origin::Zeros);
        assert_eq!((ops.len(), ops.bytes()), (3, 50));
    }

    #[test]
    fn long_operations_are_cut_into_pieces() {
        let op = Op { to: HostOffset::new(7), len: 2 * PIECE + 1, origin: Origin::Zeros };
        let pieces: Vec<_> = op.pieces().collect();
        assert_eq!(pieces.iter().map(|p| p.len).collect::<Vec<_>>(), [PIECE, PIECE, 1]);
        assert_eq!(pieces[2].to.get(), 7 + 2 * PIECE);
    }

    #[test]
    fn an_operation_without_its_layer_is_an_error() {
        let mut ops = Ops::default();
        ops.push(HostOffset::ZERO, 10, Origin::Plain { layer: 1, host: HostOffset::ZERO });
        let file = crate::storage::MemFile::new();
        let target = Target { path: Path::new("/base"), file: &file };
        let cancel = AtomicBool::new(false);
        let run =
            Run { progress: &Silent, total: 10, done: AtomicU64::new(0), cancel: &cancel, journal: None };
        assert!(ops.run(&[], &target, &run).is_err());
    }
}

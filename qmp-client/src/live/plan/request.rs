//! What may be asked of a live merge.

use std::path::PathBuf;

use super::End;
use crate::block::merge::Direction;

/// A live merge as somebody asks for it. Layers are named as [`crate::Disk::layer`] reads them: by path, node or index.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct Request {
    /// Whether the data moves down into base, or up into the active layer.
    pub direction: Direction,
    /// The layer that stays below those that go: the bottom of the chain where none is named; for a pull, nothing stays.
    pub base: Option<String>,
    /// For a commit: the highest layer that is merged; the active one where none is named.
    pub top: Option<String>,
    /// For a commit: base is the layer below top.
    pub shallow: bool,
    /// The active layer may be merged. So it may with `pivot` and with `keep_overlay`.
    pub active: bool,
    /// The guest moves to base as soon as all of an active commit is copied.
    pub pivot: bool,
    /// The guest stays where it is when all of an active commit is copied, and the job ends.
    pub keep_overlay: bool,
    /// The switch waits until it is asked for.
    pub wait: bool,
    /// The guest's writes are slowed down, within limits, if an active commit does not catch up with them.
    pub converge: bool,
    /// The files that are no longer needed are removed.
    pub delete: bool,
    /// The name of base that is written into the overlay above top; otherwise one in the style of the former name.
    pub backing_file: Option<String>,
    /// Bytes per second; 0 is no limit.
    pub speed: u64,
    /// The socket of the NBD server that QEMU runs; otherwise it is looked for.
    pub nbd_socket: Option<PathBuf>,
    /// The folder of the state file; otherwise that of the active image.
    pub state_dir: Option<PathBuf>,
    /// Folders that are searched for users of the files, beside those of the chain.
    pub scan: Vec<PathBuf>,
    /// An image outside the chain may break, because it uses base or a merged layer.
    pub allow_shared_base: bool,
    /// The old active image may stay as it is, bootable, with old data.
    pub allow_stale: bool,
    /// An encrypted layer's data may go to an image that is not encrypted.
    pub allow_plaintext: bool,
    /// Persistent bitmaps of the layers that are given up may be lost.
    pub drop_bitmaps: bool,
    /// Internal snapshots of the layers that are given up, or of the active layer of a pull, may change.
    pub allow_snapshot_change: bool,
    /// Merged layers are emptied or removed also where the file system has no locks.
    pub no_lock: bool,
    /// Only the plan is wanted: nothing is written or swept.
    pub dry_run: bool,
}

impl Request {
    /// A commit of everything below the active layer's own data: down into the bottom of the chain.
    pub fn commit() -> Self {
        Self::default()
    }

    /// A pull of everything into the active layer.
    pub fn pull() -> Self {
        Self { direction: Direction::Up, ..Self::default() }
    }

    /// Whether the active layer may be merged.
    pub(crate) fn allows_active(&self) -> bool {
        self.active || self.pivot || self.keep_overlay
    }

    /// What happens when all is copied.
    pub fn end(&self, merges_active: bool) -> End {
        match merges_active {
            false if self.wait => End::WaitForFinish,
            false => End::Finish,
            true if self.pivot => End::Pivot,
            true if self.keep_overlay => End::KeepOverlay,
            true => End::Ready,
        }
    }
}

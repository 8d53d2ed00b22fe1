//! What a caller may ask of a commit, and which part of a chain it concerns.

use std::ffi::OsString;
use std::path::PathBuf;

use crate::chain::OpenOptions;

/// Which layer takes the data.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BaseChoice {
    /// The bottom of the chain.
    #[default]
    Bottom,
    /// The layer just below top.
    Shallow,
    /// The layer of this path or index.
    Named(OsString),
}

/// What a caller may ask of a commit. By default all layers are merged into the bottom.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct CommitOptions {
    /// The layer that takes the data.
    pub base: BaseChoice,
    /// The uppermost layer to merge, by path or index; the active image if not given.
    pub top: Option<OsString>,
    /// How the chain is opened: policy and formats. Access and locks are the commit's own matter.
    pub open: OpenOptions,
    /// Remove layers that are no longer needed.
    pub delete: bool,
    /// Leave the active image as it was.
    pub keep_active: bool,
    /// Read everything back before anything is switched.
    pub verify: bool,
    /// Merge layers whose bitmaps will be lost.
    pub drop_bitmaps: bool,
    /// Merge layers whose internal snapshots will change.
    pub allow_snapshot_change: bool,
    /// Merge although other images use base or a merged layer.
    pub allow_shared_base: bool,
    /// Begin again where somebody has written to base since a merge into it was stopped.
    pub restart: bool,
    /// Where journals are kept that cannot lie beside the images: for block devices, and for folders that
    /// cannot be written.
    pub journal_dir: Option<PathBuf>,
    /// More directories to search for images that share layers.
    pub scan: Vec<PathBuf>,
}

impl CommitOptions {
    /// Merges all layers of a chain that is opened like this into the bottom.
    pub fn new(open: OpenOptions) -> Self {
        Self { open, ..Self::default() }
    }

    /// The same, and everything is read back before anything is switched.
    #[must_use]
    pub fn verified(self) -> Self {
        Self { verify: true, ..self }
    }
}

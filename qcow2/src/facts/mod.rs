//! What an image is, read from its own file and the journals beside it; and what the guest sees through each layer of a chain.

use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use crate::chain::view::{Supply, View};
use crate::chain::{BackingName, Chain};
use crate::error::{Error, FileOp, Holder, Result};
use crate::format::{Bitmap, Cluster0, Snapshot};
use crate::image::{Image, ImageFormat, Mapping, Qcow2, read_bitmaps, read_snapshots};
use crate::journal::{Stranger, strangers_about};
use crate::merge::{self, UnfinishedMerge, UnfinishedUp};
use crate::storage::{Access, FileStat, Host, LockMode};
use crate::units::GuestOffset;

mod shape;

/// What one image is.
#[derive(Debug)]
#[non_exhaustive]
pub struct ImageFacts {
    /// The image, as the caller or the overlay names it.
    pub path: PathBuf,
    /// Its format.
    pub format: ImageFormat,
    /// The file.
    pub stat: FileStat,
    /// What cluster 0 says, if the image is qcow2.
    pub cluster0: Option<Cluster0>,
    /// The internal snapshots.
    pub snapshots: Vec<Snapshot>,
    /// The persistent bitmaps.
    pub bitmaps: Vec<Bitmap>,
    /// Whether an image that a merge has marked as merged holds data all the same.
    pub holds_data: bool,
    /// How others use the file, as their locks tell.
    pub used: Option<LockMode>,
    /// Whether the file system has locks, so that `used` tells something.
    pub has_locks: bool,
    /// The processes that have it open, as far as they are visible.
    pub holders: Vec<Holder>,
    /// The merge into it that was stopped, or is under way.
    pub unfinished: Option<UnfinishedMerge>,
    /// The pull or the rebase of it that was stopped, or is under way.
    pub unfinished_up: Option<UnfinishedUp>,
    /// The base that holds all that it held, if a merge is emptying it, or was when it was stopped.
    pub emptying_into: Option<PathBuf>,
    /// Journals and records beside it that are about it, and are not believed: they belong to somebody else.
    pub strangers: Vec<Stranger>,
    /// What makes the image unusable, if anything does.
    pub problem: Option<Error>,
}

impl ImageFacts {
    /// Reads what `path` is. Takes no lock and opens no other file but the journal of a merge, beside it or in
    /// `journal_dir`.
    ///
    /// # Errors
    /// A file that cannot be read, or whose header cannot be decoded.
    pub fn read(
        host: &dyn Host,
        path: &Path,
        format: Option<ImageFormat>,
        journal_dir: Option<&Path>,
    ) -> Result<Self> {
        let file = host.open(path, Access::Read).map_err(|e| Error::io(path, FileOp::Open, None, e))?;
        let stat = file.stat().map_err(|e| Error::io(path, FileOp::Stat, None, e))?;
        let format = match format {
            Some(format) => format,
            None => ImageFormat::detect_readable(path, &*file)?,
        };
        let used = file.used_by_others().map_err(|e| Error::io(path, FileOp::ReadLocks, None, e))?;
        // A process that has the file open without a lock (a copy, a checksum) does not count as a user.
        let holders = if used.is_some() || !file.has_locks() { host.holders(stat.id) } else { Vec::new() };
        let mut facts = Self {
            path: path.to_owned(),
            format,
            stat,
            cluster0: None,
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
            holds_data: false,
            used,
            has_locks: file.has_locks(),
            holders,
            unfinished: merge::unfinished_merge(host, path, journal_dir)?,
            unfinished_up: merge::unfinished_up(host, path, journal_dir)?,
            emptying_into: merge::unfinished_emptying(host, path, journal_dir)?,
            strangers: strangers_about(host, path),
            problem: None,
        };
        if format == ImageFormat::Qcow2 {
            let cluster0 = Qcow2::read_cluster0(path, &*file)?;
            let problem = cluster0.validate().map_err(|e| Error::format(path, e)).and_then(|()| {
                facts.snapshots = read_snapshots(path, &*file, &cluster0.header)?;
                facts.bitmaps = read_bitmaps(path, &*file, &cluster0)?;
                Ok(())
            });
            facts.problem = problem.err();
            if facts.problem.is_none() && cluster0.was_empty_when_merged() {
                // Its tables tell: its data file need not be opened.
                let image = Qcow2::open(path, file.clone(), Some(file))?;
                facts.holds_data = image.next_allocated(GuestOffset::ZERO)?.is_some();
            }
            facts.cluster0 = Some(cluster0);
        }
        Ok(facts)
    }

    /// The size of the disk that the guest sees, in bytes; `None` for a format that is not read here.
    pub fn virtual_size(&self) -> Option<u64> {
        match (&self.cluster0, self.format) {
            (Some(cluster0), _) => Some(cluster0.header.virtual_size()),
            (None, ImageFormat::Foreign(_)) => None,
            // QEMU rounds a raw file up to whole sectors.
            (None, _) => Some(self.stat.len.next_multiple_of(512)),
        }
    }

    /// The backing file: its name as written, and the path that the name leads to, where it leads to one.
    pub fn backing(&self) -> Option<(String, std::result::Result<PathBuf, String>)> {
        let raw = self.cluster0.as_ref()?.backing_name.as_deref()?;
        let resolved = BackingName::parse(raw).map(|name| name.resolve(&self.path));
        Some((String::from_utf8_lossy(raw).into_owned(), resolved))
    }

    /// Whether it is marked dirty, and nothing that was stopped explains that.
    pub fn is_unexpectedly_dirty(&self) -> bool {
        let is_merged_into = self.unfinished.as_ref().is_some_and(|unfinished| !unfinished.is_removing);
        self.cluster0.as_ref().is_some_and(|cluster0| cluster0.header.is_dirty())
            && !is_merged_into
            && self.unfinished_up.is_none()
            && self.emptying_into.is_none()
    }
}

impl Serialize for ImageFacts {
    /// With the keys of `qemu-img info --output=json` and some of our own.
    fn serialize<S: Serializer>(&self, to: S) -> std::result::Result<S::Ok, S::Error> {
        shape::ImageShape::of(self).serialize(to)
    }
}

/// A layer of a chain: what it is, and what the guest still sees through it.
#[derive(Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct LayerFacts {
    /// Its number, from 1 at the bottom.
    pub index: usize,
    /// What it is.
    #[serde(flatten)]
    pub facts: ImageFacts,
    /// Bytes of data that the guest reads from this layer.
    pub visible_data: u64,
    /// Bytes that the guest reads as zeros because this layer says so.
    pub visible_zeros: u64,
}

/// What each layer of a chain is, the bottom first. What the guest sees through a bottom of a format that is not read here is what
/// no layer above it holds; that is not counted. Journals are looked for beside the images or in `journal_dir`.
///
/// # Errors
/// As [`ImageFacts::read`]; a table that cannot be read, or an entry that breaks the format's rules.
pub fn of_chain(host: &dyn Host, chain: &Chain, journal_dir: Option<&Path>) -> Result<Vec<LayerFacts>> {
    let layers = chain.layers().iter().map(|layer| {
        let facts = ImageFacts::read(host, &layer.path, Some(layer.image.format()), journal_dir)?;
        Ok(LayerFacts { index: layer.index, facts, visible_data: 0, visible_zeros: 0 })
    });
    let mut layers = layers.collect::<Result<Vec<_>>>()?;
    let images = chain.images();
    let first = usize::from(matches!(images.first(), Some(Image::Foreign(_))));
    View::new(&images, first, chain.active()).walk(|part| -> Result<()> {
        let (layer, is_zero) = match part.supply {
            Supply::Layer { layer, mapping } => (layer, matches!(mapping, Mapping::Zero { .. })),
            Supply::PastEnd { layer } => (layer, true),
            Supply::Nothing => return Ok(()),
        };
        if let Some(layer) = layers.get_mut(layer) {
            let count = if is_zero { &mut layer.visible_zeros } else { &mut layer.visible_data };
            *count = count.saturating_add(part.range.len);
        }
        Ok(())
    })?;
    Ok(layers)
}

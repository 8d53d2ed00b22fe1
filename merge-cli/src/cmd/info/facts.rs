//! What one image is, read from its own file alone.

use std::path::{Path, PathBuf};

use qcow2::chain::BackingName;
use qcow2::error::{FileOp, Holder};
use qcow2::format::{Bitmap, Cluster0, Snapshot};
use qcow2::image::{ImageFormat, Qcow2, read_bitmaps, read_snapshots};
use qcow2::merge::{self, Stranger, UnfinishedMerge, strangers_about};
use qcow2::storage::{Access, FileStat, Host, LockMode};
use qcow2::units::GuestOffset;
use qcow2::{Error, Result};
use qmp_client::{Outline, Unfinished};

/// What one image is.
#[derive(Debug)]
pub(super) struct Facts {
    /// The image, as the user or the overlay names it.
    pub(super) path: PathBuf,
    /// Its format.
    pub(super) format: ImageFormat,
    /// The file.
    pub(super) stat: FileStat,
    /// What cluster 0 says, if the image is qcow2.
    pub(super) cluster0: Option<Cluster0>,
    /// Whether an image that a merge has marked as merged holds data all the same.
    pub(super) holds_data: bool,
    /// The internal snapshots.
    pub(super) snapshots: Vec<Snapshot>,
    /// The persistent bitmaps.
    pub(super) bitmaps: Vec<Bitmap>,
    /// How others use the file, as their locks tell.
    pub(super) used: Option<LockMode>,
    /// Whether the file system has locks, so that `used` tells something.
    pub(super) has_locks: bool,
    /// The processes that have it open, as far as they are visible.
    pub(super) holders: Vec<Holder>,
    /// The merge into it that was stopped, or is under way.
    pub(super) unfinished: Option<UnfinishedMerge>,
    /// Journals and records beside it that are about it, and are not believed: they belong to somebody else.
    pub(super) strangers: Vec<Stranger>,
    /// A merge of a running virtual machine of which this was the active image, and that has not come to its end:
    /// its state file, and what that says if it can be read.
    pub(super) live_merge: Option<(PathBuf, Option<Outline>)>,
    /// What makes the image unusable, if anything does.
    pub(super) problem: Option<Error>,
}

impl Facts {
    /// Reads what `path` is. Takes no lock and opens no other file but the journal of a merge, beside it or in
    /// `journal_dir`.
    ///
    /// # Errors
    /// A file that cannot be read, or whose header cannot be decoded.
    pub(super) fn read(
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
            holds_data: false,
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
            used,
            has_locks: file.has_locks(),
            holders,
            unfinished: merge::unfinished_merge(host, path, journal_dir)?,
            strangers: strangers_about(host, path),
            live_merge: live_merge(path),
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
            if facts.problem.is_none() && cluster0.merged_into().is_some() {
                // Its tables tell: its data file need not be opened.
                let image = Qcow2::open(path, file.clone(), Some(file))?;
                facts.holds_data = image.next_allocated(GuestOffset::ZERO)?.is_some();
            }
            facts.cluster0 = Some(cluster0);
        }
        Ok(facts)
    }

    /// The size of the disk that the guest sees, in bytes; `None` for a format that is not read here.
    pub(super) fn virtual_size(&self) -> Option<u64> {
        match (&self.cluster0, self.format) {
            (Some(cluster0), _) => Some(cluster0.header.virtual_size()),
            (None, ImageFormat::Foreign(_)) => None,
            // QEMU rounds a raw file up to whole sectors.
            (None, _) => Some(self.stat.len.next_multiple_of(512)),
        }
    }

    /// The backing file: its name as written, and the path that the name leads to, where it leads to one.
    pub(super) fn backing(&self) -> Option<(String, std::result::Result<PathBuf, String>)> {
        let raw = self.cluster0.as_ref()?.backing_name.as_deref()?;
        let resolved = BackingName::parse(raw).map(|name| name.resolve(&self.path));
        Some((String::from_utf8_lossy(raw).into_owned(), resolved))
    }
}

fn live_merge(path: &Path) -> Option<(PathBuf, Option<Outline>)> {
    match Unfinished::beside(path) {
        Ok(merge) => merge.map(|merge| {
            let merge = merge.outline();
            (merge.state_file().to_owned(), Some(merge))
        }),
        Err(qmp_client::Error::State { path, .. }) => Some((path, None)),
        Err(_) => None,
    }
}

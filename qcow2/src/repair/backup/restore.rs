//! The way back: an image's metadata as it was before the repair.

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use super::SECTOR;
use super::judge::{Differences, judge, marked};
use super::record::{BackupReader, BackupWriter, RecordKind};
use super::saved::{Saved, halves};
use serde::{Serialize, Serializer};

use crate::check::CheckOptions;
use crate::error::{Error, FileOp, Refusal, Result};
use crate::stamp::{SameFile, Stamp};
use crate::storage::{Access, Host, Place, Storage};

/// How to put an image back.
#[derive(Clone, Copy, Debug, Default)]
pub struct RestoreOptions<'a> {
    /// Whether the image may be another file than the one that was repaired, with the same metadata: a copy.
    pub allow_copy: bool,
    /// How to look at the image.
    pub check: CheckOptions<'a>,
}

/// What a restore writes, or wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RestorePlan {
    /// How many bytes are not as they were before the repair, in whole sectors.
    pub bytes: u64,
    /// Where they are: the first thousand ranges.
    #[serde(serialize_with = "pieces")]
    pub ranges: Vec<Range<u64>>,
    /// The image's length, in bytes.
    #[serde(rename = "file-length")]
    pub len: u64,
    /// Its length afterwards: shorter if the repair made it longer.
    #[serde(rename = "file-length-after")]
    pub len_after: u64,
    /// Whether a restore that was stopped goes on.
    pub continues: bool,
}

fn pieces<S: Serializer>(ranges: &[Range<u64>], to: S) -> std::result::Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    struct RestoredPiece {
        offset: u64,
        length: u64,
    }
    to.collect_seq(
        ranges.iter().map(|range| RestoredPiece { offset: range.start, length: range.end - range.start }),
    )
}

impl RestorePlan {
    /// Whether the image is as it was before the repair.
    pub fn is_empty(&self) -> bool {
        self.bytes == 0 && self.len == self.len_after
    }
}

/// What it takes to put back the metadata of the image in `file`, as [`repair_with_backup`](crate::repair::repair_with_backup) kept it in the
/// file `from`; nothing is written.
///
/// # Errors
/// [`Refusal::BackupDamaged`]; [`Refusal::OtherImage`]; [`Refusal::WrittenSinceRepair`], for an image in which
/// anything is neither as it was before the repair nor as the repair left it; the system's.
pub fn plan_restore(
    path: &Path,
    file: &dyn Storage,
    host: &dyn Host,
    from: &Path,
    options: &RestoreOptions<'_>,
) -> Result<RestorePlan> {
    let backup = open(host, from, Access::Read, path, file)?;
    prepare(path, file, host, &Saved::read(BackupReader::of(from, &*backup)?)?, options)
}

/// Puts back the metadata of the image in `file`, which must be held under a writer's lock. When it was stopped, the
/// same call goes on. The backup notes that it has begun.
///
/// # Errors
/// Those of [`plan_restore`], when nothing was written; and of writing.
pub fn restore(
    path: &Path,
    file: &dyn Storage,
    host: &dyn Host,
    from: &Path,
    options: &RestoreOptions<'_>,
) -> Result<RestorePlan> {
    let backup = open(host, from, Access::ReadWrite, path, file)?;
    let saved = Saved::read(BackupReader::of(from, &*backup)?)?;
    let plan = prepare(path, file, host, &saved, options)?;
    let mut marks = BackupWriter::behind(from, Arc::clone(&backup), saved.end);
    let mut mark = |kind| {
        let written = marks.put(kind, 0, 0, &[]).and_then(|()| marks.sync());
        written.map_err(|e| Error::io(from, FileOp::Write, Some(saved.end.end), e))
    };
    if !plan.is_empty() {
        if !plan.continues {
            mark(RecordKind::Restoring)?;
        }
        RestoreWork { saved: &saved, path, file }.all(&plan)?;
    }
    if !plan.is_empty() || plan.continues {
        mark(RecordKind::Restored)?;
    }
    Ok(plan)
}

/// Opens a backup, which must be somebody's who may write the image.
fn open(
    host: &dyn Host,
    from: &Path,
    access: Access,
    image: &Path,
    file: &dyn Storage,
) -> Result<Arc<dyn Storage>> {
    let backup = Place::of(host, from)
        .and_then(|place| place.open(host, access))
        .map_err(|e| Error::io(from, FileOp::Open, None, e))?;
    let owner = |path: &Path, file: &dyn Storage| {
        file.stat().map(|stat| stat.owner).map_err(|e| Error::io(path, FileOp::Stat, None, e))
    };
    let theirs = owner(from, &*backup)?;
    if !theirs.may_speak_for(&owner(image, file)?, host.user()) {
        let reason = Refusal::BackupOwner { file: from.to_owned(), user: theirs.user };
        return Err(Error::refused(image, reason));
    }
    Ok(backup)
}

/// Makes sure that the backup is about the image, and that nobody else has written to it.
fn prepare(
    path: &Path,
    file: &dyn Storage,
    host: &dyn Host,
    saved: &Saved<'_>,
    options: &RestoreOptions<'_>,
) -> Result<RestorePlan> {
    let now = Stamp::of(host, path, file)?;
    if !options.allow_copy && saved.image.same_file(&now) == SameFile::No {
        return Err(Error::refused(path, Refusal::OtherImage { image: saved.image.path.clone() }));
    }
    let Differences { bytes, ranges, len, len_before } = judge(saved, path, file, &options.check)?;
    Ok(RestorePlan { bytes, ranges, len, len_after: len_before, continues: saved.is_restoring })
}

struct RestoreWork<'a> {
    saved: &'a Saved<'a>,
    path: &'a Path,
    file: &'a dyn Storage,
}

impl RestoreWork<'_> {
    fn all(&self, plan: &RestorePlan) -> Result<()> {
        let Some(header) = self.saved.headers.first() else { return Ok(()) };
        let marked = marked(header);
        // From here on nobody else writes, though the metadata is half of the one and half of the other.
        if let Some(marked) = &marked {
            self.write(0, marked, plan)?;
            self.barrier()?;
        }
        let mut barriers = None;
        self.saved.for_each_change_back(|record| {
            if barriers.replace(record.second).is_some_and(|last| last != record.second) {
                self.barrier()?;
            }
            let skipped = if record.first == 0 && marked.is_some() { SECTOR } else { 0 };
            let before = halves(record).0.get(skipped as usize..).unwrap_or_default();
            self.write(record.first + skipped, before, plan)
        })?;
        self.barrier()?;
        if plan.len > plan.len_after {
            let cut = self.file.set_len(plan.len_after);
            cut.map_err(|e| Error::io(self.path, FileOp::Shrink, Some(plan.len_after), e))?;
            self.barrier()?;
        }
        if marked.is_some() {
            self.write(0, header, plan)?;
            self.barrier()?;
        }
        Ok(())
    }

    /// Writes the sectors that are different, as far as they lie in the image as it was.
    fn write(&self, offset: u64, bytes: &[u8], plan: &RestorePlan) -> Result<()> {
        let room = plan.len_after.saturating_sub(offset).min(bytes.len() as u64);
        let bytes = bytes.get(..room as usize).unwrap_or_default();
        let mut now = vec![0; bytes.len()];
        let read = self.file.read_exact_or_zero(&mut now, offset);
        read.map_err(|e| Error::io(self.path, FileOp::Read, Some(offset), e))?;
        let size = SECTOR as usize;
        let mut at = 0;
        let is_same: Vec<bool> = now.chunks(size).zip(bytes.chunks(size)).map(|(a, b)| a == b).collect();
        for run in is_same.chunk_by(|a, b| a == b) {
            let part = bytes.get(at..(at + run.len() * size).min(bytes.len())).unwrap_or_default();
            if run.first() == Some(&false) {
                let place = offset + at as u64;
                let written = self.file.write_live(part, place);
                written.map_err(|e| Error::io(self.path, FileOp::Write, Some(place), e))?;
            }
            at += part.len();
        }
        Ok(())
    }

    fn barrier(&self) -> Result<()> {
        self.file.sync().map_err(|e| Error::barrier(self.path, e))
    }
}

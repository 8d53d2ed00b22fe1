//! Restores an image's metadata to what it was before a repair.

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

/// How to restore an image.
#[derive(Clone, Copy, Debug, Default)]
#[non_exhaustive]
pub struct RestoreOptions<'a> {
    /// Whether the image may be a copy of the repaired file, instead of that file itself.
    pub allow_copy: bool,
    /// How to look at the image.
    pub check: CheckOptions<'a>,
}

/// What a restore writes, or wrote.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct RestorePlan {
    /// How many bytes differ from before the repair, in whole sectors.
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
    /// Whether this continues a restore that was stopped.
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

/// Finds out what a restore of the image in `file` would write. The backup `from` was made by
/// [`repair_with_backup`](crate::repair::repair_with_backup). Nothing is written.
///
/// # Errors
/// [`Refusal::BackupDamaged`]; [`Refusal::OtherImage`]; [`Refusal::WrittenSinceRepair`] if some metadata is
/// neither as it was before the repair nor as the repair left it; the system's.
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

/// Restores the metadata of the image in `file`, which must be held under a writer's lock. The backup notes
/// that the restore has begun; if it is stopped, the same call continues it.
///
/// # Errors
/// Those of [`plan_restore`], before anything is written; those of writing.
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

/// Opens a backup. Everybody who may write it must also be allowed to write the image: its content is written
/// there.
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

/// Makes sure that the backup belongs to the image, and that nobody else has written to the image since.
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
        // Half-way, the metadata is a mixture of before and after. The mark keeps everybody else from writing.
        if let Some(marked) = &marked {
            self.write(0, marked, plan)?;
            self.barrier()?;
        }
        let mut barriers = None;
        self.saved.for_each_change_back(|record| {
            if barriers.replace(record.second).is_some_and(|last| last != record.second) {
                self.barrier()?;
            }
            // The first sector would take the mark away. It is written last.
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

    /// Writes the sectors that differ, up to the image's length before the repair.
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

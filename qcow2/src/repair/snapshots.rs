//! Rewrites the snapshot table if the right content of its entries is known (iotest 261): if extra data is
//! missing (the size of the disk, which is the image's), or is longer than what QEMU reads (1024 bytes).
//!
//! The new table is written to unused space, gets its refcounts, and is made durable. Then one write inside the
//! header's first sector names it (specification: "Header", bytes 60 to 72), and the old one is unused space.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::format::FormatError;
use crate::storage::FileKind;

use super::adjust;
use super::disk::ImageWriter;
use super::free::FreeRuns;
use super::survey::{Survey, for_each_block, for_each_slot, for_each_window};
use crate::check::snapshots::{Entry, for_each_snapshot};

/// Where the header holds the offset of the snapshot table.
const TABLE_OFFSET: u64 = 64;

/// Rewrites the table durably if that mends something; returns how many entries are mended.
///
/// # Errors
/// Those of a check, and of writing.
pub(super) fn mend(survey: &Survey<'_>, disk: &ImageWriter<'_>) -> Result<u64> {
    let Some((mended, table)) = mended_table(survey)? else { return Ok(0) };
    let bits = survey.subject.geometry.cluster_bits();
    let Some(place) = find_place(survey, survey.subject.geometry.clusters_for(table.len() as u64))? else {
        return Ok(0);
    };
    if !survey.may_write(0, 1) {
        return Ok(0);
    }
    disk.write(place.start << bits, &table)?;
    adjust::set(survey, disk, place.clone(), 1)?;
    disk.barrier()?;
    disk.write(TABLE_OFFSET, &(place.start << bits).to_be_bytes())?;
    disk.barrier()?;
    Ok(mended)
}

/// The new table, and how many of its entries are mended. `None` if there is nothing to mend, or if an entry is
/// broken, so that the table cannot be decoded to its end. Like any snapshot table, it has at most 64 MiB.
fn mended_table(survey: &Survey<'_>) -> Result<Option<(u64, Vec<u8>)>> {
    let subject = survey.subject;
    let mut table = Vec::new();
    let (mut mended, mut entries) = (0, 0);
    for_each_snapshot(subject, |entry| match entry {
        Entry::Known { mut snapshot, wrong } => {
            let lacks_size = snapshot.lacks_size(&subject.header);
            if lacks_size {
                snapshot.add_size(&subject.header);
            }
            mended += u64::from(lacks_size || wrong.is_some());
            entries += 1;
            table.extend(snapshot.encode());
            Ok(())
        }
        Entry::Unread(unread) => Err(unread.error(subject.path)),
        Entry::Broken { .. } | Entry::TooLong(_) => Ok(()),
    })?;
    let is_whole = entries == subject.header.snapshots;
    if table.len() as u64 > crate::format::MAX_SNAPSHOT_TABLE {
        let error = FormatError::malformed(
            "snapshot table",
            subject.header.snapshots_offset.get(),
            "a table that would be too long if its entries were whole",
            "at most 64 MiB",
        );
        return Err(Error::format(subject.path, error));
    }
    Ok((is_whole && mended > 0).then_some((mended, table)))
}

/// Finds a run of `count` free clusters: behind the end of the file, or between clusters in use if the file is
/// a device or entries point behind its end.
fn find_place(survey: &Survey<'_>, count: u64) -> Result<Option<Range<u64>>> {
    let subject = survey.subject;
    if survey.file_kind()? != FileKind::Block && !survey.past_end {
        let start = subject.file_clusters();
        return Ok(start.checked_add(count).map(|end| start..end));
    }
    let mut free = FreeRuns::wanting(u64::MAX);
    let mut found = None;
    let mut buf = Vec::new();
    for_each_window(subject, &survey.layout, None, &mut |counts| {
        for_each_block(subject, counts, |block, clusters| {
            if found.is_some() || !survey.read_block(block, &mut buf)? {
                return Ok(());
            }
            let mut used = Vec::new();
            for_each_slot(counts, clusters.clone(), |cluster, slot| {
                if slot.count > 0 {
                    used.push(cluster);
                }
            });
            for cluster in clusters.clone().filter(|cluster| used.binary_search(cluster).is_err()) {
                let is_inside = (cluster + 1) << subject.geometry.cluster_bits() <= subject.file_len;
                if is_inside && survey.stored(&buf, cluster - clusters.start) == 0 {
                    free.add(cluster);
                }
            }
            found = free.take_run(count);
            Ok(())
        })
    })?;
    Ok(found)
}

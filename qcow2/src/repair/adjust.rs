//! Corrects refcounts in place.

use std::ops::Range;

use crate::error::Result;
use crate::format::RefcountWidth;

use super::disk::ImageWriter;
use super::survey::{Survey, for_each_block, for_each_window};
use crate::check::counts::{Counts, Slot};

/// Raises refcounts that are lower than the references, durably; returns how many.
///
/// # Errors
/// Those of a check, and of writing.
pub(super) fn raise(survey: &Survey<'_>, disk: &ImageWriter<'_>) -> Result<u64> {
    let max = RefcountWidth::of(&survey.subject.geometry).max();
    let mut raised = 0;
    for_each_window(survey.subject, &survey.layout, None, &mut |counts| {
        let wanted = |slot: Slot, stored: u64| stored.max(slot.count.min(max));
        raised += change(survey, disk, counts, &wanted, &mut |_, _| {})?;
        Ok(())
    })?;
    disk.barrier()?;
    Ok(raised)
}

/// Lowers refcounts that are higher than the references, durably; all references must be known. Returns how
/// many refcounts changed, and how many clusters became free. Holes are punched only when the refcounts are
/// durable.
///
/// # Errors
/// Those of a check, and of writing.
pub(super) fn lower(survey: &Survey<'_>, disk: &ImageWriter<'_>) -> Result<(u64, u64)> {
    let (mut lowered, mut clusters) = (0, 0);
    for_each_window(survey.subject, &survey.layout, None, &mut |counts| {
        let mut freed: Vec<Range<u64>> = Vec::new();
        lowered +=
            change(survey, disk, counts, &|slot, stored| stored.min(slot.count), &mut |cluster, new| {
                if new == 0 && cluster < survey.subject.file_clusters() {
                    match freed.last_mut() {
                        Some(last) if last.end == cluster => last.end += 1,
                        _ => freed.push(cluster..cluster + 1),
                    }
                }
            })?;
        disk.barrier()?;
        for run in freed {
            clusters += run.end - run.start;
            disk.punch(run.start, run.end - run.start);
        }
        Ok(())
    })?;
    Ok((lowered, clusters))
}

/// Sets the refcount of clusters whose refcount blocks exist. The next barrier makes it durable.
///
/// # Errors
/// A block that cannot be read; those of writing.
pub(super) fn set(
    survey: &Survey<'_>,
    disk: &ImageWriter<'_>,
    clusters: Range<u64>,
    refcount: u64,
) -> Result<()> {
    let subject = survey.subject;
    let per_block = subject.geometry.refcounts_per_block();
    let width = RefcountWidth::of(&subject.geometry);
    let bits = subject.geometry.refcount_bits() as usize;
    let mut buf = Vec::new();
    let mut at = clusters.start;
    while at < clusters.end {
        let (block, index) = (at / per_block, (at % per_block) as usize);
        let end = clusters.end.min((block + 1).saturating_mul(per_block));
        let indexes = index..index + (end - at) as usize;
        if let Some(host) = survey.block(block) {
            survey.read_block(block, &mut buf)?;
            // This cannot fail: the indexes lie in the block, and every width holds a one.
            let _ = width.fill(&mut buf, indexes.clone(), refcount);
            let bytes = indexes.start * bits / 8..(indexes.end * bits).div_ceil(8);
            if let Some(new) = buf.get(bytes.clone()) {
                disk.write(host.get() + bytes.start as u64, new)?;
            }
        }
        at = end;
    }
    Ok(())
}

/// Sets the refcounts of a window to what `wanted` returns, block by block. Calls `changed` with each cluster
/// whose refcount changes, and the new refcount; returns how many there were.
fn change(
    survey: &Survey<'_>,
    disk: &ImageWriter<'_>,
    counts: &Counts,
    wanted: &dyn Fn(Slot, u64) -> u64,
    changed: &mut dyn FnMut(u64, u64),
) -> Result<u64> {
    let subject = survey.subject;
    let width = RefcountWidth::of(&subject.geometry);
    let bits = subject.geometry.refcount_bits() as usize;
    let mut total = 0;
    let mut buf = Vec::new();
    for_each_block(subject, counts, |block, clusters| {
        let Some(host) = survey.block(block) else { return Ok(()) };
        survey.read_block(block, &mut buf)?;
        let mut dirty: Option<Range<usize>> = None;
        let lanes = counts.lanes();
        // This includes clusters behind the end of the file: a refcount that is too high there would become a
        // leak when the file grows.
        for cluster in clusters.start..clusters.start.saturating_add(width.count(&buf) as u64) {
            let first = cluster - (cluster - clusters.start) % lanes;
            let slot = counts.slot(counts.word(first), (cluster - first) as u32);
            let index = (cluster - clusters.start) as usize;
            let stored = width.get(&buf, index).unwrap_or(0);
            let new = wanted(slot, stored);
            if new != stored && width.set(&mut buf, index, new) {
                let from = dirty.map_or(index, |dirty| dirty.start);
                dirty = Some(from..index + 1);
                total += 1;
                changed(cluster, new);
            }
        }
        let bytes = dirty.map(|dirty| dirty.start * bits / 8..(dirty.end * bits).div_ceil(8));
        match bytes.and_then(|bytes| Some((host + bytes.start as u64, buf.get(bytes)?))) {
            Some((at, bytes)) => disk.write(at.get(), bytes),
            None => Ok(()),
        }
    })?;
    Ok(total)
}

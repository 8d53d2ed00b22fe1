//! Takes samples of what base will hold when a merge is done, before anything is written; reads them back when
//! a merge that has emptied layers goes on. Then only base holds their data, and neither its times nor its
//! dirty bit prove that it is the same base: a device may have been overwritten, or a copy restored that was
//! made in the middle of the merge.

use crate::chain::view::View;
use crate::error::Result;
use crate::image::{ClusterCache, Image};
use crate::journal::record::Sample;
use crate::transfer::job::Job;
use crate::transfer::verify::has_foreign_bottom;
use crate::units::{GuestOffset, GuestRange};

/// In how many places of the disk samples are looked for,
const PLACES: u64 = 16;
/// and how many are taken in each.
const OF_EACH: usize = 3;
/// How much of a range is searched for a place where base shows something else. The parts of a cluster that a
/// guest has not written are often copies of base's data.
const SEARCHED: u64 = 2 << 20;
/// Samples begin at sectors.
const SECTOR: u64 = 512;

/// Takes samples of what `job` will write from the layers up to `top`, only at places where base now shows
/// something else. The samples `before`, of an earlier run that has emptied layers, are taken over.
///
/// # Errors
/// Whatever reading reports.
pub(crate) fn take(job: &Job<'_>, top: usize, before: &[Sample]) -> Result<Vec<Sample>> {
    let bottom = usize::from(has_foreign_bottom(job.layers));
    let (now, then) = (View::new(job.layers, bottom, job.base), View::new(job.layers, bottom, top));
    let mut cache = ClusterCache::new();
    let mut samples = Vec::new();
    for Sample { offset, len, .. } in before.iter().copied() {
        let crc = crc(then, offset, len, &mut cache)?;
        // This range is written again, and may be torn; but a layer still holds it.
        let was_held = crc == self::crc(now, offset, len, &mut cache)? && !is_written(job, offset, len)?;
        samples.push(Sample { offset, len, crc, was_held });
    }
    let end = job.question.end();
    for place in 0..PLACES {
        let start = (end / PLACES * place) / SECTOR * SECTOR;
        let Some(window) = job.question.windows(GuestOffset::new(start)).next().transpose()? else { break };
        let mut needs = job.question.needs(window)?;
        needs.retain(|need| need.range.end().get() > start);
        let last = needs.last().map(|need| need.range.end().get());
        let picked = needs.iter().step_by(needs.len().div_ceil(OF_EACH).max(1));
        let starts = picked.map(|need| (need.range.start.get().max(start), need.range.end().get()));
        // A disk may have been restored only in part, so look at the end of this range, too.
        let ends = last.map(|end| (end.saturating_sub(Sample::MOST.into()).max(start), end));
        for (from, to) in starts.chain(ends) {
            let found = differing(then, now, from, to, &mut cache)?;
            samples.extend(found.filter(|new| samples.iter().all(|old: &Sample| old.offset != new.offset)));
        }
    }
    Ok(samples)
}

/// Whether `job` writes to a range.
fn is_written(job: &Job<'_>, offset: u64, len: u32) -> Result<bool> {
    let end = offset.saturating_add(len.into());
    let Some(window) = job.question.windows(GuestOffset::new(offset)).next().transpose()? else {
        return Ok(false);
    };
    let overlaps = |range: GuestRange| range.start.get() < end && offset < range.end().get();
    Ok(job.question.needs(window)?.iter().any(|need| overlaps(need.range)))
}

/// A sample of `then` from the first place of a range where `now` shows something else.
fn differing(
    then: View<'_>,
    now: View<'_>,
    from: u64,
    to: u64,
    cache: &mut ClusterCache,
) -> Result<Option<Sample>> {
    let to = to.min(from.saturating_add(SEARCHED));
    for offset in (from..to).step_by(Sample::MOST as usize) {
        let len = (to - offset).min(Sample::MOST.into()) as u32;
        let crc = crc(then, offset, len, cache)?;
        if crc != self::crc(now, offset, len, cache)? {
            return Ok(Some(Sample { offset, len, crc, was_held: false }));
        }
    }
    Ok(None)
}

/// Whether the layer at `base` shows what the samples say. Samples that base holds only when the merge is done
/// are skipped unless `is_done`.
///
/// # Errors
/// Whatever reading reports.
pub(crate) fn are_held(images: &[&Image], base: usize, samples: &[Sample], is_done: bool) -> Result<bool> {
    let now = View::new(images, usize::from(has_foreign_bottom(images)), base);
    let mut cache = ClusterCache::new();
    for sample in samples.iter().filter(|sample| sample.was_held || is_done) {
        if crc(now, sample.offset, sample.len, &mut cache)? != sample.crc {
            return Ok(false);
        }
    }
    Ok(true)
}

/// Whether the layer at `base` shows nothing of what it held only when the merge was done: a base that is older than the
/// merge.
///
/// # Errors
/// Whatever reading reports.
pub(crate) fn are_all_lost(images: &[&Image], base: usize, samples: &[Sample]) -> Result<bool> {
    let now = View::new(images, usize::from(has_foreign_bottom(images)), base);
    let mut cache = ClusterCache::new();
    let mut merged = samples.iter().filter(|sample| !sample.was_held).peekable();
    if merged.peek().is_none() {
        return Ok(false);
    }
    for sample in merged {
        if crc(now, sample.offset, sample.len, &mut cache)? == sample.crc {
            return Ok(false);
        }
    }
    Ok(true)
}

fn crc(view: View<'_>, offset: u64, len: u32, cache: &mut ClusterCache) -> Result<u32> {
    let mut bytes = vec![0; len as usize];
    view.read(GuestOffset::new(offset), &mut bytes, cache)?;
    Ok(crc32fast::hash(&bytes))
}

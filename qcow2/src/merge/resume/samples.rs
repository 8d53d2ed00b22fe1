//! Samples of what base holds when a merge is done: taken before anything is written, and read back when a merge goes on that
//! has emptied layers. Then nothing but base holds what they held, and neither its times nor its dirty bit tell for certain that
//! it is the same base: a device may have been written over, or a copy put back that was made in the middle of the merge.

use crate::chain::view::View;
use crate::error::Result;
use crate::image::{ClusterCache, Image};
use crate::journal::record::Sample;
use crate::transfer::job::Job;
use crate::transfer::verify::has_foreign_bottom;
use crate::units::GuestOffset;

/// In how many places of the disk samples are looked for,
const PLACES: u64 = 16;
/// and how many are taken in each.
const OF_EACH: usize = 4;
/// Samples begin at sectors.
const SECTOR: u64 = 512;

/// Takes samples of what `job` is to write of the layers up to `top`, only where base shows something else now. Those of an
/// earlier run that has emptied layers, `before`, are taken over.
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
        let was_held = crc == self::crc(now, offset, len, &mut cache)?;
        samples.push(Sample { offset, len, crc, was_held });
    }
    let end = job.question.end();
    for place in 0..PLACES {
        let start = (end / PLACES * place) / SECTOR * SECTOR;
        let Some(window) = job.question.windows(GuestOffset::new(start)).next().transpose()? else { break };
        let mut needs = job.question.needs(window)?;
        needs.retain(|need| need.range.end().get() > start);
        for need in needs.iter().step_by(needs.len().div_ceil(OF_EACH).max(1)) {
            let offset = need.range.start.get().max(start);
            let len = (need.range.end().get() - offset).min(Sample::MOST.into()) as u32;
            if samples.iter().any(|sample: &Sample| sample.offset == offset) {
                continue;
            }
            let crc = crc(then, offset, len, &mut cache)?;
            if crc != self::crc(now, offset, len, &mut cache)? {
                samples.push(Sample { offset, len, crc, was_held: false });
            }
        }
    }
    Ok(samples)
}

/// Whether the layer at `base` shows what the samples say, of which those that it held only when the merge was done are left
/// out if it was not (`is_done`).
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

fn crc(view: View<'_>, offset: u64, len: u32, cache: &mut ClusterCache) -> Result<u32> {
    let mut bytes = vec![0; len as usize];
    view.read(GuestOffset::new(offset), &mut bytes, cache)?;
    Ok(crc32fast::hash(&bytes))
}

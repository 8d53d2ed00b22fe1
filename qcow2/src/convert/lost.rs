//! Finds what the guest loses when a chain is salvaged.

use crate::chain::Chain;
use crate::chain::view::{Supply, View};
use crate::error::Result;
use crate::image::{Lost, Mapping, Qcow2};
use crate::units::GuestRange;

/// Adds to the lost data the ranges that the layers' damaged tables hid, unless a layer above hides them.
/// Returns all of it in order, and whether the list is complete. The lowest `below` layers are not read.
///
/// # Errors
/// A file cannot be asked for its length.
pub(super) fn seen(data: &Lost, chain: &Chain, below: usize) -> Result<(Vec<GuestRange>, bool)> {
    let images = chain.images();
    let view = View::new(&images, below, chain.active());
    let mut is_all = true;
    let mut supplied = Vec::new();
    for (at, image) in images.iter().enumerate().skip(below) {
        let Some((ranges, lists_all)) = image.as_qcow2().and_then(Qcow2::lost).map(Lost::list) else {
            continue;
        };
        is_all &= lists_all;
        for range in ranges {
            let mut start = range.start;
            while start < range.end() {
                let window = GuestRange { start, len: view.window() };
                let Some(part) = window.intersect(&range) else { break };
                supplied.clear();
                view.resolve(part, &mut supplied)?;
                for part in &supplied {
                    if let Supply::Layer { layer, mapping: Mapping::Zero { host: None } } = part.supply
                        && layer == at
                    {
                        data.add(part.range);
                    }
                }
                start = part.end();
            }
        }
    }
    let (list, lists_all) = data.list();
    Ok((list, lists_all && is_all))
}

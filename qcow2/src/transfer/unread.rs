//! Reading all data of an image, to know what cannot be read.

use std::sync::atomic::{AtomicBool, Ordering};

use super::needs::Need;
use super::origin::Origin;
use super::zeros::{AHEAD, Zeros};
use crate::chain::view::{Supplied, Supply, View};
use crate::error::{Error, Result};
use crate::image::{Image, Lost, Mapping, Qcow2};
use crate::units::{GuestOffset, GuestRange};

/// The ranges of the guest's disk whose data `image` holds and that cannot be read, or not be inflated, in order; and
/// whether these are all. What lies below the image is not looked at. A damaged table is such a range, too, if the image
/// is salvaged.
///
/// # Errors
/// [`Error::Cancelled`]; a table that cannot be read, if the image is not salvaged.
pub(crate) fn unreadable(image: &Image, cancel: &AtomicBool) -> Result<(Vec<GuestRange>, bool)> {
    let layers = [image];
    let view = View::new(&layers, 0, 0);
    let lost = Lost::default();
    let mut supplied: Vec<Supplied> = Vec::new();
    let mut at = GuestOffset::ZERO;
    while let Some(start) = view.next_supplied(at)? {
        if cancel.load(Ordering::Relaxed) {
            return Err(Error::Cancelled);
        }
        at = start.align_down(AHEAD) + AHEAD;
        supplied.clear();
        view.resolve(GuestRange::between(start, at), &mut supplied)?;
        let needs = supplied.iter().filter_map(held).collect();
        Zeros::Mapped.found_in(needs, &layers, Some(&lost));
    }
    let mut is_all = true;
    if let Some((tables, lists_all)) = image.as_qcow2().and_then(Qcow2::lost).map(Lost::list) {
        tables.into_iter().for_each(|range| lost.add(range));
        is_all = lists_all;
    }
    let (list, lists_all) = lost.list();
    Ok((list, lists_all && is_all))
}

/// The data of a part, if it is data.
fn held(part: &Supplied) -> Option<Need> {
    let Supply::Layer { layer, mapping } = part.supply else { return None };
    let origin = match mapping {
        Mapping::Data { host } => Origin::Plain { layer, host },
        Mapping::Compressed(compressed) => {
            Origin::Compressed { layer, part: compressed, guest: part.range.start }
        }
        Mapping::Zero { .. } | Mapping::Unallocated => return None,
    };
    Some(Need { range: part.range, origin })
}

//! The whole disk, range by range: what supplies each.

use std::io;

use qcow2::chain::Chain;
use qcow2::chain::view::{Supplied, Supply, View};
use qcow2::image::Mapping;
use qcow2::units::{GuestOffset, GuestRange};

use crate::call::Call;
use crate::failure::Failure;

/// Calls `f` with every range of the disk in order, each as long as can be.
pub(super) fn walk(
    chain: &Chain,
    call: &Call,
    f: impl FnMut(&Supplied) -> io::Result<()>,
) -> Result<(), Failure> {
    walk_above(chain, 0, call, f)
}

/// As [`walk`], through the layers from the position `first` on alone.
pub(super) fn walk_above(
    chain: &Chain,
    first: usize,
    call: &Call,
    mut f: impl FnMut(&Supplied) -> io::Result<()>,
) -> Result<(), Failure> {
    let images = chain.images();
    let view = View::new(&images, first, chain.active());
    let window = view.window();
    let mut found = Vec::new();
    let mut open: Option<Supplied> = None;
    let mut at = 0;
    while at < view.size() {
        let len = window.min(view.size() - at);
        found.clear();
        view.resolve(GuestRange { start: GuestOffset::new(at), len }, &mut found)
            .map_err(|e| Failure::engine(&e, call))?;
        for next in &found {
            match &mut open {
                Some(last) if continues(last, next) => last.range.len += next.range.len,
                _ => {
                    if let Some(done) = open.replace(*next) {
                        f(&done).map_err(Failure::stdout)?;
                    }
                }
            }
        }
        at += len;
    }
    open.map_or(Ok(()), |last| f(&last).map_err(Failure::stdout))
}

/// Whether `next` can be told in one with `last`, its neighbour: the places of compressed clusters are
/// not told.
fn continues(last: &Supplied, next: &Supplied) -> bool {
    let compressed = |part: &Supplied| match part.supply {
        Supply::Layer { layer, mapping: Mapping::Compressed(_) } => Some(layer),
        _ => None,
    };
    last.supply.advance(last.range.len) == next.supply
        || (compressed(last).is_some() && compressed(last) == compressed(next))
}

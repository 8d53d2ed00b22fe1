//! Computes the needs of a window: what the base must hold when a merge is done.

use crate::chain::differences::{Differences, Sides};
use crate::chain::view::{Supplied, Supply, View};
use crate::error::Result;
use crate::image::{Image, Mapping};
use crate::units::{GuestOffset, GuestRange};

use super::origin::Origin;

/// A range of the base and what it must hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Need {
    /// The range, never empty.
    pub(crate) range: GuestRange,
    /// Where what it must hold comes from.
    pub(crate) origin: Origin,
}

impl Need {
    /// The part inside `range`, or `None` if they do not meet.
    pub(crate) fn clip(&self, range: &GuestRange) -> Option<Self> {
        let both = self.range.intersect(range)?;
        Some(Self { range: both, origin: self.origin.advance(both.start - self.range.start) })
    }
}

/// What an image takes that gets other layers below it: only what would show something else.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Only<'a> {
    /// Both sides.
    pub(crate) sides: &'a Sides<'a>,
    /// Where they differ.
    pub(crate) differences: &'a Differences,
}

/// The question that a merge asks of its layers.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Question<'a> {
    /// The layers above base, up to and including top.
    pub(crate) view: View<'a>,
    /// The base.
    pub(crate) base: &'a Image,
    /// The size of the disk below base when the merge is done; zero if there is none.
    pub(crate) below_size: u64,
    /// The position of the base in the view, if data moves up: the base need not take data that it holds
    /// itself.
    pub(crate) own: Option<usize>,
    /// Where data moves up under other layers: nothing else is needed.
    pub(crate) only: Option<Only<'a>>,
    /// The base's size before the merge, in bytes.
    pub(crate) base_size: u64,
    /// Behind the end of a short top: up to where the layer above it would see base's old data. Equal
    /// to the top's size when there is nothing to hide.
    pub(crate) zero_until: u64,
    /// Nothing is needed behind this offset: the disk of base ends there when the merge is done.
    pub(crate) limit: u64,
}

impl Question<'_> {
    /// Behind the last byte that the base may need.
    pub(crate) fn end(&self) -> u64 {
        self.view.size().max(self.zero_until).min(self.limit)
    }

    /// The windows from `from` on in which something may be needed, in order; sizes are multiples of every cluster
    /// size. Zeros are needed only where base, or what lies below it, may show something else.
    pub(crate) fn windows(&self, from: GuestOffset) -> impl Iterator<Item = Result<GuestRange>> + '_ {
        let size = self.view.window();
        let mut at = from;
        std::iter::from_fn(move || {
            let start = match self.next(at) {
                Err(e) => {
                    at = GuestOffset::new(u64::MAX);
                    return Some(Err(e));
                }
                Ok(None) => return None,
                Ok(Some(next)) => next.align_down(size),
            };
            at = start + size;
            Some(Ok(GuestRange::between(start, at.min(GuestOffset::new(self.end())))))
        })
    }

    fn next(&self, from: GuestOffset) -> Result<Option<GuestOffset>> {
        if from.get() >= self.end() {
            return Ok(None);
        }
        if let Some(Only { sides, differences }) = self.only {
            return differences.next(sides, from);
        }
        // From there on, zeros may have to hide what base shows: it grows, or a layer above it is short.
        let hiding = from.max(GuestOffset::new(self.view.shortest().min(self.base_size)));
        let shown = match hiding.get() < self.below_size {
            true => Some(hiding),
            false => self.base.next_held(hiding)?,
        };
        let next = [self.view.next_allocated(from)?, shown].into_iter().flatten().min();
        Ok(next.filter(|next| next.get() < self.end()))
    }

    /// The needs of a window, sorted and disjoint.
    ///
    /// # Errors
    /// As [`View::resolve`].
    pub(crate) fn needs(&self, window: GuestRange) -> Result<Vec<Need>> {
        let mut supplied: Vec<Supplied> = Vec::new();
        self.view.resolve(window, &mut supplied)?;
        if let Some(only) = self.only {
            return self.different(only, &supplied, window);
        }
        let mut needs: Vec<Need> = Vec::with_capacity(supplied.len());
        // Where data moves up, zeros are needed only where they hide what will lie below.
        let zeros_end = GuestOffset::new(if self.own.is_some() { self.below_size } else { u64::MAX });
        let mut push = |range: GuestRange, origin| {
            let end = if origin == Origin::Zeros { range.end().min(zeros_end) } else { range.end() };
            let range = GuestRange::between(range.start, end);
            if let Some(last) = needs.last_mut()
                && last.range.end() == range.start
                && last.origin == Origin::Zeros
                && origin == Origin::Zeros
            {
                last.range.len += range.len;
            } else if !range.is_empty() {
                needs.push(Need { range, origin });
            }
        };
        for part in supplied {
            match part.supply {
                Supply::Layer { layer, .. } if Some(layer) == self.own => {}
                // Behind the base's old end the guest saw zeros.
                Supply::Nothing | Supply::Layer { mapping: Mapping::Unallocated, .. } => {
                    let start = part.range.start.max(GuestOffset::new(self.base_size));
                    push(GuestRange::between(start, part.range.end()), Origin::Zeros);
                }
                Supply::Layer { .. } | Supply::PastEnd { .. } => push(part.range, origin(&part)),
            }
        }
        let hidden =
            GuestRange::between(GuestOffset::new(self.view.size()), GuestOffset::new(self.zero_until));
        if let Some(hidden) = hidden.intersect(&window) {
            push(hidden, Origin::Zeros);
        }
        Ok(needs)
    }

    /// The needs of an image that gets other layers below it.
    fn different(&self, only: Only<'_>, supplied: &[Supplied], window: GuestRange) -> Result<Vec<Need>> {
        let different = only.differences.within(only.sides, window)?;
        let mut needs: Vec<Need> = Vec::new();
        let mut first = 0;
        for part in supplied {
            if matches!(part.supply, Supply::Layer { layer, .. } if Some(layer) == self.own) {
                continue;
            }
            let ended = |n: usize| different.get(n).is_some_and(|d| d.range.end() <= part.range.start);
            while ended(first) {
                first += 1;
            }
            for range in different.iter().skip(first) {
                let Some(part) = part.clip(&range.range) else { break };
                let origin = if range.is_zero { Origin::Zeros } else { origin(&part) };
                needs.push(Need { range: part.range, origin });
            }
        }
        Ok(needs)
    }
}

/// Where the bytes of a part come from.
fn origin(part: &Supplied) -> Origin {
    match part.supply {
        Supply::Layer { layer, mapping: Mapping::Data { host } } => Origin::Plain { layer, host },
        Supply::Layer { layer, mapping: Mapping::Compressed(compressed) } => {
            Origin::Compressed { layer, part: compressed, guest: part.range.start }
        }
        Supply::Layer { mapping: Mapping::Zero { .. } | Mapping::Unallocated, .. }
        | Supply::PastEnd { .. }
        | Supply::Nothing => Origin::Zeros,
    }
}

//! The map through a chain: it tells which layer supplies each range.
//!
//! Layers are resolved once for a window of the disk, from the top down: each layer is asked only about what
//! the layers above it left open. Nothing is kept between windows, so the window bounds the memory, whatever
//! the size of the disk.

use crate::error::Result;
use crate::image::{Extent, Image, Mapping};
use crate::units::{GuestOffset, GuestRange};

/// What supplies a range of the guest's disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Supply {
    /// A layer's data or zeros (never [`Mapping::Unallocated`]).
    Layer {
        /// The layer: its position in the list that was resolved.
        layer: usize,
        /// How that layer maps the range.
        mapping: Mapping,
    },
    /// Zeros, because a layer below the top ends before this range, and hides what lies below it.
    PastEnd {
        /// The short layer.
        layer: usize,
    },
    /// No layer of the list supplies it: it reads as zeros.
    Nothing,
}

/// A range of the disk and what supplies it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Supplied {
    /// The range, never empty.
    pub range: GuestRange,
    /// What supplies it.
    pub supply: Supply,
}

impl Supply {
    /// What supplies the same range from `bytes` bytes further on.
    pub(crate) fn advance(self, bytes: u64) -> Self {
        match self {
            Self::Layer { layer, mapping } => Self::Layer { layer, mapping: mapping.advance(bytes) },
            Self::PastEnd { .. } | Self::Nothing => self,
        }
    }
}

impl Supplied {
    /// The part inside `range`, or `None` if there is none.
    pub fn clip(&self, range: &GuestRange) -> Option<Self> {
        let both = self.range.intersect(range)?;
        Some(Self { range: both, supply: self.supply.advance(both.start - self.range.start) })
    }
}

/// A stack of layers, looked at from its top: `layers[first]` is the bottom, the last one the top.
#[derive(Clone, Copy, Debug)]
pub struct View<'a> {
    pub(super) layers: &'a [&'a Image],
    first: usize,
}

impl<'a> View<'a> {
    /// The view through `layers[first..=top]`, which are ordered bottom first. Layer numbers in the
    /// result are positions in `layers`.
    pub fn new(layers: &'a [&'a Image], first: usize, top: usize) -> Self {
        Self { layers: layers.get(..=top).unwrap_or(layers), first }
    }

    /// The size of the disk: the top layer's.
    pub fn size(&self) -> u64 {
        self.layers.last().map_or(0, |top| top.virtual_size())
    }

    /// A good window size for [`View::resolve`], in bytes: some thousand clusters (or subclusters) of the layer
    /// with the smallest ones. It is a power of two and a multiple of every cluster size.
    pub fn window(&self) -> u64 {
        let sizes = self.own().filter_map(|(_, image)| image.as_qcow2());
        sizes.map(|q| q.geometry().subcluster_size()).min().unwrap_or(1 << 16) << 13
    }

    fn own(&self) -> impl Iterator<Item = (usize, &'a Image)> {
        self.layers.iter().copied().enumerate().skip(self.first)
    }

    /// The first offset at or behind `from` where a layer may supply something; `None` if there is nothing up
    /// to the end. It reads no L2 tables, so the answer may come too early, but never too late.
    ///
    /// # Errors
    /// A table that cannot be read.
    pub fn next_supplied(&self, from: GuestOffset) -> Result<Option<GuestOffset>> {
        if from.get() >= self.size() {
            return Ok(None);
        }
        // Behind the end of a short layer, its zeros hide the layers below; so something is supplied from there
        // on.
        let past_end = from.max(GuestOffset::new(self.shortest()));
        let allocated = if past_end == from { None } else { self.next_allocated(from)? };
        let next = allocated.map_or(past_end, |allocated| allocated.min(past_end));
        Ok((next.get() < self.size()).then_some(next))
    }

    /// The size of the shortest layer. Behind it, zeros hide what lies below, or the disk ends.
    pub(crate) fn shortest(&self) -> u64 {
        self.own().map(|(_, image)| image.virtual_size()).min().unwrap_or(0)
    }

    /// The first offset at or behind `from` where a layer may have something allocated; `None` if none
    /// has. Zeros behind the end of a short layer do not count.
    ///
    /// # Errors
    /// A table that cannot be read.
    pub(crate) fn next_allocated(&self, from: GuestOffset) -> Result<Option<GuestOffset>> {
        let mut next: Option<GuestOffset> = None;
        for (_, image) in self.own() {
            next = [next, image.next_allocated(from)?].into_iter().flatten().min();
            if next == Some(from) {
                break;
            }
        }
        Ok(next)
    }

    /// Resolves a window: appends what supplies each part of `range`, sorted and without gaps. Nothing is
    /// reported behind the disk's end.
    ///
    /// # Errors
    /// A table that cannot be read, or an entry that breaks the format's rules.
    pub fn resolve(&self, range: GuestRange, out: &mut Vec<Supplied>) -> Result<()> {
        let range = GuestRange::between(range.start, range.end().min(GuestOffset::new(self.size())));
        if range.is_empty() {
            return Ok(());
        }
        let begin = out.len();
        let mut open = vec![range];
        let mut extents: Vec<Extent> = Vec::new();
        for layer in (self.first..self.layers.len()).rev() {
            let (Some(first), Some(last)) = (open.first(), open.last()) else { break };
            let Some(image) = self.layers.get(layer) else { break };
            extents.clear();
            let hull = GuestRange::between(first.start, last.end());
            if image.map(hull, &mut extents).is_err() {
                // Asking for the whole hull is faster, but it also decodes entries that the layers above hide.
                // If one of those is damaged, nobody reads it: ask for the open ranges only.
                extents.clear();
                open.iter().try_for_each(|range| image.map(*range, &mut extents))?;
            }
            open = split(layer, &open, &extents, GuestOffset::new(image.virtual_size()), out);
        }
        out.extend(open.into_iter().map(|range| Supplied { range, supply: Supply::Nothing }));
        if let Some(new) = out.get_mut(begin..) {
            // Each layer's part is sorted already; a stable sort merges such runs.
            new.sort_by_key(|s| s.range.start);
        }
        join(out, begin);
        Ok(())
    }
}

/// Divides the open ranges by what a layer says: appends what it supplies to `out`, and returns what stays
/// open.
fn split(
    layer: usize,
    open: &[GuestRange],
    extents: &[Extent],
    layer_end: GuestOffset,
    out: &mut Vec<Supplied>,
) -> Vec<GuestRange> {
    let mut still_open: Vec<GuestRange> = Vec::new();
    let mut extents = extents.iter().peekable();
    for range in open {
        while let Some(extent) = extents.peek() {
            if let Some(part) = extent.clip(range) {
                match part.mapping {
                    Mapping::Unallocated => match still_open.last_mut() {
                        Some(last) if last.end() == part.range.start => last.len += part.range.len,
                        _ => still_open.push(part.range),
                    },
                    mapping => {
                        out.push(Supplied { range: part.range, supply: Supply::Layer { layer, mapping } });
                    }
                }
            }
            // The extent reaches into the next open range: keep it for that one.
            if extent.range.end() > range.end() {
                break;
            }
            extents.next();
        }
        let behind = GuestRange::between(range.start.max(layer_end), range.end());
        if !behind.is_empty() {
            out.push(Supplied { range: behind, supply: Supply::PastEnd { layer } });
        }
    }
    still_open
}

/// Joins neighbours, from `begin` on, where the second only continues the first.
fn join(out: &mut Vec<Supplied>, begin: usize) {
    let mut kept = begin;
    for n in begin..out.len() {
        let next = out[n];
        if kept > begin {
            let last = &mut out[kept - 1];
            if last.range.end() == next.range.start && last.supply.advance(last.range.len) == next.supply {
                last.range.len += next.range.len;
                continue;
            }
        }
        out[kept] = next;
        kept += 1;
    }
    out.truncate(kept);
}

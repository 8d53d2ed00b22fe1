//! Walks a whole disk in ranges that are as long as possible, and describes each as `qemu-img map` does.

use std::ops::Range;

use serde::Serialize;

use super::Chain;
use super::view::{Supplied, Supply, View};
use crate::error::{Error, Result};
use crate::image::Mapping;
use crate::units::{GuestOffset, GuestRange};

impl View<'_> {
    /// Calls `f` with every range of the disk in order. Neighbours that continue each other become one range,
    /// even across windows; compressed clusters of one layer do so wherever they lie.
    ///
    /// # Errors
    /// A table that cannot be read, or an entry that breaks the format's rules; those of `f`.
    pub fn walk<E: From<Error>>(
        &self,
        mut f: impl FnMut(&Supplied) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let window = self.window();
        let mut found = Vec::new();
        let mut open: Option<Supplied> = None;
        let mut at = 0;
        while at < self.size() {
            let len = window.min(self.size() - at);
            found.clear();
            self.resolve(GuestRange { start: GuestOffset::new(at), len }, &mut found)?;
            for next in &found {
                match &mut open {
                    Some(last) if continues(last, next) => last.range.len += next.range.len,
                    _ => open.replace(*next).map_or(Ok(()), |done| f(&done))?,
                }
            }
            at += len;
        }
        open.map_or(Ok(()), |last| f(&last))
    }
}

/// Whether `next` and its neighbour `last` make one range.
fn continues(last: &Supplied, next: &Supplied) -> bool {
    let compressed = |part: &Supplied| match part.supply {
        Supply::Layer { layer, mapping: Mapping::Compressed(_) } => Some(layer),
        _ => None,
    };
    last.supply.advance(last.range.len) == next.supply
        || (compressed(last).is_some() && compressed(last) == compressed(next))
}

/// One entry of a map, with the fields of `qemu-img map --output=json`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[non_exhaustive]
pub struct MapEntry {
    /// The guest offset.
    pub start: u64,
    /// The length in bytes.
    pub length: u64,
    /// How many layers lie above the one that supplies the range.
    pub depth: usize,
    /// Whether a layer has it.
    pub present: bool,
    /// Whether it reads as zeros.
    pub zero: bool,
    /// Whether it is data.
    pub data: bool,
    /// Whether it is compressed.
    pub compressed: bool,
    /// The host offset, if the range is contiguous in the file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub offset: Option<u64>,
}

/// Turns ranges into entries of a map.
#[derive(Debug)]
pub struct Mapper<'c> {
    chain: &'c Chain,
    /// For each layer, whether its clusters were preallocated.
    preallocated: Vec<bool>,
    /// The last answer of a file: the layer, the offset that was asked about, and the next data behind it.
    known: Option<(usize, u64, Range<u64>)>,
}

impl<'c> Mapper<'c> {
    /// A mapper for the whole chain.
    ///
    /// # Errors
    /// A table that cannot be read.
    pub fn new(chain: &'c Chain) -> Result<Self> {
        let ahead = |layer: &super::Layer| layer.image.as_qcow2().map_or(Ok(false), |q| q.is_preallocated());
        let preallocated = chain.layers().iter().map(ahead).collect::<Result<_>>()?;
        Ok(Self { chain, preallocated, known: None })
    }

    /// Calls `f` with the entries of a range.
    ///
    /// # Errors
    /// Those of `f`.
    pub fn entries<E>(
        &mut self,
        part: &Supplied,
        f: &mut impl FnMut(MapEntry) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let (layer, mapping) = match part.supply {
            Supply::Layer { layer, mapping } => (layer, mapping),
            // QEMU counts the zeros behind the end of a short layer to the layer above it.
            Supply::PastEnd { layer } => (layer + 1, Mapping::Unallocated),
            Supply::Nothing => (0, Mapping::Unallocated),
        };
        let zero = matches!(mapping, Mapping::Zero { .. } | Mapping::Unallocated);
        let entry = MapEntry {
            start: part.range.start.get(),
            length: part.range.len,
            depth: self.chain.active().saturating_sub(layer),
            present: mapping != Mapping::Unallocated,
            zero,
            data: !zero,
            compressed: matches!(mapping, Mapping::Compressed(_)),
            offset: match mapping {
                Mapping::Data { host } | Mapping::Zero { host: Some(host) } => Some(host.get()),
                _ => None,
            },
        };
        match (mapping, self.preallocated.get(layer)) {
            (Mapping::Data { host }, Some(true)) => self.holes(layer, entry, host.get(), f),
            _ => f(entry),
        }
    }

    /// Reports data in preallocated clusters: it is zero where the file has holes.
    fn holes<E>(
        &mut self,
        layer: usize,
        entry: MapEntry,
        host: u64,
        f: &mut impl FnMut(MapEntry) -> std::result::Result<(), E>,
    ) -> std::result::Result<(), E> {
        let end = host + entry.length;
        let mut at = host;
        while at < end {
            let data = self.next_data(layer, at);
            for (until, zero) in [(data.start.clamp(at, end), true), (data.end.clamp(at, end), false)] {
                if until > at {
                    let (start, length) = (entry.start + (at - host), until - at);
                    f(MapEntry { start, length, zero, offset: Some(at), ..entry })?;
                    at = until;
                }
            }
        }
        Ok(())
    }

    /// The next range at or behind `at` where a layer's file holds data. The file is asked once for
    /// many extents: there may be millions of them in one hole.
    fn next_data(&mut self, layer: usize, at: u64) -> Range<u64> {
        if let Some((known, from, data)) = &self.known
            && *known == layer
            && (*from..data.end).contains(&at)
        {
            return data.clone();
        }
        let file = self.chain.layers().get(layer).map(|layer| layer.image.data_file());
        let data = match file.map(|file| file.next_data(at)) {
            Some(Ok(data)) => data.unwrap_or(u64::MAX..u64::MAX),
            // Holes only make the map finer: if the file cannot tell, everything counts as data.
            _ => at..u64::MAX,
        };
        self.known = Some((layer, at, data.clone()));
        data
    }
}

//! What one image says about a range of its guest's disk.

use crate::units::{GuestOffset, GuestRange, HostOffset};

/// A range of the guest's disk that one image maps in one way.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// The range, never empty.
    pub range: GuestRange,
    /// How the image maps it.
    pub mapping: Mapping,
}

/// How an image maps a range.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mapping {
    /// Not in this image: what lies below shows.
    Unallocated,
    /// Zeros; with the host offset of clusters that are kept for them, if any.
    Zero {
        /// Where clusters are kept whose content means nothing.
        host: Option<HostOffset>,
    },
    /// Data at a host offset, in the data file if the image has one.
    Data {
        /// Where the first byte lies.
        host: HostOffset,
    },
    /// A part of one compressed cluster.
    Compressed(CompressedPart),
}

/// A part of a compressed cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CompressedPart {
    /// The first byte of the compressed stream.
    pub host: HostOffset,
    /// The most bytes that the stream takes.
    pub len: u64,
    /// How many bytes of the inflated cluster come before the part.
    pub skip: u64,
}

impl Mapping {
    /// The mapping of what lies `bytes` further on in the same extent.
    pub(crate) fn advance(self, bytes: u64) -> Self {
        match self {
            Self::Unallocated => self,
            Self::Zero { host } => Self::Zero { host: host.map(|h| h + bytes) },
            Self::Data { host } => Self::Data { host: host + bytes },
            Self::Compressed(part) => {
                Self::Compressed(CompressedPart { skip: part.skip.saturating_add(bytes), ..part })
            }
        }
    }
}

impl Extent {
    /// The part of the extent inside `range`, or `None` if they do not meet.
    pub(crate) fn clip(&self, range: &GuestRange) -> Option<Self> {
        let both = self.range.intersect(range)?;
        Some(Self { range: both, mapping: self.mapping.advance(both.start - self.range.start) })
    }
}

/// Appends a range to a list of extents, joined to the last one where one extent can say both.
pub(crate) fn push(out: &mut Vec<Extent>, start: GuestOffset, len: u64, mapping: Mapping) {
    if len == 0 {
        return;
    }
    if let Some(last) = out.last_mut()
        && last.range.end() == start
        && last.mapping.advance(last.range.len) == mapping
    {
        last.range.len += len;
        return;
    }
    out.push(Extent { range: GuestRange { start, len }, mapping });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn data(host: u64) -> Mapping {
        Mapping::Data { host: HostOffset::new(host) }
    }

    #[test]
    fn contiguous_extents_are_joined() {
        let mut out = Vec::new();
        push(&mut out, GuestOffset::new(0), 10, data(100));
        push(&mut out, GuestOffset::new(10), 10, data(110));
        push(&mut out, GuestOffset::new(20), 10, data(200));
        push(&mut out, GuestOffset::new(30), 5, Mapping::Unallocated);
        push(&mut out, GuestOffset::new(35), 5, Mapping::Unallocated);
        assert_eq!(out.len(), 3);
        assert_eq!(out[0].range.len, 20);
        assert_eq!(out[2].range.len, 10);
    }

    #[test]
    fn clipping_moves_the_mapping_along() {
        let extent =
            Extent { range: GuestRange { start: GuestOffset::new(100), len: 50 }, mapping: data(1000) };
        let clipped = extent.clip(&GuestRange { start: GuestOffset::new(120), len: 100 }).unwrap();
        assert_eq!(clipped.range, GuestRange { start: GuestOffset::new(120), len: 30 });
        assert_eq!(clipped.mapping, data(1020));
    }
}

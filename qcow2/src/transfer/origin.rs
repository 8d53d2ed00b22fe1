//! Where the bytes that a base needs come from.

use crate::image::CompressedPart;
use crate::units::{GuestOffset, HostOffset};

/// Where bytes come from. Layers are positions in the chain, the bottom first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Origin {
    /// Plain data of a layer.
    Plain {
        /// The layer.
        layer: usize,
        /// Where the first byte lies in the layer's data.
        host: HostOffset,
    },
    /// A part of a compressed cluster of a layer.
    Compressed {
        /// The layer.
        layer: usize,
        /// The part.
        part: CompressedPart,
        /// Where the guest sees it, for error messages.
        guest: GuestOffset,
    },
    /// Zeros.
    Zeros,
}

impl Origin {
    /// Where the bytes `bytes` further on come from.
    pub(crate) fn advance(self, bytes: u64) -> Self {
        match self {
            Self::Plain { layer, host } => Self::Plain { layer, host: host + bytes },
            Self::Compressed { layer, part, guest } => Self::Compressed {
                layer,
                part: CompressedPart { skip: part.skip.saturating_add(bytes), ..part },
                guest: guest + bytes,
            },
            Self::Zeros => Self::Zeros,
        }
    }
}

//! Reads the bytes that the guest sees through a view.

use super::view::{Supplied, Supply, View};
use crate::error::Result;
use crate::image::{ClusterCache, Extent, Mapping};
use crate::units::{GuestOffset, GuestRange};

impl Supply {
    /// Whether the range reads as zeros, as far as the layers' tables tell.
    pub fn is_zero(&self) -> bool {
        match self {
            Self::Layer { mapping, .. } => matches!(mapping, Mapping::Zero { .. } | Mapping::Unallocated),
            Self::PastEnd { .. } | Self::Nothing => true,
        }
    }
}

impl View<'_> {
    /// Reads the bytes that the guest sees from `start` on. Bytes behind the disk's end, and bytes that no
    /// layer supplies, read as zeros. `cache` must be used only with the images of this view: it is keyed by
    /// layer number.
    ///
    /// # Errors
    /// A table that cannot be read or is damaged; data that cannot be read or inflated.
    pub fn read(&self, start: GuestOffset, buf: &mut [u8], cache: &mut ClusterCache) -> Result<()> {
        let mut supplied = Vec::new();
        self.resolve(GuestRange { start, len: buf.len() as u64 }, &mut supplied)?;
        let mut end = 0;
        for part in &supplied {
            let from = (part.range.start - start) as usize;
            end = from + part.range.len as usize;
            // The parts lie inside the range that was asked for.
            self.read_supplied(part, buf.get_mut(from..end).unwrap_or_default(), cache)?;
        }
        buf.get_mut(end..).unwrap_or_default().fill(0);
        Ok(())
    }

    /// Reads a part that [`View::resolve`] has reported, or its beginning: `buf` must not be longer than the
    /// part.
    ///
    /// # Errors
    /// Data that cannot be read or inflated.
    pub(crate) fn read_supplied(
        &self,
        part: &Supplied,
        buf: &mut [u8],
        cache: &mut ClusterCache,
    ) -> Result<()> {
        match part.supply {
            Supply::Layer { layer, mapping } if !part.supply.is_zero() => {
                let Some(image) = self.layers.get(layer) else {
                    buf.fill(0);
                    return Ok(());
                };
                image.read_extent(&Extent { range: part.range, mapping }, buf, cache, layer)
            }
            _ => {
                buf.fill(0);
                Ok(())
            }
        }
    }
}

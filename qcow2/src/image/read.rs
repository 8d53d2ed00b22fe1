//! Bytes behind an extent.

use super::qcow2::read_or_zero;
use super::{CompressedPart, Extent, Image, Inflater, Mapping, Qcow2};
use crate::error::{Error, Result};
use crate::format::FormatError;
use crate::storage::{Storage, first_unreadable};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// One inflated cluster, kept because its parts are often asked for one after the other. Each worker
/// has its own; it must not outlive the image, nor be used for two images.
#[derive(Debug, Default)]
pub struct ClusterCache {
    inflater: Inflater,
    compressed: Vec<u8>,
    cluster: Vec<u8>,
    holds: Option<(usize, u64, u64)>,
}

impl ClusterCache {
    /// An empty cache.
    pub fn new() -> Self {
        Self::default()
    }

    /// The inflated cluster of which `part` is a part. `layer` tells the images apart.
    ///
    /// # Errors
    /// The stream cannot be read or is damaged.
    pub(crate) fn cluster(
        &mut self,
        image: &Qcow2,
        layer: usize,
        part: &CompressedPart,
        guest: GuestOffset,
    ) -> Result<&[u8]> {
        let key = (layer, part.host.get(), part.len);
        if self.holds != Some(key) {
            self.holds = None;
            self.cluster.resize(image.geometry().cluster_size() as usize, 0);
            let data = match image.mapped(part.host, part.len as usize) {
                Some(data) => data,
                None => {
                    self.compressed.resize(part.len as usize, 0);
                    let read = image.file().read_at(&mut self.compressed, part.host.get());
                    let n = read.map_err(|source| Error::Unreadable {
                        path: image.path().to_owned(),
                        in_data_file: false,
                        guest: Some(GuestRange {
                            start: guest,
                            len: image.geometry().cluster_size() - part.skip,
                        }),
                        offset: first_unreadable(&**image.file(), part.host.get(), part.len),
                        source,
                    })?;
                    self.compressed.get(..n).unwrap_or_default()
                }
            };
            self.inflater.inflate(image.header().compression, data, &mut self.cluster).map_err(|why| {
                let source =
                    FormatError::malformed("compressed cluster", part.host.get(), why, "a valid stream");
                Error::Mapping { path: image.path().to_owned(), guest, source }
            })?;
            self.holds = Some(key);
        }
        Ok(&self.cluster)
    }
}

impl Image {
    /// Reads what the image itself holds for an extent of its own map, from the extent's start; `buf`
    /// is not longer than the extent. Unallocated parts read as zeros here: what lies below is the
    /// caller's matter. `layer` tells images that share a cache apart.
    ///
    /// # Errors
    /// The data cannot be read or inflated.
    pub fn read_extent(
        &self,
        extent: &Extent,
        buf: &mut [u8],
        cache: &mut ClusterCache,
        layer: usize,
    ) -> Result<()> {
        match (extent.mapping, self) {
            (Mapping::Data { host }, _) => {
                let file: &dyn Storage = &**self.data_file();
                read_or_zero(file, host, buf).map_err(|source| {
                    let offset = first_unreadable(file, host.get(), buf.len() as u64);
                    let guest = extent.range.start + (offset - host.get());
                    self.unreadable(offset, Some(guest), extent.range.end(), source)
                })
            }
            (Mapping::Compressed(part), Self::Qcow2(image)) => {
                let cluster = cache.cluster(image, layer, &part, extent.range.start)?;
                let from = (part.skip as usize).min(cluster.len());
                let n = buf.len().min(cluster.len() - from);
                buf[..n].copy_from_slice(&cluster[from..from + n]);
                buf[n..].fill(0);
                Ok(())
            }
            _ => {
                buf.fill(0);
                Ok(())
            }
        }
    }
}

/// How much is said to be unreadable where a read has failed, in bytes.
const PAGE: u64 = 4096;

impl Image {
    /// The error for plain data at a host offset that cannot be read. `guest` is where the guest sees it, up to `end`.
    fn unreadable(
        &self,
        offset: u64,
        guest: Option<GuestOffset>,
        end: GuestOffset,
        source: std::io::Error,
    ) -> Error {
        let guest = guest.map(|start| {
            let len = PAGE - offset % PAGE;
            GuestRange::between(start, (start + len).min(end))
        });
        let in_data_file = self.as_qcow2().is_some_and(Qcow2::has_data_file);
        Error::Unreadable { path: self.path().to_owned(), in_data_file, guest, offset, source }
    }

    /// The error for plain data at a host offset that cannot be read, when it is not known where the guest sees it: that
    /// is looked for in the whole map.
    pub(crate) fn unreadable_at(&self, offset: u64, source: std::io::Error) -> Error {
        let guest = self.guest_of(HostOffset::new(offset));
        let (start, end) =
            (guest.map(|range| range.start), guest.map_or(GuestOffset::ZERO, |range| range.end()));
        self.unreadable(offset, start, end, source)
    }

    /// Where the guest sees plain data that lies at a host offset, to the end of its extent; `None` if the map does not
    /// tell, or cannot be read itself.
    fn guest_of(&self, host: HostOffset) -> Option<GuestRange> {
        /// How much of the disk is looked at in one go, in bytes.
        const WINDOW: u64 = 1 << 30;
        let mut at = GuestOffset::ZERO;
        let mut extents = Vec::new();
        while let Ok(Some(next)) = self.next_allocated(at) {
            extents.clear();
            let window = GuestRange { start: next, len: WINDOW - next.get() % WINDOW };
            self.map(window, &mut extents).ok()?;
            for extent in &extents {
                if let Mapping::Data { host: first } = extent.mapping
                    && let Some(into) =
                        host.get().checked_sub(first.get()).filter(|&into| into < extent.range.len)
                {
                    return Some(GuestRange::between(extent.range.start + into, extent.range.end()));
                }
            }
            at = window.end();
        }
        None
    }
}

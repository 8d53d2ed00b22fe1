//! Bytes behind an extent.

use super::qcow2::read_or_zero;
use super::{CompressedPart, Extent, Image, Inflater, Mapping, Qcow2};
use crate::error::{Error, FileOp, Result};
use crate::format::FormatError;
use crate::units::GuestOffset;

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
    pub fn cluster(
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
                    let n = image
                        .file()
                        .read_at(&mut self.compressed, part.host.get())
                        .map_err(|e| Error::io(image.path(), FileOp::Read, Some(part.host.get()), e))?;
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
            (Mapping::Data { host }, _) => read_or_zero(&**self.data_file(), host, buf)
                .map_err(|e| Error::io(self.path(), FileOp::Read, Some(host.get()), e)),
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

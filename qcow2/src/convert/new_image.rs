//! Makes the empty image into which a chain is flattened.

use std::path::Path;
use std::sync::Arc;

use super::FlattenOptions;
use crate::chain::Chain;
use crate::error::{Error, FileOp, Result};
use crate::image::create::{CreateOptions, NewImageLayout, whole_sectors};
use crate::image::{Image, ImageFormat, Raw};
use crate::storage::Storage;
use crate::transfer::Totals;

/// The kind of file that is made.
#[derive(Clone, Debug)]
pub(super) enum NewImage {
    Raw { size: u64 },
    Qcow2(CreateOptions),
}

/// The kind of the new image. It takes cluster size and subclusters from the active image.
pub(super) fn new_image(
    chain: &Chain,
    options: &FlattenOptions,
    backing: Option<(Vec<u8>, String)>,
) -> Result<NewImage> {
    let active = chain.layers().get(chain.active()).map(|layer| &layer.image);
    let size = active.map_or(0, Image::virtual_size);
    if options.to == ImageFormat::Raw {
        return Ok(NewImage::Raw { size: whole_sectors(&options.output, size)? });
    }
    let mut create = CreateOptions { backing, ..CreateOptions::new(size) };
    if let Some(qcow2) = active.and_then(Image::as_qcow2) {
        create.cluster_bits = qcow2.geometry().cluster_bits();
        create.extended_l2 = qcow2.geometry().extended_l2();
    }
    Ok(NewImage::Qcow2(create))
}

impl NewImage {
    /// Makes the empty image in `file`, with room for `clusters` clusters.
    pub(super) fn write(&self, path: &Path, file: Arc<dyn Storage>, clusters: u64) -> Result<Image> {
        match self {
            Self::Raw { size } => {
                file.set_len(*size).map_err(|e| Error::io(path, FileOp::Grow, Some(*size), e))?;
                Ok(Image::Raw(Raw::open(path, file)?))
            }
            Self::Qcow2(options) => {
                NewImageLayout::of(path, options, clusters)?.write(path, &*file)?;
                Image::open(path, file, ImageFormat::Qcow2, None)
            }
        }
    }

    /// How many bytes the empty image takes, with room for `clusters` clusters.
    pub(super) fn empty_size(&self, path: &Path, clusters: u64) -> Result<u64> {
        match self {
            Self::Raw { .. } => Ok(0),
            Self::Qcow2(options) => Ok(NewImageLayout::of(path, options, clusters)?.file_size()),
        }
    }

    /// The most bytes that the file takes on the disk.
    pub(super) fn file_size(&self, path: &Path, totals: &Totals) -> Result<u64> {
        match self {
            Self::Raw { .. } => Ok(totals.hole_bytes),
            Self::Qcow2(options) => {
                let clusters = totals.clusters_to_allocate;
                let data = clusters.saturating_mul(1 << options.cluster_bits);
                Ok(NewImageLayout::of(path, options, clusters)?.file_size().saturating_add(data))
            }
        }
    }
}

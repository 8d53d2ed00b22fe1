//! The switch to a larger disk, together with bitmap tables for it.
//!
//! QEMU does not open an image at all if a bitmap that is not in use has a table of another length than
//! the disk's size asks for. So while size and tables do not fit together, autoclear bit 0 says that
//! the bitmaps mean nothing. New tables and a new directory are durable in clusters of their own; then,
//! each behind a barrier:
//!
//! 1. Autoclear bit 0 is cleared (one sector).
//! 2. The bitmaps extension names the new directory.
//! 3. One write inside the first sector sets the new size, and autoclear bit 0 again.
//! 4. The old directory, tables and shared clusters of bits are freed.
//!
//! A crash before step 3 leaves the old size, and may leave bitmaps that are not valid; a bitmap never
//! claims too little. Bits for the new area are clear, but for what the merge writes there. (Where an
//! old table says "all one" for bits at the border, those behind it are set too: too much, not too
//! little.)

use std::ops::Range;

use crate::error::{Error, Result};
use crate::format::{BitmapsExtension, EXT_BITMAPS, features, parts};
use crate::image::Qcow2;
use crate::image::edits::Batch;
use crate::image::refcounts::{ClusterIndex, Refcounts};
use crate::units::HostOffset;

/// From the magic of a header extension to its data, in bytes.
const EXTENSION_HEAD: u64 = 8;

/// The new size of a disk, and the bitmap directory that goes with it.
#[derive(Debug)]
pub(crate) struct BitmapGrowth {
    new_size: u64,
    /// Where the new directory lies, if there is one; it is as long as the old one.
    pub(super) directory: Option<HostOffset>,
    /// Clusters that only the new directory needs, and such that only the old one needs.
    fresh: Batch,
    old: Batch,
}

impl BitmapGrowth {
    /// A growth to `new_size` bytes, without bitmaps as yet.
    pub(super) fn new(new_size: u64) -> Self {
        Self { new_size, directory: None, fresh: Batch::default(), old: Batch::default() }
    }

    /// Notes new clusters.
    pub(super) fn adopt(&mut self, image: &Qcow2, run: &Range<ClusterIndex>) {
        let bits = image.geometry().cluster_bits();
        self.fresh.free(image, HostOffset::new(run.start << bits), (run.end - run.start) << bits);
    }

    /// Notes clusters that are not needed any more once the disk has grown.
    pub(super) fn free(&mut self, image: &Qcow2, host: HostOffset, len: u64) {
        self.old.free(image, host, len);
    }

    /// Switches to the new size; nothing happens if the disk has it already. What the guest can see
    /// then is durable.
    ///
    /// # Errors
    /// An I/O error.
    pub(crate) fn publish(mut self, image: &mut Qcow2, refcounts: &Refcounts) -> Result<()> {
        let size = self.new_size;
        if size <= image.virtual_size() {
            return Ok(());
        }
        let failed = |e| Error::format(image.path(), e);
        let extension = image.cluster0().bitmaps().map_err(failed)?;
        let place = image.cluster0().extension(EXT_BITMAPS).map(|found| found.offset + EXTENSION_HEAD);
        let (Some(directory_offset), Some(extension), Some(place)) = (self.directory, extension, place)
        else {
            image.switch_header(parts::SIZE, |header| header.size = size)?;
            return image.barrier();
        };
        image.switch_header(parts::AUTOCLEAR, |header| {
            header.autoclear &= features::KNOWN_AUTOCLEAR & !features::BITMAPS;
        })?;
        image.barrier()?;
        let data = BitmapsExtension { directory_offset, ..extension }.encode().data;
        image.write(HostOffset::new(place), &data)?;
        image.barrier()?;
        image.switch_header(parts::SIZE_TO_AUTOCLEAR, |header| {
            header.size = size;
            header.autoclear |= features::BITMAPS;
        })?;
        image.barrier()?;
        image.reload_header()?;
        self.old.free(image, extension.directory_offset, extension.directory_size);
        self.old.settle(image, refcounts)
    }

    /// Gives the new clusters back, when the merge stops before the disk has grown.
    ///
    /// # Errors
    /// An I/O error.
    pub(crate) fn abandon(self, image: &Qcow2, refcounts: &Refcounts) -> Result<()> {
        self.fresh.settle(image, refcounts)
    }
}

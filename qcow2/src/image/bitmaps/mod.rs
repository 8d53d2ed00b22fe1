//! Persistent bitmaps of an image that is written to (specification: "Bitmaps").
//!
//! An enabled bitmap promises to know every guest range that changed since it was made. So before a
//! merge writes its first byte, the bits of all ranges that it will change are set and durable:
//!
//! 1. [`BitmapPlan`]: which clusters this takes; nothing is changed.
//! 2. [`Marker`]: bits are set. Only ever set, so a crash at any instant leaves bitmaps that claim too
//!    much at worst.
//! 3. [`BitmapGrowth`]: where the disk grows, its new size is switched on together with bitmap tables for it.
//!
//! Disabled bitmaps keep their bits. Bitmaps that are in use (they were not saved, and mean nothing)
//! and bitmaps of an image whose autoclear bit 0 is clear are left as they are.

mod grow;
mod mark;
mod plan;
mod remove;
mod table;
#[cfg(test)]
pub(crate) mod tests;

use std::ops::Range;

use super::{Qcow2, read_bitmaps};
use crate::error::{Error, Result};
use crate::format::Bitmap;
use crate::units::{GuestOffset, GuestRange};

pub(crate) use self::grow::BitmapGrowth;
pub(crate) use self::mark::Marker;
pub(crate) use self::plan::BitmapPlan;
pub(crate) use self::remove::drop_all;

/// What a user wants to know about a persistent bitmap.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct BitmapInfo {
    /// The name; bytes that are not UTF-8 are replaced.
    pub name: String,
    /// The guest bytes for which a bit stands.
    pub granularity: u64,
    /// Whether it records every write.
    pub enabled: bool,
    /// Whether it was not saved when the image was last closed: its content means nothing.
    pub in_use: bool,
}

/// The persistent bitmaps of an image, in the order of its directory; none if the header says that
/// they do not agree with the data.
///
/// # Errors
/// A directory that cannot be read or is broken.
pub(crate) fn names(image: &Qcow2) -> Result<Vec<BitmapInfo>> {
    let bitmaps = read_bitmaps(image.path(), &**image.file(), image.cluster0())?;
    Ok(bitmaps
        .iter()
        .map(|bitmap| BitmapInfo {
            name: bitmap.display_name(),
            granularity: 1 << bitmap.granularity_bits.min(63),
            enabled: bitmap.is_auto(),
            in_use: bitmap.is_in_use(),
        })
        .collect())
}

/// The bitmaps with everything checked that is used here, but for the tables' entries.
fn load(image: &Qcow2) -> Result<Vec<Bitmap>> {
    let bitmaps = read_bitmaps(image.path(), &**image.file(), image.cluster0())?;
    for bitmap in &bitmaps {
        bitmap
            .validate(image.geometry(), image.virtual_size())
            .map_err(|e| Error::format(image.path(), e))?;
        let field = format!("bitmap '{}': table offset", bitmap.display_name());
        image.check_table(&field, bitmap.offset, bitmap.table_offset)?;
    }
    Ok(bitmaps)
}

/// Whether the bitmap must record what a merge changes.
fn records(bitmap: &Bitmap) -> bool {
    bitmap.is_auto() && !bitmap.is_in_use()
}

/// The bits of a bitmap for a disk of `size` bytes.
fn bits_for(bitmap: &Bitmap, size: u64) -> u64 {
    size.div_ceil(1 << bitmap.granularity_bits)
}

/// The bits that stand for a range of a disk of `size` bytes, rounded outwards.
fn bits_of(bitmap: &Bitmap, range: GuestRange, size: u64) -> Range<u64> {
    let end = range.end().min(GuestOffset::new(size));
    if range.start >= end {
        return 0..0;
    }
    range.start.get() >> bitmap.granularity_bits..bits_for(bitmap, end.get())
}

//! What it takes to have the bitmaps of a base record a merge.

use std::ops::Range;

use super::table::BitmapTable;
use super::{bits_for, bits_of, load, records};
use crate::error::{Error, Refusal, Result};
use crate::format::{
    Bitmap, BitmapTableEntry, Geometry, MAX_BITMAP_BYTES, MAX_BITMAP_TABLE_ENTRIES, encode_bitmap_directory,
};
use crate::image::Qcow2;
use crate::units::GuestRange;

/// A bitmap of a plan.
#[derive(Debug)]
pub(super) struct Planned {
    pub(super) bitmap: Bitmap,
    /// Whether it gets a new table.
    pub(super) moves: bool,
    table: BitmapTable,
    /// The first entries that were not yet looked at: of the present table, and of the new one.
    next_live: u64,
    next_new: u64,
}

impl Planned {
    /// The entries of the table for a disk of `size` bytes; a table never shrinks.
    pub(super) fn entries_for(&self, geometry: &Geometry, size: u64) -> u64 {
        self.bitmap.table_entries_for(geometry, size).max(self.bitmap.table_entries.into())
    }

    /// The clusters of that table.
    pub(super) fn table_clusters(&self, geometry: &Geometry, size: u64) -> u64 {
        geometry.clusters_for(self.entries_for(geometry, size) * 8)
    }
}

/// The bitmaps of a base, and the clusters that they will need. Made before a merge, and fed with the
/// ranges that the merge will change.
#[derive(Debug)]
pub(crate) struct BitmapPlan {
    pub(super) bitmaps: Vec<Planned>,
    pub(super) old_size: u64,
    pub(super) new_size: u64,
    geometry: Geometry,
    data_clusters: u64,
}

impl BitmapPlan {
    /// A plan for a merge after which the disk has `new_size` bytes; a disk never shrinks.
    ///
    /// # Errors
    /// A directory that cannot be read or is broken; a bitmap that cannot be as large as the new disk
    /// asks for.
    pub(crate) fn new(image: &Qcow2, new_size: u64) -> Result<Self> {
        let geometry = *image.geometry();
        let old_size = image.virtual_size();
        let new_size = new_size.max(old_size);
        let bitmaps = load(image)?
            .into_iter()
            .map(|bitmap| {
                let table = BitmapTable::of(&bitmap);
                let needed = bitmap.table_entries_for(&geometry, new_size);
                let moves = !bitmap.is_in_use() && needed > u64::from(bitmap.table_entries);
                let most =
                    u64::from(MAX_BITMAP_TABLE_ENTRIES).min(MAX_BITMAP_BYTES / geometry.cluster_size());
                if moves && needed > most {
                    let (name, size) = (bitmap.display_name(), new_size);
                    let reason = Refusal::BitmapTooLarge { name: name.to_string(), size };
                    let path = image.path().to_owned();
                    return Err(Error::Refused { path, reason });
                }
                Ok(Planned { bitmap, moves, table, next_live: 0, next_new: 0 })
            })
            .collect::<Result<_>>()?;
        Ok(Self { bitmaps, old_size, new_size, geometry, data_clusters: 0 })
    }

    /// Whether the ranges of the merge matter: there is a bitmap that records them.
    pub(crate) fn wants_ranges(&self) -> bool {
        self.bitmaps.iter().any(|planned| records(&planned.bitmap))
    }

    /// Adds a range that the merge will change; ranges ascend.
    ///
    /// # Errors
    /// A table that cannot be read, or an entry that breaks the format's rules.
    pub(crate) fn add(&mut self, image: &Qcow2, range: GuestRange) -> Result<()> {
        let per_entry = self.geometry.cluster_size() * 8;
        for planned in self.bitmaps.iter_mut().filter(|planned| records(&planned.bitmap)) {
            let (live, new) = split(&planned.bitmap, range, self.old_size, self.new_size);
            for index in entries(&live, per_entry, planned.next_live) {
                planned.next_live = index + 1;
                if planned.table.entry(image, index)? == BitmapTableEntry::AllZero {
                    self.data_clusters += 1;
                }
            }
            for index in entries(&new, per_entry, planned.next_new) {
                planned.next_new = index + 1;
                planned.moves = true;
                if planned.table.entry(image, index)? != BitmapTableEntry::AllOne {
                    self.data_clusters += 1;
                }
            }
        }
        Ok(())
    }

    /// The clusters that must be free, with those of [`side_by_side`](Self::side_by_side).
    pub(crate) fn clusters(&self) -> u64 {
        self.data_clusters + self.side_by_side()
    }

    /// The clusters that must be free side by side: new tables and a new directory.
    pub(crate) fn side_by_side(&self) -> u64 {
        let moving = self.bitmaps.iter().filter(|planned| planned.moves);
        let tables: u64 = moving.map(|planned| planned.table_clusters(&self.geometry, self.new_size)).sum();
        tables + self.directory_clusters()
    }

    /// The clusters of the new directory, if there is one. It is as long as the present one.
    pub(super) fn directory_clusters(&self) -> u64 {
        if !self.bitmaps.iter().any(|planned| planned.moves) {
            return 0;
        }
        let entry = |planned: &Planned| encode_bitmap_directory(std::slice::from_ref(&planned.bitmap)).len();
        self.geometry.clusters_for(self.bitmaps.iter().map(|planned| entry(planned) as u64).sum())
    }
}

/// The bits of a range that the present table has, and those that only a larger disk has.
pub(super) fn split(
    bitmap: &Bitmap,
    range: GuestRange,
    old_size: u64,
    new_size: u64,
) -> (Range<u64>, Range<u64>) {
    let bits = bits_of(bitmap, range, new_size);
    let border = bits_for(bitmap, old_size).clamp(bits.start, bits.end);
    (bits.start..border, border..bits.end)
}

/// The table entries of a run of bits, from `first` on.
fn entries(bits: &Range<u64>, per_entry: u64, first: u64) -> Range<u64> {
    if bits.is_empty() { 0..0 } else { (bits.start / per_entry).max(first)..bits.end.div_ceil(per_entry) }
}

//! Reading a bitmap's table, piece by piece.

use crate::error::{Error, Result};
use crate::format::{Bitmap, BitmapTableEntry, read_be_u64s};
use crate::image::Qcow2;
use crate::units::HostOffset;

/// The entries that are read at once.
const WINDOW: u64 = 64;

/// A bitmap's table, of which one window is in memory.
#[derive(Debug)]
pub(super) struct BitmapTable {
    at: HostOffset,
    entries: u64,
    /// The first entry of the window, and its words.
    window: Option<(u64, Vec<u64>)>,
}

impl BitmapTable {
    /// The table of a bitmap.
    pub(super) fn of(bitmap: &Bitmap) -> Self {
        Self::at(bitmap.table_offset, u64::from(bitmap.table_entries))
    }

    /// A table of `entries` entries at a host offset.
    pub(super) fn at(at: HostOffset, entries: u64) -> Self {
        Self { at, entries, window: None }
    }

    /// The number of entries.
    pub(super) fn entries(&self) -> u64 {
        self.entries
    }

    /// Where an entry stands.
    pub(super) fn place(&self, index: u64) -> HostOffset {
        self.at + index * 8
    }

    /// The entry at `index`; behind the end of the table all bits are zero.
    ///
    /// # Errors
    /// An entry that cannot be read or breaks the format's rules, or whose bits lie behind the end of
    /// the file.
    pub(super) fn entry(&mut self, image: &Qcow2, index: u64) -> Result<BitmapTableEntry> {
        if index >= self.entries {
            return Ok(BitmapTableEntry::AllZero);
        }
        let first = index - index % WINDOW;
        let (at, entries) = (self.place(first), WINDOW.min(self.entries - first));
        let words = match self.window.take() {
            Some((have, words)) if have == first => words,
            _ => {
                let mut bytes = vec![0; (entries * 8) as usize];
                image.read_table(at, &mut bytes)?;
                read_be_u64s(&bytes).collect()
            }
        };
        let word = words.get((index - first) as usize).copied().unwrap_or_default();
        self.window = Some((first, words));
        let place = self.place(index).get();
        let entry = BitmapTableEntry::decode(word, image.geometry(), place)
            .map_err(|e| Error::format(image.path(), e))?;
        if let BitmapTableEntry::Data(host) = entry {
            image.check_table("bitmap table entry", place, host)?;
        }
        Ok(entry)
    }
}

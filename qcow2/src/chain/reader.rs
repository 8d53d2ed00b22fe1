//! Reads the disk of a chain like a file.

use std::io::{self, Read, Seek, SeekFrom};

use super::Chain;
use super::view::{Supplied, Supply, View};
use crate::error::Result;
use crate::image::{ClusterCache, Image, Mapping};
use crate::units::{GuestOffset, GuestRange};

/// Reads what the guest sees through a chain: at any offset, or in order with [`Read`] and [`Seek`].
///
/// It keeps a few inflated clusters, so that consecutive small reads inflate each cluster once.
#[derive(Debug)]
pub struct Reader<'c> {
    images: Vec<&'c Image>,
    cache: ClusterCache,
    /// Where [`Read`] goes on, in bytes.
    at: u64,
}

impl Chain {
    /// A reader of the disk that the guest sees through the active image.
    pub fn reader(&self) -> Reader<'_> {
        Reader { images: self.images(), cache: ClusterCache::new(), at: 0 }
    }

    /// How many bytes of the disk each layer supplies, the bottom first. Data and explicit zeros count; ranges
    /// that no layer has do not.
    ///
    /// # Errors
    /// A table that cannot be read or is damaged.
    pub fn supplied(&self) -> Result<Vec<u64>> {
        let images = self.images();
        let view = View::new(&images, 0, self.active());
        let mut bytes = vec![0; images.len()];
        let mut parts: Vec<Supplied> = Vec::new();
        let mut at = GuestOffset::ZERO;
        while let Some(next) = view.next_supplied(at)? {
            let start = next.align_down(view.window());
            parts.clear();
            view.resolve(GuestRange { start, len: view.window() }, &mut parts)?;
            for part in &parts {
                let layer = match part.supply {
                    Supply::Nothing | Supply::Layer { mapping: Mapping::Unallocated, .. } => continue,
                    Supply::Layer { layer, .. } | Supply::PastEnd { layer } => layer,
                };
                if let Some(bytes) = bytes.get_mut(layer) {
                    *bytes += part.range.len;
                }
            }
            at = start + view.window();
        }
        Ok(bytes)
    }
}

impl Reader<'_> {
    /// The size of the disk, in bytes.
    pub fn size(&self) -> u64 {
        self.images.last().map_or(0, |active| active.virtual_size())
    }

    /// Reads into `buf` from the guest offset `offset` on, in bytes. Returns how many bytes were read: fewer
    /// than asked for only where the disk ends.
    ///
    /// # Errors
    /// A table that cannot be read or is damaged; data that cannot be read or inflated.
    pub fn read_at(&mut self, offset: u64, buf: &mut [u8]) -> Result<usize> {
        let len = self.size().saturating_sub(offset).min(buf.len() as u64) as usize;
        let Some(inside) = buf.get_mut(..len).filter(|inside| !inside.is_empty()) else { return Ok(0) };
        let top = self.images.len().saturating_sub(1);
        View::new(&self.images, 0, top).read(GuestOffset::new(offset), inside, &mut self.cache)?;
        Ok(len)
    }
}

impl Read for Reader<'_> {
    fn read(&mut self, buf: &mut [u8]) -> io::Result<usize> {
        let len = self.read_at(self.at, buf).map_err(io::Error::other)?;
        self.at += len as u64;
        Ok(len)
    }
}

impl Seek for Reader<'_> {
    fn seek(&mut self, to: SeekFrom) -> io::Result<u64> {
        let at = match to {
            SeekFrom::Start(at) => Some(at),
            SeekFrom::Current(by) => self.at.checked_add_signed(by),
            SeekFrom::End(by) => self.size().checked_add_signed(by),
        };
        self.at = at.ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "before the disk's begin"))?;
        Ok(self.at)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use kit::Random;

    use super::*;
    use crate::storage::MemHost;
    use crate::testing::{local, random_chain};

    #[test]
    fn a_chain_reads_like_a_file_with_its_bytes() {
        for seed in 0..20 {
            let host = MemHost::new();
            let mut dice = Random::new(seed);
            let model = random_chain(&host, &mut dice, 3);
            let chain = Chain::open(&host, Path::new("/2"), &local()).unwrap();
            let mut reader = chain.reader();
            assert_eq!(reader.size(), model.len() as u64);
            let mut all = Vec::new();
            reader.read_to_end(&mut all).unwrap();
            assert!(all == model, "seed {seed}");
            for _ in 0..20 {
                let at = dice.below(model.len() as u64 + 100);
                let mut buf = vec![0xee; dice.below(70_000) as usize];
                let len = reader.read_at(at, &mut buf).unwrap();
                let expected = model.get(at as usize..).unwrap_or_default();
                let expected = &expected[..expected.len().min(buf.len())];
                assert!(buf[..len] == *expected, "seed {seed}, {at}");
            }
            let back = reader.seek(SeekFrom::End(-1)).unwrap();
            let mut last = [0; 2];
            assert_eq!(reader.read(&mut last).unwrap(), 1);
            assert_eq!((back, last[0]), (model.len() as u64 - 1, model[model.len() - 1]));
            assert!(reader.seek(SeekFrom::Current(i64::MIN)).is_err());
            let supplied: u64 = chain.supplied().unwrap().iter().sum();
            assert!(supplied <= model.len() as u64, "seed {seed}");
        }
    }
}

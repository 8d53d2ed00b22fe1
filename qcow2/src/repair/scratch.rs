//! A file whose writes stay in memory. A plan is made by running the repair on it.

use std::io;

use crate::storage::{Flush, PageOverlay, Pages, Storage};

/// A file with changes in memory that are never written.
pub(super) type Scratch<'a> = PageOverlay<'a, Never>;

/// Writes nothing, however many pages wait.
#[derive(Debug)]
pub(super) struct Never;

impl Flush for Never {
    fn make_room(&mut self, _: &dyn Storage, _: &mut Pages<()>) -> io::Result<()> {
        Ok(())
    }

    fn barrier(&mut self, _: &dyn Storage, _: &mut Pages<()>) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::MemFile;

    #[test]
    fn what_is_written_is_read_and_the_file_stays() {
        let file = MemFile::new();
        let mut model: Vec<u8> = (0..20_000u32).map(|n| n as u8).collect();
        file.write_all_at(&model, 0).unwrap();
        let before = model.clone();
        let scratch = Scratch::new(&file, Never);
        for (n, (at, len)) in
            [(10, 3), (4090, 10), (0, 4096), (8000, 9000), (19_999, 5), (30_000, 7)].into_iter().enumerate()
        {
            let bytes = vec![0xa0 + n as u8; len];
            scratch.write_all_at(&bytes, at as u64).unwrap();
            model.resize(model.len().max(at + len), 0);
            model[at..at + len].copy_from_slice(&bytes);
        }
        scratch.sync().unwrap();
        for (at, len) in [(0, 40_000), (4095, 2), (29_990, 100), (50_000, 1), (5, 6)] {
            let mut seen = vec![0; len];
            let n = scratch.read_at(&mut seen, at as u64).unwrap();
            assert_eq!(seen[..n], model[at.min(model.len())..(at + len).min(model.len())]);
        }
        assert_eq!(scratch.size().unwrap(), 30_007);
        let mut seen = vec![0; 30_000];
        let n = file.read_at(&mut seen, 0).unwrap();
        assert!(seen[..n] == before[..]);
    }
}

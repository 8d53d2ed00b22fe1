//! Makes qcow2 images whose clusters lie where a benchmark wants them.
//!
//! `qemu-io` makes such images too, one request per cluster; ten million of these take too long. The
//! tests of this module let `qemu-img check` judge the result.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;

use kit::Random;

use crate::Result;
use crate::content::write_noise;

const COPIED: u64 = 1 << 63;

/// What the clusters hold.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fill {
    /// Bytes that do not compress.
    Random,
    /// Nothing was written: the host file has a hole there, and the guest reads zeros.
    Hole,
}

/// An image to be made: qcow2 version 3 with refcounts of 16 bits.
#[derive(Clone, Debug)]
pub(crate) struct Image<'a> {
    /// The size of the disk in bytes.
    pub(crate) size: u64,
    /// The binary logarithm of the cluster size.
    pub(crate) cluster_bits: u32,
    /// The guest clusters that are allocated, in the order in which they lie in the file.
    pub(crate) clusters: &'a [u32],
    /// The name of the backing file, a qcow2 image.
    pub(crate) backing: Option<&'a str>,
    /// What the clusters hold.
    pub(crate) fill: Fill,
}

/// Where the parts of the file begin, in clusters.
struct Layout {
    l1: u64,
    l1_entries: u64,
    refcount_table: u64,
    refcount_table_clusters: u64,
    refcount_blocks: u64,
    refcount_block_count: u64,
    l2: u64,
    data: u64,
    end: u64,
}

impl Image<'_> {
    /// Writes the image to a new file.
    pub(crate) fn create(&self, path: &Path, random: &mut Random) -> Result<()> {
        let cluster = 1u64 << self.cluster_bits;
        // Sorted by guest cluster; the host cluster follows from the place in `clusters`.
        let mut entries: Vec<(u32, u32)> =
            self.clusters.iter().zip(0u32..).map(|(guest, nth)| (*guest, nth)).collect();
        entries.sort_unstable();
        let per_table = cluster / 8;
        let tables = entries.chunk_by(|a, b| u64::from(a.0) / per_table == u64::from(b.0) / per_table);
        let layout = self.layout(tables.clone().count() as u64);

        let file = File::create_new(path)?;
        file.set_len(layout.end * cluster)?;
        file.write_all_at(&self.header(&layout)?, 0)?;
        let mut l1 = vec![0u64; layout.l1_entries as usize];
        let mut out = Writer::at(&file, layout.l2 * cluster);
        for (n, table) in tables.enumerate() {
            let mut words = vec![0u64; per_table as usize];
            for (guest, nth) in table {
                words[(u64::from(*guest) % per_table) as usize] =
                    ((layout.data + u64::from(*nth)) * cluster) | COPIED;
            }
            out.words(&words)?;
            let index = table.first().map_or(0, |(guest, _)| u64::from(*guest) / per_table);
            l1[index as usize] = ((layout.l2 + n as u64) * cluster) | COPIED;
        }
        out.finish()?;
        let mut out = Writer::at(&file, layout.l1 * cluster);
        out.words(&l1)?;
        out.finish()?;

        let mut out = Writer::at(&file, layout.refcount_table * cluster);
        let blocks = layout.refcount_blocks..layout.refcount_blocks + layout.refcount_block_count;
        out.words(&blocks.map(|block| block * cluster).collect::<Vec<_>>())?;
        out.finish()?;
        let mut out = Writer::at(&file, layout.refcount_blocks * cluster);
        for _ in 0..layout.end {
            out.0.write_all(&1u16.to_be_bytes())?;
        }
        out.finish()?;

        if self.fill == Fill::Random {
            let mut out = Writer::at(&file, layout.data * cluster);
            write_noise(random, &mut out.0, self.clusters.len() as u64 * cluster)?;
            out.finish()?;
        }
        Ok(())
    }

    fn layout(&self, tables: u64) -> Layout {
        let cluster = 1u64 << self.cluster_bits;
        let l1_entries = self.size.div_ceil(cluster * (cluster / 8));
        let l1_clusters = (l1_entries * 8).div_ceil(cluster);
        let others = 1 + l1_clusters + tables + self.clusters.len() as u64;
        // The refcounts count themselves too.
        let (mut blocks, mut table) = (1, 1);
        loop {
            let needed = (others + blocks + table).div_ceil(cluster / 2);
            let needed_table = (needed * 8).div_ceil(cluster);
            if needed == blocks && needed_table == table {
                break;
            }
            (blocks, table) = (needed, needed_table);
        }
        let refcount_table = 1 + l1_clusters;
        let refcount_blocks = refcount_table + table;
        let l2 = refcount_blocks + blocks;
        let data = l2 + tables;
        Layout {
            l1: 1,
            l1_entries,
            refcount_table,
            refcount_table_clusters: table,
            refcount_blocks,
            refcount_block_count: blocks,
            l2,
            data,
            end: data + self.clusters.len() as u64,
        }
    }

    fn header(&self, layout: &Layout) -> Result<Vec<u8>> {
        const LENGTH: u32 = 104;
        let cluster = 1u64 << self.cluster_bits;
        let mut extensions = Vec::new();
        if self.backing.is_some() {
            extensions.extend(0xe279_2acau32.to_be_bytes());
            extensions.extend(5u32.to_be_bytes());
            extensions.extend(*b"qcow2\0\0\0");
        }
        extensions.extend([0; 8]);
        let name = self.backing.unwrap_or_default();
        let name_at = if name.is_empty() { 0 } else { u64::from(LENGTH) + extensions.len() as u64 };

        let mut bytes = Vec::new();
        bytes.extend(*b"QFI\xfb");
        bytes.extend(3u32.to_be_bytes());
        bytes.extend(name_at.to_be_bytes());
        bytes.extend(u32::try_from(name.len())?.to_be_bytes());
        bytes.extend(self.cluster_bits.to_be_bytes());
        bytes.extend(self.size.to_be_bytes());
        bytes.extend(0u32.to_be_bytes());
        bytes.extend(u32::try_from(layout.l1_entries)?.to_be_bytes());
        bytes.extend((layout.l1 * cluster).to_be_bytes());
        bytes.extend((layout.refcount_table * cluster).to_be_bytes());
        bytes.extend(u32::try_from(layout.refcount_table_clusters)?.to_be_bytes());
        // No snapshots, no feature bits.
        bytes.extend([0; 4 + 8 + 3 * 8]);
        bytes.extend(4u32.to_be_bytes());
        bytes.extend(LENGTH.to_be_bytes());
        bytes.extend(extensions);
        bytes.extend(name.as_bytes());
        Ok(bytes)
    }
}

/// Writes at an offset of a file, onwards, through a buffer.
struct Writer<'a>(BufWriter<At<'a>>);

struct At<'a> {
    file: &'a File,
    offset: u64,
}

impl Write for At<'_> {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        let n = self.file.write_at(buf, self.offset)?;
        self.offset += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

impl<'a> Writer<'a> {
    fn at(file: &'a File, offset: u64) -> Self {
        Self(BufWriter::with_capacity(1 << 20, At { file, offset }))
    }

    fn words(&mut self, words: &[u64]) -> Result<()> {
        for word in words {
            self.0.write_all(&word.to_be_bytes())?;
        }
        Ok(())
    }

    fn finish(mut self) -> Result<()> {
        Ok(self.0.flush()?)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::content::shuffle;
    use crate::tools;

    #[test]
    fn images_are_sound_and_hold_what_was_asked_for() {
        if tools::find("qemu-img").is_none() {
            eprintln!("skipped: qemu-img is not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("image.qcow2");
        for (cluster_bits, count) in [(9, 3000u32), (12, 70_000), (16, 40)] {
            let mut random = Random::new(7);
            let mut clusters: Vec<u32> = (0..count).map(|n| n * 2 + 1).collect();
            shuffle(&mut random, &mut clusters);
            let size = u64::from(count * 2 + 5) << cluster_bits;
            let fill = if cluster_bits == 12 { Fill::Hole } else { Fill::Random };
            let image = Image { size, cluster_bits, clusters: &clusters, backing: None, fill };
            image.create(&path, &mut random).unwrap();
            let out = tools::output("qemu-img", &["check", &path.to_string_lossy()]).unwrap();
            assert!(out.contains("No errors were found"), "{out}");
            assert!(out.contains(&format!("{count}/{}", count * 2 + 5)), "{out}");
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn an_overlay_names_its_backing_file() {
        if tools::find("qemu-img").is_none() {
            eprintln!("skipped: qemu-img is not installed");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let mut random = Random::new(7);
        let empty = Image { size: 1 << 20, cluster_bits: 9, clusters: &[], backing: None, fill: Fill::Hole };
        empty.create(&dir.path().join("base.qcow2"), &mut random).unwrap();
        let top = dir.path().join("top.qcow2");
        Image { backing: Some("base.qcow2"), clusters: &[5], fill: Fill::Random, ..empty }
            .create(&top, &mut random)
            .unwrap();
        let out = tools::output("qemu-img", &["map", &top.to_string_lossy()]).unwrap();
        let line = out.lines().nth(1).unwrap_or_default().to_owned();
        assert!(line.starts_with("0xa00 ") && line.contains("0x200 "), "{out}");
    }
}

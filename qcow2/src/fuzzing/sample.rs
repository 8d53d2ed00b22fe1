//! Tiny images, laid out by hand: the ground that tests damage and fuzzers start from.
//!
//! Nothing here uses the engine's own encoders, so that a mistake in those cannot hide itself. Field
//! offsets are the specification's.

use std::collections::BTreeMap;
use std::io::Write;

/// Host offsets of the header's fields, in bytes.
pub mod field {
    /// `QFI\xfb`.
    pub const MAGIC: u64 = 0;
    /// 2 or 3.
    pub const VERSION: u64 = 4;
    /// Where the backing name lies in cluster 0; zero if there is none.
    pub const BACKING_OFFSET: u64 = 8;
    /// The length of the backing name.
    pub const BACKING_SIZE: u64 = 16;
    /// The base-2 logarithm of the cluster size.
    pub const CLUSTER_BITS: u64 = 20;
    /// The virtual size in bytes.
    pub const SIZE: u64 = 24;
    /// 0 none, 1 AES, 2 LUKS.
    pub const CRYPT_METHOD: u64 = 32;
    /// Entries of the active L1 table.
    pub const L1_SIZE: u64 = 36;
    /// Where the active L1 table lies.
    pub const L1_OFFSET: u64 = 40;
    /// Where the refcount table lies.
    pub const REFCOUNT_TABLE_OFFSET: u64 = 48;
    /// Clusters of the refcount table.
    pub const REFCOUNT_TABLE_CLUSTERS: u64 = 56;
    /// How many internal snapshots there are.
    pub const SNAPSHOTS: u64 = 60;
    /// Where the snapshot table lies.
    pub const SNAPSHOTS_OFFSET: u64 = 64;
    /// Version 3: bits that a reader must know.
    pub const INCOMPATIBLE: u64 = 72;
    /// Version 3: bits that nobody needs to know.
    pub const COMPATIBLE: u64 = 80;
    /// Version 3: bits that a writer must clear unless it knows them.
    pub const AUTOCLEAR: u64 = 88;
    /// Version 3: the base-2 logarithm of the refcount width.
    pub const REFCOUNT_ORDER: u64 = 96;
    /// Version 3: the length of the header.
    pub const HEADER_LENGTH: u64 = 100;
    /// Version 3: 0 zlib, 1 zstd.
    pub const COMPRESSION_TYPE: u64 = 104;
}

/// Incompatible feature bits.
pub mod incompatible {
    /// Refcounts may be wrong.
    pub const DIRTY: u64 = 1;
    /// The image was found to be inconsistent.
    pub const CORRUPT: u64 = 1 << 1;
    /// Guest data lies in another file.
    pub const DATA_FILE: u64 = 1 << 2;
    /// The compression type is not zlib.
    pub const COMPRESSION: u64 = 1 << 3;
    /// L2 entries have 128 bits.
    pub const EXTENDED_L2: u64 = 1 << 4;
}

/// Types of header extensions.
pub mod extension {
    /// The format of the backing file.
    pub const BACKING_FORMAT: u32 = 0xe279_2aca;
    /// Names of feature bits.
    pub const FEATURE_NAMES: u32 = 0x6803_f857;
    /// Where the bitmap directory lies.
    pub const BITMAPS: u32 = 0x2385_2875;
    /// Where the LUKS header lies.
    pub const LUKS: u32 = 0x0537_be77;
    /// The name of the external data file.
    pub const DATA_FILE: u32 = 0x4441_5441;
}

const COPIED: u64 = 1 << 63;
const COMPRESSED: u64 = 1 << 62;

/// What a guest cluster of a sample holds.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Content {
    /// This byte throughout, in a cluster of its own.
    Data(u8),
    /// This byte throughout, compressed; several share host clusters.
    Compressed(u8),
    /// Zeros without a host cluster.
    Zero,
    /// Zeros with a host cluster, which holds this byte.
    ZeroAllocated(u8),
    /// With extended L2 entries: masks of allocated and zero subclusters, and the byte of the first.
    Subclusters {
        /// Subclusters that hold data.
        allocated: u32,
        /// Subclusters that read as zeros.
        zero: u32,
        /// The byte throughout the host cluster.
        fill: u8,
    },
}

/// How to lay out a sample.
#[derive(Clone, Debug)]
pub struct Sample {
    /// 2 or 3.
    pub version: u32,
    /// The base-2 logarithm of the cluster size.
    pub cluster_bits: u32,
    /// The base-2 logarithm of the refcount width (version 3).
    pub refcount_order: u32,
    /// 128-bit L2 entries.
    pub extended_l2: bool,
    /// zstd instead of zlib.
    pub zstd: bool,
    /// The virtual size in bytes.
    pub size: u64,
    /// Name and format of the backing file.
    pub backing: Option<(String, Option<String>)>,
    /// The name of the data file, and whether it is marked raw.
    pub data_file: Option<(String, bool)>,
    /// The names of internal snapshots, all of the present content.
    pub snapshots: Vec<String>,
    /// The names of persistent bitmaps, all empty.
    pub bitmaps: Vec<String>,
    /// More header extensions.
    pub extensions: Vec<(u32, Vec<u8>)>,
    /// Guest clusters by index.
    pub clusters: BTreeMap<u64, Content>,
}

/// Where the parts of a laid out sample lie: host offsets in bytes.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// The refcount table.
    pub refcount_table: u64,
    /// The refcount blocks in order.
    pub refcount_blocks: Vec<u64>,
    /// The active L1 table.
    pub l1: u64,
    /// L2 tables by L1 index.
    pub l2: BTreeMap<u64, u64>,
    /// Host offsets of data by guest cluster.
    pub hosts: BTreeMap<u64, u64>,
    /// The snapshot table.
    pub snapshots: u64,
    /// The L1 tables of the snapshots.
    pub snapshot_l1: Vec<u64>,
    /// The bitmap directory.
    pub bitmap_directory: u64,
    /// The tables of the bitmaps.
    pub bitmap_tables: Vec<u64>,
    /// The header extensions by type; each is type, length, data.
    pub extensions: BTreeMap<u32, u64>,
    /// The backing name.
    pub backing_name: u64,
    /// The first byte behind the last extension's end mark.
    pub header_end: u64,
}

/// A laid out sample.
#[derive(Clone, Debug)]
pub struct Image {
    /// The file.
    pub bytes: Vec<u8>,
    /// The data file, if it has one.
    pub data: Vec<u8>,
    /// Where everything lies.
    pub at: Layout,
    cluster_size: u64,
    entry_size: u64,
    refcount_bits: u64,
}

impl Image {
    /// Overwrites bytes; the file grows where needed.
    pub fn put(&mut self, offset: u64, bytes: &[u8]) {
        let start = offset as usize;
        let end = start + bytes.len();
        if self.bytes.len() < end {
            self.bytes.resize(end, 0);
        }
        self.bytes[start..end].copy_from_slice(bytes);
    }

    /// Overwrites a big-endian 64-bit integer.
    pub fn put_u64(&mut self, offset: u64, value: u64) {
        self.put(offset, &value.to_be_bytes());
    }

    /// Overwrites a big-endian 32-bit integer.
    pub fn put_u32(&mut self, offset: u64, value: u32) {
        self.put(offset, &value.to_be_bytes());
    }

    /// Overwrites a big-endian 16-bit integer.
    pub fn put_u16(&mut self, offset: u64, value: u16) {
        self.put(offset, &value.to_be_bytes());
    }

    /// The big-endian 64-bit integer at `offset`.
    pub fn get_u64(&self, offset: u64) -> u64 {
        let mut word = [0; 8];
        word.copy_from_slice(&self.bytes[offset as usize..offset as usize + 8]);
        u64::from_be_bytes(word)
    }

    /// Where the L2 entry of guest cluster `index` lies.
    pub fn l2_entry(&self, index: u64) -> u64 {
        let entries = self.cluster_size / self.entry_size;
        self.at.l2[&(index / entries)] + index % entries * self.entry_size
    }

    /// Sets the refcount of the cluster at a host offset.
    pub fn set_refcount(&mut self, host: u64, count: u64) {
        let per_block = self.cluster_size * 8 / self.refcount_bits;
        let cluster = host / self.cluster_size;
        let block = self.at.refcount_blocks[(cluster / per_block) as usize];
        let bit = cluster % per_block * self.refcount_bits;
        let byte = block + bit / 8;
        match self.refcount_bits {
            64 => self.put_u64(byte, count),
            32 => self.put_u32(byte, count as u32),
            16 => self.put_u16(byte, count as u16),
            bits => {
                // Narrow refcounts fill a byte from its least significant bit.
                let mask = ((1u16 << bits) - 1) as u8;
                let old = self.bytes[byte as usize];
                let shift = bit % 8;
                self.put(byte, &[old & !(mask << shift) | (count as u8 & mask) << shift]);
            }
        }
    }
}

impl Sample {
    /// A version 3 image of `clusters` guest clusters of 512 bytes, all unallocated.
    pub fn new(clusters: u64) -> Self {
        Self {
            version: 3,
            cluster_bits: 9,
            refcount_order: 4,
            extended_l2: false,
            zstd: false,
            size: clusters * 512,
            backing: None,
            data_file: None,
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
            extensions: Vec::new(),
            clusters: BTreeMap::new(),
        }
    }

    /// With other clusters: their size's logarithm, and the virtual size in clusters.
    pub fn with_clusters(mut self, cluster_bits: u32, clusters: u64) -> Self {
        self.cluster_bits = cluster_bits;
        self.size = clusters << cluster_bits;
        self
    }

    /// With a guest cluster that holds something.
    pub fn with(mut self, index: u64, content: Content) -> Self {
        self.clusters.insert(index, content);
        self
    }

    /// With a backing file.
    pub fn over(mut self, name: &str, format: &str) -> Self {
        self.backing = Some((name.into(), Some(format.into())));
        self
    }

    /// Lays the image out.
    pub fn build(&self) -> Image {
        Builder::new(self).build()
    }
}

/// A sample on its way to an [`Image`].
struct Builder<'a> {
    sample: &'a Sample,
    image: Image,
    /// References by cluster index; its length is the number of clusters so far.
    references: Vec<u64>,
    /// The cluster that takes compressed data, and how much of it is taken.
    compressed: Option<(u64, u64)>,
}

impl<'a> Builder<'a> {
    fn new(sample: &'a Sample) -> Self {
        let image = Image {
            bytes: Vec::new(),
            data: Vec::new(),
            at: Layout::default(),
            cluster_size: 1 << sample.cluster_bits,
            entry_size: if sample.extended_l2 { 16 } else { 8 },
            refcount_bits: 1 << sample.refcount_order,
        };
        Self { sample, image, references: Vec::new(), compressed: None }
    }

    fn build(mut self) -> Image {
        let cluster = self.image.cluster_size;
        self.allocate(1); // the header
        self.image.at.refcount_table = self.allocate(1);
        let l1_entries = self.sample.size.div_ceil(cluster / self.image.entry_size * cluster);
        let l1_clusters = (l1_entries * 8).div_ceil(cluster);
        if l1_clusters != 0 {
            self.image.at.l1 = self.allocate(l1_clusters);
        }
        self.clusters();
        self.snapshots(l1_entries, l1_clusters);
        self.bitmaps();
        self.refcounts();
        self.header(l1_entries);
        self.fill_up();
        self.image
    }

    /// Gives the file all the clusters that are allocated so far.
    fn fill_up(&mut self) {
        let len = self.references.len() as u64 * self.image.cluster_size;
        self.image.bytes.resize(len as usize, 0);
    }

    fn allocate(&mut self, clusters: u64) -> u64 {
        let host = self.references.len() as u64 * self.image.cluster_size;
        self.references.extend((0..clusters).map(|_| 1));
        host
    }

    fn refer(&mut self, host: u64) {
        self.references[(host / self.image.cluster_size) as usize] += 1;
    }

    fn clusters(&mut self) {
        let cluster = self.image.cluster_size;
        let entries = cluster / self.image.entry_size;
        for (&index, content) in &self.sample.clusters {
            let slot = index / entries;
            if !self.image.at.l2.contains_key(&slot) {
                let table = self.allocate(1);
                self.image.at.l2.insert(slot, table);
                self.image.put_u64(self.image.at.l1 + slot * 8, COPIED | table);
            }
            let (first, second) = match *content {
                Content::Data(fill) => (COPIED | self.data(index, fill), u64::from(u32::MAX)),
                Content::ZeroAllocated(fill) if self.sample.extended_l2 => {
                    (COPIED | self.data(index, fill), u64::from(u32::MAX) << 32)
                }
                Content::ZeroAllocated(fill) => (COPIED | self.data(index, fill) | 1, 0),
                Content::Zero if self.sample.extended_l2 => (0, u64::from(u32::MAX) << 32),
                Content::Zero => (1, 0),
                Content::Compressed(fill) => (self.compressed(index, fill), 0),
                Content::Subclusters { allocated, zero, fill } => {
                    let host = if allocated == 0 { 0 } else { COPIED | self.data(index, fill) };
                    (host, u64::from(zero) << 32 | u64::from(allocated))
                }
            };
            let at = self.image.l2_entry(index);
            self.image.put_u64(at, first);
            if self.sample.extended_l2 {
                self.image.put_u64(at + 8, second);
            }
        }
    }

    fn data(&mut self, index: u64, fill: u8) -> u64 {
        let bytes = vec![fill; self.image.cluster_size as usize];
        let host = if self.sample.data_file.is_some() {
            // Guest data lies at its own offset there.
            let host = index * self.image.cluster_size;
            let end = host as usize + bytes.len();
            if self.image.data.len() < end {
                self.image.data.resize(end, 0);
            }
            self.image.data[host as usize..end].copy_from_slice(&bytes);
            host
        } else {
            let host = self.allocate(1);
            self.image.put(host, &bytes);
            host
        };
        self.image.at.hosts.insert(index, host);
        host
    }

    fn compressed(&mut self, index: u64, fill: u8) -> u64 {
        let cluster = self.image.cluster_size;
        let bytes = deflated(&vec![fill; cluster as usize], self.sample.zstd);
        let len = bytes.len() as u64;
        let (host, used) = match self.compressed {
            Some((host, used)) if used + len <= cluster => {
                self.refer(host);
                (host, used)
            }
            _ => (self.allocate(1), 0),
        };
        self.compressed = Some((host, used + len));
        let start = host + used;
        self.image.put(start, &bytes);
        self.image.at.hosts.insert(index, start);
        let offset_bits = 62 - (self.sample.cluster_bits - 8);
        let more_sectors = (start % 512 + len).div_ceil(512) - 1;
        COMPRESSED | more_sectors << offset_bits | start
    }

    fn snapshots(&mut self, l1_entries: u64, l1_clusters: u64) {
        if self.sample.snapshots.is_empty() {
            return;
        }
        let cluster = self.image.cluster_size;
        let mut table = Vec::new();
        self.fill_up();
        // What a snapshot shares is no longer the active state's alone.
        let slots: Vec<_> = self.image.at.l2.iter().map(|(slot, l2)| (*slot, *l2)).collect();
        for (slot, l2) in slots {
            self.image.put_u64(self.image.at.l1 + slot * 8, l2);
            for at in (l2..l2 + cluster).step_by(self.image.entry_size as usize) {
                let entry = self.image.get_u64(at);
                self.image.put_u64(at, entry & !COPIED);
            }
        }
        for (number, name) in self.sample.snapshots.iter().enumerate() {
            let l1 = self.allocate(l1_clusters);
            self.fill_up();
            let from = self.image.at.l1 as usize;
            let entries = self.image.bytes[from..from + (l1_entries * 8) as usize].to_vec();
            self.image.put(l1, &entries);
            self.image.at.snapshot_l1.push(l1);
            let shared: Vec<u64> =
                self.image.at.l2.values().chain(self.image.at.hosts.values()).copied().collect();
            for host in shared {
                self.refer(host);
            }
            let id = (number + 1).to_string();
            table.extend(l1.to_be_bytes());
            table.extend((l1_entries as u32).to_be_bytes());
            table.extend((id.len() as u16).to_be_bytes());
            table.extend((name.len() as u16).to_be_bytes());
            table.extend([0; 20]); // times, and the size of the VM state
            table.extend(16u32.to_be_bytes());
            table.extend(0u64.to_be_bytes()); // the size of the VM state
            table.extend(self.sample.size.to_be_bytes());
            table.extend(id.bytes().chain(name.bytes()));
            table.resize(table.len().next_multiple_of(8), 0);
        }
        self.image.at.snapshots = self.allocate((table.len() as u64).div_ceil(cluster));
        self.image.put(self.image.at.snapshots, &table);
    }

    fn bitmaps(&mut self) {
        if self.sample.bitmaps.is_empty() {
            return;
        }
        let cluster = self.image.cluster_size;
        let granularity_bits = self.sample.cluster_bits;
        let bits = self.sample.size.div_ceil(1 << granularity_bits);
        let table_entries = bits.div_ceil(8).div_ceil(cluster);
        let mut directory = Vec::new();
        for name in &self.sample.bitmaps {
            let table = self.allocate((table_entries * 8).div_ceil(cluster));
            self.image.at.bitmap_tables.push(table);
            directory.extend(table.to_be_bytes());
            directory.extend((table_entries as u32).to_be_bytes());
            directory.extend(2u32.to_be_bytes()); // enabled
            directory.extend([1, granularity_bits as u8]);
            directory.extend((name.len() as u16).to_be_bytes());
            directory.extend(0u32.to_be_bytes());
            directory.extend(name.bytes());
            directory.resize(directory.len().next_multiple_of(8), 0);
        }
        self.image.at.bitmap_directory = self.allocate((directory.len() as u64).div_ceil(cluster));
        self.image.put(self.image.at.bitmap_directory, &directory);
    }

    fn refcounts(&mut self) {
        let per_block = self.image.cluster_size * 8 / self.image.refcount_bits;
        while (self.image.at.refcount_blocks.len() as u64 * per_block) < self.references.len() as u64 {
            let block = self.allocate(1);
            let slot = self.image.at.refcount_blocks.len() as u64;
            self.image.at.refcount_blocks.push(block);
            self.image.put_u64(self.image.at.refcount_table + slot * 8, block);
        }
        self.fill_up();
        for (index, count) in self.references.clone().into_iter().enumerate() {
            self.image.set_refcount(index as u64 * self.image.cluster_size, count);
        }
    }

    fn header(&mut self, l1_entries: u64) {
        let sample = self.sample;
        let image = &mut self.image;
        image.put(field::MAGIC, b"QFI\xfb");
        image.put_u32(field::VERSION, sample.version);
        image.put_u32(field::CLUSTER_BITS, sample.cluster_bits);
        image.put_u64(field::SIZE, sample.size);
        image.put_u32(field::L1_SIZE, l1_entries as u32);
        image.put_u64(field::L1_OFFSET, image.at.l1);
        image.put_u64(field::REFCOUNT_TABLE_OFFSET, image.at.refcount_table);
        image.put_u32(field::REFCOUNT_TABLE_CLUSTERS, 1);
        image.put_u32(field::SNAPSHOTS, sample.snapshots.len() as u32);
        image.put_u64(field::SNAPSHOTS_OFFSET, image.at.snapshots);
        let mut end = 72;
        if sample.version >= 3 {
            end = 112;
            let mut bits = 0;
            if sample.data_file.is_some() {
                bits |= incompatible::DATA_FILE;
            }
            if sample.zstd {
                bits |= incompatible::COMPRESSION;
            }
            if sample.extended_l2 {
                bits |= incompatible::EXTENDED_L2;
            }
            image.put_u64(field::INCOMPATIBLE, bits);
            let raw = matches!(sample.data_file, Some((_, true)));
            let autoclear = u64::from(!sample.bitmaps.is_empty()) | u64::from(raw) << 1;
            image.put_u64(field::AUTOCLEAR, autoclear);
            image.put_u32(field::REFCOUNT_ORDER, sample.refcount_order);
            image.put_u32(field::HEADER_LENGTH, 112);
            image.put(field::COMPRESSION_TYPE, &[u8::from(sample.zstd)]);
        }
        let mut extensions = Vec::new();
        if let Some((_, Some(format))) = &sample.backing {
            extensions.push((extension::BACKING_FORMAT, format.as_bytes().to_vec()));
        }
        if let Some((name, _)) = &sample.data_file {
            extensions.push((extension::DATA_FILE, name.as_bytes().to_vec()));
        }
        if !sample.bitmaps.is_empty() {
            let names: usize = sample.bitmaps.iter().map(|n| (24 + n.len()).next_multiple_of(8)).sum();
            let mut data = (sample.bitmaps.len() as u32).to_be_bytes().to_vec();
            data.extend(0u32.to_be_bytes());
            data.extend((names as u64).to_be_bytes());
            data.extend(image.at.bitmap_directory.to_be_bytes());
            extensions.push((extension::BITMAPS, data));
        }
        extensions.extend(sample.extensions.iter().cloned());
        for (kind, data) in extensions {
            image.at.extensions.insert(kind, end);
            image.put_u32(end, kind);
            image.put_u32(end + 4, data.len() as u32);
            image.put(end + 8, &data);
            end += 8 + (data.len() as u64).next_multiple_of(8);
        }
        end += 8; // the end mark is zeros
        image.at.header_end = end;
        if let Some((name, _)) = &sample.backing {
            image.at.backing_name = end;
            image.put_u64(field::BACKING_OFFSET, end);
            image.put_u32(field::BACKING_SIZE, name.len() as u32);
            image.put(end, name.as_bytes());
        }
    }
}

fn deflated(bytes: &[u8], zstd: bool) -> Vec<u8> {
    if zstd {
        return ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest);
    }
    let mut encoder = flate2::write::DeflateEncoder::new(Vec::new(), flate2::Compression::default());
    // Writing to a vector cannot fail.
    encoder.write_all(bytes).and_then(|()| encoder.finish()).unwrap_or_default()
}

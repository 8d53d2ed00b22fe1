//! New images, laid out as `qemu-img create` does: header, refcount table, refcount blocks, L1 table.

use crate::error::shown;
use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use super::refcounts::ClusterIndex;
use crate::error::{Error, FileOp, Refusal, Result};
use crate::format::{
    Cluster0, Compression, FormatError, Geometry, Header, MAX_L1_BYTES, MAX_REFCOUNT_TABLE_BYTES,
    RefcountWidth, features, write_be_u64s,
};
use crate::storage::{Host, LockMode, Storage, lock};
use crate::units::HostOffset;

/// QEMU counts disks in sectors.
const SECTOR: u64 = 512;

/// What a new qcow2 image is to be. The defaults are those of `qemu-img create`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct CreateOptions {
    /// The size of the guest's disk in bytes, rounded up to a sector as QEMU does.
    pub virtual_size: u64,
    /// The base-2 logarithm of the cluster size: 9 to 21, 14 and more with extended L2 entries.
    pub cluster_bits: u32,
    /// 2 or 3; version 2 has 16-bit refcounts, plain L2 entries and zlib.
    pub version: u32,
    /// The base-2 logarithm of the refcount width in bits: 0 to 6.
    pub refcount_order: u32,
    /// Whether L2 entries have 128 bits and describe subclusters.
    pub extended_l2: bool,
    /// How compressed clusters will be packed.
    pub compression: Compression,
    /// The backing file's name as it is to be written, and its format. Neither is looked for.
    pub backing: Option<(Vec<u8>, String)>,
}

impl CreateOptions {
    /// QEMU's defaults for a disk of `virtual_size` bytes.
    pub fn new(virtual_size: u64) -> Self {
        Self {
            virtual_size,
            cluster_bits: 16,
            version: 3,
            refcount_order: 4,
            extended_l2: false,
            compression: Compression::Zlib,
            backing: None,
        }
    }
}

/// Makes a new qcow2 image that holds nothing. When it returns, image and name are durable.
///
/// # Errors
/// A name that exists; options that no qcow2 image can have; an I/O error. No file is left behind.
pub fn create(host: &dyn Host, path: &Path, options: &CreateOptions) -> Result<()> {
    let layout = NewImageLayout::of(path, options, 0)?;
    make(host, path, |file| layout.write(path, file))
}

/// Makes a new raw image of `size` bytes, rounded up to a sector, that is one hole. When it returns,
/// image and name are durable.
///
/// # Errors
/// As [`create`].
pub fn create_raw(host: &dyn Host, path: &Path, size: u64) -> Result<()> {
    let size = whole_sectors(path, size)?;
    make(host, path, |file| file.set_len(size).map_err(|e| Error::io(path, FileOp::Grow, Some(size), e)))
}

/// The directory that a new name lies in.
pub(crate) fn dir_of(path: &Path) -> &Path {
    match path.parent() {
        Some(dir) if !dir.as_os_str().is_empty() => dir,
        _ => Path::new("."),
    }
}

/// The disk's size in whole sectors, in bytes.
pub(crate) fn whole_sectors(path: &Path, size: u64) -> Result<u64> {
    let most = i64::MAX as u64 - (SECTOR - 1);
    if size > most {
        return Err(Error::Usage(format!("{}: a disk of {size} bytes is too large", shown(path))));
    }
    Ok(size.next_multiple_of(SECTOR))
}

/// Creates a file, fills it, and makes it durable; removes it again if that fails.
fn make(host: &dyn Host, path: &Path, fill: impl FnOnce(&dyn Storage) -> Result<()>) -> Result<()> {
    let file = host.create_new(path).map_err(|e| Error::io(path, FileOp::Create, None, e))?;
    // So that nobody opens it half made.
    let filled = lock(host, path, &*file, LockMode::Write)
        .and_then(|()| fill(&*file))
        .and_then(|()| file.sync().map_err(|e| Error::barrier(path, e)))
        .and_then(|()| host.sync_dir(dir_of(path)).map_err(|e| Error::barrier(dir_of(path), e)));
    if filled.is_err() {
        // The first error is the one to tell.
        let _ = host.unlink(path);
    }
    filled
}

/// Where everything of a new image lies.
#[derive(Clone, Debug)]
pub(crate) struct NewImageLayout {
    cluster0: Vec<u8>,
    geometry: Geometry,
    /// Clusters of the refcount table, the refcount blocks and the L1 table, in this order behind cluster 0.
    table: u64,
    blocks: u64,
    l1: u64,
}

impl NewImageLayout {
    /// The layout of an image in which `room` more clusters can be allocated without any growth of the
    /// refcounts.
    ///
    /// # Errors
    /// [`Error::Usage`] for options that contradict each other or the format, [`Error::Format`] for
    /// tables that would be larger than the format allows, [`Error::Refused`] for a backing name that
    /// does not fit.
    pub(crate) fn of(path: &Path, options: &CreateOptions, room: u64) -> Result<Self> {
        let geometry = geometry(path, options)?;
        let size = whole_sectors(path, options.virtual_size)?;
        let entries = geometry.l1_entries_for(size);
        if entries.saturating_mul(8) > MAX_L1_BYTES {
            let found = format!("{entries} entries");
            let e = FormatError::unsupported("L1 table", 36, found, "a table of at most 32 MiB");
            return Err(Error::format(path, e));
        }
        let l1 = geometry.clusters_for(entries * 8);
        let (table, blocks) = refcount_clusters(path, &geometry, 1 + l1, room)?;

        let at = |cluster: ClusterIndex| HostOffset::new(cluster << geometry.cluster_bits());
        let mut header = Header::new(options.version, geometry, size);
        header.refcount_table_offset = at(1);
        // The limits of both tables keep the counts far below 2^32.
        header.refcount_table_clusters = table as u32;
        header.l1_entries = entries as u32;
        header.l1_offset = if entries == 0 { HostOffset::ZERO } else { at(1 + table + blocks) };
        header.compression = options.compression;
        if options.compression != Compression::Zlib {
            header.incompatible |= features::COMPRESSION_TYPE;
        }
        let mut cluster0 = Cluster0::new(header);
        if let Some((name, format)) = &options.backing {
            cluster0.set_backing(name, format).map_err(|e| Error::Usage(format!("{}: {e}", shown(path))))?;
        }
        let cluster0 = cluster0.encode().map_err(|_| {
            let name = options.backing.as_ref().map(|(name, _)| OsString::from_vec(name.clone()));
            Error::refused(path, Refusal::HeaderRoom { name: name.unwrap_or_default() })
        })?;
        Ok(Self { cluster0, geometry, table, blocks, l1 })
    }

    /// The clusters that the image takes.
    pub(crate) fn clusters(&self) -> u64 {
        1 + self.table + self.blocks + self.l1
    }

    /// The length of the image's file, in bytes.
    pub(crate) fn file_size(&self) -> u64 {
        self.clusters() << self.geometry.cluster_bits()
    }

    /// Writes the image into an empty file. Nothing is synced.
    ///
    /// # Errors
    /// An I/O error.
    pub(crate) fn write(&self, path: &Path, file: &dyn Storage) -> Result<()> {
        let bits = self.geometry.cluster_bits();
        let first_block = 1 + self.table;
        let per_block = self.geometry.refcounts_per_block();
        let width = RefcountWidth::of(&self.geometry);
        // What is not written is a hole, and reads as zeros.
        let size = self.file_size();
        file.set_len(size).map_err(|e| Error::io(path, FileOp::Grow, Some(size), e))?;
        let write = |bytes: &[u8], at: u64| {
            file.write_all_at(bytes, at).map_err(|e| Error::io(path, FileOp::Write, Some(at), e))
        };
        let mut block = vec![0; self.geometry.cluster_size() as usize];
        for n in 0..self.blocks {
            let used = self.clusters().saturating_sub(n * per_block).min(per_block);
            if used == 0 {
                break;
            }
            block.fill(0);
            // One fits into a counter of any width, and the range was clamped to the block.
            let _ = width.fill(&mut block, 0..used as usize, 1);
            let bytes = ((used as usize) << self.geometry.refcount_bits().trailing_zeros()).div_ceil(8);
            write(block.get(..bytes).unwrap_or_default(), (first_block + n) << bits)?;
        }
        write(&write_be_u64s((0..self.blocks).map(|n| (first_block + n) << bits)), 1 << bits)?;
        // The magic comes last: half an image is none.
        write(&self.cluster0, 0)
    }
}

fn geometry(path: &Path, options: &CreateOptions) -> Result<Geometry> {
    let usage = |what: String| Err(Error::Usage(format!("{}: {what}", shown(path))));
    let CreateOptions { version, cluster_bits, refcount_order, extended_l2, compression, .. } = *options;
    let plain = refcount_order == 4 && !extended_l2 && compression == Compression::Zlib;
    match version {
        3 => {}
        2 if plain => {}
        2 => return usage("version 2 has 16-bit refcounts, plain L2 entries and zlib".to_owned()),
        other => return usage(format!("there is no qcow2 version {other}")),
    }
    match Geometry::new(cluster_bits, refcount_order, extended_l2) {
        Some(geometry) => Ok(geometry),
        None => usage(format!(
            "clusters of 2^{cluster_bits} bytes, refcounts of 2^{refcount_order} bits{}: no qcow2 image has these",
            if extended_l2 { ", extended L2 entries" } else { "" }
        )),
    }
}

/// The clusters of a refcount table and its blocks that cover themselves, `used` clusters and `room`
/// free ones.
fn refcount_clusters(path: &Path, geometry: &Geometry, used: u64, room: u64) -> Result<(u64, u64)> {
    let (mut table, mut blocks) = (1, 1);
    loop {
        if table * geometry.cluster_size() > MAX_REFCOUNT_TABLE_BYTES {
            let found = format!("{room} clusters");
            let e = FormatError::unsupported("refcount table", 48, found, "a table of at most 8 MiB");
            return Err(Error::format(path, e));
        }
        let all = used.saturating_add(room).saturating_add(table + blocks);
        let need_blocks = all.div_ceil(geometry.refcounts_per_block());
        let need_table = geometry.clusters_for(need_blocks.saturating_mul(8));
        if need_blocks <= blocks && need_table <= table {
            return Ok((table, blocks));
        }
        (table, blocks) = (table.max(need_table), blocks.max(need_blocks));
    }
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use super::*;
    use crate::error::ErrorKind;
    use crate::image::alloc::Allocator;
    use crate::image::refcounts::Refcounts;
    use crate::image::{Image, ImageFormat, Qcow2};
    use crate::storage::{Access, MemHost, OsHost};

    fn every_kind(size: u64) -> Vec<CreateOptions> {
        let mut all = Vec::new();
        for cluster_bits in 9..=21 {
            for refcount_order in 0..=6 {
                let new = CreateOptions { cluster_bits, refcount_order, ..CreateOptions::new(size) };
                if cluster_bits >= 14 {
                    all.push(CreateOptions { extended_l2: true, ..new.clone() });
                }
                if refcount_order == 4 {
                    all.push(CreateOptions { version: 2, ..new.clone() });
                    all.push(CreateOptions { compression: Compression::Zstd, ..new.clone() });
                }
                all.push(new);
            }
        }
        all
    }

    /// Runs `qemu-img`; `None`, said aloud, where it is missing.
    fn qemu_img(args: &[&str]) -> Option<String> {
        if !kit::are_here(&["qemu-img"]) {
            return None;
        }
        let run = kit::end(Command::new("qemu-img").args(args)).ok();
        assert!(run.stderr.is_empty(), "{run}");
        Some(run.stdout)
    }

    #[test]
    fn every_kind_of_new_image_is_clean_to_qemu() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("new.qcow2");
        for options in every_kind(1 << 30) {
            create(&OsHost, &path, &options).unwrap();
            let Some(said) = qemu_img(&["check", path.to_str().unwrap()]) else { return };
            assert!(said.starts_with("No errors were found"), "{options:?}: {said}");
            std::fs::remove_file(&path).unwrap();
        }
    }

    #[test]
    fn the_layout_is_that_of_qemu_img_create() {
        let dir = tempfile::tempdir().unwrap();
        let (ours, theirs) = (dir.path().join("ours"), dir.path().join("theirs"));
        for (set, options) in [
            ("compat=1.1", CreateOptions::new(10 << 30)),
            ("compat=0.10", CreateOptions { version: 2, ..CreateOptions::new(10 << 30) }),
            ("extended_l2=on", CreateOptions { extended_l2: true, ..CreateOptions::new(1 << 40) }),
            (
                "compression_type=zstd",
                CreateOptions { compression: Compression::Zstd, ..CreateOptions::new(0) },
            ),
            ("refcount_bits=1", CreateOptions { refcount_order: 0, ..CreateOptions::new(1000) }),
            ("cluster_size=2M", CreateOptions { cluster_bits: 21, ..CreateOptions::new(1 << 40) }),
            ("cluster_size=512", CreateOptions { cluster_bits: 9, ..CreateOptions::new(1 << 20) }),
        ] {
            let size = options.virtual_size.to_string();
            let made = ["create", "-q", "-f", "qcow2", "-o", set, theirs.to_str().unwrap(), &size];
            if qemu_img(&made).is_none() {
                return;
            }
            create(&OsHost, &ours, &options).unwrap();
            let (ours_now, mut theirs_now) = (std::fs::read(&ours).unwrap(), std::fs::read(&theirs).unwrap());
            // QEMU ends the file inside the L1 table; here clusters are whole.
            theirs_now.resize(theirs_now.len().next_multiple_of(1 << options.cluster_bits), 0);
            assert!(ours_now == theirs_now, "{set}");
            std::fs::remove_file(&ours).unwrap();
        }
    }

    #[test]
    fn a_backing_file_is_named_with_its_format() {
        let dir = tempfile::tempdir().unwrap();
        let base = dir.path().join("base.raw");
        create_raw(&OsHost, &base, 1000).unwrap();
        assert_eq!(std::fs::metadata(&base).unwrap().len(), 1024);
        let path = dir.path().join("top");
        let backing = Some((b"base.raw".to_vec(), "raw".to_owned()));
        create(&OsHost, &path, &CreateOptions { backing, ..CreateOptions::new(4096) }).unwrap();
        let Some(said) = qemu_img(&["info", "--output=json", path.to_str().unwrap()]) else { return };
        assert!(said.contains(r#""backing-filename": "base.raw""#), "{said}");
        assert!(said.contains(r#""backing-filename-format": "raw""#), "{said}");
    }

    #[test]
    fn room_is_free_and_covered() {
        let host = MemHost::new();
        let path = Path::new("/new");
        for options in every_kind(1 << 20) {
            for room in [0, 1, 100, 5000] {
                let file = host.create_new(path).unwrap();
                let layout = NewImageLayout::of(path, &options, room).unwrap();
                layout.write(path, &*file).unwrap();
                assert_eq!(file.size().unwrap(), layout.file_size());
                let image = Qcow2::open(path, file, None).unwrap();
                let refcounts = Refcounts::load(&image).unwrap();
                let (free, _) = Allocator::last_taken(&image, &refcounts, u64::MAX).unwrap();
                assert!(free >= room, "{options:?}: {free} of {room}");
                let first = Allocator::find_run(&image, &refcounts, 1).unwrap();
                assert!(first.is_none_or(|run| run.start == layout.clusters()), "{options:?}");
                host.unlink(path).unwrap();
            }
        }
    }

    #[test]
    fn what_no_image_can_be_is_refused() {
        let host = MemHost::new();
        let new = CreateOptions::new(1 << 30);
        for (bad, kind) in [
            (CreateOptions { cluster_bits: 8, ..new.clone() }, ErrorKind::Usage),
            (CreateOptions { cluster_bits: 22, ..new.clone() }, ErrorKind::Usage),
            (CreateOptions { cluster_bits: 13, extended_l2: true, ..new.clone() }, ErrorKind::Usage),
            (CreateOptions { refcount_order: 7, ..new.clone() }, ErrorKind::Usage),
            (CreateOptions { version: 4, ..new.clone() }, ErrorKind::Usage),
            (CreateOptions { version: 2, refcount_order: 3, ..new.clone() }, ErrorKind::Usage),
            (CreateOptions { virtual_size: u64::MAX, ..new.clone() }, ErrorKind::Usage),
            (CreateOptions { backing: Some((Vec::new(), "raw".into())), ..new.clone() }, ErrorKind::Usage),
            (
                CreateOptions { cluster_bits: 9, virtual_size: 129 << 30, ..new.clone() },
                ErrorKind::Unsupported,
            ),
            (
                CreateOptions {
                    cluster_bits: 9,
                    backing: Some((vec![b'x'; 400], "raw".into())),
                    ..new.clone()
                },
                ErrorKind::Refused,
            ),
        ] {
            let error = create(&host, Path::new("/bad"), &bad).unwrap_err();
            assert_eq!(error.kind(), kind, "{bad:?}: {error}");
            assert!(host.stat(Path::new("/bad")).is_err(), "{bad:?}");
        }
        assert!(NewImageLayout::of(Path::new("/bad"), &new, u64::MAX).is_err());
        assert!(create_raw(&host, Path::new("/bad"), u64::MAX).is_err());
    }

    #[test]
    fn an_existing_file_is_never_replaced() {
        let host = MemHost::new();
        host.add("/there", b"precious").unwrap();
        assert!(create(&host, Path::new("/there"), &CreateOptions::new(1 << 20)).is_err());
        assert!(create_raw(&host, Path::new("/there"), 1 << 20).is_err());
        assert_eq!(host.content("/there").unwrap(), b"precious");
    }

    #[test]
    fn a_new_image_reads_as_what_was_asked_for() {
        let host = MemHost::new();
        for (n, options) in every_kind(3 << 20).into_iter().enumerate() {
            let path = format!("/{n}");
            let path = Path::new(&path);
            create(&host, path, &options).unwrap();
            let file = host.open(path, Access::Read).unwrap();
            let image = Image::open(path, file, ImageFormat::Qcow2, None).unwrap();
            let header = image.as_qcow2().unwrap().header();
            assert_eq!(image.virtual_size(), options.virtual_size);
            assert_eq!(header.version, options.version);
            assert_eq!(header.compression, options.compression);
            assert_eq!(header.geometry().extended_l2(), options.extended_l2);
            assert_eq!(image.next_allocated(crate::units::GuestOffset::ZERO).unwrap(), None);
        }
    }
}

//! Formats that are not read here, known by their magics so that nobody takes them for raw.
//!
//! A file of another format is bytes like any other; read as raw it would be a wrong disk, and written as raw it is
//! destroyed. The magics are those of QEMU's own drivers (`block/*.c`, the `bdrv_probe` functions), and of the programs
//! that pack images. An ISO image, a partition table or a file system is a raw disk, and has no entry here.

use super::header::MAGIC;
use super::words::u32_at;

/// A format that is known and not read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Container {
    /// VMware: a sparse extent, or the text that describes one.
    Vmdk,
    /// VirtualBox.
    Vdi,
    /// Virtual PC and Hyper-V, dynamic or differencing.
    Vpc,
    /// Virtual PC and Hyper-V, fixed: the disk's bytes, and a footer behind them.
    VpcFixed,
    /// Hyper-V since 2012.
    Vhdx,
    /// QEMU's enhanced disk.
    Qed,
    /// The first version of qcow.
    Qcow,
    /// Parallels, old or extended.
    Parallels,
    /// A disk encrypted with LUKS, version 1 or 2.
    Luks,
    /// Apple's disk image.
    Dmg,
    /// Bochs, growing.
    Bochs,
    /// A compressed loop device.
    Cloop,
    /// Packed with gzip.
    Gzip,
    /// Packed with bzip2.
    Bzip2,
    /// Packed with xz.
    Xz,
    /// Packed with zstd.
    Zstd,
    /// Packed with lz4.
    Lz4,
    /// A zip archive.
    Zip,
    /// A 7-Zip archive.
    SevenZip,
    /// Packed with compress.
    Compress,
    /// Packed with lzip.
    Lzip,
    /// Packed with lzop, as `virsh dump` and `virsh save` may do it.
    Lzop,
    /// Packed as xz's predecessor does it.
    Lzma,
    /// A RAR archive.
    Rar,
    /// A tar archive: an appliance (OVA, XVA) is one.
    Tar,
    /// Microsoft's imaging format.
    Wim,
    /// Partclone, as Clonezilla saves partitions.
    Partclone,
    /// A sparse image of Android's.
    AndroidSparse,
    /// A backup of Proxmox.
    Vma,
    /// The state of a machine that libvirt has saved.
    LibvirtSave,
    /// The state of a machine that QEMU has saved, or streams to another host.
    QemuState,
    /// EnCase's evidence files.
    Ewf,
}

use Container::{
    AndroidSparse, Bochs, Bzip2, Cloop, Compress, Dmg, Ewf, Gzip, LibvirtSave, Luks, Lz4, Lzip, Lzma, Lzop,
    Parallels, Partclone, Qcow, Qed, QemuState, Rar, SevenZip, Tar, Vdi, Vhdx, Vma, Vmdk, Vpc, VpcFixed, Wim,
    Xz, Zip, Zstd,
};

/// How many bytes at the start of a file are looked at.
pub(crate) const CONTAINER_HEAD: usize = 2048;

/// How many bytes at the end of a file are looked at.
pub(crate) const CONTAINER_TAIL: usize = 512;

/// What stands at the very start of a file of each format.
const MAGICS: &[(&[u8], Container)] = &[
    (b"KDMV", Vmdk),
    (b"COWD", Vmdk),
    (b"\xbe\xba\xfe\xca\0\0\0\0\x01\0\0\0\x02\0\0\0", Vmdk),
    (b"# Disk DescriptorFile", Vmdk),
    (b"conectix", Vpc),
    (b"vhdxfile", Vhdx),
    (b"QED\0", Qed),
    (b"WithoutFreeSpace", Parallels),
    (b"WithouFreSpacExt", Parallels),
    (b"LUKS\xba\xbe\0\x01", Luks),
    (b"LUKS\xba\xbe\0\x02", Luks),
    (b"Bochs Virtual HD Image", Bochs),
    (b"#!/bin/sh\n#V2.0 Format\n", Cloop),
    (b"\x1f\x8b\x08", Gzip),
    (b"\xfd7zXZ\0", Xz),
    (b"\x28\xb5\x2f\xfd", Zstd),
    (b"\x04\x22\x4d\x18", Lz4),
    (b"\x02\x21\x4c\x18", Lz4),
    (b"PK\x03\x04", Zip),
    (b"7z\xbc\xaf\x27\x1c", SevenZip),
    (b"LZIP\x01", Lzip),
    (b"\x89LZO\0\r\n\x1a\n", Lzop),
    (b"Rar!\x1a\x07", Rar),
    (b"MSWIM\0\0\0", Wim),
    (b"partclone-image", Partclone),
    (b"\x3a\xff\x26\xed\x01\0", AndroidSparse),
    (b"VMA\0\0\0\0\x01", Vma),
    (b"LibvirtQemudSave", LibvirtSave),
    (b"LibvirtQemudPart", LibvirtSave),
    (b"QEVM\0\0\0\x03", QemuState),
    (b"EVF\t\r\n\xff\0", Ewf),
    (b"LVF\t\r\n\xff\0", Ewf),
    (b"EVF2\r\n\x81\0", Ewf),
];

/// Where VDI's signature stands, and the signature.
const VDI: (usize, [u8; 4]) = (0x40, [0x7f, 0x10, 0xda, 0xbe]);

/// Where the magic of a tar archive stands, with the version that POSIX and that GNU gives it.
const TAR: (usize, [&[u8; 8]; 2]) = (257, [b"ustar\x0000", b"ustar  \0"]);

/// In the footer of a VHD: the disk type, its values, and the checksum.
const VHD_TYPE: usize = 60;
const VHD_FIXED: u32 = 2;
const VHD_DYNAMIC: u32 = 3;
const VHD_DIFFERENCING: u32 = 4;
const VHD_CHECKSUM: usize = 64;

impl Container {
    /// The format whose magic stands in the first [`CONTAINER_HEAD`] bytes of a file, or in its last
    /// [`CONTAINER_TAIL`] bytes; fewer if the file is shorter.
    pub(crate) fn of(head: &[u8], tail: &[u8]) -> Option<Self> {
        let at_start =
            MAGICS.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, container)| *container);
        let is_vdi = || head.get(VDI.0..).is_some_and(|rest| rest.starts_with(&VDI.1));
        at_start
            .or_else(|| is_bzip2(head).then_some(Bzip2))
            .or_else(|| begins_with_skippable(head).then_some(Zstd))
            .or_else(|| is_compress(head).then_some(Compress))
            .or_else(|| is_lzma(head).then_some(Lzma))
            .or_else(|| is_qcow1(head).then_some(Qcow))
            .or_else(|| is_vdi().then_some(Vdi))
            .or_else(|| is_vmdk_text(head).then_some(Vmdk))
            .or_else(|| is_tar(head).then_some(Tar))
            .or_else(|| footer_of_vhd(tail))
            .or_else(|| is_dmg(tail).then_some(Dmg))
    }

    /// The format that an image calls by this name, as QEMU's drivers are called.
    pub fn from_name(name: &str) -> Option<Self> {
        [Vmdk, Vdi, Vpc, Vhdx, Qed, Qcow, Parallels, Luks, Dmg, Bochs, Cloop]
            .into_iter()
            .find(|c| c.name() == name)
    }

    /// The name of QEMU's driver, or of the program that packs.
    pub fn name(self) -> &'static str {
        match self {
            Vmdk => "vmdk",
            Vdi => "vdi",
            Vpc | VpcFixed => "vpc",
            Vhdx => "vhdx",
            Qed => "qed",
            Qcow => "qcow",
            Parallels => "parallels",
            Luks => "luks",
            Dmg => "dmg",
            Bochs => "bochs",
            Cloop => "cloop",
            Gzip => "gzip",
            Bzip2 => "bzip2",
            Xz => "xz",
            Zstd => "zstd",
            Lz4 => "lz4",
            Zip => "zip",
            SevenZip => "7z",
            Compress => "compress",
            Lzip => "lzip",
            Lzop => "lzop",
            Lzma => "lzma",
            Rar => "rar",
            Tar => "tar",
            Wim => "wim",
            Partclone => "partclone",
            AndroidSparse => "simg",
            Vma => "vma",
            LibvirtSave => "libvirt-save",
            QemuState => "qemu-state",
            Ewf => "ewf",
        }
    }

    /// What it is, in words for people.
    pub fn description(self) -> &'static str {
        match self {
            Vmdk => "a vmdk image (VMware)",
            Vdi => "a vdi image (VirtualBox)",
            Vpc => "a vhd image (Virtual PC, Hyper-V)",
            VpcFixed => "a fixed vhd image (a disk and a footer)",
            Vhdx => "a vhdx image (Hyper-V)",
            Qed => "a qed image",
            Qcow => "a qcow image of version 1",
            Parallels => "a parallels image",
            Luks => "encrypted with LUKS",
            Dmg => "a dmg image (Apple)",
            Bochs => "a bochs image",
            Cloop => "a cloop image",
            Gzip => "packed with gzip",
            Bzip2 => "packed with bzip2",
            Xz => "packed with xz",
            Zstd => "packed with zstd",
            Lz4 => "packed with lz4",
            Zip => "a zip archive",
            SevenZip => "a 7-Zip archive",
            Compress => "packed with compress",
            Lzip => "packed with lzip",
            Lzop => "packed with lzop",
            Lzma => "packed with lzma",
            Rar => "a rar archive",
            Tar => "a tar archive (an appliance, for instance)",
            Wim => "a wim image (Microsoft)",
            Partclone => "an image of partclone's",
            AndroidSparse => "a sparse image of Android's",
            Vma => "a vma backup (Proxmox)",
            LibvirtSave => "the saved state of a machine (libvirt)",
            QemuState => "the saved state of a machine (QEMU)",
            Ewf => "an ewf image (EnCase)",
        }
    }

    /// The program that unpacks the file, if it is packed.
    pub fn packer(self) -> Option<&'static str> {
        matches!(self, Gzip | Bzip2 | Xz | Zstd | Lz4 | Compress | Lzip | Lzop | Lzma).then(|| self.name())
    }

    /// Whether the file holds a machine's memory, and no disk.
    pub fn is_machine_state(self) -> bool {
        matches!(self, LibvirtSave | QemuState)
    }

    /// Whether a guest may well have written this at the start of its own disk, which has no partitions then, or
    /// whether the disk's bytes stand in the file as they are: an overlay that calls such a file raw is right.
    pub(crate) fn may_be_raw(self) -> bool {
        let is_packed = self.packer().is_some();
        is_packed
            || matches!(self, VpcFixed | Luks | Zip | SevenZip | Rar | Tar | Wim | Partclone | Ewf | Dmg)
    }
}

/// A level from 1 to 9, then the magic of the first block: three letters alone may be a text.
fn is_bzip2(head: &[u8]) -> bool {
    matches!(head, [b'B', b'Z', b'h', b'1'..=b'9', 0x31, 0x41, 0x59, 0x26, 0x53, 0x59, ..])
}

fn is_qcow1(head: &[u8]) -> bool {
    u32_at(head, 0) == MAGIC && u32_at(head, 4) == 1
}

/// A description of extents in words, as VMware writes it: comments and empty lines, then the version.
fn is_vmdk_text(head: &[u8]) -> bool {
    let lines = head.split_inclusive(|&b| b == b'\n').filter_map(|line| line.strip_suffix(b"\n"));
    let mut lines =
        lines.map(|line| line.trim_ascii()).skip_while(|line| line.is_empty() || line.starts_with(b"#"));
    matches!(lines.next(), Some(b"version=1" | b"version=2" | b"version=3"))
}

/// A frame that zstd and lz4 pass over, at the start of a file that one of them has packed.
fn begins_with_skippable(head: &[u8]) -> bool {
    matches!(head, [0x50..=0x5f, 0x2a, 0x4d, 0x18, ..])
}

/// The magic has two letters only, so that more is looked at: codes of at most 16 bits, as everybody packs; the first
/// code is a byte, and the second one is at most the first that the table learns.
#[allow(clippy::little_endian_bytes, reason = "compress writes its header so")]
fn is_compress(head: &[u8]) -> bool {
    let &[0x1f, 0x9d, 0x90, a, b, c, ..] = head else { return false };
    let bits = u32::from_le_bytes([a, b, c, 0]);
    let (first, second) = (bits & 0x1ff, (bits >> 9) & 0x1ff);
    first < 256 && second <= 257
}

/// There is no magic: the settings that everybody uses, a dictionary of a power of two, a length that is unknown or less than
/// 2^48, and the zero that the packed bytes begin with.
#[allow(clippy::little_endian_bytes, reason = "lzma writes its header so")]
fn is_lzma(head: &[u8]) -> bool {
    let Some((&[0x5d, d0, d1, d2, d3, ref len @ .., 0], _)) = head.split_first_chunk::<14>() else {
        return false;
    };
    let dictionary = u32::from_le_bytes([d0, d1, d2, d3]);
    let len = u64::from_le_bytes(*len);
    dictionary.is_power_of_two() && dictionary >= 1 << 16 && (len == u64::MAX || (1..1 << 48).contains(&len))
}

fn is_tar(head: &[u8]) -> bool {
    let magic = head.get(TAR.0..).unwrap_or_default();
    TAR.1.iter().any(|known| magic.starts_with(*known))
}

/// What the footer at the end of a VHD says; old writers made it of 511 bytes. It is whole: eight letters alone may be a
/// guest's. Where the disk is none of fixed size, a copy stands at the start, and that one is damaged here.
fn footer_of_vhd(tail: &[u8]) -> Option<Container> {
    let footers = [Some(tail), tail.get(1..)];
    let footer = footers.into_iter().flatten().find(|footer| is_footer_of_vhd(footer))?;
    match u32_at(footer, VHD_TYPE) {
        VHD_FIXED => Some(VpcFixed),
        VHD_DYNAMIC | VHD_DIFFERENCING => Some(Vpc),
        _ => None,
    }
}

fn is_footer_of_vhd(footer: &[u8]) -> bool {
    let sum = |bytes: &[u8]| bytes.iter().map(|&b| u32::from(b)).sum::<u32>();
    let others = sum(footer).wrapping_sub(footer.get(VHD_CHECKSUM..VHD_CHECKSUM + 4).map_or(0, sum));
    footer.starts_with(b"conectix") && u32_at(footer, VHD_CHECKSUM) == !others
}

/// A trailer of version 4, which is 512 bytes long and says so.
fn is_dmg(tail: &[u8]) -> bool {
    tail.starts_with(b"koly") && u32_at(tail, 4) == 4 && u32_at(tail, 8) == 512
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at_start(bytes: &[u8]) -> Option<Container> {
        let mut head = bytes.to_vec();
        head.resize(CONTAINER_HEAD, 0x5a);
        Container::of(&head, &[0x5a; CONTAINER_TAIL])
    }

    fn at_end(bytes: &[u8]) -> Option<Container> {
        let mut tail = bytes.to_vec();
        tail.resize(CONTAINER_TAIL, 0);
        Container::of(&[0; CONTAINER_HEAD], &tail)
    }

    #[test]
    fn every_magic_is_known_and_a_byte_less_is_none() {
        for &(magic, container) in MAGICS {
            assert_eq!(at_start(magic), Some(container));
            assert_eq!(Container::of(magic, &[]), Some(container));
            for at in 0..magic.len() {
                let mut other = magic.to_vec();
                other[at] ^= 0x80;
                assert_eq!(at_start(&other), None, "{magic:?}");
                assert_eq!(Container::of(&magic[..at], &[]), None, "{magic:?}");
            }
        }
        assert_eq!(at_start(b"BZh91AY&SY"), Some(Bzip2));
        assert_eq!(at_start(b"BZh0 is a text"), None);
        assert_eq!(at_start(b"QFI\xfb\0\0\0\x01"), Some(Qcow));
        for version in [0, 2, 3, 4] {
            assert_eq!(at_start(&[b'Q', b'F', b'I', 0xfb, 0, 0, 0, version]), None);
        }
        for frame in 0x50..=0x5f {
            assert_eq!(at_start(&[frame, 0x2a, 0x4d, 0x18]), Some(Zstd));
        }
        for none in [0x4f, 0x60] {
            assert_eq!(at_start(&[none, 0x2a, 0x4d, 0x18]), None);
        }
        let mut tar = vec![b'a'; TAR.0];
        tar.extend(b"ustar  \0");
        assert_eq!(at_start(&tar), Some(Tar));
        let mut vdi = vec![b'<'; 0x40];
        vdi.extend(VDI.1);
        assert_eq!(at_start(&vdi), Some(Vdi));
    }

    #[test]
    fn short_magics_count_with_what_must_follow_them() {
        // What compress makes of zeros, of ones and of an empty file.
        assert_eq!(at_start(&[0x1f, 0x9d, 0x90, 0x00, 0x02, 0x0a]), Some(Compress));
        assert_eq!(at_start(&[0x1f, 0x9d, 0x90, b'a', b'b' << 1, 0]), Some(Compress));
        // A code that the table does not have yet; codes of a byte; the magic alone.
        assert_eq!(at_start(&[0x1f, 0x9d, 0x90, 0, 0xfe, 0x03]), None);
        assert_eq!(at_start(&[0x1f, 0x9d, 0x90, 0, 1, 0]), None);
        assert_eq!(at_start(&[0x1f, 0x9d, 0x08, 0, 0, 0]), None);
        assert_eq!(Container::of(&[0x1f, 0x9d, 0x90], &[]), None);

        #[allow(clippy::little_endian_bytes, reason = "lzma writes its header so")]
        let lzma = |dictionary: u32, len: u64, first: u8| {
            let bytes = [&[0x5d], &dictionary.to_le_bytes()[..], &len.to_le_bytes(), &[first]].concat();
            at_start(&bytes)
        };
        assert_eq!(lzma(1 << 23, u64::MAX, 0), Some(Lzma));
        assert_eq!(lzma(1 << 16, 4 << 30, 0), Some(Lzma));
        for (dictionary, len, first) in
            [(1 << 15, 9, 0), (3 << 20, 9, 0), (1 << 23, 0, 0), (1 << 23, 1 << 48, 0), (1 << 23, 9, 1)]
        {
            assert_eq!(lzma(dictionary, len, first), None);
        }
    }

    #[test]
    fn descriptions_of_vmware_are_texts() {
        for text in ["version=1\n", "# x\r\n#\r\n\r\nversion=3\r\nCID=1", "\n  \n# a\nversion=2\n"] {
            assert_eq!(at_start(text.as_bytes()), Some(Vmdk), "{text}");
        }
        for text in ["version=4\n", "# x\nname=1\nversion=1\n", "version=1", "#", "\n\n"] {
            assert_eq!(Container::of(text.as_bytes(), &[]), None, "{text}");
        }
    }

    #[test]
    fn footers_count_only_if_they_are_whole() {
        for (kind, known) in [(1, None), (2, Some(VpcFixed)), (3, Some(Vpc)), (4, Some(Vpc)), (5, None)] {
            let mut footer = vec![0; 512];
            footer[..8].copy_from_slice(b"conectix");
            footer[VHD_TYPE + 3] = kind;
            let sum: u32 = footer.iter().map(|&b| u32::from(b)).sum();
            footer[VHD_CHECKSUM..VHD_CHECKSUM + 4].copy_from_slice(&(!sum).to_be_bytes());
            assert_eq!(at_end(&footer), known, "{kind}");
            // Of 511 bytes, behind the disk's last one.
            let old = [&[0x5a], &footer[..511]].concat();
            assert_eq!(at_end(&old), known, "{kind}");
            footer[100] = 1;
            assert_eq!(at_end(&footer), None);
        }
        let koly = [b"koly".as_slice(), &[0, 0, 0, 4, 0, 0, 2, 0]].concat();
        assert_eq!(at_end(&koly), Some(Dmg));
        assert_eq!(at_end(b"koly is a name"), None);
    }

    #[test]
    fn a_name_leads_back_to_its_format() {
        for container in [Vmdk, Vdi, Vpc, Vhdx, Qed, Qcow, Parallels, Luks, Dmg, Bochs, Cloop] {
            assert_eq!(Container::from_name(container.name()), Some(container));
        }
        for none in ["raw", "qcow2", "gzip", "nbd", ""] {
            assert_eq!(Container::from_name(none), None);
        }
    }

    #[test]
    fn disks_that_are_raw_are_raw() {
        let mut mbr = vec![0xeb, 0x63, 0x90];
        mbr.resize(510, 0);
        mbr.extend([0x55, 0xaa]);
        let mut iso = vec![0; CONTAINER_HEAD];
        iso[..4].copy_from_slice(b"ER\x02\0");
        for raw in [mbr, iso, Vec::new(), vec![0; CONTAINER_HEAD], b"hello".to_vec()] {
            assert_eq!(Container::of(&raw, &raw[..raw.len().min(CONTAINER_TAIL)]), None);
        }
    }
}

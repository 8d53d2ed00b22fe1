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
}

use Container::{
    Bochs, Bzip2, Cloop, Dmg, Gzip, Luks, Lz4, Parallels, Qcow, Qed, SevenZip, Vdi, Vhdx, Vmdk, Vpc,
    VpcFixed, Xz, Zip, Zstd,
};

/// How many bytes at the start of a file are looked at.
pub const CONTAINER_HEAD: usize = 2048;

/// How many bytes at the end of a file are looked at.
pub const CONTAINER_TAIL: usize = 512;

/// What stands at the very start of a file of each format.
const MAGICS: &[(&[u8], Container)] = &[
    (b"KDMV", Vmdk),
    (b"COWD", Vmdk),
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
    (b"PK\x03\x04", Zip),
    (b"7z\xbc\xaf\x27\x1c", SevenZip),
];

/// Where VDI's signature stands, and the signature.
const VDI: (usize, [u8; 4]) = (0x40, [0x7f, 0x10, 0xda, 0xbe]);

/// In the footer of a VHD: the disk type, its value for a fixed disk, and the checksum.
const VHD_TYPE: usize = 60;
const VHD_FIXED: u32 = 2;
const VHD_CHECKSUM: usize = 64;

impl Container {
    /// The format whose magic stands in the first [`CONTAINER_HEAD`] bytes of a file, or in its last
    /// [`CONTAINER_TAIL`] bytes; fewer if the file is shorter.
    pub fn of(head: &[u8], tail: &[u8]) -> Option<Self> {
        let at_start =
            MAGICS.iter().find(|(magic, _)| head.starts_with(magic)).map(|(_, container)| *container);
        let is_vdi = || head.get(VDI.0..).is_some_and(|rest| rest.starts_with(&VDI.1));
        at_start
            .or_else(|| is_bzip2(head).then_some(Bzip2))
            .or_else(|| is_qcow1(head).then_some(Qcow))
            .or_else(|| is_vdi().then_some(Vdi))
            .or_else(|| is_vmdk_text(head).then_some(Vmdk))
            .or_else(|| is_fixed_vhd(tail).then_some(VpcFixed))
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
        }
    }

    /// The program that unpacks the file, if it is packed.
    pub fn packer(self) -> Option<&'static str> {
        matches!(self, Gzip | Bzip2 | Xz | Zstd | Lz4).then(|| self.name())
    }

    /// Whether a guest may well have written this at the start of its own disk, which has no partitions then, or
    /// whether the disk's bytes stand in the file as they are: an overlay that calls such a file raw is right.
    pub fn may_be_raw(self) -> bool {
        matches!(self, VpcFixed | Luks | Gzip | Bzip2 | Xz | Zstd | Lz4 | Zip | SevenZip | Dmg)
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

/// A footer of a fixed disk, whole: eight letters alone may be a guest's.
fn is_fixed_vhd(tail: &[u8]) -> bool {
    let sum = |bytes: &[u8]| bytes.iter().map(|&b| u32::from(b)).sum::<u32>();
    let others = sum(tail).wrapping_sub(tail.get(VHD_CHECKSUM..VHD_CHECKSUM + 4).map_or(0, sum));
    tail.starts_with(b"conectix")
        && u32_at(tail, VHD_TYPE) == VHD_FIXED
        && u32_at(tail, VHD_CHECKSUM) == !others
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
        let mut vdi = vec![b'<'; 0x40];
        vdi.extend(VDI.1);
        assert_eq!(at_start(&vdi), Some(Vdi));
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
        let mut footer = vec![0; 512];
        footer[..8].copy_from_slice(b"conectix");
        footer[VHD_TYPE + 3] = 2;
        let sum: u32 = footer.iter().map(|&b| u32::from(b)).sum();
        footer[VHD_CHECKSUM..VHD_CHECKSUM + 4].copy_from_slice(&(!sum).to_be_bytes());
        assert_eq!(at_end(&footer), Some(VpcFixed));
        footer[100] = 1;
        assert_eq!(at_end(&footer), None);
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

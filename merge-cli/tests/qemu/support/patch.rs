//! Reading and changing single fields of a qcow2 file, to make what QEMU's tools never write.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use kit::Lab;

const OFFSET: u64 = 0x00ff_ffff_ffff_fe00;

/// A qcow2 file whose fields are changed in place; integers are big-endian.
#[derive(Debug)]
pub(crate) struct Patch {
    file: File,
}

impl Patch {
    /// The image `name` of a lab.
    #[track_caller]
    pub(crate) fn of(lab: &Lab, name: &str) -> Self {
        Self::open(&lab.join(name))
    }

    /// Opens `path`, whatever it holds.
    #[track_caller]
    pub(crate) fn open(path: &Path) -> Self {
        Self { file: OpenOptions::new().read(true).write(true).open(path).unwrap() }
    }

    /// The bytes at `at`.
    pub(crate) fn bytes(&self, at: u64, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.file.read_exact_at(&mut bytes, at).unwrap();
        bytes
    }

    /// Writes bytes at `at`.
    pub(crate) fn write(&self, at: u64, bytes: &[u8]) -> &Self {
        self.file.write_all_at(bytes, at).unwrap();
        self
    }

    /// The 32-bit field at `at`.
    pub(crate) fn u32(&self, at: u64) -> u32 {
        u32::from_be_bytes(self.bytes(at, 4).try_into().unwrap())
    }

    /// The 64-bit field at `at`.
    pub(crate) fn u64(&self, at: u64) -> u64 {
        u64::from_be_bytes(self.bytes(at, 8).try_into().unwrap())
    }

    /// Writes a 32-bit field.
    pub(crate) fn set_u32(&self, at: u64, value: u32) -> &Self {
        self.write(at, &value.to_be_bytes())
    }

    /// Writes a 64-bit field.
    pub(crate) fn set_u64(&self, at: u64, value: u64) -> &Self {
        self.write(at, &value.to_be_bytes())
    }

    /// Sets bits of a 64-bit field.
    pub(crate) fn set_bits(&self, at: u64, bits: u64) -> &Self {
        self.set_u64(at, self.u64(at) | bits)
    }

    /// The length of the file.
    pub(crate) fn len(&self) -> u64 {
        self.file.metadata().unwrap().len()
    }

    /// Cuts or extends the file.
    pub(crate) fn set_len(&self, len: u64) -> &Self {
        self.file.set_len(len).unwrap();
        self
    }

    /// Bytes per cluster.
    pub(crate) fn cluster_size(&self) -> u64 {
        1 << self.u32(20)
    }

    /// The virtual size.
    pub(crate) fn size(&self) -> u64 {
        self.u64(24)
    }

    /// Where the active L1 table lies.
    pub(crate) fn l1_offset(&self) -> u64 {
        self.u64(40)
    }

    /// Where the refcount table lies.
    pub(crate) fn refcount_table_offset(&self) -> u64 {
        self.u64(48)
    }

    /// Where the first refcount block lies.
    pub(crate) fn refcount_block_offset(&self) -> u64 {
        self.u64(self.refcount_table_offset()) & !0x1ff
    }

    /// Where the L1 entry for a guest offset lies; standard L2 entries only.
    pub(crate) fn l1_entry(&self, guest: u64) -> u64 {
        let cluster = self.cluster_size();
        self.l1_offset() + guest / (cluster * (cluster / 8)) * 8
    }

    /// Where the L2 table for a guest offset lies; standard L2 entries only.
    #[track_caller]
    pub(crate) fn l2_table(&self, guest: u64) -> u64 {
        let table = self.u64(self.l1_entry(guest)) & OFFSET;
        assert!(table != 0, "there is no L2 table for {guest:#x}");
        table
    }

    /// Where the L2 entry for a guest offset lies; standard L2 entries only.
    #[track_caller]
    pub(crate) fn l2_entry(&self, guest: u64) -> u64 {
        let cluster = self.cluster_size();
        self.l2_table(guest) + guest / cluster % (cluster / 8) * 8
    }

    /// Where the guest's data lies in the file; standard L2 entries only.
    #[track_caller]
    pub(crate) fn host_offset(&self, guest: u64) -> u64 {
        self.u64(self.l2_entry(guest)) & OFFSET
    }
}

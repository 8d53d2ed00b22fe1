//! Encodes and decodes stamps of files and lists of obsolete files.

use super::bytes::{ByteReader, ByteWriter};
use crate::stamp::{Stamp, Times};
use crate::storage::{Boot, FileId};

/// A file that becomes obsolete with the work, and is removed when the work is done.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct ObsoleteFile {
    /// The file as the work has left it.
    pub file: Stamp,
    /// What it is.
    pub kind: ObsoleteKind,
}

/// What an obsolete file is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum ObsoleteKind {
    /// A layer that bears the mark of the merge.
    Marked,
    /// A layer whose header has no room for a mark.
    Unmarked,
    /// The external data file of the layer before it in the list, or of the image itself.
    DataFile,
}

impl Stamp {
    pub(super) fn encode(&self, out: &mut ByteWriter) {
        out.path(&self.path);
        out.u64(self.id.device);
        out.u64(self.id.inode);
        out.u8(self.is_device.into());
        out.u8(self.file_system.is_some().into());
        out.u64(self.file_system.unwrap_or_default());
        out.u8(self.born_ns.is_some().into());
        out.i128(self.born_ns.unwrap_or_default());
        self.times.encode(out);
        out.u32(self.head_crc);
    }

    pub(super) fn decode(from: &mut ByteReader<'_>) -> Option<Self> {
        let path = from.path()?;
        let id = FileId { device: from.u64()?, inode: from.u64()? };
        let is_device = from.flag()?;
        let (has_file_system, file_system) = (from.flag()?, from.u64()?);
        let (has_birth, born_ns) = (from.flag()?, from.i128()?);
        Some(Self {
            path,
            id,
            is_device,
            file_system: has_file_system.then_some(file_system),
            born_ns: has_birth.then_some(born_ns),
            times: Times::decode(from)?,
            head_crc: from.u32()?,
        })
    }
}

impl ByteWriter {
    pub(super) fn boot(&mut self, boot: Option<Boot>) {
        self.u8(boot.is_some().into());
        self.u64(boot.map_or(0, |boot| boot.id));
        self.i128(boot.map_or(0, |boot| boot.started_ns));
    }
}

impl ByteReader<'_> {
    pub(super) fn boot(&mut self) -> Option<Option<Boot>> {
        let is_known = self.flag()?;
        let boot = Boot { id: self.u64()?, started_ns: self.i128()? };
        Some(is_known.then_some(boot))
    }
}

impl Times {
    pub(super) fn encode(&self, out: &mut ByteWriter) {
        out.u64(self.len);
        out.i128(self.modified_ns);
        out.i128(self.changed_ns);
    }

    pub(super) fn decode(from: &mut ByteReader<'_>) -> Option<Self> {
        Some(Self { len: from.u64()?, modified_ns: from.i128()?, changed_ns: from.i128()? })
    }
}

impl ObsoleteFile {
    pub(super) fn encode(&self, out: &mut ByteWriter) {
        self.file.encode(out);
        out.u8(self.kind as u8);
    }

    pub(super) fn decode(from: &mut ByteReader<'_>) -> Option<Self> {
        let file = Stamp::decode(from)?;
        let kind = match from.u8()? {
            0 => ObsoleteKind::Marked,
            1 => ObsoleteKind::Unmarked,
            2 => ObsoleteKind::DataFile,
            _ => return None,
        };
        Some(Self { file, kind })
    }
}

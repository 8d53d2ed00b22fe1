//! Files as they were when somebody looked, to be known again.

use std::path::PathBuf;

use super::bytes::{Reader, Writer};
use crate::storage::FileId;

/// A file as it was when the journal was made.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// Its absolute path.
    pub path: PathBuf,
    /// Device and inode; a device may get another number when the system starts again.
    pub id: FileId,
    /// Whether it is a block device.
    pub is_device: bool,
    /// Its length in bytes.
    pub len: u64,
    /// When it was last changed, in nanoseconds since 1970.
    pub modified_ns: i128,
    /// The CRC-32 of its first sector.
    pub head_crc: u32,
}

/// A file that nobody needs when the work is done, and that is removed then.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Spent {
    /// The file as the work has left it.
    pub file: Identity,
    /// What it is.
    pub kind: SpentKind,
}

/// What a file is that nobody needs any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SpentKind {
    /// A layer that bears the mark of the merge.
    Marked,
    /// A layer whose header has no room for a mark.
    Unmarked,
    /// The external data file of the layer before it in the list, or of the image itself.
    DataFile,
}

impl Identity {
    /// Whether `now` is the same file with, as far as one can tell, the same content.
    pub fn is_unchanged(&self, now: &Self) -> bool {
        self.is_same_file(now)
            && (self.len, self.modified_ns, self.head_crc) == (now.len, now.modified_ns, now.head_crc)
    }

    /// Whether `now` is the same file: by its inode, or as a device by its path or number.
    pub fn is_same_file(&self, now: &Self) -> bool {
        self.is_device == now.is_device
            && (self.id.inode == now.id.inode || (self.is_device && self.path == now.path))
    }

    /// Whether `now` is the same file under the same name, and nobody has written to it since. A power cut
    /// may have taken the time of the last change, so that an earlier one stands there.
    pub fn is_unwritten(&self, now: &Self) -> bool {
        self.is_same_file(now)
            && self.path == now.path
            && (self.len, self.head_crc) == (now.len, now.head_crc)
            && now.modified_ns <= self.modified_ns
    }

    pub(super) fn encode(&self, out: &mut Writer) {
        out.path(&self.path);
        out.u64(self.id.device);
        out.u64(self.id.inode);
        out.u8(self.is_device.into());
        out.u64(self.len);
        out.put(&self.modified_ns.to_be_bytes());
        out.u32(self.head_crc);
    }

    pub(super) fn decode(from: &mut Reader<'_>) -> Option<Self> {
        Some(Self {
            path: from.path()?,
            id: FileId { device: from.u64()?, inode: from.u64()? },
            is_device: from.flag()?,
            len: from.u64()?,
            modified_ns: from.i128()?,
            head_crc: from.u32()?,
        })
    }
}

impl Spent {
    pub(super) fn encode(&self, out: &mut Writer) {
        self.file.encode(out);
        out.u8(self.kind as u8);
    }

    pub(super) fn decode(from: &mut Reader<'_>) -> Option<Self> {
        let file = Identity::decode(from)?;
        let kind = match from.u8()? {
            0 => SpentKind::Marked,
            1 => SpentKind::Unmarked,
            2 => SpentKind::DataFile,
            _ => return None,
        };
        Some(Self { file, kind })
    }
}

#[cfg(test)]
mod tests {
    use super::super::record::tests::identity;
    use super::*;

    #[test]
    fn a_file_is_known_again() {
        let was = identity("/base");
        assert!(was.is_unchanged(&Identity { path: "/other".into(), ..was.clone() }));
        // Another device number after a restart of the system is no other file.
        assert!(was.is_unchanged(&Identity { id: FileId { device: 8, inode: 9 }, ..was.clone() }));
        assert!(!was.is_unchanged(&Identity { modified_ns: 0, ..was.clone() }));
        assert!(!was.is_same_file(&Identity { id: FileId { device: 7, inode: 8 }, ..was.clone() }));
        let device = Identity { is_device: true, ..was.clone() };
        assert!(device.is_same_file(&Identity { id: FileId { device: 0, inode: 3 }, ..device.clone() }));
    }

    #[test]
    fn a_file_that_was_written_is_known_for_it() {
        let was = identity("/a");
        assert!(was.is_unwritten(&was));
        assert!(was.is_unwritten(&Identity { modified_ns: was.modified_ns - 1, ..was.clone() }));
        for other in [
            Identity { modified_ns: was.modified_ns + 1, ..was.clone() },
            Identity { path: "/b".into(), ..was.clone() },
            Identity { len: was.len + 1, ..was.clone() },
            Identity { head_crc: 0, ..was.clone() },
            Identity { id: FileId { device: 7, inode: 8 }, ..was.clone() },
        ] {
            assert!(!was.is_unwritten(&other), "{other:?}");
        }
    }
}

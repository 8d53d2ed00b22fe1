//! The image under check: its file, and what cluster 0 tells about it.

use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};

use crate::error::{Error, FileOp, Result};
use crate::format::{BitmapsExtension, EXT_CRYPTO, FormatError, Geometry, Header};
use crate::image::Qcow2;
use crate::storage::{Storage, first_unreadable};
use crate::units::HostOffset;

use super::finding::{Structure, Unread};

/// The image under check.
#[derive(Debug)]
pub(crate) struct Subject<'a> {
    pub(crate) path: &'a Path,
    pub(crate) file: &'a dyn Storage,
    pub(crate) header: Header,
    pub(crate) geometry: Geometry,
    pub(crate) bitmaps: Option<BitmapsExtension>,
    /// Where the encryption header lies, and its length in bytes.
    pub(crate) encryption: Option<(HostOffset, u64)>,
    pub(crate) file_len: u64,
    /// The length of the external data file, if the image has one that is open.
    pub(crate) data_len: Option<u64>,
    cancel: Option<&'a AtomicBool>,
}

impl<'a> Subject<'a> {
    /// Reads cluster 0.
    ///
    /// # Errors
    /// A header from which the tables cannot be found; a feature that is not supported; I/O.
    pub(crate) fn open(
        path: &'a Path,
        file: &'a dyn Storage,
        data_file: Option<&dyn Storage>,
        cancel: Option<&'a AtomicBool>,
    ) -> Result<Self> {
        let io = |op, offset| move |source| Error::io(path, op, offset, source);
        let bad = |source: FormatError| Error::format(path, source);
        let file_len = file.size().map_err(io(FileOp::Size, None))?;
        let mut cluster0 = Qcow2::read_cluster0(path, file)?;
        let encryption = cluster0.crypto();
        let encrypted = matches!(cluster0.header.crypt_method, 1 | 2);
        if cluster0.header.crypt_method == 2 && encryption.is_none() {
            let found = "LUKS encryption without a header extension";
            return Err(bad(FormatError::malformed(
                "encryption method",
                0x20,
                found,
                "the extension 0x0537be77",
            )));
        }
        if let Some((host, _)) = encryption
            && !host.is_aligned(cluster0.header.geometry().cluster_size())
        {
            return Err(bad(FormatError::malformed(
                "offset of the encryption header",
                cluster0.extension(EXT_CRYPTO).map_or(0, |extension| extension.offset + 8),
                host,
                "a multiple of the cluster size",
            )));
        }
        if encrypted {
            // Only the data is encrypted: the tables can be checked without a key.
            let is_luks = cluster0.header.crypt_method == 2;
            cluster0.header.crypt_method = 0;
            cluster0.extensions.retain(|extension| !is_luks || extension.magic != EXT_CRYPTO);
        }
        cluster0.validate().map_err(bad)?;
        let bitmaps = cluster0.bitmaps().map_err(bad)?;
        let data_len =
            data_file.map(|file| file.size()).transpose().map_err(io(FileOp::DataFileSize, None))?;
        let header = cluster0.header;
        Ok(Self {
            path,
            file,
            geometry: header.geometry(),
            bitmaps,
            encryption: encryption.filter(|_| encrypted),
            file_len,
            data_len,
            cancel,
            header,
        })
    }

    /// How many clusters the file has, the last one perhaps in part.
    pub(crate) fn file_clusters(&self) -> u64 {
        self.geometry.clusters_for(self.file_len)
    }

    /// The clusters that a range of bytes touches.
    pub(crate) fn clusters(&self, host: u64, len: u64) -> Range<u64> {
        let bits = self.geometry.cluster_bits();
        let end = host.saturating_add(len);
        if len == 0 { host >> bits..host >> bits } else { host >> bits..((end - 1) >> bits) + 1 }
    }

    /// Whether a range of bytes ends a cluster or more behind the end of the file. Less is sound: the file may
    /// end inside the last cluster in use.
    pub(crate) fn is_past_end(&self, host: u64, len: u64) -> bool {
        host.saturating_add(len) >= self.file_len.saturating_add(self.geometry.cluster_size())
    }

    /// Reads part of a structure; bytes behind the end of the file read as zeros.
    pub(crate) fn read(
        &self,
        structure: Structure,
        buf: &mut [u8],
        offset: u64,
    ) -> std::result::Result<(), Unread> {
        self.file.read_exact_or_zero(buf, offset).map_err(|source| {
            let offset = first_unreadable(self.file, offset, buf.len() as u64);
            Unread { structure, offset, source }
        })
    }

    /// Fails with [`Error::Cancelled`] if the caller has asked to stop.
    pub(crate) fn may_go_on(&self) -> Result<()> {
        match self.cancel {
            Some(cancel) if cancel.load(Relaxed) => Err(Error::Cancelled),
            _ => Ok(()),
        }
    }
}

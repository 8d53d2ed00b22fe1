//! An opened qcow2 image.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use super::Lost;
use crate::error::{Error, FileOp, Result};
use crate::format::{Cluster0, FormatError, Geometry, Header, L1Entry, Snapshot, parts, read_be_u64s};
use crate::storage::{FileView, Storage, first_unreadable, read_around};
use crate::units::HostOffset;

/// An opened qcow2 image: its header and its files. Tables are read when they are needed.
#[derive(Debug)]
pub struct Qcow2 {
    path: PathBuf,
    file: Arc<dyn Storage>,
    data_file: Option<Arc<dyn Storage>>,
    /// Whether the data file may be emptied with the image.
    owns_data_file: bool,
    cluster0: Cluster0,
    geometry: Geometry,
    /// Lengths of the image file and the file that holds the data; writers move them.
    file_len: AtomicU64,
    data_len: AtomicU64,
    /// Whether the image is read as QEMU does where it is cut short, and whether that made a difference.
    as_qemu: bool,
    behind_end: AtomicBool,
    /// What cannot be read, if the rest is to be had nevertheless.
    lost: Option<Lost>,
    /// The file as memory, once it was asked for; only a locked file gives one.
    view: OnceLock<Option<FileView>>,
}

impl Qcow2 {
    /// Opens a qcow2 image; see [`super::Image::open`].
    ///
    /// # Errors
    /// As there; also a data file that the header needs and the caller did not give.
    pub(crate) fn open(
        path: &Path,
        file: Arc<dyn Storage>,
        data_file: Option<Arc<dyn Storage>>,
    ) -> Result<Self> {
        let cluster0 = Self::read_cluster0(path, &*file)?;
        cluster0.validate().map_err(|e| Error::format(path, e))?;
        let geometry = cluster0.header.geometry();
        if cluster0.header.has_data_file() && data_file.is_none() {
            return Err(Error::format(
                path,
                FormatError::malformed(
                    "incompatible feature bit 2",
                    parts::INCOMPATIBLE.start as u64,
                    "an external data file",
                    "its name",
                ),
            ));
        }
        let data_file = data_file.filter(|_| cluster0.header.has_data_file());
        let image = Self {
            path: path.to_owned(),
            file,
            data_file,
            owns_data_file: false,
            cluster0,
            geometry,
            file_len: AtomicU64::new(0),
            data_len: AtomicU64::new(0),
            as_qemu: false,
            behind_end: AtomicBool::new(false),
            lost: None,
            view: OnceLock::new(),
        };
        image.refresh_lengths()?;
        Ok(image)
    }

    /// Reads and decodes cluster 0 without judging what it asks for.
    ///
    /// # Errors
    /// A file that cannot be read, or that is not qcow2.
    pub fn read_cluster0(path: &Path, file: &dyn Storage) -> Result<Cluster0> {
        // The smallest cluster first: what lies behind cluster 0 may be on a bad sector, and is none of our business.
        let mut bytes = vec![0; 512];
        let mut filled = 0;
        loop {
            let n = file.read_at(&mut bytes[filled..], filled as u64).map_err(|e| {
                let bad = first_unreadable(file, filled as u64, (bytes.len() - filled) as u64);
                Error::io(path, FileOp::Read, Some(bad), e)
            })?;
            filled += n;
            let want = Header::decode(&bytes[..filled]).map_or(0, |h| h.geometry().cluster_size() as usize);
            if n == 0 || filled >= want {
                bytes.truncate(filled.min(want.max(512)));
                break;
            }
            bytes.resize(want.max(bytes.len()), 0);
        }
        Cluster0::decode(&bytes).map_err(|e| Error::format(path, e))
    }

    /// Says whether the external data file may be emptied when the image is. Without that it stays: only the image names
    /// it, and whoever wrote that may have named any file.
    pub(crate) fn own_data_file(&mut self, owns: bool) {
        self.owns_data_file = owns;
    }

    /// Whether there is an external data file that may be emptied when the image is.
    pub(crate) fn owns_data_file(&self) -> bool {
        self.owns_data_file && self.data_file.is_some()
    }

    /// Reads the lengths of the image's files again, after they grew or shrank.
    ///
    /// # Errors
    /// A length cannot be read.
    pub(crate) fn refresh_lengths(&self) -> Result<()> {
        let io = |e| Error::io(&self.path, FileOp::Size, None, e);
        let file_len = self.file.size().map_err(io)?;
        self.file_len.store(file_len, Ordering::Relaxed);
        self.data_len.store(
            match &self.data_file {
                Some(data) => data.size().map_err(io)?,
                None => file_len,
            },
            Ordering::Relaxed,
        );
        Ok(())
    }

    /// The header.
    pub fn header(&self) -> &Header {
        &self.cluster0.header
    }

    /// The header with its extensions and the backing name.
    pub fn cluster0(&self) -> &Cluster0 {
        &self.cluster0
    }

    /// The sizes that follow from the header.
    pub(crate) fn geometry(&self) -> &Geometry {
        &self.geometry
    }

    /// The size of the guest's disk in bytes: what the header says in whole sectors, rounded down as QEMU does.
    pub fn virtual_size(&self) -> u64 {
        self.cluster0.header.virtual_size()
    }

    /// The image's path, as it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The image file.
    pub(crate) fn file(&self) -> &Arc<dyn Storage> {
        &self.file
    }

    /// The file that holds plain guest data.
    pub(crate) fn data_file(&self) -> &Arc<dyn Storage> {
        self.data_file.as_ref().unwrap_or(&self.file)
    }

    /// Whether plain guest data lies in an external data file.
    pub(crate) fn has_data_file(&self) -> bool {
        self.data_file.is_some()
    }

    /// The length of the image file in bytes, when it was last asked for.
    pub(crate) fn file_len(&self) -> u64 {
        self.file_len.load(Ordering::Relaxed)
    }

    /// Makes the image file at least `len` bytes long: a cluster that is allocated lies inside the file
    /// even where nothing was written to it.
    pub(crate) fn extend_to(&self, len: u64) -> Result<()> {
        if self.file_size()? < len {
            self.file.set_len(len).map_err(|e| Error::io(&self.path, FileOp::Grow, Some(len), e))?;
        }
        Ok(())
    }

    /// The length of the image file now.
    pub(crate) fn file_size(&self) -> Result<u64> {
        self.file.size().map_err(|e| Error::io(&self.path, FileOp::Size, None, e))
    }

    /// The length of the file that holds plain guest data, in bytes.
    pub(super) fn data_len(&self) -> u64 {
        self.data_len.load(Ordering::Relaxed)
    }

    /// Bytes of the image file where they lie in the page cache, if the file is locked and holds them
    /// all. Nothing may be read this way once the file has been cut.
    pub(super) fn mapped(&self, host: HostOffset, len: usize) -> Option<&[u8]> {
        self.view.get_or_init(|| self.file.view()).as_ref()?.bytes(host.get(), len)
    }

    /// Gives the mapping of the file back, before the file is cut.
    pub(crate) fn unmap(&mut self) {
        self.view = OnceLock::new();
    }

    /// Reads a part of a table; what lies behind the end of the file reads as zeros.
    pub(crate) fn read_table(&self, host: HostOffset, buf: &mut [u8]) -> Result<()> {
        read_or_zero(&*self.file, host, buf).map_err(|e| {
            let bad = first_unreadable(&*self.file, host.get(), buf.len() as u64);
            Error::io(&self.path, FileOp::Read, Some(bad), e)
        })
    }

    /// As [`read_table`](Self::read_table); where the image is salvaged, gives the parts that cannot be read, which are zeros
    /// then.
    pub(super) fn read_table_around(&self, host: HostOffset, buf: &mut [u8]) -> Result<Vec<Range<usize>>> {
        match self.read_table(host, buf) {
            Err(_) if self.lost.is_some() => Ok(read_around(&*self.file, buf, host.get())),
            read => read.map(|()| Vec::new()),
        }
    }

    /// Writes a part of the image file's metadata, in use or not.
    pub(crate) fn write(&self, host: HostOffset, bytes: &[u8]) -> Result<()> {
        self.file
            .write_live(bytes, host.get())
            .map_err(|e| Error::io(&self.path, FileOp::Write, Some(host.get()), e))
    }

    /// Writes metadata to which nothing refers yet.
    pub(crate) fn write_new(&self, host: HostOffset, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all_at(bytes, host.get())
            .map_err(|e| Error::io(&self.path, FileOp::Write, Some(host.get()), e))
    }

    /// Goes on with other storages for the image's files, which hold the same image; its header is read
    /// again.
    pub(crate) fn replace_files(
        &mut self,
        file: Arc<dyn Storage>,
        data_file: Option<Arc<dyn Storage>>,
    ) -> Result<()> {
        self.file = file;
        if self.data_file.is_some() {
            self.data_file = data_file;
        }
        self.view = OnceLock::new();
        self.reload_header()?;
        self.refresh_lengths()
    }

    /// A barrier: everything written to the image and its data file is durable when it returns.
    pub(crate) fn barrier(&self) -> Result<()> {
        let io = |e| Error::barrier(&self.path, e);
        if let Some(data) = &self.data_file {
            data.sync().map_err(io)?;
        }
        self.file.sync().map_err(io)
    }

    /// Changes the header and writes the bytes of `changed`, which lie inside one 512-byte sector, in
    /// one piece; the image goes on with the new header.
    pub(crate) fn switch_header(
        &mut self,
        changed: Range<usize>,
        change: impl FnOnce(&mut Header),
    ) -> Result<()> {
        let mut header = self.cluster0.header.clone();
        change(&mut header);
        let bytes = header.encode();
        self.write(HostOffset::new(changed.start as u64), bytes.get(changed).unwrap_or_default())?;
        self.cluster0.header = header;
        Ok(())
    }

    /// Reads cluster 0 again, after it was edited in the file.
    pub(crate) fn reload_header(&mut self) -> Result<()> {
        let cluster0 = Self::read_cluster0(&self.path, &*self.file)?;
        cluster0.validate().map_err(|e| Error::format(&self.path, e))?;
        self.cluster0 = cluster0;
        Ok(())
    }

    /// Goes on with the L1 table and the size of an internal snapshot, which the caller has judged.
    pub(super) fn show_tables_of(&mut self, snapshot: &Snapshot) {
        let header = &mut self.cluster0.header;
        (header.l1_offset, header.l1_entries) = (snapshot.l1_offset, snapshot.l1_entries);
        header.size = snapshot.disk_size.unwrap_or(header.size);
    }

    /// Whether an offset lies inside the image file. A program that writes to the image makes the file longer before a
    /// table refers there, so the length is asked for again before an offset counts as outside.
    ///
    /// # Errors
    /// The length cannot be read.
    pub(super) fn is_inside_file(&self, host: HostOffset) -> Result<bool> {
        if host.get() < self.file_len() {
            return Ok(true);
        }
        let len = self.file_size()?;
        self.file_len.fetch_max(len, Ordering::Relaxed);
        if self.data_file.is_none() {
            self.data_len.fetch_max(len, Ordering::Relaxed);
        }
        Ok(host.get() < len)
    }

    /// Reads the image as QEMU does where it is cut short: what a table places behind the end of the file reads as
    /// zeros, a table there as an empty one; and an entry of an L2 table with no more than the COPIED flag is none.
    pub(crate) fn read_as_qemu(&mut self) {
        self.as_qemu = true;
    }

    /// Has everything be mapped that can be: what a table does not tell, because it cannot be read or is damaged, reads as
    /// zeros and is noted in [`lost`](Self::lost). So is what lies behind the end of the file.
    pub(crate) fn salvage(&mut self) {
        self.lost = Some(Lost::default());
    }

    /// What could not be mapped so far, whoever sees it; only with [`salvage`](Self::salvage).
    pub(crate) fn lost(&self) -> Option<&Lost> {
        self.lost.as_ref()
    }

    /// Whether the image is read as QEMU does where it is cut short.
    pub(super) fn is_read_as_qemu(&self) -> bool {
        self.as_qemu
    }

    /// Notes that something was read as zeros because it lies behind the end of the file.
    pub(super) fn note_behind_end(&self) {
        self.behind_end.store(true, Ordering::Relaxed);
    }

    /// Whether anything was read as zeros because it lies behind the end of the file; only with
    /// [`read_as_qemu`](Self::read_as_qemu).
    pub(crate) fn has_read_behind_end(&self) -> bool {
        self.behind_end.load(Ordering::Relaxed)
    }

    /// Refuses an L1 table with more entries than the file has room for L2 tables: then tables are shared, and a small
    /// file would make a map of any length. In an image that is read as QEMU does, tables behind the end of the file are
    /// zeros, and do not count.
    ///
    /// # Errors
    /// [`Error::Format`]; a table that cannot be read.
    pub(crate) fn check_number_of_tables(&self) -> Result<()> {
        let room = self.file_len().div_ceil(self.geometry.cluster_size());
        let (entries, start) = (u64::from(self.header().l1_entries), self.header().l1_offset);
        if entries <= room {
            return Ok(());
        }
        let (mut tables, mut buf) = (0, Vec::new());
        let piece = 1 << 16;
        for first in (0..entries).step_by(piece) {
            buf.resize((entries - first).min(piece as u64) as usize * 8, 0);
            self.read_table_around(start + first * 8, &mut buf)?;
            let counts = |raw: &u64| match L1Entry::decode(*raw, &self.geometry, 0) {
                Ok(L1Entry::Table { host, .. }) if self.as_qemu => host.get() < self.file_len(),
                Ok(L1Entry::Table { .. }) => true,
                Ok(L1Entry::Unallocated) => false,
                Err(_) => *raw != 0 && self.lost.is_none(),
            };
            tables += read_be_u64s(&buf).filter(counts).count() as u64;
        }
        // A program that writes to the image may have made the file longer meanwhile.
        if tables <= room || tables <= self.file_size()?.div_ceil(self.geometry.cluster_size()) {
            return Ok(());
        }
        let expected = format!("at most {room}, for which the file of {} bytes has room", self.file_len());
        let found = format!("{tables} L2 tables");
        Err(Error::format(&self.path, FormatError::malformed("L1 table", start.get(), found, expected)))
    }

    /// Checks that a table lies inside the file, at least with its first byte.
    pub(crate) fn check_table(&self, what: &str, at: u64, host: HostOffset) -> Result<()> {
        if self.is_inside_file(host)? {
            return Ok(());
        }
        let expected = format!("an offset inside the file of {} bytes", self.file_len());
        Err(Error::format(&self.path, FormatError::malformed(what, at, host, expected)))
    }
}

/// Reads at an offset; what lies behind the end of the file reads as zeros.
pub(crate) fn read_or_zero(file: &dyn Storage, host: HostOffset, buf: &mut [u8]) -> std::io::Result<()> {
    let n = file.read_at(buf, host.get())?;
    if let Some(rest) = buf.get_mut(n..) {
        rest.fill(0);
    }
    Ok(())
}

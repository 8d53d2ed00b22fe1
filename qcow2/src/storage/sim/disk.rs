//! The simulated disk: files in memory that remember, and that fail when they are told to.

use std::collections::BTreeSet;
use std::io::{self, ErrorKind};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::SECTOR;
use super::faults::{Action, Fault, FaultKind, Faults};
use super::record::{DiskOp, fragments};
use super::state::State;
use crate::error::Holder;
use crate::storage::{
    Access, Boot, CopyError, FileId, FileKind, FileStat, Host, LockError, LockMode, MemHost, NameKind,
    Storage,
};

/// What a hole that was made holds afterwards: blocks that were given back may hold anything, so nobody may
/// count on zeros.
const HOLE: u8 = 0xa5;

/// A namespace of files in memory that remembers. Clones share it.
#[derive(Clone, Debug)]
pub struct SimHost {
    host: MemHost,
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    start: State,
    journal: Mutex<DiskLog>,
}

/// What was done, and what will fail.
#[derive(Debug, Default)]
struct DiskLog {
    log: Vec<DiskOp>,
    faults: Faults,
    devices: BTreeSet<u64>,
}

/// One open of a file of a [`SimHost`].
#[derive(Debug)]
pub struct SimFile {
    inode: u64,
    file: Arc<dyn Storage>,
    shared: Arc<Shared>,
}

impl Shared {
    fn journal(&self) -> MutexGuard<'_, DiskLog> {
        self.journal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Fails if it is this operation's turn to.
    fn strike(&self, action: Action) -> io::Result<()> {
        self.journal().strike(action)
    }
}

impl DiskLog {
    fn strike(&mut self, action: Action) -> io::Result<()> {
        self.faults.strike(action).map_or(Ok(()), |kind| Err(kind.error()))
    }
}

impl SimHost {
    /// A disk that holds these files, all of them durable.
    pub fn new(start: &State) -> Self {
        let shared = Shared { start: start.clone(), journal: Mutex::default() };
        Self { host: start.host(), shared: Arc::new(shared) }
    }

    /// A disk that holds the files of a host, which does not see what becomes of them.
    pub fn over(host: &MemHost) -> Self {
        Self::new(&State::of(host))
    }

    /// The disk as it was when it was made.
    pub fn start(&self) -> &State {
        &self.shared.start
    }

    /// The disk as programs see it now, durable or not.
    pub fn now(&self) -> State {
        State::of(&self.host)
    }

    /// What was done so far.
    pub fn log(&self) -> Vec<DiskOp> {
        self.shared.journal().log.clone()
    }

    /// Puts a mark into the log.
    pub fn note(&self, what: &'static str) {
        self.shared.journal().log.push(DiskOp::Note(what));
    }

    /// Makes operations fail from now on; counting begins anew.
    pub fn fail(&self, fault: Option<Fault>) {
        self.shared.journal().faults.set(fault);
    }

    /// How many operations have failed since [`SimHost::fail`].
    pub fn failed(&self) -> u64 {
        self.shared.journal().faults.fired
    }

    /// How many operations that can fail so there have been since [`SimHost::fail`].
    pub fn seen(&self) -> u64 {
        self.shared.journal().faults.seen
    }

    /// Makes a file a block device: its length never changes, and it has no holes.
    ///
    /// # Errors
    /// There is no such file.
    pub fn make_device(&self, path: &Path) -> io::Result<()> {
        let inode = self.host.stat(path)?.id.inode;
        self.shared.journal().devices.insert(inode);
        Ok(())
    }

    /// Sets a file's time of modification, as [`MemHost::set_modified`].
    ///
    /// # Errors
    /// There is no such file.
    pub fn set_modified(&self, path: &Path, modified_ns: i128) -> io::Result<()> {
        self.host.set_modified(path, modified_ns)
    }

    /// Makes a file one that was written later, as [`MemHost::write_later`].
    ///
    /// # Errors
    /// There is no such file.
    pub fn write_later(&self, path: &Path, later_ns: u64) -> io::Result<()> {
        self.host.write_later(path, later_ns)
    }

    fn file(&self, file: Arc<dyn Storage>) -> io::Result<Arc<dyn Storage>> {
        let inode = file.stat()?.id.inode;
        Ok(Arc::new(SimFile { inode, file, shared: Arc::clone(&self.shared) }))
    }

    /// Changes names, if the change does not fail.
    fn rename_with(
        &self,
        from: &Path,
        to: &Path,
        rename: impl FnOnce(&MemHost) -> io::Result<()>,
    ) -> io::Result<()> {
        let mut journal = self.shared.journal();
        journal.strike(Action::Change)?;
        let file = self.host.stat(from)?.id.inode;
        let (from, to) = (self.host.canonicalize(from)?, named(to));
        rename(&self.host)?;
        journal.log.push(DiskOp::Rename { from, to, file });
        Ok(())
    }
}

/// The name from the root.
fn named(path: &Path) -> PathBuf {
    Path::new("/").join(path)
}

impl Host for SimHost {
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn Storage>> {
        self.shared.strike(Action::Open)?;
        self.file(self.host.open(path, access)?)
    }

    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn Storage>> {
        let mut journal = self.shared.journal();
        journal.strike(Action::Create)?;
        let file = self.host.create_new(path)?;
        let inode = file.stat()?.id.inode;
        let at = changed(&*file)?;
        journal.log.push(DiskOp::Create { path: named(path), file: inode, at });
        drop(journal);
        self.file(file)
    }

    fn stat(&self, path: &Path) -> io::Result<FileStat> {
        self.shared.strike(Action::Look)?;
        let stat = self.host.stat(path)?;
        Ok(self.shared.journal().as_device(stat))
    }

    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        self.shared.strike(Action::Look)?;
        self.host.canonicalize(path)
    }

    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.shared.strike(Action::Open)?;
        self.host.list(dir)
    }

    fn name_kind(&self, path: &Path) -> io::Result<NameKind> {
        self.shared.strike(Action::Look)?;
        self.host.name_kind(path)
    }

    fn links(&self, path: &Path) -> io::Result<u64> {
        self.shared.strike(Action::Look)?;
        self.host.links(path)
    }

    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.rename_with(from, to, |host| host.rename(from, to))
    }

    fn rename_new(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.rename_with(from, to, |host| host.rename_new(from, to))
    }

    fn unlink(&self, path: &Path) -> io::Result<()> {
        let mut journal = self.shared.journal();
        journal.strike(Action::Change)?;
        self.host.unlink(path)?;
        journal.log.push(DiskOp::Unlink { path: named(path) });
        Ok(())
    }

    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        let mut journal = self.shared.journal();
        journal.strike(Action::Sync)?;
        self.host.sync_dir(dir)?;
        journal.log.push(DiskOp::SyncDir { dir: named(dir) });
        Ok(())
    }

    fn free_space(&self, path: &Path) -> io::Result<Option<u64>> {
        self.shared.strike(Action::Look)?;
        self.host.free_space(path)
    }

    fn boot(&self) -> Option<Boot> {
        self.host.boot()
    }

    fn holders(&self, id: FileId) -> Vec<Holder> {
        self.host.holders(id)
    }
}

impl DiskLog {
    fn as_device(&self, stat: FileStat) -> FileStat {
        let device = self.devices.contains(&stat.id.inode);
        if device { FileStat { kind: FileKind::Block, ..stat } } else { stat }
    }

    fn is_device(&self, inode: u64) -> bool {
        self.devices.contains(&inode)
    }
}

impl SimFile {
    /// Writes, with the parts of sectors noted; a short write does half of it.
    fn put(
        &self,
        journal: &mut DiskLog,
        bytes: &[u8],
        offset: u64,
        fault: Option<FaultKind>,
    ) -> io::Result<()> {
        let bytes = match fault {
            // Inside a sector, the page cache takes all or nothing.
            Some(FaultKind::Short) => {
                let end = (offset + bytes.len() as u64 / 2) / SECTOR * SECTOR;
                bytes.get(..end.saturating_sub(offset) as usize).unwrap_or_default()
            }
            Some(kind) => return Err(kind.error()),
            None => bytes,
        };
        if journal.is_device(self.inode) && offset + bytes.len() as u64 > self.file.size()? {
            return Err(FaultKind::NoSpace.error());
        }
        self.file.write_all_at(bytes, offset)?;
        // No other change of any file has the same time.
        let call = changed(&*self.file)?;
        journal.log.extend(fragments(self.inode, call, offset, bytes));
        fault.map_or(Ok(()), |kind| Err(kind.error()))
    }
}

impl Storage for SimFile {
    fn size(&self) -> io::Result<u64> {
        self.shared.strike(Action::Look)?;
        self.file.size()
    }

    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.shared.strike(Action::Look)?;
        self.file.read_at(buf, offset)
    }

    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut journal = self.shared.journal();
        let fault = journal.faults.strike(Action::Write);
        self.put(&mut journal, buf, offset, fault)
    }

    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_all_at(&vec![0; length(len)?], offset)
    }

    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        let mut journal = self.shared.journal();
        journal.strike(Action::Change)?;
        if journal.is_device(self.inode) {
            return Ok(());
        }
        self.put(&mut journal, &vec![HOLE; length(len)?], offset, None)
    }

    fn copy_from(
        &self,
        src: &dyn Storage,
        src_offset: u64,
        dst_offset: u64,
        len: u64,
    ) -> Result<(), CopyError> {
        let mut bytes = vec![0; length(len).map_err(CopyError::write(dst_offset))?];
        let read = src.read_exact_or_zero(&mut bytes, src_offset);
        read.map_err(|source| CopyError::Read { offset: src_offset, source })?;
        self.write_all_at(&bytes, dst_offset).map_err(CopyError::write(dst_offset))
    }

    fn set_len(&self, len: u64) -> io::Result<()> {
        let mut journal = self.shared.journal();
        let old = self.file.size()?;
        journal.strike(if len > old { Action::Grow } else { Action::Change })?;
        if journal.is_device(self.inode) {
            return if len > old { Err(ErrorKind::InvalidInput.into()) } else { Ok(()) };
        }
        self.file.set_len(len)?;
        journal.log.push(DiskOp::SetLen { file: self.inode, len, at: changed(&*self.file)? });
        Ok(())
    }

    fn sync(&self) -> io::Result<()> {
        let mut journal = self.shared.journal();
        let fault = journal.faults.strike(Action::Sync);
        journal.log.push(DiskOp::Sync { file: self.inode, done: fault.is_none() });
        fault.map_or(Ok(()), |kind| Err(kind.error()))
    }

    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.shared.strike(Action::Look)?;
        self.file.next_data(offset)
    }

    fn stat(&self) -> io::Result<FileStat> {
        self.shared.strike(Action::Look)?;
        let stat = self.file.stat()?;
        Ok(self.shared.journal().as_device(stat))
    }

    fn lock(&self, mode: LockMode) -> Result<(), LockError> {
        self.shared.strike(Action::Look)?;
        self.file.lock(mode)
    }

    fn used_by_others(&self) -> io::Result<Option<LockMode>> {
        self.shared.strike(Action::Look)?;
        self.file.used_by_others()
    }

    fn drop_cache(&self) -> io::Result<()> {
        self.shared.strike(Action::Look)
    }
}

/// When a file was last changed.
fn changed(file: &dyn Storage) -> io::Result<u64> {
    Ok(u64::try_from(file.stat()?.changed_ns).unwrap_or(0))
}

/// The length of a write, which is held in memory.
fn length(len: u64) -> io::Result<usize> {
    usize::try_from(len).map_err(|_| ErrorKind::InvalidInput.into())
}

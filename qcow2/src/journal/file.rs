//! The file of a journal: a header, and two slots that records take in turn.
//!
//! A new record overwrites the one before the last. That happens only when the last record is durable, and its
//! blocks are durable in the image. So at any time one of the slots holds all blocks that a power cut may tear.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::record::{
    BLOCK, Block, ENVELOPE, Header, ObsoleteFile, Phase, Record, VERSION, header_len, other_version,
    record_len, record_room,
};
use crate::error::{Error, FileOp, Refusal, Result};
use crate::stamp::Times;
use crate::storage::{Access, Boot, FileKind, Host, LockError, LockMode, Owner, Place, Storage};

/// The ending of the name of a journal that is still being made.
pub(super) const NEW: &str = ".new";

/// How often a sign of life is written.
const BEAT_EVERY: Duration = Duration::from_millis(200);

/// An open journal.
#[derive(Debug)]
pub(crate) struct Journal {
    place: Place,
    path: PathBuf,
    file: Arc<dyn Storage>,
    header: Header,
    /// The length of the header, in bytes. Behind it are a block for the sign of life, and the records.
    header_len: u64,
    state: Mutex<JournalState>,
    /// The obsolete files that every new record lists.
    obsolete: Mutex<Option<Vec<ObsoleteFile>>>,
    /// The target files, and their times when they were last looked at.
    watched: Mutex<WatchedTargets>,
    /// This run of the system.
    boot: Option<Boot>,
    opened: Instant,
    /// When the last sign of life was written, in milliseconds since `opened`.
    beaten: AtomicU64,
    /// A write or a barrier has failed, in the journal or for the blocks of the last record. Nothing more is
    /// written then.
    failed: AtomicBool,
}

/// The targets of a journal as files, and their times behind the last barrier.
#[derive(Debug, Default)]
struct WatchedTargets {
    files: Vec<Arc<dyn Storage>>,
    known: Vec<Times>,
}

/// The progress of the work.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct JournalState {
    pub(crate) phase: Phase,
    pub(crate) watermark: u64,
    pub(crate) done: u64,
    /// Whether a torn header was mended since the work went on, in a file that may be another one than the
    /// work's.
    is_doubtful: bool,
    sequence: u64,
}

impl JournalState {
    fn of(last: &Record) -> Self {
        let Record { phase, watermark, done, is_doubtful, sequence, .. } = *last;
        Self { phase, watermark, done, is_doubtful, sequence }
    }
}

impl Journal {
    /// Makes a journal at `place`, in place of any that is there. It is durable afterwards.
    ///
    /// # Errors
    /// The system's; paths that are too long for a header; [`Refusal::Stranger`] if somebody who may not write
    /// the targets has put a file at the name under which the journal is made.
    pub(crate) fn create(host: &dyn Host, place: &Place, header: Header) -> Result<Self> {
        Self::make(host, place, header, false)
    }

    /// As [`Journal::create`], for an image whose dirty bit earlier work has set. The new journal says so from
    /// the moment that it has its name.
    ///
    /// # Errors
    /// As [`Journal::create`].
    pub(crate) fn take_over(host: &dyn Host, place: &Place, header: Header) -> Result<Self> {
        Self::make(host, place, header, true)
    }

    fn make(host: &dyn Host, place: &Place, header: Header, begun: bool) -> Result<Self> {
        let path = &place.path();
        let failed = |op| move |e| Error::io(path, op, None, e);
        let bytes = header.encode().ok_or_else(|| {
            Error::Usage(format!("{}: the names of the layers are too long for a journal", path.display()))
        })?;
        // The file is complete before it gets its name, so that the name never leads to half a journal.
        let mut fresh = place.name().to_owned();
        fresh.push(NEW);
        let fresh = place.beside(fresh);
        clear(host, &fresh, &header)?;
        let file = fresh.create(host).map_err(failed(FileOp::Create))?;
        let journal = Self::with(host, place, file, header, bytes.len());
        journal.hold(host)?;
        let written = journal.file.write_all_at(&bytes, 0).and_then(|()| {
            if !begun {
                return journal.file.sync();
            }
            let mut state = journal.turn();
            state.phase = Phase::Moving;
            journal.append(&mut state, 0, 0, false, Vec::new())
        });
        if let Err(e) = written.and_then(|()| fresh.rename(host, place.name())) {
            // The first error is the one that counts.
            let _ = fresh.unlink(host);
            return Err(failed(FileOp::Create)(e));
        }
        sync_folder(host, place)?;
        Ok(journal)
    }

    /// Makes a journal at `place` with one record. The record holds `blocks` of the only target, which is `len`
    /// bytes long with them. The content is durable afterwards, the name is not.
    ///
    /// # Errors
    /// As [`Journal::create`].
    pub(super) fn create_with(
        host: &dyn Host,
        place: &Place,
        header: Header,
        blocks: Vec<Block>,
        len: u64,
    ) -> Result<Self> {
        let path = &place.path();
        let failed = |e| Error::io(path, FileOp::Create, None, e);
        clear(host, place, &header)?;
        let bytes = header.encode().ok_or_else(|| failed(io::ErrorKind::InvalidFilename.into()))?;
        let file = place.create(host).map_err(failed)?;
        file.write_all_at(&bytes, 0).map_err(failed)?;
        let journal = Self::with(host, place, file, header, bytes.len());
        let mut state = journal.turn();
        state.phase = Phase::Moving;
        journal.append(&mut state, 0, len, false, blocks).map_err(failed)?;
        drop(state);
        Ok(journal)
    }

    /// Opens the journal at `place`, with its last record if there is one; `None` if there is no journal. The
    /// caller must find out whether it may be believed: see [`Journal::owner`].
    ///
    /// # Errors
    /// The system's; [`Refusal::JournalVersion`].
    pub(crate) fn open(
        host: &dyn Host,
        place: &Place,
        access: Access,
    ) -> Result<Option<(Self, Option<Record>)>> {
        let path = &place.path();
        let failed = |op| move |e| Error::io(path, op, None, e);
        let stat = match place.stat(host) {
            Ok(stat) => stat,
            Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(failed(FileOp::Stat)(e)),
        };
        if stat.kind != FileKind::Regular {
            return Ok(None);
        }
        let file = place.open(host, access).map_err(failed(FileOp::Open))?;
        let stat = file.stat().map_err(failed(FileOp::Stat))?;
        if stat.kind != FileKind::Regular {
            return Ok(None);
        }
        let mut magic = [0; 8];
        file.read_exact_or_zero(&mut magic, 0).map_err(failed(FileOp::Read))?;
        if let Some(version) = other_version(&magic) {
            return Err(Error::refused(path, Refusal::JournalVersion { version, expected: VERSION }));
        }
        let Some(bytes) = piece(&*file, 0, header_len).map_err(failed(FileOp::Read))? else {
            return Ok(None);
        };
        let Some(header) = Header::parse(&bytes) else { return Ok(None) };
        let mut journal = Self::with(host, place, file, header, bytes.len());
        let mut last: Option<Record> = None;
        for place in [0, 1] {
            let bytes =
                piece(&*journal.file, journal.record_at(place), record_len).map_err(failed(FileOp::Read))?;
            let record = bytes.and_then(|bytes| Record::parse(&bytes, journal.header.nonce));
            if let Some(record) = record.filter(|r| usize::from(r.target) < journal.header.targets.len())
                && last.as_ref().is_none_or(|last| last.sequence < record.sequence)
            {
                last = Some(record);
            }
        }
        if let Some(last) = &last {
            journal.state = Mutex::new(JournalState::of(last));
            journal.obsolete = Mutex::new(last.obsolete.clone());
            journal.watched = Mutex::new(WatchedTargets { files: Vec::new(), known: last.known.clone() });
        }
        Ok(Some((journal, last)))
    }

    fn with(
        host: &dyn Host,
        place: &Place,
        file: Arc<dyn Storage>,
        header: Header,
        header_len: usize,
    ) -> Self {
        let state =
            JournalState { phase: Phase::Arming, watermark: 0, done: 0, is_doubtful: false, sequence: 0 };
        Self {
            path: place.path(),
            place: place.clone(),
            file,
            header,
            header_len: header_len as u64,
            state: Mutex::new(state),
            obsolete: Mutex::default(),
            watched: Mutex::default(),
            boot: host.boot(),
            opened: Instant::now(),
            beaten: AtomicU64::new(0),
            failed: AtomicBool::new(false),
        }
    }

    /// Locks the journal as long as it is open, so that no other process takes it over or removes it. On a file
    /// system without locks, only the image's lock protects it.
    ///
    /// # Errors
    /// [`Error::InUse`] if somebody else holds it.
    pub(crate) fn hold(&self, host: &dyn Host) -> Result<()> {
        match self.file.lock(LockMode::Write) {
            Err(LockError::Held { .. }) => Err(self.in_use(host)),
            Ok(()) | Err(LockError::Io(_)) => Ok(()),
        }
    }

    /// Whether another process works under this journal. On a file system without locks, the answer is always
    /// no.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn is_held(&self) -> Result<bool> {
        let mode = self.file.used_by_others().map_err(|e| Error::io(&self.path, FileOp::Lock, None, e))?;
        Ok(mode.is_some())
    }

    /// The error for a journal under which another process works.
    pub(crate) fn in_use(&self, host: &dyn Host) -> Error {
        let holders = self.file.stat().map(|stat| host.holders(stat.id)).unwrap_or_default();
        Error::InUse { path: self.path.clone(), holders }
    }

    /// Sets the files of the targets: from now on each record notes their times behind the last barrier.
    pub(crate) fn watch(&self, files: Vec<Arc<dyn Storage>>) {
        self.watched().files = files;
    }

    fn watched(&self) -> MutexGuard<'_, WatchedTargets> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the present times of the targets.
    fn look(&self) -> io::Result<()> {
        let mut watched = self.watched();
        if !watched.files.is_empty() {
            let stats = watched.files.iter().map(|file| Ok(Times::of(&file.stat()?)));
            watched.known = stats.collect::<io::Result<_>>()?;
        }
        Ok(())
    }

    /// The offset of the sign of life, in bytes.
    fn beat_place(&self) -> u64 {
        self.header_len.next_multiple_of(BLOCK)
    }

    /// The offset of the slot for the record with this number: one is for even numbers, one for odd.
    fn record_at(&self, sequence: u64) -> u64 {
        // Room for the list of obsolete files: it names no files but those of the header.
        let room = record_room(self.max_blocks()) + ENVELOPE + 2 * self.header_len as usize;
        self.beat_place() + BLOCK + sequence % 2 * (room as u64).next_multiple_of(BLOCK)
    }

    /// The most blocks that a record has.
    pub(super) fn max_blocks(&self) -> usize {
        self.header.max_blocks as usize
    }

    /// Where it lies.
    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// What it is about.
    pub(crate) fn header(&self) -> &Header {
        &self.header
    }

    /// Locks the journal for one writer, who first writes a record and then its blocks in place. The records of
    /// two files must not mix: a record may be overwritten only when its blocks are in place.
    pub(super) fn turn(&self) -> MutexGuard<'_, JournalState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The progress of the work.
    pub(crate) fn state(&self) -> JournalState {
        *self.turn()
    }

    /// The files to be removed when the work is done, as in the last record.
    pub(crate) fn obsolete(&self) -> Option<Vec<ObsoleteFile>> {
        self.obsolete.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Sets the files to be removed when the work is done. They are in the journal from the next record on.
    pub(crate) fn set_obsolete(&self, obsolete: Option<Vec<ObsoleteFile>>) {
        *self.obsolete.lock().unwrap_or_else(PoisonError::into_inner) = obsolete;
    }

    /// When the file was last written, in nanoseconds since 1970.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn modified_ns(&self) -> Result<i128> {
        let stat = self.file.stat().map_err(|e| Error::io(&self.path, FileOp::Stat, None, e))?;
        Ok(stat.modified_ns)
    }

    /// Sets the phase. It is in the journal from the next record on.
    pub(crate) fn enter(&self, phase: Phase) {
        self.turn().phase = phase;
    }

    /// Notes durably that the work is in `phase`, that everything below the guest offset `watermark` is done,
    /// and how many bytes were written for that. Everything written to the targets before must be durable.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn note(&self, phase: Phase, watermark: u64, done: u64) -> Result<()> {
        let mut state = self.turn();
        (state.phase, state.watermark, state.done) = (phase, watermark, done);
        // By now a doubtful file was proved to be the right one, or the doubt does not matter any more.
        state.is_doubtful = false;
        let noted = self.look().and_then(|()| self.append(&mut state, 0, 0, false, Vec::new()));
        noted.map_err(|e| Error::io(&self.path, FileOp::Write, None, e))
    }

    /// Notes durably that the blocks of the last record were written to the first target again, so that its new
    /// times count as the work's own. With `is_doubtful`, the target may be another file than the work's, and
    /// its times prove nothing from now on.
    ///
    /// # Errors
    /// The system's.
    pub(super) fn note_healed(&self, target: &dyn Storage, last: &Record, is_doubtful: bool) -> Result<()> {
        let failed = |op| move |e| Error::io(&self.path, op, None, e);
        let times = Times::of(&target.stat().map_err(failed(FileOp::Stat))?);
        if let Some(known) = self.watched().known.first_mut() {
            *known = times;
        }
        let mut state = self.turn();
        state.is_doubtful |= is_doubtful;
        self.append(&mut state, last.target, last.len, last.stopped, last.blocks.clone())
            .map_err(failed(FileOp::Write))
    }

    /// Notes that the work stops in good order, with the targets as they are now.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn stop(&self) -> Result<()> {
        let mut state = self.turn();
        let noted = self.look().and_then(|()| self.append(&mut state, 0, 0, true, Vec::new()));
        noted.map_err(|e| Error::io(&self.path, FileOp::Write, None, e))
    }

    /// Writes a record durably.
    pub(super) fn append(
        &self,
        state: &mut JournalState,
        target: u8,
        len: u64,
        stopped: bool,
        blocks: Vec<Block>,
    ) -> io::Result<()> {
        let record = Record {
            nonce: self.header.nonce,
            sequence: state.sequence + 1,
            phase: state.phase,
            watermark: state.watermark,
            done: state.done,
            stopped,
            known: self.watched().known.clone(),
            is_doubtful: state.is_doubtful,
            boot: self.boot,
            obsolete: self.obsolete(),
            target,
            len,
            blocks,
        };
        if self.failed.load(Relaxed) {
            return Err(io::Error::other("an earlier write to the journal, or under it, failed"));
        }
        let written = self
            .file
            .write_all_at(&record.encode(), self.record_at(record.sequence))
            .and_then(|()| self.file.sync());
        written.inspect_err(|_| self.failed.store(true, Relaxed))?;
        state.sequence = record.sequence;
        Ok(())
    }

    /// Notes that blocks of the last record could not be written in place. No record may follow: only this one
    /// can mend the blocks after a power cut.
    pub(super) fn fail(&self) {
        self.failed.store(true, Relaxed);
    }

    /// Writes a sign of life if it is due: the file's time of modification shows until when the work was
    /// running.
    pub(super) fn beat(&self) {
        let now = u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX);
        let last = self.beaten.load(Relaxed);
        let due = now.saturating_sub(last) >= BEAT_EVERY.as_millis() as u64;
        if due
            && !self.failed.load(Relaxed)
            && self.beaten.compare_exchange(last, now, Relaxed, Relaxed).is_ok()
        {
            self.sign(now);
        }
    }

    /// Writes a sign of life even if none is due: behind a barrier, which may have taken long.
    pub(super) fn beat_now(&self) {
        self.beaten.store(u64::try_from(self.opened.elapsed().as_millis()).unwrap_or(u64::MAX), Relaxed);
        self.sign(self.beaten.load(Relaxed));
    }

    fn sign(&self, now: u64) {
        // An error is harmless: without the sign, the work may be refused where it could have gone on.
        let _ = self.file.write_all_at(&now.to_be_bytes(), self.beat_place());
    }

    /// The owner of the file.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn owner(&self) -> Result<Owner> {
        let stat = self.file.stat().map_err(|e| Error::io(&self.path, FileOp::Stat, None, e))?;
        Ok(stat.owner)
    }

    /// Removes the file durably, unless its name leads to another file by now.
    ///
    /// # Errors
    /// The system's.
    pub(crate) fn remove(&self, host: &dyn Host) -> Result<()> {
        self.remove_name(host)?;
        sync_folder(host, &self.place)
    }

    /// As [`Journal::remove`], but not durable yet.
    pub(super) fn remove_name(&self, host: &dyn Host) -> Result<()> {
        let removed = self.place.unlink_file(host, &*self.file);
        removed.map(drop).map_err(|e| Error::io(&self.path, FileOp::Remove, None, e))
    }

    /// Where it lies.
    pub(super) fn place(&self) -> &Place {
        &self.place
    }
}

/// The bytes of the envelope at `at`, as long as its head announces; `None` if there is no envelope.
fn piece(file: &dyn Storage, at: u64, len: impl Fn(&[u8]) -> Option<usize>) -> io::Result<Option<Vec<u8>>> {
    let mut head = [0; ENVELOPE];
    file.read_exact_or_zero(&mut head, at)?;
    let size = file.size()?;
    let Some(len) = len(&head).filter(|&len| at.saturating_add(len as u64) <= size) else {
        return Ok(None);
    };
    let mut bytes = vec![0; len];
    file.read_exact_or_zero(&mut bytes, at)?;
    Ok(Some(bytes))
}

/// Makes the names in the folder of a place durable.
pub(super) fn sync_folder(host: &dyn Host, place: &Place) -> Result<()> {
    let folder = place.folder();
    host.sync_folder(folder).map_err(|e| Error::barrier(folder.path(), e))
}

/// Removes a file that earlier work has left where a journal is going to be made. It must belong to the caller,
/// to root, or to somebody who may write the journal's targets.
///
/// # Errors
/// [`Refusal::Stranger`] for a file that is not ours to remove; the system's.
fn clear(host: &dyn Host, place: &Place, header: &Header) -> Result<()> {
    let path = place.path();
    let owner = match place.stat(host) {
        Ok(stat) => stat.owner,
        Err(e) if e.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(e) => return Err(Error::io(&path, FileOp::Stat, None, e)),
    };
    let is_ours = [0, host.user()].contains(&owner.user);
    if !is_ours && !may_speak_for_all(host, &owner, header)? {
        return Err(Error::refused(&path, Refusal::Stranger { file: path.clone(), user: owner.user }));
    }
    place.unlink(host).map_err(|e| Error::io(&path, FileOp::Remove, None, e))
}

/// Whether a file of `owner` may speak for every target of a journal.
fn may_speak_for_all(host: &dyn Host, owner: &Owner, header: &Header) -> Result<bool> {
    for target in &header.targets {
        let stat = host.stat(&target.path).map_err(|e| Error::io(&target.path, FileOp::Stat, None, e))?;
        if !owner.may_speak_for(&stat.owner, host.user()) {
            return Ok(false);
        }
    }
    Ok(!header.targets.is_empty())
}

#[cfg(test)]
#[path = "file_tests.rs"]
pub(crate) mod tests;

//! Power cuts at every point of a commit: of what was not yet synced, each 512-byte sector may be missing.
//! What the guest sees must be there in every state, base must be free of corruption, and the same
//! commit must go on.

use std::collections::BTreeMap;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, Mutex};

use super::testing::{Dice, Silent, local, random_chain};
use super::{BaseChoice, Commit, CommitOptions};
use crate::chain::Chain;
use crate::chain::view::View;
use crate::check::{CheckOptions, check};
use crate::error::Holder;
use crate::format::is_qcow2;
use crate::image::bitmaps::tests::{ok, qemu};
use crate::image::{ClusterCache, CreateOptions, create, create_raw};
use crate::merge::put;
use crate::storage::{Access, FileId, FileStat, Host, LockError, LockMode, MemHost, Storage};
use crate::units::GuestOffset;

const SECTOR: usize = 512;

/// What was done to a file; writes are cut into sectors.
#[derive(Clone, Debug)]
pub(super) enum Op {
    Write(u64, Vec<u8>),
    SetLen(u64),
    Sync,
}

pub(super) type Log = Arc<Mutex<Vec<(PathBuf, Op)>>>;

/// A host that remembers what was done to its files.
#[derive(Clone, Debug)]
pub(super) struct Recorder {
    pub(super) host: MemHost,
    pub(super) log: Log,
}

/// An open file of a [`Recorder`].
#[derive(Debug)]
struct Recorded {
    path: PathBuf,
    file: Arc<dyn Storage>,
    log: Log,
}

impl Recorded {
    fn note(&self, op: Op) {
        self.log.lock().unwrap().push((self.path.clone(), op));
    }
}

impl Storage for Recorded {
    fn size(&self) -> io::Result<u64> {
        self.file.size()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.file.read_at(buf, offset)
    }
    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        let mut at = 0;
        while at < buf.len() {
            let host = offset + at as u64;
            let len = (SECTOR - host as usize % SECTOR).min(buf.len() - at);
            self.note(Op::Write(host, buf[at..at + len].to_vec()));
            at += len;
        }
        self.file.write_all_at(buf, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.write_all_at(&vec![0; len as usize], offset)?;
        self.file.write_zeroes(offset, len)
    }
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        // What is given back may hold anything afterwards.
        self.write_all_at(&vec![0xa5; len as usize], offset)
    }
    fn copy_from(&self, src: &dyn Storage, src_offset: u64, dst_offset: u64, len: u64) -> io::Result<()> {
        let mut bytes = vec![0; len as usize];
        src.read_exact_or_zero(&mut bytes, src_offset)?;
        self.write_all_at(&bytes, dst_offset)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.note(Op::SetLen(len));
        self.file.set_len(len)
    }
    fn sync(&self) -> io::Result<()> {
        self.note(Op::Sync);
        Ok(())
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.file.next_data(offset)
    }
    fn stat(&self) -> io::Result<FileStat> {
        self.file.stat()
    }
    fn lock(&self, mode: LockMode) -> Result<(), LockError> {
        self.file.lock(mode)
    }
    fn used_by_others(&self) -> io::Result<Option<LockMode>> {
        self.file.used_by_others()
    }
    fn drop_cache(&self) -> io::Result<()> {
        Ok(())
    }
}

impl Host for Recorder {
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn Storage>> {
        let file = self.host.open(path, access)?;
        Ok(Arc::new(Recorded { path: path.to_owned(), file, log: Arc::clone(&self.log) }))
    }
    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn Storage>> {
        self.host.create_new(path)
    }
    fn stat(&self, path: &Path) -> io::Result<FileStat> {
        self.host.stat(path)
    }
    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        self.host.canonicalize(path)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.host.list(dir)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.host.rename(from, to)
    }
    fn unlink(&self, path: &Path) -> io::Result<()> {
        self.host.unlink(path)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.host.sync_dir(dir)
    }
    fn free_space(&self, path: &Path) -> io::Result<Option<u64>> {
        self.host.free_space(path)
    }
    fn holders(&self, id: FileId) -> Vec<Holder> {
        self.host.holders(id)
    }
}

pub(super) type Files = BTreeMap<PathBuf, Vec<u8>>;

fn apply(files: &mut Files, (path, op): &(PathBuf, Op)) {
    let content = files.get_mut(path).unwrap();
    match op {
        Op::Write(offset, bytes) => {
            let (from, to) = (*offset as usize, *offset as usize + bytes.len());
            content.resize(content.len().max(to), 0);
            content[from..to].copy_from_slice(bytes);
        }
        Op::SetLen(len) => content.resize(*len as usize, 0),
        Op::Sync => {}
    }
}

/// Calls `f` with states that a power cut may leave: before every barrier, and at the end.
pub(super) fn crashes(
    start: Files,
    log: &[(PathBuf, Op)],
    dice: &mut Dice,
    mut f: impl FnMut(&Files, &mut Dice),
) {
    let mut durable = start;
    let mut pending: Vec<&(PathBuf, Op)> = Vec::new();
    for entry in log {
        if !matches!(entry.1, Op::Sync) {
            pending.push(entry);
            continue;
        }
        for kept in subsets(pending.len(), dice) {
            let mut files = durable.clone();
            pending.iter().zip(kept).filter(|(_, kept)| *kept).for_each(|(op, _)| apply(&mut files, op));
            f(&files, dice);
        }
        pending.iter().filter(|(path, _)| *path == entry.0).for_each(|op| apply(&mut durable, op));
        pending.retain(|(path, _)| *path != entry.0);
    }
    pending.iter().for_each(|op| apply(&mut durable, op));
    f(&durable, dice);
}

/// Which of `n` writes are there: all subsets of a few; else a choice of them.
fn subsets(n: usize, dice: &mut Dice) -> Vec<Vec<bool>> {
    if n <= 4 {
        return (0..1 << n).map(|mask| (0..n).map(|i| mask >> i & 1 == 1).collect()).collect();
    }
    let mut subsets = vec![vec![true; n], vec![false; n]];
    for _ in 0..4 {
        let at = dice.roll(n as u64) as usize;
        subsets.push((0..n).map(|i| i == at).collect());
        subsets.push((0..n).map(|i| i != at).collect());
        subsets.push((0..n).map(|i| i < at).collect());
        subsets.push((0..n).map(|i| i >= at).collect());
        subsets.push((0..n).map(|_| dice.roll(2) == 0).collect());
    }
    subsets
}

pub(super) fn see(host: &MemHost, path: &Path) -> Vec<u8> {
    let chain = Chain::open(host, path, &local()).unwrap_or_else(|e| panic!("{e}"));
    let images = chain.images();
    let view = View::new(&images, 0, images.len() - 1);
    let mut bytes = vec![0; view.size() as usize];
    view.read(GuestOffset::ZERO, &mut bytes, &mut ClusterCache::new()).unwrap_or_else(|e| panic!("{e}"));
    bytes
}

pub(super) fn host_of(files: &Files) -> MemHost {
    let host = MemHost::new();
    files.iter().for_each(|(path, content)| host.add(path, content).unwrap());
    host
}

pub(super) fn assert_sound(files: &Files, what: &str) {
    for (path, content) in files.iter().filter(|(_, content)| is_qcow2(content)) {
        let host = host_of(files);
        let file = host.open(path, Access::Read).unwrap();
        let report = check(path, &*file, None, &CheckOptions::default()).unwrap();
        assert!(
            report.is_consistent(),
            "{what}: {} after {} bytes: {report:#?}",
            path.display(),
            content.len()
        );
    }
}

fn commit(
    host: Arc<dyn Host>,
    active: &Path,
    options: &CommitOptions,
) -> crate::error::Result<super::Report> {
    let never = AtomicBool::new(false);
    Commit::prepare(host, active, options, &never)?.execute(&Silent, &never)
}

/// Commits the layers above base, up to top, of a chain in memory, and cuts the power everywhere.
fn crash_everywhere(host: &MemHost, layers: usize, base: usize, top: usize, dice: &mut Dice, what: &str) {
    let paths: Vec<PathBuf> = (0..layers).map(|n| PathBuf::from(format!("/{n}"))).collect();
    let active = &paths[layers - 1];
    let named = |at: usize| paths[at].to_string_lossy().into_owned();
    let options = CommitOptions {
        open: local(),
        base: BaseChoice::Named(named(base)),
        top: (top + 1 < layers).then(|| named(top)),
        allow_snapshot_change: true,
        ..CommitOptions::default()
    };
    let start: Files = paths.iter().map(|path| (path.clone(), host.content(path).unwrap())).collect();
    let shown = see(host, active);
    let recorder = Recorder { host: host.clone(), log: Log::default() };
    commit(Arc::new(recorder.clone()), active, &options).unwrap_or_else(|e| panic!("{what}: {e}"));
    assert!(see(host, active) == shown, "{what}");
    let log = recorder.log.lock().unwrap().clone();
    crashes(start, &log, dice, |files, dice| {
        assert_sound(files, what);
        let host = host_of(files);
        assert!(see(&host, active) == shown, "{what}: the guest sees something else");
        if dice.roll(4) == 0 {
            commit(Arc::new(host.clone()), active, &options).unwrap_or_else(|e| panic!("{what}, again: {e}"));
            assert!(see(&host, active) == shown, "{what}: the guest sees something else when done again");
        }
    });
}

#[test]
fn no_power_cut_changes_what_the_guest_sees() {
    let first = std::env::var("QMERGE_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let cases = std::env::var("QMERGE_TEST_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(20);
    for seed in first..first + cases {
        let mut dice = Dice(seed);
        let host = MemHost::new();
        let layers = 2 + dice.roll(3);
        random_chain(&host, &mut dice, layers);
        let top = 1 + dice.roll(layers - 1) as usize;
        let base = dice.roll(top as u64) as usize;
        crash_everywhere(&host, layers as usize, base, top, &mut dice, &format!("seed {seed}"));
    }
}

/// New refcount blocks are counted by the first of them: it must be in the table before the others are.
#[test]
fn no_power_cut_separates_refcount_blocks_that_count_each_other() {
    let host = MemHost::new();
    // 60 blocks are in use, and 64 entries of the table lie in its first sector.
    let used = 7_600_000;
    let size = 12 << 20;
    let small = CreateOptions { cluster_bits: 10, refcount_order: 6, ..CreateOptions::new(size) };
    create(&host, Path::new("/0"), &small).unwrap();
    put(&host, Path::new("/0"), &local(), &[(GuestOffset::ZERO, vec![1; used])]).unwrap();
    let overlay =
        CreateOptions { backing: Some((b"/0".to_vec(), "qcow2".into())), ..CreateOptions::new(size) };
    create(&host, Path::new("/1"), &overlay).unwrap();
    put(&host, Path::new("/1"), &local(), &[(GuestOffset::new(10 << 20), vec![2; 1 << 20])]).unwrap();
    crash_everywhere(&host, 2, 0, 1, &mut Dice(1), "many blocks");
}

/// A killed merge may have made a hole in a raw base that is not durable; the next one finds nothing to
/// write there, and must not empty the active image before the hole is durable.
#[test]
fn a_raw_base_is_durable_before_the_active_image_is_emptied() {
    let host = MemHost::new();
    create_raw(&host, Path::new("/0"), 1 << 20).unwrap();
    let overlay =
        CreateOptions { backing: Some((b"/0".to_vec(), "raw".into())), ..CreateOptions::new(1 << 20) };
    create(&host, Path::new("/1"), &overlay).unwrap();
    put(&host, Path::new("/1"), &local(), &[(GuestOffset::ZERO, vec![1; 65536])]).unwrap();
    // The only cluster becomes a zero cluster: its L2 entry lies where the L1 table says.
    let active = host.open(Path::new("/1"), Access::ReadWrite).unwrap();
    let word = |at: u64| {
        let mut bytes = [0; 8];
        active.read_exact_or_zero(&mut bytes, at).unwrap();
        u64::from_be_bytes(bytes)
    };
    let table = word(word(40)) & !(1 << 63);
    active.write_all_at(&(word(table) | 1).to_be_bytes(), table).unwrap();
    drop(active);
    let options = CommitOptions { open: local(), ..CommitOptions::default() };
    let recorder = Recorder { host, log: Log::default() };
    commit(Arc::new(recorder.clone()), Path::new("/1"), &options).unwrap();
    let log = recorder.log.lock().unwrap();
    let first_write =
        log.iter().position(|(path, op)| path == Path::new("/1") && matches!(op, Op::Write(..)));
    let first_sync = log.iter().position(|(path, op)| path == Path::new("/0") && matches!(op, Op::Sync));
    assert!(first_sync.is_some() && first_sync < first_write, "{first_sync:?} {first_write:?}");
}

/// Compressed clusters that share host clusters, internal snapshots in base and in the active image, and
/// L2 tables that they share.
#[test]
fn no_power_cut_harms_snapshots_or_compressed_clusters() {
    if !qemu() {
        return;
    }
    for (options, seed) in [("cluster_size=4096", 1), ("cluster_size=16k,extended_l2=on", 2)] {
        let dir = tempfile::tempdir().unwrap();
        let name = |n: u32| dir.path().join(n.to_string()).to_str().unwrap().to_owned();
        let io = |n: u32, commands: &[&str]| {
            let commands = commands.iter().flat_map(|command| ["-c", command]);
            ok("qemu-io", &commands.chain([name(n).as_str()]).collect::<Vec<_>>());
        };
        ok("qemu-img", &["create", "-q", "-f", "qcow2", "-o", options, &name(0), "512k"]);
        io(0, &["write -c -P 1 0 64k", "write -c -P 2 64k 64k", "write -P 3 128k 100k"]);
        ok("qemu-img", &["snapshot", "-c", "one", &name(0)]);
        io(0, &["write -P 4 130k 7k", "write -z 200k 16k"]);
        let on = ["-b", "0", "-F", "qcow2"];
        ok("qemu-img", &[&["create", "-q", "-f", "qcow2", "-o", options], &on[..], &[&name(1)]].concat());
        io(1, &["write -P 5 10k 30k", "write -z 80k 32k", "write -P 6 140k 90k"]);
        ok("qemu-img", &["snapshot", "-c", "two", &name(1)]);
        io(1, &["write -c -P 7 48k 16k", "write -P 8 300k 5k"]);
        let host = MemHost::new();
        for n in 0..2 {
            host.add(format!("/{n}"), &std::fs::read(name(n)).unwrap()).unwrap();
        }
        crash_everywhere(&host, 2, 0, 1, &mut Dice(seed), options);
        // Base's own snapshot is as it was, for QEMU too.
        std::fs::write(name(0), host.content("/0").unwrap()).unwrap();
        ok("qemu-img", &["check", "-q", &name(0)]);
        ok("qemu-img", &["snapshot", "-a", "one", &name(0)]);
        io(0, &["read -P 1 0 64k", "read -P 2 64k 64k", "read -P 3 128k 100k"]);
    }
}

//! Power cuts at every point of a commit: of what was not yet synced, each 512-byte sector may be missing.
//! What the guest sees must be there in every state, base must be free of corruption, and the same
//! commit must go on.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kit::{Random, ok};

use super::{BaseChoice, Commit, CommitOptions};
use crate::chain::Chain;
use crate::chain::view::View;
use crate::check::{CheckOptions, check};
use crate::format::is_qcow2;
use crate::image::bitmaps::tests::qemu;
use crate::image::{ClusterCache, CreateOptions, create, create_raw};
use crate::storage::sim::{Cuts, DiskOp, Fault, FaultKind, Garbage, SimHost, State, Tear, power_cuts};
use crate::storage::{Access, Host, MemHost};
use crate::testing::{Silent, local, random_chain};
use crate::transfer::put;
use crate::units::GuestOffset;

/// All sets of up to four sectors that are not synced, some of the sets of more.
pub(crate) fn cuts(seed: u64) -> Cuts {
    let (exhaustive, listed, random) = (4, 4, 4);
    Cuts { seed, tear: Tear::Sector, exhaustive, listed, random, garbage: Garbage::None, damaged: 0 }
}

pub(crate) fn see(host: &MemHost, path: &Path) -> Vec<u8> {
    let chain = Chain::open(host, path, &local()).unwrap_or_else(|e| panic!("{e}"));
    let images = chain.images();
    let view = View::new(&images, 0, images.len() - 1);
    let mut bytes = vec![0; view.size() as usize];
    view.read(GuestOffset::ZERO, &mut bytes, &mut ClusterCache::new()).unwrap_or_else(|e| panic!("{e}"));
    bytes
}

pub(crate) fn assert_sound(state: &State, what: &str) {
    let host = state.host();
    for path in state.names() {
        let content = state.content(path).unwrap_or_default();
        if !is_qcow2(&content) {
            continue;
        }
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
    super::heal(&*host, active, options)?;
    Commit::prepare(host, active, options, &never)?.execute(&Silent, &never)
}

/// Commits the layers above base, up to top, of a chain in memory, and cuts the power everywhere; gives
/// what a commit leaves that is not disturbed.
fn crash_everywhere(
    host: &MemHost,
    layers: usize,
    base: usize,
    top: usize,
    dice: &mut Random,
    what: &str,
) -> State {
    let paths: Vec<PathBuf> = (0..layers).map(|n| PathBuf::from(format!("/{n}"))).collect();
    let active = &paths[layers - 1];
    let named = |at: usize| paths[at].clone().into_os_string();
    let options = CommitOptions {
        open: local(),
        base: BaseChoice::Named(named(base)),
        top: (top + 1 < layers).then(|| named(top)),
        allow_snapshot_change: true,
        ..CommitOptions::default()
    };
    let shown = see(host, active);
    let disk = SimHost::over(host);
    commit(Arc::new(disk.clone()), active, &options).unwrap_or_else(|e| panic!("{what}: {e}"));
    let last = disk.now();
    assert!(see(&last.host(), active) == shown, "{what}");
    let states = power_cuts(disk.start(), &disk.log(), &cuts(dice.below(1 << 20)), |cut| {
        let what = format!("{what}: {cut}");
        assert_sound(&cut.state, &what);
        let host = cut.state.host();
        assert!(see(&host, active) == shown, "{what}: the guest sees something else");
        if dice.below(4) == 0 {
            commit(Arc::new(host.clone()), active, &options).unwrap_or_else(|e| panic!("{what}, again: {e}"));
            assert!(see(&host, active) == shown, "{what}: the guest sees something else when done again");
        }
    });
    assert!(states > 1, "{what}: {states}");
    last
}

/// The dirty bit is set already when a merge begins anew: a journal that is named before it holds a record
/// would leave it unexplained.
#[test]
fn a_merge_that_begins_anew_can_be_stopped_anywhere() {
    let host = MemHost::new();
    create(&host, Path::new("/0"), &CreateOptions::new(1 << 20)).unwrap();
    let backing = Some((b"/0".to_vec(), "qcow2".into()));
    create(&host, Path::new("/1"), &CreateOptions { backing, ..CreateOptions::new(1 << 20) }).unwrap();
    put(&host, Path::new("/1"), &local(), &[(GuestOffset::new(70_000), vec![7; 70_000])]).unwrap();
    let options = CommitOptions { open: local(), ..CommitOptions::default() };
    let active = Path::new("/1");
    let shown = see(&host, active);
    let stop = |disk: &SimHost, nth: u64| {
        disk.fail(Some(Fault { kind: FaultKind::Io, nth, for_ever: true }));
        let _ = commit(Arc::new(disk.clone()), active, &options);
        disk.failed() > 0
    };
    let mut states = 0;
    // In the gate, which sets `CI`, more of them are tried.
    let (firsts, seconds) = if std::env::var_os("CI").is_some() { (5, 1) } else { (11, 3) };
    for first in (0..).step_by(firsts) {
        let disk = SimHost::over(&host);
        if !stop(&disk, first) {
            break;
        }
        for second in (first % seconds..).step_by(seconds as usize) {
            let again = SimHost::new(&disk.now());
            if !stop(&again, second) {
                break;
            }
            let what = format!("stopped at {first}, then at {second}");
            let left = again.now().host();
            commit(Arc::new(left.clone()), active, &options).unwrap_or_else(|e| panic!("{what}: {e}"));
            assert!(see(&left, active) == shown, "{what}: the guest sees something else");
            states += 1;
        }
    }
    assert!(states > 100, "{states}");
}

#[test]
fn no_power_cut_changes_what_the_guest_sees() {
    let first = std::env::var("QMERGE_TEST_SEED").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    let cases = std::env::var("QMERGE_TEST_CASES").ok().and_then(|s| s.parse().ok()).unwrap_or(20);
    for seed in first..first + cases {
        let mut dice = Random::new(seed);
        let host = MemHost::new();
        let layers = 2 + dice.below(3);
        random_chain(&host, &mut dice, layers);
        let top = 1 + dice.below(layers - 1) as usize;
        let base = dice.below(top as u64) as usize;
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
    crash_everywhere(&host, 2, 0, 1, &mut Random::new(1), "many blocks");
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
    let disk = SimHost::over(&host);
    commit(Arc::new(disk.clone()), Path::new("/1"), &options).unwrap();
    let inode = |path: &str| disk.start().inode(Path::new(path)).unwrap();
    let (base, active) = (inode("/0"), inode("/1"));
    let log = disk.log();
    let first_write = log.iter().position(|op| op.changed_file() == Some(active));
    let first_sync = log.iter().position(|op| *op == DiskOp::Sync { file: base, done: true });
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
        let merged = crash_everywhere(&host, 2, 0, 1, &mut Random::new(seed), options);
        // Base's own snapshot is as it was, for QEMU too.
        std::fs::write(name(0), merged.content(Path::new("/0")).unwrap()).unwrap();
        ok("qemu-img", &["check", "-q", &name(0)]);
        ok("qemu-img", &["snapshot", "-a", "one", &name(0)]);
        io(0, &["read -P 1 0 64k", "read -P 2 64k 64k", "read -P 3 128k 100k"]);
    }
}

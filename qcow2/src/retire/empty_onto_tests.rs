use std::path::PathBuf;
use std::sync::Arc;

use kit::{Random, ok};

use super::*;
use crate::check::check;
use crate::image::bitmaps::tests::qemu;
use crate::image::{CreateOptions, create};
use crate::merge::crash_tests::{assert_sound, cuts, see};
use crate::merge::{BaseChoice, Commit, CommitOptions};
use crate::storage::sim::{SimHost, power_cuts};
use crate::storage::{MemHost, OsHost};
use crate::testing::{Silent, local, random_chain};
use crate::transfer::put;

pub(crate) fn options() -> EmptyOptions {
    EmptyOptions { open: local(), ..EmptyOptions::default() }
}

pub(crate) fn never() -> AtomicBool {
    AtomicBool::new(false)
}

/// A random chain whose base `/0` holds everything, and was written to since.
pub(crate) fn merged(seed: u64) -> (MemHost, Vec<PathBuf>, Random) {
    let (host, paths, mut dice) = just_merged(seed);
    let size = see(&host, &paths[0]).len() as u64;
    for _ in 0..4 {
        let at = dice.below(size - 4096);
        put(&host, &paths[0], &local(), &[(GuestOffset::new(at), vec![0xee; 4096])]).unwrap();
    }
    (host, paths, dice)
}

/// A random chain whose base `/0` holds everything.
pub(crate) fn just_merged(seed: u64) -> (MemHost, Vec<PathBuf>, Random) {
    let host = MemHost::new();
    let mut dice = Random::new(seed);
    let layers = 2 + dice.below(3);
    random_chain(&host, &mut dice, layers);
    let paths: Vec<PathBuf> = (0..layers).map(|n| PathBuf::from(format!("/{n}"))).collect();
    let active = paths.last().unwrap();
    let commit = CommitOptions {
        open: local(),
        base: BaseChoice::Bottom,
        keep_active: true,
        ..CommitOptions::default()
    };
    let commit = Commit::prepare(Arc::new(host.clone()), active, &commit, &never()).unwrap();
    commit.execute(&Silent, &never()).unwrap();
    (host, paths, dice)
}

pub(crate) fn format_of(host: &MemHost, path: &Path) -> ImageFormat {
    ImageFormat::detect(path, &*host.open(path, Access::Read).unwrap()).unwrap()
}

fn empty(host: &dyn Host, overlay: &Path, base: &Path, format: ImageFormat) -> Result<Emptied> {
    empty_onto(host, &Stamp::now(host, overlay).unwrap().unwrap(), base, format, &options(), &never())
}

/// What an empty overlay as large as `/active` shows of `/0`.
pub(crate) fn base_through(host: &MemHost, active: &Path) -> Vec<u8> {
    let mut shown = see(host, Path::new("/0"));
    shown.truncate(see(host, active).len());
    shown
}

#[test]
fn an_old_active_image_shows_the_base_and_holds_nothing() {
    for seed in 0..60 {
        let (host, paths, _) = merged(seed);
        let (active, base) = (paths.last().unwrap(), &paths[0]);
        let expected = base_through(&host, active);
        let before = host.content(base).unwrap();
        let format = format_of(&host, base);
        // A running virtual machine holds the base.
        let held = host.open(base, Access::ReadWrite).unwrap();
        held.lock(LockMode::Write).unwrap();
        let emptied = empty(&host, active, base, format).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        assert!(!emptied.was_empty, "seed {seed}");
        assert!(host.content(base).unwrap() == before, "seed {seed}: base was written");
        drop(held);
        assert!(see(&host, active) == expected, "seed {seed}");
        let chain = Chain::open(&host, active, &local()).unwrap();
        assert_eq!(chain.layers().len(), 2, "seed {seed}");
        let overlay = chain.layers()[1].image.as_qcow2().unwrap();
        assert_eq!(overlay.next_table(GuestOffset::ZERO).unwrap(), None, "seed {seed}");
        let report = check(active, &**overlay.file(), None, &CheckOptions::default()).unwrap();
        assert!(report.is_consistent() && report.leaks == 0, "seed {seed}: {report:#?}");
        let clusters = overlay.file_size().unwrap().div_ceil(overlay.geometry().cluster_size());
        let table = overlay.geometry().clusters_for(overlay.header().l1_bytes());
        assert!(clusters <= 5 + 2 * table, "seed {seed}: {clusters} clusters are left");
        drop(chain);
        assert!(empty(&host, active, base, format).unwrap().was_empty, "seed {seed}");
        assert!(see(&host, active) == expected, "seed {seed}, again");
    }
}

/// Base was written to since: a mixture of it and of the old image would be a disk that never existed.
#[test]
fn no_power_cut_shows_a_mixture_of_old_and_new() {
    let mut told_apart = 0;
    for seed in 100..118 {
        let (host, paths, mut dice) = merged(seed);
        let (active, base) = (paths.last().unwrap(), &paths[0]);
        let (stale, new) = (see(&host, active), base_through(&host, active));
        // All writes may lie behind the end of a shorter active image.
        if stale == new {
            continue;
        }
        told_apart += 1;
        let format = format_of(&host, base);
        let disk = SimHost::over(&host);
        empty(&disk, active, base, format).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let (log, inode) = (disk.log(), disk.start().inode(active));
        let elsewhere = log
            .iter()
            .any(|op| op.changed_dir().is_some() || op.changed_file().is_some_and(|f| Some(f) != inode));
        assert!(!elsewhere, "seed {seed}: something else was written");
        let (mut before, mut after) = (0, 0);
        power_cuts(disk.start(), &log, &cuts(seed), |cut| {
            assert_sound(&cut.state, &format!("seed {seed}: {cut}"));
            let host = cut.state.host();
            let shown = see(&host, active);
            assert!(shown == stale || shown == new, "seed {seed}: a mixture: {cut}");
            *if shown == new { &mut after } else { &mut before } += 1;
            if dice.below(4) == 0 {
                empty(&host, active, base, format).unwrap_or_else(|e| panic!("seed {seed}, again: {e}"));
                assert!(see(&host, active) == new, "seed {seed}, again");
            }
        });
        assert!(before > 2 && after > 2, "seed {seed}: {before} {after}");
    }
    assert!(told_apart > 12, "only {told_apart} chains had two disks to tell apart");
}

pub(crate) fn reason(result: Result<Emptied>) -> Refusal {
    match result {
        Err(Error::Refused { reason, .. }) => reason,
        other => panic!("not refused: {other:?}"),
    }
}

#[test]
fn an_image_that_was_written_to_or_replaced_is_left_alone() {
    let (host, paths, _) = merged(7);
    let (active, base) = (paths.last().unwrap(), &paths[0]);
    let format = format_of(&host, base);
    let stamp = Stamp::now(&host, active).unwrap().unwrap();
    put(&host, active, &local(), &[(GuestOffset::ZERO, vec![1; 512])]).unwrap();
    let shown = see(&host, active);
    let written = empty_onto(&host, &stamp, base, format, &options(), &never());
    assert!(matches!(reason(written), Refusal::NotAsKnown { .. }));
    let copy = host.content(active).unwrap();
    host.add(active, &copy).unwrap();
    let replaced = empty_onto(&host, &stamp, base, format, &options(), &never());
    assert!(matches!(reason(replaced), Refusal::NotAsKnown { .. }));
    assert!(see(&host, active) == shown);
    // An empty overlay has nothing to lose, whoever made it one.
    empty(&host, active, base, format).unwrap();
    let now = Stamp::now(&host, active).unwrap().unwrap();
    let old = Stamp { times: crate::stamp::Times { modified_ns: 1, ..now.times }, ..now };
    assert!(empty_onto(&host, &old, base, format, &options(), &never()).unwrap().was_empty);
}

#[test]
fn an_image_that_somebody_holds_is_left_alone() {
    let (host, paths, _) = merged(8);
    let active = paths.last().unwrap();
    let held = host.open(active, Access::ReadWrite).unwrap();
    held.lock(LockMode::Read).unwrap();
    let before = host.content(active).unwrap();
    let result = empty(&host, active, &paths[0], format_of(&host, &paths[0]));
    assert!(matches!(result, Err(Error::InUse { .. })), "{result:?}");
    assert!(host.content(active).unwrap() == before);
}

#[test]
fn a_base_that_cannot_be_it_is_refused() {
    let host = MemHost::new();
    let on = |below: &str| Some((below.as_bytes().to_vec(), "qcow2".to_owned()));
    for (name, size, backing) in [
        ("/0", 1 << 20, None),
        ("/1", 2 << 20, on("/0")),
        ("/2", 2 << 20, on("/1")),
        ("/alone", 1 << 20, None),
    ] {
        create(&host, Path::new(name), &CreateOptions { backing, ..CreateOptions::new(size) }).unwrap();
        put(&host, Path::new(name), &local(), &[(GuestOffset::ZERO, vec![1; 512])]).unwrap();
    }
    let before: Vec<_> = ["/0", "/1", "/2"].map(|p| host.content(p).unwrap()).into();
    let refused = |overlay: &str, base: &str, format| {
        reason(empty(&host, Path::new(overlay), Path::new(base), format)).to_string()
    };
    let text = refused("/1", "/2", ImageFormat::Qcow2);
    assert!(text.contains("loop"), "{text}");
    let text = refused("/2", "/0", ImageFormat::Qcow2);
    assert!(text.contains("cannot have been merged"), "{text}");
    let text = refused("/2", "/1", ImageFormat::Raw);
    assert!(text.contains("declared as raw"), "{text}");
    let text = refused("/alone", "/0", ImageFormat::Qcow2);
    assert!(text.contains("no backing file"), "{text}");
    assert_eq!(before, ["/0", "/1", "/2"].map(|p| host.content(p).unwrap()));
}

#[test]
fn snapshots_and_bitmaps_are_given_up_only_when_asked() {
    if !qemu() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let name = |n: &str| dir.path().join(n).to_str().unwrap().to_owned();
    let (base, top) = (name("base"), name("top"));
    ok("qemu-img", &["create", "-q", "-f", "qcow2", &base, "8M"]);
    ok("qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base", "-F", "qcow2", &top]);
    ok("qemu-io", &["-c", "write -P 3 1M 2M", &top]);
    ok("qemu-img", &["snapshot", "-c", "one", &top]);
    ok("qemu-img", &["bitmap", "--add", &top, "b0"]);
    ok("qemu-io", &["-c", "write -P 4 2M 2M", &top]);
    let (base, top) = (Path::new(&base), Path::new(&top));
    let try_with = |allow_snapshot_change, drop_bitmaps| {
        let options =
            EmptyOptions { open: local(), drop_bitmaps, allow_snapshot_change, ..EmptyOptions::default() };
        let stamp = Stamp::now(&OsHost, top).unwrap().unwrap();
        empty_onto(&OsHost, &stamp, base, ImageFormat::Qcow2, &options, &never())
    };
    assert!(matches!(reason(try_with(false, true)), Refusal::Snapshots { count: 1 }));
    assert!(matches!(reason(try_with(true, false)), Refusal::Bitmaps { .. }));
    let emptied = try_with(true, true).unwrap();
    assert!(emptied.name == "base" && !emptied.was_empty && emptied.freed >= 1 << 20, "{emptied:?}");
    ok("qemu-img", &["check", "-q", top.to_str().unwrap()]);
    ok("qemu-img", &["compare", "-q", top.to_str().unwrap(), base.to_str().unwrap()]);
    ok("qemu-img", &["snapshot", "-a", "one", top.to_str().unwrap()]);
    ok("qemu-io", &["-c", "read -P 3 1M 2M", "-c", "read -P 0 3M 1M", top.to_str().unwrap()]);
}

#[test]
fn no_power_cut_leaves_a_layer_that_is_half_emptied_or_too_short() {
    let mut tried = 0;
    for seed in 300..306 {
        let (host, paths, _) = merged(seed);
        let (layer, base) = (&paths[1], &paths[0]);
        let (stale, new) = (see(&host, layer), see(&host, base));
        let size = new.len() as u64 + (3 << 20);
        let options = EmptyOptions { size, mark: true, ..options() };
        let format = format_of(&host, base);
        let stamp = Stamp::now(&host, layer).unwrap().unwrap();
        if stale.len() > new.len() {
            continue;
        }
        tried += 1;
        let disk = SimHost::over(&host);
        empty_onto(&disk, &stamp, base, format, &options, &never()).unwrap();
        let mut shown_new = [new.clone(), vec![0; 3 << 20]].concat();
        shown_new.truncate(size as usize);
        power_cuts(disk.start(), &disk.log(), &cuts(seed), |cut| {
            assert_sound(&cut.state, &format!("seed {seed}: {cut}"));
            let shown = see(&cut.state.host(), layer);
            assert!(shown == stale || shown == shown_new, "seed {seed}: {cut}: {} bytes", shown.len());
        });
    }
    assert!(tried > 2, "{tried} layers");
}

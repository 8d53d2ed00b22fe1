//! Rebases of random chains onto related and unrelated ones: judged by what the guest sees, by what was taken in, by every
//! power cut, and by every operation that fails.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kit::Random;

use super::{PreparedRebase, Rebase, RebaseOptions};
use crate::chain::Chain;
use crate::chain::view::View;
use crate::error::{Error, ErrorKind, Refusal, Result};
use crate::image::{CreateOptions, ImageFormat, create, create_raw};
use crate::merge::crash_tests::{assert_sound, cuts, see};
use crate::merge::{CommitOptions, UnfinishedUp, UpReport, abort, heal, heal_image, unfinished_up};
use crate::storage::sim::{Cuts, Fault, FaultKind, Garbage, SimHost, power_cuts};
use crate::storage::{Access, Host, LockMode, MemHost};
use crate::testing::{Silent, local, random_chain, random_chain_at};
use crate::transfer::put;
use crate::units::{GuestOffset, GuestRange};

fn options(onto: Option<&str>) -> RebaseOptions {
    RebaseOptions { onto: onto.map(Into::into), ..RebaseOptions::new(local()) }
}

fn prepare(host: Arc<dyn Host>, image: &Path, options: &RebaseOptions) -> Result<PreparedRebase> {
    Rebase::prepare(host, image, options, &Silent, &AtomicBool::new(false))
}

fn rebase(host: Arc<dyn Host>, image: &Path, options: &RebaseOptions) -> Result<UpReport> {
    heal(&*host, image, &CommitOptions::new(options.up.open.clone()))?;
    prepare(host, image, options)?.execute(&Silent, &AtomicBool::new(false))
}

/// The file below the image, by its name.
fn below(host: &dyn Host, image: &Path) -> Option<PathBuf> {
    let chain = Chain::open(host, image, &local()).unwrap();
    chain.layers().iter().rev().nth(1).map(|layer| layer.path.clone())
}

fn no_journal(host: &MemHost) -> bool {
    host.list(Path::new("/")).unwrap().iter().all(|name| !name.to_string_lossy().contains("qmerge"))
}

/// A chain with its image and what that shows, and what it is to be rebased onto.
struct Case {
    host: MemHost,
    image: PathBuf,
    model: Vec<u8>,
    onto: Option<String>,
    what: String,
}

/// What everything follows from.
fn case(seed: u64) -> Case {
    let host = MemHost::new();
    let mut dice = Random::new(seed);
    let layers = 1 + dice.below(3);
    // A raw image cannot be rebased.
    let model = loop {
        let model = random_chain(&host, &mut dice, layers);
        if layers > 1 || host.content("/0").unwrap().starts_with(b"QFI\xfb") {
            break model;
        }
        host.unlink(Path::new("/0")).unwrap();
    };
    let onto = match dice.below(6) {
        0 => None,
        1 if layers > 1 => Some(format!("/{}", dice.below(layers - 1))),
        2 if layers > 1 => {
            // Another overlay on a layer of the chain, with bytes of the disk, zeros, and other bytes.
            let under = format!("/{}", dice.below(layers - 1));
            let is_qcow2 = host.content(&under).unwrap().starts_with(b"QFI\xfb");
            let format = if is_qcow2 { "qcow2" } else { "raw" };
            let size = (256 + dice.below(2048)) * 512;
            let backing = Some((under.into_bytes(), format.to_owned()));
            let bits = 9 + dice.below(8) as u32;
            let kind = CreateOptions { backing, cluster_bits: bits, ..CreateOptions::new(size) };
            create(&host, Path::new("/fork"), &kind).unwrap();
            let mut writes = Vec::new();
            let mut at = dice.below(size);
            while at < size.min(model.len() as u64) {
                let end = (at + 1 + dice.below(50_000)).min(size.min(model.len() as u64));
                let mut bytes = model[at as usize..end as usize].to_vec();
                match dice.below(3) {
                    0 => bytes.fill(0),
                    1 => bytes.iter_mut().for_each(|byte| *byte ^= 1),
                    _ => {}
                }
                writes.push((GuestOffset::new(at), bytes));
                at = end + dice.below(size / 3);
            }
            put(&host, Path::new("/fork"), &local(), &writes).unwrap();
            Some("/fork".to_owned())
        }
        3 => {
            // The same disk in one raw file, with a tail, and other bytes here and there.
            let longer = model.len() as u64 + dice.below(3) * 66_000;
            create_raw(&host, Path::new("/same"), longer).unwrap();
            let mut bytes = model.clone();
            for _ in 0..dice.below(5) {
                let at = dice.below(bytes.len() as u64) as usize;
                bytes[at] ^= 0x55;
            }
            bytes.resize(longer as usize, 7);
            put(&host, Path::new("/same"), &local(), &[(GuestOffset::ZERO, bytes)]).unwrap();
            Some("/same".to_owned())
        }
        _ => {
            let depth = 1 + dice.below(2);
            random_chain_at(&host, "/new", &mut dice, depth);
            Some(format!("/new{}", depth - 1))
        }
    };
    let what = format!("seed {seed}: {layers} layers onto {onto:?}");
    Case { host, image: format!("/{}", layers - 1).into(), model, onto, what }
}

/// For each unit of the image whether it holds something itself.
fn held(host: &dyn Host, image: &Path) -> (u64, Vec<bool>) {
    let chain = Chain::open(host, image, &local()).unwrap();
    let images = chain.images();
    let qcow2 = images[chain.active()].as_qcow2().unwrap();
    let unit = qcow2.geometry().subcluster_size();
    let view = View::new(&images, chain.active(), chain.active());
    let mut parts = Vec::new();
    view.resolve(GuestRange { start: GuestOffset::ZERO, len: view.size() }, &mut parts).unwrap();
    let mut held = vec![false; view.size().div_ceil(unit) as usize];
    for part in parts.iter().filter(|part| part.supply != crate::chain::Supply::Nothing) {
        let (first, end) = (part.range.start.get() / unit, part.range.end().get().div_ceil(unit));
        held[first as usize..end as usize].fill(true);
    }
    (unit, held)
}

/// The image takes in the units that would show something else, and no other.
#[test]
fn the_guest_sees_the_same_and_only_what_differs_is_taken_in() {
    let (mut taken, mut kept, mut nothing) = (0, 0, 0);
    for seed in 0..240 {
        let Case { host, image, model, onto, what } = case(seed);
        let mut options = options(onto.as_deref());
        options.up.verify = true;
        let new = onto.as_ref().map_or(Vec::new(), |onto| see(&host, Path::new(onto)));
        let (unit, before) = held(&host, &image);
        let names: Vec<PathBuf> =
            host.list(Path::new("/")).unwrap().iter().map(|name| Path::new("/").join(name)).collect();
        let others: Vec<_> = names.iter().filter(|name| **name != image).collect();
        let contents: Vec<_> = others.iter().map(|name| host.content(name).unwrap()).collect();
        let old_below = below(&host, &image);
        let prepared =
            prepare(Arc::new(host.clone()), &image, &options).unwrap_or_else(|e| panic!("{what}: {e}"));
        let plan = prepared.plan().clone();
        if old_below == onto.as_ref().map(PathBuf::from) {
            assert!(matches!(prepared, PreparedRebase::Nothing(_)), "{what}");
            nothing += 1;
            continue;
        }
        let report =
            prepared.execute(&Silent, &AtomicBool::new(false)).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(see(&host, &image) == model, "{what}");
        assert_eq!(report.digest, Some(crc32fast::hash(&model)), "{what}");
        assert_eq!(report.totals, plan.totals, "{what}");
        assert_eq!(below(&host, &image), onto.as_ref().map(PathBuf::from), "{what}");
        assert_sound(&SimHost::over(&host).now(), &what);
        for (name, bytes) in others.iter().zip(contents) {
            assert!(host.content(name).unwrap() == bytes, "{what}: {} was written", name.display());
        }
        let byte = |at: usize| new.get(at).copied().unwrap_or(0);
        for (n, (before, after)) in before.iter().zip(held(&host, &image).1).enumerate() {
            let start = n * unit as usize;
            let range = start..(start + unit as usize).min(model.len());
            let differs = range.clone().any(|at| byte(at) != model[at]);
            assert_eq!(after, *before || differs, "{what}: unit {n} of {unit} bytes");
            taken += u64::from(after && !before);
            kept += u64::from(!after);
        }
        assert!(no_journal(&host), "{what}");
        let again = prepare(Arc::new(host), &image, &options).unwrap();
        assert!(matches!(again, PreparedRebase::Nothing(_)), "{what}");
    }
    assert!(taken > 1000 && kept > 1000 && nothing > 3, "{taken}, {kept}, {nothing}");
}

/// What is zeros now, and would not be, becomes zero clusters: no data is written.
#[test]
fn zeros_are_no_data() {
    let host = MemHost::new();
    create(&host, Path::new("/image"), &CreateOptions::new(4 << 20)).unwrap();
    create_raw(&host, Path::new("/new"), 3 << 20).unwrap();
    let bytes = vec![9; (3 << 20) - 100];
    put(&host, Path::new("/new"), &local(), &[(GuestOffset::new(50), bytes)]).unwrap();
    let options = options(Some("/new"));
    let report = rebase(Arc::new(host.clone()), Path::new("/image"), &options).unwrap();
    assert_eq!((report.totals.bytes_to_copy, report.totals.bytes_to_write), (0, 0));
    assert_eq!(report.totals.bytes_to_zero, 3 << 20);
    assert!(see(&host, Path::new("/image")).iter().all(|byte| *byte == 0));
}

/// Sectors that are not synced may be missing, or hold garbage. Then the same rebase goes on, is given up, or goes on and the
/// power is cut again.
#[test]
fn a_power_cut_at_any_point_of_a_rebase_loses_nothing() {
    let (mut states, mut second, mut pending) = (0, 0, 0);
    for seed in 0..24 {
        let Case { host, image, model, onto, what } = case(seed);
        let mut dice = Random::new(seed);
        let options = options(onto.as_deref());
        let disk = SimHost::over(&host);
        rebase(Arc::new(disk.clone()), &image, &options).unwrap_or_else(|e| panic!("{what}: {e}"));
        let some = Cuts { garbage: Garbage::Sectors, damaged: 2, exhaustive: 3, ..cuts(seed) };
        states += power_cuts(disk.start(), &disk.log(), &some, |cut| {
            let what = format!("{what}: {cut}");
            let host = cut.state.host();
            if cut.garbage.is_empty() {
                assert_sound(&cut.state, &what);
                assert!(see(&host, &image) == model, "{what}: the guest sees something else");
                match unfinished_up(&host, &image, None).unwrap() {
                    Some(UnfinishedUp::Rebase(to)) => {
                        assert_eq!(to, onto.as_ref().map(PathBuf::from), "{what}");
                        pending += 1;
                    }
                    other => assert_eq!(other, None, "{what}"),
                }
            }
            let go_on = |host: Arc<dyn Host>, what: &str| {
                rebase(host, &image, &options).unwrap_or_else(|e| panic!("{what}, again: {e}"))
            };
            let is_done = |host: &MemHost, what: &str| {
                assert!(see(host, &image) == model, "{what}: the guest sees something else when done again");
                assert!(no_journal(host), "{what}");
                assert_eq!(below(host, &image), onto.as_ref().map(PathBuf::from), "{what}");
            };
            match dice.below(8) {
                0 | 1 => {
                    go_on(Arc::new(host.clone()), &what);
                    is_done(&host, &what);
                }
                2 => {
                    heal_image(&host, &image, &local(), None).unwrap_or_else(|e| panic!("{what}: {e}"));
                    abort(&host, &image, &local(), None, &AtomicBool::new(false))
                        .unwrap_or_else(|e| panic!("{what}, given up: {e}"));
                    assert!(see(&host, &image) == model, "{what}, given up");
                    assert_eq!(unfinished_up(&host, &image, None).unwrap(), None, "{what}, given up");
                    assert_sound(&SimHost::over(&host).now(), &what);
                    go_on(Arc::new(host.clone()), &what);
                    is_done(&host, &what);
                }
                3 if second < 600 => {
                    let disk = SimHost::over(&host);
                    go_on(Arc::new(disk.clone()), &what);
                    let few = Cuts { exhaustive: 1, listed: 0, random: 1, damaged: 1, ..some };
                    second += power_cuts(disk.start(), &disk.log(), &few, |cut| {
                        let what = format!("{what}: then {cut}");
                        let host = cut.state.host();
                        if cut.garbage.is_empty() {
                            assert!(see(&host, &image) == model, "{what}: the guest sees something else");
                        }
                        if dice.below(8) == 0 {
                            go_on(Arc::new(host.clone()), &what);
                            is_done(&host, &what);
                        }
                    });
                }
                _ => {}
            }
        });
    }
    assert!(states > 2000 && second > 300 && pending > 300, "{states}, {second}, {pending}");
}

#[test]
fn every_operation_of_a_rebase_fails_once_and_nothing_is_lost() {
    let mut failed = 0;
    for seed in [1, 3, 5, 8] {
        let Case { host, image, model, onto, what } = case(seed);
        let mut dice = Random::new(seed);
        let options = options(onto.as_deref());
        for nth in 1.. {
            let disk = SimHost::over(&host);
            disk.fail(Some(Fault { kind: FaultKind::Io, nth, for_ever: dice.below(2) > 0 }));
            let result = rebase(Arc::new(disk.clone()), &image, &options);
            let is_hit = disk.failed() > 0;
            disk.fail(None);
            let what = format!("{what}: operation {nth}: {result:?}");
            assert!(see(&disk.now().host(), &image) == model, "{what}");
            let again = rebase(Arc::new(disk.clone()), &image, &options);
            again.unwrap_or_else(|e| panic!("{what}: again: {e}"));
            assert!(see(&disk.now().host(), &image) == model, "{what}");
            assert_sound(&disk.now(), &what);
            if !is_hit {
                break;
            }
            failed += 1;
        }
    }
    assert!(failed > 200, "{failed}");
}

#[test]
fn what_cannot_be_rebased_is_refused() {
    let host = MemHost::new();
    create_raw(&host, Path::new("/raw"), 1 << 20).unwrap();
    for (name, below, format) in [("/a", "/raw", "raw"), ("/b", "/a", "qcow2"), ("/other", "/raw", "raw")] {
        let backing = Some((below.as_bytes().to_vec(), format.to_owned()));
        create(&host, Path::new(name), &CreateOptions { backing, ..CreateOptions::new(1 << 20) }).unwrap();
    }
    let refused = |image: &str, options: &RebaseOptions| {
        prepare(Arc::new(host.clone()), Path::new(image), options).unwrap_err()
    };
    for onto in ["/a", "/b"] {
        let error = refused("/a", &options(Some(onto)));
        assert!(matches!(error, Error::Refused { reason: Refusal::Loop { .. }, .. }), "{error}");
    }
    let raw = refused("/raw", &options(None));
    assert!(matches!(raw, Error::Refused { reason: Refusal::Raw, .. }), "{raw}");
    let missing = refused("/b", &options(Some("/gone")));
    assert_eq!(missing.kind(), ErrorKind::Io, "{missing}");
    let held = host.open(Path::new("/other"), Access::ReadWrite).unwrap();
    held.lock(LockMode::Write).unwrap();
    let in_use = refused("/b", &options(Some("/other")));
    assert!(matches!(&in_use, Error::InUse { path, .. } if path == Path::new("/other")), "{in_use}");
    drop(held);
    let unknown = [&b"KDMV"[..], &[0; 4096]].concat();
    host.add("/vmdk", &unknown).unwrap();
    let foreign = refused("/b", &options(Some("/vmdk")));
    assert!(matches!(foreign, Error::Foreign { .. }), "{foreign}");
    // Whoever says that these bytes are the disk is believed.
    let as_raw = RebaseOptions { onto_format: Some(ImageFormat::Raw), ..options(Some("/vmdk")) };
    let plan = prepare(Arc::new(host.clone()), Path::new("/b"), &as_raw).unwrap().plan().clone();
    assert_eq!((plan.format, plan.unneeded.len()), (Some("raw"), 2));
}

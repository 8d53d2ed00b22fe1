//! Pulls of random chains: judged by what the guest sees, by the check, by every power cut, and by every operation that fails.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::sync::atomic::Ordering::Relaxed;

use kit::Random;

use super::{PreparedPull, Pull, PullOptions};
use crate::chain::Chain;
use crate::error::{Error, ErrorKind, Refusal, Result};
use crate::image::{CreateOptions, create};
use crate::merge::crash_tests::{assert_sound, cuts, see};
use crate::merge::{Commit, CommitOptions, UpReport, heal};
use crate::storage::sim::{Cuts, Fault, FaultKind, Garbage, SimHost, power_cuts};
use crate::storage::{Host, MemHost};
use crate::testing::{Silent, local, random_chain};
use crate::transfer::{Progress, put};
use crate::units::GuestOffset;

fn options(base: Option<u64>) -> PullOptions {
    PullOptions { base: base.map(|n| format!("/{n}").into()), ..PullOptions::new(local()) }
}

fn pull(host: Arc<dyn Host>, active: &Path, options: &PullOptions) -> Result<UpReport> {
    let never = AtomicBool::new(false);
    heal(&*host, active, &CommitOptions::new(options.up.open.clone()))?;
    Pull::prepare(host, active, options, &never)?.execute(&Silent, &never)
}

/// How many layers a chain has.
fn depth(host: &dyn Host, active: &Path) -> usize {
    Chain::open(host, active, &local()).unwrap().layers().len()
}

fn no_journal(host: &MemHost) -> bool {
    host.list(Path::new("/")).unwrap().iter().all(|name| !name.to_string_lossy().contains("qmerge"))
}

#[test]
fn the_guest_sees_the_same_and_the_layers_below_stay_as_they_are() {
    for seed in 0..120 {
        let host = MemHost::new();
        let mut dice = Random::new(seed);
        let layers = 2 + dice.below(3);
        let model = random_chain(&host, &mut dice, layers);
        let base = (0..layers - 1).nth(dice.below(layers) as usize);
        let active = PathBuf::from(format!("/{}", layers - 1));
        let below: Vec<_> = (0..layers - 1).map(|n| host.content(format!("/{n}")).unwrap()).collect();
        let what = format!("seed {seed}: {layers} layers onto {base:?}");
        let mut options = options(base);
        options.up.verify = true;
        let report =
            pull(Arc::new(host.clone()), &active, &options).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert!(see(&host, &active) == model, "{what}");
        let is_direct = base == Some(layers - 2);
        assert_eq!(report.digest, (!is_direct).then(|| crc32fast::hash(&model)), "{what}");
        assert_sound(&SimHost::over(&host).now(), &what);
        assert_eq!(depth(&host, &active) as u64, base.map_or(1, |base| base + 2), "{what}");
        for (n, bytes) in below.iter().enumerate() {
            assert!(host.content(format!("/{n}")).unwrap() == *bytes, "{what}: /{n} was written");
        }
        assert!(no_journal(&host), "{what}");
        let again = Pull::prepare(Arc::new(host), &active, &options, &AtomicBool::new(false)).unwrap();
        assert!(matches!(again, PreparedPull::Nothing(_)), "{what}");
    }
}

/// Sectors that are not synced may be missing, or hold garbage.
#[test]
fn a_power_cut_at_any_point_of_a_pull_loses_nothing() {
    let mut states = 0;
    for seed in 0..14 {
        let host = MemHost::new();
        let mut dice = Random::new(seed);
        let model = random_chain(&host, &mut dice, 3);
        let options = options((seed % 3 > 0).then_some(0));
        let active = Path::new("/2");
        let disk = SimHost::over(&host);
        pull(Arc::new(disk.clone()), active, &options).unwrap_or_else(|e| panic!("seed {seed}: {e}"));
        let cuts = Cuts { garbage: Garbage::Sectors, damaged: 2, exhaustive: 3, ..cuts(seed) };
        states += power_cuts(disk.start(), &disk.log(), &cuts, |cut| {
            let what = format!("seed {seed}: {cut}");
            let host = cut.state.host();
            if cut.garbage.is_empty() {
                assert_sound(&cut.state, &what);
                assert!(see(&host, active) == model, "{what}: the guest sees something else");
            }
            if dice.below(3) > 0 {
                return;
            }
            pull(Arc::new(host.clone()), active, &options).unwrap_or_else(|e| panic!("{what}, again: {e}"));
            assert!(see(&host, active) == model, "{what}: the guest sees something else when done again");
            assert!(
                no_journal(&host) && depth(&host, active) == 1 + usize::from(options.base.is_some()),
                "{what}"
            );
        });
    }
    assert!(states > 2000, "{states}");
}

#[test]
fn every_operation_of_a_pull_fails_once_and_nothing_is_lost() {
    let mut failed = 0;
    for seed in 0..4 {
        let host = MemHost::new();
        let mut dice = Random::new(seed);
        let model = random_chain(&host, &mut dice, 3);
        let options = options((seed % 2 > 0).then_some(0));
        let active = Path::new("/2");
        for nth in 1.. {
            let disk = SimHost::over(&host);
            disk.fail(Some(Fault { kind: FaultKind::Io, nth, for_ever: dice.below(2) > 0 }));
            let result = pull(Arc::new(disk.clone()), active, &options);
            let is_hit = disk.failed() > 0;
            disk.fail(None);
            let what = format!("seed {seed}: operation {nth}: {result:?}");
            assert!(see(&disk.now().host(), active) == model, "{what}");
            let again = pull(Arc::new(disk.clone()), active, &options);
            again.unwrap_or_else(|e| panic!("{what}: again: {e}"));
            assert!(see(&disk.now().host(), active) == model, "{what}");
            assert_sound(&disk.now(), &what);
            if !is_hit {
                break;
            }
            failed += 1;
        }
    }
    assert!(failed > 200, "{failed}");
}

/// A chain `/0` to `/2` of which each layer holds something.
fn chain() -> MemHost {
    let host = MemHost::new();
    for n in 0..3u8 {
        let backing = (n > 0).then(|| (format!("/{}", n - 1).into_bytes(), "qcow2".to_owned()));
        let path = PathBuf::from(format!("/{n}"));
        create(&host, &path, &CreateOptions { backing, ..CreateOptions::new(1 << 20) }).unwrap();
        put(&host, &path, &local(), &[(GuestOffset::new(u64::from(n) * 65536), vec![n + 1; 70_000])])
            .unwrap();
    }
    host
}

#[test]
fn what_cannot_be_pulled_is_refused() {
    let host = chain();
    let prepare = |active: &str, base: Option<&str>| {
        let options = PullOptions { base: base.map(Into::into), ..PullOptions::new(local()) };
        Pull::prepare(Arc::new(host.clone()), Path::new(active), &options, &AtomicBool::new(false))
    };
    assert_eq!(prepare("/2", Some("/2")).unwrap_err().kind(), ErrorKind::Usage);
    assert_eq!(prepare("/2", Some("[7]")).unwrap_err().kind(), ErrorKind::Usage);
    assert!(matches!(prepare("/0", None).unwrap(), PreparedPull::Nothing(_)));
    assert!(matches!(prepare("/2", Some("/1")).unwrap(), PreparedPull::Nothing(_)));
    assert_eq!(prepare("/2", Some("[1]")).unwrap().plan().pulled, [Path::new("/1")]);
}

/// Gives the name of an image to another file when the first bytes are written.
struct Exchange<'a> {
    host: &'a MemHost,
    image: &'a Path,
    done: AtomicBool,
}

impl Progress for Exchange<'_> {
    fn written(&self, _: u64, _: u64) {
        if !self.done.swap(true, Relaxed) {
            self.host.rename(self.image, Path::new("/kept")).unwrap();
            self.host.rename(Path::new("/other"), self.image).unwrap();
        }
    }
}

/// The image would read through another base than the one that it was pulled onto.
#[test]
fn a_layer_that_is_exchanged_during_a_pull_costs_no_data() {
    let (active, never) = (Path::new("/2"), AtomicBool::new(false));
    let shown = see(&chain(), active);
    for exchanged in ["/0", "/1", "/2"] {
        let (host, image) = (chain(), Path::new(exchanged));
        host.add("/other", &host.content(image).unwrap()).unwrap();
        let exchange = Exchange { host: &host, image, done: AtomicBool::new(false) };
        let pull = Pull::prepare(Arc::new(host.clone()), active, &options(Some(0)), &never).unwrap();
        let refused = pull.execute(&exchange, &never).unwrap_err();
        let is_named =
            matches!(&refused, Error::Refused { path, reason: Refusal::NotAsKnown { .. } } if path == image);
        assert!(is_named, "{exchanged}: {refused}");
        host.rename(Path::new("/kept"), image).unwrap();
        assert_eq!(depth(&host, active), 3, "{exchanged}: the image was switched");
        assert!(see(&host, active) == shown, "{exchanged}");
        self::pull(Arc::new(host.clone()), active, &options(Some(0))).unwrap();
        assert!(see(&host, active) == shown && no_journal(&host), "{exchanged}: when done again");
    }
}

/// What a commit has begun, only that commit finishes; and a commit goes on where a pull was stopped.
#[test]
fn a_pull_and_a_commit_know_of_each_other() {
    let never = AtomicBool::new(false);
    let shown = see(&chain(), Path::new("/2"));
    let commit = |host: &SimHost| {
        let options = CommitOptions { open: local(), ..CommitOptions::default() };
        heal(host, Path::new("/2"), &options)?;
        Commit::prepare(Arc::new(host.clone()), Path::new("/2"), &options, &never)?.execute(&Silent, &never)
    };
    let (mut refused, mut merged) = (0, 0);
    for nth in (1..).step_by(11) {
        let disk = SimHost::over(&chain());
        disk.fail(Some(Fault { kind: FaultKind::Io, nth, for_ever: true }));
        let done = commit(&disk).is_ok();
        disk.fail(None);
        match pull(Arc::new(disk.clone()), Path::new("/2"), &options(None)) {
            Err(Error::Refused { reason: Refusal::UnfinishedMerge { .. }, .. }) => refused += 1,
            Err(e) => panic!("operation {nth}: {e}"),
            Ok(_) => {}
        }
        assert!(see(&disk.now().host(), Path::new("/2")) == shown, "operation {nth}");
        if done {
            break;
        }
    }
    for nth in (1..).step_by(7) {
        let disk = SimHost::over(&chain());
        disk.fail(Some(Fault { kind: FaultKind::Io, nth, for_ever: true }));
        let done = pull(Arc::new(disk.clone()), Path::new("/2"), &options(Some(0))).is_ok();
        disk.fail(None);
        match commit(&disk) {
            // The layer that was pulled is no part of the chain any more, and reads through base.
            Err(Error::Refused { reason: Refusal::SharedBase { .. }, .. }) => {
                assert_eq!(depth(&disk, Path::new("/2")), 2, "operation {nth}");
                break;
            }
            merged => drop(merged.unwrap_or_else(|e| panic!("operation {nth}: {e}"))),
        }
        assert!(see(&disk.now().host(), Path::new("/2")) == shown, "operation {nth}");
        assert!(see(&disk.now().host(), Path::new("/0")) == shown, "operation {nth}");
        merged += 1;
        if done {
            break;
        }
    }
    assert!(refused > 5 && merged > 10, "{refused}, {merged}");
}

use std::path::PathBuf;
use std::sync::Arc;

use kit::Random;

use super::*;
use crate::error::ErrorKind;
use crate::merge::crash_tests::{assert_sound, cuts, see};
use crate::merge::{BaseChoice, Commit, CommitOptions};
use crate::storage::MemHost;
use crate::storage::sim::{Fault, FaultKind, SimHost, power_cuts};
use crate::testing::{Silent, local, random_chain};
use crate::transfer::put;

/// A merge of the layers above `/BASE` up to `/TOP`, with the overlay `/TOP+1` above them.
struct InterruptedCase {
    host: MemHost,
    paths: Vec<PathBuf>,
    base: usize,
    top: usize,
    /// What the guest sees through the active image.
    model: Vec<u8>,
    /// Base's bytes, and the size of its disk, before the merge.
    base_before: Vec<u8>,
    size_before: u64,
    old_name: String,
}

fn merged(seed: u64) -> InterruptedCase {
    let host = MemHost::new();
    let mut dice = Random::new(seed);
    let layers = 3 + dice.below(3) as usize;
    let model = random_chain(&host, &mut dice, layers as u64);
    let paths: Vec<PathBuf> = (0..layers).map(|n| PathBuf::from(format!("/{n}"))).collect();
    let top = 1 + dice.below(layers as u64 - 2) as usize;
    let base = dice.below(top as u64) as usize;
    let name = |at: usize| paths[at].to_str().unwrap().to_owned();
    let layers_before: Vec<_> = (base + 1..=top).map(|at| host.content(&paths[at]).unwrap()).collect();
    let (base_before, old_name) = (host.content(&paths[base]).unwrap(), name(top));
    let size_before = see(&host, &paths[base]).len() as u64;
    let options = CommitOptions {
        open: local(),
        base: BaseChoice::Named(name(base).into()),
        top: Some(name(top).into()),
        ..CommitOptions::default()
    };
    let commit =
        Commit::prepare(Arc::new(host.clone()), &paths[layers - 1], &options, &AtomicBool::new(false));
    commit.unwrap().execute(&Silent, &AtomicBool::new(false)).unwrap();
    // QEMU leaves the merged layers as they were.
    for (path, bytes) in paths[base + 1..=top].iter().zip(&layers_before) {
        let file = host.open(path, Access::ReadWrite).unwrap();
        file.set_len(0).unwrap();
        file.write_all_at(bytes, 0).unwrap();
    }
    InterruptedCase { host, paths, base, top, model, base_before, size_before, old_name }
}

impl InterruptedCase {
    fn active(&self) -> &Path {
        self.paths.last().unwrap()
    }

    fn stamp(&self, host: &dyn Host, at: usize) -> Stamp {
        Stamp::now(host, &self.paths[at]).unwrap().unwrap()
    }

    fn open(&self, host: &dyn Host) -> Result<Interrupted> {
        self.open_as(host, host)
    }

    /// The stamps are taken before `host` begins to fail.
    fn open_stamped(&self, host: &SimHost) -> Result<Interrupted> {
        self.open_as(host, &SimHost::over(&self.host))
    }

    fn open_as(&self, host: &dyn Host, before: &dyn Host) -> Result<Interrupted> {
        let merged: Vec<Stamp> = (self.base + 1..=self.top).rev().map(|at| self.stamp(before, at)).collect();
        let overlay = self.stamp(before, self.top + 1);
        let base = self.stamp(before, self.base);
        Interrupted::open(host, Some(&overlay), &merged, &base, &local())
    }

    fn difference(&self) -> Option<GuestOffset> {
        let opened = self.open(&self.host).unwrap();
        opened.first_difference(self.size_before, &Silent, &AtomicBool::new(false)).unwrap()
    }

    /// Loses what a power cut may take from a base that was not synced before the switch. It stays the same
    /// file.
    fn lose_base(&self) {
        let file = self.host.open(&self.paths[self.base], Access::ReadWrite).unwrap();
        file.set_len(0).unwrap();
        file.write_all_at(&self.base_before, 0).unwrap();
    }
}

#[test]
fn a_base_that_holds_everything_is_told_from_one_that_lost_it() {
    let mut lost = 0;
    for seed in 0..60 {
        let case = merged(seed);
        let opened = case.open(&case.host).unwrap();
        assert_eq!(opened.backing(), BackingIs::Base, "seed {seed}");
        drop(opened);
        assert_eq!(case.difference(), None, "seed {seed}");
        case.lose_base();
        let visible = see(&case.host, case.active()) != case.model;
        let found = case.difference();
        assert!(found.is_some() || !visible, "seed {seed}: the loss was not found");
        lost += u32::from(found.is_some());
        let mut opened = case.open(&case.host).unwrap();
        opened.relink_back(&case.host, &case.old_name).unwrap();
        assert_eq!(opened.backing(), BackingIs::Top, "seed {seed}");
        let again = opened.relink_back(&case.host, &case.old_name).unwrap_err();
        assert!(again.to_string().contains("not the base"), "{again}");
        drop(opened);
        assert!(see(&case.host, case.active()) == case.model, "seed {seed}: the old chain is not back");
    }
    assert!(lost > 30, "only {lost} cases had something to lose");
}

#[test]
fn no_power_cut_leaves_an_overlay_that_names_neither() {
    let mut told_apart = 0;
    for seed in 200..230 {
        let case = merged(seed);
        case.lose_base();
        let lost = see(&case.host, case.active());
        let disk = SimHost::over(&case.host);
        case.open(&disk).unwrap().relink_back(&disk, &case.old_name).unwrap();
        let (log, overlay) = (disk.log(), disk.start().inode(&case.paths[case.top + 1]));
        let elsewhere = |file: u64| Some(file) != overlay;
        assert!(!log.iter().any(|op| op.changed_file().is_some_and(elsewhere)), "seed {seed}");
        power_cuts(disk.start(), &log, &cuts(seed), |cut| {
            assert_sound(&cut.state, &format!("seed {seed}: {cut}"));
            let shown = see(&cut.state.host(), case.active());
            let done = shown == case.model;
            assert!(done || shown == lost, "seed {seed}: neither the old chain nor the new one: {cut}");
            assert!(done || cut.reached < log.len(), "seed {seed}: it was called done: {cut}");
        });
        told_apart += u32::from(lost != case.model);
    }
    assert!(told_apart > 10, "only {told_apart} cases had something to lose");
}

#[test]
fn what_is_not_as_it_was_is_refused() {
    let case = merged(3);
    let top = case.stamp(&case.host, case.top);
    let overlay = case.stamp(&case.host, case.top + 1);
    let base = case.stamp(&case.host, case.base);
    let open = |merged: &[Stamp], base: &Stamp| {
        Interrupted::open(&case.host, Some(&overlay), merged, base, &local()).map(|_| ())
    };
    let is_refused =
        |result: Result<()>| matches!(result, Err(Error::Refused { reason: Refusal::NotAsKnown { .. }, .. }));
    let merged: Vec<Stamp> = (case.base + 1..=case.top).rev().map(|at| case.stamp(&case.host, at)).collect();
    open(&merged, &base).unwrap();
    assert!(is_refused(open(&merged, &top)), "another base");
    assert!(is_refused(open(&[&merged[..], &merged[..]].concat(), &base)), "a longer chain");
    let held = case.host.open(&overlay.path, Access::Read).unwrap();
    held.lock(LockMode::Read).unwrap();
    assert!(matches!(open(&merged, &base), Err(Error::InUse { .. })));
    drop(held);
    put(&case.host, &top.path, &local(), &[(GuestOffset::ZERO, vec![9; 512])]).unwrap();
    assert!(is_refused(open(&merged, &base)), "a merged layer was written to");
    let mut opened = case.open(&case.host).unwrap();
    let wrong = opened.relink_back(&case.host, overlay.path.to_str().unwrap()).unwrap_err();
    assert!(wrong.to_string().contains("does not lead to the top"), "{wrong}");
}

/// Base holds the content of an old active image, until somebody writes to that image.
#[test]
fn an_active_image_is_compared_without_an_overlay() {
    let case = merged(5);
    // The merged layers, which are unchanged, are not part of this chain.
    let options = CommitOptions {
        open: local(),
        keep_active: true,
        allow_shared_base: true,
        ..CommitOptions::default()
    };
    let never = AtomicBool::new(false);
    let size = see(&case.host, &case.paths[0]).len() as u64;
    let commit = Commit::prepare(Arc::new(case.host.clone()), case.active(), &options, &never).unwrap();
    commit.execute(&Silent, &never).unwrap();
    let difference = || {
        let chain = Chain::open(&case.host, case.active(), &local()).unwrap();
        let stamps: Vec<Stamp> =
            chain.layers().iter().rev().map(|l| Stamp::now(&case.host, &l.path).unwrap().unwrap()).collect();
        drop(chain);
        let (base, merged) = stamps.split_last().unwrap();
        let opened = Interrupted::open(&case.host, None, merged, base, &local()).unwrap();
        assert_eq!(opened.backing(), BackingIs::Top);
        opened.first_difference(size, &Silent, &never).unwrap()
    };
    assert_eq!(difference(), None);
    let at = GuestOffset::new(4096 + 17);
    let unlike = !case.model[at.get() as usize];
    put(&case.host, case.active(), &local(), &[(at, vec![unlike])]).unwrap();
    assert_eq!(difference(), Some(at));
}

#[test]
fn a_name_that_cannot_be_looked_at_leads_nowhere_else() {
    let case = merged(3);
    let is_on_base = case.open(&case.host).unwrap().backing();
    for nth in 1.. {
        let disk = SimHost::over(&case.host);
        disk.fail(Some(Fault { kind: FaultKind::Io, nth, for_ever: false }));
        match case.open_stamped(&disk) {
            Ok(opened) => assert_eq!(opened.backing(), is_on_base, "operation {nth}"),
            Err(e) => assert!(
                matches!(e.kind(), ErrorKind::Io) || matches!(e, Error::MissingLayer { .. }),
                "operation {nth}: {e}"
            ),
        }
        if disk.failed() == 0 {
            break;
        }
    }
}

//! Commits that a power cut or a failing disk stops at any point.

use std::path::{Path, PathBuf};
use std::sync::atomic::AtomicBool;
use std::sync::{Arc, OnceLock};

use rayon::{ThreadPool, ThreadPoolBuilder};

use super::chain::{assert_same, host_with, view};
use super::commit::Case;
use super::model::{Input, ModelLayer, chain as layers, guest};
use crate::Result;
use crate::check::{CheckOptions, check};
use crate::format::is_qcow2;
use crate::merge::{Commit, CommitOptions, Prepared, heal};
use crate::storage::sim::{Cuts, Fault, FaultKind, Garbage, SimHost, State, Tear, power_cuts};
use crate::storage::{Access, Host, MemHost};
use crate::transfer::Silent;

/// The states that are judged of one commit, at most: one takes about a millisecond.
const JUDGED: u64 = 8;

/// A chain and a commit made from the input, on a simulated disk. Either the power is cut, and some of the states
/// that this may leave are judged, with what was being written torn or spoilt; or the N-th operation fails.
/// Then nothing is corrupt, the guest sees what it saw, and the same commit again finishes.
pub fn crash(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let merge = Merge::choose(&mut input);
    on_one_thread(|| merge.stop_somewhere(&mut input));
}

/// On one thread the same input always writes in the same order.
pub(super) fn on_one_thread(run: impl FnOnce() + Send) {
    match alone() {
        Some(pool) => pool.install(run),
        None => run(),
    }
}

fn alone() -> Option<&'static ThreadPool> {
    static ALONE: OnceLock<Option<ThreadPool>> = OnceLock::new();
    ALONE.get_or_init(|| ThreadPoolBuilder::new().num_threads(1).build().ok()).as_ref()
}

/// A chain, and a commit of it.
pub(super) struct Merge {
    pub(super) layers: Vec<ModelLayer>,
    pub(super) case: Case,
    pub(super) options: CommitOptions,
    /// What the guest sees.
    expected: Vec<u8>,
}

impl Merge {
    pub(super) fn choose(input: &mut Input<'_>) -> Self {
        let layers = layers(input);
        let case = Case::choose(input, layers.len());
        Self { options: case.options(&layers), expected: guest(&layers, case.active), layers, case }
    }

    pub(super) fn active(&self) -> &Path {
        &self.layers[self.case.active].path
    }

    pub(super) fn prepare(&self, host: Arc<dyn Host>) -> Result<Prepared> {
        heal(&*host, self.active(), &self.options)?;
        Commit::prepare(host, self.active(), &self.options, &AtomicBool::new(false))
    }

    pub(super) fn run(&self, host: Arc<dyn Host>) -> Result<()> {
        self.run_with(&self.options, host)
    }

    pub(super) fn run_with(&self, options: &CommitOptions, host: Arc<dyn Host>) -> Result<()> {
        let never = AtomicBool::new(false);
        heal(&*host, self.active(), options)?;
        Commit::prepare(host, self.active(), options, &never)?.execute(&Silent, &never).map(drop)
    }

    pub(super) fn disk(&self) -> SimHost {
        SimHost::over(&host_with(&self.layers))
    }

    fn stop_somewhere(&self, input: &mut Input<'_>) {
        let disk = self.disk();
        if self.run(Arc::new(disk.clone())).is_err() {
            // A base of version 2 with snapshots must not grow: the body of commits asks about that.
            return;
        }
        if input.one_in(3) { self.fail(input) } else { self.cut(&disk, input) }
    }

    /// Cuts the power, and judges one in some of the states.
    fn cut(&self, disk: &SimHost, input: &mut Input<'_>) {
        let tear = [Tear::Sector, Tear::Block, Tear::Call][input.below(3) as usize];
        let seed = u64::from(input.byte()) << 8 | u64::from(input.byte());
        let (garbage, damaged) = (Garbage::Sectors, 2);
        let cuts = Cuts { seed, tear, exhaustive: 2, listed: 2, random: 2, garbage, damaged };
        let (skip, every) = (u64::from(input.byte()), 1 + input.below(16));
        let (mut n, mut judged) = (0, 0);
        power_cuts(disk.start(), &disk.log(), &cuts, |cut| {
            n += 1;
            if n > skip && n % every == 0 && judged < JUDGED {
                judged += 1;
                self.judge(&cut.state, !cut.garbage.is_empty());
            }
        });
    }

    /// Lets an operation fail, once or for ever, and goes on when the disk is well again, or after a power cut.
    fn fail(&self, input: &mut Input<'_>) {
        let disk = self.disk();
        let kinds = [FaultKind::Io, FaultKind::NoSpace, FaultKind::Short, FaultKind::Sync];
        let kind = kinds[input.below(4) as usize];
        disk.fail(Some(Fault { kind, nth: u64::from(input.byte()), for_ever: input.one_in(2) }));
        let outcome = self.run(Arc::new(disk.clone()));
        let failed = disk.failed();
        disk.fail(None);
        assert!(outcome.is_ok() || failed > 0, "a disk that is well, and {:?}", outcome.err());
        self.judge(&disk.now(), false);
        self.cut(&disk, input);
    }

    /// Nothing is corrupt, the guest sees what it saw, and the same commit goes on to the end. What is
    /// spoilt is made whole before that, by whoever opens the chain for writing.
    fn judge(&self, state: &State, spoilt: bool) {
        let host = state.host();
        if !spoilt {
            self.assert_sound(state, &host);
            self.assert_guest(&host);
        }
        // When all is removed, as asked for, nothing tells that it was there.
        let is_over = self.case.delete && self.left_over(state).is_none();
        match self.run(Arc::new(host.clone())) {
            Err(error) if !is_over => unreachable!("the commit does not go on: {error}"),
            _ => {}
        }
        let after = State::of(&host);
        assert_eq!(self.left_over(&after), None, "left behind");
        self.assert_sound(&after, &host);
        self.assert_guest(&host);
    }

    /// A file that is not there when the commit is done: a journal, or one of a layer that is removed.
    fn left_over(&self, state: &State) -> Option<PathBuf> {
        let removed = if self.case.delete { self.case.base + 1..self.case.top + 1 } else { 0..0 };
        let is_removed = |name: &Path| {
            let of = |layer: &ModelLayer| {
                layer.path == name || layer.data_file.as_ref().is_some_and(|(data, _)| data == name)
            };
            self.layers[removed.clone()].iter().any(of)
        };
        state.names().find(|name| is_journal(name) || is_removed(name)).map(Path::to_owned)
    }

    pub(super) fn assert_sound(&self, state: &State, host: &MemHost) {
        for path in state.names().filter(|path| state.content(path).is_some_and(|content| is_qcow2(&content)))
        {
            let report = host.open(path, Access::Read).map(|file| {
                let data = self.layers.iter().find(|layer| layer.path == path);
                let data = data.and_then(|layer| layer.data_file.as_ref());
                let data = data.and_then(|(data, _)| host.open(data, Access::Read).ok());
                check(path, &*file, data.as_deref(), &CheckOptions::default())
            });
            match report {
                Ok(Ok(report)) => {
                    assert!(report.is_consistent(), "{}: {:?}", path.display(), report.findings);
                }
                other => unreachable!("{} cannot be checked: {other:?}", path.display()),
            }
        }
    }

    /// The guest's bytes, through the active image; through base if that has been deleted, as asked for.
    pub(super) fn assert_guest(&self, host: &MemHost) {
        let gone = host.stat(self.active()).is_err();
        assert!(!gone || (self.case.delete && self.case.top == self.case.active), "the active image is gone");
        let path = if gone { &self.layers[self.case.base].path } else { self.active() };
        match view(host, path) {
            // Base may be longer than what was merged into it.
            Ok(seen) if gone => assert_same(&seen[..self.expected.len()], &self.expected, path),
            Ok(seen) => assert_same(&seen, &self.expected, path),
            Err(error) => unreachable!("{}: {error}", path.display()),
        }
    }
}

/// How the names of journals and of records of single edits end.
pub(super) const ENDINGS: [&str; 2] = [".qmerge-journal", ".qmerge-switch"];

/// Whether a file is a journal, or a record of a single edit, by its name.
pub(super) fn is_journal(path: &Path) -> bool {
    let name = path.to_string_lossy();
    ENDINGS.iter().any(|ending| name.ends_with(ending))
}

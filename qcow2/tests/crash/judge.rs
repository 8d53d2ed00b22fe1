//! Whether a state of the disk is one that a merge may leave behind.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use qcow2::chain::Chain;
use qcow2::chain::view::View;
use qcow2::check::{CheckOptions, check};
use qcow2::image::ClusterCache;
use qcow2::merge::{
    BaseChoice, Commit, CommitOptions, Prepared, Report, Silent, abort, heal, heal_image, open_whole,
};
use qcow2::storage::sim::{Cut, State};
use qcow2::storage::{Access, Host, MemHost};
use qcow2::units::GuestOffset;
use qcow2::{Error, Refusal, Result};

use crate::chain::{After, JOURNALS, Scenario, options};
use crate::power::disk;

/// What is wrong, in words.
pub(crate) type Judged = std::result::Result<(), String>;

/// A scenario with what its layers show, which every state is compared with.
#[derive(Debug)]
pub(crate) struct Judge<'a> {
    pub(crate) scenario: &'a Scenario,
    start: State,
    seen: Vec<Vec<u8>>,
    merged: Vec<u8>,
}

/// Merges as the scenario says.
pub(crate) fn merge(scenario: &Scenario, host: Arc<dyn Host>) -> Result<Report> {
    merge_with(scenario, &scenario.options(), host)
}

/// Merges with other options.
pub(crate) fn merge_with(
    scenario: &Scenario,
    options: &CommitOptions,
    host: Arc<dyn Host>,
) -> Result<Report> {
    prepare(scenario, options, host)?.execute(&Silent, &AtomicBool::new(false))
}

fn prepare(scenario: &Scenario, options: &CommitOptions, host: Arc<dyn Host>) -> Result<Prepared> {
    let active = scenario.path(scenario.active());
    heal(&*host, active, options)?;
    Commit::prepare(host, active, options, &AtomicBool::new(false))
}

fn caught(judge: impl FnOnce() -> Judged) -> Judged {
    catch_unwind(AssertUnwindSafe(judge)).unwrap_or_else(|_| Err("the engine panicked".into()))
}

impl<'a> Judge<'a> {
    pub(crate) fn new(scenario: &'a Scenario) -> Self {
        let (start, seen, merged) = (scenario.start(), scenario.seen(), scenario.merged());
        Self { scenario, start, seen, merged }
    }

    pub(crate) fn start(&self) -> &State {
        &self.start
    }

    /// Judges a state that a power cut has left: as it is, after recovery, and after the same merge.
    pub(crate) fn state(&self, state: &State) -> Judged {
        caught(|| {
            self.left(state)?;
            self.again(state)
        })
    }

    /// Judges a state in which sectors may hold garbage: it need not be sound before it was recovered.
    pub(crate) fn damaged(&self, state: &State) -> Judged {
        caught(|| {
            self.read_or_refused(state)?;
            self.again(state)
        })
    }

    /// Whoever opens the chain only to read it, as flatten does, reads what the guest wrote, or is refused.
    fn read_or_refused(&self, state: &State) -> Judged {
        if self.is_gone(state, self.scenario.active()) {
            return Ok(());
        }
        match self.read_whole(&state.host()) {
            Ok(shown) => self.is_seen(&shown).map_err(|what| format!("read as it lies: {what}")),
            Err(_) => Ok(()),
        }
    }

    /// What the active image shows to whoever reads no journal.
    fn read_whole(&self, host: &dyn Host) -> Result<Vec<u8>> {
        let options = self.scenario.options();
        let active = self.scenario.path(self.scenario.active());
        let chain = open_whole(host, active, &options.open, options.journal_dir.as_deref())?;
        let images = chain.images();
        let view = View::new(&images, 0, chain.active());
        let mut bytes = vec![0xdd; view.size() as usize];
        view.read(GuestOffset::ZERO, &mut bytes, &mut ClusterCache::new())?;
        Ok(bytes)
    }

    /// Whether that is what the guest wrote.
    fn is_seen(&self, shown: &[u8]) -> Judged {
        let expected = &self.seen[self.scenario.active()];
        match shown.iter().zip(expected).position(|(is, was)| is != was) {
            Some(at) => Err(format!("the guest's bytes differ at {at}")),
            None => Ok(()),
        }
    }

    /// Judges the merge of the active image into the layer below it, in the middle of another merge. Says whether it was
    /// done.
    pub(crate) fn merged_above(&self, state: &State) -> std::result::Result<bool, String> {
        let host = disk(self.scenario, state);
        if self.is_gone(state, self.scenario.active()) {
            return Ok(false);
        }
        let mut shallow = self.scenario.options();
        (shallow.base, shallow.top, shallow.delete) = (BaseChoice::Shallow, None, false);
        let merged = merge_with(self.scenario, &shallow, Arc::new(host.clone()));
        let after = |what: &str| format!("{what} after {merged:?}");
        match self.read_whole(&host) {
            Ok(shown) => self.is_seen(&shown).map_err(|what| after(&what))?,
            Err(e) if merged.is_ok() => return Err(after(&e.to_string())),
            // The power cut has left it like that.
            Err(_) => {}
        }
        Ok(merged.is_ok())
    }

    /// Judges what is left when the merge is given up: base is sound, and the same merge can be begun anew.
    pub(crate) fn given_up(&self, state: &State, is_damaged: bool) -> Judged {
        caught(|| {
            let host = disk(self.scenario, state);
            let (base, options) = (self.scenario.path(self.scenario.base), self.scenario.options());
            let dir = options.journal_dir.as_deref();
            let healed = heal_image(&host, base, &options.open, dir);
            match healed.and_then(|_| abort(&host, base, &options.open, dir, &AtomicBool::new(false))) {
                Ok(_) => {}
                // The chain was changed: the merge is done, and can only be finished.
                Err(Error::Refused { reason: Refusal::MergeDone { .. }, .. }) => return Ok(()),
                Err(e) => return Err(format!("cannot be given up: {e}")),
            }
            let state = host.now();
            if !is_damaged {
                self.left(&state).map_err(|what| format!("given up: {what}"))?;
            }
            self.again(&state).map_err(|what| format!("given up, and begun again: {what}"))
        })
    }

    /// Judges what a power cut has left.
    pub(crate) fn cut(&self, cut: &Cut<'_>) -> Judged {
        if cut.garbage.is_empty() { self.state(&cut.state) } else { self.damaged(&cut.state) }
    }

    /// No image is corrupt, the guest sees what it saw, and what nobody may touch is as it was.
    pub(crate) fn left(&self, state: &State) -> Judged {
        let host = state.host();
        self.sound(state, &host)?;
        self.intact(state, &host)?;
        self.recorded(state, &host)?;
        self.held(state)
    }

    /// The same merge succeeds, and leaves what an undisturbed one leaves. Where all is done and everything that tells
    /// of it was removed, it may say that there is no such image, and an index means another layer.
    pub(crate) fn again(&self, state: &State) -> Judged {
        if self.scenario.by_index && self.is_over(state) {
            return self.done(state);
        }
        let host = disk(self.scenario, state);
        match merge(self.scenario, Arc::new(host.clone())) {
            Ok(_) => self.done(&host.now()).map_err(|what| format!("after the same merge: {what}")),
            Err(_) if self.is_over(state) => self.done(state),
            Err(e) => Err(format!("the same merge is refused: {e}")),
        }
    }

    /// All is done: base shows what was merged, everything is sound, and nothing is left behind.
    pub(crate) fn done(&self, state: &State) -> Judged {
        self.left(state)?;
        if self.shows(&state.host(), self.scenario.base)? != self.merged {
            return Err("base does not show what was merged".into());
        }
        // Nobody was to touch what lies above the overlay that was relinked.
        for path in (self.scenario.top + 2..self.scenario.layers.len()).map(|at| self.scenario.path(at)) {
            if !state.has_same(path, &self.start) {
                return Err(format!("{} was changed", path.display()));
            }
        }
        self.emptied(state, &state.host())?;
        match self.left_over(state) {
            Some(name) => Err(format!("{} was left behind", name.display())),
            None => Ok(()),
        }
    }

    /// A file that an undisturbed merge does not leave.
    fn left_over<'s>(&'s self, state: &'s State) -> Option<&'s Path> {
        // Half a record in the journals' own folder belongs to nobody, and is harmless.
        let is_new = |name: &&Path| self.start.inode(name).is_none() && !name.starts_with(JOURNALS);
        let mut removed = self.scenario.removed().filter(|name| state.inode(name).is_some());
        state.names().find(is_new).or_else(|| removed.next())
    }

    /// Whether all that was to be removed is gone, and with it all that tells of the merge.
    pub(crate) fn is_over(&self, state: &State) -> bool {
        let tells = |name: &Path| name.to_string_lossy().contains("qmerge-journal");
        self.scenario.removed().next().is_some()
            && self.left_over(state).is_none()
            && !state.names().any(tells)
    }

    /// Whether a layer is one that the merge may remove, and was removed.
    fn is_gone(&self, state: &State, at: usize) -> bool {
        let path = self.scenario.path(at);
        self.scenario.removed().any(|removed| removed == path) && state.inode(path).is_none()
    }

    fn sound(&self, state: &State, host: &MemHost) -> Judged {
        for layer in self.scenario.layers.iter().filter(|layer| layer.is_qcow2) {
            if state.inode(&layer.path).is_none() || state.has_same(&layer.path, &self.start) {
                continue;
            }
            let open =
                |path: &Path| host.open(path, Access::Read).map_err(|e| format!("{}: {e}", path.display()));
            let data = layer.data_file.as_ref().map(|(path, _)| open(path)).transpose()?;
            let file = open(&layer.path)?;
            match check(&layer.path, &*file, data.as_deref(), &CheckOptions::default()) {
                Ok(report) if report.is_consistent() => {}
                Ok(report) => {
                    let found = report.first_corruption().map(ToString::to_string).unwrap_or_default();
                    return Err(format!("{} is corrupt: {found}", layer.path.display()));
                }
                Err(e) => return Err(format!("cannot be checked: {e}")),
            }
        }
        Ok(())
    }

    /// Top and all above it, and what lies below base, show what they showed.
    fn intact(&self, state: &State, host: &MemHost) -> Judged {
        let Scenario { base, top, .. } = *self.scenario;
        let all = 0..self.scenario.layers.len();
        for at in all.filter(|at| *at < base || *at >= top) {
            if self.is_gone(state, at) {
                continue;
            }
            let mut shown = self.shows(host, at)?;
            let expected = &self.seen[at];
            if at == top && at < self.scenario.active() && shown.len() > expected.len() {
                // Emptied, it is as large as the active image.
                shown.truncate(expected.len());
            }
            if shown != *expected {
                let differs = shown.iter().zip(expected).position(|(is, was)| is != was);
                let name = self.scenario.path(at).display();
                return Err(format!(
                    "{name}: the guest's bytes differ at {differs:?} ({} bytes)",
                    shown.len()
                ));
            }
        }
        Ok(())
    }

    /// A chain that somebody recorded layer by layer, whatever the headers say, shows its guest what it showed, or
    /// cannot be opened because a layer was removed.
    fn recorded(&self, state: &State, host: &MemHost) -> Judged {
        if (0..self.scenario.layers.len()).any(|at| state.inode(self.scenario.path(at)).is_none()) {
            return Ok(());
        }
        let read = || -> Result<Vec<u8>> {
            let open = |at: usize| Chain::open(host, self.scenario.path(at), &options());
            let chains = (0..self.scenario.layers.len()).map(open).collect::<Result<Vec<_>>>()?;
            let images: Vec<_> = chains.iter().filter_map(|chain| chain.images().pop()).collect();
            let view = View::new(&images, 0, images.len() - 1);
            let mut bytes = vec![0xdd; view.size() as usize];
            view.read(GuestOffset::ZERO, &mut bytes, &mut ClusterCache::new())?;
            Ok(bytes)
        };
        let shown = read().map_err(|e| format!("the recorded chain cannot be read: {e}"))?;
        let expected = &self.seen[self.scenario.active()];
        let differs = shown.iter().zip(expected).position(|(is, was)| is != was);
        match shown == *expected {
            true => Ok(()),
            false => Err(format!(
                "the recorded chain: the guest's bytes differ at {differs:?} ({} bytes)",
                shown.len()
            )),
        }
    }

    /// Every merged layer that is there is an empty overlay on base, as large as the active image at least.
    fn emptied(&self, state: &State, host: &MemHost) -> Judged {
        let Scenario { base, top, .. } = *self.scenario;
        if self.scenario.after == After::Keep {
            return Ok(());
        }
        let size = self.seen[self.scenario.active()].len() as u64;
        for at in (base + 1..=top).filter(|at| state.inode(self.scenario.path(*at)).is_some()) {
            let path = self.scenario.path(at);
            let name = path.display();
            let chain = Chain::open(host, path, &options()).map_err(|e| e.to_string())?;
            let image = chain.layers().last().and_then(|layer| layer.image.as_qcow2());
            let image = image.ok_or("no qcow2 image")?;
            if image.next_allocated(GuestOffset::ZERO).map_err(|e| e.to_string())?.is_some() {
                return Err(format!("{name} still holds data"));
            }
            if image.virtual_size() < size {
                return Err(format!("{name} is too short: {} bytes", image.virtual_size()));
            }
            let below = chain.layers().iter().rev().nth(1).map(|layer| layer.path.as_path());
            if below.is_none_or(|below| host.stat(below).ok() != host.stat(self.scenario.path(base)).ok())
                && !self.scenario.cramped
            {
                return Err(format!("{name} is not on base, but on {below:?}"));
            }
        }
        Ok(())
    }

    /// What internal snapshots of base hold is as it was.
    fn held(&self, state: &State) -> Judged {
        let base = &self.scenario.layers[self.scenario.base];
        let cluster = |bytes: &[u8], host: u64| -> Option<Vec<u8>> {
            Some(bytes.get(host as usize..(host + base.cluster_size) as usize)?.to_vec())
        };
        if base.held.is_empty() {
            return Ok(());
        }
        let now = state.content(&base.path).unwrap_or_default();
        match base.held.iter().find(|host| cluster(&now, **host) != cluster(&base.file, **host)) {
            Some(host) => Err(format!("a snapshot's cluster at {host:#x} was changed")),
            None => Ok(()),
        }
    }

    /// The guest's bytes through a layer.
    fn shows(&self, host: &MemHost, at: usize) -> std::result::Result<Vec<u8>, String> {
        let path = self.scenario.path(at);
        let read = || -> Result<Vec<u8>> {
            let chain = Chain::open(host, path, &options())?;
            let images = chain.images();
            let view = View::new(&images, 0, chain.active());
            let mut bytes = vec![0xdd; view.size() as usize];
            view.read(GuestOffset::ZERO, &mut bytes, &mut ClusterCache::new())?;
            Ok(bytes)
        };
        read().map_err(|e| format!("{} cannot be read: {e}", path.display()))
    }
}

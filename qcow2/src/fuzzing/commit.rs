//! Commits in memory, judged by a byte array and by the engine's check.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kit::Random;

use super::chain::{assert_same, host_with, options, view};
use super::model::{Input, ModelLayer, chain as layers, guest};
use super::mutate::mutate;
use crate::Result;
use crate::chain::Chain;
use crate::check::{CheckOptions, Verdict, check};
use crate::format::{Cluster0, read_be_u64s};
use crate::image::{Qcow2, read_bitmaps};
use crate::merge::{Afterwards, BaseChoice, Commit, CommitOptions, Prepared, Report};
use crate::storage::{Access, Host, MemHost};
use crate::transfer::{Silent, Totals};

/// The files of a host by name.
type Files = BTreeMap<PathBuf, Vec<u8>>;

/// A chain and a commit made from the input. What the guest sees must not change; base must hold what
/// was merged; what is left must be consistent, and nothing else touched. In every fourth chain one file
/// is damaged first: then the commit may be refused, with nothing written, or leave what could be read
/// as it was.
pub fn commit(bytes: &[u8]) {
    let mut input = Input::new(bytes);
    let mut layers = layers(&mut input);
    let case = Case::choose(&mut input, layers.len());
    let damaged = input.one_in(4);
    if damaged {
        damage(&mut layers, &mut input);
    }
    let host = host_with(&layers);
    let before = CommitBefore { files: files(&host, &layers), layers, case };
    if damaged { before.commit_damaged(&host) } else { before.commit_sound(&host) }
}

/// Which layers are merged, and how.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case {
    pub(super) base: usize,
    pub(super) top: usize,
    pub(super) active: usize,
    pub(super) delete: bool,
    keep_active: bool,
    verify: bool,
}

impl Case {
    pub(super) fn choose(input: &mut Input<'_>, depth: usize) -> Self {
        let active = depth - 1;
        let base = input.below(active as u64) as usize;
        let top = base + 1 + input.below((active - base) as u64) as usize;
        let delete = input.one_in(6);
        Self { base, top, active, delete, keep_active: !delete && input.one_in(6), verify: input.one_in(3) }
    }

    fn empties(&self) -> bool {
        self.top == self.active && !self.keep_active && !self.delete
    }

    pub(super) fn options(&self, layers: &[ModelLayer]) -> CommitOptions {
        let named = |at: usize| layers[at].path.clone().into_os_string();
        CommitOptions {
            base: BaseChoice::Named(named(self.base)),
            top: (self.top != self.active).then(|| named(self.top)),
            open: options(),
            delete: self.delete,
            keep_active: self.keep_active,
            verify: self.verify,
            drop_bitmaps: true,
            allow_snapshot_change: true,
            ..CommitOptions::default()
        }
    }
}

/// A raw file that ends inside a block shows the rest of it as data once it has grown, in bytes.
const BLOCK: u64 = 4096;

/// What was there before the commit.
struct CommitBefore {
    layers: Vec<ModelLayer>,
    files: Files,
    case: Case,
}

impl CommitBefore {
    fn active(&self) -> &Path {
        &self.layers[self.case.active].path
    }

    fn prepare(&self, host: &MemHost) -> Result<Prepared> {
        let never = AtomicBool::new(false);
        Commit::prepare(Arc::new(host.clone()), self.active(), &self.case.options(&self.layers), &never)
    }

    fn execute(commit: Prepared) -> Result<Report> {
        commit.execute(&Silent, &AtomicBool::new(false))
    }

    fn commit_damaged(&self, host: &MemHost) {
        let seen = view(host, self.active());
        let Ok(commit) = self.prepare(host) else {
            assert_eq!(files(host, &self.layers), self.files, "a refused commit has written");
            return;
        };
        let done = Self::execute(commit);
        let gone = self.case.delete && self.case.top == self.case.active;
        if let (Ok(seen), false) = (seen, gone && done.is_ok()) {
            match view(host, self.active()) {
                Ok(now) => assert_same(&now, &seen, self.active()),
                Err(error) => {
                    unreachable!("{:?}, {done:?}: the guest's disk was readable before: {error}", self.case)
                }
            }
        }
    }

    fn commit_sound(&self, host: &MemHost) {
        let commit = match self.prepare(host) {
            Ok(commit) => commit,
            Err(error) => {
                assert!(self.old_snapshots_would_grow(), "a sound chain is refused: {error}");
                assert_eq!(files(host, &self.layers), self.files, "a refused commit has written");
                return;
            }
        };
        assert_eq!(files(host, &self.layers), self.files, "planning has written");
        let relinked = commit.plan().is_some_and(|plan| matches!(plan.afterwards, Afterwards::Relink { .. }));
        assert_eq!(relinked, self.case.top < self.case.active, "the overlay above top is relinked");
        let planned = commit.plan().map(|plan| plan.totals).unwrap_or_default();
        match Self::execute(commit) {
            Ok(report) => {
                let exact = |t: &Totals| (t.bytes_to_copy, t.clusters_to_allocate);
                assert_eq!(exact(&report.totals), exact(&planned), "the plan was not what was done");
                // Zeros that a new cluster has by itself need no writing: where it lies is not planned.
                let most = |t: &Totals| t.bytes_to_write.max(t.bytes_to_zero) + BLOCK;
                assert!(report.totals.bytes_to_write <= most(&planned), "more than planned");
                assert!(report.totals.bytes_to_zero <= most(&planned), "more than planned");
            }
            Err(error) => unreachable!("a commit failed: {error}"),
        }
        self.assert_views(host);
        self.assert_chain(host);
        self.assert_consistent(host);
        self.assert_untouched(host);
        if let Err(error) = self.assert_bitmaps_tell(host) {
            unreachable!("bitmaps of base: {error}");
        }
        if self.case.empties() {
            self.assert_again_changes_nothing(host);
        }
    }

    /// Snapshots of version 2 images need not say how large their disk was: such a base does not grow.
    fn old_snapshots_would_grow(&self) -> bool {
        let (base, top) = (&self.layers[self.case.base], &self.layers[self.case.top]);
        let version_2 = base.is_qcow2() && base.file.get(7) == Some(&2);
        version_2 && !base.held_by_snapshots.is_empty() && base.size() < top.size()
    }

    /// The guest sees what it saw; base shows what was merged.
    fn assert_views(&self, host: &MemHost) {
        let Case { base, top, active, delete, .. } = self.case;
        let read = |path: &Path| match view(host, path) {
            Ok(bytes) => bytes,
            Err(error) => unreachable!("after the commit: {error}"),
        };
        if !(delete && top == active) {
            assert_same(&read(self.active()), &guest(&self.layers, active), self.active());
        }
        for (below, layer) in self.layers[..base].iter().enumerate() {
            assert_same(&read(&layer.path), &guest(&self.layers, below), &layer.path);
        }
        let mut merged = guest(&self.layers, top);
        let old = guest(&self.layers, base);
        let seen = merged.len();
        merged.extend(old.iter().skip(seen));
        let mut found = read(&self.layers[base].path);
        if top < active && seen < merged.len() {
            // What the layer above a short top saw as zeros is zeros now; the rest is as it was.
            let zeros = self.layers[top + 1].size().clamp(seen, merged.len());
            merged[seen..zeros].fill(0);
        }
        assert_same(&found, &merged, &self.layers[base].path);
        found.clear();
    }

    /// The chain is what was asked for.
    fn assert_chain(&self, host: &MemHost) {
        let Case { base, top, active, delete, keep_active, .. } = self.case;
        let mut expected: Vec<_> = self.layers[..=base].iter().map(|l| l.path.clone()).collect();
        if top < active {
            expected.extend(self.layers[top + 1..].iter().map(|l| l.path.clone()));
        } else if keep_active {
            expected = self.layers.iter().map(|l| l.path.clone()).collect();
        } else if !delete {
            expected.push(self.active().to_owned());
        }
        let Some(last) = expected.last() else { return };
        match Chain::open(host, last, &options()) {
            Ok(chain) => {
                let found: Vec<_> = chain.layers().iter().map(|l| l.path.clone()).collect();
                assert_eq!(found, expected, "the chain afterwards");
            }
            Err(error) => unreachable!("the chain does not open any more: {error}"),
        }
    }

    /// Every image that is left is free of corruption and leaks.
    fn assert_consistent(&self, host: &MemHost) {
        for layer in self.layers.iter().filter(|l| l.is_qcow2()) {
            let Ok(file) = host.open(&layer.path, Access::Read) else {
                assert!(self.case.delete, "{} is gone", layer.path.display());
                continue;
            };
            let data = layer.data_file.as_ref().and_then(|(path, _)| host.open(path, Access::Read).ok());
            match check(&layer.path, &*file, data.as_deref(), &CheckOptions::default()) {
                Ok(report) => {
                    let found = &report.findings;
                    assert_eq!(report.verdict(), Verdict::Clean, "{}: {found:?}", layer.path.display());
                }
                Err(error) => unreachable!("cannot be checked: {error}"),
            }
        }
    }

    /// Files that the plan does not name are as they were; of layers that are kept and of the overlay above top
    /// only cluster 0 has changed; snapshots of base hold what they held. Merged layers become empty.
    fn assert_untouched(&self, host: &MemHost) {
        let Case { base, top, active, delete, .. } = self.case;
        let now = files(host, &self.layers);
        let same = |path: &Path, from: usize| {
            let (was, is) = (self.files.get(path), now.get(path));
            let rest = |bytes: Option<&Vec<u8>>| bytes.map(|b| b.get(from..).unwrap_or_default().to_vec());
            assert_eq!(rest(is), rest(was), "{} was changed behind {from}", path.display());
        };
        for (at, layer) in self.layers.iter().enumerate() {
            let merged = (base + 1..=top).contains(&at);
            let emptied = merged && (top < active || self.case.empties());
            let removed = delete && merged;
            if at == base || emptied || removed {
                continue;
            }
            let marked = merged || at == top + 1;
            same(&layer.path, if marked { layer.cluster_size as usize } else { 0 });
            if let Some((data, _)) = &layer.data_file {
                same(data, 0);
            }
        }
        let layer = &self.layers[base];
        let (was, is) = (self.files.get(&layer.path), now.get(&layer.path));
        for host in &layer.held_by_snapshots {
            let cluster = |bytes: Option<&Vec<u8>>| {
                let start = *host as usize;
                bytes.and_then(|b| b.get(start..start + layer.cluster_size as usize).map(<[u8]>::to_vec))
            };
            assert_eq!(cluster(is), cluster(was), "a snapshot's cluster at {host:#x} was changed");
        }
    }

    /// Persistent bitmaps of base are still there, and call every byte dirty that has changed.
    fn assert_bitmaps_tell(&self, host: &MemHost) -> Result<()> {
        let layer = &self.layers[self.case.base];
        let Some(was) = self.files.get(&layer.path).filter(|_| layer.is_qcow2()) else { return Ok(()) };
        let io = |e| crate::Error::io(&layer.path, crate::FileOp::Read, None, e);
        let file = host.open(&layer.path, Access::Read).map_err(io)?;
        let cluster0 = Qcow2::read_cluster0(&layer.path, &*file)?;
        let bitmaps = read_bitmaps(&layer.path, &*file, &cluster0)?;
        let before = Cluster0::parse(was).and_then(|c| c.bitmaps()).ok().flatten().map_or(0, |b| b.count);
        assert_eq!(bitmaps.len(), before as usize, "bitmaps of base are gone");
        let (old, new) = (guest(&self.layers, self.case.base), view(host, &layer.path)?);
        let now = host.content(&layer.path).map_err(io)?;
        let word = |at: u64| now.get(at as usize..at as usize + 8).map(|w| read_be_u64s(w).sum::<u64>());
        for bitmap in &bitmaps {
            assert!(bitmap.is_auto() && !bitmap.is_in_use(), "its flags are {:#x}", bitmap.flags);
            let is_dirty = |at: usize| {
                let bit = at as u64 >> bitmap.granularity_bits;
                let (entry, bit) = (bit / (layer.cluster_size * 8), bit % (layer.cluster_size * 8));
                match word(bitmap.table_offset.get() + entry * 8) {
                    None | Some(0) => false,
                    Some(1) => true,
                    Some(data) => {
                        now.get((data + bit / 8) as usize).is_some_and(|byte| byte >> (bit % 8) & 1 == 1)
                    }
                }
            };
            let old = |at: usize| old.get(at).copied().unwrap_or(0);
            let missed = new.iter().enumerate().position(|(at, byte)| *byte != old(at) && !is_dirty(at));
            assert_eq!(missed, None, "the bitmap calls a byte clean that has changed");
        }
        Ok(())
    }

    /// ACTIVE is an empty overlay on base: the same commit has nothing to do.
    fn assert_again_changes_nothing(&self, host: &MemHost) {
        let now = files(host, &self.layers);
        match self.prepare(host).and_then(Self::execute) {
            Ok(report) => assert!(report.totals.is_empty(), "there was something left to merge: {report:?}"),
            Err(error) => unreachable!("the same commit is refused: {error}"),
        }
        assert_eq!(files(host, &self.layers), now, "the same commit has changed something");
    }
}

/// Changes bytes of one file of the chain.
fn damage(layers: &mut [ModelLayer], input: &mut Input<'_>) {
    let at = input.below(layers.len() as u64) as usize;
    let seed = u64::from(input.byte()) << 8 | u64::from(input.byte());
    mutate(&mut layers[at].file, &mut Random::new(seed));
}

fn files(host: &MemHost, layers: &[ModelLayer]) -> Files {
    let names = layers.iter().flat_map(|l| l.data_file.iter().map(|(path, _)| path).chain([&l.path]));
    names.filter_map(|path| Some((path.clone(), host.content(path).ok()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A body that finds nothing to do would find no bugs.
    #[test]
    fn most_chains_have_something_to_merge() {
        let mut random = Random::new(7);
        let idle = (0..200).filter(|_| {
            let bytes: Vec<u8> = (0..256).map(|_| random.next() as u8).collect();
            let mut input = Input::new(&bytes);
            let layers = layers(&mut input);
            let case = Case::choose(&mut input, layers.len());
            let host = host_with(&layers);
            let before = CommitBefore { files: files(&host, &layers), layers, case };
            // A version 2 base with snapshots must not grow: a refusal is no merge.
            before
                .prepare(&host)
                .map_or(true, |commit| commit.plan().is_none_or(|plan| plan.totals.is_empty()))
        });
        assert!(idle.count() < 20);
    }
}

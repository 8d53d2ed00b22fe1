//! Every state that a power cut may leave.
//!
//! It is enough to cut the power just before each barrier, and at the end: all sets of what was pending
//! include those of the moments before. The random choices have the probabilities of FoundationDB's
//! simulated disk (`AsyncFileNonDurable`).

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;

use kit::Random;

use super::masks::{masks, positions};
use super::record::DiskOp;
use super::state::{Digests, State};
use super::{BLOCK, SECTOR};

/// The unit of which a power cut leaves all or nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tear {
    /// Whole calls.
    Call,
    /// Blocks of 4 KiB.
    Block,
    /// Sectors of 512 bytes; blocks are tried as well.
    Sector,
}

/// What may hold garbage after a power cut, if it was being written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Garbage {
    /// Nothing.
    None,
    /// One or two sectors of 512 bytes.
    Sectors,
    /// One or two blocks of 4 KiB, with what lies beside the bytes that were written.
    Blocks,
}

/// Which power cuts are tried.
#[derive(Clone, Copy, Debug)]
pub struct Cuts {
    /// What the random choices follow from.
    pub seed: u64,
    /// The unit that is written whole or not at all.
    pub tear: Tear,
    /// Up to so many pending units, all sets of them are tried.
    pub exhaustive: usize,
    /// Of more units: so many prefixes, single ones, and all but one.
    pub listed: usize,
    /// And so many random sets.
    pub random: usize,
    /// What may hold garbage,
    pub garbage: Garbage,
    /// and how many such states are tried at each barrier.
    pub damaged: usize,
}

/// What has become of the lengths of files that grew.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Length {
    /// As long as the writes that were let through.
    Kept,
    /// As before, whatever was written behind that.
    Old,
    /// As long as it was to be.
    Full,
}

/// One state that a power cut may leave.
#[derive(Debug)]
pub struct Cut<'a> {
    /// The files.
    pub state: State,
    /// How many entries of the log were done.
    pub reached: usize,
    /// The sectors or blocks that hold garbage: file and offset.
    pub garbage: Vec<(u64, u64)>,
    pending: &'a [Undurable<'a>],
    kept: Vec<bool>,
    length: Length,
}

/// Something that is not durable.
#[derive(Clone, Copy, Debug)]
struct Undurable<'a> {
    op: &'a DiskOp,
    /// A barrier for it has failed: it may never become durable.
    lost: bool,
}

/// Calls `f` with each different state that a power cut may leave of a log that began with `start`; says
/// how many there were.
pub fn power_cuts(start: &State, log: &[DiskOp], cuts: &Cuts, mut f: impl FnMut(&Cut<'_>)) -> u64 {
    let mut disk = CutDisk {
        durable: start.clone(),
        cuts,
        dice: Random::new(cuts.seed),
        seen: HashSet::new(),
        end: log.len(),
        digests: Digests::default(),
        notes: 0,
        states: 0,
    };
    let mut pending: Vec<Undurable<'_>> = Vec::new();
    let mut changed = true;
    for (at, op) in log.iter().enumerate() {
        if !op.is_barrier() {
            match op {
                DiskOp::Note(_) => disk.notes += 1,
                op => pending.push(Undurable { op, lost: false }),
            }
            changed = true;
            continue;
        }
        if changed {
            disk.visit(&pending, at, &mut f);
            changed = false;
        }
        changed |= disk.settle(&mut pending, op);
    }
    disk.visit(&pending, log.len(), &mut f);
    disk.states
}

/// The disk while the power is cut again and again.
struct CutDisk<'a> {
    durable: State,
    cuts: &'a Cuts,
    dice: Random,
    /// States are judged anew behind a note, and when all is said to be done.
    seen: HashSet<(u64, usize, bool)>,
    end: usize,
    digests: Digests,
    notes: usize,
    states: u64,
}

impl CutDisk<'_> {
    /// What a barrier makes durable leaves the list; true if anything did.
    fn settle(&mut self, pending: &mut Vec<Undurable<'_>>, barrier: &DiskOp) -> bool {
        let concerned = |op: &DiskOp| match barrier {
            DiskOp::Sync { file, .. } => op.changed_file() == Some(*file),
            DiskOp::SyncDir { dir } => op.changed_dir() == Some(dir),
            _ => false,
        };
        if let DiskOp::Sync { done: false, .. } = barrier {
            pending.iter_mut().filter(|p| concerned(p.op)).for_each(|p| p.lost = true);
            return false;
        }
        // A lost write comes back if its sector was written again: the page goes to disk as a whole.
        let again: BTreeSet<_> =
            pending.iter().filter(|p| !p.lost && concerned(p.op)).filter_map(|p| p.op.sector()).collect();
        let before = pending.len();
        pending.retain(|p| {
            let lost = p.lost && !p.op.sector().is_some_and(|sector| again.contains(&sector));
            let stays = !concerned(p.op) || lost;
            if !stays {
                self.durable.apply(p.op);
            }
            stays
        });
        pending.len() != before
    }

    /// Cuts the power now.
    fn visit<'p>(&mut self, all: &[Undurable<'p>], reached: usize, f: &mut impl FnMut(&Cut<'_>)) {
        self.digests.learn(&self.durable);
        let pending = self.effective(all);
        let (exhaustive, sets) = self.sets(&pending);
        for kept in sets {
            let lengths: &[Length] = match self.dice.below(2) {
                _ if exhaustive => &[Length::Kept, Length::Old, Length::Full],
                0 => &[Length::Kept, Length::Old],
                _ => &[Length::Kept, Length::Full],
            };
            for length in lengths {
                let state = self.build(&pending, &kept, *length);
                self.give(
                    Cut {
                        state,
                        reached,
                        garbage: Vec::new(),
                        pending: &pending,
                        kept: kept.clone(),
                        length: *length,
                    },
                    f,
                );
            }
        }
        if self.cuts.garbage != Garbage::None {
            self.damage(&pending, all, reached, f);
        }
    }

    fn give(&mut self, cut: Cut<'_>, f: &mut impl FnMut(&Cut<'_>)) {
        if self.seen.insert((cut.state.digest(&self.digests), self.notes, cut.reached == self.end)) {
            self.states += 1;
            f(&cut);
        }
    }

    /// Without the writes that change nothing.
    fn effective<'p>(&self, pending: &[Undurable<'p>]) -> Vec<Undurable<'p>> {
        let mut of_sector: BTreeMap<(u64, u64), usize> = BTreeMap::new();
        pending.iter().filter_map(|p| p.op.sector()).for_each(|s| *of_sector.entry(s).or_default() += 1);
        let resized: BTreeSet<u64> = pending
            .iter()
            .filter_map(|p| if let DiskOp::SetLen { file, .. } = p.op { Some(*file) } else { None })
            .collect();
        let idle = |p: &&Undurable<'p>| match p.op {
            DiskOp::Write { file, offset, bytes, .. } => {
                let alone = p.op.sector().and_then(|s| of_sector.get(&s)) == Some(&1);
                alone
                    && !resized.contains(file)
                    && self.durable.bytes_of(*file, *offset, bytes.len() as u64) == *bytes
            }
            _ => false,
        };
        pending.iter().filter(|p| !idle(p)).copied().collect()
    }

    /// The sets of pending writes that are let through; whether these are all.
    fn sets(&mut self, pending: &[Undurable<'_>]) -> (bool, Vec<Vec<bool>>) {
        let Cuts { tear, exhaustive, listed, random, .. } = *self.cuts;
        let mut sets = Vec::new();
        let fine = units(pending, tear);
        let all = fine.len() <= exhaustive;
        let mut add = |units: &[Vec<usize>], dice: &mut Random| {
            for mask in masks(units.len(), exhaustive, listed, random, dice) {
                let mut kept = vec![false; pending.len()];
                units
                    .iter()
                    .zip(mask)
                    .filter(|(_, let_through)| *let_through)
                    .flat_map(|(unit, _)| unit)
                    .for_each(|at| {
                        if let Some(kept) = kept.get_mut(*at) {
                            *kept = true;
                        }
                    });
                in_order(pending, &mut kept);
                sets.push(kept);
            }
        };
        add(&fine, &mut self.dice);
        if tear == Tear::Sector && !all {
            add(&units(pending, Tear::Block), &mut self.dice);
            for _ in 0..random {
                let mut kept = self.storm(pending);
                in_order(pending, &mut kept);
                sets.push(kept);
            }
        }
        (all, sets)
    }

    /// A power cut as FoundationDB simulates it: each block is written, lost, or torn.
    fn storm(&mut self, pending: &[Undurable<'_>]) -> Vec<bool> {
        if self.dice.one_in(10) {
            return vec![true; pending.len()];
        }
        let mut fate: BTreeMap<(u64, u64), u64> = BTreeMap::new();
        pending
            .iter()
            .map(|p| match p.op {
                DiskOp::Write { file, offset, .. } => {
                    let roll = self.dice.below(3);
                    match *fate.entry((*file, offset / BLOCK)).or_insert(roll) {
                        0 => true,
                        1 => false,
                        _ => self.dice.one_in(2),
                    }
                }
                _ => self.dice.one_in(2),
            })
            .collect()
    }

    fn build(&self, pending: &[Undurable<'_>], kept: &[bool], length: Length) -> State {
        let mut state = self.durable.clone();
        let through = pending.iter().zip(kept).filter(|(_, kept)| **kept);
        through.for_each(|(p, _)| state.apply(p.op));
        if length == Length::Kept {
            return state;
        }
        let files: BTreeSet<u64> = pending.iter().filter_map(|p| p.op.changed_file()).collect();
        for file in files {
            let (old, now) = (self.durable.len_of(file), state.len_of(file));
            let full =
                pending.iter().filter(|p| p.op.changed_file() == Some(file)).fold(old, |len, p| match p.op {
                    DiskOp::SetLen { len, .. } => *len,
                    DiskOp::Write { offset, bytes, .. } => len.max(offset + bytes.len() as u64),
                    _ => len,
                });
            match length {
                Length::Old if now > old => state.set_len_of(file, old),
                Length::Full if now < full => state.set_len_of(file, full),
                _ => {}
            }
        }
        state
    }

    /// Power cuts that leave garbage where something was being written: also in sectors that are written with what they
    /// hold already, as `all` has them.
    fn damage(
        &mut self,
        pending: &[Undurable<'_>],
        all: &[Undurable<'_>],
        reached: usize,
        f: &mut impl FnMut(&Cut<'_>),
    ) {
        let unit = if self.cuts.garbage == Garbage::Blocks { BLOCK } else { SECTOR };
        let places = |pending: &[Undurable<'_>]| -> BTreeSet<(u64, u64)> {
            let sectors = pending.iter().filter_map(|p| p.op.sector());
            sectors.map(|(file, at)| (file, at * SECTOR / unit * unit)).collect()
        };
        let (changed, written) = (places(pending), places(all));
        let mut some: Vec<Vec<(u64, u64)>> = Vec::new();
        for of in [changed.iter().collect::<Vec<_>>(), written.difference(&changed).collect()] {
            let singles = positions(of.len(), self.cuts.damaged / 2, &mut self.dice);
            some.extend(singles.into_iter().filter_map(|at| Some(vec![**of.get(at)?])));
        }
        let places: Vec<_> = written.into_iter().collect();
        while some.len() < self.cuts.damaged && !places.is_empty() {
            let mut two = || places.get(self.dice.below(places.len() as u64) as usize).copied();
            some.push([two(), two()].into_iter().flatten().collect());
        }
        for garbage in some {
            let mut kept = match self.dice.below(3) {
                0 => vec![true; pending.len()],
                1 => vec![false; pending.len()],
                _ => self.storm(pending),
            };
            in_order(pending, &mut kept);
            let mut state = self.build(pending, &kept, Length::Kept);
            for (file, offset) in &garbage {
                let mut bytes = state.bytes_of(*file, *offset, unit);
                spoil(&mut bytes, &mut self.dice);
                state.put(*file, *offset, &bytes);
            }
            self.give(Cut { state, reached, garbage, pending, kept, length: Length::Kept }, f);
        }
    }
}

/// Turns bytes into garbage: some of them, or all.
fn spoil(bytes: &mut [u8], dice: &mut Random) {
    let half = bytes.len() / 2;
    let part = match dice.below(3) {
        0 => bytes.get_mut(..half),
        1 => bytes.get_mut(half..),
        _ => bytes.get_mut(..),
    };
    let kind = dice.below(4);
    for byte in part.unwrap_or_default() {
        *byte = match kind {
            0 => 0,
            1 => 0xff,
            _ => dice.next() as u8,
        };
    }
}

/// What a power cut lets through together: positions in the list.
fn units(pending: &[Undurable<'_>], tear: Tear) -> Vec<Vec<usize>> {
    let mut units: Vec<Vec<usize>> = Vec::new();
    let mut known: BTreeMap<(u64, u64, u64), usize> = BTreeMap::new();
    for (at, p) in pending.iter().enumerate() {
        let key = match (p.op, tear) {
            (DiskOp::Write { file, call, .. }, Tear::Call) => Some((*file, *call, 0)),
            (DiskOp::Write { file, call, offset, .. }, Tear::Block) => Some((*file, *call, offset / BLOCK)),
            _ => None,
        };
        let unit = key.map_or(units.len(), |key| *known.entry(key).or_insert(units.len()));
        match units.get_mut(unit) {
            Some(unit) => unit.push(at),
            None => units.push(vec![at]),
        }
    }
    units
}

/// A sector goes to disk as it is in the page cache: of what was written to it, nothing later without all
/// that came before.
fn in_order(pending: &[Undurable<'_>], kept: &mut [bool]) {
    let mut missing: BTreeSet<(u64, u64)> = BTreeSet::new();
    for (p, kept) in pending.iter().zip(kept) {
        let Some(sector) = p.op.sector() else { continue };
        if !*kept {
            missing.insert(sector);
        }
        *kept &= !missing.contains(&sector);
    }
}

impl fmt::Display for Cut<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "power cut before entry {} of the log", self.reached)?;
        let mut list = |what: &str, through: bool| {
            let chosen: Vec<_> =
                self.pending.iter().zip(&self.kept).filter(|(_, kept)| **kept == through).collect();
            write!(f, "; {what} {}:", chosen.len())?;
            for (p, _) in chosen.iter().take(24) {
                match p.op {
                    DiskOp::Write { file, offset, bytes, .. } => {
                        write!(f, " {}@{offset:#x}+{}", self.name(*file), bytes.len())?
                    }
                    DiskOp::SetLen { file, len, .. } => write!(f, " {}={len:#x}", self.name(*file))?,
                    DiskOp::Create { path, .. } => write!(f, " new {}", path.display())?,
                    DiskOp::Rename { from, to, .. } => write!(f, " {}>{}", from.display(), to.display())?,
                    DiskOp::Unlink { path } => write!(f, " gone {}", path.display())?,
                    _ => {}
                }
            }
            if chosen.len() > 24 { write!(f, " ...") } else { Ok(()) }
        };
        list("durable", true)?;
        list("lost", false)?;
        if self.length != Length::Kept {
            write!(f, "; lengths: {:?}", self.length)?;
        }
        for (file, offset) in &self.garbage {
            write!(f, "; garbage at {}@{offset:#x}", self.name(*file))?;
        }
        Ok(())
    }
}

impl Cut<'_> {
    fn name(&self, file: u64) -> String {
        self.state.name_of(file).map_or_else(|| format!("inode {file}"), |path| path.display().to_string())
    }
}

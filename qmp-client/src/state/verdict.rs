//! What is true of a merge that was interrupted, from what its state file says and what can be seen now.

use std::path::Path;

use qapi::qmp::JobStatus;

use super::{FileIdentity, Kind, Phase, State, StateLayer};
use crate::block::graph::{Disk, Graph};
use crate::block::jobs::jobs;
use crate::error::{Error, Result};
use crate::qmp::monitor::Monitor;

/// What is true, or why that cannot be told.
type Doubtful<T> = std::result::Result<T, String>;

/// What can be seen now of a merge that a state file speaks of.
#[derive(Clone, Debug)]
pub struct Seen {
    /// What QEMU says.
    pub qemu: Qemu,
    /// What the header names that the switch changes, see [`State::backing`].
    pub header: Header,
    /// The files as they are now, in the order of [`State::layers`].
    pub identities: Vec<Option<FileIdentity>>,
    /// Whether the old active image has been made an empty overlay on base since, by the engine for stopped images.
    pub retired: bool,
    /// Whether QEMU writes to base when it closes it, without a write of the guest's: for lazy refcounts or bitmaps.
    pub closing_writes_base: bool,
    /// Whether the host has not been started since the state was written.
    pub same_boot: bool,
}

/// What QEMU says of a disk and its merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Qemu {
    /// It does not answer, or has ended.
    Gone,
    /// It has the job.
    HasJob(JobStatus),
    /// It has not the job, and the disk's chain is the one from before the merge.
    ShowsBefore,
    /// It has not the job, and the disk's chain is the one that the merge leaves.
    ShowsAfter,
    /// It has neither the job nor a disk with one of the two chains.
    ShowsNeither,
}

/// What the header of an overlay names.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Header {
    /// It was not read: there is none to be read for an active commit, or it cannot be.
    Unread,
    /// It names no backing file.
    Nothing,
    /// It names this one.
    Names(String),
}

/// What is true of an interrupted merge.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// QEMU has the job: [`crate::Merge::attach`] goes on with it.
    AtWork,
    /// Nothing is switched. The valid top is the active layer from before the merge, with the whole chain below it; what
    /// was copied is not seen by the guest. The state file can go, and the merge can begin anew.
    NotSwitched,
    /// It is switched, and what lies under the new chain is whole. The merged layers, and after an active commit the old
    /// active layer, are not needed any more; they, and then the state file, are left to clean up.
    Switched,
    /// It cannot be told. Nothing may be written or deleted.
    InDoubt {
        /// Why.
        why: String,
        /// The file that most likely is the valid top.
        likely: String,
    },
}

impl Qemu {
    /// Asks QEMU for its jobs, and looks for the disk in a graph of just now.
    ///
    /// # Errors
    /// Those of the queries.
    pub fn ask(monitor: &(impl Monitor + ?Sized), graph: &Graph, state: &State) -> Result<Self> {
        if let Some(job) = jobs(monitor)?.into_iter().find(|job| job.id == state.job) {
            return Ok(Self::HasJob(job.status));
        }
        Ok(if state.disk_after(graph).is_some() {
            Self::ShowsAfter
        } else if state.disk_before(graph).is_some() {
            Self::ShowsBefore
        } else {
            Self::ShowsNeither
        })
    }
}

impl Seen {
    /// Looks at the files; what QEMU says and what headers hold come from those who can ask.
    ///
    /// # Errors
    /// [`crate::Error::File`] for one that cannot be looked at: it is not gone.
    pub fn of(state: &State, qemu: Qemu, header: Header) -> Result<Self> {
        let look = |layer: &StateLayer| {
            let path = Path::new(&layer.file);
            FileIdentity::of(path).map_err(|source| Error::File { file: path.to_owned(), source })
        };
        Ok(Self {
            qemu,
            header,
            identities: state.layers.iter().map(look).collect::<Result<_>>()?,
            retired: false,
            closing_writes_base: true,
            same_boot: state.is_of_this_boot(),
        })
    }

    /// The file of this layer, by index, does not tell when its image was written: the bytes go to another file.
    pub fn tells_no_time(&mut self, state: &State, index: usize) {
        for (layer, now) in state.layers.iter().zip(&mut self.identities) {
            if let Some(now) = now.as_mut().filter(|_| layer.index == index) {
                now.modified_ns = 0;
            }
        }
    }
}

impl State {
    /// The disk with the chain from before the merge, which may have new overlays on top by now.
    pub fn disk_before<'g>(&self, graph: &'g Graph) -> Option<&'g Disk> {
        self.disk_on(graph, &self.layers.iter().collect::<Vec<_>>())
    }

    /// The disk with the chain that the merge leaves, which may have new overlays on top by now.
    pub fn disk_after<'g>(&self, graph: &'g Graph) -> Option<&'g Disk> {
        // The chain from before ends with base too.
        let before = self.disk_before(graph).map(Disk::name);
        self.disk_on(graph, &self.left().collect::<Vec<_>>()).filter(|disk| Some(disk.name()) != before)
    }

    fn disk_on<'g>(&self, graph: &'g Graph, layers: &[&StateLayer]) -> Option<&'g Disk> {
        let is_it = |disk: &&Disk| {
            let above = disk.layers().len().checked_sub(layers.len());
            let Some(now) = above.and_then(|above| disk.layers().get(above..)) else { return false };
            // Another disk may have an overlay on the same base.
            let same_disk = disk.name() == self.disk
                || (above == Some(0) && now.iter().map(|l| &l.node).eq(layers.iter().map(|l| &l.node)));
            same_disk && now.iter().map(|l| &l.file).eq(layers.iter().map(|l| &l.file))
        };
        graph.disks().iter().find(is_it)
    }

    /// What is true, from what is seen. Pure: nothing is asked or looked at.
    ///
    /// Headers are believed before memory: a header that was written tells that the switch has begun, and what it names
    /// was made durable before. For an active commit no header changes, so files tell: base and the old active
    /// layer were equal, and held, when their identities were taken, so whichever was written since is the one
    /// that the guest went on with. A QEMU that runs on base says little: somebody may have started it there.
    pub fn judge(&self, seen: &Seen) -> Verdict {
        if let Qemu::HasJob(_) = seen.qemu {
            return Verdict::AtWork;
        }
        let verdict = match (self.kind, &self.backing) {
            (Kind::ActiveCommit, _) => self.judge_pivot(seen),
            (_, Some(rename)) => {
                let named = |name: Option<&str>| match (&seen.header, name) {
                    (Header::Names(now), Some(name)) => now == name,
                    (Header::Nothing, None) => true,
                    _ => false,
                };
                let (old, new) = (named(Some(&rename.old)), named(rename.new.as_deref()));
                self.judge_header(seen, &rename.overlay, old, new)
            }
            (_, None) => Err("the state names no header that the switch changes".to_owned()),
        };
        let verdict = verdict.and_then(|verdict| {
            let needed = if verdict == Verdict::Switched {
                self.left().collect()
            } else {
                self.layers.iter().collect()
            };
            self.are_there(seen, needed).map(|()| verdict)
        });
        verdict.unwrap_or_else(|why| Verdict::InDoubt { why, likely: self.valid_top.clone() })
    }

    /// The layers, by index, that somebody has written who should not have, or that are other files now: nothing that
    /// rests on them may be put right or deleted unseen. The marks that the engine for stopped images sets show
    /// here too.
    pub fn touched(&self, seen: &Seen) -> Vec<usize> {
        let active = self.layers.len();
        let may_be_written = |index: usize| match (self.kind, self.phase) {
            (Kind::ActiveCommit, Phase::Switched) => index == self.base,
            (Kind::Commit, Phase::Switched) => index == active,
            (Kind::ActiveCommit, _) => index == self.base || index == active,
            // Closing base, and the overlay above top for its header, write too.
            (Kind::Commit, _) => [self.base, self.top.saturating_add(1), active].contains(&index),
            (Kind::Pull, _) => index == active,
        };
        let is_touched = |(layer, now): &(&StateLayer, &Option<FileIdentity>)| match (&layer.identity, now) {
            (None, _) => false,
            (Some(_), None) => true,
            (Some(before), Some(now)) => {
                let written = now.is_written_since(before) == Some(true) && !may_be_written(layer.index);
                written || !is_same(before, now, seen.same_boot)
            }
        };
        let all = self.layers.iter().zip(&seen.identities).filter(is_touched);
        all.map(|(layer, _)| layer.index).collect()
    }

    fn judge_header(&self, seen: &Seen, overlay: &str, old: bool, new: bool) -> Doubtful<Verdict> {
        let memory =
            |shows| format!("{overlay} names one backing file, and QEMU shows the chain {shows} the merge");
        match (self.phase, old, new) {
            (_, false, false) => Err(match &seen.header {
                Header::Unread => format!("the header of {overlay} cannot be read"),
                Header::Nothing => format!("{overlay} names no backing file any more"),
                Header::Names(name) => {
                    format!(
                        "{overlay} names '{name}', neither what it named before nor what the merge writes"
                    )
                }
            }),
            (_, true, true) => Err(format!("{overlay} is to name what it named before")),
            (_, true, _) if seen.qemu == Qemu::ShowsAfter => Err(memory("after")),
            (_, _, true) if seen.qemu == Qemu::ShowsBefore => Err(memory("before")),
            (Phase::Copying | Phase::Switching, true, _) => Ok(Verdict::NotSwitched),
            (Phase::Switched, true, _) => {
                Err(format!("{overlay} was switched, and names again what it named before"))
            }
            (Phase::Switching | Phase::Switched, _, true) => Ok(Verdict::Switched),
            // QEMU has gone on from there, so it has written what the header now relies on.
            (Phase::Copying, _, true) if seen.qemu == Qemu::ShowsAfter => Ok(Verdict::Switched),
            (Phase::Copying, _, true) => Err(format!(
                "{overlay} was switched by another client, and it is not known whether what was copied was durable"
            )),
        }
    }

    fn judge_pivot(&self, seen: &Seen) -> Doubtful<Verdict> {
        let (base, active) = (self.written(seen, self.base), self.written(seen, self.layers.len()));
        match (self.phase, seen.qemu) {
            (Phase::Copying, Qemu::ShowsAfter) => Err("QEMU runs on base, and no pivot is noted".into()),
            (Phase::Copying, _) => Ok(Verdict::NotSwitched),
            (_, Qemu::ShowsBefore)
                if self.phase == Phase::Switched || base.is_none_or(|when| when.is_some()) =>
            {
                Err("QEMU runs on the old active image, and base may have been written since the pivot"
                    .into())
            }
            (Phase::Switching, Qemu::ShowsBefore) => Ok(Verdict::NotSwitched),
            (_, _) if seen.retired => Ok(Verdict::Switched),
            (Phase::Switched, _) => match active {
                Some(None) => Ok(Verdict::Switched),
                Some(Some(_)) => Err("the old active image was written after the pivot".into()),
                None if seen.identities.first().is_none_or(Option::is_none) => Ok(Verdict::Switched),
                None => {
                    Err("it cannot be seen whether the old active image was written after the pivot".into())
                }
            },
            (Phase::Switching, _) => match (base, active) {
                // Whatever base holds is at least what the active layer held.
                (_, Some(None)) => Ok(Verdict::Switched),
                // QEMU has flushed base before it holds the guest, so only the guest writes there now, and only
                // behind the pivot. The old active image gets its tables when QEMU closes it. What was written to
                // either once QEMU was seen to be gone is somebody else's.
                (Some(Some(base)), Some(Some(active)))
                    if !seen.closing_writes_base
                        && seen.same_boot
                        && self.gone_ns.is_some_and(|gone| base.max(active) <= gone) =>
                {
                    Ok(Verdict::Switched)
                }
                // Where nothing was written to base, the active layer is base's equal, or newer. A power cut may
                // have lost the time of a write, though.
                (Some(None), Some(Some(_))) if seen.same_boot && seen.qemu != Qemu::ShowsAfter => {
                    Ok(Verdict::NotSwitched)
                }
                _ => {
                    Err("it cannot be seen whether the guest went on with base or with the old active image"
                        .into())
                }
            },
        }
    }

    /// When a layer was written last, if that is after its identity was taken; none if it was not, and none at all if
    /// that cannot be known.
    fn written(&self, seen: &Seen, index: usize) -> Option<Option<u64>> {
        let (layer, now) =
            self.layers.iter().zip(&seen.identities).find(|(layer, _)| layer.index == index)?;
        let now = now.as_ref()?;
        Some(now.is_written_since(layer.identity.as_ref()?)?.then_some(now.modified_ns))
    }

    /// Whether these layers are the files that they were, as far as they are files here.
    fn are_there(&self, seen: &Seen, needed: Vec<&StateLayer>) -> Doubtful<()> {
        for (layer, now) in self.layers.iter().zip(&seen.identities) {
            let Some(before) =
                layer.identity.filter(|_| needed.iter().any(|other| other.index == layer.index))
            else {
                continue;
            };
            match now {
                None => return Err(format!("{} is not there any more", layer.file)),
                Some(now) if !is_same(&before, now, seen.same_boot) => {
                    return Err(format!("{} is another file than at the merge", layer.file));
                }
                Some(_) => {}
            }
        }
        Ok(())
    }
}

/// File systems get other numbers when the host starts again; files in them keep theirs.
fn is_same(before: &FileIdentity, now: &FileIdentity, same_boot: bool) -> bool {
    if same_boot { now.is_same_file(before) } else { now.inode == before.inode }
}

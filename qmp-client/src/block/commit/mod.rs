//! The live merge of a part of a chain into its base: QEMU's `block-commit` with its hazards fenced.

mod name;
mod preflight;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use qapi::qmp::{self, JobStatus};
use serde_json::Value;

use crate::block::flush::{Means, flush};
use crate::block::graph::{Disk, Layer, Range};
use crate::block::jobs::{Job, jobs};
use crate::block::procedure::{self, Merged, Renamed, unique};
use crate::error::{Error, Result};
use crate::qmp::monitor::{Execute, Monitor};
use crate::state::{State, StateLayer};
pub(crate) use name::backing_name;
pub(crate) use preflight::{bitmaps, circumstances, ownership};

/// How a merge is to be done.
#[derive(Clone, Debug, Default)]
pub struct CommitOptions {
    /// The backing name that the overlay above top gets; without it, base's name in the style that the
    /// overlay had. Not for an active commit.
    pub backing_file: Option<String>,
    /// The limit in bytes per second, zero for none.
    pub speed: u64,
    /// Whether the persistent bitmaps of merged layers may be lost.
    pub drop_bitmaps: bool,
    /// The socket of an NBD server that this QEMU runs already, for flushing base; QEMU runs only one. Without
    /// one, a server is started for it, and if that is not possible the guest is paused for a moment.
    pub nbd_socket: Option<PathBuf>,
}

/// A planned merge of the layers above `base`, up to and including `top`, into base.
#[derive(Clone, Debug)]
pub struct Commit {
    disk: String,
    root: String,
    base: Layer,
    top: Layer,
    above: Option<Layer>,
    merged: Vec<Layer>,
    /// The layers that stay, from the top.
    left: Vec<Layer>,
    backing_file: Option<String>,
    job_id: String,
    filter: String,
    options: CommitOptions,
    means: Option<Means>,
}

impl Commit {
    /// Plans the merge, and refuses what the graph shows to be impossible or harmful.
    ///
    /// # Errors
    /// [`Error::BackingName`] and [`Error::Refused`] with the reason.
    pub fn plan(disk: &Disk, range: &Range<'_>, options: CommitOptions) -> Result<Self> {
        let backing_file = match (range.above, &options.backing_file) {
            (Some(above), given) => Some(backing_name(disk, range, above, given.as_deref())?),
            (None, None) => None,
            (None, Some(_)) => {
                let why = "an active commit re-points no overlay, so it takes no backing name".into();
                return Err(Error::BackingName { why, takes_another: false });
            }
        };
        let is_merged = |l: &&Layer| l.index > range.base.index && l.index <= range.top.index;
        let (merged, left): (Vec<_>, Vec<_>) = disk.layers().iter().partition(is_merged);
        let mut commit = Self {
            disk: disk.name().to_owned(),
            root: disk.root().to_owned(),
            base: range.base.clone(),
            top: range.top.clone(),
            above: range.above.cloned(),
            merged: merged.into_iter().cloned().collect(),
            left: left.into_iter().cloned().collect(),
            backing_file,
            job_id: String::new(),
            filter: format!("filter-{}", unique()),
            options,
            means: None,
        };
        let (base, top) = (range.base.index, range.top.index);
        commit.job_id = format!("{}{base}.{top}.{}", commit.job_prefix(), unique());
        preflight::plan(&commit)?;
        Ok(commit)
    }

    /// The id that the job will have; it says what is merged.
    pub fn job_id(&self) -> &str {
        &self.job_id
    }

    /// Whether the layer that the guest writes to is merged, so that the merge ends with a pivot.
    pub fn is_active(&self) -> bool {
        self.above.is_none()
    }

    /// The backing name that the overlay above top will have.
    pub fn backing_file(&self) -> Option<&str> {
        self.backing_file.as_deref()
    }

    /// The disk's name.
    pub fn disk(&self) -> &str {
        &self.disk
    }

    /// The layer that receives the data.
    pub fn base(&self) -> &Layer {
        &self.base
    }

    /// The uppermost layer that is merged.
    pub fn top(&self) -> &Layer {
        &self.top
    }

    /// The overlay above top, whose header the switch changes; none for an active commit.
    pub fn above(&self) -> Option<&Layer> {
        self.above.as_ref()
    }

    /// The layers that the disk has afterwards, from the top.
    pub fn left(&self) -> &[Layer] {
        &self.left
    }

    /// How the merge is to be done.
    pub fn options(&self) -> &CommitOptions {
        &self.options
    }

    /// The bytes that the merged layers hold on disk, which is about what is copied at most; `None` where QEMU does
    /// not know it of one of them.
    pub fn bytes(&self) -> Option<u64> {
        procedure::bytes(&self.merged)
    }

    /// The layers that are merged, from the top. As soon as the job starts they are no restore points any
    /// more, and neither is base; top alone stays what it was.
    pub fn merged(&self) -> &[Layer] {
        &self.merged
    }

    /// Asks QEMU all that can be known before the job starts, and tries what it will have to do at the end:
    /// writing the header of the overlay above top, and flushing base.
    ///
    /// The header is written with the backing name that it holds; a backing format that was missing is added.
    /// The guest keeps running.
    ///
    /// # Errors
    /// [`Error::Refused`] with the reason; those of the commands.
    pub fn preflight(&mut self, monitor: &(impl Monitor + ?Sized)) -> Result<()> {
        self.means = preflight::ask(self, monitor)?;
        Ok(())
    }

    /// Starts the job; it stops before it switches anything, and keeps its error.
    ///
    /// # Errors
    /// [`Error::Refused`] before [`Commit::preflight`] has passed; those of the command.
    pub fn start<'m, M: Monitor + ?Sized>(&self, monitor: &'m M) -> Result<Job<'m, M>> {
        if self.means.is_none() && !self.is_active() {
            return Err(Error::Refused { why: "the merge has not passed its preflight".into() });
        }
        monitor.execute(&self.request())?;
        Ok(Job::new(monitor, self.job_id.clone()))
    }

    /// The commands that carry the merge out, in order, each with its arguments; those between which QEMU is
    /// only asked are left out, and so is the flush of base, whose means is found when it begins. An active
    /// merge is pivoted.
    ///
    /// # Errors
    /// [`Error::Request`] if a command cannot be written as JSON.
    pub fn commands(&self) -> Result<Vec<(&'static str, Value)>> {
        let mut commands = Vec::new();
        if let Some(same) = preflight::same_name(self) {
            commands.push(procedure::written(&same)?);
        }
        commands.push(procedure::written(&self.request())?);
        if self.is_active() {
            commands.push(procedure::written(&qmp::job_complete { id: self.job_id.clone() })?);
        }
        commands.extend(procedure::end_of(&self.job_id, true, &self.merged)?);
        Ok(commands)
    }

    #[allow(deprecated, reason = "the struct of the schema has fields for file names, which stay empty")]
    fn request(&self) -> qmp::block_commit {
        qmp::block_commit {
            job_id: Some(self.job_id.clone()),
            device: self.root.clone(),
            base_node: Some(self.base.node.clone()),
            // For an active commit too: without it QEMU takes the root for top, and drops a throttle or any other
            // filter there at the pivot.
            top_node: Some(self.top.node.clone()),
            backing_file: self.backing_file.clone(),
            // Without it the header would name the driver of a base without a format as its format.
            backing_mask_protocol: (!self.is_active() && self.base.protocol_node.is_none()).then_some(true),
            speed: (self.options.speed > 0).then(|| i64::try_from(self.options.speed).unwrap_or(i64::MAX)),
            on_error: Some(qmp::BlockdevOnError::stop),
            filter_node_name: Some(self.filter.clone()),
            auto_finalize: Some(false),
            auto_dismiss: Some(false),
            base: None,
            top: None,
        }
    }

    /// Finds the job of this same merge that was started before, by a client that has gone perhaps, and gets
    /// ready to end it. `None` if there is none.
    ///
    /// The chain must be the one that the job works on: base and top are known by their indexes, which the
    /// job's id holds and which no new overlay changes.
    ///
    /// # Errors
    /// [`Error::Refused`] if base cannot be flushed; those of the queries.
    pub fn resume<'m, M: Monitor + ?Sized>(&mut self, monitor: &'m M) -> Result<Option<Job<'m, M>>> {
        let prefix = format!("{}{}.{}.", self.job_prefix(), self.base.index, self.top.index);
        let Some(job) = jobs(monitor)?.into_iter().find(|job| job.id.starts_with(&prefix)) else {
            return Ok(None);
        };
        if job.status != JobStatus::concluded {
            self.find_means(monitor)?;
        }
        self.job_id = job.id;
        Ok(Some(Job::new(monitor, self.job_id.clone())))
    }

    /// The merge that a state file describes, whose job runs or has run in this QEMU.
    pub(crate) fn recall(state: &State) -> Option<Self> {
        let layers: Vec<Layer> = state.layers.iter().map(StateLayer::recall).collect();
        let at = |index: usize| layers.iter().find(|l| l.index == index).cloned();
        let is_merged = |l: &Layer| l.index > state.base && l.index <= state.top;
        Some(Self {
            disk: state.disk.clone(),
            root: layers.first()?.node.clone(),
            above: at(state.top + 1),
            merged: layers.iter().filter(|l| is_merged(l)).cloned().collect(),
            left: layers.iter().filter(|l| !is_merged(l)).cloned().collect(),
            base: at(state.base)?,
            top: at(state.top)?,
            backing_file: state.backing.as_ref().and_then(|rename| rename.new.clone()),
            job_id: state.job.clone(),
            filter: format!("filter-{}", unique()),
            options: CommitOptions { nbd_socket: state.nbd_socket.clone(), ..Default::default() },
            means: None,
        })
    }

    /// Finds out how base can be flushed, where that is needed and not known.
    ///
    /// # Errors
    /// [`Error::Refused`] if it cannot be; those of the queries.
    pub(crate) fn find_means(&mut self, monitor: &(impl Monitor + ?Sized)) -> Result<()> {
        // At this point QEMU has flushed the base of an active commit, and holds all requests: a flush would hang.
        if self.means.is_none() && !self.is_active() {
            let server = self.options.nbd_socket.as_deref();
            self.means = Some(Means::find(monitor, &self.base.node, server)?);
        }
        Ok(())
    }

    /// Ends an intermediate merge whose job is pending: flushes base, switches the overlay above top to it, and
    /// closes what is no longer needed.
    ///
    /// `before_switch` is called when base is durable and nothing is switched yet.
    ///
    /// # Errors
    /// [`Error::Refused`] if the job is not pending, or the flush fails, and that of `before_switch`: nothing is
    /// switched then, and the job can be finished again or cancelled. [`Error::Job`] if the switch fails.
    pub fn finish<M: Monitor + ?Sized>(
        &self,
        job: &Job<'_, M>,
        monitor: &M,
        before_switch: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Merged> {
        if procedure::require(job, &[JobStatus::pending])? == JobStatus::pending {
            self.flush_base(monitor)?;
            before_switch()?;
            procedure::switch(job)?;
        }
        self.wrap_up(job, monitor)
    }

    /// Makes durable what base holds, its tables included, by the means that the preflight found.
    ///
    /// # Errors
    /// [`Error::Refused`] before [`Commit::preflight`] has passed, and for an active commit, where QEMU does
    /// this itself; those of the flush.
    pub fn flush_base(&self, monitor: &(impl Monitor + ?Sized)) -> Result<()> {
        let Some(means) = &self.means else {
            return Err(Error::Refused { why: "the merge has not passed its preflight".into() });
        };
        match means.flush(monitor, &self.base.node) {
            // A job that had to make base larger lets nobody export it.
            Err(Error::Command { .. }) if self.grows_base() => {
                flush(monitor, &self.base.node, self.options.nbd_socket.as_deref())
            }
            done => done,
        }
    }

    fn grows_base(&self) -> bool {
        self.base.virtual_size < self.top.virtual_size
    }

    /// Ends an active merge whose job is ready: the guest then writes to base.
    ///
    /// `before_switch` is called while the guest's writes are held and base equals the active layer: the
    /// moment to note durably that base is the valid top. If it fails, the job is cancelled and the guest
    /// stays where it was.
    ///
    /// # Errors
    /// [`Error::Refused`] if the job is not ready; that of `before_switch`; [`Error::Job`] if the switch fails.
    pub fn pivot<M: Monitor + ?Sized>(
        &self,
        job: &Job<'_, M>,
        monitor: &M,
        before_switch: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Merged> {
        if !procedure::hold(job)? {
            // Ended before, by somebody else perhaps; or an error at the last moment, and nothing was switched.
            return self.wrap_up(job, monitor);
        }
        if let Err(error) = before_switch() {
            self.cancel(job)?;
            return Err(error);
        }
        procedure::switch(job)?;
        self.wrap_up(job, monitor)
    }

    /// Ends an active merge whose job is ready without a pivot: base then is what the disk was at one moment, and
    /// durable; the guest stays on the active layer.
    ///
    /// # Errors
    /// [`Error::Refused`] if the job is not ready; [`Error::Job`] if it failed or was done before.
    pub fn keep_overlay<M: Monitor + ?Sized>(&self, job: &Job<'_, M>, monitor: &M) -> Result<Disk> {
        if !procedure::hold(job)? {
            job.take_result()?;
            return Err(procedure::failed(job, "it was done before base could be let go of".into()));
        }
        // Base equals the active layer, and QEMU has flushed it: what is left is to let go of it.
        self.cancel(job)?;
        procedure::with_chain(monitor, &procedure::chain(&self.merged, &self.left))?
            .ok_or_else(|| procedure::failed(job, "no disk has the chain that it had before".into()))
    }

    /// Cancels the job and waits until it is gone. The chain is as it was; base and the layers between it and
    /// top hold what was copied so far, which the guest does not see.
    ///
    /// # Errors
    /// Those of the commands; [`Error::Job`] if the job cannot be cancelled any more.
    pub fn cancel<M: Monitor + ?Sized>(&self, job: &Job<'_, M>) -> Result<()> {
        procedure::cancel(job)
    }

    fn wrap_up<M: Monitor + ?Sized>(&self, job: &Job<'_, M>, monitor: &M) -> Result<Merged> {
        job.take_result()?;
        self.verify(job, monitor)
    }

    /// Closes what is no longer needed, and looks whether the merge has been carried out.
    pub(crate) fn verify<M: Monitor + ?Sized>(&self, job: &Job<'_, M>, monitor: &M) -> Result<Merged> {
        let renamed =
            self.above.as_ref().map(|above| Renamed { overlay: &above.node, name: self.backing_file() });
        let server = self.options.nbd_socket.as_deref();
        procedure::wrap_up(job, monitor, &self.merged, &self.left, renamed.as_ref(), server)
    }

    fn nodes(&self) -> impl Iterator<Item = &String> {
        self.left.iter().chain(&self.merged).map(|l| &l.node)
    }

    /// What the ids of all merges of this disk begin with.
    fn job_prefix(&self) -> String {
        procedure::job_prefix("merge", &self.disk)
    }
}

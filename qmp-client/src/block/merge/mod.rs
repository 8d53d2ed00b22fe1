//! The live merge of a part of a chain with QEMU's `block-commit` and `block-stream`, and protection from their
//! hazards.
//!
//! Both directions are one procedure. What differs between them is in [`Direction`], and nowhere else.

mod direction;
mod name;
mod preflight;
mod steps;
#[cfg(test)]
mod tests;

use std::path::PathBuf;

use qapi::qmp::{self, JobStatus};
use serde_json::Value;

use crate::block::flush::{Means, flush};
use crate::block::graph::{Disk, Layer, Range};
use crate::block::ids::{job_prefix, unique};
use crate::block::jobs::{Goal, Job, failed, jobs, require};
use crate::error::{Error, Refusal, Result};
use crate::qmp::monitor::{Execute, Monitor};
pub use direction::Direction;
use name::backing_name;
pub use steps::Merged;
pub(crate) use steps::with_chain;

/// The options of a merge.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct MergeOptions {
    /// The backing name that the overlay above the merged layers gets; `None` for base's name in the overlay's
    /// former style. It matters only if there are such an overlay and a base.
    pub backing_file: Option<String>,
    /// The limit in bytes per second, zero for none.
    pub speed: u64,
    /// Whether the persistent bitmaps of merged layers may be lost.
    pub drop_bitmaps: bool,
    /// The socket of an NBD server that this QEMU already runs, for flushing: QEMU can run only one. With
    /// `None`, a server is started for the flush; if that is not possible, the guest is paused for a moment.
    pub nbd_socket: Option<PathBuf>,
}

impl MergeOptions {
    /// The same with a limit in bytes per second; zero for none.
    #[must_use]
    pub fn with_speed(self, speed: u64) -> Self {
        Self { speed, ..self }
    }

    /// The same with the socket of an NBD server that this QEMU already runs.
    #[must_use]
    pub fn with_nbd_socket(self, nbd_socket: Option<PathBuf>) -> Self {
        Self { nbd_socket, ..self }
    }

    /// The same with another backing name for the overlay above the merged layers.
    #[must_use]
    pub fn with_backing_file(self, backing_file: Option<String>) -> Self {
        Self { backing_file, ..self }
    }
}

/// The layers that are merged, by their indexes from the bottom: those above `base`, up to and including `top`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    /// The layer below them; 0 if there is none.
    pub(crate) base: usize,
    /// The uppermost of them.
    pub(crate) top: usize,
}

impl Span {
    fn has(self, layer: &Layer) -> bool {
        layer.index > self.base && layer.index <= self.top
    }
}

/// A planned merge of neighbouring layers, whose data goes down into the layer below them, or up into the one above.
#[derive(Clone, Debug)]
pub struct Procedure {
    direction: Direction,
    disk: String,
    /// The node at which jobs on the disk start.
    root: String,
    span: Span,
    /// The layer that takes the data.
    receiver: Layer,
    base: Option<Layer>,
    overlay: Option<Layer>,
    merged: Vec<Layer>,
    layers_after: Vec<Layer>,
    backing_file: Option<String>,
    job_id: String,
    filter: String,
    options: MergeOptions,
    /// How the receiver is flushed; `None` until that is known.
    means: Option<Means>,
}

impl Procedure {
    /// Plans a merge of the layers above `range.base`, up to and including `range.top`, down into base. Merges
    /// that the graph shows to be impossible or harmful are refused.
    ///
    /// # Errors
    /// [`Error::BackingName`] and [`Error::Refused`] with the reason.
    pub fn commit(disk: &Disk, range: &Range<'_>, options: MergeOptions) -> Result<Self> {
        let backing_file = match (range.above, &options.backing_file) {
            (Some(above), given) => Some(backing_name(disk, range, above, given.as_deref())?),
            (None, None) => None,
            (None, Some(_)) => {
                let why = "an active commit relinks no overlay, so it takes no backing name".into();
                return Err(Error::BackingName { why, takes_another: false });
            }
        };
        let span = Span { base: range.base.index, top: range.top.index };
        Self::plan(Direction::Down, disk, span, backing_file, options)
    }

    /// Plans a pull into the active layer of all layers between it and `base`. Without a `base` the active
    /// layer takes in everything, and stands alone then.
    ///
    /// No layer below is written, so other users of these layers see no change.
    ///
    /// # Errors
    /// [`Error::Layer`] if nothing lies between; [`Error::BackingName`] and [`Error::Refused`] with the reason.
    pub fn pull(disk: &Disk, base: Option<&Layer>, options: MergeOptions) -> Result<Self> {
        let active = disk.active();
        let span = Span { base: base.map_or(0, |base| base.index), top: active.index.saturating_sub(1) };
        let Some(lowest) = disk.layers().iter().rfind(|layer| span.has(layer)) else {
            return Err(disk.refusal("there is nothing to pull into the active layer".into()));
        };
        let backing_file = match base {
            Some(base) => {
                let range = Range { base, top: lowest, above: Some(active) };
                Some(backing_name(disk, &range, active, options.backing_file.as_deref())?)
            }
            None if options.backing_file.is_some() => {
                let why = "without a base the active layer has no backing file".into();
                return Err(Error::BackingName { why, takes_another: false });
            }
            None => None,
        };
        Self::plan(Direction::Up, disk, span, backing_file, options)
    }

    fn plan(
        direction: Direction,
        disk: &Disk,
        span: Span,
        backing_file: Option<String>,
        options: MergeOptions,
    ) -> Result<Self> {
        let job_id = format!("{}{}", id_of_all(direction, disk.name(), span), unique());
        let planned = Self::of(direction, disk.name(), disk.layers(), span, job_id, options);
        // A range of a disk has these layers.
        let mut planned = planned.ok_or_else(|| disk.refusal("there is no such range of layers".into()))?;
        disk.root().clone_into(&mut planned.root);
        planned.backing_file = backing_file;
        preflight::plan(&planned)?;
        Ok(planned)
    }

    /// The merge whose job has this id, of a chain with these layers, listed from the top. `None` if the chain
    /// lacks layers of the merge.
    pub(crate) fn of(
        direction: Direction,
        disk: &str,
        chain: &[Layer],
        span: Span,
        job_id: String,
        options: MergeOptions,
    ) -> Option<Self> {
        let at = |index: usize| chain.iter().find(|layer| layer.index == index).cloned();
        let (base, overlay) = (at(span.base), at(span.top + 1));
        let (merged, layers_after) = chain.iter().cloned().partition(|layer| span.has(layer));
        Some(Self {
            receiver: if direction == Direction::Down { base.clone()? } else { overlay.clone()? },
            direction,
            disk: disk.to_owned(),
            root: chain.first()?.node.clone(),
            span,
            base,
            overlay,
            merged,
            layers_after,
            backing_file: options.backing_file.clone(),
            job_id,
            filter: format!("filter-{}", unique()),
            options,
            means: None,
        })
    }

    /// Which way the data goes.
    pub fn direction(&self) -> Direction {
        self.direction
    }

    /// The id that the job will have; it says what is merged.
    pub fn job_id(&self) -> &str {
        &self.job_id
    }

    /// Whether the layer that the guest writes to is merged, so that the merge ends with a pivot.
    pub fn is_active(&self) -> bool {
        self.overlay.is_none()
    }

    /// The backing name that the overlay will have; none if there is no overlay, or if it will stand alone.
    pub fn backing_file(&self) -> Option<&str> {
        self.backing_file.as_deref()
    }

    /// The disk's name.
    pub fn disk(&self) -> &str {
        &self.disk
    }

    /// The layer that takes the data: base, or the active layer for a pull.
    pub fn receiver(&self) -> &Layer {
        &self.receiver
    }

    /// The layer below those that go; none for a pull of everything.
    pub fn base(&self) -> Option<&Layer> {
        self.base.as_ref()
    }

    /// The layer above those that go, whose header the switch changes; none for an active commit.
    pub fn overlay(&self) -> Option<&Layer> {
        self.overlay.as_ref()
    }

    /// The layers that the disk no longer needs afterwards, from the top. As soon as a commit starts, they and
    /// base stop being restore points; only top keeps showing its disk. A pull changes none of them.
    pub fn merged(&self) -> &[Layer] {
        &self.merged
    }

    /// The layers that the disk has afterwards, from the top.
    pub fn layers_after(&self) -> &[Layer] {
        &self.layers_after
    }

    /// How the merge is to be done.
    pub fn options(&self) -> &MergeOptions {
        &self.options
    }

    /// The bytes that the merged layers hold on disk, roughly an upper bound of what is copied; `None` if QEMU
    /// does not know them for one of the layers.
    pub fn bytes(&self) -> Option<u64> {
        self.merged.iter().try_fold(0_u64, |sum, layer| sum.checked_add(layer.actual_size?))
    }

    /// The goal that the job reaches when everything is copied.
    pub(crate) fn goal(&self) -> Goal {
        if self.is_active() { Goal::Ready } else { Goal::Pending }
    }

    pub(crate) fn span(&self) -> Span {
        self.span
    }

    /// The whole chain before the merge, from the active layer down.
    pub(crate) fn chain(&self) -> Vec<Layer> {
        steps::chain(&self.merged, &self.layers_after)
    }

    /// Checks everything that QEMU can tell before the job starts, and tries what will be done at the end:
    /// flushing the layer that takes the data, and for a commit, writing the header of the overlay above.
    ///
    /// The header is written with the backing name that it has already; a missing backing format is added. The
    /// guest keeps running.
    ///
    /// # Errors
    /// [`Error::Refused`] with the reason; [`Error::NotFlushed`]; those of the commands.
    pub fn preflight(&mut self, monitor: &(impl Monitor + ?Sized)) -> Result<()> {
        preflight::circumstances(monitor, &self.disk)?;
        if self.direction == Direction::Down && !self.is_active() {
            preflight::overlay(self, monitor)?;
        }
        self.find_means(monitor)
    }

    /// Starts the job; it stops before it switches anything.
    ///
    /// # Errors
    /// [`Refusal::NotTried`] before [`Procedure::preflight`] has passed; those of the command.
    pub fn start<'m, M: Monitor + ?Sized>(&self, monitor: &'m M) -> Result<Job<'m, M>> {
        if self.is_flushed_here() && self.means.is_none() {
            return Err(Refusal::NotTried.into());
        }
        let (command, arguments) = self.direction.request(self)?;
        monitor.query(command, arguments)?;
        Ok(Job::new(monitor, self.job_id.clone()))
    }

    /// The commands that carry the merge out, in order, each with its arguments. Queries are omitted, and so is
    /// the flush, whose means is found only at the start. An active merge ends with a pivot.
    ///
    /// # Errors
    /// [`Error::Request`] if a command cannot be written as JSON.
    pub(crate) fn commands(&self) -> Result<Vec<(&'static str, Value)>> {
        let mut commands = Vec::new();
        if let Some(same) = preflight::same_name(self) {
            commands.push(steps::written(&same)?);
        }
        commands.push(self.direction.request(self)?);
        if self.is_active() {
            commands.push(steps::written(&qmp::job_complete { id: self.job_id.clone() })?);
        }
        commands.extend(steps::end_of(&self.job_id, self.direction.keeps_job(), &self.merged)?);
        Ok(commands)
    }

    /// Finds the job of this merge that was started earlier, perhaps by a client that is gone, and prepares to
    /// end it. `None` if there is none.
    ///
    /// The chain must be the one that the job works on. The layers are identified by their indexes, which are
    /// in the job's id, and which no new overlay changes.
    ///
    /// # Errors
    /// [`Error::NotFlushed`]; those of the queries.
    pub fn resume<'m, M: Monitor + ?Sized>(&mut self, monitor: &'m M) -> Result<Option<Job<'m, M>>> {
        let prefix = id_of_all(self.direction, &self.disk, self.span);
        let Some(job) = jobs(monitor)?.into_iter().find(|job| job.id.starts_with(&prefix)) else {
            return Ok(None);
        };
        if job.status != JobStatus::concluded {
            self.find_means(monitor)?;
        }
        self.job_id = job.id;
        Ok(Some(Job::new(monitor, self.job_id.clone())))
    }

    /// Finds out how the layer that takes the data can be flushed, where that is needed and not known.
    ///
    /// # Errors
    /// [`Error::NotFlushed`] if it cannot be; those of the queries.
    pub(crate) fn find_means(&mut self, monitor: &(impl Monitor + ?Sized)) -> Result<()> {
        if self.is_flushed_here() && self.means.is_none() {
            self.means = Some(Means::find(monitor, &self.receiver.node, self.options.nbd_socket.as_deref())?);
        }
        Ok(())
    }

    /// QEMU itself flushes the base of an active commit, and then holds all requests: a flush would hang.
    fn is_flushed_here(&self) -> bool {
        !self.is_active()
    }

    /// Makes the layer that takes the data durable, including its tables, by the means that the preflight
    /// found.
    ///
    /// # Errors
    /// [`Refusal::NotTried`] before [`Procedure::preflight`] has passed, and for an active commit, where QEMU does
    /// this itself; those of the flush.
    pub fn flush(&self, monitor: &(impl Monitor + ?Sized)) -> Result<()> {
        let means = self.means.as_ref().ok_or(Refusal::NotTried)?;
        match means.flush(monitor, &self.receiver.node) {
            // While a job that had to grow its target exists, the target cannot be exported.
            Err(Error::Command { .. }) if self.grows() => {
                flush(monitor, &self.receiver.node, self.options.nbd_socket.as_deref())
            }
            done => done,
        }
    }

    /// Whether the guest may be paused for a moment when the merge ends.
    pub(crate) fn may_pause(&self) -> bool {
        let needs_no_pause = matches!(self.means, Some(Means::OwnServer | Means::Server(_) | Means::Command));
        self.is_flushed_here() && (self.grows() || !needs_no_pause)
    }

    /// Whether the job makes the layer that takes the data larger.
    fn grows(&self) -> bool {
        let top = self.merged.first().filter(|_| self.direction == Direction::Down);
        top.is_some_and(|top| self.receiver.virtual_size < top.virtual_size)
    }

    /// Switches a merge whose job is pending or, for an active commit, ready, and closes the nodes that are no
    /// longer needed.
    ///
    /// `before_switch` is called when the copied data is durable and nothing is switched yet. For an active
    /// commit the guest's writes are held at that moment, and base equals the active layer: the caller must
    /// note durably that base is the valid top. If the call fails, the job is cancelled and the guest stays
    /// where it was.
    ///
    /// # Errors
    /// [`Error::Refused`] if the job is not ready for that, those of the flush, and that of `before_switch`:
    /// nothing is switched then, and a pending job can be finished later or cancelled. [`Error::Job`] if the
    /// switch fails.
    pub fn finish<M: Monitor + ?Sized>(
        &self,
        job: &Job<'_, M>,
        monitor: &M,
        before_switch: &mut dyn FnMut() -> Result<()>,
    ) -> Result<Merged> {
        if self.is_active() {
            // If the job does not hold the writes, it ended before, perhaps through somebody else; or it failed
            // at the last moment, and nothing was switched.
            if steps::hold(job)? {
                if let Err(error) = before_switch() {
                    self.cancel(job)?;
                    return Err(error);
                }
                self.direction.switch(job, monitor)?;
            }
        } else if require(job, &[JobStatus::pending])? == JobStatus::pending {
            self.flush(monitor)?;
            before_switch()?;
            self.direction.switch(job, monitor)?;
        }
        if self.direction.keeps_job() {
            job.take_result()?;
        }
        self.verify(job, monitor)
    }

    /// Ends an active merge whose job is ready, without a pivot. Base then holds the disk as it was at one
    /// moment, durably; the guest stays on the active layer.
    ///
    /// # Errors
    /// [`Error::Refused`] for a merge that is not active, or if the job is not ready; [`Error::Job`] if the job
    /// failed, or completed before.
    pub(crate) fn keep_overlay<M: Monitor + ?Sized>(&self, job: &Job<'_, M>, monitor: &M) -> Result<Disk> {
        if !self.is_active() {
            return Err(Refusal::OnlyActiveCommit { step: "can keep the overlay" }.into());
        }
        if !steps::hold(job)? {
            job.take_result()?;
            return Err(failed(job, "it was done before base could be let go of".into()));
        }
        // Base equals the active layer, and QEMU has flushed it: cancelling the job now releases base.
        self.cancel(job)?;
        with_chain(monitor, &self.chain())?
            .ok_or_else(|| failed(job, "no disk has the chain that it had before".into()))
    }

    /// Cancels the job and waits until it is gone. The chain is as it was. The data that a commit has copied
    /// stays in base, and shows through the layers between base and top; the guest does not see it. The active
    /// layer of a pull shows the same bytes as before.
    ///
    /// # Errors
    /// Those of the commands; [`Error::Job`] if the job cannot be cancelled any more.
    pub fn cancel<M: Monitor + ?Sized>(&self, job: &Job<'_, M>) -> Result<()> {
        crate::block::jobs::cancel(job)
    }

    /// Checks in the graph that the merge was carried out, and closes the nodes that are no longer needed.
    pub(crate) fn verify<M: Monitor + ?Sized>(&self, job: &Job<'_, M>, monitor: &M) -> Result<Merged> {
        steps::wrap_up(self, job, monitor)
    }
}

/// How the ids of all jobs begin that merge these layers of a disk in this direction.
fn id_of_all(direction: Direction, disk: &str, span: Span) -> String {
    format!("{}{}.{}.", job_prefix(direction.of_jobs(), disk), span.base, direction.last(span))
}

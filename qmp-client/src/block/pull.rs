//! The live merge upwards: the active layer takes in layers that lie below it. QEMU's `block-stream`.

use qapi::qmp::{self, JobStatus};
use serde_json::Value;

use crate::block::commit::{CommitOptions, backing_name, bitmaps, circumstances, ownership};
use crate::block::flush::Means;
use crate::block::graph::{Disk, Layer, Range};
use crate::block::jobs::Job;
use crate::block::procedure::{self, Merged, Renamed, unique};
use crate::error::{Error, Result};
use crate::qmp::monitor::{Execute, Monitor};
use crate::state::{State, StateLayer};

/// A planned pull of the layers below the active one, down to but without `base`, into it.
///
/// No layer below is written: each stays what it was, for whoever else uses it.
#[derive(Clone, Debug)]
pub struct Pull {
    disk: String,
    active: Layer,
    base: Option<Layer>,
    pulled: Vec<Layer>,
    left: Vec<Layer>,
    backing_file: Option<String>,
    job_id: String,
    filter: String,
    options: CommitOptions,
    means: Option<Means>,
}

impl Pull {
    /// Plans the pull. Without a `base` the active layer takes in everything, and stands alone then.
    ///
    /// # Errors
    /// [`Error::Layer`] if nothing lies between; [`Error::BackingName`] and [`Error::Refused`] with the reason.
    pub fn plan(disk: &Disk, base: Option<&Layer>, options: CommitOptions) -> Result<Self> {
        let active = disk.active();
        let bottom = base.map_or(0, |base| base.index);
        let is_pulled = |l: &&Layer| l.index > bottom && l.index < active.index;
        let (pulled, left): (Vec<&Layer>, Vec<&Layer>) = disk.layers().iter().partition(is_pulled);
        let Some(lowest) = pulled.last() else {
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
        ownership(disk.layers().iter().map(|l| &l.node))?;
        let pull = Self {
            disk: disk.name().to_owned(),
            active: active.clone(),
            base: base.cloned(),
            pulled: pulled.into_iter().cloned().collect(),
            left: left.into_iter().cloned().collect(),
            backing_file,
            job_id: format!(
                "{}{bottom}.{}.{}",
                procedure::job_prefix("pull", disk.name()),
                active.index,
                unique()
            ),
            filter: format!("filter-{}", unique()),
            options,
            means: None,
        };
        bitmaps(&pull.pulled, pull.options.drop_bitmaps)?;
        Ok(pull)
    }

    /// The id that the job will have; it says what is pulled.
    pub fn job_id(&self) -> &str {
        &self.job_id
    }

    /// The disk's name.
    pub fn disk(&self) -> &str {
        &self.disk
    }

    /// The layer that takes in the others.
    pub fn active(&self) -> &Layer {
        &self.active
    }

    /// The layer on which the active one lies afterwards; none if it stands alone then.
    pub fn base(&self) -> Option<&Layer> {
        self.base.as_ref()
    }

    /// The layers that the disk has afterwards, from the top.
    pub fn left(&self) -> &[Layer] {
        &self.left
    }

    /// How the pull is to be done.
    pub fn options(&self) -> &CommitOptions {
        &self.options
    }

    /// The bytes that the layers that are pulled hold on disk, which is about what is copied at most; `None` where QEMU
    /// does not know it of one of them.
    pub fn bytes(&self) -> Option<u64> {
        procedure::bytes(&self.pulled)
    }

    /// The layers that the disk no longer needs afterwards, from the top.
    pub fn pulled(&self) -> &[Layer] {
        &self.pulled
    }

    /// Asks QEMU all that can be known before the job starts, and tries to flush the active layer.
    ///
    /// # Errors
    /// [`Error::Refused`] with the reason; those of the commands.
    pub fn preflight(&mut self, monitor: &(impl Monitor + ?Sized)) -> Result<()> {
        circumstances(monitor, &self.disk)?;
        self.find_means(monitor)
    }

    /// Starts the job; it stops before it switches anything.
    ///
    /// # Errors
    /// [`Error::Refused`] before [`Pull::preflight`] has passed; those of the command.
    pub fn start<'m, M: Monitor + ?Sized>(&self, monitor: &'m M) -> Result<Job<'m, M>> {
        self.means()?;
        monitor.execute(&self.request())?;
        Ok(Job::new(monitor, self.job_id.clone()))
    }

    /// The commands that carry the pull out, in order, each with its arguments; those between which QEMU is only
    /// asked are left out, and so is the flush of the active layer, whose means is found when it begins.
    ///
    /// # Errors
    /// [`Error::Request`] if a command cannot be written as JSON.
    pub fn commands(&self) -> Result<Vec<(&'static str, Value)>> {
        let mut commands = vec![procedure::written(&self.request())?];
        commands.extend(procedure::end_of(&self.job_id, false, &self.pulled)?);
        Ok(commands)
    }

    /// The backing name that the active layer will have; none if it will stand alone.
    pub fn backing_file(&self) -> Option<&str> {
        self.backing_file.as_deref()
    }

    #[allow(deprecated, reason = "the struct of the schema has a field for a file name, which stays empty")]
    fn request(&self) -> qmp::block_stream {
        let without_format = self.base.as_ref().is_some_and(|base| base.protocol_node.is_none());
        qmp::block_stream {
            job_id: Some(self.job_id.clone()),
            device: self.active.node.clone(),
            base_node: self.base.as_ref().map(|base| base.node.clone()),
            backing_file: self.backing_file.clone(),
            backing_mask_protocol: without_format.then_some(true),
            speed: (self.options.speed > 0).then(|| i64::try_from(self.options.speed).unwrap_or(i64::MAX)),
            on_error: Some(qmp::BlockdevOnError::stop),
            filter_node_name: Some(self.filter.clone()),
            auto_finalize: Some(false),
            // QEMU 10.0.2 crashes when it is asked for its nodes while a stream job that has concluded is kept. The
            // graph tells how it ended.
            auto_dismiss: Some(true),
            base: None,
            bottom: None,
        }
    }

    /// The pull that a state file describes, whose job runs or has run in this QEMU.
    pub(crate) fn recall(state: &State) -> Option<Self> {
        let layers: Vec<Layer> = state.layers.iter().map(StateLayer::recall).collect();
        let active = layers.first()?.clone();
        let (pulled, left) =
            layers.iter().cloned().partition(|l| l.index > state.base && l.index < active.index);
        Some(Self {
            disk: state.disk.clone(),
            base: layers.iter().find(|l| l.index == state.base).cloned(),
            active,
            pulled,
            left,
            backing_file: state.backing.as_ref().and_then(|rename| rename.new.clone()),
            job_id: state.job.clone(),
            filter: format!("filter-{}", unique()),
            options: CommitOptions { nbd_socket: state.nbd_socket.clone(), ..Default::default() },
            means: None,
        })
    }

    /// Finds out how the active layer can be flushed, where that is not known.
    ///
    /// # Errors
    /// [`Error::Refused`] if it cannot be; those of the queries.
    pub(crate) fn find_means(&mut self, monitor: &(impl Monitor + ?Sized)) -> Result<()> {
        if self.means.is_none() {
            let server = self.options.nbd_socket.as_deref();
            self.means = Some(Means::find(monitor, &self.active.node, server)?);
        }
        Ok(())
    }

    /// Ends a pull whose job is pending: flushes the active layer, has its header name the new backing file, and
    /// closes what is no longer needed.
    ///
    /// `before_switch` is called when the active layer is durable and nothing is switched yet.
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
            self.means()?.flush(monitor, &self.active.node)?;
            before_switch()?;
            if let Some(why) = procedure::switch_unkept(job, monitor)? {
                return Err(procedure::failed(job, why));
            }
        }
        self.verify(job, monitor)
    }

    /// Closes what is no longer needed, and looks whether the pull has been carried out.
    pub(crate) fn verify<M: Monitor + ?Sized>(&self, job: &Job<'_, M>, monitor: &M) -> Result<Merged> {
        let renamed = Renamed { overlay: &self.active.node, name: self.backing_file() };
        let server = self.options.nbd_socket.as_deref();
        procedure::wrap_up(job, monitor, &self.pulled, &self.left, Some(&renamed), server)
    }

    /// Cancels the job and waits until it is gone. The chain is as it was; the active layer holds what was
    /// copied so far, which shows the same bytes.
    ///
    /// # Errors
    /// Those of the commands; [`Error::Job`] if the job cannot be cancelled any more.
    pub fn cancel<M: Monitor + ?Sized>(&self, job: &Job<'_, M>) -> Result<()> {
        procedure::cancel(job)
    }

    fn means(&self) -> Result<&Means> {
        let why = || Error::Refused { why: "the pull has not passed its preflight".into() };
        self.means.as_ref().ok_or_else(why)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::block::graph::Graph;
    use crate::qmp::replay::Replay;

    const BLOCKDEV: &str = include_str!("../../testdata/transcripts/discovery-blockdev.jsonl");

    fn plan(transcript: &str, base: Option<&str>, options: CommitOptions) -> Result<Pull> {
        let graph = Graph::ask(&Replay::of(transcript)).unwrap();
        let disk = &graph.disks()[0];
        Pull::plan(disk, base.map(|name| disk.layer(name).unwrap()), options)
    }

    #[test]
    fn the_layers_between_are_pulled_and_the_name_keeps_its_style() {
        let pull = plan(BLOCKDEV, Some("[2]"), CommitOptions::default()).unwrap();
        assert_eq!(pull.pulled().iter().map(|l| l.index).collect::<Vec<_>>(), [4, 3]);
        assert_eq!(pull.backing_file.as_deref(), Some("/vm/a/s1.qcow2"));
        assert!(pull.job_id().starts_with("pull.vda.2.5."), "{}", pull.job_id());
        let whole = plan(BLOCKDEV, None, CommitOptions::default()).unwrap();
        assert_eq!(whole.pulled().len(), 4);
        assert_eq!(whole.backing_file, None);
    }

    #[test]
    fn the_commands_are_told_in_their_order() {
        let pull = plan(BLOCKDEV, Some("[3]"), CommitOptions::default()).unwrap();
        let commands = pull.commands().unwrap();
        let names: Vec<_> = commands.iter().map(|(name, _)| *name).collect();
        assert_eq!(names, ["block-stream", "job-finalize", "blockdev-del", "blockdev-del"]);
        assert_eq!(commands[0].1["backing-file"], "/vm/a/s2.qcow2");
        assert_eq!(commands[3].1["node-name"], pull.pulled()[0].protocol_node.as_deref().unwrap());
    }

    #[test]
    fn pulls_that_make_no_sense_are_refused() {
        for base in ["[4]", "[5]"] {
            let error = plan(BLOCKDEV, Some(base), CommitOptions::default()).unwrap_err().to_string();
            assert!(error.contains("nothing to pull") && error.contains("[5] /vm/a/active.qcow2"), "{error}");
        }
        let named = CommitOptions { backing_file: Some("x".into()), ..Default::default() };
        let error = plan(BLOCKDEV, None, named).unwrap_err();
        assert!(matches!(error, Error::BackingName { takes_another: false, .. }), "{error}");
        let owned = BLOCKDEV.replace("\"s1-fmt\"", "\"libvirt-4-format\"");
        let error = plan(&owned, None, CommitOptions::default()).unwrap_err();
        assert!(matches!(&error, Error::Managed { node } if node == "libvirt-4-format"), "{error}");
        let pull = plan(BLOCKDEV, None, CommitOptions::default()).unwrap();
        assert!(matches!(pull.start(&Replay::default()), Err(Error::Refused { .. })));
    }
}

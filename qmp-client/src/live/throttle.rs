//! Slows a guest down for a while, so that an active commit can catch up with its writes and get ready.

use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use super::Merge;
use crate::block::graph::Disk;
use crate::block::ids::unique;
use crate::block::jobs::{JobState, Progress, Waited, Watch};
use crate::error::{Refusal, Result};
use crate::qmp::monitor::{Execute, Monitor};
use crate::state::{Kind, State, StateFile, Throttled};

const COMMAND: &str = "block_set_io_throttle";
/// The limits that the command must be given, and those that it may be.
const REQUIRED: [&str; 6] = ["bps", "bps_rd", "bps_wr", "iops", "iops_rd", "iops_wr"];
const OPTIONAL: [&str; 14] = [
    "bps_max",
    "bps_rd_max",
    "bps_wr_max",
    "iops_max",
    "iops_rd_max",
    "iops_wr_max",
    "bps_max_length",
    "bps_rd_max_length",
    "bps_wr_max_length",
    "iops_max_length",
    "iops_rd_max_length",
    "iops_wr_max_length",
    "iops_size",
    "group",
];

/// What QEMU copies again when the guest writes a byte: the least unit of its list of what is to be copied.
const COPIED_AT_ONCE: u64 = 64 << 10;

/// How long a limit is given to show its effect.
const STEP: Duration = Duration::from_secs(3);

/// The limits of one disk, and how far they may be lowered for a while.
#[derive(Clone, Debug)]
pub struct Throttle {
    before: Throttled,
}

impl Throttle {
    /// No limit is lower than this many written bytes per second, nor than the number of writes that can make
    /// QEMU copy that much again: with a slower disk, a guest would give up.
    pub const FLOOR: u64 = 1 << 20;

    /// Asks for the limits that the disk has.
    ///
    /// # Errors
    /// [`crate::Error::Refused`] for a disk that is no device, such as an export of a storage daemon: nothing can slow
    /// its guest down. Those of the query.
    pub fn of(monitor: &(impl Monitor + ?Sized), disk: &Disk) -> Result<Self> {
        let name = disk.name();
        let refused = |why: &'static str| Refusal::NoThrottle { disk: name.to_owned(), why };
        let Some(qdev) = disk.qdev() else { return Err(refused("it is no device of a guest").into()) };
        let all = monitor.query("query-block", json!({}))?;
        let entries = all.as_array().map(Vec::as_slice).unwrap_or_default();
        let inserted = entries.iter().find(|entry| entry["qdev"] == qdev).map(|entry| &entry["inserted"]);
        let Some(Value::Object(inserted)) = inserted else {
            return Err(refused("QEMU does not show its limits").into());
        };
        let mut former = Map::from_iter([("id".to_owned(), json!(qdev))]);
        for key in REQUIRED {
            former.insert(key.to_owned(), inserted.get(key).cloned().unwrap_or(json!(0)));
        }
        let more = OPTIONAL.iter().filter_map(|key| Some(((*key).to_owned(), inserted.get(*key)?.clone())));
        former.extend(more);
        Ok(Self { before: Throttled { qdev: qdev.to_owned(), former } })
    }

    /// The command's arguments for at most this many written bytes per second.
    fn limited(&self, bytes: u64) -> Value {
        let mut limits = Map::from_iter([("id".to_owned(), json!(self.before.qdev))]);
        for (total, read, write, value) in
            [("bps", "bps_rd", "bps_wr", bytes), ("iops", "iops_rd", "iops_wr", bytes / COPIED_AT_ONCE)]
        {
            let former = |key: &str| self.before.former.get(key).and_then(Value::as_u64).unwrap_or(0);
            let lower = |former: u64| if former == 0 { value } else { value.min(former) };
            // QEMU does not take a limit of all and one of writes together.
            let [all, reads, writes] = match former(total) {
                0 => [0, former(read), lower(former(write))],
                limit => [lower(limit), 0, 0],
            };
            limits.extend(
                [(total, all), (read, reads), (write, writes)].map(|(k, v)| (k.to_owned(), json!(v))),
            );
        }
        // A group of its own: other disks may share the one that it has.
        limits.insert("group".to_owned(), json!(format!("merge-{}", unique())));
        Value::Object(limits)
    }
}

/// Restores the limits that the disk of a merge had before it was throttled, and notes that; does nothing if it
/// is not throttled.
pub(super) fn relax<M: Monitor + ?Sized>(monitor: &M, state: &mut State, file: &StateFile) -> Result<()> {
    let Some(throttled) = &state.throttled else { return Ok(()) };
    monitor.query(COMMAND, Value::Object(throttled.former.clone()))?;
    state.throttled = None;
    file.save_as_it_is(state)
}

impl<M: Monitor + ?Sized> Merge<'_, M> {
    /// Waits like [`Merge::wait`], and slows the guest's writes to this disk down if the job does not gain on them: in
    /// steps of half the limit, down to [`Throttle::FLOOR`]. `on_limit` is told each new limit in bytes per second.
    ///
    /// The state file keeps the former limits meanwhile. They are put back before this returns, unless the job is
    /// ready: then at the end of the merge, however it ends. Whoever leaves the job ready calls `Merge::relax`.
    ///
    /// # Errors
    /// [`crate::Error::Refused`] for a merge that is no active commit; those of the commands and of the state file.
    pub fn wait_converging(
        &mut self,
        throttle: &Throttle,
        timeout: Option<Duration>,
        watch: &mut dyn FnMut(&Progress<'_>) -> Watch,
        on_limit: &mut dyn FnMut(u64),
    ) -> Result<Waited> {
        if self.state.kind != Kind::ActiveCommit {
            return Err(Refusal::OnlyActiveCommit { step: "waits for the guest" }.into());
        }
        match self.wait_and_throttle(throttle, timeout, watch, on_limit) {
            reached @ Ok(Waited::Reached(_)) => reached,
            ended => self.relax_after(ended),
        }
    }

    fn wait_and_throttle(
        &mut self,
        throttle: &Throttle,
        timeout: Option<Duration>,
        watch: &mut dyn FnMut(&Progress<'_>) -> Watch,
        on_limit: &mut dyn FnMut(u64),
    ) -> Result<Waited> {
        let begin = Instant::now();
        let mut before: Option<(JobState, Instant)> = None;
        let mut limit = None;
        loop {
            let left = timeout.map(|timeout| timeout.saturating_sub(begin.elapsed()));
            let step = left.map_or(STEP, |left| left.min(STEP));
            let job = match self.wait(Some(step), watch)? {
                Waited::TimeUp(job) if left.is_none_or(|left| left > STEP) => job,
                ended => return Ok(ended),
            };
            // A slow job copies in large pieces. A pause between two of them does not mean that it falls
            // behind.
            let (then, since) = before.get_or_insert_with(|| (job.clone(), Instant::now()));
            if job.done > then.done {
                if let Some(next) = next_limit(then, &job, since.elapsed(), limit) {
                    self.throttle(throttle, next)?;
                    limit = Some(next);
                    on_limit(next);
                }
                before = Some((job, Instant::now()));
            }
        }
    }

    /// Restores the limits that the disk had before it was throttled; does nothing if it is not throttled.
    ///
    /// # Errors
    /// Those of the command and of the state file.
    pub(crate) fn relax(&mut self) -> Result<()> {
        relax(self.monitor, &mut self.state, &self.file)
    }

    fn throttle(&mut self, throttle: &Throttle, bytes: u64) -> Result<()> {
        if self.state.throttled.is_none() {
            self.state.throttled = Some(throttle.before.clone());
            self.file.save(&mut self.state)?;
        }
        self.monitor.query(COMMAND, throttle.limited(bytes)).map(drop)
    }
}

/// The next lower limit, if in this time the guest wrote about as much as was copied, and the limit can still be
/// lowered.
fn next_limit(before: &JobState, now: &JobState, time: Duration, limit: Option<u64>) -> Option<u64> {
    let copied = now.done.saturating_sub(before.done);
    let written = now.total.saturating_sub(before.total);
    // A job that stands still copies nothing, and the guest's writes are not the reason.
    if copied == 0 || now.is_stalled() || written < copied / 10 * 9 {
        return None;
    }
    let per_second = copied / time.as_secs().max(1);
    let next = limit.map_or(per_second, |limit| limit.min(per_second)) / 2;
    Some(next.max(Throttle::FLOOR)).filter(|next| limit.is_none_or(|limit| *next < limit))
}

#[cfg(test)]
mod tests {
    use qapi::qmp::JobStatus;

    use super::*;
    use crate::block::graph::Graph;
    use crate::qmp::replay::Replay;

    fn job(done: u64, total: u64) -> JobState {
        let status = JobStatus::running;
        JobState { id: "j".into(), kind: "commit".into(), status, done, total, error: None, block: None }
    }

    fn throttle(limits: &[(&str, u64)]) -> Throttle {
        let former = limits.iter().map(|(key, value)| ((*key).to_owned(), json!(value)));
        Throttle { before: Throttled { qdev: "/q".into(), former: former.collect() } }
    }

    #[test]
    fn a_limit_is_lowered_as_long_as_the_guest_keeps_up_and_never_below_the_floor() {
        let mib = 1 << 20;
        let next_limit =
            |before: &JobState, now: &JobState, limit| next_limit(before, now, Duration::from_secs(3), limit);
        assert_eq!(next_limit(&job(0, 90 * mib), &job(60 * mib, 150 * mib), None), Some(10 * mib));
        assert_eq!(next_limit(&job(0, 90 * mib), &job(60 * mib, 140 * mib), None), None, "it gains");
        assert_eq!(next_limit(&job(0, 9 * mib), &job(0, 90 * mib), None), None, "it stands still");
        let mut limit = None;
        let mut seen = Vec::new();
        while let Some(next) = next_limit(&job(0, 0), &job(60 * mib, 60 * mib), limit) {
            seen.push(next);
            limit = Some(next);
        }
        assert_eq!(seen, [10 * mib, 5 * mib, 5 * mib / 2, 5 * mib / 4, Throttle::FLOOR]);
    }

    #[test]
    fn limits_that_are_lower_already_stay_and_totals_stay_totals() {
        let limits = throttle(&[("bps_wr", 9), ("bps_rd", 7), ("iops", 1 << 40)]).limited(1 << 20);
        assert_eq!((&limits["bps"], &limits["bps_rd"], &limits["bps_wr"]), (&json!(0), &json!(7), &json!(9)));
        assert_eq!((&limits["iops"], &limits["iops_wr"]), (&json!(16), &json!(0)));
        let limits = throttle(&[]).limited(1 << 20);
        assert_eq!((&limits["bps_wr"], &limits["iops_wr"]), (&json!(1 << 20), &json!(16)));
        assert!(limits["group"].as_str().unwrap().starts_with("merge-"));
    }

    #[test]
    fn a_disk_that_is_no_device_is_refused_with_the_reason() {
        let qsd = Replay::of(include_str!("../../testdata/transcripts/discovery-qsd.jsonl"));
        let graph = Graph::ask(&qsd).unwrap();
        let error = Throttle::of(&qsd, &graph.disks()[0]).unwrap_err().to_string();
        assert!(error.contains("no device of a guest"), "{error}");
    }
}

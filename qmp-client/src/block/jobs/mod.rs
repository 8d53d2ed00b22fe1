//! Jobs as state machines. An event is only a reason to ask; the answer to a query counts.
//!
//! A job belongs to QEMU, not to the client that started it. So everything here works on jobs that somebody
//! else started, or this client on an earlier connection.

mod end;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::time::{Duration, Instant};

use qapi::qmp::{self, JobStatus};
use serde::{Deserialize, Serialize};
use serde_json::json;

use crate::block::ids::is_of_merge;
use crate::error::{Error, Result};
use crate::qmp::monitor::{Execute, Monitor, read};

pub use end::cancel;
pub(crate) use end::{LONGEST_STEP, failed, require, stuck};

/// A job as QEMU described it at one moment. For programs it has the fields of `query-jobs` and `query-block-jobs`.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct JobState {
    /// The job's id.
    pub id: String,
    /// What it does, such as `commit` or `stream`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Where it stands.
    pub status: JobStatus,
    /// How much is done, out of [`JobState::total`]; in bytes for jobs that copy. An intermediate commit counts
    /// the whole virtual size with its holes. An active one counts the data to copy, which grows while the
    /// guest writes.
    #[serde(rename = "current-progress")]
    pub done: u64,
    /// How much there is to do.
    #[serde(rename = "total-progress")]
    pub total: u64,
    /// What went wrong, once the job has concluded.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// What is particular to jobs that move a disk's data.
    #[serde(flatten)]
    pub block: Option<BlockJobState>,
}

/// What QEMU tells only of jobs that move a disk's data.
#[derive(Clone, Debug, Deserialize, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct BlockJobState {
    /// `ok`, `nospace` or `failed`: why a job that met an error stands still.
    pub io_status: String,
    /// The limit in bytes per second, zero for none.
    pub speed: u64,
    /// Whether QEMU ends the job without being asked.
    pub auto_finalize: bool,
    /// Whether QEMU forgets the job, and its error, as soon as it has concluded.
    pub auto_dismiss: bool,
}

impl JobState {
    /// Whether it stands still because of an error, and goes on when it is resumed.
    pub fn is_stalled(&self) -> bool {
        let stands = matches!(self.status, JobStatus::paused | JobStatus::standby);
        stands && self.block.as_ref().is_some_and(|b| b.io_status != "ok")
    }
}

#[derive(Deserialize)]
#[serde(rename_all = "kebab-case")]
struct RawJob {
    id: String,
    #[serde(rename = "type")]
    kind: String,
    status: JobStatus,
    current_progress: u64,
    total_progress: u64,
    error: Option<String>,
}

#[derive(Deserialize)]
struct RawBlockJob {
    /// The job's id, whatever the name of the field.
    device: String,
    #[serde(flatten)]
    state: BlockJobState,
}

/// All jobs of this QEMU, whoever started them.
///
/// # Errors
/// Those of the queries.
pub fn jobs(monitor: &(impl Monitor + ?Sized)) -> Result<Vec<JobState>> {
    let command = "query-jobs";
    let jobs: Vec<RawJob> = read(command, monitor.query(command, json!({}))?)?;
    if jobs.is_empty() {
        return Ok(Vec::new());
    }
    let command = "query-block-jobs";
    let block: Vec<RawBlockJob> = read(command, monitor.query(command, json!({}))?)?;
    let mut block: HashMap<String, BlockJobState> = block.into_iter().map(|j| (j.device, j.state)).collect();
    let state = |job: RawJob| JobState {
        block: block.remove(&job.id),
        id: job.id,
        kind: job.kind,
        status: job.status,
        done: job.current_progress,
        total: job.total_progress,
        error: job.error,
    };
    Ok(jobs.into_iter().map(state).collect())
}

/// What to wait for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Goal {
    /// An active commit has copied everything but the guest's latest writes. It can be completed, or already is
    /// completing and holds the guest's writes.
    Ready,
    /// Everything is copied, nothing is switched; the job waits to be finalised.
    Pending,
    /// The job is over; only its result is kept.
    Concluded,
}

impl Goal {
    fn is_reached(self, status: JobStatus) -> bool {
        match self {
            Self::Ready => matches!(status, JobStatus::ready | JobStatus::standby | JobStatus::pending),
            Self::Pending => status == JobStatus::pending,
            Self::Concluded => status == JobStatus::concluded,
        }
    }
}

/// The progress of a job.
#[derive(Debug)]
#[non_exhaustive]
pub struct Progress<'a> {
    /// The job, as it just was.
    pub job: &'a JobState,
    /// Bytes per second since the watching began.
    pub rate: f64,
    /// How long the rest takes at that rate, if that can be said.
    pub remaining: Option<Duration>,
}

/// Whether to go on watching.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Watch {
    /// Go on.
    GoOn,
    /// Stop watching; the job goes on.
    Stop,
}

/// How waiting for a job ended.
#[derive(Clone, Debug)]
pub enum Waited {
    /// The goal is reached.
    Reached(JobState),
    /// The job concluded without reaching the goal; [`JobState::error`] tells why.
    Concluded(JobState),
    /// The job stands still because of an error, such as a full disk. It goes on when it is resumed.
    Stalled(JobState),
    /// QEMU does not know the job any more. That tells nothing about how it ended.
    Vanished,
    /// The timeout passed.
    TimeUp(JobState),
    /// The watcher did not want to wait any longer.
    Stopped(JobState),
}

/// A handle on one job.
#[derive(Debug)]
pub struct Job<'a, M: ?Sized> {
    monitor: &'a M,
    id: String,
}

impl<'a, M: Monitor + ?Sized> Job<'a, M> {
    /// How long to wait for an event before QEMU is asked again.
    const TICK: Duration = Duration::from_millis(500);

    /// The job with this id. It need not exist.
    pub fn new(monitor: &'a M, id: impl Into<String>) -> Self {
        Self { monitor, id: id.into() }
    }

    /// The job's id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Whether the id is one of this library's merges. Then a state file notes the job, or did.
    pub fn is_of_merge(&self) -> bool {
        is_of_merge(&self.id)
    }

    /// The state of the job; `None` if QEMU does not know it.
    ///
    /// # Errors
    /// Those of the queries.
    pub fn state(&self) -> Result<Option<JobState>> {
        Ok(jobs(self.monitor)?.into_iter().find(|job| job.id == self.id))
    }

    /// Waits until the job reaches `goal`, cannot reach it any more, or needs help; at most `timeout`, if
    /// given. `watch` is called after each query, at least twice a second.
    ///
    /// Events that arrive meanwhile are consumed.
    ///
    /// # Errors
    /// Those of the queries; [`Error::Disconnected`] if QEMU goes away.
    pub fn wait(
        &self,
        goal: Goal,
        timeout: Option<Duration>,
        watch: &mut dyn FnMut(&Progress<'_>) -> Watch,
    ) -> Result<Waited> {
        let begin = Instant::now();
        let mut first = None;
        loop {
            let Some(job) = self.state()? else { return Ok(Waited::Vanished) };
            let first = *first.get_or_insert(job.done);
            let wanted = watch(&progress(&job, first, begin.elapsed()));
            if goal.is_reached(job.status) && !job.is_stalled() {
                return Ok(Waited::Reached(job));
            }
            if job.status == JobStatus::concluded {
                return Ok(Waited::Concluded(job));
            }
            if job.is_stalled() {
                return Ok(Waited::Stalled(job));
            }
            if wanted == Watch::Stop {
                return Ok(Waited::Stopped(job));
            }
            let left = timeout.map_or(Self::TICK, |t| t.saturating_sub(begin.elapsed()));
            if left.is_zero() {
                return Ok(Waited::TimeUp(job));
            }
            // One event of this job is a reason to ask QEMU; many events at once are still one reason.
            let deadline = Instant::now() + left.min(Self::TICK);
            while let Some(event) =
                self.monitor.next_event(deadline.saturating_duration_since(Instant::now()))?
            {
                let concerns =
                    ["id", "device"].iter().any(|key| event.data.get(*key).is_some_and(|v| *v == self.id));
                if concerns {
                    while self.monitor.next_event(Duration::ZERO)?.is_some() {}
                    break;
                }
            }
        }
    }

    /// Halts the job; it keeps what it has done.
    ///
    /// # Errors
    /// Those of the command: a job that is paused already cannot be paused again.
    pub fn pause(&self) -> Result<()> {
        self.monitor.execute(&qmp::job_pause { id: self.id.clone() }).map(drop)
    }

    /// Resumes a paused job, even one that stopped because of an error.
    ///
    /// # Errors
    /// Those of the command.
    pub fn resume(&self) -> Result<()> {
        self.monitor.execute(&qmp::job_resume { id: self.id.clone() }).map(drop)
    }

    /// Ends the job without its effect. Even a commit that is ready or pending does not take effect; copied
    /// data stays copied.
    ///
    /// # Errors
    /// Those of the command.
    pub fn cancel(&self) -> Result<()> {
        // Not `block-job-cancel`: on a commit that is ready it completes the job, and leaves base writable.
        self.monitor.execute(&qmp::job_cancel { id: self.id.clone() }).map(drop)
    }

    /// Asks a job that is ready to complete. The answer comes before the job has completed.
    ///
    /// # Errors
    /// Those of the command.
    pub fn complete(&self) -> Result<()> {
        self.monitor.execute(&qmp::job_complete { id: self.id.clone() }).map(drop)
    }

    /// Asks a pending job to switch.
    ///
    /// # Errors
    /// Those of the command.
    pub fn finalize(&self) -> Result<()> {
        self.monitor.execute(&qmp::job_finalize { id: self.id.clone() }).map(drop)
    }

    /// Limits the job to this many bytes per second; zero lifts the limit.
    ///
    /// # Errors
    /// Those of the command.
    pub fn set_speed(&self, bytes_per_second: u64) -> Result<()> {
        let speed = i64::try_from(bytes_per_second).unwrap_or(i64::MAX);
        self.monitor.execute(&qmp::block_job_set_speed { device: self.id.clone(), speed }).map(drop)
    }

    /// Takes the result of a job that has concluded, and lets QEMU forget the job. As long as QEMU keeps it, no
    /// other job can start on the disk.
    ///
    /// # Errors
    /// [`Error::Job`] with QEMU's words if the job failed (it is forgotten then, too) or has vanished: a job
    /// whose end nobody saw does not count as a success.
    pub fn take_result(&self) -> Result<JobState> {
        let failed = |why: String| Err(Error::Job { id: self.id.clone(), why });
        let Some(job) = self.state()? else {
            return failed("it has vanished, and its result with it".into());
        };
        if job.status != JobStatus::concluded {
            return failed(format!("it has not concluded, it is {:?}", job.status));
        }
        self.monitor.execute(&qmp::job_dismiss { id: self.id.clone() })?;
        match &job.error {
            None => Ok(job),
            Some(error) => failed(error.clone()),
        }
    }
}

fn progress(job: &JobState, first: u64, elapsed: Duration) -> Progress<'_> {
    let seconds = elapsed.as_secs_f64();
    let rate = if seconds > 0.0 { job.done.saturating_sub(first) as f64 / seconds } else { 0.0 };
    let left = job.total.saturating_sub(job.done) as f64;
    let remaining = Duration::try_from_secs_f64(left / rate).ok();
    Progress { job, rate, remaining }
}

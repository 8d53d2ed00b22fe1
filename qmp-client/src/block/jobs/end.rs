//! Ends a job, whoever started it.

use std::time::Duration;

use qapi::qmp::JobStatus;

use super::{Goal, Job, Waited, Watch};
use crate::error::{Error, Refusal, Result};
use crate::qmp::monitor::Monitor;

/// How long a step that copies nothing may take. QEMU finishes the disk's pending I/O first.
pub(crate) const LONGEST_STEP: Duration = Duration::from_secs(600);

/// Waits until the job has one of the wanted states, or has concluded: somebody else may have ended it, or this
/// client before it was interrupted.
pub(crate) fn require<M: Monitor + ?Sized>(job: &Job<'_, M>, wanted: &[JobStatus]) -> Result<JobStatus> {
    match job.state()?.map(|state| state.status) {
        Some(status) if wanted.contains(&status) || status == JobStatus::concluded => Ok(status),
        Some(status) => {
            let (job, wanted) = (job.id().to_owned(), wanted.to_vec());
            Err(Refusal::JobStatus { job, status, wanted }.into())
        }
        None => Err(failed(job, "QEMU does not know it".into())),
    }
}

/// Cancels the job, waits until it has ended, and lets QEMU forget it, so that another one can start on the disk.
///
/// It may be any job, whoever started it. What a commit has copied stays copied.
///
/// # Errors
/// Those of the commands; [`Error::Job`] if it was done before it was cancelled, or does not come to an end.
pub fn cancel<M: Monitor + ?Sized>(job: &Job<'_, M>) -> Result<()> {
    job.cancel()?;
    match job.wait(Goal::Concluded, Some(LONGEST_STEP), &mut |_| Watch::GoOn)? {
        Waited::Reached(_) => match job.take_result() {
            // QEMU reports a cancelled job as failed.
            Err(Error::Job { .. }) => Ok(()),
            Err(error) => Err(error),
            Ok(_) => Err(failed(job, "it was done before it was cancelled".into())),
        },
        Waited::Vanished => Ok(()),
        other => Err(stuck(job, &other)),
    }
}

/// The error for a job that does not end.
pub(crate) fn stuck<M: Monitor + ?Sized>(job: &Job<'_, M>, waited: &Waited) -> Error {
    let why = match waited {
        Waited::Stalled(_) => "it met an error and stands still".into(),
        Waited::Vanished => "it has vanished".into(),
        Waited::TimeUp(job) | Waited::Concluded(job) | Waited::Reached(job) | Waited::Stopped(job) => {
            format!("it is {:?}", job.status)
        }
    };
    failed(job, why)
}

pub(crate) fn failed<M: Monitor + ?Sized>(job: &Job<'_, M>, why: String) -> Error {
    Error::Job { id: job.id().to_owned(), why }
}

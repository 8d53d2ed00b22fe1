//! What to say when a verb that writes was stopped.

use qcow2::{Error, ErrorKind, Refusal};

use crate::call::Call;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::output::progress::Meter;
use crate::signals::Stop;

/// A failure before the first write.
pub(super) fn unchanged(error: &Error, stop: &Stop, call: &Call) -> Failure {
    match (error.kind(), stop.exit()) {
        (ErrorKind::Cancelled, Some(exit)) => Failure::interrupted("before the first write", exit, call),
        _ => Failure::engine(error, call),
    }
}

/// A failure while a plan was carried out: the guest sees the same disk, and the part that is `kept` need not be done
/// again.
pub(super) fn halfway(error: &Error, stop: &Stop, meter: &Meter<'_>, call: &Call, kept: &str) -> Failure {
    meter.clear();
    if let (ErrorKind::Cancelled, Some(exit)) = (error.kind(), stop.exit()) {
        return Failure::interrupted(kept, exit, call);
    }
    let Failure(report) = Failure::engine(error, call);
    let exit = if error.kind() == ErrorKind::Io { Exit::HALFWAY } else { report.exit };
    let message = match error {
        // This base is not the one that held the progress, so nothing is kept.
        Error::Refused { reason: Refusal::MergedDataLost, .. } => report.message,
        _ => format!("{}\nstopped {kept}; nothing is lost", report.message),
    };
    Report { exit, message, ..report }.into()
}

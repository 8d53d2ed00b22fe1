//! What to say when a verb that writes was stopped.

use qcow2::{Error, ErrorKind};

use crate::call::Call;
use crate::failure::Failure;
use crate::signals::Stop;

/// A failure before the first write.
pub(super) fn unchanged(error: &Error, stop: &Stop, call: &Call) -> Failure {
    match (error.kind(), stop.exit()) {
        (ErrorKind::Cancelled, Some(exit)) => Failure::interrupted("before the first write", exit, call),
        _ => Failure::engine(error, call),
    }
}

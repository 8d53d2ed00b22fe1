//! What the layers above need of a connection: commands, and the events between them.

use std::time::Duration;

use qapi::Command;
use serde_json::Value;

use crate::error::{Error, Result};
use crate::qmp::message::{Event, reply};

/// Somebody who executes QMP commands: a connection to QEMU, or what a test puts in its place.
pub trait Monitor {
    /// Executes a command by its name and waits for the answer, up to `timeout`.
    ///
    /// `arguments` is an object; an empty one, or null, means none.
    ///
    /// # Errors
    /// [`Error::Command`] if QEMU refuses; [`Error::TimedOut`] if no answer came in time: the command may
    /// still be carried out, so ask what became of it and never send it again blindly;
    /// [`Error::Disconnected`] if QEMU has gone.
    fn execute_raw(&self, command: &str, arguments: Value, timeout: Duration) -> Result<Value>;

    /// The next event that has not been taken yet; `None` if none came within `timeout`.
    ///
    /// # Errors
    /// [`Error::Disconnected`] if no event is left and QEMU has gone.
    fn next_event(&self, timeout: Duration) -> Result<Option<Event>>;

    /// The process at the other end, if it is one of this machine's and known.
    fn peer(&self) -> Option<u32> {
        None
    }
}

/// Typed commands for every [`Monitor`].
pub trait Execute: Monitor {
    /// Executes a command of the schema and waits as long as [`patience`] says.
    ///
    /// # Errors
    /// As [`Monitor::execute_raw`]; [`Error::Answer`] if the answer has another shape than the schema's.
    fn execute<C: Command>(&self, command: &C) -> Result<C::Ok> {
        let arguments = serde_json::to_value(command)
            .map_err(|source| Error::Request { command: C::NAME.to_owned(), source })?;
        reply::<C>(self.execute_raw(C::NAME, arguments, patience(C::NAME))?)
    }

    /// Executes a command that the schema may not know, and waits as long as [`patience`] says.
    ///
    /// # Errors
    /// As [`Monitor::execute_raw`].
    fn query(&self, command: &str, arguments: Value) -> Result<Value> {
        self.execute_raw(command, arguments, patience(command))
    }
}

impl<M: Monitor + ?Sized> Execute for M {}

/// How long a command's answer is waited for: half a minute for questions, ten minutes for commands that
/// change something, because QEMU lets all I/O of a disk finish before it answers them.
pub fn patience(command: &str) -> Duration {
    let asks = command.starts_with("query-") || command.starts_with("x-debug-query-");
    Duration::from_secs(if asks || command == "qmp_capabilities" { 30 } else { 600 })
}

/// Reads a part of an answer whose other fields do not matter.
pub(crate) fn read<T: serde::de::DeserializeOwned>(command: &str, value: Value) -> Result<T> {
    serde_json::from_value(value).map_err(|source| Error::Answer { command: command.to_owned(), source })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_that_drain_io_are_given_more_time_than_questions() {
        assert!(patience("job-finalize") > patience("query-jobs"));
        assert_eq!(patience("x-debug-query-block-graph"), patience("query-jobs"));
    }
}

//! A monitor that ends in the middle of a merge, as the client that uses it may.

use std::cell::Cell;
use std::time::Duration;

use qmp_client::{Connection, Error, Event, Monitor, Result};
use serde_json::Value;

/// When a command that is cut off is lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Lost {
    /// Before QEMU gets it.
    Command,
    /// After QEMU has carried it out.
    Answer,
}

/// A connection that is gone from one command on that changes something; questions are not counted.
pub(crate) struct Cut<'a> {
    inner: &'a Connection,
    left: Cell<usize>,
    lost: Lost,
    at_the_cut: &'a dyn Fn(),
    /// The command that was cut off.
    pub(crate) at: Cell<Option<String>>,
}

impl<'a> Cut<'a> {
    /// So many commands are carried out; at the next one the connection ends, and `at_the_cut` is called.
    pub(crate) fn after(
        commands: usize,
        lost: Lost,
        inner: &'a Connection,
        at_the_cut: &'a dyn Fn(),
    ) -> Self {
        Self { inner, left: Cell::new(commands), lost, at_the_cut, at: Cell::new(None) }
    }

    /// The command that was cut off, if it has come to that.
    pub(crate) fn cut_off(&self) -> Option<String> {
        let at = self.at.take();
        self.at.set(at.clone());
        at
    }

    fn gone<T>() -> Result<T> {
        Err(Error::Disconnected { why: "the test has cut it".into() })
    }
}

impl Monitor for Cut<'_> {
    fn execute_raw(&self, command: &str, arguments: Value, timeout: Duration) -> Result<Value> {
        if self.cut_off().is_some() {
            return Self::gone();
        }
        if command.contains("query-") {
            return self.inner.execute_raw(command, arguments, timeout);
        }
        if self.left.get() > 0 {
            self.left.set(self.left.get() - 1);
            return self.inner.execute_raw(command, arguments, timeout);
        }
        self.at.set(Some(command.to_owned()));
        if self.lost == Lost::Answer {
            let _ = self.inner.execute_raw(command, arguments, timeout);
        }
        (self.at_the_cut)();
        Self::gone()
    }

    fn next_event(&self, timeout: Duration) -> Result<Option<Event>> {
        if self.cut_off().is_some() { Self::gone() } else { self.inner.next_event(timeout) }
    }
}

//! Ctrl-C and its relatives: the first asks the merge to stop at a safe point, the second ends the process.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::flag;

use crate::call::Call;
use crate::exit::Exit;
use crate::failure::{Failure, Report};

/// The request to stop, and which signal made it.
#[derive(Debug)]
pub(crate) struct Stop {
    cancel: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
}

impl Stop {
    /// From now on SIGINT, SIGTERM and SIGHUP ask to stop; a second one exits at once, which a merge
    /// survives as it survives a crash.
    pub(crate) fn on_signals(call: &Call) -> Result<Self, Failure> {
        Self::watch().map_err(|e| {
            Report {
                kind: "io",
                message: format!("cannot watch for signals: {e}"),
                hint: format!("nothing was changed; again: {}", call.again()),
                exit: call.verb.failure_exit().unwrap_or(Exit::FAILED),
            }
            .into()
        })
    }

    /// The same, where the failure is told in other words.
    pub(crate) fn watch() -> io::Result<Self> {
        let stop = Self { cancel: Arc::default(), signal: Arc::default() };
        for signal in [SIGINT, SIGTERM, SIGHUP] {
            // The order matters: the shutdown must see the flag as it was before this signal.
            flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&stop.cancel))?;
            flag::register_usize(
                signal,
                Arc::clone(&stop.signal),
                usize::try_from(signal).unwrap_or_default(),
            )?;
            flag::register(signal, Arc::clone(&stop.cancel))?;
        }
        Ok(stop)
    }

    /// The flag that the engine looks at.
    pub(crate) fn flag(&self) -> &AtomicBool {
        &self.cancel
    }

    /// The exit code that the signal asks for, if there was one.
    pub(crate) fn exit(&self) -> Option<Exit> {
        match u8::try_from(self.signal.load(Ordering::SeqCst)) {
            Ok(0) | Err(_) => None,
            Ok(signal) => Some(Exit::signal(signal)),
        }
    }
}

//! Ctrl-C and its relatives: the first asks the merge to stop at a safe point, the second ends the process.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};
use std::{io, process, thread};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

use crate::call::Call;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Hint, HintKind, limit};

/// Two signals within this time count as one: `timeout` sends one to its child and one to its whole group.
const TOGETHER: Duration = Duration::from_millis(500);

/// The request to stop, and which signal made it.
#[derive(Debug)]
pub(crate) struct Stop {
    cancel: Arc<AtomicBool>,
    signal: Arc<AtomicUsize>,
}

impl Stop {
    /// From now on SIGINT, SIGTERM and SIGHUP ask to stop. A second one exits at once, which a merge survives
    /// like a crash.
    pub(crate) fn on_signals(call: &Call) -> Result<Self, Failure> {
        Self::watch().map_err(|e| {
            Report {
                kind: "io",
                message: format!("cannot watch for signals: {e}"),
                hint: Hint::command(
                    HintKind::Again,
                    limit(&e).unwrap_or_else(|| "nothing was changed; again".to_owned()),
                    call.again(),
                )
                .into(),
                exit: call.verb.failure_exit().unwrap_or(Exit::FAILED),
            }
            .into()
        })
    }

    /// The same, where the failure is told in other words.
    pub(crate) fn watch() -> io::Result<Self> {
        let stop = Self { cancel: Arc::default(), signal: Arc::default() };
        let (cancel, number) = (Arc::clone(&stop.cancel), Arc::clone(&stop.signal));
        let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP])?;
        thread::Builder::new().name("signals".into()).spawn(move || {
            let mut first: Option<Instant> = None;
            for signal in signals.forever() {
                match first {
                    None => {
                        first = Some(Instant::now());
                        number.store(usize::try_from(signal).unwrap_or_default(), Ordering::SeqCst);
                        cancel.store(true, Ordering::SeqCst);
                    }
                    Some(first) if first.elapsed() < TOGETHER => {}
                    Some(_) => process::exit(128 + signal),
                }
            }
        })?;
        Ok(stop)
    }

    /// The flag that the engine checks.
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

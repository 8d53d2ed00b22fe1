//! The progress of a long operation: one line on a terminal, or events for programs.

use std::io::{self, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use qcow2::merge::Progress;
use serde_json::json;

use super::{Console, size};

/// How often the line is drawn.
const DRAW_EVERY: Duration = Duration::from_millis(100);
/// How often an event is sent.
const EVENT_EVERY: Duration = Duration::from_millis(500);

/// Shows the progress of an operation. The threads that do the work share it.
#[derive(Debug)]
pub(crate) struct Meter<'a> {
    console: &'a Console,
    /// What is being done, as a participle: "merging".
    what: &'static str,
    /// Whether progress is also printed as events; not if the result is one JSON document.
    events: bool,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    begun: Instant,
    shown: Option<Instant>,
    /// Characters of the line that stands on the terminal.
    width: usize,
    /// Bytes done, and of how many, when it was last told.
    done: u64,
    total: u64,
    /// Whether the end was shown.
    complete: bool,
}

impl<'a> Meter<'a> {
    /// A meter for a verb whose JSON is a stream of events; it shows nothing yet.
    pub(crate) fn new(console: &'a Console, what: &'static str) -> Self {
        let mut meter = Self::without_events(console, what);
        meter.events = true;
        meter
    }

    /// A meter for a verb whose JSON is one document: only a terminal is told.
    pub(crate) fn without_events(console: &'a Console, what: &'static str) -> Self {
        Self {
            events: false,
            console,
            what,
            state: Mutex::new(State {
                begun: Instant::now(),
                shown: None,
                width: 0,
                done: 0,
                total: 0,
                complete: false,
            }),
        }
    }

    /// Tells how many bytes of how many are done.
    pub(crate) fn update(&self, done: u64, total: u64) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        // Threads may report in another order than their work was counted: never go back.
        state.done = state.done.max(done);
        state.total = total;
        let done = state.done;
        if self.console.is_quiet() {
            return;
        }
        let every = if self.console.is_json() { EVENT_EVERY } else { DRAW_EVERY };
        let due = state.shown.is_none_or(|shown| shown.elapsed() >= every);
        let complete = done >= total;
        let skip = if complete { state.complete } else { !due };
        if skip {
            return;
        }
        state.complete = complete;
        state.shown = Some(Instant::now());
        if self.console.is_json() && self.events {
            // A reader that went away must not stop a merge; printing the result will fail, and report it.
            let _ = self.console.event("progress", json!({ "done": done, "total": total }));
        } else if self.console.shows_progress() {
            let line = line(self.what, done, total, state.begun.elapsed());
            let padding = state.width.saturating_sub(line.len());
            state.width = line.len();
            draw(&format!("\r{line}{:padding$}", ""));
        }
    }

    /// How much is done, in percent.
    pub(crate) fn percent(&self) -> f64 {
        let state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.total == 0 { 0.0 } else { state.done as f64 / state.total as f64 * 100.0 }
    }

    /// Removes the line, so that the result begins on a clean one.
    pub(crate) fn clear(&self) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        if state.width > 0 {
            draw(&format!("\r{:width$}\r", "", width = state.width));
            state.width = 0;
        }
    }
}

impl Progress for Meter<'_> {
    fn written(&self, done: u64, total: u64) {
        self.update(done, total);
    }
}

impl Drop for Meter<'_> {
    fn drop(&mut self) {
        self.clear();
    }
}

fn draw(text: &str) {
    let mut err = io::stderr().lock();
    // If the terminal went away, the work goes on.
    let _ = err.write_all(text.as_bytes()).and_then(|()| err.flush());
}

/// `merging  42.3%  1.2 GiB of 2.9 GiB  310 MiB/s  5 s left`
fn line(what: &str, done: u64, total: u64, elapsed: Duration) -> String {
    let share = if total == 0 { 1.0 } else { (done as f64 / total as f64).min(1.0) };
    let mut line = format!("{what}  {:5.1}%  {} of {}", share * 100.0, size::short(done), size::short(total));
    let seconds = elapsed.as_secs_f64();
    // A rate over a very short time is noise.
    if seconds >= 0.5 && done > 0 {
        let rate = done as f64 / seconds;
        line += &format!("  {}/s", size::short(rate as u64));
        if done < total {
            line += &format!("  {} left", size::countdown((total - done) as f64 / rate));
        }
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_line_tells_share_bytes_rate_and_rest() {
        let text = line("merging", 1 << 30, 4 << 30, Duration::from_secs(16));
        assert_eq!(text, "merging   25.0%  1 GiB of 4 GiB  64 MiB/s  48 s left");
    }

    #[test]
    fn the_line_is_calm_at_both_ends() {
        assert_eq!(line("merging", 0, 8, Duration::ZERO), "merging    0.0%  0 bytes of 8 bytes");
        assert_eq!(line("merging", 0, 0, Duration::from_secs(1)), "merging  100.0%  0 bytes of 0 bytes");
    }
}

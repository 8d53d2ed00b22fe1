//! Recovers from a live merge that was interrupted because QEMU, the client or the host went away.
//!
//! The state file tells how far the merge got; the images tell what they hold. The judge
//! ([`crate::State::judge`]) gets both, and decides what is true. If that is certain, the remaining work is
//! done. If somebody has written to an image that the merge left behind, only the user can know which bytes are
//! wanted: then this module only reports.

mod above;
mod act;
mod evidence;
mod finding;
mod look;
mod qemu;

use std::sync::atomic::AtomicBool;

use qcow2::merge::Progress;
use qcow2::{Error, Result};

use super::discover::Unfinished;
use super::verdict::Ruling;
use crate::qmp::address::Address;
use crate::state::Qemu;
use evidence::Evidence;

pub use finding::{Deed, Fact, Finding, Found, Next, Trouble};

/// How an interrupted merge is recovered.
#[derive(Clone, Copy)]
#[non_exhaustive]
pub struct Recovery<'a> {
    /// Find out what would be done, and change nothing.
    pub dry_run: bool,
    /// Change images even if the file system has no locks.
    pub no_lock: bool,
    /// A monitor to ask besides the one that the merge noted.
    pub address: Option<&'a Address>,
    /// Receives the progress of a comparison.
    pub progress: &'a dyn Progress,
    /// Stops a comparison, or the emptying of layers, at a safe point. The same call continues it later.
    pub cancel: &'a AtomicBool,
}

impl std::fmt::Debug for Recovery<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Recovery").field("dry_run", &self.dry_run).field("address", &self.address).finish()
    }
}

impl<'a> Recovery<'a> {
    /// A recovery that asks only the monitor that the merge noted.
    pub fn new(progress: &'a dyn Progress, cancel: &'a AtomicBool) -> Self {
        Self { dry_run: false, no_lock: false, address: None, progress, cancel }
    }
}

/// One merge, and how it is recovered.
struct Case<'a> {
    merge: &'a Unfinished,
    options: Recovery<'a>,
}

impl Unfinished {
    /// Finds out which image holds the disk, and does the remaining work, unless this is a dry run. QEMU need
    /// not be running. Failures are part of the finding, so that they do not hide what was found before.
    pub fn recover(&self, options: Recovery<'_>) -> Finding {
        let case = Case { merge: self, options };
        let (asked, live) = qemu::ask(self, options.address, options.dry_run);
        let mut finding = match asked {
            Ok(qemu) => case.judge(qemu).unwrap_or_else(|error| case.failed(error)),
            Err(in_hand) => *in_hand,
        };
        above::look_above(self, &mut finding, &live);
        finding
    }
}

impl Case<'_> {
    fn judge(&self, qemu: Qemu) -> Result<Finding> {
        let state = &self.merge.state;
        let mut evidence = Evidence::of(state, qemu)?;
        let mut compared = None;
        let mut ruling = state.rule(&evidence.seen);
        if let Ruling::Compare = ruling {
            if let Some(error) = evidence.unread.take() {
                return Err(error);
            }
            let Recovery { progress, cancel, .. } = self.options;
            // A dry run changes nothing, so it needs no locks.
            let no_lock = self.options.no_lock || self.options.dry_run;
            compared = evidence.compare(state, no_lock, progress, cancel)?;
            ruling = state.rule(&evidence.seen);
        }
        let unread = evidence.unread.take().map_or(Ok(()), Err);
        match ruling {
            Ruling::NotSwitched(leave) => {
                drop(compared);
                self.not_switched(leave)
            }
            Ruling::Switched(leave) => {
                unread?;
                drop(compared);
                self.switched(leave, &evidence.obsolete(state))
            }
            Ruling::RelinkBack(leave) => {
                unread?;
                match compared {
                    Some(opened) => self.relink_back(leave, opened),
                    None => Err(not_compared(evidence)),
                }
            }
            Ruling::Compare | Ruling::NotComparable => Err(not_compared(evidence)),
            // The job appeared between two questions. The next call will find it.
            Ruling::AtWork => Ok(self.finding(Found::Running)),
            Ruling::InDoubt(doubt) => {
                let mut finding = self.finding(Found::Unclear);
                finding.valid_top = None;
                finding.trouble = Some(Trouble::InDoubt(doubt));
                Ok(finding)
            }
        }
    }

    fn finding(&self, outcome: Found) -> Finding {
        Finding::new(self.merge.outline(), outcome)
    }

    /// The finding for an error of the engine. Either nothing was changed, or the same call continues.
    fn failed(&self, error: Error) -> Finding {
        let outcome = if matches!(error, Error::InUse { .. }) { Found::InUse } else { Found::Failed };
        let mut finding = self.finding(outcome);
        finding.trouble = Some(Trouble::Engine(error));
        finding
    }
}

/// Why the images were not compared.
fn not_compared(evidence: Evidence) -> Error {
    let broken = Error::Broken { invariant: "who judges by a comparison has compared" };
    evidence.not_compared.unwrap_or(broken)
}

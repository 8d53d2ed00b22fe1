//! A guest that is paused for the flush of what was copied: it goes on also if the client was killed in between.

use serde_json::json;

use super::Merge;
use super::discover::Unfinished;
use super::machine::Machine;
use crate::error::{Error, Result};
use crate::qmp::monitor::{Execute, Monitor};
use crate::state::{State, StateFile};

impl<M: Monitor + ?Sized> Merge<'_, M> {
    /// Notes that the guest may be paused from now on, where it runs and the flush may need that.
    pub(super) fn note_pause(&mut self) -> Result<()> {
        if self.state.paused || !self.procedure.may_pause() || status(self.monitor)? != "running" {
            return Ok(());
        }
        self.state.paused = true;
        self.file.save_as_it_is(&self.state)
    }

    /// Has a guest go on that was paused for the flush.
    ///
    /// # Errors
    /// Those of the commands and of the state file.
    pub(crate) fn go_on(&mut self) -> Result<bool> {
        let_go_on(self.monitor, &self.file, &mut self.state)
    }
}

impl Machine<'_> {
    /// Has guests go on that were paused for a moment, and whose client was killed then: the merges of which that is true.
    ///
    /// # Errors
    /// Those of the commands; [`crate::Error::File`] if it cannot be noted.
    pub fn let_guests_go_on<'u>(&self, known: &'u [Unfinished]) -> Result<Vec<&'u Unfinished>> {
        let mut resumed = Vec::new();
        for merge in known.iter().filter(|merge| merge.disk(self.graph()).is_some()) {
            if let_go_on(self.monitor(), &merge.file, &mut merge.state.clone())? {
                resumed.push(merge);
            }
        }
        Ok(resumed)
    }
}

/// Has the guest go on if a client has noted that it pauses it, and it is paused. The QEMU must be the one that has the disk.
pub(super) fn let_go_on(
    monitor: &(impl Monitor + ?Sized),
    file: &StateFile,
    state: &mut State,
) -> Result<bool> {
    if !state.paused {
        return Ok(false);
    }
    // A QEMU that was started anew and waits is in another state.
    let is_paused = status(monitor)? == "paused";
    if is_paused {
        monitor.query("cont", json!({}))?;
    }
    state.paused = false;
    file.save_as_it_is(state)?;
    Ok(is_paused)
}

/// How the guest is; nothing where there is none, as in a storage daemon.
fn status(monitor: &(impl Monitor + ?Sized)) -> Result<String> {
    match monitor.query("query-status", json!({})) {
        Ok(answer) => Ok(answer["status"].as_str().unwrap_or_default().to_owned()),
        Err(Error::Command { failure, .. }) if failure.class == "CommandNotFound" => Ok(String::new()),
        Err(error) => Err(error),
    }
}

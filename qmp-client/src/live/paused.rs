//! Pauses the guest for the flush of the copied data, and makes sure that it is resumed even if the client is
//! killed in between.

use serde_json::json;

use super::Merge;
use super::discover::Unfinished;
use super::machine::Machine;
use crate::error::{Error, Result};
use crate::qmp::monitor::{Execute, Monitor};
use crate::state::{State, StateFile};

impl<M: Monitor + ?Sized> Merge<'_, M> {
    /// Notes that the guest may be paused from now on, if it runs and the flush may need that.
    pub(super) fn note_pause(&mut self) -> Result<()> {
        if self.state.paused || !self.procedure.may_pause() || status(self.monitor)? != "running" {
            return Ok(());
        }
        self.state.paused = true;
        self.file.save_as_it_is(&self.state)
    }

    /// Resumes a guest that was paused for the flush.
    ///
    /// # Errors
    /// Those of the commands and of the state file.
    pub(crate) fn go_on(&mut self) -> Result<bool> {
        let_go_on(self.monitor, &self.file, &mut self.state)
    }
}

impl Machine<'_> {
    /// Resumes guests that were paused for a moment by a client that was killed then; returns their merges.
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

/// Resumes the guest if a client has noted that it pauses it, and it is paused. The QEMU must be the one with
/// the disk.
pub(super) fn let_go_on(
    monitor: &(impl Monitor + ?Sized),
    file: &StateFile,
    state: &mut State,
) -> Result<bool> {
    if !state.paused {
        return Ok(false);
    }
    // A QEMU that was started anew and waits for a command is in another state.
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

//! What an earlier call has left, whose client was killed: the same command finishes it.

use std::path::Path;
use std::time::Instant;

use qmp_client::{Connection, Disk, Graph, Kind, Phase, State, StateFile, StateLayer};

use super::files::{Files, identity};
use super::outcome::Outcome;
use super::tidy::Wishes;
use super::trouble::Session;
use super::{after, states};
use crate::cli::{LiveCommitArgs, PullArgs};
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;
use crate::output::human::printable;

/// What is looked at for it.
pub(super) struct Left<'a> {
    pub(super) session: &'a Session<'a>,
    pub(super) monitor: &'a Connection,
    pub(super) graph: &'a Graph,
    pub(super) disk: &'a Disk,
    pub(super) files: &'a Files,
    /// All states that may speak of the disk.
    pub(super) known: &'a [(StateFile, State)],
    pub(super) console: &'a Console,
}

impl Left<'_> {
    /// The state of a merge of this disk that has switched, and is not cleaned up after.
    pub(super) fn switched(&self, is_meant: &dyn Fn(&State) -> bool) -> Option<&(StateFile, State)> {
        let is_it = |state: &State| {
            let shows = state.disk_after(self.graph).is_some_and(|disk| disk.name() == self.disk.name());
            state.phase == Phase::Switched && shows && is_meant(state)
        };
        self.known.iter().find(|(_, state)| is_it(state))
    }

    /// Cleans up after a merge that has switched.
    pub(super) fn finish(&self, left: &(StateFile, State), wishes: Wishes) -> Result<Outcome, Failure> {
        let began = Instant::now();
        let (file, state) = left;
        self.console.note(&format!(
            "picked up again: the merge of {} had switched; what it left is dealt with now",
            printable(self.disk.name())
        ));
        let wishes = Wishes { delete: wishes.delete || state.delete, ..wishes };
        let tidied = after::tidy(state, self.files, &wishes);
        let seconds = began.elapsed().as_secs_f64();
        let outcome = Outcome::switched(self.session, self.monitor, state, &tidied, None, seconds);
        if outcome.is_complete() {
            file.forget(state).map_err(|e| self.session.failure(&e))?;
        }
        Ok(outcome)
    }

    /// The same, where there is such a merge, as the whole of a call.
    pub(super) fn finish_meant(
        &self,
        is_meant: &dyn Fn(&State) -> bool,
        wishes: Wishes,
        dry_run: bool,
    ) -> Result<Option<Exit>, Failure> {
        let Some(left) = self.switched(is_meant) else { return Ok(None) };
        if dry_run {
            return Err(states::recover_first(self.session, &left.0, &left.1));
        }
        self.finish(left, wishes)?.tell(self.console)?;
        Ok(Some(Exit::DONE))
    }
}

/// Whether the merge that a state speaks of is the one that the command asks for. Names and indexes are those of the chain
/// from before the merge.
pub(super) fn is_this_commit(state: &State, disk: &Disk, args: &LiveCommitArgs) -> bool {
    let at = |name: &String| index(state, disk, name);
    let Some(top) = args.top.as_ref().map_or(Some(state.layers.len()), at) else { return false };
    let base = match &args.base {
        Some(base) => at(base),
        None if args.shallow => top.checked_sub(1),
        None => Some(1),
    };
    let kind = match state.kind {
        Kind::Commit => true,
        Kind::ActiveCommit => args.allows_active(),
        Kind::Pull => false,
    };
    kind && base == Some(state.base) && top == state.top
}

/// The same for a pull.
pub(super) fn is_this_pull(state: &State, disk: &Disk, args: &PullArgs) -> bool {
    let base = args.base.as_ref().map_or(Some(0), |name| index(state, disk, name));
    state.kind == Kind::Pull && base == Some(state.base)
}

/// The index that a layer had when the merge began, by the name that a user gives it.
fn index(state: &State, disk: &Disk, name: &str) -> Option<usize> {
    let bracket = name.strip_suffix(']').and_then(|name| name.rsplit_once('['));
    if let Some((of, index)) = bracket.and_then(|(of, index)| Some((of, index.parse::<usize>().ok()?))) {
        let is_disk = ["", disk.name(), state.disk.as_str()].contains(&of);
        return state.layer(index).filter(|_| is_disk).map(|layer| layer.index);
    }
    let is_file = |layer: &&StateLayer| {
        let (path, file) = (Path::new(name), Path::new(&layer.file));
        let same = identity(path).is_some_and(|id| identity(file) == Some(id));
        same || std::path::absolute(path).is_ok_and(|path| path == file) || layer.file == name
    };
    let by_node = state.layers.iter().find(|layer| layer.node == name);
    by_node.or_else(|| state.layers.iter().find(is_file)).map(|layer| layer.index)
}

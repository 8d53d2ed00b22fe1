//! What is said about a merge, for people and for programs.

use qmp_client::{Kind, Phase, State};
use serde_json::{Value, json};

use super::Case;
use crate::failure::Report;
use crate::output::human::printable;

/// What was found out about one state file, and what was done.
#[derive(Debug)]
pub(super) struct Finding {
    state_file: String,
    state: State,
    /// A stable word: running, in-use, not-switched, completed, pointed-back, unclear, failed.
    pub(super) outcome: &'static str,
    /// The image that holds the disk, where that is certain.
    pub(super) valid_top: Option<String>,
    /// What was found, in words.
    pub(super) facts: Vec<String>,
    /// What was done, or would be, as imperatives.
    pub(super) did: Vec<String>,
    /// The command that goes on.
    pub(super) next: Option<String>,
    /// What keeps it from being done.
    pub(super) trouble: Option<Report>,
}

impl Finding {
    pub(super) fn new(case: &Case<'_>, outcome: &'static str) -> Self {
        Self {
            state_file: case.file.path().display().to_string(),
            state: case.state.clone(),
            outcome,
            valid_top: Some(case.state.valid_top.clone()),
            facts: Vec::new(),
            did: Vec::new(),
            next: None,
            trouble: None,
        }
    }

    /// For people.
    pub(super) fn human(&self, dry_run: bool) -> String {
        let state = &self.state;
        let mut lines = vec![format!("{}: {}", printable(&self.state_file), what(state))];
        if let Some(top) = &self.valid_top {
            lines.push(format!("  the disk is in {}", printable(top)));
        }
        lines.extend(self.facts.iter().map(|fact| format!("  {}", printable(fact))));
        let done = if dry_run { "to do:" } else { "done:" };
        lines.extend(self.did.iter().map(|did| format!("  {done} {}", printable(did))));
        lines.extend(self.next.iter().map(|next| format!("  next: {next}")));
        lines.join("\n")
    }

    /// For programs.
    pub(super) fn json(&self) -> Value {
        let state = &self.state;
        json!({
            "state-file": self.state_file,
            "disk": state.disk,
            "job": state.job,
            "kind": state.kind,
            "phase": state.phase,
            "outcome": self.outcome,
            "valid-top": self.valid_top,
            "facts": self.facts,
            "done": self.did,
            "next": self.next,
            "error": self.trouble.as_ref().map(|trouble| json!({
                "kind": trouble.kind,
                "message": trouble.message,
                "hint": trouble.hint.to_string(),
                "exit-code": trouble.exit.code(),
            })),
        })
    }
}

/// The merge and how far it was, in words.
pub(in crate::cmd) fn what(state: &State) -> String {
    let disk = printable(&state.disk);
    let range = format!("layers [{}] to [{}]", state.base + 1, state.top);
    let merge = match state.kind {
        Kind::Pull => format!("a pull of {disk}, {range}"),
        Kind::Commit | Kind::ActiveCommit => format!("a merge of {disk}, {range} into [{}]", state.base),
    };
    let phase = match state.phase {
        Phase::Copying => "copying",
        Phase::Switching => "about to switch",
        Phase::Switched => "switched",
    };
    format!("{merge} ({phase})")
}

//! The report about a recovered merge, for people and for programs.

use std::path::{Path, PathBuf};

use qcow2::Error;
use qcow2::error::shown;
use qmp_client::{Address, Deed, Fact, Finding, Found, Kind, Next, Outline, Phase, StoppedMerge, Trouble};
use serde_json::{Value, json};

use super::doubt;
use crate::call::Call;
use crate::cmd::live::trouble::{live_in, offline};
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Command, Hint, HintKind, Hints};
use crate::output::human::{list, printable};
use crate::output::json::{merged, only};
use crate::signals::Stop;

/// What was found out about one merge, and what was done, in words.
pub(super) struct Told {
    merge: Outline,
    outcome: &'static str,
    valid_top: Option<String>,
    /// What was found.
    facts: Vec<String>,
    /// What was done, or would be done, as imperatives.
    did: Vec<String>,
    /// The command to go on with.
    next: Option<String>,
    /// What stands in the way.
    pub(super) trouble: Option<Report>,
}

impl Told {
    pub(super) fn of(finding: &Finding, call: &Call, stop: &Stop) -> Self {
        let merge = &finding.merge;
        Self {
            merge: merge.clone(),
            outcome: outcome(finding.outcome),
            valid_top: finding.valid_top.clone(),
            facts: finding.facts.iter().map(|f| fact(merge, f)).collect(),
            did: finding.did.iter().map(deed).collect(),
            next: finding.next.as_ref().map(|n| next(merge, n).to_string()),
            trouble: finding.trouble.as_ref().and_then(|t| trouble(merge, t, call, stop)),
        }
    }

    /// For people.
    pub(super) fn human(&self, dry_run: bool) -> String {
        let state_file = self.merge.state_file().display().to_string();
        let mut lines = vec![format!("{}: {}", printable(&state_file), what(&self.merge))];
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
        let more = json!({
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
        });
        merged(only(&self.merge, &["state-file", "disk", "job", "kind", "phase"]), more)
    }
}

/// A stable word.
fn outcome(found: Found) -> &'static str {
    match found {
        Found::Running => "running",
        Found::InUse => "in-use",
        Found::NotSwitched => "not-switched",
        Found::Completed => "completed",
        Found::RelinkedBack => "pointed-back",
        Found::Unclear => "unclear",
        _ => "failed",
    }
}

fn fact(merge: &Outline, fact: &Fact) -> String {
    match fact {
        Fact::NothingSwitched => {
            "nothing was switched: the chain is as it was, and shows the same disk".to_owned()
        }
        Fact::Complete => "the merge is complete".to_owned(),
        Fact::GuestMoved => "the merge is complete, and the guest had moved to base".to_owned(),
        Fact::Pulled(files) => format!(
            "the pull is complete; this disk no longer needs {}, which others may use",
            files.join(", ")
        ),
        Fact::BaseLacks { base, at } => format!(
            "QEMU had switched, but {base} does not hold all that was merged (the first such byte of the disk is {at})"
        ),
        Fact::Stays { file, why } => format!("{} stays as it is: {why}", file.display()),
        Fact::JobIs(status) => format!("QEMU runs, and the job is {status:?}: there is nothing to put right"),
        Fact::CanBeCancelled(address) => {
            format!(
                "to give it up instead: {}",
                live_in(&["cancel", &merge.disk], address, merge.state_dir())
            )
        }
        Fact::GuestGoesOn => {
            "the guest was still paused by a client that was killed, and goes on now".to_owned()
        }
        Fact::JobIsGone => "QEMU runs, the job is gone, and nothing was switched".to_owned(),
        Fact::HasSwitched => "QEMU runs, and has switched; only the end is not noted".to_owned(),
        Fact::LiesAbove { above, top } => format!("{above} lies above {top}, and is the disk now"),
        Fact::AboveNotSeen { top, error } => {
            format!("whether another image lies above {top} cannot be seen: {error}")
        }
        Fact::Fork { image, users } => fork(image, users),
        Fact::Searched(folders) => format!(
            "images above it were looked for only in {}: a snapshot in another folder would be the disk",
            list(folders)
        ),
        Fact::ShouldBeNamed { top, certain: true } => {
            format!("what starts the virtual machine should name {top}")
        }
        Fact::ShouldBeNamed { top, certain: false } => format!(
            "what starts the virtual machine should name {top}, unless a snapshot above it lies in another folder"
        ),
        _ => String::new(),
    }
}

fn deed(deed: &Deed) -> String {
    match deed {
        Deed::Remove(files) => format!("remove {}", list(files)),
        Deed::Empty { files, base } => {
            let what = if files.len() == 1 { "an empty overlay" } else { "empty overlays" };
            format!("make {} {what} on {base}", list(files))
        }
        Deed::RelinkBack { overlay, name } => format!("give {overlay} its former backing file back: {name}"),
        Deed::Forget(file) => format!("remove the state file {}", file.display()),
        _ => String::new(),
    }
}

fn next(merge: &Outline, next: &Next) -> Command {
    match next {
        Next::Offline { active } => offline(&StoppedMerge::of_outline(merge, active)),
        Next::End(address) => {
            let end = if merge.merges_active() { "pivot" } else { "finish" };
            live_in(&[end, &merge.disk], address, merge.state_dir())
        }
        Next::Begin(address) => begin(merge, address),
        _ => Command::qmerge(["live", "recover", "--help"]),
    }
}

/// The command that begins the same merge of the running machine.
fn begin(merge: &Outline, address: &Address) -> Command {
    let verb = if merge.kind == Kind::Pull { "pull" } else { "commit" };
    let mut command = Command::qmerge(["live", verb]).word(&merge.disk);
    if let Some(base) = merge.layer(merge.base) {
        command = command.option("--base", &base.file);
    }
    command = match (merge.kind, merge.layer(merge.top)) {
        (Kind::Commit, Some(top)) => command.option("--top", &top.file),
        (Kind::ActiveCommit, _) => command.word("--active"),
        _ => command,
    };
    command = command.option("--qmp", address.to_string());
    match merge.state_dir() {
        Some(dir) => command.option("--state-dir", dir),
        None => command,
    }
}

fn fork(image: &Path, users: &[PathBuf]) -> String {
    let names: Vec<_> = users.iter().map(shown).collect();
    format!(
        "{} is the backing file of {}: which of them is the disk cannot be told",
        shown(image),
        names.join(" and of ")
    )
}

fn trouble(merge: &Outline, trouble: &Trouble, call: &Call, stop: &Stop) -> Option<Report> {
    Some(match trouble {
        Trouble::InDoubt(doubt) => doubt::report(merge, doubt, call),
        Trouble::Fork { image, users } => {
            let why = "what starts the virtual machine names it; see its chain";
            let looks = users.iter().map(|user| {
                let chain = Command::qmerge(["info", "--chain"]).file(user);
                Hint::command(HintKind::InfoChain, why, chain)
            });
            let hint = looks.fold(Hints::default(), Hints::or);
            Report { kind: "unclear", message: fork(image, users), hint, exit: Exit::REFUSED }
        }
        Trouble::MonitorInUse(address) => Report {
            kind: "monitor-in-use",
            message: format!("{address}: QEMU runs, and another client holds its monitor"),
            hint: Hint::command(HintKind::Again, "end that client, then again", call.again()).into(),
            exit: Exit::IN_USE,
        },
        Trouble::Engine(error) => {
            let failure = match (error, stop.exit()) {
                (Error::Cancelled, Some(exit)) => Failure::interrupted("while it compared", exit, call),
                _ => Failure::engine(error, call),
            };
            failure.0
        }
        Trouble::NotForgotten(error) => {
            let remove = Command::of("rm").file(merge.state_file());
            Report {
                kind: "io",
                message: error.to_string(),
                hint: Hint::command(HintKind::Forget, "all else is done; remove it", remove).into(),
                exit: Exit::FAILED,
            }
        }
        _ => return None,
    })
}

/// The merge and its progress, in words.
pub(in crate::cmd) fn what(merge: &Outline) -> String {
    let disk = printable(&merge.disk);
    let range = format!("layers [{}] to [{}]", merge.base + 1, merge.top);
    let kind = match merge.kind {
        Kind::Pull => format!("a pull of {disk}, {range}"),
        Kind::Commit | Kind::ActiveCommit => format!("a merge of {disk}, {range} into [{}]", merge.base),
    };
    let phase = match merge.phase {
        Phase::Copying => "copying",
        Phase::Switching => "about to switch",
        Phase::Switched => "switched",
    };
    format!("{kind} ({phase})")
}

//! The outcome of a merge, for people and for programs.

use std::path::Path;
use std::time::Instant;

use qcow2::Refusal;
use qmp_client::{
    Disk, Kind, Machine, Named, Outline, OutlineLayer, Tidied, TidyOptions, Unfinished, words_naming,
};
use serde_json::{Value, json};

use super::trouble::Session;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Command, Hint, HintKind, Hints};
use crate::output::Console;
use crate::output::human::{list, printable, shell_word};
use crate::output::json::{merged, only, value};
use crate::output::size;

/// How a merge ended, or was left.
pub(super) struct Outcome {
    lines: Vec<String>,
    /// Advice, which is no result.
    notes: Vec<String>,
    fields: Value,
    /// What the merge could not do as it had planned.
    stuck: Option<Failure>,
}

impl Outcome {
    /// The disk has its shorter chain.
    pub(super) fn switched(
        session: &Session<'_>,
        process: Option<u32>,
        state: &Outline,
        tidied: &Tidied,
        copied: Option<u64>,
        seconds: f64,
    ) -> Self {
        let mut fields = fields(state, if state.kind == Kind::ActiveCommit { "pivoted" } else { "switched" });
        let name = printable(&state.disk);
        let target = target(state);
        let time = size::duration(seconds);
        let mut lines = vec![match state.kind {
            Kind::ActiveCommit => format!("merged into {target}, in {time}; {name} writes to it now"),
            Kind::Commit => format!("merged into {target}, in {time}"),
            Kind::Pull => format!("pulled into {target}, in {time}"),
        }];
        if let Some(relink) = &state.relink {
            let overlay = printable(&relink.overlay);
            lines.push(match &relink.new {
                Some(new) => format!("{overlay} now has {} as its backing file", printable(new)),
                None => format!("{overlay} has no backing file any more"),
            });
        }
        let mut notes = Vec::new();
        if state.kind == Kind::ActiveCommit {
            notes.push(configuration(process, state, &mut fields));
        }
        add_files(session, state, tidied, &mut lines);
        fields = merged(fields, value(tidied));
        fields["active"] = state.valid_top.as_str().into();
        if state.kind == Kind::ActiveCommit {
            // QEMU counts holes as done for the other kinds.
            fields["bytes-copied"] = copied.into();
        }
        fields["seconds"] = seconds.into();
        let stuck = tidied.is_stuck.then(|| stuck(session, state, tidied));
        Self { lines, notes, fields, stuck }
    }

    /// The remaining work of an earlier call, which was killed after QEMU had switched, is done.
    pub(super) fn of_left(
        session: &Session<'_>,
        machine: &Machine<'_>,
        disk: &Disk,
        left: &Unfinished,
        options: &TidyOptions,
        console: &Console,
    ) -> Result<Self, Failure> {
        let began = Instant::now();
        say_left(disk, console);
        let tidied = machine.tidy_up(left, options).map_err(|e| session.failure(&e))?;
        let (process, seconds) = (machine.monitor().peer(), began.elapsed().as_secs_f64());
        Ok(Self::switched(session, process, &left.outline(), &tidied, None, seconds))
    }

    /// The guest stays; base holds what the disk showed.
    pub(super) fn kept_overlay(state: &Outline, copied: u64, seconds: f64) -> Self {
        let mut fields = fields(state, "overlay-kept");
        fields["obsolete"] = json!([]);
        fields["active"] = state.valid_top.as_str().into();
        fields["bytes-copied"] = copied.into();
        fields["seconds"] = seconds.into();
        let (base, active) = (target(state), printable(&state.valid_top));
        let lines = vec![
            format!(
                "copied into {base}, in {}: it holds what {} showed at that moment",
                size::duration(seconds),
                printable(&state.disk)
            ),
            format!("{} goes on writing to {active}, with its whole chain below", printable(&state.disk)),
        ];
        Self { lines, notes: Vec::new(), fields, stuck: None }
    }

    /// Everything is copied; the user decides.
    pub(super) fn ready(session: &Session<'_>, state: &Outline, copied: u64, seconds: f64) -> Self {
        let mut fields = fields(state, "ready");
        fields["active"] = state.valid_top.as_str().into();
        fields["bytes-copied"] = copied.into();
        fields["seconds"] = seconds.into();
        let disk = printable(&state.disk);
        let lines = vec![
            format!(
                "everything is copied into {}, in {}; what {disk} writes goes to both",
                target(state),
                size::duration(seconds)
            ),
            format!("to go over to it:  {}", session.other(&["pivot", &state.disk])),
            format!("to stay:           {}", session.other(&["cancel", &state.disk])),
        ];
        Self { lines, notes: Vec::new(), fields, stuck: None }
    }

    /// The job goes on without this client.
    pub(super) fn started(session: &Session<'_>, state: &Outline) -> Self {
        let disk = printable(&state.disk);
        let end = if state.kind == Kind::ActiveCommit { "pivot" } else { "finish" };
        let lines = vec![
            format!("the merge of {disk} goes on in QEMU (job {})", printable(&state.job)),
            format!("to see how far it is:  {}", session.other(&["jobs"])),
            format!("to end it:             {}", session.other(&[end, &state.disk])),
            format!("to give it up:         {}", session.other(&["cancel", &state.disk])),
        ];
        Self { lines, notes: Vec::new(), fields: fields(state, "started"), stuck: None }
    }

    /// Prints it.
    ///
    /// # Errors
    /// What the merge could not do as it had planned.
    pub(super) fn tell(self, console: &Console) -> Result<(), Failure> {
        let printed = console.event("result", self.fields.clone());
        let printed = printed.and_then(|()| console.result(&self.lines.join("\n")));
        if !console.is_json() {
            self.notes.iter().for_each(|note| console.note(note));
        }
        // This needs an action, also where the rest could not be printed.
        self.stuck.map_or(Ok(()), Err)?;
        printed.map_err(|e| e.behind("QEMU has done what it was told"))
    }
}

/// Says that the remaining work of an earlier call was done.
pub(super) fn say_left(disk: &Disk, console: &Console) {
    console.note(&format!(
        "picked up again: the merge of {} had switched; what it left is dealt with now",
        printable(disk.name())
    ));
}

/// The guest has moved to base, but the old active image cannot be emptied: a machine that starts from it sees
/// an old disk.
fn stuck(session: &Session<'_>, state: &Outline, tidied: &Tidied) -> Failure {
    let old = state.active().map_or("", |layer| layer.file.as_str());
    let why = tidied.error.as_ref().map(ToString::to_string).unwrap_or_default();
    let message = format!(
        "{} still shows the disk as it was before the merge, and cannot be emptied: start nothing from it: {why}",
        printable(old)
    );
    let recover = session.other(&["recover", &state.disk]);
    let hint = match &tidied.error {
        // It may hold what a guest wrote since, so it is not removed unseen.
        Some(qcow2::Error::Refused { reason: Refusal::NotAsKnown { .. }, .. }) => {
            Hints::from(Hint::command(HintKind::Recover, "look what it holds", recover))
        }
        _ => Hints::from(Hint::command(HintKind::Delete, "remove it", Command::of("rm").file(old)))
            .or(Hint::command(HintKind::Recover, "then", recover)),
    };
    Report { kind: "stale-image", message, hint, exit: Exit::REFUSED }.into()
}

/// What a program is told of every merge.
fn fields(state: &Outline, status: &str) -> Value {
    let mut fields = only(state, &["disk", "kind", "job", "base", "top", "obsolete"]);
    fields["status"] = status.into();
    fields
}

fn target(state: &Outline) -> String {
    printable(state.target().map_or("", |layer| &layer.file))
}

fn add_files(session: &Session<'_>, state: &Outline, tidied: &Tidied, lines: &mut Vec<String>) {
    for (files, what) in
        [(&tidied.deleted, "removed"), (&tidied.obsolete, "not needed any more by this disk")]
    {
        if !files.is_empty() {
            lines.push(format!("{what}: {}", list(files)));
        }
    }
    if !tidied.emptied.is_empty() {
        let what = if tidied.emptied.len() == 1 { "is an empty overlay" } else { "are empty overlays" };
        lines.push(format!("{} {what} on {} now", list(&tidied.emptied), target(state)));
    }
    for (file, why) in &tidied.stale {
        let is_old =
            state.kind == Kind::ActiveCommit && state.active().is_some_and(|a| Path::new(&a.file) == file);
        let old = if is_old { ", with old data: start nothing from it" } else { "" };
        lines.push(format!(
            "stays as it is{old}: {}: {}",
            printable(&file.to_string_lossy()),
            printable(&why.to_string())
        ));
    }
    for (file, why) in &tidied.kept {
        lines.push(format!(
            "not touched: {}: {}",
            printable(&file.to_string_lossy()),
            printable(&why.to_string())
        ));
    }
    if !tidied.kept.is_empty() {
        let later = session.other(&["recover", &state.disk]);
        lines.push(format!("to deal with them later: {later}"));
    }
}

/// What the configuration of the virtual machine should name from now on.
fn configuration(process: Option<u32>, state: &Outline, fields: &mut Value) -> String {
    let name = |layer: Option<&OutlineLayer>| layer.map_or("", |layer| layer.file.as_str()).to_owned();
    let (old, new) = (name(state.active()), name(state.target()));
    let format = state.target().map_or("", |layer| layer.format.as_str());
    let words = process.map_or(Vec::new(), |pid| typed(pid, &old));
    fields["configuration"] = json!({ "old": old, "new": new, "format": format, "words": words });
    let named_now = process.map_or(Vec::new(), |pid| typed(pid, &new));
    if words.is_empty() && !named_now.is_empty() {
        let (new, named_now) = (printable(&new), printable(&named_now.join(" ")));
        return format!("the virtual machine was started with {new}, which is right again: {named_now}");
    }
    let shown = if words.is_empty() {
        String::new()
    } else {
        format!("; it was started with {}", printable(&words.join(" ")))
    };
    format!(
        "what starts the virtual machine must name {} (format {format}) in the place of {} from now on{shown}",
        printable(&new),
        printable(&old)
    )
}

/// The words of a process's command line that name an image, as they would be typed.
fn typed(process: u32, image: &str) -> Vec<String> {
    let typed = |named: Named| {
        let option = named.option.map(|option| option + " ").unwrap_or_default();
        option + &shell_word(&named.word)
    };
    words_naming(process, Path::new(image)).into_iter().map(typed).collect()
}

//! Turns errors of live calls into failures, with hints what to type next.

use std::ffi::OsString;
use std::io;
use std::path::Path;

use qmp_client::ways::{self, LiveTask, LiveWay, Wanted};
use qmp_client::{Address, Disk, Error, Request, StoppedMerge};

use super::refused;
use super::ways::hints;
use crate::call::without;
use crate::cli::LiveVerb;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Command, Hint, HintKind, Hints};
use crate::output::human::printable;

/// One call of `qmerge live`.
pub(super) struct Session<'a> {
    /// Where the monitor listens.
    pub(super) address: &'a Address,
    /// What to do.
    pub(super) verb: &'a LiveVerb,
    /// All words after `qmerge`.
    pub(super) words: &'a [OsString],
}

impl Session<'_> {
    /// The failure that an error is, with the hints that fit most often.
    pub(super) fn failure(&self, error: &Error) -> Failure {
        self.failure_with(error, &ways::after(error, &self.wanted()))
    }

    /// The failure that an error is, with these ways out.
    pub(super) fn failure_with(&self, error: &Error, ways: &[LiveWay]) -> Failure {
        self.report(error, hints(ways, self))
    }

    /// The failure that an error is.
    pub(super) fn report(&self, error: &Error, hint: Hints) -> Failure {
        let message = match error {
            Error::Hindered(hindrance) => refused::message(self, hindrance),
            _ => error.to_string(),
        };
        Report { kind: error.code(), message, hint, exit: Exit::of(error.kind()) }.into()
    }

    /// The failure of a merge that cannot be planned.
    pub(super) fn unplanned(&self, error: &Error, disk: &Disk, request: &Request) -> Failure {
        self.failure_with(error, &ways::unplanned(error, disk, request, &self.wanted()))
    }

    /// The call for the library, which finds what can be done after a failure.
    pub(super) fn wanted(&self) -> Wanted<'_> {
        let (task, deletes) = match self.verb {
            LiveVerb::Snapshot { .. } => (LiveTask::Snapshot, false),
            LiveVerb::Commit(args) => (LiveTask::Commit(&args.disk), args.delete),
            LiveVerb::Pull(args) => (LiveTask::Pull(&args.disk), false),
            LiveVerb::Finish(args) | LiveVerb::Pivot(args) => (LiveTask::End(&args.disk), args.delete),
            _ => (LiveTask::Other, false),
        };
        Wanted { address: self.address, task, deletes }
    }

    /// The option that was given and is for the active layer.
    pub(super) fn option_for_active(&self) -> &'static str {
        match self.verb {
            LiveVerb::Commit(args) if args.pivot => "--pivot",
            LiveVerb::Commit(args) if args.keep_overlay => "--keep-overlay",
            _ => "--converge",
        }
    }

    /// Whether the command was given this option.
    pub(super) fn words_have(&self, option: &str) -> bool {
        self.words.iter().any(|word| word == option)
    }

    /// The same command, to be typed again.
    pub(super) fn again(&self) -> Command {
        Command::qmerge(self.words)
    }

    /// The same command as a hint.
    pub(super) fn again_hint(&self, words: &str) -> Hint {
        Hint::command(HintKind::Again, words, self.again())
    }

    /// The same command with more options.
    pub(super) fn again_with(&self, more: &[&str]) -> Command {
        self.again().options(more)
    }

    /// The same command with other values of options, each of which may be given once.
    pub(super) fn again_with_values(&self, options: &[(&str, &str)]) -> Command {
        let words = options.iter().fold(self.words.to_vec(), |words, (option, _)| without(&words, option));
        let again = Command::qmerge(words);
        options.iter().fold(again, |again, (option, value)| again.option(option, value))
    }

    /// Another live command for the same monitor: `qmerge live WORDS --qmp ADDRESS`.
    ///
    /// One that looks for the merge's state is told of the same folder as this one.
    pub(super) fn other(&self, words: &[&str]) -> Command {
        let looks = words.first().is_some_and(|verb| ["finish", "pivot", "cancel", "recover"].contains(verb));
        live_in(words, self.address, self.verb.state_dir().filter(|_| looks))
    }
}

/// `qmerge live WORDS --qmp ADDRESS`, with the folder where the merge keeps its state if that is another than usual.
pub(super) fn live_in(words: &[&str], address: &Address, state_dir: Option<&Path>) -> Command {
    let command = words.iter().fold(Command::qmerge(["live"]), |command, word| command.word(word));
    let command = command.option("--qmp", address.to_string());
    match state_dir {
        Some(dir) => command.option("--state-dir", dir),
        None => command,
    }
}

/// The same commit, offline.
pub(super) fn offline(merge: &StoppedMerge) -> Command {
    let command = Command::qmerge(["commit"]).file(&merge.active);
    let command = match &merge.top {
        Some(top) => command.option("--top", top),
        None => command,
    };
    let command = command.option("--base", &merge.base);
    if merge.delete { command.word("--delete") } else { command }
}

/// The failure if the user did not say which QEMU is meant.
pub(super) fn no_address(verb: &LiveVerb) -> Failure {
    Report {
        kind: "usage",
        message: "--qmp ADDRESS is missing: which QEMU is meant?".to_owned(),
        hint: Hint::advice(format!(
            "qmerge live {} --qmp PATH, the path of its option -qmp unix:PATH,server=on,wait=off (ss -xlp lists sockets)",
            verb.as_str()
        ))
        .into(),
        exit: Exit::USAGE,
    }
    .into()
}

/// Nothing is at work on the disk.
pub(super) fn no_job(session: &Session<'_>, disk: &Disk) -> Failure {
    Report {
        kind: "no-job",
        message: format!("no job works on the disk {}", printable(disk.name())),
        hint: Hint::command(HintKind::LiveLook, "this lists all jobs", session.other(&["jobs"])).into(),
        exit: Exit::FAILED,
    }
    .into()
}

/// Ctrl-C could not be watched for.
pub(super) fn no_signals(session: &Session<'_>, error: &io::Error) -> Failure {
    Report {
        kind: "io",
        message: format!("cannot watch for signals: {error}"),
        hint: session.again_hint("nothing was changed; again").into(),
        exit: Exit::FAILED,
    }
    .into()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// An option may be given only once, so a hint must not repeat it.
    #[test]
    fn a_hint_gives_no_option_twice() {
        let address = "/vm/qmp.sock".parse().unwrap();
        let hint = |line: &str| {
            let words: Vec<OsString> = line.split(' ').map(Into::into).collect();
            let session = Session { address: &address, verb: &LiveVerb::List, words: &words };
            let error = Error::NotFlushed { node: "base".into(), why: "no".into(), exports: true };
            hints(&ways::after(&error, &session.wanted()), &session).to_string()
        };
        for given in ["", " --nbd-socket old.sock", " --nbd-socket=old.sock"] {
            assert_eq!(
                hint(&format!("live commit vda{given} --qmp q")),
                "name the socket of its NBD server: qmerge live commit vda --qmp q --nbd-socket PATH"
            );
        }
        let words = ["live", "--backing-file", "x", "commit", "--state-dir=y"].map(OsString::from);
        let session = Session { address: &address, verb: &LiveVerb::List, words: &words };
        assert_eq!(
            session.again_with_values(&[("--backing-file", "NAME"), ("--state-dir", "DIR")]).to_string(),
            "qmerge live commit --backing-file NAME --state-dir DIR"
        );
    }
}

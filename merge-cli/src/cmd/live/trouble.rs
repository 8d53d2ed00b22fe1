//! Turns errors of live calls into failures, with hints what to type next.

use std::ffi::OsString;
use std::io;
use std::path::Path;

use qcow2::ways::folder;
use qmp_client::{Address, Disk, Error, Hindrance, Owner, Refusal, Request, StoppedMerge};

use super::{guard, refused};
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
        match error {
            Error::Hindered(hindrance) => refused::failure(self, hindrance),
            _ => self.failure_with(error, self.hints(error)),
        }
    }

    /// The failure that an error is.
    pub(super) fn failure_with(&self, error: &Error, hint: Hints) -> Failure {
        let (kind, exit) = class(error);
        Report { kind, message: error.to_string(), hint, exit }.into()
    }

    /// The failure of a merge that cannot be planned. If only QEMU would do it wrong, it may be possible
    /// offline.
    pub(super) fn unplanned(&self, error: &Error, disk: &Disk, request: &Request) -> Failure {
        match error {
            Error::Layer { .. } => {
                let chain = self.other(&["chain", disk.name()]);
                let hint = Hint::command(HintKind::LiveLook, "name layers as this prints them", chain);
                self.failure_with(error, hint.into())
            }
            Error::Refused { .. } => match StoppedMerge::of_request(disk, request) {
                Some(merge) => {
                    let why = "shut the virtual machine down, then";
                    self.failure_with(error, Hint::command(HintKind::Offline, why, offline(&merge)).into())
                }
                None => self.failure(error),
            },
            _ => self.failure(error),
        }
    }

    /// QEMU refused what the merge needs, before anything was changed: it must be able to write these files.
    pub(super) fn not_begun(&self, error: &Error, written: &[String]) -> Failure {
        if !matches!(error, Error::Command { .. }) {
            return self.failure(error);
        }
        let look = written.iter().fold(Command::of("ls").word("-l"), Command::file);
        let why = "nothing was changed; QEMU must be able to write these";
        let hints = Hints::from(Hint::command(HintKind::Advice, why, look));
        self.failure_with(error, hints.or(self.again_hint("then again")))
    }

    fn hints(&self, error: &Error) -> Hints {
        let jobs = |why: &str| Hint::command(HintKind::LiveLook, why, self.other(&["jobs"]));
        let go_on = "if QEMU still runs, its jobs go on";
        match error {
            Error::Connect { source, .. } => return self.unreachable(source),
            Error::NoGreeting { .. } => match Owner::of(self.address, None) {
                Some(owner) => {
                    let ask = format!("ask {}, which holds it", owner.name());
                    guard::look_instead(self, owner).with_words(&ask)
                }
                None => self.again_hint("end the other client, or give QEMU a second monitor; then again"),
            },
            Error::NoSuchDisk { .. } | Error::Layer { .. } => {
                Hint::command(HintKind::LiveLook, "", self.other(&["list"]))
            }
            Error::Disconnected { .. } if self.verb.is_merge() => {
                let why = "if it has ended, this says which image holds the disk";
                let recover = Hint::command(HintKind::Recover, why, self.other(&["recover"]));
                return Hints::from(jobs(go_on)).or(recover);
            }
            Error::Disconnected { .. } => jobs(go_on),
            Error::Command { .. } if matches!(self.verb, LiveVerb::Snapshot { .. }) => Hint::command(
                HintKind::LiveLook,
                "every disk is as it was; QEMU must be able to write the new files' folders",
                self.other(&["list"]),
            ),
            Error::Job { .. } | Error::TimedOut { .. } | Error::Unreadable { .. } | Error::Command { .. } => {
                jobs("see how it stands")
            }
            Error::File { file, source } => match source.kind() {
                io::ErrorKind::PermissionDenied => {
                    Hint::command(HintKind::Advice, "see who may", Command::of("ls").word("-ld").file(file))
                }
                _ => Hint::advice("look for the system's reason: dmesg"),
            },
            Error::State { path, .. } => Hint::command(
                HintKind::Advice,
                "that file notes how far a merge is; see what is there and who may write it",
                Command::of("ls").word("-la").file(folder(path)),
            ),
            Error::Managed { .. } => guard::look_instead(self, Owner::Libvirt),
            Error::NotFlushed { exports: true, .. } => Hint::advice(format!(
                "name the socket of its NBD server: {}",
                self.again_with_values(&[("--nbd-socket", "PATH")])
            )),
            Error::NotFlushed { exports: false, .. } => {
                Hint::advice("merge it as a whole with --active, or with qmerge commit when nobody uses it")
            }
            Error::BackingName { takes_another: true, .. } => Hint::advice(format!(
                "say what base is called there: {}",
                self.again_with_values(&[("--backing-file", "NAME")])
            )),
            Error::BackingName { takes_another: false, .. } => {
                let command = Command::qmerge(without(self.words, "--backing-file"));
                Hint::command(HintKind::Again, "without that name", command)
            }
            Error::Refused { reason: Refusal::NoStateFound { .. } } => return self.no_state(),
            Error::Refused { .. } if self.verb.is_merge() => jobs("see how things stand"),
            _ => {
                let command = Command::qmerge(["live", self.verb.as_str()]).word("--help");
                Hint::command(HintKind::Help, "", command)
            }
        }
        .into()
    }

    /// The failure for a merge of ours whose state file was not found: the user must name its folder.
    fn no_state(&self) -> Hints {
        let name = Hint::advice(format!(
            "name the folder that the merge was begun with: {}",
            self.again_with_values(&[("--state-dir", "DIR")])
        ));
        let disk = match self.verb {
            LiveVerb::Finish(args) | LiveVerb::Pivot(args) => Some(&args.disk),
            _ => None,
        };
        let why = "or, if that file is lost, end the job without its effect";
        let cancel = disk.map(|disk| Hint::command(HintKind::LiveCancel, why, self.other(&["cancel", disk])));
        Hints::from(name).or(cancel)
    }

    fn unreachable(&self, error: &io::Error) -> Hints {
        let path = match self.address {
            Address::Unix(path) => path,
            Address::Tcp { port, .. } => {
                let why = format!("start QEMU with -qmp tcp:127.0.0.1:{port},server=on,wait=off, then again");
                return self.again_hint(&why).into();
            }
        };
        match error.kind() {
            io::ErrorKind::NotFound => Hint::command(
                HintKind::Advice,
                "QEMU makes a socket with its option -qmp unix:PATH,server=on,wait=off; see what is here",
                Command::of("ls").word("-l").file(folder(path)),
            ),
            io::ErrorKind::PermissionDenied => {
                Hint::command(HintKind::AgainAsRoot, "as root", self.again().with_sudo())
            }
            _ => Hint::advice(
                "see what listens: ss -xlp; a QEMU that has ended leaves its socket behind, and its images can be merged \
                 with qmerge commit",
            ),
        }
        .into()
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

    /// A job is to end first.
    pub(super) fn end_first(&self, disk: &str) -> Hints {
        let end = Hint::command(
            HintKind::LiveLook,
            format!("a job works on {}; let it end, see how far it is", printable(disk)),
            self.other(&["jobs"]),
        );
        let cancel = self.other(&["cancel", disk]);
        Hints::from(end).or(Hint::command(HintKind::LiveCancel, "or end it without its effect", cancel))
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

/// The stable word for an error, and its exit code.
pub(super) fn class(error: &Error) -> (&'static str, Exit) {
    match error {
        Error::Address { .. } | Error::TcpNotAllowed { .. } => ("usage", Exit::USAGE),
        Error::NoSuchDisk { .. } => ("no-such-disk", Exit::USAGE),
        Error::Layer { .. } => ("usage", Exit::USAGE),
        Error::Connect { .. } => ("no-monitor", Exit::FAILED),
        Error::NoGreeting { .. } => ("monitor-in-use", Exit::FAILED),
        Error::Disconnected { .. } => ("disconnected", Exit::FAILED),
        Error::TimedOut { .. } => ("timed-out", Exit::FAILED),
        Error::Job { .. } => ("job-failed", Exit::FAILED),
        Error::Refused { .. } | Error::BackingName { .. } | Error::NotFlushed { .. } => {
            ("refused", Exit::REFUSED)
        }
        Error::Managed { .. } => ("managed", Exit::REFUSED),
        Error::File { source, .. } if source.kind() == io::ErrorKind::StorageFull => {
            ("no-space", Exit::NO_SPACE)
        }
        Error::File { .. } => ("io", Exit::FAILED),
        Error::State { .. } => ("state-file", Exit::FAILED),
        Error::Hindered(hindrance) => match &**hindrance {
            Hindrance::NotSlowed { source } => class(source),
            _ => ("refused", Exit::REFUSED),
        },
        Error::Command { failure, .. } if failure.class == "CommandNotFound" => {
            ("unsupported", Exit::UNSUPPORTED)
        }
        Error::Command { .. } => ("qemu-refused", Exit::FAILED),
        _ => ("qmp", Exit::FAILED),
    }
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
            session.hints(&error).to_string()
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

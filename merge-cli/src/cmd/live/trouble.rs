//! What can go wrong on the way to QEMU and back, and what to type next.

use std::ffi::OsString;
use std::io;

use qmp_client::{Address, Disk, Error, Owner, Range};

use super::{guard, option};
use crate::call::without;
use crate::cli::LiveVerb;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Command, folder_word, word};
use crate::output::human::{printable, shell_word};

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
    /// The failure that an error is, with the hint that fits most often.
    pub(super) fn failure(&self, error: &Error) -> Failure {
        self.failure_with(error, self.hint(error))
    }

    /// The failure that an error is.
    pub(super) fn failure_with(&self, error: &Error, hint: String) -> Failure {
        let (kind, exit) = class(error);
        Report { kind, message: error.to_string(), hint: hint.into(), exit }.into()
    }

    /// The failure of a name or a range that the chain does not have.
    pub(super) fn layer(&self, error: &Error, disk: &Disk) -> Failure {
        match error {
            Error::Layer { .. } => {
                let chain = self.other(&format!("chain {}", shell_word(disk.name())));
                self.failure_with(error, format!("name layers as this prints them: {chain}"))
            }
            _ => self.failure(error),
        }
    }

    /// The failure of a merge that cannot be planned as QEMU would do it: a stopped machine's can, perhaps.
    pub(super) fn unplanned(&self, error: &Error, disk: &Disk, range: &Range<'_>) -> Failure {
        if !matches!(error, Error::Refused { .. }) {
            return self.layer(error, disk);
        }
        let file = |layer: &qmp_client::Layer| shell_word(&layer.file);
        let top = range.above.map_or(String::new(), |_| format!(" --top {}", file(range.top)));
        let hint = format!(
            "shut the virtual machine down, then: qmerge commit {}{top} --base {}",
            file(disk.active()),
            file(range.base)
        );
        self.failure_with(error, hint)
    }

    fn hint(&self, error: &Error) -> String {
        let again = self.again();
        let qmp = option(self.address);
        match error {
            Error::Connect { source, .. } => self.unreachable(source),
            Error::NoGreeting { .. } => match Owner::of(self.address, None) {
                Some(owner) => {
                    format!("ask {}, which holds it: {}", owner.name(), guard::look_instead(self, owner))
                }
                None => format!("end the other client, or give QEMU a second monitor; then again: {again}"),
            },
            Error::NoSuchDisk { .. } | Error::Layer { .. } => format!("qmerge live list {qmp}"),
            Error::Job { .. } | Error::TimedOut { .. } | Error::Unreadable { .. } => {
                format!("see how it stands: qmerge live jobs {qmp}")
            }
            Error::Disconnected { .. } if self.verb.is_merge() => {
                format!(
                    "if QEMU still runs, its jobs go on: qmerge live jobs {qmp}; if it has ended, this says which image \
                     holds the disk: qmerge live recover {qmp}"
                )
            }
            Error::Disconnected { .. } => {
                format!("if QEMU still runs, its jobs go on: qmerge live jobs {qmp}")
            }
            Error::Command { .. } if matches!(self.verb, LiveVerb::Snapshot { .. }) => {
                format!(
                    "every disk is as it was: qmerge live list {qmp}; QEMU must be able to write the new files' folders"
                )
            }
            Error::Command { .. } => format!("see how it stands: qmerge live jobs {qmp}"),
            Error::File { file: path, source } => match source.kind() {
                io::ErrorKind::PermissionDenied => format!("see who may: ls -ld {}", word(path)),
                _ => "look for the system's reason: dmesg".to_owned(),
            },
            Error::State { path, .. } => format!(
                "that file notes how far a merge is; see what is there and who may write it: ls -la {}",
                folder_word(path)
            ),
            Error::Managed { .. } => guard::look_instead(self, Owner::Libvirt),
            Error::NotFlushed { exports: true, .. } => {
                format!(
                    "name the socket of its NBD server: {}",
                    self.again_with_values(&[("--nbd-socket", "PATH")])
                )
            }
            Error::NotFlushed { exports: false, .. } => {
                "merge it as a whole with --active, or with qmerge commit when nobody uses it".to_owned()
            }
            Error::BackingName { takes_another: true, .. } => {
                let again = self.again_with_values(&[("--backing-file", "NAME")]);
                format!("say what base is called there: {again}")
            }
            Error::BackingName { takes_another: false, .. } => {
                let words = without(self.words, "--backing-file");
                format!("without that name: {}", Command::qmerge(words))
            }
            Error::Refused { .. } if self.verb.is_merge() => {
                format!("see how things stand: {}", self.other("jobs"))
            }
            _ => format!("qmerge live {} --help", self.verb.as_str()),
        }
    }

    fn unreachable(&self, error: &io::Error) -> String {
        let again = self.again();
        let path = match self.address {
            Address::Unix(path) => path,
            Address::Tcp { port, .. } => {
                return format!(
                    "start QEMU with -qmp tcp:127.0.0.1:{port},server=on,wait=off, then again: {again}"
                );
            }
        };
        match error.kind() {
            io::ErrorKind::NotFound => format!(
                "see which sockets there are (ls -l {}; ss -xlp), or start QEMU with -qmp unix:PATH,server=on,wait=off",
                folder_word(path)
            ),
            io::ErrorKind::PermissionDenied => format!("as root: sudo {again}"),
            _ => "see what listens: ss -xlp; a QEMU that has ended leaves its socket behind, and its images can be merged \
                  with qmerge commit"
                .to_owned(),
        }
    }

    /// Whether the command was given this option.
    pub(super) fn words_have(&self, option: &str) -> bool {
        self.words.iter().any(|word| word == option)
    }

    /// The same command, to be typed again.
    pub(super) fn again(&self) -> String {
        Command::qmerge(self.words).to_string()
    }

    /// The same command with more words at its end, which the shell must not change.
    pub(super) fn again_with(&self, more: &str) -> String {
        self.again() + " " + more
    }

    /// The same command with other values of options, each of which may be given once.
    pub(super) fn again_with_values(&self, options: &[(&str, &str)]) -> String {
        let words = options.iter().fold(self.words.to_vec(), |words, (option, _)| without(&words, option));
        let line = Session { address: self.address, verb: self.verb, words: &words }.again();
        options.iter().fold(line, |line, (option, value)| format!("{line} {option} {}", shell_word(value)))
    }

    /// Another live command for the same monitor: `qmerge live WORDS --qmp ADDRESS`.
    pub(super) fn other(&self, words: &str) -> String {
        format!("qmerge live {words} {}", option(self.address))
    }
}

/// Nobody said which QEMU is meant.
pub(super) fn no_address(verb: &LiveVerb) -> Failure {
    Report {
        kind: "usage",
        message: "--qmp ADDRESS is missing: which QEMU is meant?".to_owned(),
        hint: format!(
            "qmerge live {} --qmp PATH, the path of its option -qmp unix:PATH,server=on,wait=off (ss -xlp lists sockets)",
            verb.as_str()
        ).into(),
        exit: Exit::USAGE,
    }
    .into()
}

/// Nothing is at work on the disk.
pub(super) fn no_job(session: &Session<'_>, disk: &Disk) -> Failure {
    Report {
        kind: "no-job",
        message: format!("no job works on the disk {}", printable(disk.name())),
        hint: format!("qmerge live jobs {} lists all jobs", option(session.address)).into(),
        exit: Exit::FAILED,
    }
    .into()
}

/// Ctrl-C could not be watched for.
pub(super) fn no_signals(session: &Session<'_>, error: &io::Error) -> Failure {
    Report {
        kind: "io",
        message: format!("cannot watch for signals: {error}"),
        hint: format!("nothing was changed; again: {}", session.again()).into(),
        exit: Exit::FAILED,
    }
    .into()
}

/// The stable word for an error, and its exit code.
fn class(error: &Error) -> (&'static str, Exit) {
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

    /// An option that was given is refused when the hint gives it again.
    #[test]
    fn a_hint_gives_no_option_twice() {
        let address = "/vm/qmp.sock".parse().unwrap();
        let hint = |line: &str| {
            let words: Vec<OsString> = line.split(' ').map(Into::into).collect();
            let session = Session { address: &address, verb: &LiveVerb::List, words: &words };
            session.hint(&Error::NotFlushed { node: "base".into(), why: "no".into(), exports: true })
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
            session.again_with_values(&[("--backing-file", "NAME"), ("--state-dir", "DIR")]),
            "qmerge live commit --backing-file NAME --state-dir DIR"
        );
    }
}

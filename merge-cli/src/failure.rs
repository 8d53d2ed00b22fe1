//! A failed command: what the user reads, and what the caller's script gets.

use std::fmt;
use std::io;

use qcow2::{Error, ErrorKind};

use crate::call::Call;
use crate::exit::Exit;
use crate::hint::{self, Hint, HintKind, Hints};

/// Why a command ends early. That the reader of standard output went away is no reason: see
/// [`Console`](crate::output::Console).
#[derive(Debug)]
pub(crate) struct Failure(pub(crate) Report);

/// What is told about a failure.
#[derive(Debug)]
pub(crate) struct Report {
    /// A stable word for programs, such as `shared-base`.
    pub(crate) kind: &'static str,
    /// What failed, and where.
    pub(crate) message: String,
    /// What to do next, the best first.
    pub(crate) hint: Hints,
    /// The exit code.
    pub(crate) exit: Exit,
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "qmerge: {}", self.message)?;
        for line in self.hint.lines() {
            write!(f, "\nhint: {line}")?;
        }
        Ok(())
    }
}

impl From<Report> for Failure {
    fn from(report: Report) -> Self {
        Self(report)
    }
}

impl Failure {
    /// An error of the engine, met by `call`.
    pub(crate) fn engine(error: &Error, call: &Call) -> Self {
        Report {
            kind: error.code(),
            message: error.to_string(),
            hint: hint::hints(error, call),
            exit: match error {
                Error::Foreign { .. } => Exit::UNSUPPORTED,
                _ => exit(error.kind(), call),
            },
        }
        .into()
    }

    /// A signal stopped the command, `when` says at which point.
    pub(crate) fn interrupted(when: &str, exit: Exit, call: &Call) -> Self {
        Report {
            kind: "interrupted",
            message: format!("stopped {when}; every disk shows the same bytes as before"),
            hint: Hint::command(HintKind::GoOn, "nothing is lost; to go on", call.again()).into(),
            exit,
        }
        .into()
    }

    /// The same, behind work that is done: whoever reads that nothing could be printed must not think that nothing was done.
    pub(crate) fn behind(self, done: &str) -> Self {
        let Self(report) = self;
        let message = format!("{done}; what was to be printed could not be: {}", report.message);
        Report { message, ..report }.into()
    }

    /// The same with another exit code.
    pub(crate) fn with_exit(self, exit: Exit) -> Self {
        Report { exit, ..self.0 }.into()
    }

    /// Standard output could not be written.
    pub(crate) fn stdout(error: &io::Error) -> Self {
        Report {
            kind: "io",
            message: format!("cannot write to standard output: {error}"),
            hint: Hint::advice("make room where the output goes (df -h), or send it elsewhere").into(),
            exit: Exit::FAILED,
        }
        .into()
    }
}

/// The exit code of an error of the given class, where the verb has none of its own.
fn exit(kind: ErrorKind, call: &Call) -> Exit {
    if let Some(exit) = call.verb.failure_exit() {
        return exit;
    }
    Exit::of(kind)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::call::VerbName;
    use qcow2::Refusal;
    use std::path::{Path, PathBuf};

    fn report(error: &Error, verb: VerbName) -> Report {
        let words = ["commit", "c.qcow2"].map(Into::into).to_vec();
        Failure::engine(error, &Call { verb, image: PathBuf::from("c.qcow2"), words }).0
    }

    #[test]
    fn each_class_has_its_exit_code() {
        let path = Path::new("b.qcow2");
        let dirty = Error::refused(path, Refusal::Dirty);
        assert_eq!(report(&dirty, VerbName::Commit).exit, Exit::DAMAGED);
        assert_eq!(report(&dirty, VerbName::Check).exit, Exit::CHECK_FAILED);
        assert_eq!(report(&dirty, VerbName::Compare).exit, Exit::COMPARE_FAILED);
        let shared = Error::refused(path, Refusal::SharedBase { users: vec!["d.qcow2".into()] });
        assert_eq!(report(&shared, VerbName::Commit).exit, Exit::REFUSED);
        assert_eq!(report(&shared, VerbName::Commit).kind, "shared-base");
        let used = Error::InUse { path: path.into(), holders: Vec::new() };
        assert_eq!(report(&used, VerbName::Commit).exit, Exit::IN_USE);
        let full = Error::io(path, qcow2::FileOp::Write, Some(0), io::ErrorKind::StorageFull.into());
        assert_eq!(report(&full, VerbName::Commit).exit, Exit::NO_SPACE);
        assert_eq!(report(&full, VerbName::Commit).kind, "no-space");
        assert_eq!(report(&Error::Usage("no".into()), VerbName::Commit).exit, Exit::USAGE);
    }

    #[test]
    fn a_report_ends_with_its_hint() {
        let text =
            report(&Error::refused(Path::new("b.qcow2"), Refusal::Dirty), VerbName::Commit).to_string();
        assert!(text.starts_with("qmerge: b.qcow2: "), "{text}");
        assert!(text.lines().last().is_some_and(|l| l.starts_with("hint: ")), "{text}");
    }
}

//! The refusals of merges, and what makes the merges possible.

use qmp_client::{Hindrance, Obstacle};

use super::trouble::{Session, class};
use crate::cli::LiveVerb;
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Command, Hint, HintKind, Hints, word};
use crate::output::human::printable;
use crate::output::size;

/// The failure that a hindrance is.
pub(super) fn failure(session: &Session<'_>, hindrance: &Hindrance) -> Failure {
    let message = message(session, hindrance);
    let (kind, exit) = kind(hindrance);
    Report { kind, message, hint: hints(session, hindrance), exit }.into()
}

/// The stable word for a hindrance, and its exit code.
fn kind(hindrance: &Hindrance) -> (&'static str, Exit) {
    match hindrance {
        Hindrance::Bitmaps { .. } => ("bitmaps", Exit::REFUSED),
        Hindrance::Snapshots { .. } => ("snapshots", Exit::REFUSED),
        Hindrance::Plaintext { .. } => ("plaintext", Exit::REFUSED),
        Hindrance::StaleActive { obstacle: Obstacle::Format { .. } | Obstacle::Encrypted { .. }, .. } => {
            ("stale-image", Exit::UNSUPPORTED)
        }
        Hindrance::StaleActive { .. } => ("stale-image", Exit::REFUSED),
        Hindrance::NotHere { .. } => ("not-here", Exit::REFUSED),
        Hindrance::JobExists { .. } | Hindrance::UnderWay { .. } => ("job-exists", Exit::REFUSED),
        Hindrance::NoSpace { .. } => ("no-space", Exit::NO_SPACE),
        Hindrance::SharedBase { .. } | Hindrance::SharedInside { .. } => ("shared-base", Exit::REFUSED),
        Hindrance::NotSearched { .. } => ("io", Exit::FAILED),
        Hindrance::NoStateFolder { .. } => ("no-state-folder", Exit::REFUSED),
        Hindrance::StateOfAnother { .. } => ("state-of-another", Exit::REFUSED),
        Hindrance::RecoverFirst { .. } => ("recover-first", Exit::REFUSED),
        Hindrance::ActiveNotAskedFor { .. } | Hindrance::OnlyForActive { .. } => ("usage", Exit::USAGE),
        Hindrance::NotSlowed { source } => class(source),
        _ => ("refused", Exit::REFUSED),
    }
}

/// What is wrong, in the words of the command where it has better ones: sizes and options.
fn message(session: &Session<'_>, hindrance: &Hindrance) -> String {
    match hindrance {
        Hindrance::NoSpace { file, needed, free, folder } => format!(
            "{} will grow by {}, and {} are free in {}: {} are missing",
            printable(file),
            size::exact(*needed),
            size::exact(*free),
            folder.display(),
            size::exact(needed - free)
        ),
        Hindrance::ActiveNotAskedFor { index, file, .. } => format!(
            "[{index}] {} is the active layer, which the guest writes to; it is merged only with --active",
            printable(file)
        ),
        Hindrance::OnlyForActive { active, top } => format!(
            "{} is for the active layer [{active}], and [{top}] is a layer below it",
            option_for_active(session)
        ),
        _ => hindrance.to_string(),
    }
}

fn hints(session: &Session<'_>, hindrance: &Hindrance) -> Hints {
    let with = |kind, words: &str, option: &str| Hint::command(kind, words, session.again_with(&[option]));
    match hindrance {
        Hindrance::Bitmaps { .. } => {
            with(HintKind::DropBitmaps, "if no backup needs them", "--drop-bitmaps").into()
        }
        Hindrance::Snapshots { file, .. } => {
            let list = Command::of("qemu-img").options(["snapshot", "-U", "-l"]).file(std::path::Path::new(file));
            Hints::from(with(HintKind::AllowSnapshotChange, "if nobody needs them", "--allow-snapshot-change"))
                .or(Hint::command(HintKind::Info, "their names", list))
        }
        Hindrance::Plaintext { .. } => {
            with(HintKind::AllowPlaintext, "if that is meant", "--allow-plaintext").into()
        }
        Hindrance::StaleActive { file, .. } => {
            let if_meant = format!("if nothing will start from {} again", printable(file));
            let delete = with(HintKind::Delete, "or have it removed", "--delete");
            let is_given = match session.verb {
                LiveVerb::Commit(args) => args.delete,
                LiveVerb::Pivot(args) => args.delete,
                _ => false,
            };
            Hints::from(with(HintKind::AllowStale, &if_meant, "--allow-stale"))
                .or((!is_given).then_some(delete))
        }
        Hindrance::NotHere { .. } => Hint::advice(format!(
            "run qmerge where QEMU runs (nsenter -t PID -m); or, if the files cannot be looked at, say what base is called \
             there: {}",
            session.again_with_values(&[("--backing-file", "NAME"), ("--state-dir", "DIR")])
        ))
        .into(),
        Hindrance::JobExists { disk, .. } => session.end_first(disk),
        Hindrance::UnderWay { merge } => {
            let end = if merge.merges_active() { "pivot" } else { "finish" };
            let end = session.other(&[end, &merge.disk]);
            let cancel = session.other(&["cancel", &merge.disk]);
            let why = format!("a job works on {}; let it end", printable(&merge.disk));
            Hints::from(Hint::command(HintKind::LiveEnd, why, end)).or(Hint::command(
                HintKind::LiveCancel,
                "or end it without its effect",
                cancel,
            ))
        }
        Hindrance::NoSpace { folder, .. } => {
            session.again_hint(&format!("make room there (df -h {}), then again", word(folder))).into()
        }
        Hindrance::SharedBase { .. } | Hindrance::SharedInside { .. } => {
            let pull = match session.verb {
                LiveVerb::Commit(args) => Some(session.other(&["pull", &args.disk])),
                _ => None,
            };
            let pull = pull.map(|pull| {
                let why = "take the data up instead, which changes no layer below";
                Hint::command(HintKind::LivePull, why, pull)
            });
            let why = match hindrance {
                Hindrance::SharedInside { .. } => "or, if nobody needs what that node shows",
                _ => "or, if nobody needs those images any more",
            };
            Hints::default().or(pull).or(with(HintKind::AllowSharedBase, why, "--allow-shared-base"))
        }
        Hindrance::NotSearched { .. } => {
            session.again_hint("name folders that exist with --scan, then again").into()
        }
        Hindrance::NoStateFolder { .. } | Hindrance::StateOfAnother { .. } => Hint::advice(format!(
            "name another folder that lasts: {}",
            session.again_with_values(&[("--state-dir", "DIR")])
        ))
        .into(),
        Hindrance::RecoverFirst { unfinished } => {
            Hint::command(HintKind::Recover, "", session.other(&["recover", &unfinished.disk])).into()
        }
        Hindrance::ActiveNotAskedFor { below, .. } => {
            let active = session.again_with(&["--active", "--pivot"]);
            let below = below.map(|below| {
                let top = format!("[{below}]");
                let command = session.again_with(&["--top", &top]);
                Hint::command(HintKind::BelowActive, "or leave that layer out", command)
            });
            Hints::from(Hint::command(HintKind::Active, "", active)).or(below)
        }
        Hindrance::OnlyForActive { .. } => {
            let why =
                format!("leave {} out, or leave --top out; the chain", option_for_active(session));
            let chain = match session.verb {
                LiveVerb::Commit(args) => session.other(&["chain", &args.disk]),
                _ => session.other(&["list"]),
            };
            Hint::command(HintKind::LiveLook, why, chain).into()
        }
        Hindrance::NotSlowed { .. } => {
            Hint::advice("leave --converge out; the merge gets ready when the guest writes less").into()
        }
        _ => Hint::command(HintKind::LiveLook, "see how things stand", session.other(&["jobs"])).into(),
    }
}

/// The given option that is only for merges of the active layer.
fn option_for_active(session: &Session<'_>) -> &'static str {
    match session.verb {
        LiveVerb::Commit(args) if args.pivot => "--pivot",
        LiveVerb::Commit(args) if args.keep_overlay => "--keep-overlay",
        _ => "--converge",
    }
}

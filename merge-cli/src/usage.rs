//! Answers to a command line that cannot be understood, and to calls for help.

use std::ffi::OsString;

use clap::CommandFactory;
use clap::error::ErrorKind;

use crate::call::VerbName;
use crate::cli::Cli;
use crate::exit::Exit;
use crate::failure::Report;
use crate::hint::{Command, Hint, HintKind};
use crate::output::Console;

/// Prints help, the version, or what is wrong with `args`, and gives the exit code.
pub(crate) fn answer(error: &clap::Error, args: &[OsString]) -> Exit {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        // A reader that went away (`qmerge --help | head`) is no failure.
        let _ = error.print();
        return Exit::DONE;
    }
    let live = args
        .iter()
        .skip(1)
        .find(|word| !word.to_string_lossy().starts_with('-'))
        .is_some_and(|w| w == "live");
    let verb = args.iter().skip(1).find_map(|word| VerbName::parse(word.to_str()?)).filter(|_| !live);
    let report = Report {
        kind: "usage",
        message: message(error, live),
        hint: Hint::command(HintKind::Help, "", help(verb, live, args)).into(),
        exit: verb.map_or(Exit::USAGE, VerbName::usage_exit),
    };
    Console::new(args.iter().any(|word| word == "--json"), false).failure(&report);
    report.exit
}

/// The call for help that fits best.
fn help(verb: Option<VerbName>, live: bool, args: &[OsString]) -> Command {
    let words = match verb {
        _ if live => ["live".to_owned()].into_iter().chain(live_verb(args)).collect(),
        Some(verb) => vec![verb.as_str().to_owned()],
        None => Vec::new(),
    };
    Command::qmerge(words).word("--help")
}

/// The verb of `qmerge live` that was meant.
fn live_verb(args: &[OsString]) -> Option<String> {
    let cli = Cli::command();
    let known =
        |word: &OsString| cli.find_subcommand("live")?.find_subcommand(word).map(|c| c.get_name().to_owned());
    args.iter().skip(1).find_map(known)
}

/// What the parser found, without its own prefix and its own pointer to the help.
fn message(error: &clap::Error, live: bool) -> String {
    if live && error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "what shall be done? Verbs: list, chain, snapshot, commit, pull, jobs, finish, pivot, cancel, pause, resume, \
                speed, recover"
            .to_owned();
    }
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "what shall be done? Verbs: info, map, check, compare, commit, pull, relink, flatten, abort, demo, live"
            .to_owned();
    }
    let text = error.render().to_string();
    let lines =
        text.lines().filter(|line| !line.starts_with("For more information") && !line.trim().is_empty());
    let text = lines.collect::<Vec<_>>().join("\n");
    text.strip_prefix("error: ").unwrap_or(&text).to_owned()
}

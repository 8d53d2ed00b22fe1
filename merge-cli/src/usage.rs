//! Answers to a command line that cannot be understood, and to calls for help.

use std::ffi::OsString;

use clap::error::ErrorKind;

use crate::call::VerbName;
use crate::exit::Exit;
use crate::failure::Report;
use crate::output::Console;

/// Prints help, the version, or what is wrong with `args`, and gives the exit code.
pub(crate) fn answer(error: &clap::Error, args: &[OsString]) -> Exit {
    if matches!(error.kind(), ErrorKind::DisplayHelp | ErrorKind::DisplayVersion) {
        // A reader that went away (`qmerge --help | head`) is no failure.
        let _ = error.print();
        return Exit::DONE;
    }
    let verb = args.iter().skip(1).find_map(|word| VerbName::parse(word.to_str()?));
    let report = Report {
        kind: "usage",
        message: message(error),
        hint: verb
            .map_or_else(|| "qmerge --help".to_owned(), |verb| format!("qmerge {} --help", verb.as_str())),
        exit: verb.map_or(Exit::USAGE, VerbName::usage_exit),
    };
    Console::new(args.iter().any(|word| word == "--json"), false).failure(&report);
    report.exit
}

/// What the parser found, without its own prefix and its own pointer to the help.
fn message(error: &clap::Error) -> String {
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        return "what shall be done? Verbs: info, map, check, compare, commit, flatten, demo".to_owned();
    }
    let text = error.render().to_string();
    let lines =
        text.lines().filter(|line| !line.starts_with("For more information") && !line.trim().is_empty());
    let text = lines.collect::<Vec<_>>().join("\n");
    text.strip_prefix("error: ").unwrap_or(&text).to_owned()
}

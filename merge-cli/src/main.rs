//! `qmerge`: merges QEMU disk image chains.
//!
//! This crate turns arguments into calls of the engine, and plans, progress, results and errors into
//! text or JSON. It decides nothing about images.

#![forbid(unsafe_code)]

mod call;
mod cli;
mod cmd;
mod domains;
mod exit;
mod failure;
mod hint;
mod output;
mod signals;
mod usage;

use std::env;
use std::ffi::OsString;
use std::process::ExitCode;
use std::sync::Arc;

use clap::Parser;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

use crate::cli::Cli;
use crate::failure::Failure;
use crate::output::Console;

fn main() -> ExitCode {
    prepare_process();
    let args: Vec<OsString> = env::args_os().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return usage::answer(&error, &args).into(),
    };
    let console = Console::new(cli.output.json, cli.output.quiet);
    let words = args.get(1..).unwrap_or_default();
    match cmd::run(&cli.verb, words, &console) {
        Ok(exit) => exit,
        Err(Failure(report)) => {
            console.failure(&report);
            report.exit
        }
    }
    .into()
}

/// Prepares the limits of the process: a chain may have more layers than the shell's limit of open files, and a
/// file that grows over the shell's size limit must give an error, not kill the process by a signal. If this
/// fails, the limits stay.
fn prepare_process() {
    let Rlimit { current, maximum } = getrlimit(Resource::Nofile);
    if current != maximum {
        let _ = setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum });
    }
    let _ = signal_hook::flag::register(signal_hook::consts::SIGXFSZ, Arc::default());
}

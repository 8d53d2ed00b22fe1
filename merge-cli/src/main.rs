//! `qmerge`: merges QEMU disk image chains.
//!
//! This crate turns arguments into calls of the engine, and plans, progress, results and errors into
//! text or JSON. It decides nothing about images.

#![forbid(unsafe_code)]

mod call;
mod cli;
mod cmd;
mod exit;
mod failure;
mod hint;
mod monitors;
mod output;
mod signals;
mod usage;

use std::env;
use std::ffi::OsString;
use std::process::ExitCode;

use clap::Parser;

use crate::cli::Cli;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::Console;

fn main() -> ExitCode {
    let args: Vec<OsString> = env::args_os().collect();
    let cli = match Cli::try_parse_from(&args) {
        Ok(cli) => cli,
        Err(error) => return usage::answer(&error, &args).into(),
    };
    let console = Console::new(cli.output.json, cli.output.quiet);
    let words = args.get(1..).unwrap_or_default();
    match cmd::run(&cli.verb, words, &console) {
        Ok(exit) => exit,
        Err(Failure::PipeClosed) => Exit::DONE,
        Err(Failure::Reported(report)) => {
            console.failure(&report);
            report.exit
        }
    }
    .into()
}

//! `qmerge demo`: makes a chain, merges it, and proves that a guest would see no difference.

mod stage;

use std::env;
use std::ffi::OsString;
use std::path::Path;
use std::time::Instant;

use clap::Parser;
use qcow2::chain::view::View;
use qcow2::chain::{Chain, OpenOptions, Policy, digest};
use qcow2::compare::compare;
use qcow2::error::{FileOp, shown};
use qcow2::storage::OsHost;
use qcow2::{Error, Result as EngineResult};
use serde_json::json;

use super::{commit, info};
use crate::call::Call;
use crate::cli::{Cli, DemoArgs, Verb};
use crate::exit::Exit;
use crate::failure::{Failure, Report};
use crate::hint::{Command, Hint, HintKind};
use crate::output::Console;
use crate::output::progress::Meter;
use crate::output::size;
use crate::signals::Stop;

/// The smallest disk that the demonstration can be shown on.
const LEAST_SIZE: u64 = 1 << 20;

/// Shows two merges: the first shortens a chain, the second consolidates it.
pub(super) fn run(args: &DemoArgs, call: &Call, console: &Console) -> Result<Exit, Failure> {
    if args.size < LEAST_SIZE {
        return Err(Report {
            kind: "usage",
            message: format!("a disk of {} is too small to show anything", size::short(args.size)),
            hint: Hint::command(HintKind::Demo, "", Command::qmerge(["demo", "--size", "64M"])).into(),
            exit: Exit::USAGE,
        }
        .into());
    }
    let stop = Stop::on_signals(call)?;
    let io = |op| move |e| Failure::engine(&Error::io(&env::temp_dir(), op, None, e), call);
    let folder = tempfile::Builder::new().prefix("qmerge-demo-").tempdir().map_err(io(FileOp::CreateDir))?;
    // Names without the folder are easier to read.
    env::set_current_dir(folder.path()).map_err(io(FileOp::EnterDir))?;
    let result = Demo { call, console, stop: &stop }.show(args, folder.path());
    if args.keep {
        let kept = folder.keep();
        console.note(&format!("the files are in {}", shown(&kept)));
    } else {
        folder.close().map_err(io(FileOp::RemoveDir))?;
    }
    result
}

struct Demo<'a> {
    call: &'a Call,
    console: &'a Console,
    stop: &'a Stop,
}

impl Demo<'_> {
    fn show(&self, args: &DemoArgs, folder: &Path) -> Result<Exit, Failure> {
        let begun = Instant::now();
        let size = args.size.next_multiple_of(stage::CLUSTER);
        self.engine(stage::room(folder, size))?;
        self.say(&format!(
            "A chain in {}: a disk of {}, and three snapshots of it.",
            shown(folder),
            size::short(size)
        ))?;
        self.engine(stage::build(size, self.stop.flag()))?;
        self.info("c.qcow2")?;
        self.say("A copy of what the guest sees now, to compare with: whole.raw")?;
        self.engine(stage::copy("c.qcow2", "whole.raw", self.stop.flag()))?;
        let before = self.digest("c.qcow2")?;

        self.say("First, shorten the chain: a and b go into base; c stays the active image.")?;
        self.commit(&["c.qcow2", "--top", "b.qcow2", "--dry-run"])?;
        self.commit(&["c.qcow2", "--top", "b.qcow2"])?;
        self.info("c.qcow2")?;
        self.prove("c.qcow2")?;

        self.say(
            "Then, consolidate: everything goes into base, and both names boot the same disk from then on.",
        )?;
        self.commit(&["c.qcow2", "--verify"])?;
        self.info("c.qcow2")?;
        self.prove("c.qcow2")?;
        self.prove("base.raw")?;
        self.say("The same command again does nothing:")?;
        self.commit(&["c.qcow2"])?;

        let after = self.digest("base.raw")?;
        self.say(&format!("The disk's digest was {before:08x} before, and is {after:08x} now."))?;
        let result = json!({
            "same": before == after,
            "digest": format!("{after:08x}"),
            "virtual-size": size,
            "seconds": begun.elapsed().as_secs_f64(),
        });
        self.console.event("result", result)?;
        if before == after { Ok(Exit::DONE) } else { Err(self.changed("base.raw")) }
    }

    /// Prints a line that explains, for people only.
    fn say(&self, text: &str) -> Result<(), Failure> {
        self.console.result(&format!("\n{text}"))
    }

    fn info(&self, image: &str) -> Result<(), Failure> {
        if self.console.is_json() {
            return Ok(());
        }
        self.run(&["info", "--chain", image])
    }

    fn commit(&self, words: &[&str]) -> Result<(), Failure> {
        self.run(&[&["commit"], words].concat())
    }

    /// Shows a command, and runs it as if it had been typed.
    fn run(&self, words: &[&str]) -> Result<(), Failure> {
        let words: Vec<OsString> = words.iter().map(Into::into).collect();
        let call = Call { words: words.clone(), ..self.call.clone() };
        self.console.result(&format!("\n$ {}", call.again()))?;
        let typed = std::iter::once(OsString::from("qmerge")).chain(words);
        let verb =
            Cli::try_parse_from(typed).map_err(|e| self.engine_failure(&Error::Usage(e.to_string())))?.verb;
        match &verb {
            Verb::Commit(args) => commit::merge(args, self.call, self.console, self.stop),
            Verb::Info(args) => info::run(args, self.call, self.console),
            _ => Ok(Exit::DONE),
        }
        .map(drop)
    }

    /// Compares an image with the copy made in the beginning, byte by byte.
    fn prove(&self, image: &str) -> Result<(), Failure> {
        let copy = self.engine(open("whole.raw"))?;
        let chain = self.engine(open(image))?;
        let (a, b) = (copy.images(), chain.images());
        let meter = Meter::without_events(self.console, "comparing");
        let (a, b) = (View::new(&a, 0, copy.active()), View::new(&b, 0, chain.active()));
        let found = self.engine(compare(a, b, &meter, self.stop.flag()))?;
        drop(meter);
        if !found.same {
            return Err(self.changed(image));
        }
        self.console.result(&format!(
            "\n$ qmerge compare {image} whole.raw\n{image} and whole.raw show the same bytes."
        ))
    }

    fn digest(&self, image: &str) -> Result<u32, Failure> {
        let chain = self.engine(open(image))?;
        let images = chain.images();
        let view = View::new(&images, 0, chain.active());
        self.engine(digest(view, view.size(), self.stop.flag()))
    }

    fn engine<T>(&self, result: EngineResult<T>) -> Result<T, Failure> {
        result.map_err(|e| self.engine_failure(&e))
    }

    fn engine_failure(&self, error: &Error) -> Failure {
        match (error, self.stop.exit()) {
            (Error::Cancelled, Some(exit)) => {
                Failure::interrupted("in the middle of the demonstration", exit, self.call)
            }
            _ => Failure::engine(error, self.call),
        }
    }

    /// The failure if the bytes differ, which must never happen.
    fn changed(&self, image: &str) -> Failure {
        Report {
            kind: "verify-failed",
            message: format!("{image} does not show the bytes that the chain showed before"),
            hint: Hint::command(
                HintKind::Demo,
                "please report this, with the files that this leaves",
                Command::qmerge(["demo", "--keep"]),
            )
            .into(),
            exit: Exit::FAILED,
        }
        .into()
    }
}

fn open(image: &str) -> EngineResult<Chain> {
    let options = OpenOptions::new(Policy::local_files());
    Chain::open(&OsHost, Path::new(image), &options)
}

//! Side-by-side benchmarks of `qmerge` and `qemu-img`: both run on copies of the same files, in turn,
//! in one run of this command, which prints medians and their ratios.

mod content;
mod image;
mod measure;
mod report;
mod scenario;
mod stop;
mod tools;
mod volume;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use clap::Parser;

use measure::Run;
use report::Rounds;
use scenario::{Maker, Scenario, Work};
use tools::Result;
use volume::Volume;

/// Compare qmerge with qemu-img on the same files, in one run
#[derive(Debug, Parser)]
#[command(name = "side-by-side")]
struct Args {
    /// Small files and one round: shows that everything runs, measures nothing
    #[arg(long)]
    quick: bool,

    /// Run only the scenarios of this name (repeatable); `list` prints them
    #[arg(long, value_name = "NAME")]
    only: Vec<String>,

    /// Run only on this file system: own, or ext4, xfs, btrfs made in a file of DIR (repeatable)
    /// [default: own, xfs and btrfs, as far as they can be had]
    #[arg(long, value_name = "FS", value_parser = ["own", "ext4", "xfs", "btrfs"])]
    fs: Vec<String>,

    /// How often each command runs
    #[arg(long, value_name = "N", default_value_t = 5)]
    rounds: usize,

    /// Make the files of the scenarios in DIR, for use by hand, and run nothing
    #[arg(long, value_name = "DIR")]
    make: Option<PathBuf>,

    /// Where the files are made (some 20 GiB)
    #[arg(long, value_name = "DIR", default_value_os_t = std::env::temp_dir())]
    dir: PathBuf,

    /// The qmerge to measure [default: the one beside this command]
    #[arg(long, value_name = "FILE")]
    qmerge: Option<PathBuf>,
}

fn main() -> ExitCode {
    let args = Args::parse();
    match stop::install().and_then(|()| run(&args)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("side-by-side: {e}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &Args) -> Result<()> {
    if args.only.iter().any(|name| name == "list") {
        scenario::ALL.iter().for_each(|s| println!("{:20} {}", s.name, s.about));
        return Ok(());
    }
    let chosen = choose(&args.only)?;
    if let Some(dir) = &args.make {
        return make(dir, &chosen, args.quick);
    }
    let qmerge = match &args.qmerge {
        Some(path) => path.canonicalize().map_err(|e| format!("{}: {e}", path.display()))?,
        None => std::env::current_exe()?.with_file_name("qmerge"),
    };
    if !qmerge.is_file() {
        let what = "build it with `cargo build --release -p merge-cli`, or name one with --qmerge";
        return Err(format!("there is no {}: {what}", qmerge.display()).into());
    }
    let qemu_img = tools::find("qemu-img").ok_or("qemu-img is not installed (Debian: qemu-utils)")?;
    let programs = Programs { qmerge, qemu_img };
    let rounds = if args.quick { 1 } else { args.rounds.max(1) };
    println!("{}", programs.versions()?);
    println!("{}", report::HEAD);
    let default = ["own", "xfs", "btrfs"].map(str::to_owned);
    for fs in if args.fs.is_empty() { &default[..] } else { &args.fs[..] } {
        if !chosen.iter().any(|s| s.everywhere || fs == "own") {
            continue;
        }
        let volume = match fs.as_str() {
            "own" => Volume::plain(&args.dir)?,
            _ => match Volume::mounted(&args.dir, fs, 16 << 30) {
                Ok(volume) => volume,
                Err(e) => {
                    stop::check()?;
                    eprintln!("side-by-side: {fs} SKIPPED: {e}");
                    continue;
                }
            },
        };
        for scenario in chosen.iter().filter(|s| s.everywhere || fs == "own") {
            let done = programs.rounds(&volume, scenario, rounds, args.quick)?;
            println!("{}", report::line(&volume.fs, volume.shares, scenario, &done));
        }
    }
    Ok(())
}

fn choose(names: &[String]) -> Result<Vec<&'static Scenario>> {
    if let Some(unknown) = names.iter().find(|name| !scenario::ALL.iter().any(|s| s.name == **name)) {
        return Err(format!("there is no scenario {unknown}; `--only list` prints the names").into());
    }
    Ok(scenario::ALL.iter().filter(|s| names.is_empty() || names.iter().any(|n| n == s.name)).collect())
}

fn make(dir: &Path, scenarios: &[&Scenario], quick: bool) -> Result<()> {
    for scenario in scenarios {
        let dir = dir.join(scenario.name);
        std::fs::create_dir_all(&dir)?;
        let work = (scenario.prepare)(&mut Maker::new(&dir, quick))?;
        println!("cd {} && qmerge {}", dir.display(), work.ours.join(" "));
    }
    Ok(())
}

/// The two programs.
struct Programs {
    qmerge: PathBuf,
    qemu_img: PathBuf,
}

impl Programs {
    fn versions(&self) -> Result<String> {
        let ours = tools::output(&self.qmerge.to_string_lossy(), &["--version"])?;
        let theirs = tools::output(&self.qemu_img.to_string_lossy(), &["--version"])?;
        Ok(format!("{}, {}\n", ours.trim(), theirs.lines().next().unwrap_or_default()))
    }

    /// Makes the files, and runs both commands in turn; the first to run changes with every round.
    fn rounds(&self, volume: &Volume, scenario: &Scenario, count: usize, quick: bool) -> Result<Rounds> {
        let dir = volume.path.join(scenario.name);
        let place =
            Place { original: dir.join("original"), ours: dir.join("ours"), theirs: dir.join("theirs") };
        std::fs::create_dir_all(&place.original)?;
        let work = (scenario.prepare)(&mut Maker::new(&place.original, quick))?;
        let mut rounds = Rounds::default();
        for round in 0..if work.once { 1 } else { count } {
            for turn in 0..2 {
                if (round + turn) % 2 == 0 {
                    self.ours(&place, &work, &mut rounds)?;
                } else if let Some(args) = &work.theirs {
                    let run = place.run(&place.theirs, &work, &self.qemu_img, args)?;
                    rounds.theirs.push(run);
                }
            }
            if round == 0 {
                self.compare(&place, &work).map_err(|e| format!("{}: {e}", scenario.name))?;
            }
        }
        std::fs::remove_dir_all(&dir)?;
        Ok(rounds)
    }

    fn ours(&self, place: &Place, work: &Work, rounds: &mut Rounds) -> Result<()> {
        if let Some(args) = &work.apart {
            rounds.apart.push(place.run(&place.ours, work, &self.qmerge, args)?);
        }
        rounds.ours.push(place.run(&place.ours, work, &self.qmerge, &work.ours)?);
        Ok(())
    }

    /// Both must have come to the same bytes, or the times mean nothing.
    fn compare(&self, place: &Place, work: &Work) -> Result<()> {
        let Some(name) = work.compare else { return Ok(()) };
        let (ours, theirs) = (place.ours.join(name), place.theirs.join(name));
        tools::output("qemu-img", &["compare", &ours.to_string_lossy(), &theirs.to_string_lossy()])?;
        if !name.ends_with(".raw") {
            tools::output("qemu-img", &["check", "-q", &ours.to_string_lossy()])?;
        }
        Ok(())
    }
}

/// The folders of a scenario: the files as they were made, and the copies that the programs change.
struct Place {
    original: PathBuf,
    ours: PathBuf,
    theirs: PathBuf,
}

impl Place {
    /// Runs a command on fresh copies of the files, or, if it changes nothing, on the files themselves.
    fn run(&self, copy: &Path, work: &Work, program: &Path, args: &[String]) -> Result<Run> {
        if !work.changes {
            tools::output("sync", &["-f", &self.original.to_string_lossy()])?;
            return measure::run(&self.original, program, args);
        }
        let name = copy.to_string_lossy();
        tools::output("rm", &["-rf", &name])?;
        // The copies share no blocks with the originals, and are all in the page cache.
        tools::output(
            "cp",
            &["-r", "--reflink=never", "--sparse=auto", &self.original.to_string_lossy(), &name],
        )?;
        tools::output("sync", &["-f", &name])?;
        measure::run(copy, program, args)
    }
}

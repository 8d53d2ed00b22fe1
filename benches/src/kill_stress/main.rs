//! Kills merges: random chains, the real `qmerge commit`, SIGKILL at random times, and again while it goes on.
//!
//! After every kill `qemu-img check` may find leaks and nothing else, and the guest's bytes through the active
//! image are those that were there before. Then the same command is run again, and in the end must finish.

mod chain;
mod judge;
#[path = "../stop.rs"]
mod stop;
#[path = "../tools.rs"]
mod tools;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use clap::Parser;
use kit::Random;

use chain::Chain;
use tools::Result;

/// Kill merges at random times, and see whether anything is lost
#[derive(Debug, Parser)]
#[command(name = "kill-stress")]
struct StressArgs {
    /// How many merges
    #[arg(long, value_name = "N", default_value_t = 200)]
    runs: u64,

    /// How often each is killed, at most
    #[arg(long, value_name = "N", default_value_t = 4)]
    kills: u64,

    /// Where the images are made (repeatable; the merges take turns) [default: the temporary folder, and
    /// /dev/shm if it is there]
    #[arg(long, value_name = "DIR")]
    dir: Vec<PathBuf>,

    /// The number from which the first chain follows; the next ones take the next numbers
    #[arg(long, value_name = "N", default_value_t = 1)]
    seed: u64,

    /// The qmerge to kill [default: the one beside this command]
    #[arg(long, value_name = "FILE")]
    qmerge: Option<PathBuf>,

    /// Keep the images of merges that failed
    #[arg(long)]
    keep: bool,
}

fn main() -> ExitCode {
    let args = StressArgs::parse();
    match stop::install().and_then(|()| run(&args)) {
        Ok(0) => ExitCode::SUCCESS,
        Ok(_) => ExitCode::FAILURE,
        Err(e) => {
            eprintln!("kill-stress: {e}");
            ExitCode::FAILURE
        }
    }
}

/// What came out so far.
#[derive(Debug, Default)]
struct Totals {
    runs: u64,
    /// Merges that were killed while they ran.
    kills: u64,
    /// Merges that were over before they could be killed.
    too_late: u64,
    /// Merges that were finished by the same command after a kill.
    finished: u64,
    /// Of these, the ones that said that they go on where an earlier one stopped.
    resumed: u64,
    failures: u64,
}

/// Runs all merges; how many failed.
fn run(args: &StressArgs) -> Result<u64> {
    let qmerge = match &args.qmerge {
        Some(path) => path.canonicalize().map_err(|e| format!("{}: {e}", path.display()))?,
        None => std::env::current_exe()?.with_file_name("qmerge"),
    };
    if !qmerge.is_file() {
        let what = "build it with `cargo build --release -p merge-cli`, or name one with --qmerge";
        return Err(format!("there is no {}: {what}", qmerge.display()).into());
    }
    for tool in ["qemu-img", "qemu-io"] {
        tools::find(tool).ok_or_else(|| format!("{tool} is not installed (Debian: qemu-utils)"))?;
    }
    let mut dirs = args.dir.clone();
    if dirs.is_empty() {
        dirs.push(std::env::temp_dir());
        dirs.extend(Some(PathBuf::from("/dev/shm")).filter(|dir| dir.is_dir()));
    }
    let mut totals = Totals::default();
    let mut by_dir = vec![0; dirs.len()];
    for seed in (args.seed..).take(args.runs as usize) {
        stop::check()?;
        let place = (seed % dirs.len() as u64) as usize;
        let before = totals.kills;
        let folder = tempfile::Builder::new().prefix("kill-stress-").tempdir_in(&dirs[place])?;
        let outcome =
            Merge::new(folder.path(), &qmerge, seed).and_then(|mut m| m.run(args.kills, &mut totals));
        totals.runs += 1;
        by_dir[place] += totals.kills - before;
        if let Err(e) = outcome {
            stop::check()?;
            totals.failures += 1;
            eprintln!("seed {seed}: {e}");
            if args.keep {
                eprintln!("seed {seed}: images kept in {}", folder.keep().display());
            }
        }
    }
    report(&totals, &dirs, &by_dir);
    Ok(totals.failures)
}

fn report(totals: &Totals, dirs: &[PathBuf], by_dir: &[u64]) {
    for (dir, kills) in dirs.iter().zip(by_dir) {
        let kind = tools::output("df", &["--output=fstype", &dir.to_string_lossy()]).unwrap_or_default();
        println!("{}: {kills} kills on {}", dir.display(), kind.lines().nth(1).unwrap_or("?").trim());
    }
    println!("over before the kill: {}", totals.too_late);
    println!("runs: {}", totals.runs);
    println!("kills: {}", totals.kills);
    println!("finished after a kill: {}", totals.finished);
    println!("resumed: {}", totals.resumed);
    println!("failures: {}", totals.failures);
}

/// One chain, and the command that merges it.
struct Merge<'a> {
    dir: &'a Path,
    qmerge: &'a Path,
    chain: Chain,
    random: Random,
    /// How long the merge takes when nobody kills it.
    takes: Duration,
}

impl<'a> Merge<'a> {
    fn new(dir: &'a Path, qmerge: &'a Path, seed: u64) -> Result<Self> {
        let mut random = Random::new(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1);
        let chain = Chain::new(dir, &mut random)?;
        judge::flatten(dir, &chain)?;
        let rehearsal = dir.join("rehearsal");
        chain.copy_to(&rehearsal)?;
        let begun = Instant::now();
        let mut child = start(qmerge, &rehearsal, &chain)?;
        let status = child.wait()?;
        let takes = begun.elapsed();
        if !status.success() {
            return Err(format!("{chain}: without a kill: {status}: {}", said(&rehearsal)).into());
        }
        std::fs::remove_dir_all(&rehearsal)?;
        Ok(Self { dir, qmerge, chain, random, takes })
    }

    fn run(&mut self, most: u64, totals: &mut Totals) -> Result<()> {
        let kills = 1 + self.random.below(most.max(1));
        let mut killed = 0;
        for _ in 0..kills {
            stop::check()?;
            let delay = self.moment();
            let mut child = start(self.qmerge, self.dir, &self.chain)?;
            std::thread::sleep(delay);
            child.kill()?;
            let status = child.wait()?;
            if status.success() {
                // It was over: every kill so far was survived.
                totals.too_late += 1;
                return self.finish(killed, totals);
            }
            if status.code().is_some() {
                return Err(format!("{}: {status}: {}", self.chain, said(self.dir)).into());
            }
            killed += 1;
            totals.kills += 1;
            judge::after_a_kill(self.dir, &self.chain)
                .map_err(|e| format!("{}: after kill {killed}, {delay:?} from the start: {e}", self.chain))?;
            if judge::is_over(self.dir, &self.chain)? {
                break;
            }
        }
        if !judge::is_over(self.dir, &self.chain)? {
            let status = start(self.qmerge, self.dir, &self.chain)?.wait()?;
            if !status.success() {
                return Err(format!("{}: the last run: {status}: {}", self.chain, said(self.dir)).into());
            }
        }
        self.finish(killed, totals)
    }

    fn finish(&self, killed: u64, totals: &mut Totals) -> Result<()> {
        judge::at_the_end(self.dir, &self.chain).map_err(|e| format!("{}: at the end: {e}", self.chain))?;
        if killed > 0 {
            totals.finished += 1;
            totals.resumed += u64::from(judge::went_on(&said(self.dir)));
        }
        Ok(())
    }

    /// How long after the start the next kill comes: anywhere, and more often near the end, where the chain
    /// is switched and overlays are emptied, marked or deleted.
    fn moment(&mut self) -> Duration {
        let part = match self.random.below(4) {
            0 => 80 + self.random.below(25),
            1 => self.random.below(30),
            _ => self.random.below(100),
        };
        self.takes * part as u32 / 100
    }
}

/// Where the command's output goes, in the folder of the images.
const SAID: &str = "said";

/// Starts the merge; what it says goes to a file.
fn start(qmerge: &Path, dir: &Path, chain: &Chain) -> Result<Child> {
    let out = std::fs::File::create(dir.join(SAID))?;
    let errors = out.try_clone()?;
    let mut command = Command::new(qmerge);
    command.args(chain.arguments()).current_dir(dir);
    Ok(command.stdin(Stdio::null()).stdout(out).stderr(errors).spawn()?)
}

fn said(dir: &Path) -> String {
    std::fs::read_to_string(dir.join(SAID)).unwrap_or_default()
}

//! One measured run of a command.

use std::io::Read;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::signal::{Signal, kill};
use nix::sys::time::TimeValLike;
use nix::unistd::Pid;

use crate::{Result, stop};

/// How often the memory of the command is looked at.
const SAMPLE: Duration = Duration::from_millis(4);

/// What a run took.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Run {
    /// From start to end, in seconds.
    pub(crate) wall: f64,
    /// User and system time of all threads, in seconds.
    pub(crate) cpu: f64,
    /// The largest anonymous memory that was seen (`RssAnon`), in bytes.
    pub(crate) anonymous: u64,
}

/// Runs a command in `dir`; its standard output is thrown away.
pub(crate) fn run(dir: &Path, program: &Path, args: &[String]) -> Result<Run> {
    stop::check()?;
    let before = children()?;
    let start = Instant::now();
    let mut child = Command::new(program)
        .args(args)
        .current_dir(dir)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()?;
    let (anonymous, ended) = (AtomicU64::new(0), AtomicBool::new(false));
    let pid = child.id();
    let (said, status, wall) = std::thread::scope(|scope| {
        scope.spawn(|| watch(pid, &anonymous, &ended));
        let said = stderr_of(&mut child);
        let status = child.wait();
        let wall = start.elapsed().as_secs_f64();
        ended.store(true, Ordering::Relaxed);
        (said, status, wall)
    });
    stop::check()?;
    if !status?.success() {
        return Err(format!("{} {} failed: {}", program.display(), args.join(" "), said.trim()).into());
    }
    Ok(Run { wall, cpu: children()? - before, anonymous: anonymous.into_inner() })
}

fn stderr_of(child: &mut Child) -> String {
    let mut said = Vec::new();
    if let Some(stderr) = &mut child.stderr {
        // What cannot be read is missing from an error message.
        let _ = stderr.read_to_end(&mut said);
    }
    String::from_utf8_lossy(&said).into_owned()
}

/// User and system time of all commands that have ended, in seconds.
fn children() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    Ok(micros as f64 / 1e6)
}

/// Looks at the memory of a process until it has ended; passes a signal on.
fn watch(pid: u32, anonymous: &AtomicU64, ended: &AtomicBool) {
    let status = format!("/proc/{pid}/status");
    while !ended.load(Ordering::Relaxed) {
        let text = std::fs::read_to_string(&status).unwrap_or_default();
        anonymous.fetch_max(rss_anon(&text), Ordering::Relaxed);
        if stop::asked()
            && let Ok(pid) = i32::try_from(pid)
        {
            // It may have ended just now.
            let _ = kill(Pid::from_raw(pid), Signal::SIGTERM);
        }
        std::thread::sleep(SAMPLE);
    }
}

/// `RssAnon` of `/proc/PID/status`, in bytes.
fn rss_anon(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("RssAnon:"));
    let kib = line.and_then(|rest| rest.trim().trim_end_matches("kB").trim().parse::<u64>().ok());
    kib.unwrap_or(0) * 1024
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_measured_and_a_failure_is_told() {
        let args = ["-c".to_owned(), "i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done".to_owned()];
        let run = super::run(Path::new("/"), Path::new("/bin/sh"), &args).unwrap();
        assert!(run.wall > 0.0 && run.cpu > 0.0 && run.anonymous > 0, "{run:?}");
        let args = ["-c".to_owned(), "echo because >&2; exit 3".to_owned()];
        let error = super::run(Path::new("/"), Path::new("/bin/sh"), &args).unwrap_err();
        assert!(error.to_string().ends_with("because"), "{error}");
    }

    #[test]
    fn anonymous_memory_is_read() {
        assert_eq!(rss_anon("VmHWM:\t 10 kB\nRssAnon:\t   1604 kB\nRssFile:\t 1 kB\n"), 1604 * 1024);
        assert_eq!(rss_anon(""), 0);
    }
}

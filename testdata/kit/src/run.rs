//! Programs that are run to their end, with their output kept and a limit of time.

use std::ffi::OsStr;
use std::io::Read;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// No command of these tests takes longer, unless it hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(600);

/// How a command ended.
#[derive(Debug)]
pub struct Run {
    /// The command, for messages.
    pub command: String,
    /// Its exit code; a signal counts as 128 plus its number, as in the shell.
    pub code: i32,
    /// What it wrote to standard output.
    pub stdout: String,
    /// What it wrote to standard error.
    pub stderr: String,
}

impl Run {
    /// Both outputs, one after the other.
    pub fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// Fails unless the exit code is `code`.
    #[track_caller]
    pub fn expect(self, code: i32) -> Self {
        assert!(self.code == code, "expected exit code {code}:\n{self}");
        self
    }

    /// Whether the exit code is 0.
    pub fn success(&self) -> bool {
        self.code == 0
    }

    /// Fails unless the exit code is `code`, and standard error holds all of `words`.
    #[track_caller]
    pub fn fails(&self, code: i32, words: &[&str]) {
        assert!(self.code == code, "expected exit code {code}:\n{self}");
        for word in words {
            assert!(self.stderr.contains(word), "'{word}' is missing:\n{self}");
        }
    }

    /// Fails unless the exit code is 0.
    #[track_caller]
    pub fn ok(self) -> Self {
        self.expect(0)
    }

    /// Fails unless the outputs hold `text`, upper and lower case alike.
    #[track_caller]
    pub fn says(self, text: &str) -> Self {
        assert!(self.text().to_lowercase().contains(&text.to_lowercase()), "expected '{text}':\n{self}");
        self
    }

    /// The lines of standard output as JSON values.
    #[track_caller]
    pub fn json_lines(&self) -> Vec<serde_json::Value> {
        let parse = |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("not JSON ({e}):\n{self}"));
        self.stdout.lines().map(parse).collect()
    }

    /// Standard output as one JSON value.
    #[track_caller]
    pub fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("not JSON ({e}):\n{self}"))
    }

    /// The last line of standard error that is not empty.
    pub fn last_line(&self) -> &str {
        self.stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default()
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "$ {}\nexit code {}", self.command, self.code)?;
        write!(f, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr)
    }
}

/// Runs `program` in the folder `cwd`; see [`end`].
#[track_caller]
pub fn run<A: AsRef<OsStr>>(cwd: &Path, program: impl AsRef<OsStr>, args: &[A]) -> Run {
    end(Command::new(program.as_ref()).args(args).current_dir(cwd))
}

/// Runs a program of QEMU's, or of the system, that must succeed; what it prints on standard output.
#[track_caller]
pub fn ok(program: &str, args: &[&str]) -> String {
    end(Command::new(program).args(args)).ok().stdout
}

/// Waits for a command's end. One that hangs is killed, and fails the test.
#[track_caller]
pub fn end(command: &mut Command) -> Run {
    let shown = shown(command);
    let pipes = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().unwrap_or_else(|e| panic!("cannot start {shown}: {e}"));
    let (sender, ended) = mpsc::channel();
    let stdout = collect(child.stdout.take().unwrap(), sender.clone());
    let stderr = collect(child.stderr.take().unwrap(), sender);
    let start = Instant::now();
    for _ in 0..2 {
        if ended.recv_timeout(LIMIT.saturating_sub(start.elapsed())).is_err() {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{shown} did not end within {} seconds", LIMIT.as_secs());
        }
    }
    let status = child.wait().unwrap();
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Run { command: shown, code, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

fn collect(mut pipe: impl Read + Send + 'static, ended: mpsc::Sender<()>) -> std::thread::JoinHandle<String> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        // A read error ends the output, as the end of the pipe does.
        let _ = pipe.read_to_end(&mut bytes);
        let _ = ended.send(());
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

/// A command as it would be typed.
pub(crate) fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    for arg in command.get_args() {
        let arg = arg.to_string_lossy();
        let quote = arg.is_empty() || arg.contains(|c: char| c.is_whitespace() || "[]{}\"*?;&|$".contains(c));
        words.push(if quote { format!("'{arg}'") } else { arg.into_owned() });
    }
    words.join(" ")
}

//! Running commands with their output captured and a time limit.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

/// No command of these tests takes longer, unless it hangs.
const LIMIT: Duration = Duration::from_secs(600);

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Run {
    /// The command, for messages.
    pub(crate) command: String,
    /// Its exit code; a signal counts as 128 plus its number, as in the shell.
    pub(crate) code: i32,
    /// What it wrote to standard output.
    pub(crate) stdout: String,
    /// What it wrote to standard error.
    pub(crate) stderr: String,
}

impl Run {
    /// Both outputs, one after the other.
    pub(crate) fn text(&self) -> String {
        format!("{}{}", self.stdout, self.stderr)
    }

    /// Fails unless the exit code is `code`.
    #[track_caller]
    pub(crate) fn expect(self, code: i32) -> Self {
        assert!(self.code == code, "expected exit code {code}:\n{self}");
        self
    }

    /// Fails unless the exit code is 0.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        self.expect(0)
    }

    /// Fails unless the outputs hold `text`, upper and lower case alike.
    #[track_caller]
    pub(crate) fn says(self, text: &str) -> Self {
        assert!(self.text().to_lowercase().contains(&text.to_lowercase()), "expected '{text}':\n{self}");
        self
    }

    /// The lines of standard output as JSON values.
    #[track_caller]
    pub(crate) fn json_lines(&self) -> Vec<serde_json::Value> {
        let parse = |line| serde_json::from_str(line).unwrap_or_else(|e| panic!("not JSON ({e}):\n{self}"));
        self.stdout.lines().map(parse).collect()
    }

    /// Standard output as one JSON value.
    #[track_caller]
    pub(crate) fn json(&self) -> serde_json::Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("not JSON ({e}):\n{self}"))
    }

    /// The last line of standard error that is not empty.
    pub(crate) fn last_line(&self) -> &str {
        self.stderr.lines().rev().find(|line| !line.trim().is_empty()).unwrap_or_default()
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        writeln!(f, "$ {}\nexit code {}", self.command, self.code)?;
        write!(f, "stdout:\n{}\nstderr:\n{}", self.stdout, self.stderr)
    }
}

/// Runs `program` in the folder `cwd`; a command that hangs is killed and fails the test.
#[track_caller]
pub(crate) fn run<A: AsRef<OsStr>>(cwd: &Path, program: impl AsRef<OsStr>, args: &[A]) -> Run {
    let mut command = Command::new(program.as_ref());
    command.args(args).current_dir(cwd).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let shown = shown(&command);
    let mut child = command.spawn().unwrap_or_else(|e| panic!("cannot start {shown}: {e}"));
    let (sender, ended) = mpsc::channel();
    let stdout = collect(child.stdout.take().unwrap(), sender.clone());
    let stderr = collect(child.stderr.take().unwrap(), sender);
    let start = Instant::now();
    for _ in 0..2 {
        if ended.recv_timeout(LIMIT.saturating_sub(start.elapsed())).is_err() {
            child.kill().unwrap();
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

fn shown(command: &Command) -> String {
    let mut words = vec![command.get_program().to_string_lossy().into_owned()];
    for arg in command.get_args() {
        let arg = arg.to_string_lossy();
        let quote = arg.is_empty() || arg.contains(|c: char| c.is_whitespace() || "[]{}\"*?;&|$".contains(c));
        words.push(if quote { format!("'{arg}'") } else { arg.into_owned() });
    }
    words.join(" ")
}

/// The command under test.
pub(crate) fn merge_binary() -> PathBuf {
    std::env::var_os("QMERGE_TEST_BINARY").map_or_else(|| env!("CARGO_BIN_EXE_qmerge").into(), PathBuf::from)
}

/// Whether `tool` can be found in `PATH` or where system tools lie.
pub(crate) fn tool_present(tool: &str) -> bool {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let system = ["/usr/sbin", "/sbin"].map(PathBuf::from);
    std::env::split_paths(&path).chain(system).any(|folder| folder.join(tool).is_file())
}

/// A process that keeps an image open until it is dropped.
#[derive(Debug)]
pub(crate) struct Holder {
    child: Child,
}

impl Holder {
    /// Starts `qemu-io`, which opens `image` and waits for commands.
    pub(crate) fn qemu_io(cwd: &Path, options: &[&str], image: &str) -> Self {
        let mut child = Command::new("qemu-io")
            .args(options)
            .arg(image)
            .current_dir(cwd)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::inherit())
            .spawn()
            .unwrap();
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut answer = String::new();
        let mut lines = BufReader::new(child.stdout.as_mut().unwrap());
        lines.read_line(&mut answer).unwrap();
        assert!(!answer.trim().is_empty(), "qemu-io did not open {image}");
        Self { child }
    }

    /// Starts `command` and returns when `ready` says so.
    pub(crate) fn start(mut command: Command, ready: impl Fn() -> bool) -> Self {
        let child = command.spawn().unwrap();
        let start = Instant::now();
        while !ready() {
            assert!(start.elapsed() < LIMIT, "{} does not get ready", shown(&command));
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { child }
    }

    /// Its process id.
    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // Already gone is as good as killed.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

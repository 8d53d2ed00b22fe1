//! Commands that are run to their end, within a limit of time.

use std::io::Read;
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;

/// No command of these tests takes a tenth of this on a machine that is free.
const LIMIT: Duration = Duration::from_secs(600);

/// How a command ended.
#[derive(Debug)]
pub(crate) struct Run {
    pub(crate) line: String,
    pub(crate) code: Option<i32>,
    pub(crate) out: String,
    pub(crate) err: String,
}

impl Run {
    /// The same, after a success.
    #[track_caller]
    pub(crate) fn ok(self) -> Self {
        assert_eq!(self.code, Some(0), "{self}");
        self
    }

    /// After a failure with this code, which says all of `words`.
    #[track_caller]
    pub(crate) fn fails(&self, code: i32, words: &[&str]) {
        assert_eq!(self.code, Some(code), "{self}");
        for word in words {
            assert!(self.err.contains(word), "'{word}' is missing: {self}");
        }
    }

    /// Standard output as one JSON value.
    #[track_caller]
    pub(crate) fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|e| panic!("{e}: {self}"))
    }
}

impl std::fmt::Display for Run {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} ended with {:?}\n{}{}", self.line, self.code, self.out, self.err)
    }
}

/// Runs a program of QEMU's in the folder; it must succeed.
#[track_caller]
pub(crate) fn run(dir: &Path, line: &[&str]) -> String {
    end(Command::new(line[0]).args(&line[1..]).current_dir(dir)).ok().out
}

/// Runs the built command, or the one that `QMERGE_TEST_BINARY` names, in the folder.
#[track_caller]
pub(crate) fn qmerge(dir: &Path, args: &[&str]) -> Run {
    let built = env!("CARGO_BIN_EXE_qmerge").into();
    let program = std::env::var_os("QMERGE_TEST_BINARY").unwrap_or(built);
    end(Command::new(program).args(args).current_dir(dir))
}

/// Waits for the command's end; kills it when the time is up.
#[track_caller]
pub(crate) fn end(command: &mut Command) -> Run {
    let line = format!("{command:?}");
    let pipes = command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = pipes.spawn().unwrap_or_else(|e| panic!("{line}: {e}"));
    let (out, err) = (collect(child.stdout.take()), collect(child.stderr.take()));
    let start = Instant::now();
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if start.elapsed() > LIMIT {
            child.kill().unwrap();
            child.wait().unwrap();
            panic!("{line} did not end: {}{}", out.join().unwrap(), err.join().unwrap());
        }
        thread::sleep(Duration::from_millis(5));
    };
    Run { line, code: status.code(), out: out.join().unwrap(), err: err.join().unwrap() }
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> thread::JoinHandle<String> {
    thread::spawn(move || {
        let mut bytes = Vec::new();
        pipe.unwrap().read_to_end(&mut bytes).unwrap();
        String::from_utf8_lossy(&bytes).into_owned()
    })
}

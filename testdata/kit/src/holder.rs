//! A process that keeps an image open.

use std::io::{BufRead, BufReader, Write};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use crate::run::{LIMIT, shown};

/// A process that keeps an image open until it is dropped.
#[derive(Debug)]
pub struct Holder {
    child: Child,
}

impl Holder {
    /// Starts `qemu-io`, which opens `image` and waits for commands.
    pub fn qemu_io(cwd: &Path, options: &[&str], image: &str) -> Self {
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
    pub fn start(mut command: Command, ready: impl Fn() -> bool) -> Self {
        let child = command.spawn().unwrap();
        let start = Instant::now();
        while !ready() {
            assert!(start.elapsed() < LIMIT, "{} does not get ready", shown(&command));
            std::thread::sleep(Duration::from_millis(5));
        }
        Self { child }
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
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

//! A QEMU process with monitors; it is killed with the value.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use qmp_client::{Address, Connection, Disk, Execute, Graph, Options};
use rustix::process::Pid;
use serde_json::{Value, json};

use super::process::{Run, qmerge};

/// For what takes a second or two on a machine that is free.
pub(crate) const PATIENCE: Duration = Duration::from_secs(600);

/// The command line of a machine, without disks.
#[derive(Clone, Debug)]
pub(crate) struct MachineLine {
    /// What comes before the program: another user to run it as.
    pub(crate) prefix: Vec<String>,
    pub(crate) args: Vec<String>,
}

impl MachineLine {
    /// Plain emulation of a small PC with nothing in it.
    pub(crate) fn bare() -> Self {
        // KVM may be there and still not boot, so it is never used.
        let args = "-accel tcg -cpu qemu64 -M q35 -m 128 -smp 1 -nodefaults -no-user-config -display none -no-reboot";
        Self { prefix: Vec::new(), args: args.split(' ').map(str::to_owned).collect() }
    }

    pub(crate) fn with(mut self, args: &[&str]) -> Self {
        self.args.extend(args.iter().map(|&a| a.to_owned()));
        self
    }
}

/// A running QEMU, with a monitor for the command under test and one for the test.
pub(crate) struct Qemu {
    child: Child,
    dir: PathBuf,
    monitor: Connection,
}

impl Qemu {
    /// Starts it in the folder and waits until its monitors answer.
    pub(crate) fn start(dir: &Path, machine: &MachineLine) -> (Self, ChildStdin, ChildStdout) {
        let (program, before) = match machine.prefix.split_first() {
            Some((first, rest)) => (first.as_str(), [rest, &["qemu-system-x86_64".to_owned()]].concat()),
            None => ("qemu-system-x86_64", Vec::new()),
        };
        for socket in ["qmp.sock", "own.sock"] {
            let _ = fs::remove_file(dir.join(socket));
        }
        let mut child = Command::new(program)
            .args(before)
            .args(&machine.args)
            .args(["-qmp", "unix:qmp.sock,server=on,wait=off", "-qmp", "unix:own.sock,server=on,wait=off"])
            .current_dir(dir)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(File::create(dir.join("qemu.log")).unwrap())
            .spawn()
            .unwrap();
        let (input, output) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
        let start = Instant::now();
        let monitor = loop {
            let address = Address::Unix(dir.join("own.sock"));
            match Connection::reconnect(&address, &Options::default(), Duration::from_secs(1)) {
                Ok(monitor) => break monitor,
                Err(error) => {
                    let gone = child.try_wait().unwrap();
                    let log = fs::read_to_string(dir.join("qemu.log")).unwrap();
                    if gone.is_some() || start.elapsed() > PATIENCE {
                        let _ = child.kill();
                        panic!("QEMU: {gone:?}: {error}: {log}");
                    }
                }
            }
        };
        (Self { child, dir: dir.to_owned(), monitor }, input, output)
    }

    /// The machine's folder.
    pub(crate) fn dir(&self) -> &Path {
        &self.dir
    }

    #[track_caller]
    pub(crate) fn ask(&self, command: &str, arguments: Value) -> Value {
        self.monitor.query(command, arguments).unwrap_or_else(|e| panic!("{command}: {e}"))
    }

    pub(crate) fn disk(&self, name: &str) -> Disk {
        Graph::ask(&self.monitor).unwrap().disk(name).unwrap().clone()
    }

    /// The files of the disk's chain, from the bottom, without their folder.
    pub(crate) fn files(&self, disk: &str) -> Vec<String> {
        let name = |file: &str| file.rsplit('/').next().unwrap().to_owned();
        self.disk(disk).layers().iter().rev().map(|layer| name(&layer.file)).collect()
    }

    /// Runs `qmerge live ARGS --qmp qmp.sock` in the machine's folder.
    #[track_caller]
    pub(crate) fn live(&self, args: &[&str]) -> Run {
        qmerge(&self.dir, &[&["live"], args, &["--qmp", "qmp.sock"]].concat())
    }

    /// Runs `qmerge live commit ARGS`.
    #[track_caller]
    pub(crate) fn commit(&self, args: &[&str]) -> Run {
        self.live(&[&["commit"], args].concat())
    }

    /// Asks until the answer is what is wanted; for what no event tells.
    #[track_caller]
    pub(crate) fn until(&self, what: &str, wanted: impl Fn(&Self) -> bool) {
        let start = Instant::now();
        while !wanted(self) {
            assert!(start.elapsed() < PATIENCE, "{what} did not come");
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    /// What QEMU says of its only job.
    pub(crate) fn job(&self) -> Option<Value> {
        self.ask("query-block-jobs", json!({})).as_array().unwrap().first().cloned()
    }

    #[track_caller]
    pub(crate) fn job_becomes(&self, status: &str) -> Value {
        self.until(&format!("a {status} job"), |q| q.job().is_some_and(|job| job["status"] == status));
        self.job().unwrap()
    }

    /// The process's number.
    pub(crate) fn process(&self) -> Pid {
        Pid::from_child(&self.child)
    }

    /// As `kill -9` does, and waits for the end.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Waits for QEMU's own end.
    #[track_caller]
    pub(crate) fn ended(&mut self) -> ExitStatus {
        let start = Instant::now();
        loop {
            if let Some(status) = self.child.try_wait().unwrap() {
                return status;
            }
            assert!(start.elapsed() < PATIENCE, "QEMU did not end");
            std::thread::sleep(Duration::from_millis(5));
        }
    }

    /// Whether it still runs.
    #[track_caller]
    pub(crate) fn lives(&mut self) -> bool {
        match self.child.try_wait().unwrap() {
            None => true,
            Some(status) => {
                eprintln!("QEMU ended: {status}, signal {:?}", status.signal());
                false
            }
        }
    }
}

impl Drop for Qemu {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

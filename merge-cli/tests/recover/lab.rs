//! A storage daemon with one disk of four layers, which can be killed at any command.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::sync::Mutex;
use std::time::Duration;

use qmp_client::{
    Address, Connection, Event, Graph, Merge, MergeOptions, Merged, Monitor, Options, Procedure, StateFile,
    Watch, Wishes,
};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

/// Whether the tools are here.
pub(crate) fn tools_are_here() -> bool {
    kit::are_here(&["qemu-storage-daemon", "qemu-img", "qemu-io"])
}

pub(crate) fn run(program: &str, dir: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A disk `disk0` with the layers `1.img <- 2.img <- 3.img <- 4.img`, and what it shows as `ref.raw`.
pub(crate) struct Lab {
    folder: tempfile::TempDir,
    daemon: Mutex<Option<Child>>,
    /// The daemon itself, where it runs under another program.
    process: Mutex<Option<u32>>,
}

impl Lab {
    pub(crate) fn new() -> Self {
        Self::traced(&[])
    }

    /// The daemon runs under this command.
    pub(crate) fn traced(under: &[&str]) -> Self {
        Self::with_base(under, &[])
    }

    /// The same, with a base that was created with these options.
    pub(crate) fn with_base(under: &[&str], options: &[&str]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        run("qemu-img", dir, &[&["create", "-q", "-f", "qcow2"], options, &["1.img", "16M"]].concat());
        run("qemu-io", dir, &["-f", "qcow2", "-c", "write -q -P 1 0 6M", "1.img"]);
        for n in 2..=4 {
            let (below, overlay) = (format!("{}.img", n - 1), format!("{n}.img"));
            run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "-b", &below, "-F", "qcow2", &overlay]);
            run("qemu-io", dir, &["-f", "qcow2", "-c", &format!("write -q -P {n} {n}M 3M"), &overlay]);
        }
        run("qemu-img", dir, &["convert", "-O", "raw", "4.img", "ref.raw"]);
        let lab = Self { folder, daemon: Mutex::new(None), process: Mutex::new(None) };
        lab.start(under, "4.img");
        lab
    }

    /// Starts a daemon on this image.
    pub(crate) fn start(&self, under: &[&str], image: &str) {
        let top = json!({"driver": "qcow2", "node-name": "top",
            "file": {"driver": "file", "filename": self.path(image)}});
        let export = format!(
            "type=vhost-user-blk,id=disk0,node-name=top,writable=on,addr.type=unix,addr.path={}",
            self.path("disk0.sock")
        );
        let words = [under, &["qemu-storage-daemon"]].concat();
        let daemon = Command::new(words[0])
            .args(&words[1..])
            .args(["--chardev", &format!("socket,id=c0,path={},server=on,wait=off", self.path("qmp.sock"))])
            .args(["--monitor", "chardev=c0", "--blockdev", &top.to_string(), "--export", &export])
            .current_dir(self.dir())
            .spawn()
            .unwrap();
        *self.daemon.lock().unwrap() = Some(daemon);
        let monitor = self.connect();
        *self.process.lock().unwrap() = monitor.peer().filter(|_| !under.is_empty());
    }

    pub(crate) fn dir(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir().join(name).display().to_string()
    }

    pub(crate) fn address(&self) -> Address {
        Address::Unix(self.dir().join("qmp.sock"))
    }

    pub(crate) fn connect(&self) -> Connection {
        Connection::reconnect(&self.address(), &Options::default(), Duration::from_secs(300)).unwrap()
    }

    /// Ends the daemon at once, as a power cut of the process would.
    pub(crate) fn kill(&self) {
        if let Some(process) = self.process.lock().unwrap().take() {
            let process = i32::try_from(process).ok().and_then(Pid::from_raw);
            let _ = process.map(|process| kill_process(process, Signal::KILL));
        }
        if let Some(mut daemon) = self.daemon.lock().unwrap().take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
    }

    /// Waits for a daemon that something else ends.
    pub(crate) fn wait(&self) {
        if let Some(mut daemon) = self.daemon.lock().unwrap().take() {
            let _ = daemon.wait();
        }
    }

    pub(crate) fn state_file(&self) -> PathBuf {
        self.dir().join(".4.img.qmerge-live")
    }

    /// Runs `qmerge ARGS` in the folder.
    pub(crate) fn qmerge(&self, args: &[&str]) -> Output {
        Command::new(env!("CARGO_BIN_EXE_qmerge")).args(args).current_dir(self.dir()).output().unwrap()
    }

    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let output = self.qmerge(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// Runs a command that was printed.
    #[track_caller]
    pub(crate) fn type_in(&self, line: &str) -> String {
        let binary = Path::new(env!("CARGO_BIN_EXE_qmerge")).parent().unwrap();
        let path = format!("{}:{}", binary.display(), std::env::var("PATH").unwrap());
        let output = Command::new("sh").args(["-c", line]).current_dir(self.dir()).env("PATH", path).output();
        let output = output.unwrap();
        assert!(output.status.success(), "{line}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    /// `live recover --json`, which must end with `code`: the only finding.
    #[track_caller]
    pub(crate) fn recover(&self, code: i32) -> Value {
        let output = self.qmerge(&["live", "recover", "--json"]);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(code), "{out}{err}");
        assert_eq!(code != 0, err.lines().any(|line| line.starts_with("hint: ")), "{err}");
        let found: Value = serde_json::from_str(&out).unwrap();
        assert_eq!(found.as_array().unwrap().len(), 1, "{found:#}");
        found[0].clone()
    }

    /// What must hold after everything was put right.
    #[track_caller]
    pub(crate) fn nothing_is_left(&self) {
        assert!(!self.state_file().exists() && !self.dir().join("qmp.sock.qmerge").exists());
        assert!(self.ok(&["live", "recover"]).starts_with("nothing to recover: "));
    }

    /// The image shows what the disk showed, and all images are sound.
    #[track_caller]
    pub(crate) fn shows(&self, image: &str) {
        run("qemu-img", self.dir(), &["compare", "-q", "-F", "raw", image, "ref.raw"]);
        let images = ["1.img", "2.img", "3.img", "4.img"];
        for image in images.into_iter().filter(|image| self.dir().join(image).exists()) {
            // Leaks are all that a kill may leave.
            let output =
                Command::new("qemu-img").args(["check", "-q", image]).current_dir(self.dir()).output();
            assert!(matches!(output.unwrap().status.code(), Some(0 | 3)), "{image}");
        }
    }

    /// The image is an overlay that holds no data.
    #[track_caller]
    pub(crate) fn shows_nothing_of_its_own(&self, image: &str) {
        let map = run("qemu-io", self.dir(), &["-r", "-f", "qcow2", "-c", "alloc 0 16M", image]);
        assert!(map.starts_with("0/16777216 bytes allocated"), "{image}: {map}");
    }

    /// The names of all images.
    pub(crate) fn images(&self) -> Vec<String> {
        let files =
            fs::read_dir(self.dir()).unwrap().map(|file| file.unwrap().file_name().into_string().unwrap());
        let mut images: Vec<_> = files.filter(|name| name.ends_with(".img")).collect();
        images.sort();
        images
    }

    pub(crate) fn contents(&self) -> Vec<Vec<u8>> {
        ["1.img", "2.img", "3.img", "4.img"].map(|image| fs::read(self.dir().join(image)).unwrap()).into()
    }

    /// Merges up to `top` into `[1]`, and kills the daemon at `command`: instead of it, or as soon as it is answered.
    pub(crate) fn dies(&self, top: &str, command: &'static str, when: When) {
        let file = StateFile::beside(&self.dir().join("4.img")).unwrap();
        self.dies_as(&Merging { top: Some(top), wishes: Wishes::default(), file }, command, when);
    }

    /// The same for any merge.
    pub(crate) fn dies_as(&self, merging: &Merging<'_>, command: &'static str, when: When) {
        self.merge(merging, command, when).unwrap_err();
        assert!(self.daemon.lock().unwrap().is_none(), "{command} was not sent");
    }

    /// Pivots to `[1]`, and notes that; nothing is cleaned up after.
    pub(crate) fn pivots(&self) {
        let file = StateFile::beside(&self.dir().join("4.img")).unwrap();
        let merging = Merging { top: Some("[4]"), wishes: Wishes::default(), file };
        self.merge(&merging, "none", When::After).unwrap();
    }

    fn merge(&self, merging: &Merging<'_>, command: &'static str, when: When) -> qmp_client::Result<Merged> {
        let monitor = Deadly { lab: self, inner: self.connect(), command, when };
        let graph = Graph::ask(&monitor).unwrap();
        let disk = graph.disk("disk0").unwrap();
        let base = disk.layer("[1]").unwrap();
        let options = MergeOptions::default();
        let procedure: Procedure = match merging.top {
            Some(top) => {
                let range = disk.range(base, disk.layer(top).unwrap()).unwrap();
                let mut commit = Procedure::commit(disk, &range, options).unwrap();
                commit.preflight(&monitor).unwrap();
                commit
            }
            None => {
                let mut pull = Procedure::pull(disk, Some(base), options).unwrap();
                pull.preflight(&monitor).unwrap();
                pull
            }
        };
        let (file, wishes) = (merging.file.clone(), &merging.wishes);
        let mut merge = Merge::begin(&monitor, procedure, file, &self.address(), wishes).unwrap();
        merge.wait(Some(Duration::from_secs(300)), &mut |_| Watch::GoOn).unwrap();
        if merging.top == Some("[4]") { merge.pivot() } else { merge.finish() }
    }
}

/// What is merged, and what is noted of it where.
pub(crate) struct Merging<'a> {
    /// The layer that is merged into `[1]` with those between; none for a pull of those between into `[4]`.
    pub(crate) top: Option<&'a str>,
    pub(crate) wishes: Wishes,
    pub(crate) file: StateFile,
}

impl Drop for Lab {
    fn drop(&mut self) {
        self.kill();
    }
}

/// When QEMU dies.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum When {
    Before,
    After,
}

/// A monitor whose QEMU dies at a command.
struct Deadly<'a> {
    lab: &'a Lab,
    inner: Connection,
    command: &'static str,
    when: When,
}

impl Monitor for Deadly<'_> {
    fn execute_raw(&self, command: &str, arguments: Value, timeout: Duration) -> qmp_client::Result<Value> {
        let meant = command == self.command;
        if meant && self.when == When::Before {
            self.lab.kill();
        }
        let answer = self.inner.execute_raw(command, arguments, timeout);
        if meant && self.when == When::After {
            self.lab.kill();
        }
        answer
    }

    fn next_event(&self, timeout: Duration) -> qmp_client::Result<Option<Event>> {
        self.inner.next_event(timeout)
    }
}

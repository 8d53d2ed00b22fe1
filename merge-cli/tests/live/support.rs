//! Labs: QEMUs and storage daemons with chains of images, and the command beside them.

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output};
use std::thread;
use std::time::{Duration, Instant};

use qmp_client::{Address, Connection, Execute, Graph, Options};
use serde_json::{Value, json};

/// Whether the tools are here.
pub(crate) fn tools_are_here() -> bool {
    kit::are_here(&["qemu-system-x86_64", "qemu-storage-daemon", "qemu-img", "qemu-io"])
}

/// Where `testdata/qemu72/fetch` puts QEMU 7.2.
pub(crate) fn oldest_qemu() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/qemu72/qemu-system-x86_64")
}

/// Whether it is here.
pub(crate) fn oldest_is_here() -> bool {
    let found = oldest_qemu().is_file();
    if !found {
        kit::skipped("QEMU 7.2 is not in target/qemu72 (testdata/qemu72/fetch gets it)");
    }
    found
}

/// Runs a tool that must succeed, and gives what it prints.
#[track_caller]
pub(crate) fn run(program: &str, dir: &Path, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).current_dir(dir).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", text(&output.stderr));
    text(&output.stdout)
}

/// Bytes that are text.
pub(crate) fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

/// A storage daemon with two disks: `disk0` with the layers `1.img <- 2.img <- 3.img`, and `disk1`, a raw file.
pub(crate) struct Lab {
    folder: tempfile::TempDir,
    daemon: Child,
}

impl Lab {
    pub(crate) fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "1.img", "16M"]);
        for (n, below) in [("2", "1.img"), ("3", "2.img")] {
            let overlay = format!("{n}.img");
            run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "-b", below, "-F", "qcow2", &overlay]);
            run("qemu-io", dir, &["-f", "qcow2", "-c", &format!("write -q -P {n} 0 8M"), &overlay]);
        }
        run("qemu-img", dir, &["create", "-q", "-f", "raw", "data.raw", "4M"]);
        let path = |name: &str| dir.join(name).display().to_string();
        let top = json!({"driver": "qcow2", "node-name": "top", "file": {"driver": "file", "filename": path("3.img")}});
        let data = json!({"driver": "raw", "node-name": "data", "file": {"driver": "file", "filename": path("data.raw")}});
        let export = |disk: &str, node: &str| {
            let socket = path(&format!("{disk}.sock"));
            format!(
                "type=vhost-user-blk,id={disk},node-name={node},writable=on,addr.type=unix,addr.path={socket}"
            )
        };
        let daemon = Command::new("qemu-storage-daemon")
            .args(["--chardev", &format!("socket,id=c0,path={},server=on,wait=off", path("qmp.sock"))])
            .args(["--monitor", "chardev=c0"])
            .args(["--blockdev", &top.to_string(), "--blockdev", &data.to_string()])
            .args(["--export", &export("disk0", "top"), "--export", &export("disk1", "data")])
            .spawn()
            .unwrap();
        let lab = Self { folder, daemon };
        drop(lab.connect());
        lab
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

    /// A client of the test's own; it holds the monitor until it is dropped.
    pub(crate) fn connect(&self) -> Connection {
        Connection::reconnect(&self.address(), &Options::default(), Duration::from_secs(300)).unwrap()
    }

    /// Runs `qmerge live ARGS --qmp qmp.sock`.
    pub(crate) fn live(&self, args: &[&str]) -> Output {
        let words = [&["live"], args, &["--qmp", "qmp.sock"]].concat();
        qmerge(self.dir(), &words)
    }

    #[track_caller]
    pub(crate) fn ok(&self, args: &[&str]) -> String {
        let output = self.live(args);
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    #[track_caller]
    pub(crate) fn json(&self, args: &[&str]) -> Value {
        serde_json::from_str(&self.ok(&[args, &["--json"]].concat())).unwrap()
    }

    /// What must fail with `code`, say all of `words`, and end with a hint.
    #[track_caller]
    pub(crate) fn fails(&self, args: &[&str], code: i32, words: &[&str]) {
        failed(&self.live(args), code, words);
    }

    /// Starts a commit of 2.img into 1.img that takes minutes, as another client, which leaves.
    pub(crate) fn slow_commit(&self, id: &str, auto_dismiss: bool) {
        let monitor = self.connect();
        let graph = Graph::ask(&monitor).unwrap();
        let disk = graph.disk("disk0").unwrap();
        let node = |layer: &str| disk.layer(layer).unwrap().node.clone();
        let arguments = json!({
            "job-id": id, "device": "top", "base-node": node("[1]"), "top-node": node("[2]"),
            "backing-file": "1.img", "speed": 65536, "auto-dismiss": auto_dismiss, "auto-finalize": false,
        });
        monitor.query("block-commit", arguments).unwrap();
    }

    /// Asks for the only job until it has this status.
    #[track_caller]
    pub(crate) fn job_becomes(&self, status: &str) -> Value {
        let start = Instant::now();
        loop {
            let jobs = self.json(&["jobs"]);
            if jobs[0]["status"] == status {
                return jobs[0].clone();
            }
            assert!(start.elapsed() < Duration::from_secs(300), "{jobs:#}");
            thread::sleep(Duration::from_millis(20));
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// Runs `qmerge ARGS` in a folder.
pub(crate) fn qmerge(dir: &Path, args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_qmerge")).args(args).current_dir(dir).output().unwrap()
}

#[track_caller]
pub(crate) fn failed(output: &Output, code: i32, words: &[&str]) {
    let err = text(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{err}");
    // A plan may stand before it.
    assert!(err.lines().any(|line| line.starts_with("qmerge: ")), "{err}");
    assert!(err.lines().last().unwrap().starts_with("hint: "), "{err}");
    for word in words {
        assert!(err.contains(word), "'{word}' is missing: {err}");
    }
}

/// The lines of a table, each with its cells.
pub(crate) fn rows(table: &str) -> Vec<Vec<&str>> {
    table.lines().map(|line| line.split_whitespace().collect()).collect()
}

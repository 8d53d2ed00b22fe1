//! A qemu-storage-daemon with a chain of small images, for tests that need the real thing.
#![allow(dead_code, reason = "each test binary uses a part of it")]

pub(crate) mod cut;
pub(crate) mod writer;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use qmp_client::{
    Address, Connection, Disk, Graph, Merge, MergeOptions, Options, Procedure, StateFile, Waited, Watch,
    Wishes, states_of,
};
use serde_json::{Value, json};
use tempfile::TempDir;

/// Whether the tools are here. Without them a test says so and passes, but fails where `CI` is set.
pub(crate) fn tools_are_here() -> bool {
    kit::are_here(&["qemu-storage-daemon", "qemu-img", "qemu-io", "qemu-nbd"])
}

pub(crate) use kit::ok as run;

/// How a chain is made.
#[derive(Clone, Copy)]
pub(crate) struct Make {
    pub(crate) layers: usize,
    pub(crate) relative: bool,
    pub(crate) raw_base: bool,
    pub(crate) size: &'static str,
}

impl Default for Make {
    fn default() -> Self {
        Self { layers: 4, relative: true, raw_base: false, size: "16M" }
    }
}

/// Images `1.img` (the base) to `N.img` (active) in a folder of their own, each with a MiB of its own
/// bytes, and a MiB that each of them has.
pub(crate) struct Chain {
    pub(crate) folder: TempDir,
    pub(crate) layers: usize,
}

impl Chain {
    pub(crate) fn new(make: Make) -> Self {
        let chain = Self { folder: tempfile::tempdir().unwrap(), layers: make.layers };
        for n in 1..=make.layers {
            let file = chain.name(n);
            let format = if n == 1 && make.raw_base { "raw" } else { "qcow2" };
            let below = if make.relative { format!("{}.img", n - 1) } else { chain.name(n - 1) };
            let below_format = if n == 2 && make.raw_base { "raw" } else { "qcow2" };
            let mut arguments = vec!["create", "-q", "-f", format];
            if n > 1 {
                arguments.extend(["-b", &below, "-F", below_format]);
            }
            arguments.extend([file.as_str(), make.size]);
            run("qemu-img", &arguments);
            if n <= 15 {
                let own = format!("write -q -P {n} {n}M 1M");
                let common = format!("write -q -P {n} 0 1M");
                run("qemu-io", &["-f", format, "-c", &own, "-c", &common, &file]);
            }
        }
        chain
    }

    /// The same images in another folder; their names must be relative.
    pub(crate) fn copy(&self) -> Self {
        let copy = Self { folder: tempfile::tempdir().unwrap(), layers: self.layers };
        for n in 1..=self.layers {
            std::fs::copy(self.path(n), copy.path(n)).unwrap();
        }
        copy
    }

    pub(crate) fn path(&self, n: usize) -> PathBuf {
        self.folder.path().join(format!("{n}.img"))
    }

    pub(crate) fn name(&self, n: usize) -> String {
        self.path(n).to_str().unwrap().to_owned()
    }

    /// What the guest sees through this layer, as a raw file's bytes.
    pub(crate) fn bytes(&self, n: usize) -> Vec<u8> {
        let format = self.info(n, "file format").unwrap();
        let out = self.folder.path().join("bytes.raw");
        run("qemu-img", &["convert", "-U", "-f", &format, "-O", "raw", &self.name(n), out.to_str().unwrap()]);
        std::fs::read(out).unwrap()
    }

    /// The line of `qemu-img info` that begins with these words.
    pub(crate) fn info(&self, n: usize, line: &str) -> Option<String> {
        let info = run("qemu-img", &["info", "-U", &self.name(n)]);
        info.lines().find_map(|l| l.strip_prefix(line).map(|rest| rest.trim_start_matches(": ").to_owned()))
    }

    /// Where the daemon's own NBD server listens, if it has one.
    pub(crate) fn nbd(&self) -> PathBuf {
        self.folder.path().join("nbd.sock")
    }

    /// The state file beside the active image.
    pub(crate) fn state_file(&self) -> StateFile {
        StateFile::beside(&self.path(self.layers)).unwrap()
    }

    pub(crate) fn check(&self, n: usize) {
        run("qemu-img", &["check", "-q", "-f", "qcow2", &self.name(n)]);
    }
}

/// A running daemon that serves the chain's active layer; it is killed with the value.
pub(crate) struct Daemon {
    pub(crate) child: Child,
    pub(crate) socket: PathBuf,
}

impl Daemon {
    /// Serves the chain; with an NBD server of its own where `nbd` says where.
    pub(crate) fn serve(chain: &Chain, nbd: Option<&Path>) -> Self {
        Self::spawn(Command::new("qemu-storage-daemon"), chain, nbd)
    }

    pub(crate) fn spawn(command: Command, chain: &Chain, nbd: Option<&Path>) -> Self {
        let file = json!({"driver": "file", "filename": chain.name(chain.layers)});
        Self::spawn_nodes(
            command,
            &[json!({"driver": "qcow2", "node-name": "top", "file": file})],
            chain,
            nbd,
        )
    }

    /// With nodes as a user of `-blockdev` makes them; the active one is called `top`.
    pub(crate) fn spawn_nodes(
        mut command: Command,
        nodes: &[Value],
        chain: &Chain,
        nbd: Option<&Path>,
    ) -> Self {
        let folder = chain.folder.path();
        let socket = folder.join("qmp.sock");
        let _ = std::fs::remove_file(&socket);
        command
            .arg("--chardev")
            .arg(format!("socket,id=c0,path={},server=on,wait=off", socket.display()))
            .args(["--monitor", "chardev=c0", "--object", "throttle-group,id=group0"]);
        for node in nodes {
            command.args(["--blockdev", &node.to_string()]);
        }
        match nbd {
            Some(nbd) => command
                .arg("--nbd-server")
                .arg(format!("addr.type=unix,addr.path={}", nbd.display()))
                .args(["--export", "type=nbd,id=disk0,node-name=top,name=x,writable=on"]),
            None => command.arg("--export").arg(format!(
                "type=vhost-user-blk,id=disk0,node-name=top,writable=on,addr.type=unix,addr.path={}",
                folder.join("vhost.sock").display()
            )),
        };
        let child = command.stderr(Stdio::inherit()).spawn().unwrap();
        Self { child, socket }
    }

    pub(crate) fn address(&self) -> Address {
        Address::Unix(self.socket.clone())
    }

    pub(crate) fn connect(&self) -> Connection {
        Connection::reconnect(&self.address(), &Options::default(), Duration::from_secs(300)).unwrap()
    }

    /// Kills it as a power cut would, and waits until its locks are gone.
    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    pub(crate) fn wait_for_its_end(&mut self) {
        let start = Instant::now();
        while self.child.try_wait().unwrap().is_none() {
            assert!(start.elapsed() < Duration::from_secs(300), "the daemon does not end");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn disk(monitor: &Connection) -> Disk {
    Graph::ask(monitor).unwrap().disk("disk0").unwrap().clone()
}

/// The chain that begins with the export.
pub(crate) fn listed(disk: &Disk) -> Vec<String> {
    disk.layers().iter().map(|l| l.file.rsplit('/').next().unwrap_or_default().to_owned()).collect()
}

/// A commit of the layers above `base` up to `top` that has passed its preflight.
pub(crate) fn commit(monitor: &Connection, base: &str, top: &str, options: MergeOptions) -> Procedure {
    let disk = disk(monitor);
    let range = disk.range(disk.layer(base).unwrap(), disk.layer(top).unwrap()).unwrap();
    let mut commit = Procedure::commit(&disk, &range, options).unwrap();
    commit.preflight(monitor).unwrap();
    commit
}

/// Begins the merge, with its state file beside the active image.
pub(crate) fn begin<'m>(
    monitor: &'m Connection,
    daemon: &Daemon,
    chain: &Chain,
    procedure: Procedure,
) -> Merge<'m, Connection> {
    Merge::begin(monitor, procedure, chain.state_file(), &daemon.address(), &Wishes::default()).unwrap()
}

/// The merge of the disk that a state file speaks of.
pub(crate) fn attach<'m>(monitor: &'m Connection, daemon: &Daemon) -> Option<Merge<'m, Connection>> {
    let graph = Graph::ask(monitor).unwrap();
    let states = states_of(&daemon.address()).unwrap();
    Merge::attach(monitor, &graph, graph.disk("disk0").unwrap(), &states).unwrap()
}

/// Waits until all is copied.
pub(crate) fn copied(merge: &Merge<'_, Connection>) {
    let waited = merge.wait(Some(Duration::from_secs(300)), &mut |_| Watch::GoOn).unwrap();
    assert!(matches!(waited, Waited::Reached(_)), "{waited:?}");
}

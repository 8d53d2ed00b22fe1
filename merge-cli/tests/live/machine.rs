//! A QEMU or a storage daemon with one disk whose chain is `base.img <- a.img <- b.img <- c.img`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use qmp_client::{Address, Connection, Execute, Options};
use serde_json::{Value, json};

use crate::support::{failed, oldest_qemu, qmerge, run, text};

/// How QEMU is told of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Style {
    /// A storage daemon that exports it.
    Daemon,
    /// A storage daemon that exports it through its NBD server.
    NbdDaemon,
    /// `-drive` with an absolute name.
    Drive,
    /// `-drive` with a name that is relative to QEMU's folder.
    RelativeDrive,
    /// `-blockdev` for each layer, as libvirt does.
    Blockdev,
    /// The same, with a throttle between the base and its file.
    ThrottledBase,
    /// As [`Style::Drive`], under the oldest QEMU that is supported, with an iothread.
    Oldest,
    /// `-blockdev` for an active layer whose data file is `other/real.raw`, whatever its header says.
    OtherDataFile,
    /// `-blockdev` for an active layer that is encrypted, with a key.
    Encrypted,
}

/// The process, its folder, and what the guest sees.
pub(crate) struct Machine {
    folder: tempfile::TempDir,
    process: Child,
    disk: &'static str,
}

/// Makes the usual chain: base has 4 MiB of data, each overlay 2 MiB that overlap those below, and 1 MiB of zeros.
pub(crate) fn usual_chain(dir: &Path, base_format: &str) {
    run("qemu-img", dir, &["create", "-q", "-f", base_format, "base.img", "32M"]);
    run("qemu-io", dir, &["-f", base_format, "-c", "write -q -P 1 0 8M", "base.img"]);
    let mut below = ("base.img", base_format);
    for (n, name) in (1..).zip(["a.img", "b.img", "c.img"]) {
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "-b", below.0, "-F", below.1, name]);
        let (data, zeros) =
            (format!("write -q -P {} {}M 2M", n + 1, n), format!("write -q -z {}M 1M", 4 + n));
        let far = format!("write -q -P {} {}M 2M", n + 10, 8 + 4 * n);
        run("qemu-io", dir, &["-f", "qcow2", "-c", &data, "-c", &zeros, "-c", &far, name]);
        below = (name, "qcow2");
    }
}

impl Machine {
    /// With the usual chain on a raw base.
    pub(crate) fn new(style: Style) -> Self {
        Self::with(style, "c.img", |dir| usual_chain(dir, "raw"))
    }

    /// With the chain that `make` makes in the folder, whose active image is `active`.
    pub(crate) fn with(style: Style, active: &str, make: impl FnOnce(&Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        make(dir);
        run("qemu-img", dir, &["convert", "-O", "raw", active, "expected.raw"]);
        let disk = if matches!(style, Style::Daemon | Style::NbdDaemon) { "disk0" } else { "vda" };
        let log = fs::File::create(dir.join("qemu.log")).unwrap();
        let mut command = command(style, dir, active);
        let process =
            command.current_dir(dir).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let machine = Self { process: process.spawn().unwrap(), folder, disk };
        drop(machine.connect());
        machine
    }

    /// `base.img <- c.img`, of which c is encrypted.
    pub(crate) fn encrypted() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let dir = folder.path();
        let secret = ["--object", "secret,id=key,data=abc"];
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "base.img", "8M"]);
        let options = "encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10";
        let create = ["create", "-q", "-f", "qcow2", "-o", options, "-b", "base.img", "-F", "qcow2", "c.img"];
        run("qemu-img", dir, &[&create[..1], &secret[..], &create[1..]].concat());
        let image = ["-c", "write -q -P 0x5a 1M 1M", "--image-opts"];
        let opts = "driver=qcow2,file.filename=c.img,encrypt.key-secret=key";
        run("qemu-io", dir, &[&secret[..], &image, &[opts]].concat());
        let log = fs::File::create(dir.join("qemu.log")).unwrap();
        let mut command = command(Style::Encrypted, dir, "c.img");
        let process =
            command.current_dir(dir).stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log);
        let machine = Self { process: process.spawn().unwrap(), folder, disk: "vda" };
        drop(machine.connect());
        machine
    }

    pub(crate) fn dir(&self) -> &Path {
        self.folder.path()
    }

    pub(crate) fn path(&self, name: &str) -> String {
        self.dir().join(name).display().to_string()
    }

    pub(crate) fn disk(&self) -> &'static str {
        self.disk
    }

    pub(crate) fn has(&self, name: &str) -> bool {
        self.dir().join(name).exists()
    }

    /// A client of the test's own; it holds the monitor until it is dropped.
    pub(crate) fn connect(&self) -> Connection {
        let address = Address::Unix(self.dir().join("qmp.sock"));
        Connection::reconnect(&address, &Options::default(), Duration::from_secs(300)).unwrap()
    }

    /// `live VERB DISK ARGS --qmp qmp.sock`, to be started.
    pub(crate) fn command(&self, verb: &str, args: &[&str]) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qmerge"));
        command
            .args(["live", verb, self.disk])
            .args(args)
            .args(["--qmp", "qmp.sock"])
            .current_dir(self.dir());
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        command
    }

    /// Runs it.
    pub(crate) fn live(&self, verb: &str, args: &[&str]) -> Output {
        self.command(verb, args).output().unwrap()
    }

    /// Runs it; it must succeed. What it prints on standard output, and then on standard error.
    #[track_caller]
    pub(crate) fn ok(&self, verb: &str, args: &[&str]) -> String {
        let output = self.live(verb, args);
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert_eq!(output.status.code(), Some(0), "{verb} {args:?}: {out}{err}");
        out + &err
    }

    /// Runs it with `--json`; it must succeed, and every line must be an event.
    #[track_caller]
    pub(crate) fn events(&self, verb: &str, args: &[&str]) -> Vec<Value> {
        let output = self.live(verb, &[args, &["--json"]].concat());
        assert_eq!(output.status.code(), Some(0), "{verb} {args:?}: {}", text(&output.stderr));
        events(&output.stdout)
    }

    /// What must fail with `code`, say all of `words`, and end with a hint.
    #[track_caller]
    pub(crate) fn fails(&self, verb: &str, args: &[&str], code: i32, words: &[&str]) {
        failed(&self.live(verb, args), code, words);
    }

    /// One JSON document of a verb that names no disk, or this one.
    #[track_caller]
    pub(crate) fn document(&self, args: &[&str]) -> Value {
        let output = qmerge(self.dir(), &[&["live"], args, &["--json", "--qmp", "qmp.sock"]].concat());
        assert_eq!(output.status.code(), Some(0), "{args:?}: {}", text(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The names of the chain's files, from the active one down.
    #[track_caller]
    pub(crate) fn chain(&self) -> Vec<String> {
        let chain = self.document(&["chain", self.disk]);
        let name = |layer: &Value| {
            let file = layer["filename"].as_str().unwrap();
            file.rsplit('/').next().unwrap().to_owned()
        };
        chain.as_array().unwrap().iter().map(name).collect()
    }

    /// All jobs; `None` while another client has the monitor.
    pub(crate) fn live_jobs(&self) -> Option<Value> {
        let output = qmerge(self.dir(), &["live", "jobs", "--json", "--qmp", "qmp.sock"]);
        output.status.success().then(|| serde_json::from_slice(&output.stdout).unwrap())
    }

    /// The only job, or null.
    #[track_caller]
    pub(crate) fn job(&self) -> Value {
        self.document(&["jobs"])[0].clone()
    }

    /// Waits until the only job has this status.
    #[track_caller]
    pub(crate) fn job_becomes(&self, status: &str) -> Value {
        self.eventually(|| Some(self.job()).filter(|job| job["status"] == status))
    }

    /// Waits for what a busy machine may take its time for.
    #[track_caller]
    pub(crate) fn eventually<T>(&self, mut ask: impl FnMut() -> Option<T>) -> T {
        let start = Instant::now();
        loop {
            if let Some(answer) = ask() {
                return answer;
            }
            assert!(start.elapsed() < Duration::from_secs(300), "it does not come: {:?}", self.live_jobs());
            thread::sleep(Duration::from_millis(20));
        }
    }

    /// Has the guest write and flush: QEMU's own command does it through the device.
    pub(crate) fn guest_writes(&self, pattern: u8, offset: &str, length: &str) {
        let monitor = self.connect();
        let write = format!("write -q -P {pattern} {offset} {length}");
        for io in [write.as_str(), "flush"] {
            let line = format!("qemu-io -d /machine/peripheral/vda/virtio-backend \"{io}\"");
            let answer = monitor.query("human-monitor-command", json!({"command-line": line})).unwrap();
            assert_eq!(answer, "", "{io}");
        }
        let expected = self.dir().join("expected.raw");
        run("qemu-io", self.dir(), &["-f", "raw", "-c", &write, expected.to_str().unwrap()]);
    }

    /// The bytes of all images, and which files there are.
    pub(crate) fn files(&self) -> BTreeMap<String, Vec<u8>> {
        let entries = fs::read_dir(self.dir()).unwrap().flatten();
        let files = entries.filter(|entry| entry.file_type().unwrap().is_file());
        files.map(|e| (e.file_name().into_string().unwrap(), fs::read(e.path()).unwrap())).collect()
    }

    /// Ends QEMU; then the image must be sound and show what the guest saw, to QEMU's tools and to ours.
    #[track_caller]
    pub(crate) fn holds_the_disk(mut self, image: &str) {
        self.stop();
        shows(self.dir(), image, "expected.raw");
    }

    /// What is different in the chain as a configuration may have recorded it, every layer over the one before whatever the
    /// headers say, if anything is. The bytes are read beside QEMU.
    pub(crate) fn recorded_chain_differs(&self) -> Option<String> {
        let base = run("qemu-img", self.dir(), &["info", "-U", "--output=json", "base.img"]);
        let mut chain = json!({"force-share": true, "driver": if base.contains("\"raw\"") { "raw" } else { "qcow2" },
            "file": {"driver": "file", "filename": self.path("base.img")}});
        for layer in ["a.img", "b.img", "c.img"] {
            let file = json!({"driver": "file", "filename": self.path(layer)});
            chain = json!({"driver": "qcow2", "force-share": true, "file": file, "backing": chain});
        }
        let name = format!("json:{chain}");
        let output = Command::new("qemu-img")
            .args([
                "compare",
                "-U",
                &name,
                &format!(
                    "json:{}",
                    json!({"driver": "raw",
                "file": {"driver": "file", "filename": self.path("expected.raw")}})
                ),
            ])
            .output()
            .unwrap();
        (!output.status.success()).then(|| text(&output.stdout) + &text(&output.stderr))
    }

    /// Ends QEMU.
    pub(crate) fn stop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.stop();
    }
}

/// The image, whose format its first bytes tell, is sound and has the bytes of the raw file.
#[track_caller]
pub(crate) fn shows(dir: &Path, image: &str, raw: &str) {
    let raw_image = run("qemu-img", dir, &["info", "--output=json", image]).contains("\"format\": \"raw\"");
    if !raw_image {
        run("qemu-img", dir, &["check", "-q", image]);
    }
    let format = if raw_image { "raw" } else { "qcow2" };
    run("qemu-img", dir, &["compare", "-q", "-f", format, "-F", "raw", image, raw]);
    let output = qmerge(dir, &["compare", "-f", format, "-F", "raw", image, raw]);
    assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
}

/// Lines of JSON, each an event.
#[track_caller]
pub(crate) fn events(out: &[u8]) -> Vec<Value> {
    let events: Vec<Value> = text(out).lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert!(events.iter().all(|event| event["event"].is_string()), "{events:?}");
    events
}

fn command(style: Style, dir: &Path, active: &str) -> Command {
    let path = |name: &str| dir.join(name).display().to_string();
    let file = |name: &str| json!({"driver": "file", "filename": path(name)});
    if matches!(style, Style::Daemon | Style::NbdDaemon) {
        let mut command = Command::new("qemu-storage-daemon");
        let top = json!({"driver": "qcow2", "node-name": "top", "file": file(active)});
        let socket = path("disk0.sock");
        command
            .args(["--chardev", &format!("socket,id=c0,path={},server=on,wait=off", path("qmp.sock"))])
            .args(["--monitor", "chardev=c0", "--blockdev", &top.to_string()]);
        let address = format!("addr.type=unix,addr.path={socket}");
        if style == Style::NbdDaemon {
            command.args(["--nbd-server", &address]);
            command.args(["--export", "type=nbd,id=disk0,node-name=top,writable=on"]);
        } else {
            let export = format!("type=vhost-user-blk,id=disk0,node-name=top,writable=on,{address}");
            command.args(["--export", &export]);
        }
        return command;
    }
    // KVM may be there and still not boot, so it is never used.
    let fixed = "-S -nodefaults -no-user-config -display none -accel tcg -M q35 -m 64";
    let mut command = match style {
        Style::Oldest => Command::new(oldest_qemu()),
        _ => Command::new("qemu-system-x86_64"),
    };
    command.args(fixed.split(' ')).args(["-qmp", "unix:qmp.sock,server=on,wait=off"]);
    let drive = match style {
        Style::Blockdev | Style::ThrottledBase => {
            let nodes = [("base", "raw"), ("a", "qcow2"), ("b", "qcow2"), ("c", "qcow2")];
            let mut below = Value::Null;
            for (name, driver) in nodes {
                let mut node = json!({"driver": driver, "node-name": name, "file": format!("{name}-file")});
                let mut storage = file(&format!("{name}.img"));
                storage["node-name"] = format!("{name}-file").into();
                if name != "c" {
                    node["read-only"] = true.into();
                    storage["auto-read-only"] = true.into();
                }
                if !below.is_null() {
                    node["backing"] = below;
                }
                if style == Style::ThrottledBase && name == "base" {
                    storage["node-name"] = "base-leaf".into();
                    let throttle = json!({"driver": "throttle", "throttle-group": "slow", "file": "base-leaf", "node-name": "base-file"});
                    command.args(["-object", "throttle-group,id=slow", "-blockdev", &storage.to_string()]);
                    storage = throttle;
                }
                command.args(["-blockdev", &storage.to_string(), "-blockdev", &node.to_string()]);
                below = name.into();
            }
            "c"
        }
        Style::Encrypted => {
            let key = json!({"format": "luks", "key-secret": "key"});
            let node = json!({"driver": "qcow2", "node-name": "c", "file": file(active), "encrypt": key});
            command.args(["-object", "secret,id=key,data=abc", "-blockdev", &node.to_string()]);
            "c"
        }
        Style::OtherDataFile => {
            let node = json!({"driver": "qcow2", "node-name": "c", "file": file(active), "data-file": file("other/real.raw")});
            command.args(["-blockdev", &node.to_string()]);
            "c"
        }
        Style::RelativeDrive => {
            command.args(["-drive", &format!("file={active},if=none,id=drive0,format=qcow2")]);
            "drive0"
        }
        _ => {
            command.args(["-drive", &format!("file={},if=none,id=drive0,format=qcow2", path(active))]);
            "drive0"
        }
    };
    let thread = if style == Style::Oldest { ",iothread=t0" } else { "" };
    if style == Style::Oldest {
        command.args(["-object", "iothread,id=t0"]);
    }
    command.args(["-device", &format!("virtio-blk-pci,drive={drive},id=vda{thread}")]);
    command
}

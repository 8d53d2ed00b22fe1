//! A libvirt of the test's own.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::support::{run, text};

/// Debian's `nobody` and `nogroup`. libvirt's session daemon is for ordinary users; as root it would be the system's.
const NOBODY: u32 = 65534;
/// For what takes a second on a machine that is free.
const PATIENCE: Duration = Duration::from_secs(300);

/// The daemon, its folder, and the domain `vm1`.
pub(crate) struct LibvirtSession {
    folder: tempfile::TempDir,
    daemon: Child,
}

impl LibvirtSession {
    /// Starts it; `None` if something is not installed.
    pub(crate) fn start() -> Option<Self> {
        if !kit::are_here(&["libvirtd", "virsh", "qemu-system-x86_64", "qemu-img", "qemu-io", "setpriv"]) {
            return None;
        }
        let folder = tempfile::Builder::new().prefix("lv").tempdir().unwrap();
        let path = |name: &str| folder.path().join(name);
        for dir in ["run", "config/libvirt", "cache", "data", "vm"] {
            fs::create_dir_all(path(dir)).unwrap();
        }
        // The user may not be able to reach the folder where it was built.
        fs::copy(env!("CARGO_BIN_EXE_qmerge"), path("qmerge")).unwrap();
        // No second daemon for logs, and no rights that only root can give.
        let conf = "stdio_handler = \"file\"\nsecurity_driver = \"none\"\nremember_owner = 0\n";
        fs::write(path("config/libvirt/qemu.conf"), conf).unwrap();
        fs::set_permissions(path("run"), fs::Permissions::from_mode(0o700)).unwrap();
        for own in [".", "run", "config", "config/libvirt", "config/libvirt/qemu.conf", "cache", "data", "vm"]
        {
            give(&path(own));
        }
        let log = fs::File::create(path("libvirtd.log")).unwrap();
        let daemon = user(folder.path(), "libvirtd")
            .args(["--timeout", "3600"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap();
        let mut session = Self { folder, daemon };
        let start = Instant::now();
        while !session.virsh(&["list", "--all"]).status.success() {
            let ended = session.daemon.try_wait().unwrap();
            let log = fs::read_to_string(session.path("libvirtd.log")).unwrap();
            assert!(ended.is_none() && start.elapsed() < PATIENCE, "libvirtd: {ended:?}: {log}");
            thread::sleep(Duration::from_millis(50));
        }
        Some(session)
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    /// An image's path.
    pub(crate) fn image(&self, name: &str) -> String {
        self.path("vm").join(name).display().to_string()
    }

    /// A program, as the user whose libvirt this is, in the folder of the images.
    pub(crate) fn user(&self, program: &str) -> Command {
        let mut command = user(self.folder.path(), program);
        command.current_dir(self.path("vm"));
        command
    }

    pub(crate) fn virsh(&self, args: &[&str]) -> Output {
        self.user("virsh").args(["-q", "-c", "qemu:///session"]).args(args).output().unwrap()
    }

    #[track_caller]
    pub(crate) fn virsh_ok(&self, args: &[&str]) -> String {
        let output = self.virsh(args);
        assert!(output.status.success(), "virsh {args:?}: {}", text(&output.stderr));
        text(&output.stdout)
    }

    pub(crate) fn qmerge(&self, args: &[&str]) -> Output {
        self.user(self.path("qmerge").to_str().unwrap()).args(args).output().unwrap()
    }

    /// Types a line.
    #[track_caller]
    pub(crate) fn types(&self, line: &str) -> String {
        run(self.user("bash").args(["-c", line]))
    }

    /// The domain's monitor, which libvirt holds.
    pub(crate) fn monitor(&self) -> String {
        let lib = self.path("config/libvirt/qemu/lib");
        let mut domains = fs::read_dir(lib).unwrap().map(|entry| entry.unwrap().path());
        let folder =
            domains.find(|path| path.file_name().unwrap().to_str().unwrap().ends_with("-vm1")).unwrap();
        folder.join("monitor.sock").display().to_string()
    }

    /// Has the guest's device write or flush.
    #[track_caller]
    pub(crate) fn device(&self, alias: &str, io: &str) {
        let line = format!("qemu-io -d /machine/peripheral/{alias}/virtio-backend \"{io}\"");
        let said = self.virsh_ok(&["qemu-monitor-command", "vm1", "--hmp", &line]);
        assert_eq!(said.trim(), "", "{io}");
    }

    /// Reads through the node that the guest's device has, with these commands of qemu-io, each of which must find what it
    /// names. The monitor's own qemu-io does not tell whether it has.
    #[track_caller]
    pub(crate) fn reads(&self, alias: &str, commands: &[String]) {
        let ask = |command: Value| {
            let answer = self.virsh_ok(&["qemu-monitor-command", "vm1", &command.to_string()]);
            let answer: Value = serde_json::from_str(&answer).unwrap();
            assert!(answer["error"].is_null(), "{command}: {answer}");
            answer["return"].clone()
        };
        let blocks = ask(json!({"execute": "query-block"}));
        let qdev = format!("/machine/peripheral/{alias}/virtio-backend");
        let block = blocks.as_array().unwrap().iter().find(|block| block["qdev"] == qdev.as_str()).unwrap();
        let node = &block["inserted"]["node-name"];
        let socket = self.path("nbd");
        let address = json!({"type": "unix", "data": {"path": socket}});
        ask(json!({"execute": "nbd-server-start", "arguments": {"addr": address}}));
        let export = json!({"type": "nbd", "id": "x", "node-name": node, "name": "x"});
        ask(json!({"execute": "block-export-add", "arguments": export}));
        let mut reader = self.user("qemu-io");
        reader.args(["-r", "-f", "raw"]);
        for command in commands {
            reader.args(["-c", command]);
        }
        let output = reader.arg(format!("nbd+unix:///x?socket={}", socket.display())).output().unwrap();
        ask(json!({"execute": "nbd-server-stop"}));
        let said = text(&output.stdout) + &text(&output.stderr);
        assert!(output.status.success() && !said.contains("failed"), "{said}");
    }
}

impl Drop for LibvirtSession {
    fn drop(&mut self) {
        let _ = self.virsh(&["destroy", "vm1"]);
        let _ = self.daemon.kill();
        let _ = self.daemon.wait();
    }
}

/// A program as an ordinary user with folders of its own.
fn user(folder: &Path, program: &str) -> Command {
    let path = |name: &str| folder.join(name);
    let mut command = if rustix::process::geteuid().is_root() {
        let mut command = Command::new("setpriv");
        command.args([&format!("--reuid={NOBODY}"), &format!("--regid={NOBODY}"), "--clear-groups", program]);
        command
    } else {
        Command::new(program)
    };
    command
        .env("HOME", folder)
        .env("XDG_RUNTIME_DIR", path("run"))
        .env("XDG_CONFIG_HOME", path("config"))
        .env("XDG_CACHE_HOME", path("cache"))
        .env("XDG_DATA_HOME", path("data"))
        .env_remove("LIBVIRT_DEFAULT_URI");
    command
}

/// Gives a file to the user.
pub(crate) fn give(path: &Path) {
    if rustix::process::geteuid().is_root() {
        chown(path, Some(NOBODY), Some(NOBODY)).unwrap();
    }
}

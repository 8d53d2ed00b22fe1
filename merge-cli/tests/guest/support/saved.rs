//! A guest that has booted and waits for its first command, as a file from which QEMU goes on.

use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::OnceLock;

use rustix::fs::{FlockOperation, flock};
use serde_json::json;

use super::guest::{DISK_SIZE, Serial, frontends};
use super::initrd;
use super::process::{end, run};
use super::qemu::{MachineLine, Qemu};

/// Where the kernel lies, and all that is made of it.
pub(crate) fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../target/guest")
}

/// The machine that was booted, and the file with its state. Boots it if that has not been done yet: once for this
/// QEMU, kernel and init.
pub(crate) fn state() -> &'static (MachineLine, PathBuf) {
    static STATE: OnceLock<(MachineLine, PathBuf)> = OnceLock::new();
    STATE.get_or_init(|| {
        let folder = folder().canonicalize().unwrap();
        // Another run of these tests may be making the same.
        let lock = File::create(folder.join("lock")).unwrap();
        flock(&lock, FlockOperation::LockExclusive).unwrap();
        let key = key(&folder);
        let (state, archive) =
            (folder.join(format!("state-{key:016x}")), folder.join(format!("initrd-{key:016x}")));
        let machine = machine(&folder.join("vmlinuz"), &archive);
        if !(state.is_file() && archive.is_file()) {
            remove_older(&folder);
            initrd::make(&folder, &archive);
            let half_made = state.with_extension("new");
            boot_and_save(&machine, &half_made);
            fs::rename(half_made, &state).unwrap();
        }
        (machine, state)
    })
}

fn machine(kernel: &Path, archive: &Path) -> MachineLine {
    let options = "console=ttyS0 quiet panic=-1 rdinit=/init nokaslr mitigations=off tsc=reliable \
                   no_timer_check lpj=1000000";
    let (kernel, archive) = (kernel.to_str().unwrap(), archive.to_str().unwrap());
    let boot = ["-kernel", kernel, "-initrd", archive, "-append", options, "-serial", "stdio"];
    MachineLine::bare().with(&boot)
}

/// Changes with everything that the state depends on.
fn key(folder: &Path) -> u64 {
    let mut hasher = DefaultHasher::new();
    for source in ["init.rs", "record.rs", "../kit/src/random.rs"] {
        fs::read(initrd::sources().join(source)).unwrap().hash(&mut hasher);
    }
    let kernel = fs::metadata(folder.join("vmlinuz")).unwrap();
    (kernel.len(), kernel.mtime_nsec(), kernel.mtime()).hash(&mut hasher);
    end(Command::new("qemu-system-x86_64").arg("--version")).ok().out.hash(&mut hasher);
    machine(Path::new(""), Path::new("")).args.hash(&mut hasher);
    (DISK_SIZE, frontends()).hash(&mut hasher);
    hasher.finish()
}

fn remove_older(folder: &Path) {
    for entry in fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_str().unwrap();
        if name.starts_with("state-") || name.starts_with("initrd-") {
            fs::remove_file(&path).unwrap();
        }
    }
}

fn boot_and_save(machine: &MachineLine, state: &Path) {
    let folder = tempfile::tempdir().unwrap();
    let mut machine = machine.clone();
    for disk in ["vda", "vdb", "vdc"] {
        run(folder.path(), &["qemu-img", "create", "-q", "-f", "raw", disk, DISK_SIZE]);
        machine = machine.with(&["-drive", &format!("file={disk},if=none,id=drive-{disk},format=raw")]);
    }
    let (qemu, input, output) = Qemu::start(folder.path(), &machine.with(&frontends()));
    let serial = Serial::new(input, output);
    serial.answer("ready");
    qemu.ask("migrate", json!({"uri": format!("file:{}", state.display())}));
    qemu.until("the saved state", |q| {
        let status = q.ask("query-migrate", json!({}))["status"].clone();
        assert!(status != "failed" && status != "cancelled", "{status}");
        status == "completed"
    });
}

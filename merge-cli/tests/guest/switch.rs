//! The switch of an intermediate merge, system call by system call.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::process::{Child, Command, Stdio};

use rustix::process::{Pid, Signal};

use crate::support::{Lab, MachineLine, Qemu, qemu_present};

const CHAIN: [&str; 4] = ["base.qcow2", "a.qcow2", "b.qcow2", "c.qcow2"];

/// A tracer of QEMU's calls; it ends with the value.
struct Tracer(Child);

impl Tracer {
    /// Attaches to all threads of the process.
    fn attach(qemu: &Qemu, options: &[&str]) -> Self {
        let process = qemu.process().as_raw_nonzero().to_string();
        let tracer = Command::new("strace")
            .args(["-f", "-qq", "-y", "-p", &process])
            .args(options)
            .current_dir(qemu.dir())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        let traced = |status: String| {
            status
                .lines()
                .any(|line| line.strip_prefix("TracerPid:").is_some_and(|tracer| tracer.trim() != "0"))
        };
        qemu.until("the tracer", |_| {
            let threads = fs::read_dir(format!("/proc/{process}/task")).unwrap();
            let status = |thread: fs::DirEntry| fs::read_to_string(thread.path().join("status"));
            threads.filter_map(Result::ok).all(|thread| status(thread).is_ok_and(traced))
        });
        Self(tracer)
    }

    /// Lets go of the process, so that the log is whole.
    fn detach(mut self) {
        let process = Pid::from_child(&self.0);
        rustix::process::kill_process(process, Signal::TERM).unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Tracer {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A machine that does not run, with the chain as its only disk.
fn machine(lab: &Lab) -> Qemu {
    let image = lab.dir().join(CHAIN[3]);
    let drive = format!("file={},if=none,id=drive0,format=qcow2", image.display());
    let machine =
        MachineLine::bare().with(&["-S", "-drive", &drive, "-device", "virtio-blk-pci,drive=drive0,id=vda"]);
    Qemu::start(lab.dir(), &machine).0
}

/// Killed at the n-th call of each kind on each image that the switch touches, for each n, until it survives.
#[test]
fn qemu_may_be_killed_at_any_call_of_the_switch() {
    if !qemu_present() || !kit::are_here(&["strace"]) {
        return;
    }
    let made = Lab::new();
    made.chain(&CHAIN);
    let before = made.bytes(CHAIN[3]);
    let mut killed_when = [0, 0];
    for (image, call) in [(CHAIN[0], "fdatasync"), (CHAIN[3], "pwrite64"), (CHAIN[3], "fdatasync")] {
        for nth in 1.. {
            let lab = Lab::new();
            for image in CHAIN {
                fs::copy(made.dir().join(image), lab.dir().join(image)).unwrap();
            }
            let mut qemu = machine(&lab);
            qemu.commit(&["vda", "--top", "[3]", "--async"]).ok();
            qemu.job_becomes("pending");
            let path = lab.dir().join(image);
            let (trace, inject) =
                (format!("trace={call}"), format!("inject={call}:signal=SIGKILL:when={nth}"));
            let options = ["-o", "/dev/null", "-P", path.to_str().unwrap(), "-e", &trace, "-e", &inject];
            let tracer = Tracer::attach(&qemu, &options);
            let ended = qemu.live(&["finish", "vda"]);
            drop(tracer);
            let lives = ended.code == Some(0);
            if lives {
                assert!(qemu.lives());
            } else {
                ended.fails(1, &["hint: "]);
                assert_eq!(qemu.ended().signal(), Some(9));
            }
            drop(qemu);
            let switched = lab.run(&["qemu-img", "info", CHAIN[3]]).contains("backing file: base.qcow2");
            assert!(lab.bytes(CHAIN[3]) == before, "other bytes after {call} {nth} on {image}: {switched}");
            if lives {
                break;
            }
            killed_when[usize::from(switched)] += 1;
        }
    }
    // Before the header was written, and after it.
    assert!(killed_when[0] > 0 && killed_when[1] > 0, "{killed_when:?}");
}

/// QEMU writes the header and does not sync it, where the overlay above top is the active layer.
#[test]
fn an_overlays_new_header_is_durable_before_its_old_backing_file_is_removed() {
    if !qemu_present() || !kit::are_here(&["strace"]) {
        return;
    }
    let lab = Lab::new();
    lab.chain(&CHAIN);
    let qemu = machine(&lab);
    let tracer = Tracer::attach(&qemu, &["-o", "calls", "-e", "trace=pwrite64,fdatasync"]);
    qemu.commit(&["vda", "--top", "[3]", "--delete"]).ok();
    tracer.detach();
    assert!(!lab.dir().join(CHAIN[2]).exists());
    let calls = fs::read_to_string(lab.dir().join("calls")).unwrap();
    let of = |call: &str, image: &str| {
        calls
            .lines()
            .enumerate()
            .filter(|(_, l)| l.contains(call) && l.contains(image))
            .map(|(at, _)| at)
            .last()
    };
    let written = of("pwrite64(", "/c.qcow2>").unwrap();
    let synced = of("fdatasync(", "/c.qcow2>").unwrap_or_else(|| panic!("never synced: {calls}"));
    assert!(written < synced, "{calls}");
    // The base that the header names now was durable before.
    assert!(of("fdatasync(", "/base.qcow2>").unwrap() < written, "{calls}");
}

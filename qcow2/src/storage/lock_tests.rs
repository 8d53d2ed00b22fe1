//! The locks against real QEMU processes, both ways, and the search for who holds a file.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};

use super::{Access, Host, LockError, LockMode, OsHost, Storage};

/// Whether QEMU's tools are there. Without them these tests have no oracle; in CI that is a failure.
fn qemu() -> bool {
    kit::qemu_is_here()
}

fn run(program: &str, args: &[&str], image: &Path) -> Output {
    Command::new(program).args(args).arg(image).stdin(Stdio::null()).output().unwrap()
}

fn image(dir: &Path, format: &str) -> PathBuf {
    let path = dir.join(format!("image.{format}"));
    let made = Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(&path).arg("1M").status();
    assert!(made.unwrap().success());
    path
}

/// A `qemu-io` that has an image open until it is dropped.
struct QemuIo(Child);

impl QemuIo {
    fn open(args: &[&str], image: &Path) -> Self {
        let mut child = Command::new("qemu-io")
            .args(args)
            .arg(image)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        // It answers only after it has opened the image and taken its locks.
        child.stdin.as_mut().unwrap().write_all(b"length\n").unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.as_mut().unwrap()).read_line(&mut line).unwrap();
        assert!(line.contains("1 MiB"), "qemu-io opened {}: {line:?}", image.display());
        Self(child)
    }
}

impl Drop for QemuIo {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Directories to test in: the usual file system and tmpfs.
fn dirs() -> [tempfile::TempDir; 2] {
    [std::env::temp_dir(), "/dev/shm".into()]
        .map(|parent| tempfile::Builder::new().prefix("qcow2-locks-").tempdir_in(parent).unwrap())
}

fn held_byte(result: Result<(), LockError>) -> Option<u64> {
    match result {
        Ok(()) => None,
        Err(LockError::Held { byte }) => Some(byte),
        Err(LockError::Io(e)) => panic!("{e}"),
    }
}

/// What QEMU can do with an image that we hold: (program, arguments, with our read lock, with our write
/// lock).
const ALLOWED: &[(&str, &[&str], bool, bool)] = &[
    ("qemu-io", &["-c", "write 0 512"], false, false),
    ("qemu-io", &["-r", "-c", "read 0 512"], true, false),
    ("qemu-io", &["-r", "-U", "-c", "read 0 512"], true, false),
    ("qemu-img", &["info"], true, false),
    ("qemu-img", &["info", "-U"], true, true),
    ("qemu-img", &["map"], true, false),
    ("qemu-img", &["check"], true, false),
];

#[test]
fn qemu_respects_our_locks() {
    if !qemu() {
        return;
    }
    for dir in dirs() {
        for format in ["qcow2", "raw"] {
            let image = image(dir.path(), format);
            for access in [Access::Read, Access::ReadWrite] {
                for mode in [LockMode::Read, LockMode::Write] {
                    let file = OsHost.open_file(&image, access).unwrap();
                    file.lock(mode).unwrap();
                    for &(program, args, with_read, with_write) in ALLOWED {
                        let mut args = args.to_vec();
                        if format == "raw" && matches!(args.first(), Some(&("check" | "info"))) {
                            // A raw image has nothing to check, and `info` does not read from it.
                            continue;
                        }
                        args.extend(["-f", format]);
                        let output = run(program, &args, &image);
                        let expected = if mode == LockMode::Read { with_read } else { with_write };
                        assert_eq!(
                            output.status.success(),
                            expected,
                            "{program} {args:?} while we hold {mode:?}: {}",
                            String::from_utf8_lossy(&output.stderr)
                        );
                        if !expected {
                            let text = String::from_utf8_lossy(&output.stderr);
                            assert!(text.contains("lock"), "refused for another reason: {text}");
                        }
                    }
                }
            }
            assert!(
                run("qemu-io", &["-f", format, "-c", "write 0 512"], &image).status.success(),
                "nothing stays locked behind us"
            );
        }
    }
}

#[test]
fn we_respect_the_locks_of_qemu() {
    if !qemu() {
        return;
    }
    for dir in dirs() {
        let image = image(dir.path(), "qcow2");
        let lock = |mode| held_byte(OsHost.open_file(&image, Access::ReadWrite).unwrap().lock(mode));

        let writer = QemuIo::open(&["-f", "qcow2"], &image);
        assert_eq!(lock(LockMode::Read), Some(101));
        assert!(lock(LockMode::Write).is_some());
        drop(writer);

        let reader = QemuIo::open(&["-f", "qcow2", "-r"], &image);
        assert_eq!(lock(LockMode::Read), None, "readers share");
        assert!(lock(LockMode::Write).is_some());
        drop(reader);

        let sharer = QemuIo::open(&["-f", "qcow2", "-r", "-U"], &image);
        assert_eq!(lock(LockMode::Read), None);
        assert_eq!(lock(LockMode::Write), Some(100), "even a reader that tolerates writers");
        drop(sharer);

        assert_eq!(lock(LockMode::Write), None);
    }
}

#[test]
fn a_refused_lock_leaves_nothing_behind() {
    if !qemu() {
        return;
    }
    let [dir, _] = dirs();
    let image = image(dir.path(), "qcow2");
    let reader = QemuIo::open(&["-f", "qcow2", "-r"], &image);
    let file = OsHost.open_file(&image, Access::ReadWrite).unwrap();
    assert!(file.lock(LockMode::Write).is_err());
    drop(reader);
    let writes = || run("qemu-io", &["-f", "qcow2", "-c", "write 0 512"], &image).status.success();
    assert!(writes(), "the file is still open, but holds no lock");

    file.lock(LockMode::Read).unwrap();
    let reader = QemuIo::open(&["-f", "qcow2", "-r"], &image);
    assert!(file.lock(LockMode::Write).is_err());
    let second = QemuIo::open(&["-f", "qcow2", "-r"], &image);
    assert!(!writes(), "the read lock from before is still held");
    drop((reader, second));
    assert!(!writes());
    file.lock(LockMode::Write).unwrap();
    assert!(!run("qemu-img", &["check", "-f", "qcow2"], &image).status.success());
}

#[test]
fn a_whole_file_lock_of_a_stranger_is_a_conflict() {
    use nix::fcntl::{FcntlArg, fcntl};
    use nix::libc;
    let [dir, _] = dirs();
    let path = dir.path().join("image");
    let stranger = std::fs::File::options().write(true).create_new(true).open(&path).unwrap();
    let whole = |kind: i32| libc::flock {
        l_type: kind as libc::c_short,
        l_whence: libc::SEEK_SET as libc::c_short,
        l_start: 0,
        l_len: 0,
        l_pid: 0,
    };
    fcntl(&stranger, FcntlArg::F_OFD_SETLK(&whole(libc::F_WRLCK))).unwrap();
    let file = OsHost.open_file(&path, Access::Read).unwrap();
    assert_eq!(held_byte(file.lock(LockMode::Read)), Some(100));
    fcntl(&stranger, FcntlArg::F_OFD_SETLK(&whole(libc::F_UNLCK))).unwrap();
    assert_eq!(held_byte(file.lock(LockMode::Read)), None);
}

#[test]
fn who_has_a_file_open_is_found() {
    if !qemu() {
        return;
    }
    for dir in dirs() {
        let image = image(dir.path(), "qcow2");
        let mine = OsHost.open_file(&image, Access::Read).unwrap();
        let id = mine.stat().unwrap().id;
        // A process that another test is just starting may have this one's files for an instant; only
        // those that run QEMU count.
        let holders = || {
            let mut found = OsHost.holders(id);
            assert!(found.iter().all(|h| h.pid != std::process::id()), "this process itself does not count");
            found.retain(|h| h.name == "qemu-io");
            found
        };
        assert_eq!(holders(), []);
        let other = QemuIo::open(&["-f", "qcow2", "-r"], &image);
        let found = holders();
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].pid, other.0.id());
        assert_eq!(found[0].command_line[1..], ["-f", "qcow2", "-r", image.to_str().unwrap()]);
        drop(other);
        assert_eq!(holders(), []);
    }
}

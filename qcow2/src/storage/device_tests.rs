//! Block devices, and a sync that really fails. Both need loop devices, so root.

use std::fs::File;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{Access, CopyError, FileKind, Host, LockMode, MemFile, OsHost};

/// A block device made of a file; taken down when dropped.
struct Loop(PathBuf);

impl Loop {
    fn over(file: &Path) -> Option<Self> {
        let made = Command::new("losetup").args(["--find", "--show"]).arg(file).output();
        match made {
            Ok(output) if output.status.success() => {
                Some(Self(String::from_utf8(output.stdout).unwrap().trim().into()))
            }
            other => {
                kit::not_tried(&format!(
                    "no loop device can be made, so block devices were not tested: {other:?}"
                ));
                None
            }
        }
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").arg("--detach").arg(&self.0).status();
    }
}

/// A small tmpfs; unmounted when dropped.
struct Mounted<'a>(&'a Path);

impl<'a> Mounted<'a> {
    fn on(dir: &'a Path) -> Option<Self> {
        let status = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1m", "none"]).arg(dir).status();
        if status.is_ok_and(|s| s.success()) {
            return Some(Self(dir));
        }
        kit::not_tried("nothing can be mounted, so a failing sync was not tested");
        None
    }
}

impl Drop for Mounted<'_> {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("--lazy").arg(self.0).status();
    }
}

const SIZE: u64 = 4 << 20;

fn backing(dir: &Path) -> PathBuf {
    let path = dir.join("backing");
    File::create_new(&path).unwrap().set_len(SIZE).unwrap();
    path
}

#[test]
fn block_devices_are_zeroed_and_never_discarded() {
    let dir = tempfile::Builder::new().prefix("qcow2-device-").tempdir().unwrap();
    let path = backing(dir.path());
    let Some(device) = Loop::over(&path) else { return };
    let file = OsHost.open(&device.0, Access::ReadWrite).unwrap();
    let stat = file.stat().unwrap();
    assert_eq!((stat.kind, stat.len, stat.id.device), (FileKind::Block, SIZE, 0));
    let by_name = OsHost.stat(&device.0).unwrap();
    assert_eq!((by_name.kind, by_name.len, by_name.id), (stat.kind, stat.len, stat.id));

    let mut model = vec![7; SIZE as usize];
    file.write_all_at(&model, 0).unwrap();
    file.sync().unwrap();
    let allocated = || {
        file.sync().unwrap();
        File::open(&path).unwrap().sync_all().unwrap();
        OsHost.stat(&path).unwrap().allocated
    };
    let full = allocated();
    assert!(full >= SIZE);
    for (offset, len) in [(0, 4096), (5000, 100), (10_000, 100_000), (1 << 20, 1 << 20), (SIZE - 1, 1)] {
        file.write_zeroes(offset, len).unwrap();
        model[offset as usize..(offset + len) as usize].fill(0);
        let mut got = vec![1; SIZE as usize + 1];
        assert_eq!(file.read_at(&mut got, 0).unwrap() as u64, SIZE);
        assert!(got[..SIZE as usize] == model, "{offset}+{len}");
    }
    file.punch_hole(2 << 20, 1 << 20).unwrap();
    let mut got = vec![1; SIZE as usize];
    file.read_at(&mut got, 0).unwrap();
    assert!(got == model, "a device keeps what is punched");
    assert!(allocated() >= full, "nothing was discarded");

    assert_eq!(file.next_data(12_345).unwrap(), Some(12_345..SIZE), "a device cannot tell");
    assert_eq!(file.next_data(SIZE).unwrap(), None);
    file.set_len(SIZE).unwrap();
    file.set_len(100).unwrap();
    assert_eq!(file.size().unwrap(), SIZE);
    assert_eq!(file.set_len(SIZE + 1).unwrap_err().kind(), ErrorKind::StorageFull);
    assert_eq!(file.write_zeroes(SIZE - 4096, 8192).unwrap_err().kind(), ErrorKind::StorageFull);
    assert!(file.write_all_at(&[1; 2], SIZE - 1).is_err());
    assert!(file.view().is_none());

    let other = OsHost.create_new(&dir.path().join("copy")).unwrap();
    other.copy_from(&*file, 1000, 50, SIZE - 1000).unwrap();
    let mut copied = vec![1; SIZE as usize - 1000];
    other.read_at(&mut copied, 50).unwrap();
    let mut now = vec![1; SIZE as usize];
    file.read_at(&mut now, 0).unwrap();
    assert!(copied == now[1000..]);
    file.copy_from(&*other, 50, 0, 1 << 20).unwrap();
    file.read_at(&mut now, 0).unwrap();
    assert!(now[..1 << 20] == copied[..1 << 20]);

    file.lock(LockMode::Write).unwrap();
    let second = OsHost.open(&device.0, Access::Read).unwrap();
    assert!(second.lock(LockMode::Read).is_err(), "devices are locked like files");
    file.drop_cache().unwrap();
}

#[test]
fn a_failed_sync_is_final() {
    let dir = tempfile::Builder::new().prefix("qcow2-sync-").tempdir().unwrap();
    let Some(mounted) = Mounted::on(dir.path()) else { return };
    let path = backing(mounted.0);
    let Some(device) = Loop::over(&path) else { return };
    let file = OsHost.open(&device.0, Access::ReadWrite).unwrap();
    file.write_all_at(&[7; 4096], 0).unwrap();
    file.sync().unwrap();
    // More than the file system below has room for; the page cache takes it all.
    file.write_all_at(&vec![7; SIZE as usize], 0).unwrap();
    let first = file.sync().unwrap_err();
    assert!(file.sync().is_err(), "the system itself reports a failure only once");
    let errors = [
        file.write_all_at(&[1], 0),
        file.write_zeroes(0, 4096),
        file.punch_hole(0, 4096),
        match file.copy_from(&MemFile::new(), 0, 0, 10) {
            Err(CopyError::Write { source, .. }) => Err(source),
            other => panic!("{other:?}"),
        },
        file.set_len(1),
        file.drop_cache(),
    ];
    for result in errors {
        let e = result.unwrap_err();
        assert_eq!(e.kind(), first.kind());
        assert!(e.to_string().contains("earlier sync"), "{e}");
    }
    assert_eq!(file.read_at(&mut [0; 16], 0).unwrap(), 16, "reading goes on");
}

//! The guest's initial file system: its init, built by the compiler that is here, and the kernel's modules.

use std::fs;
use std::path::{Path, PathBuf};

use super::process::run;

/// The modules that init loads.
const MODULES: [&str; 6] =
    ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"];

/// Where init's source lies.
pub(crate) fn sources() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../testdata/guest")
}

/// Builds init, and writes an archive with it and the modules of `kernel_folder`.
pub(crate) fn make(kernel_folder: &Path, archive: &Path) {
    let init = archive.with_extension("init");
    let (init_name, source) = (init.to_str().unwrap(), sources().join("init.rs"));
    // Static, because there is no library in the guest.
    let options = ["--edition=2024", "-O", "-Ctarget-feature=+crt-static", "-Cstrip=symbols"];
    let line = [&["rustc"], options.as_slice(), &["-o", init_name, source.to_str().unwrap()]].concat();
    run(kernel_folder, &line);
    let mut cpio = Cpio::default();
    cpio.folder("dev");
    // The kernel opens it for init, whose standard library wants its three standard files.
    cpio.device("dev/console", 5, 1);
    cpio.file("init", 0o755, &fs::read(&init).unwrap());
    for name in MODULES {
        let module = format!("{name}.ko");
        cpio.file(&module, 0o644, &fs::read(kernel_folder.join(&module)).unwrap());
    }
    fs::write(archive, cpio.finish()).unwrap();
    fs::remove_file(init).unwrap();
}

/// A writer of the archive format that the kernel unpacks (`newc`, in the kernel's buffer-format.rst).
#[derive(Default)]
struct Cpio {
    bytes: Vec<u8>,
    entries: u32,
}

impl Cpio {
    fn folder(&mut self, name: &str) {
        self.entry(name, 0o040_755, (0, 0), &[]);
    }

    fn device(&mut self, name: &str, major: u32, minor: u32) {
        self.entry(name, 0o020_600, (major, minor), &[]);
    }

    fn file(&mut self, name: &str, permissions: u32, content: &[u8]) {
        self.entry(name, 0o100_000 | permissions, (0, 0), content);
    }

    fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, (0, 0), &[]);
        self.bytes
    }

    fn entry(&mut self, name: &str, mode: u32, device: (u32, u32), content: &[u8]) {
        self.entries += 1;
        let (size, name_size) =
            (u32::try_from(content.len()).unwrap(), u32::try_from(name.len() + 1).unwrap());
        // Inode, mode, owner, group, links, time, size, the device that it is on, the device that it is, name, sum.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, device.0, device.1, name_size, 0];
        self.bytes.extend(b"070701");
        for field in fields {
            self.bytes.extend(format!("{field:08x}").bytes());
        }
        self.bytes.extend(name.bytes().chain([0]));
        self.align();
        self.bytes.extend(content);
        self.align();
    }

    fn align(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

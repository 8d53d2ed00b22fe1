//! Before the damage: the samples are what QEMU takes for sound images.

use std::fs;
use std::process::Command;

use qcow2::fuzzing::images;

#[test]
fn samples_are_sound_to_qemu() {
    if !kit::qemu_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("base.raw"), vec![0xba; 60 * 512]).unwrap();
    fs::write(dir.path().join("data.raw"), vec![0xda; 100 * 512]).unwrap();
    for (name, bytes) in images() {
        let file = dir.path().join(name);
        fs::write(&file, bytes).unwrap();
        for args in [&["check", "-q", "-f", "qcow2"][..], &["convert", "-f", "qcow2", "-O", "raw"]] {
            let mut call = Command::new("qemu-img");
            // QEMU looks for a data file in the current directory.
            call.current_dir(dir.path()).args(args).arg(&file);
            if args[0] == "convert" {
                call.arg(dir.path().join("out.raw"));
            }
            let out = call.output().unwrap();
            let said = String::from_utf8_lossy(&out.stderr);
            assert!(out.status.success() && said.is_empty(), "{name}: qemu-img {}: {said}", args[0]);
        }
    }
}

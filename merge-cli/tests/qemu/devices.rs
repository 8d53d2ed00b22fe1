//! Block devices as bases: loop devices, so these tests need root.

use std::process::Command;

use kit::{Holder, Lab, are_here, skipped};

use crate::support::lab;

/// A loop device over a file; taken down when dropped.
struct Device(String);

impl Device {
    /// A device of `size` bytes, full of bytes that are not zero.
    fn new(folder: &Lab, name: &str, size: u64) -> Option<Self> {
        folder.raw(name, size, size, 0xee);
        let made = Command::new("losetup").args(["--find", "--show"]).arg(folder.join(name)).output();
        match made {
            Ok(output) if output.status.success() => {
                Some(Self(String::from_utf8(output.stdout).unwrap().trim().to_owned()))
            }
            other => {
                skipped(&format!("no loop device can be made, so block devices are not tested: {other:?}"));
                None
            }
        }
    }
}

impl Drop for Device {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

const MIB: u64 = 1 << 20;

#[test]
fn a_raw_block_device_takes_data_and_zeros() {
    if !are_here(&["qemu-img", "qemu-io", "losetup"]) {
        return;
    }
    let folder = lab("raw-device");
    let Some(device) = Device::new(&folder, "disk.img", 16 * MIB) else { return };
    folder.overlay("a.qcow2", &device.0, "raw", None, "");
    folder.io("qcow2", "a.qcow2", &["write -P 5 1M 3M", "write -z 6M 5M", "write -P 7 15M 1000"]);
    folder.overlay("b.qcow2", "a.qcow2", "qcow2", None, "");
    folder.io("qcow2", "b.qcow2", &["write -P 9 2M 1M", "write -z 4096 512"]);
    let shown = folder.view("qcow2", "b.qcow2");
    folder.merge("b.qcow2", &["--verify", "--journal-dir", "."]);
    folder.view("raw", &device.0).assert_same(&shown, "the device");
}

#[test]
fn a_qcow2_base_on_a_block_device_never_trusts_what_lies_there() {
    if !are_here(&["qemu-img", "qemu-io", "losetup"]) {
        return;
    }
    for options in ["", "cluster_size=4096", "compat=0.10", "extended_l2=on"] {
        let folder = lab("qcow2-device");
        // The device is full of 0xee: what the merge allocates must not show it.
        let Some(device) = Device::new(&folder, "disk.img", 24 * MIB) else { return };
        folder.create(&device.0, 64 * MIB, options);
        folder.io("qcow2", &device.0, &["write -P 3 0 4M"]);
        folder.overlay("a.qcow2", &device.0, "qcow2", None, "cluster_size=512");
        folder.io(
            "qcow2",
            "a.qcow2",
            &["write -P 5 2M 5M", "write -z 1M 1M", "write -P 6 20M 700", "write -P 6 30M 512"],
        );
        let shown = folder.view("qcow2", "a.qcow2");
        folder.merge("a.qcow2", &["--verify", "--journal-dir", "."]);
        folder.view("qcow2", &device.0).assert_same(&shown, options);
        folder.check_clean(&device.0);
    }
}

#[test]
fn a_block_device_that_is_too_small_is_refused_with_the_size_that_it_needs() {
    if !are_here(&["qemu-img", "qemu-io", "losetup"]) {
        return;
    }
    let folder = lab("small-device");
    let Some(device) = Device::new(&folder, "disk.img", 8 * MIB) else { return };
    folder.overlay("a.qcow2", &device.0, "raw", Some(9 * MIB), "");
    folder.io("qcow2", "a.qcow2", &["write -P 5 0 64k"]);
    folder
        .refused(&["commit", "a.qcow2", "--journal-dir", "."], &[8])
        .says("9437184")
        .says("enlarge the device");
    std::fs::remove_file(folder.join("a.qcow2")).unwrap();
    folder.create(&device.0, 64 * MIB, "");
    folder.overlay("b.qcow2", &device.0, "qcow2", None, "");
    folder.io("qcow2", "b.qcow2", &["write -P 5 0 9M"]);
    folder.refused(&["commit", "b.qcow2", "--journal-dir", "."], &[8]).says("enlarge the device");
}

#[test]
fn a_flatten_onto_a_device_leaves_nothing_of_what_that_held() {
    if !are_here(&["qemu-img", "qemu-io", "losetup"]) {
        return;
    }
    let folder = lab("flatten-device");
    let Some(device) = Device::new(&folder, "disk.img", 16 * MIB) else { return };
    folder.raw("base.raw", 8 * MIB, 2 * MIB, 1);
    folder.overlay("vm.qcow2", "base.raw", "raw", Some(9 * MIB + 512), "cluster_size=4k");
    folder.io("qcow2", "vm.qcow2", &["write -P 5 1M 700k", "write -z 64k 128k", "write -P 0 4M 64k"]);
    folder.io("qcow2", "vm.qcow2", &["write -c -P 7 5M 4k", "write -P 9 9M 512"]);
    let shown = folder.view("qcow2", "vm.qcow2");
    let onto = |to: &'static str, more: &[&'static str]| {
        let args = ["flatten", "vm.qcow2", "-o", &device.0, "--to", to];
        [&args[..], more].concat().iter().map(|word| (*word).to_owned()).collect::<Vec<_>>()
    };
    let words = |args: &[String]| args.iter().map(String::as_str).collect::<Vec<_>>().join(" ");
    let run = |args: &[String]| folder.qmerge(&args.iter().map(String::as_str).collect::<Vec<_>>());
    // Without a word on the device, and in use.
    let plain = onto("raw", &[]);
    let files = folder.files();
    // The hint is not typed here, but below: a device is not thrown away with the changes of a typed hint.
    let refused = folder.call(&plain.iter().map(String::as_str).collect::<Vec<_>>()).expect(6);
    folder.assert_unchanged(&files, &refused);
    refused.says(&format!("qmerge {} --onto-device", words(&plain)));
    let asked = onto("raw", &["--onto-device"]);
    {
        let _user = Holder::qemu_io(folder.dir(), &["-f", "raw"], &device.0);
        folder.refused(&asked.iter().map(String::as_str).collect::<Vec<_>>(), &[5]);
    }
    run(&asked).ok();
    let there = folder.view("raw", &device.0);
    there.assert_same_range(&shown, 0, 9 * MIB + 512, "the disk");
    there.assert_all(9 * MIB + 512, 16 * MIB, 0, "behind the disk");
    // Another image over that one.
    for more in [&["--onto-device"][..], &["--onto-device", "--keep-zeros"]] {
        folder.io("raw", &device.0, &["write -P 0xee 0 16M"]);
        run(&onto("qcow2", more)).ok();
        folder.view("qcow2", &device.0).assert_same(&shown, "the image");
        folder.check_clean(&device.0);
    }
    folder.refused(&["flatten", "vm.qcow2", "-o", "new", "--onto-device"], &[1]);
    folder.refused(&["flatten", "vm.qcow2", "-o", "base.raw", "--onto-device"], &[2]).says("no block device");
    folder.overlay("top.qcow2", &device.0, "qcow2", None, "");
    folder.refused(&["flatten", "top.qcow2", "-o", &device.0, "--onto-device"], &[2]).says("holds a layer");
    folder.create("large.qcow2", 17 * MIB, "");
    let large = ["flatten", "large.qcow2", "-o", &device.0, "--onto-device", "--to", "raw"];
    folder.refused(&large, &[8]).says("17825792");
}

#[test]
fn a_mounted_device_is_not_written() {
    if !are_here(&["qemu-img", "losetup", "mkfs.ext4"]) {
        return;
    }
    let folder = lab("mounted-device");
    let Some(device) = Device::new(&folder, "disk.img", 16 * MIB) else { return };
    folder.create("vm.qcow2", MIB, "");
    folder.run("mkfs.ext4", &["-q", "-F", &device.0]).ok();
    let on = folder.arg("on");
    std::fs::create_dir(&on).unwrap();
    if folder.run("mount", &["-o", "ro", &device.0, &on]).code != 0 {
        skipped("nothing can be mounted here");
        return;
    }
    let run = folder.qmerge(&["flatten", "vm.qcow2", "-o", &device.0, "--onto-device"]);
    folder.run("umount", &[&on]).ok();
    run.expect(5);
    folder.run("e2fsck", &["-fn", &device.0]).ok();
}

/// A small XFS in a file, mounted; unmounted when dropped.
struct Xfs(std::path::PathBuf);

impl Xfs {
    fn new(folder: &Lab) -> Option<Self> {
        folder.raw("xfs.img", 400 * MIB, 0, 0);
        let on = folder.join("xfs");
        std::fs::create_dir(&on).unwrap();
        let done = |command: &mut Command| command.output().is_ok_and(|output| output.status.success());
        let made = done(Command::new("mkfs.xfs").args(["-q", "-m", "reflink=1"]).arg(folder.join("xfs.img")))
            && done(Command::new("mount").args(["-o", "loop"]).arg(folder.join("xfs.img")).arg(&on));
        if !made {
            skipped("no XFS can be made and mounted, so sharing of blocks is not tested");
            return None;
        }
        Some(Self(on))
    }
}

impl Drop for Xfs {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_merge_that_shares_blocks_needs_no_room_for_them() {
    if !are_here(&["qemu-img", "qemu-io"]) {
        return;
    }
    let folder = lab("shared-blocks");
    let Some(_xfs) = Xfs::new(&folder) else { return };
    folder.create("xfs/base.qcow2", 1024 * MIB, "");
    folder.overlay("xfs/a.qcow2", "base.qcow2", "qcow2", Some(1024 * MIB), "");
    // More than half of the file system: a copy would not fit.
    folder.io("qcow2", "xfs/a.qcow2", &["write -P 5 3M 200M"]);
    folder.qmerge(&["commit", "xfs/a.qcow2", "--verify"]).ok();
    folder.io("qcow2", "xfs/base.qcow2", &["read -P 5 3M 200M", "read -P 0 0 3M"]);
    folder.check_clean("xfs/base.qcow2");
}

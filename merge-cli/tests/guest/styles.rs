//! The ways in which a disk is given to QEMU: a merge must go the same with each. The machines never run, so these tests
//! are quick.

use std::fs;

use serde_json::{Value, json};

use crate::support::{Lab, MachineLine, Qemu, qemu_present};

const CHAIN: [&str; 4] = ["base.qcow2", "a.qcow2", "b.qcow2", "c.qcow2"];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum DriveStyle {
    /// `-drive if=virtio`
    Drive,
    /// `-drive if=none,id=` and `-device`
    DriveId,
    /// `-blockdev` for the active layer; QEMU finds the others.
    BlockdevTop,
    /// `-blockdev` for every layer and every file, as libvirt does.
    Blockdev,
}

impl DriveStyle {
    /// What `live list` calls the disk.
    fn disk(self) -> &'static str {
        if self == Self::Drive { "virtio0" } else { "vda" }
    }

    fn machine(self, lab: &Lab) -> MachineLine {
        let path = |name: &str| lab.dir().join(name).display().to_string();
        let active = path(CHAIN[3]);
        let machine = MachineLine::bare().with(&["-S"]);
        match self {
            Self::Drive => machine.with(&["-drive", &format!("file={active},if=virtio,format=qcow2")]),
            Self::DriveId => machine
                .with(&["-drive", &format!("file={active},if=none,id=drive0,format=qcow2")])
                .with(&["-device", "virtio-blk-pci,drive=drive0,id=vda"]),
            Self::BlockdevTop => {
                let file = json!({"driver": "file", "filename": active});
                let node = json!({"driver": "qcow2", "node-name": "top", "file": file});
                machine.with(&["-blockdev", &node.to_string(), "-device", "virtio-blk-pci,drive=top,id=vda"])
            }
            Self::Blockdev => {
                let mut machine = machine;
                let mut below = Value::Null;
                for (n, name) in CHAIN.iter().enumerate() {
                    let (file, format) = (format!("file{n}"), format!("format{n}"));
                    let read_only = n != 3;
                    let protocol = json!({
                        "driver": "file", "filename": path(name), "node-name": file, "auto-read-only": true,
                        "discard": "unmap",
                    });
                    let node = json!({
                        "driver": "qcow2", "file": file, "node-name": format, "backing": below,
                        "read-only": read_only,
                    });
                    machine =
                        machine.with(&["-blockdev", &protocol.to_string(), "-blockdev", &node.to_string()]);
                    below = json!(format);
                }
                machine.with(&["-device", "virtio-blk-pci,drive=format3,id=vda"])
            }
        }
    }
}

/// The chain as `live chain` tells it, without what differs by style.
fn chain(qemu: &Qemu, disk: &str) -> Value {
    let layers = qemu.live(&["chain", disk, "--json"]).ok().json();
    let kept = ["index", "filename", "format", "protocol", "virtual-size", "backing-filename", "ro"];
    let plain = |layer: &Value| kept.iter().map(|key| ((*key).to_owned(), layer[*key].clone())).collect();
    Value::Array(layers.as_array().unwrap().iter().map(|layer| Value::Object(plain(layer))).collect())
}

fn same_merges(style: DriveStyle) {
    if !qemu_present() {
        return;
    }
    let lab = Lab::new();
    lab.chain(&CHAIN);
    let before = lab.bytes(CHAIN[3]);
    let (mut qemu, _input, _output) = Qemu::start(lab.dir(), &style.machine(&lab));
    let disk = style.disk();
    let path = |name: &str| lab.dir().join(name).display().to_string();
    let layer = |index: u64, name: &str, backing: Value| {
        json!({
            "index": index, "filename": path(name), "format": "qcow2", "protocol": "file",
            "virtual-size": before.len(), "backing-filename": backing, "ro": name != CHAIN[3],
        })
    };
    let [base, a, b, c] = CHAIN;
    let expected = json!([
        layer(4, c, json!(b)),
        layer(3, b, json!(a)),
        layer(2, a, json!(base)),
        layer(1, base, Value::Null)
    ]);
    assert_eq!(chain(&qemu, disk), expected);

    // By path, then by index; the overlay keeps its relative style.
    qemu.commit(&[disk, "--base", &path(base), "--top", &path(a)]).ok();
    let expected = json!([layer(3, c, json!(b)), layer(2, b, json!(base)), layer(1, base, Value::Null)]);
    assert_eq!(chain(&qemu, disk), expected);
    qemu.commit(&[disk, "--base", "[1]", "--top", &format!("{disk}[2]")]).ok();
    assert_eq!(chain(&qemu, disk), json!([layer(2, c, json!(base)), layer(1, base, Value::Null)]));
    assert_eq!(held(&qemu, &lab), [base, c]);
    qemu.commit(&[disk, "--active", "--pivot"]).ok();
    let mut alone = layer(1, base, Value::Null);
    alone["ro"] = json!(false);
    assert_eq!(chain(&qemu, disk), json!([alone]));
    assert_eq!(held(&qemu, &lab), [base]);
    assert_eq!(qemu.job(), None);

    qemu.ask("quit", json!({}));
    assert!(qemu.ended().success());
    assert!(lab.bytes(base) == before, "{style:?}: other bytes");
    assert!(
        lab.bytes(c) == before,
        "{style:?}: a configuration that names the old active image boots another disk"
    );
    lab.run(&["qemu-img", "check", "-q", base]);
}

/// Which files of the chain QEMU has open.
fn held(qemu: &Qemu, lab: &Lab) -> Vec<&'static str> {
    let open: Vec<_> = fs::read_dir(format!("/proc/{}/fd", qemu.process().as_raw_nonzero()))
        .unwrap()
        .filter_map(|entry| fs::read_link(entry.unwrap().path()).ok())
        .collect();
    CHAIN.into_iter().filter(|name| open.contains(&lab.dir().canonicalize().unwrap().join(name))).collect()
}

#[test]
fn a_drive() {
    same_merges(DriveStyle::Drive);
}

#[test]
fn a_drive_with_a_device() {
    same_merges(DriveStyle::DriveId);
}

#[test]
fn a_blockdev_whose_layers_qemu_finds() {
    same_merges(DriveStyle::BlockdevTop);
}

#[test]
fn a_blockdev_for_every_layer() {
    same_merges(DriveStyle::Blockdev);
}

/// QEMU 10.0.2 ends with SIGSEGV, and the guest with it, when it has copied all and cannot rewrite the header of the
/// overlay above top.
#[test]
fn an_overlay_that_qemu_may_not_rewrite_does_not_end_the_machine() {
    if !qemu_present() {
        return;
    }
    for style in [DriveStyle::DriveId, DriveStyle::Blockdev] {
        let lab = Lab::new();
        lab.chain(&CHAIN);
        let before = lab.bytes(CHAIN[3]);
        let mut machine = style.machine(&lab);
        let overlay = lab.dir().join(CHAIN[2]);
        let as_root = rustix::process::geteuid().is_root();
        if as_root {
            // What root may not write does not exist.
            machine.prefix =
                ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups"].map(str::to_owned).into();
            lab.run(&["chown", "-R", "65534:65534", "."]);
            lab.run(&["chown", "0:0", CHAIN[2]]);
        }
        lab.run(&["chmod", "444", CHAIN[2]]);
        let (mut qemu, _input, _output) = Qemu::start(lab.dir(), &machine);
        let chain_before = chain(&qemu, "vda");
        qemu.commit(&["vda", "--top", "[2]"]).fails(1, &[overlay.to_str().unwrap()]);
        assert!(qemu.lives());
        assert_eq!(qemu.job(), None);
        assert_eq!(chain(&qemu, "vda"), chain_before);
        // The hint's way out.
        if as_root {
            lab.run(&["chown", "65534:65534", CHAIN[2]]);
        }
        lab.run(&["chmod", "644", CHAIN[2]]);
        qemu.commit(&["vda", "--top", "[2]"]).ok();
        assert_eq!(qemu.files("vda"), [CHAIN[0], CHAIN[2], CHAIN[3]]);
        qemu.ask("quit", json!({}));
        assert!(qemu.ended().success());
        assert!(lab.bytes(CHAIN[3]) == before);
    }
}

//! A real libvirt: it records chains, the command merges them, and libvirt starts the machine again.
//!
//! The machine's processor stands still; its disks are written and read through their devices, as a guest would.

use std::fs;
use std::process::Command;

use crate::session::{LibvirtSession, give};
use crate::support::{hinted, run, text};

/// Blocks of 64 KiB that were written, each with its last pattern.
#[derive(Default)]
struct Written(std::collections::BTreeMap<u64, u8>);

impl Written {
    /// Writes and flushes blocks, of which some were written by earlier calls.
    #[track_caller]
    fn write(&mut self, session: &LibvirtSession, pattern: u8) {
        // Some that every call writes anew, and some of its own: old data of a layer hides newer one of base.
        let own = 100 + u64::from(pattern) * 3;
        for block in [2, 40, 77, own, own + 1] {
            session.device("virtio-disk0", &format!("write -q -P {pattern} {}k 64k", block * 64));
            self.0.insert(block, pattern);
        }
        session.device("virtio-disk0", "flush");
    }

    /// All of them must be there.
    #[track_caller]
    fn verify(&self, session: &LibvirtSession) {
        let read = |(block, pattern): (&u64, &u8)| format!("read -q -P {pattern} {}k 64k", block * 64);
        session.reads("virtio-disk0", &self.0.iter().map(read).collect::<Vec<_>>());
    }
}

/// A machine with two disks, which stands still.
fn define(session: &LibvirtSession) {
    for image in ["base.qcow2", "data.qcow2"] {
        let path = session.image(image);
        run(Command::new("qemu-img").args(["create", "-q", "-f", "qcow2", &path, "16M"]));
        give(path.as_ref());
    }
    let disk = |target: &str, image: &str| {
        let file = session.image(image);
        format!(
            "<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{file}'/>\
             <target dev='{target}' bus='virtio'/></disk>"
        )
    };
    let xml = format!(
        "<domain type='qemu'><name>vm1</name><memory unit='MiB'>64</memory><vcpu>1</vcpu>\
         <os><type arch='x86_64' machine='q35'>hvm</type></os><features><acpi/></features><devices>{}{}<controller type='usb' model='none'/>\
         <memballoon model='none'/></devices></domain>",
        disk("vda", "base.qcow2"),
        disk("vdb", "data.qcow2")
    );
    fs::write(session.path("vm1.xml"), xml).unwrap();
    session.virsh_ok(&["define", session.path("vm1.xml").to_str().unwrap()]);
}

/// The images of the first disk, from the active one down, as the definition records them.
fn recorded(session: &LibvirtSession) -> Vec<String> {
    let xml = session.virsh_ok(&["dumpxml", "--inactive", "vm1"]);
    let first = xml.split("<target dev='vda'").next().unwrap();
    let names = first.split("<source file='").skip(1);
    names.map(|rest| rest.split('\'').next().unwrap().rsplit('/').next().unwrap().to_owned()).collect()
}

/// Takes a snapshot by the command that is printed, on the first disk alone.
#[track_caller]
fn snapshot(session: &LibvirtSession, file: &str) {
    let overlay = format!("vda={file}");
    let refused = session.qmerge(&["live", "snapshot", &overlay, "--qmp", &session.monitor()]);
    assert_eq!(refused.status.code(), Some(6), "{}", text(&refused.stderr));
    session.types(&hinted(&refused, "snapshot-create-as vm1 --no-metadata"));
    assert_eq!(recorded(session)[0], file);
    let disks = session.virsh_ok(&["domblklist", "vm1"]);
    assert!(disks.contains("data.qcow2"), "the other disk got an overlay: {disks}");
    assert_eq!(session.virsh_ok(&["snapshot-list", "vm1", "--name"]).trim(), "");
}

#[test]
fn a_chain_that_libvirt_recorded_is_merged_while_it_is_shut_off_and_boots_the_right_disk() {
    let Some(session) = LibvirtSession::start() else { return };
    define(&session);
    let mut written = Written::default();
    session.virsh_ok(&["start", "--paused", "vm1"]);
    written.write(&session, 1);
    for (n, file) in (2..).zip(["a.qcow2", "b.qcow2", "c.qcow2"]) {
        snapshot(&session, file);
        written.write(&session, n);
    }
    written.verify(&session);

    // It runs: the domain is named, and what is printed shortens the chain as asked.
    let args = ["commit", "c.qcow2", "--base", "[1]", "--top", "[2]"];
    let refused = session.qmerge(&args);
    let err = text(&refused.stderr);
    assert!(refused.status.code() == Some(5) && err.contains("libvirt's domain vm1"), "{err}");
    let typed = hinted(&refused, "blockcommit");
    let by_monitor = session.qmerge(&[
        "live",
        "commit",
        "vda",
        "--base",
        "vda[1]",
        "--top",
        "vda[2]",
        "--qmp",
        &session.monitor(),
    ]);
    assert_eq!(hinted(&by_monitor, "blockcommit"), typed);
    session.types(&typed);
    assert_eq!(recorded(&session), ["c.qcow2", "b.qcow2", "base.qcow2"]);
    written.write(&session, 5);
    snapshot(&session, "d.qcow2");
    written.write(&session, 6);
    written.verify(&session);
    session.virsh_ok(&["destroy", "vm1"]);
    assert_eq!(recorded(&session), ["d.qcow2", "c.qcow2", "b.qcow2", "base.qcow2"]);

    // libvirt leaves the layer that it has merged, an overlay on base whose data is out of date.
    let refused = session.qmerge(&["commit", "d.qcow2"]);
    let err = text(&refused.stderr);
    assert!(refused.status.code() == Some(6) && err.contains("a.qcow2"), "{err}");
    fs::remove_file(session.image("a.qcow2")).unwrap();
    let plan = session.qmerge(&["commit", "d.qcow2", "--dry-run"]);
    assert_eq!(plan.status.code(), Some(0), "{}", text(&plan.stderr));
    let said = text(&plan.stdout);
    let [c, b, base] = ["c.qcow2", "b.qcow2", "base.qcow2"].map(|name| session.image(name));
    let named = format!("the domain vm1 names d.qcow2 as vda, and records {c}, {b}, {base}");
    assert!(said.contains(&named), "{said}");
    let merged = session.qmerge(&["commit", "d.qcow2"]);
    assert_eq!(merged.status.code(), Some(0), "{}", text(&merged.stderr));
    session.virsh_ok(&["start", "--paused", "vm1"]);
    written.verify(&session);
    written.write(&session, 7);
    written.verify(&session);
    session.virsh_ok(&["destroy", "vm1"]);

    // And once more, now that the recorded chain has empty layers; then only a part of it.
    let merged = session.qmerge(&["commit", "d.qcow2"]);
    assert_eq!(merged.status.code(), Some(0), "{}", text(&merged.stderr));
    session.virsh_ok(&["start", "--paused", "vm1"]);
    for (n, file) in (8..).zip(["e.qcow2", "f.qcow2"]) {
        snapshot(&session, file);
        written.write(&session, n);
    }
    session.virsh_ok(&["destroy", "vm1"]);
    let merged = session.qmerge(&["commit", "f.qcow2", "--top", "e.qcow2"]);
    assert_eq!(merged.status.code(), Some(0), "{}", text(&merged.stderr));
    session.virsh_ok(&["start", "--paused", "vm1"]);
    written.verify(&session);
}

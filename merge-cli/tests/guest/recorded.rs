//! A command line that names every layer, as a configuration of libvirt's does, and is used again as it is after a merge.

use serde_json::{Value, json};

use crate::support::{Lab, Oracle, guest_possible};

const CHAIN: [&str; 4] = ["base.qcow2", "a.qcow2", "b.qcow2", "c.qcow2"];

/// The options for the chain as `vda`, each layer told what lies below it; no header is asked for that.
fn recorded(lab: &Lab) -> Vec<String> {
    let mut options = Vec::new();
    let mut below = Value::Null;
    for (n, name) in CHAIN.iter().enumerate() {
        let node = if n == 3 { "drive-vda".to_owned() } else { format!("layer{n}") };
        let file = json!({"driver": "file", "filename": lab.dir().join(name), "auto-read-only": true});
        let layer = json!({
            "driver": "qcow2", "node-name": node, "file": file, "backing": below, "read-only": n != 3,
        });
        options.extend(["-blockdev".to_owned(), layer.to_string()]);
        below = json!(node);
    }
    options
}

/// Merges under a guest that writes, ends the guest, and starts it again with the same words.
fn starts_again(seed: u64, commit: &[&str]) {
    if !guest_possible() {
        return;
    }
    let lab = Lab::new();
    lab.chain(&CHAIN);
    let initial = lab.bytes(CHAIN[3]);
    let disks = [recorded(&lab), lab.drive("vdb", "vdb.raw").into()].concat();
    let mut guest = lab.start_with(&disks);
    guest.go(seed, "vda");
    guest.writes(100);
    guest.commit(&[&["vda"], commit].concat()).ok();
    guest.writes(100);
    guest.pause();
    guest.quit();
    let mut guest = lab.start_with(&disks);
    assert_eq!(guest.files("vda"), CHAIN, "the command line counts, not the headers");
    assert!(guest.verify_journal() > 100);
    guest.quit();
    // What the guest has not written is there too.
    Oracle::new(&lab, initial, 0).exact(&lab, CHAIN[3]);
}

#[test]
fn after_an_active_commit_the_recorded_chain_is_the_disk() {
    starts_again(71, &["--active", "--pivot"]);
}

#[test]
fn after_an_intermediate_commit_the_recorded_chain_is_the_disk() {
    starts_again(72, &["--top", "[3]"]);
}

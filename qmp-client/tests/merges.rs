//! Merges with their state files on a real qemu-storage-daemon, from the beginning to the end.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use common::{Chain, Daemon, Make, begin, commit, copied, disk, listed, tools_are_here};
use qmp_client::{Error, Merge, MergeOptions, Phase, Procedure, Wishes, jobs, states_of};

#[test]
fn the_state_file_says_how_far_an_intermediate_merge_is() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let before = chain.bytes(4);
    let daemon = Daemon::serve(&chain, None);
    let monitor = daemon.connect();
    let planned = commit(&monitor, "[1]", "[3]", MergeOptions::default());
    let mut merge = begin(&monitor, &daemon, &chain, planned);
    let said = chain.state_file().load().unwrap().unwrap();
    assert_eq!((said.phase, &said), (Phase::Copying, merge.state()));
    assert_eq!(said.valid_top, chain.name(4));
    assert_eq!(said.backing.as_ref().unwrap().new.as_deref(), Some("1.img"));
    assert!(said.layers.iter().all(|layer| layer.stamp.is_some()));
    assert_eq!(states_of(&daemon.address()).unwrap().len(), 1);

    copied(&merge);
    assert!(matches!(merge.pivot(), Err(Error::Refused { .. })));
    assert!(matches!(merge.keep_overlay(), Err(Error::Refused { .. })));
    let merged = merge.finish().unwrap();
    assert_eq!(listed(&merged.disk), ["4.img", "1.img"]);
    let said = chain.state_file().load().unwrap().unwrap();
    assert_eq!((said.phase, said.valid_top), (Phase::Switched, chain.name(4)));

    // Before that is cleaned up, no other merge begins here.
    let other = commit(&monitor, "[1]", "[2]", MergeOptions::default());
    let error = Merge::begin(&monitor, other, chain.state_file(), &daemon.address(), &Wishes::default());
    assert!(matches!(error, Err(Error::Refused { .. })));
    assert!(jobs(&monitor).unwrap().is_empty());
    merge.done().unwrap();
    assert!(chain.state_file().load().unwrap().is_none());
    assert!(!chain.folder.path().join("qmp.sock.qmerge").exists());
    drop(daemon);
    assert!(chain.bytes(4) == before, "the guest sees other bytes");
}

#[test]
fn base_is_the_valid_top_once_the_guest_writes_there() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let before = chain.bytes(4);
    let daemon = Daemon::serve(&chain, None);
    let monitor = daemon.connect();
    let mut merge = begin(&monitor, &daemon, &chain, commit(&monitor, "[2]", "[4]", MergeOptions::default()));
    copied(&merge);
    assert!(matches!(merge.finish(), Err(Error::Refused { .. })));
    assert_eq!(merge.state().valid_top, chain.name(4));
    let merged = merge.pivot().unwrap();
    assert_eq!(listed(&merged.disk), ["2.img", "1.img"]);
    let said = chain.state_file().load().unwrap().unwrap();
    assert_eq!((said.phase, said.valid_top), (Phase::Switched, chain.name(2)));
    merge.done().unwrap();
    drop(daemon);
    assert!(chain.bytes(2) == before, "the guest sees other bytes");
}

#[test]
fn a_kept_overlay_leaves_base_as_the_disk_was() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let before = chain.bytes(4);
    let mut daemon = Daemon::serve(&chain, None);
    let monitor = daemon.connect();
    let mut merge = begin(&monitor, &daemon, &chain, commit(&monitor, "[1]", "[4]", MergeOptions::default()));
    copied(&merge);
    let kept = merge.keep_overlay().unwrap();
    assert_eq!(listed(&kept), ["4.img", "3.img", "2.img", "1.img"]);
    assert!(disk(&monitor).layers()[3].read_only, "base is open for reading only again");
    assert!(jobs(&monitor).unwrap().is_empty());
    assert!(chain.state_file().load().unwrap().is_none());
    // Killed, as a power cut would: base is durable.
    daemon.kill();
    assert!(chain.bytes(1) == before, "base is not what the disk was");
    assert!(chain.bytes(4) == before, "the guest sees other bytes");
    chain.check(1);
}

#[test]
fn a_pull_and_a_cancelled_merge_keep_their_state_files_true() {
    if !tools_are_here() {
        return;
    }
    let chain = Chain::new(Make::default());
    let before = chain.bytes(4);
    let daemon = Daemon::serve(&chain, None);
    let monitor = daemon.connect();
    let mut merge = begin(&monitor, &daemon, &chain, commit(&monitor, "[1]", "[4]", MergeOptions::default()));
    copied(&merge);
    merge.cancel().unwrap();
    assert!(chain.state_file().load().unwrap().is_none());
    assert_eq!(listed(&disk(&monitor)).len(), 4);

    let disk = disk(&monitor);
    let mut pull = Procedure::pull(&disk, None, MergeOptions::default()).unwrap();
    pull.preflight(&monitor).unwrap();
    let mut merge = begin(&monitor, &daemon, &chain, pull);
    let said = chain.state_file().load().unwrap().unwrap();
    assert_eq!((said.base, said.top, said.backing.unwrap().new), (0, 3, None));
    copied(&merge);
    let merged = merge.finish().unwrap();
    assert_eq!(listed(&merged.disk), ["4.img"]);
    let said = chain.state_file().load().unwrap().unwrap();
    assert_eq!((said.phase, said.valid_top), (Phase::Switched, chain.name(4)));
    merge.done().unwrap();
    drop(daemon);
    assert!(chain.bytes(4) == before, "the guest sees other bytes");
}

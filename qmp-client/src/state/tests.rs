//! State files as they are written, read, damaged and looked for.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;

use super::*;
use crate::error::Result;
use crate::qmp::address::Address;

/// The merge of `[1]` to `[3]` of four layers in a folder.
pub(crate) fn state(folder: &str) -> State {
    let layer = |index: usize| StateLayer {
        index,
        node: format!("n{index}"),
        protocol_node: Some(format!("f{index}")),
        data_file_node: None,
        data_file: None,
        data_file_stamp: None,
        file: format!("{folder}/{index}.img"),
        protocol: Some("file".into()),
        format: "qcow2".into(),
        encrypted: false,
        part: false,
        virtual_size: 1 << 24,
        stamp: None,
    };
    State {
        version: VERSION,
        created_ns: 1,
        changed_ns: 1,
        gone_ns: None,
        boot: boot(),
        address: "/run/qmp.sock".into(),
        disk: "vda".into(),
        job: "merge.vda.1.3.00000000".into(),
        kind: Kind::Commit,
        phase: Phase::Copying,
        valid_top: format!("{folder}/4.img"),
        layers: [4, 3, 2, 1].map(layer).into(),
        base: 1,
        top: 3,
        backing: Some(RecordedRelink {
            overlay: format!("{folder}/4.img"),
            index: 4,
            old: "3.img".into(),
            old_format: Some("qcow2".into()),
            new: Some("1.img".into()),
        }),
        delete: false,
        allow_stale: false,
        pivot: false,
        keep_overlay: false,
        scan: Vec::new(),
        nbd_socket: None,
        throttled: None,
        paused: false,
    }
}

fn why<T: std::fmt::Debug>(result: Result<T>) -> String {
    match result.unwrap_err() {
        Error::State { why, .. } => why.to_string(),
        other => panic!("{other}"),
    }
}

#[test]
fn a_state_is_read_as_it_was_written_and_only_its_owner_may_look() {
    let folder = tempfile::tempdir().unwrap();
    let image = folder.path().join("vm.qcow2");
    fs::write(&image, "").unwrap();
    let link = folder.path().join("link.qcow2");
    std::os::unix::fs::symlink(&image, &link).unwrap();
    let file = StateFile::beside(&link).unwrap();
    assert_eq!(file.path().file_name().unwrap(), ".vm.qcow2.qmerge-live");
    assert_eq!(file.load().unwrap(), None);
    let mut written = state("/vm");
    file.save(&mut written).unwrap();
    assert!(written.changed_ns > 1);
    assert_eq!(fs::metadata(file.path()).unwrap().permissions().mode() & 0o777, 0o600);
    assert_eq!(file.load().unwrap(), Some(written.clone()));
    written.phase = Phase::Switched;
    file.save(&mut written).unwrap();
    assert_eq!(states_in(folder.path()).unwrap(), [(file.clone(), written)]);
    let names = fs::read_dir(folder.path()).unwrap().count();
    assert_eq!(names, 3, "nothing else is left in the folder");
    file.remove().unwrap();
    file.remove().unwrap();
    assert_eq!(states_in(folder.path()).unwrap(), []);
}

#[test]
fn a_place_is_named_for_what_is_no_file_too() {
    assert_eq!(StateFile::beside(Path::new("vm.qcow2")), None);
    assert_eq!(StateFile::beside(Path::new("/no/such/vm.qcow2")), None);
    let place = StateFile::in_folder(Path::new("/state"), Path::new("nbd://host/disk"));
    assert_eq!(place.path(), Path::new("/state/.nbd:__host_disk.qmerge-live"));
    let place = StateFile::in_folder(Path::new("/state"), Path::new("/vm/a.qcow2"));
    assert_eq!(place.path(), Path::new("/state/.a.qcow2.qmerge-live"));
}

#[test]
fn the_layers_that_go_and_those_that_stay() {
    let state = state("/vm");
    assert_eq!(state.merged().map(|l| l.index).collect::<Vec<_>>(), [3, 2]);
    assert_eq!(state.layers_after().map(|l| l.index).collect::<Vec<_>>(), [4, 1]);
    assert_eq!((state.active().unwrap().index, state.target().unwrap().index), (4, 1));
}

#[test]
fn damaged_and_foreign_files_are_errors_that_name_them() {
    let folder = tempfile::tempdir().unwrap();
    let file = StateFile::in_folder(folder.path(), Path::new("/vm/a.img"));
    let mut good = state("/vm");
    file.save(&mut good).unwrap();
    let text = fs::read(file.path()).unwrap();
    for end in (0..text.len() - 1).step_by(17) {
        fs::write(file.path(), &text[..end]).unwrap();
        why(file.load());
    }
    type Damage = fn(&mut State);
    let damages: [(&str, Damage); 8] = [
        ("version 3", |s| s.version = 3),
        ("not numbered", |s| s.layers[1].index = 9),
        ("merges layers", |s| s.top = 1),
        ("merges layers", |s| s.base = 0),
        ("merges layers", |s| s.layers.clear()),
        ("does not fit", |s| s.kind = Kind::ActiveCommit),
        ("does not fit", |s| s.top = 4),
        ("wrong overlay", |s| s.backing = None),
    ];
    for (expected, damage) in damages {
        let mut bad = good.clone();
        damage(&mut bad);
        file.save(&mut bad).unwrap();
        let error = file.load().unwrap_err().to_string();
        assert!(error.contains(expected) && error.contains(".a.img.qmerge-live"), "{expected}: {error}");
        assert!(states_in(folder.path()).is_err(), "{expected}");
    }
    fs::remove_file(file.path()).unwrap();
    std::os::unix::fs::symlink("/dev/zero", file.path()).unwrap();
    assert!(why(file.load()).contains("no plain file"));
}

#[test]
fn a_state_that_a_stranger_left_is_not_believed() {
    let folder = tempfile::tempdir().unwrap();
    if fs::metadata(folder.path()).unwrap().uid() != 0 {
        kit::not_tried("only root can give a file to somebody else");
        return;
    }
    let file = StateFile::in_folder(folder.path(), Path::new("/vm/a.img"));
    file.save(&mut state("/vm")).unwrap();
    fs::set_permissions(file.path(), fs::Permissions::from_mode(0o620)).unwrap();
    assert!(why(file.load()).contains("others may write it"));
    fs::set_permissions(file.path(), fs::Permissions::from_mode(0o600)).unwrap();
    assert!(file.load().unwrap().is_some());
    std::os::unix::fs::chown(file.path(), Some(65534), None).unwrap();
    assert!(why(file.load()).contains("user 65534"));
    // It names files elsewhere, too: to own the folder is not enough.
    std::os::unix::fs::chown(folder.path(), Some(65534), None).unwrap();
    assert!(why(file.load()).contains("user 65534"));
}

#[test]
fn a_folder_that_cannot_be_written_is_an_error() {
    let file = StateFile::in_folder(Path::new("/proc"), Path::new("/vm/a.img"));
    assert!(matches!(file.save(&mut state("/vm")), Err(Error::File { .. })));
}

#[test]
fn the_pointer_beside_the_socket_leads_to_all_states_until_the_last_is_gone() {
    let folder = tempfile::tempdir().unwrap();
    let address = Address::Unix(folder.path().join("qmp.sock"));
    let list = folder.path().join("qmp.sock.qmerge");
    let files = ["/vm/a.img", "/vm/b.img"].map(|image| StateFile::in_folder(folder.path(), Path::new(image)));
    let pointer = Pointer::of(&address);
    for file in &files {
        file.save(&mut state("/vm")).unwrap();
        pointer.add(file);
        pointer.add(file);
    }
    assert_eq!(states_of(&address).unwrap().len(), 2);
    assert_eq!(find_states(Some(&address), [folder.path(), Path::new("/no/such")]).unwrap().len(), 2);
    assert_eq!(find_states(None, [folder.path()]).unwrap().len(), 2);
    files[0].remove().unwrap();
    pointer.remove(&files[0]);
    assert_eq!(states_of(&address).unwrap()[0].0, files[1]);
    files[1].remove().unwrap();
    assert_eq!(states_of(&address).unwrap(), [], "the list may be older than the files");
    pointer.remove(&files[1]);
    assert!(!list.exists());

    let elsewhere = folder.path().join("elsewhere");
    fs::write(&elsewhere, "/etc/passwd\n").unwrap();
    std::os::unix::fs::symlink(&elsewhere, &list).unwrap();
    assert_eq!(states_of(&address).unwrap(), [], "a link is not followed");
    files[0].save(&mut state("/vm")).unwrap();
    pointer.add(&files[0]);
    assert_eq!(fs::read_to_string(&elsewhere).unwrap(), "/etc/passwd\n");
    let tcp = Address::Tcp { host: "localhost".into(), port: 1 };
    Pointer::of(&tcp).add(&files[0]);
    assert_eq!(states_of(&tcp).unwrap(), []);
}

/// Somebody exchanges the folder of a state file for a link to another folder while it is written, read and removed: nothing
/// changes there, and nothing that a link leads to is read.
#[test]
fn links_in_the_place_of_a_state_file_lead_nowhere() {
    let (folder, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let theirs = other.path().join("theirs");
    fs::write(&theirs, "x").unwrap();
    let file = StateFile::in_folder(folder.path(), Path::new("/vm/a.img"));
    std::os::unix::fs::symlink(&theirs, file.path()).unwrap();
    assert!(why(file.load()).contains("no plain file"));
    assert!(why(file.remove()).contains("no plain file"));
    // A new text takes the place of the link, and does not follow it.
    file.save(&mut state("/vm")).unwrap();
    assert!(fs::symlink_metadata(file.path()).unwrap().is_file());
    assert_eq!(fs::read_to_string(&theirs).unwrap(), "x");
    file.remove().unwrap();
    assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
}

/// A build with another version of the description is told from damage, whatever else it writes.
#[test]
fn a_state_of_another_build_is_known_for_one() {
    let folder = tempfile::tempdir().unwrap();
    let file = StateFile::in_folder(folder.path(), Path::new("/vm/a.img"));
    for (text, version) in [(r#"{"version": 7, "merge": []}"#, 7), (r#"{"version": 0}"#, 0)] {
        fs::write(file.path(), text).unwrap();
        fs::set_permissions(file.path(), fs::Permissions::from_mode(0o600)).unwrap();
        let error = file.load().unwrap_err();
        let Error::State { why: StateFault::OtherVersion { found, .. }, .. } = error else {
            panic!("{error}")
        };
        assert_eq!(found, version);
    }
}

//! Plans on graphs that QEMU told, with a field changed here and there.

use super::*;
use crate::block::graph::Graph;
use crate::qmp::replay::Replay;

const BLOCKDEV: &str = include_str!("../../../testdata/transcripts/discovery-blockdev.jsonl");
const NBD: &str = include_str!("../../../testdata/transcripts/discovery-nbd.jsonl");

fn disk(transcript: &str) -> Disk {
    Graph::ask(&Replay::of(transcript)).unwrap().disks()[0].clone()
}

fn plan(disk: &Disk, base: usize, top: usize, options: MergeOptions) -> Result<Procedure> {
    let layer = |n: usize| disk.layer(&format!("[{n}]")).unwrap();
    Procedure::commit(disk, &disk.range(layer(base), layer(top))?, options)
}

fn why(result: Result<Procedure>) -> String {
    match result.unwrap_err() {
        Error::Refused { reason } => reason.to_string(),
        Error::BackingName { why, .. } => why,
        other => panic!("{other}"),
    }
}

/// The transcript with the size of one file's image changed.
fn resized(transcript: &str, file: &str, size: u64) -> String {
    let name = format!("\"filename\":\"{file}\",\"format\":\"qcow2\"");
    let lines = transcript.lines().map(|line| {
        let mut line = line.to_owned();
        let mut from = 0;
        while let Some(at) = line[from..].find(&name).map(|at| at + from) {
            let size_at = line[..at].rfind("\"virtual-size\":").unwrap() + 15;
            let size_end = size_at + line[size_at..].find(',').unwrap();
            line.replace_range(size_at..size_end, &size.to_string());
            from = at + name.len();
        }
        line
    });
    lines.map(|line| line + "\n").collect()
}

#[test]
fn an_intermediate_merge_names_base_as_the_overlay_named_top() {
    let disk_at = |text: &str| disk(text);
    let commit = plan(&disk_at(BLOCKDEV), 1, 4, MergeOptions::default()).unwrap();
    assert_eq!(commit.backing_file(), Some("/vm/a/base.qcow2"));
    assert!(!commit.is_active());
    assert_eq!(commit.merged().iter().map(|l| l.index).collect::<Vec<_>>(), [4, 3, 2]);
    assert!(commit.job_id().starts_with("merge.vda.1.4."), "{}", commit.job_id());

    let relative = BLOCKDEV.replace("\"backing-filename\":\"/vm/a/", "\"backing-filename\":\"");
    let commit = plan(&disk_at(&relative), 1, 4, MergeOptions::default()).unwrap();
    assert_eq!(commit.backing_file(), Some("base.qcow2"));

    let colon = relative.replace("/vm/a/base.qcow2", "/vm/a/ba:se.qcow2");
    let commit = plan(&disk_at(&colon), 1, 4, MergeOptions::default()).unwrap();
    assert_eq!(commit.backing_file(), Some("./ba:se.qcow2"));

    let elsewhere = relative.replace("/vm/a/base.qcow2", "/vm/b/base.qcow2");
    let commit = plan(&disk_at(&elsewhere), 1, 4, MergeOptions::default()).unwrap();
    assert_eq!(commit.backing_file(), Some("/vm/b/base.qcow2"));
}

#[test]
fn a_base_behind_nbd_keeps_the_spelling_that_its_overlay_had() {
    let commit = plan(&disk(NBD), 1, 2, MergeOptions::default()).unwrap();
    assert_eq!(commit.backing_file(), Some("nbd+unix:///?socket=/vm/j/n.sock"));
    // QEMU could not write that name: it would be read as another address.
    let json = NBD.replace("\"backing-filename\":\"nbd+unix:///", "\"backing-filename\":\"json:{}");
    assert!(why(plan(&disk(&json), 1, 2, MergeOptions::default())).contains("give one"));
}

#[test]
fn json_is_never_written_into_a_header() {
    let options =
        MergeOptions { backing_file: Some("json:{\"driver\":\"qcow2\"}".into()), ..Default::default() };
    assert!(why(plan(&disk(BLOCKDEV), 1, 3, options)).contains("json:"));
}

#[test]
fn a_backing_name_that_leads_elsewhere_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let here = folder.path().to_str().unwrap();
    for file in ["base", "s1", "s2", "s3", "active"] {
        std::fs::write(folder.path().join(format!("{file}.qcow2")), "").unwrap();
    }
    let disk = disk(&BLOCKDEV.replace("/vm/a", here));
    let given = |name: &str| MergeOptions { backing_file: Some(name.into()), ..Default::default() };
    assert!(plan(&disk, 1, 3, given("./base.qcow2")).is_ok());
    assert!(why(plan(&disk, 1, 3, given("s1.qcow2"))).contains("would lead to"));
    assert!(why(plan(&disk, 1, 3, given("gone.qcow2"))).contains("would lead to"));
}

#[test]
fn an_active_commit_takes_no_backing_name() {
    let disk = disk(BLOCKDEV);
    let commit = plan(&disk, 1, 5, MergeOptions::default()).unwrap();
    assert!(commit.is_active() && commit.backing_file().is_none());
    let options = MergeOptions { backing_file: Some("base.qcow2".into()), ..Default::default() };
    assert!(why(plan(&disk, 1, 5, options)).contains("active"));
}

#[test]
fn a_short_top_over_a_longer_base_is_refused_with_the_offline_way() {
    let short = disk(&resized(BLOCKDEV, "/vm/a/s2.qcow2", 4 << 20));
    assert!(why(plan(&short, 1, 3, MergeOptions::default())).contains("merge offline"));
    assert!(plan(&short, 1, 4, MergeOptions::default()).is_ok(), "a short layer in between is no harm");
    let short = disk(&resized(BLOCKDEV, "/vm/a/active.qcow2", 4 << 20));
    assert!(why(plan(&short, 1, 5, MergeOptions::default())).contains("change its size"));
}

#[test]
fn a_base_that_must_grow_but_cannot_is_refused() {
    let small = NBD.replace(
        "\"virtual-size\":67108864,\"filename\":\"nbd+unix",
        "\"virtual-size\":4194304,\"filename\":\"nbd+unix",
    );
    assert!(why(plan(&disk(&small), 1, 2, MergeOptions::default())).contains("must grow"));
    let small = disk(&resized(BLOCKDEV, "/vm/a/base.qcow2", 4 << 20));
    assert!(plan(&small, 1, 3, MergeOptions::default()).is_ok(), "files grow");
}

#[test]
fn disks_of_libvirt_are_left_to_libvirt() {
    let owned = BLOCKDEV.replace("\"s1-fmt\"", "\"libvirt-4-format\"");
    let error = plan(&disk(&owned), 1, 3, MergeOptions::default()).unwrap_err();
    assert!(matches!(&error, Error::Managed { node } if node == "libvirt-4-format"), "{error}");
}

#[test]
fn bitmaps_of_merged_layers_are_kept_unless_they_may_go() {
    let with = BLOCKDEV.replace(
        "\"node-name\":\"s1-fmt\",\"backing_file_depth\"",
        "\"node-name\":\"s1-fmt\",\"dirty-bitmaps\":[{\"name\":\"bk0\",\"persistent\":true}],\"backing_file_depth\"",
    );
    let disk = disk(&with);
    assert!(why(plan(&disk, 1, 3, MergeOptions::default())).contains("bk0"));
    assert!(plan(&disk, 1, 3, MergeOptions { drop_bitmaps: true, ..Default::default() }).is_ok());
    assert!(plan(&disk, 2, 3, MergeOptions::default()).is_ok(), "those of base stay");
}

/// QEMU tells U+FFFD for what is not UTF-8: a header with that name would lead nowhere.
#[test]
fn a_layer_whose_name_cannot_be_told_takes_no_part() {
    let lossy = BLOCKDEV.replace("/vm/a/base.qcow2", "/vm/a/b\u{fffd}se.qcow2");
    for result in [
        plan(&disk(&lossy), 1, 3, MergeOptions::default()),
        plan(&disk(&lossy), 1, 5, MergeOptions::default()),
        pull(&lossy, Some("[1]"), MergeOptions::default()),
    ] {
        let error = result.unwrap_err();
        assert!(matches!(error, Error::Refused { reason: Refusal::NotUtf8 { .. } }), "{error}");
    }
    assert!(plan(&disk(&lossy), 2, 3, MergeOptions::default()).is_ok(), "it takes no part");
    let error = crate::snapshot(
        &Replay::default(),
        &[(&disk(&BLOCKDEV.replace("active.qcow2", "\u{fffd}.qcow2")), std::path::Path::new("/tmp/new.img"))],
    );
    let error = error.unwrap_err();
    assert!(matches!(error, Error::Refused { reason: Refusal::NotUtf8 { .. } }), "{error}");
}

#[test]
fn nothing_starts_before_the_preflight() {
    let commit = plan(&disk(BLOCKDEV), 1, 3, MergeOptions::default()).unwrap();
    let nobody = Replay::default();
    assert!(matches!(commit.start(&nobody), Err(Error::Refused { .. })));
    assert!(nobody.asked.borrow().is_empty());
}

#[test]
fn a_migration_or_a_job_of_ours_is_found_before_anything_is_written() {
    let mut commit = plan(&disk(BLOCKDEV), 1, 3, MergeOptions::default()).unwrap();
    let answer = |name: &str, id: u64, value: &str| {
        format!("{{\"execute\":\"{name}\",\"id\":{id}}}\n{{\"return\":{value},\"id\":{id}}}\n")
    };
    let moving = Replay::of(&answer("query-migrate", 1, "{\"status\":\"active\"}"));
    let error = commit.preflight(&moving).unwrap_err().to_string();
    assert!(error.contains("migration"), "{error}");

    let job = "[{\"id\":\"merge.vda.1.2.00\",\"type\":\"commit\",\"status\":\"concluded\",\
               \"current-progress\":0,\"total-progress\":0}]";
    let layers_after = Replay::of(&(answer("query-jobs", 1, job) + &answer("query-block-jobs", 2, "[]")));
    let error = commit.preflight(&layers_after).unwrap_err().to_string();
    assert!(error.contains("merge.vda.1.2.00"), "{error}");
    assert!(layers_after.asked.borrow().iter().all(|(command, _)| command.starts_with("query-")));
}

#[test]
fn the_commands_are_told_in_their_order() {
    let names =
        |commit: &Procedure| commit.commands().unwrap().iter().map(|(name, _)| *name).collect::<Vec<_>>();
    let blockdev = disk(BLOCKDEV);
    let commit = plan(&blockdev, 1, 2, MergeOptions::default()).unwrap();
    let expected = [
        "change-backing-file",
        "block-commit",
        "job-finalize",
        "job-dismiss",
        "blockdev-del",
        "blockdev-del",
    ];
    assert_eq!(names(&commit), expected);
    let (_, start) = &commit.commands().unwrap()[1];
    assert_eq!(start["base-node"], "base-fmt");
    assert_eq!((&start["auto-finalize"], &start["auto-dismiss"]), (&false.into(), &false.into()));
    assert_eq!(start["backing-file"], "/vm/a/base.qcow2");
    // What is printed is what is sent.
    assert_eq!(commit.commands().unwrap()[1], commit.direction.request(&commit).unwrap());

    let active = plan(&blockdev, 4, 5, MergeOptions::default()).unwrap();
    let expected =
        ["block-commit", "job-complete", "job-finalize", "job-dismiss", "blockdev-del", "blockdev-del"];
    assert_eq!(names(&active), expected);
}

fn pull(transcript: &str, base: Option<&str>, options: MergeOptions) -> Result<Procedure> {
    let disk = disk(transcript);
    Procedure::pull(&disk, base.map(|name| disk.layer(name).unwrap()), options)
}

#[test]
fn the_layers_between_are_pulled_and_the_name_keeps_its_style() {
    let some = pull(BLOCKDEV, Some("[2]"), MergeOptions::default()).unwrap();
    assert_eq!(some.merged().iter().map(|l| l.index).collect::<Vec<_>>(), [4, 3]);
    assert_eq!(some.backing_file(), Some("/vm/a/s1.qcow2"));
    assert!(some.job_id().starts_with("pull.vda.2.5."), "{}", some.job_id());
    let whole = pull(BLOCKDEV, None, MergeOptions::default()).unwrap();
    assert_eq!(whole.merged().len(), 4);
    assert_eq!(whole.backing_file(), None);
}

#[test]
fn the_commands_of_a_pull_are_told_in_their_order() {
    let pull = pull(BLOCKDEV, Some("[3]"), MergeOptions::default()).unwrap();
    let commands = pull.commands().unwrap();
    let names: Vec<_> = commands.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["block-stream", "job-finalize", "blockdev-del", "blockdev-del"]);
    assert_eq!(commands[0].1["backing-file"], "/vm/a/s2.qcow2");
    assert_eq!(commands[3].1["node-name"], pull.merged()[0].protocol_node.as_deref().unwrap());
}

#[test]
fn pulls_that_make_no_sense_are_refused() {
    for base in ["[4]", "[5]"] {
        let error = pull(BLOCKDEV, Some(base), MergeOptions::default()).unwrap_err().to_string();
        assert!(error.contains("nothing to pull") && error.contains("[5] /vm/a/active.qcow2"), "{error}");
    }
    let named = MergeOptions { backing_file: Some("x".into()), ..Default::default() };
    let error = pull(BLOCKDEV, None, named).unwrap_err();
    assert!(matches!(error, Error::BackingName { takes_another: false, .. }), "{error}");
    let owned = BLOCKDEV.replace("\"s1-fmt\"", "\"libvirt-4-format\"");
    let error = pull(&owned, None, MergeOptions::default()).unwrap_err();
    assert!(matches!(&error, Error::Managed { node } if node == "libvirt-4-format"), "{error}");
    let pull = pull(BLOCKDEV, None, MergeOptions::default()).unwrap();
    let error = pull.start(&Replay::default()).err().unwrap();
    assert!(matches!(error, Error::Refused { reason: Refusal::NotTried }), "{error}");
}

//! What a killed client leaves, and what a merge must not leave.

use std::fs;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use serde_json::json;

use crate::machine::{Machine, Style};
use crate::support::{failed, qmerge, run, text, tools_are_here};

const RENAMES: &str = "rename,renameat,renameat2";
const UNLINKS: &str = "unlink,unlinkat";

/// Runs `live commit`, which dies as it enters the system call that is counted, among those that touch `file` where one is
/// given. False if it came to its end.
fn dies(machine: &Machine, args: &[&str], calls: &str, count: u32, file: Option<&str>) -> bool {
    let mut strace = Command::new("strace");
    strace.args(["-qq", "-f", "-o", "/dev/null", "-e", &format!("trace={calls}")]);
    strace.args(["-e", &format!("inject={calls}:signal=SIGKILL:when={count}")]);
    strace.args(file.map(|file| ["-P".to_owned(), machine.path(file)]).into_iter().flatten());
    strace.arg(env!("CARGO_BIN_EXE_qmerge")).args(["live", "commit", machine.disk(), "--qmp", "qmp.sock"]);
    let output = strace.args(args).current_dir(machine.dir()).output().unwrap();
    !output.status.success()
}

pub(crate) fn strace_is_here() -> bool {
    let here = Command::new("strace").arg("-V").stdout(Stdio::null()).status().is_ok();
    if !here {
        eprintln!("SKIPPED: strace is not installed, so no client was killed at a system call");
    }
    here
}

/// Whatever the client had done, the same command ends it; and at that moment, the chain that a configuration recorded shows
/// the disk, for nobody has written to it since.
#[test]
fn the_same_command_ends_what_a_killed_client_has_begun() {
    if !tools_are_here() || !strace_is_here() {
        return;
    }
    let mut killed = 0;
    for (args, calls, count, file) in [
        (&["--pivot"][..], RENAMES, 1, None),
        (&["--pivot"], RENAMES, 3, None),
        (&["--pivot"], RENAMES, 4, None),
        (&["--pivot"], UNLINKS, 1, None),
        (&["--pivot"], "pwrite64", 2, Some("a.img")),
        (&["--pivot"], "pwrite64", 1, Some("c.img")),
        (&["--pivot", "--delete"], UNLINKS, 2, None),
        (&["--top", "[3]"], RENAMES, 4, None),
        (&["--top", "[3]"], "pwrite64", 1, Some("b.img")),
    ] {
        let case = format!("{args:?} {calls} {count} {file:?}");
        let mut machine = Machine::new(Style::Blockdev);
        killed += u32::from(dies(&machine, args, calls, count, file));
        let deletes = args.contains(&"--delete");
        // A job keeps others from reading what it writes.
        if !deletes && machine.job().is_null() {
            assert_eq!(machine.recorded_chain_differs(), None, "{case}");
        }
        let said = machine.ok("commit", args);
        assert!(said.contains("merged into") || said.contains("nothing to do"), "{case}: {said}");
        let active = args.contains(&"--pivot");
        assert_eq!(machine.chain().len(), if active { 1 } else { 2 }, "{case}");
        assert!(machine.job().is_null(), "{case}");
        let hidden =
            fs::read_dir(machine.dir()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
        let litter: Vec<_> = hidden.filter(|name| name.contains("qmerge")).collect();
        assert!(litter.is_empty(), "{case}: {litter:?}");
        machine.guest_writes(99, "3M", "64k");
        machine.stop();
        for layer in ["a.img", "b.img", "c.img"] {
            let left = Path::new(&machine.path(layer)).exists();
            assert_eq!(left, !deletes || (layer == "c.img" && !active), "{case}: {layer}");
            if left && (active || layer != "c.img") {
                let map = run("qemu-io", machine.dir(), &["-r", "-f", "qcow2", "-c", "alloc 0 32M", layer]);
                assert!(map.starts_with("0/"), "{case}: {layer}: {map}");
                run("qemu-img", machine.dir(), &["check", "-q", layer]);
            }
        }
        if !deletes {
            assert_eq!(machine.recorded_chain_differs(), None, "{case}");
        }
    }
    assert!(killed > 5, "{killed} clients were killed");
}

/// The disk became larger before the end of the merge was made up for: what lies behind its former end is seen through the
/// old active image too.
#[test]
fn a_disk_that_has_grown_since_the_switch_is_not_cut() {
    if !tools_are_here() || !strace_is_here() {
        return;
    }
    let machine = Machine::new(Style::Blockdev);
    assert!(dies(&machine, &["--pivot"], RENAMES, 4, None));
    assert_eq!(machine.chain(), ["base.img"]);
    let resize = json!({"node-name": "base", "size": 64 << 20});
    qmp_client::Execute::query(&machine.connect(), "block_resize", resize).unwrap();
    let expected = fs::File::options().write(true).open(machine.dir().join("expected.raw")).unwrap();
    expected.set_len(64 << 20).unwrap();
    machine.guest_writes(77, "50M", "64k");
    machine.ok("commit", &["--pivot"]);
    machine.holds_the_disk("c.img");
}

#[test]
fn a_snapshot_ends_what_a_killed_merge_has_left() {
    if !tools_are_here() || !strace_is_here() {
        return;
    }
    let machine = Machine::new(Style::Blockdev);
    // The fifth rename puts the list beside the socket in its place, or nothing; the state says "switched" by then.
    let begun = dies(&machine, &["--pivot"], "pwrite64", 1, Some("a.img"));
    assert!(begun && machine.has(".c.img.qmerge-live"));
    let output = qmerge(machine.dir(), &["live", "snapshot", "vda=n.img", "--qmp", "qmp.sock"]);
    assert!(output.status.success(), "{}", text(&output.stderr));
    assert!(!machine.has(".c.img.qmerge-live") && !machine.has("qmp.sock.qmerge"));
    assert_eq!(machine.chain(), ["n.img", "base.img"]);
    machine.guest_writes(42, "2M", "64k");
    machine.holds_the_disk("n.img");
}

/// Formats and protocols of base are known from QEMU's nodes before the job starts.
#[test]
fn a_pivot_that_would_leave_an_old_disk_is_refused() {
    if !tools_are_here() {
        return;
    }
    for (format, code) in [("vmdk", 7), ("vdi", 7), ("qed", 7)] {
        let make = |dir: &Path| {
            run("qemu-img", dir, &["create", "-q", "-f", format, "base.img", "16M"]);
            run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", format, "c.img"]);
            run("qemu-io", dir, &["-f", "qcow2", "-c", "write -q -P 4 128k 64k", "c.img"]);
        };
        let machine = Machine::with(Style::Drive, "c.img", make);
        let before = machine.files();
        machine.fails("commit", &["--pivot"], code, &["would stay bootable", "--allow-stale", "--delete"]);
        machine.fails("commit", &["--active"], code, &["would stay bootable"]);
        assert!(machine.files() == before, "{format}");
        let plan = machine.events("commit", &["--pivot", "--allow-stale", "-n"]).remove(0);
        assert_eq!(plan["becomes-empty"], json!([]), "{format}");
        assert_eq!(plan["stale"][0]["file"], machine.path("c.img").as_str(), "{format}");
        // Nothing is promised of a merge that keeps the chain.
        machine.ok("commit", &["--keep-overlay"]);
        let said = machine.ok("commit", &["--pivot", "--allow-stale"]);
        assert!(said.contains("stays as it is, with old data"), "{format}: {said}");
        assert!(!machine.has(".c.img.qmerge-live"), "{format}");
        let again = qmerge(machine.dir(), &["live", "recover"]);
        assert!(text(&again.stdout).starts_with("nothing to recover"), "{format}");
        // What is stale cannot be merged again.
        let offline = qmerge(machine.dir(), &["commit", "c.img"]);
        let said = text(&offline.stdout) + &text(&offline.stderr);
        assert!(!offline.status.success() || said.contains("already merged"), "{format}: {said}");
    }
}

/// What the old active image's own header and tables say against emptying it is found before the job starts.
#[test]
fn a_pivot_is_refused_if_the_old_active_image_could_never_be_emptied() {
    if !tools_are_here() {
        return;
    }
    // Its header has no room for the name of base.
    let far = ["x", "y", "z"].map(|part| part.repeat(200)).join("/");
    let no_room = |dir: &Path| {
        fs::create_dir_all(dir.join(&far)).unwrap();
        let base = format!("{far}/base.img");
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", &base, "16M"]);
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", "a.img"]);
        let small = ["-o", "cluster_size=512", "-b", "a.img", "-F", "qcow2", "c.img"];
        run("qemu-img", dir, &[&["create", "-q", "-f", "qcow2"], &small[..]].concat());
        run("qemu-io", dir, &["-f", "qcow2", "-c", "write -q -P 4 128k 64k", "c.img"]);
    };
    // A cluster that is in use is counted as free.
    let damaged = |dir: &Path| {
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "base.img", "16M"]);
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "qcow2", "c.img"]);
        run("qemu-io", dir, &["-f", "qcow2", "-c", "write -q -P 4 128k 64k", "c.img"]);
        // The last cluster holds the data; the block that counts it is the third.
        let clusters = fs::metadata(dir.join("c.img")).unwrap().len().div_ceil(1 << 16);
        let image = fs::File::options().write(true).open(dir.join("c.img")).unwrap();
        image.write_all_at(&[0, 0], (2 << 16) + (clusters - 1) * 2).unwrap();
    };
    type Change<'a> = (&'a dyn Fn(&Path), &'a str);
    let cases: [Change<'_>; 2] = [(&no_room, "no room"), (&damaged, "inconsistent")];
    for (make, why) in cases {
        let machine = Machine::with(Style::Drive, "c.img", make);
        let before = machine.files();
        for end in ["--pivot", "--active"] {
            machine.fails("commit", &[end], 6, &["would stay bootable", why, "--allow-stale", "--delete"]);
        }
        assert!(machine.files() == before, "{why}");
        let said = machine.ok("commit", &["--pivot", "--allow-stale"]);
        assert!(said.contains("stays as it is, with old data"), "{why}: {said}");
    }
}

/// It was sound when the merge was planned, and is not when its turn comes.
#[test]
fn an_old_active_image_that_cannot_be_emptied_after_all_is_not_forgotten() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Blockdev);
    machine.ok("commit", &["--active"]);
    // QEMU does not read it again.
    let header = fs::File::options().write(true).open(machine.dir().join("c.img")).unwrap();
    header.write_all_at(&[2], 79).unwrap();
    let below = ["a.img", "b.img"].map(|name| fs::read(machine.dir().join(name)).unwrap());
    machine.fails(
        "pivot",
        &[],
        6,
        &["c.img still shows the disk as it was", "rm ", "qmerge live recover vda"],
    );
    assert_eq!(machine.chain(), ["base.img"]);
    assert!(machine.has(".c.img.qmerge-live"));
    assert!(["a.img", "b.img"].map(|name| fs::read(machine.dir().join(name)).unwrap()) == below);
    // As it is said.
    fs::remove_file(machine.dir().join("c.img")).unwrap();
    machine.ok("pivot", &[]);
    assert!(!machine.has(".c.img.qmerge-live"));
    machine.holds_the_disk("a.img");
}

/// An encrypted layer's data is written to a plain image only where that is allowed, in either direction and by a snapshot.
#[test]
fn nothing_is_decrypted_unasked() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::encrypted();
    let refused = ["is encrypted", "plain text", "--allow-plaintext"];
    for end in ["--pivot", "--active", "--keep-overlay"] {
        machine.fails("commit", &[end], 6, &refused);
    }
    let snapshot = ["live", "snapshot", "vda=n.img", "--qmp", "qmp.sock"];
    failed(&qmerge(machine.dir(), &snapshot), 6, &refused);
    assert!(!machine.has("n.img"));
    let plain = fs::read(machine.dir().join("base.img")).unwrap();
    assert!(!plain.windows(16).any(|bytes| bytes == [0x5a; 16]));
    // The engine cannot empty what it cannot read.
    machine.fails("commit", &["--pivot", "--allow-plaintext"], 7, &["encrypted", "--allow-stale"]);
    let output = qmerge(machine.dir(), &[&snapshot[..], &["--allow-plaintext"]].concat());
    assert!(output.status.success(), "{}", text(&output.stderr));
    // The overlay holds nothing yet, but what lies below it is encrypted.
    machine.fails("pull", &[], 6, &refused);
    machine.ok("pull", &["--allow-plaintext"]);
    assert_eq!(machine.chain(), ["n.img"]);
}

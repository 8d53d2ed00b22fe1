//! What is shown, snapshots, other clients' jobs, and monitors that cannot be used.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::process::Command;

use qmp_client::{Execute, Graph};
use serde_json::{Value, json};

use crate::support::{Lab, failed, qmerge, rows, run, text, tools_are_here};

#[test]
fn disks_and_their_chains_are_shown() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    let (three, data) = (lab.path("3.img"), lab.path("data.raw"));
    let listed = lab.ok(&["list"]);
    assert_eq!(
        rows(&listed),
        [
            vec!["DISK", "FORMAT", "VIRTUAL", "SIZE", "NODE", "FILE"],
            vec!["disk0", "qcow2", "16", "MiB", "top", &three],
            vec!["disk1", "raw", "4", "MiB", "data", &data],
        ]
    );
    assert_eq!(
        lab.json(&["list"]),
        json!([
            {"disk": "disk0", "node": "top", "file": three, "format": "qcow2", "virtual-size": 16 << 20},
            {"disk": "disk1", "node": "data", "file": data, "format": "raw", "virtual-size": 4 << 20},
        ])
    );

    let chain = lab.ok(&["chain", "disk0"]);
    let layers: Vec<_> =
        rows(&chain).into_iter().skip(1).map(|r| (r[0].to_owned(), r[r.len() - 1].to_owned())).collect();
    let expected = [("[3]", "3.img"), ("[2]", "2.img"), ("[1]", "1.img")];
    assert_eq!(layers, expected.map(|(index, file)| (index.to_owned(), lab.path(file))));

    let chain = lab.json(&["chain", "disk0"]);
    let indexes: Vec<_> = chain.as_array().unwrap().iter().map(|l| l["index"].clone()).collect();
    assert_eq!(indexes, [3, 2, 1]);
    let active = &chain[0];
    assert_eq!(active["node"], "top");
    assert_eq!(active["filename"], three.as_str());
    assert_eq!((&active["format"], &active["protocol"]), (&json!("qcow2"), &json!("file")));
    assert_eq!(active["virtual-size"], 16 << 20);
    assert!(active["actual-size"].as_u64().unwrap() >= 8 << 20);
    assert_eq!(active["backing-filename"], "2.img");
    assert_eq!(active["full-backing-filename"], lab.path("2.img"));
    assert_eq!(active["backing-filename-format"], "qcow2");
    assert_eq!((&active["ro"], &chain[2]["ro"]), (&json!(false), &json!(true)));
    assert!(chain[2].get("backing-filename").is_none());
    // The disk goes by its file too, and the option may stand before the verb.
    let output = qmerge(lab.dir(), &["live", "--qmp", "qmp.sock", "chain", "3.img", "--json"]);
    assert_eq!(serde_json::from_slice::<Value>(&output.stdout).unwrap(), chain);
}

#[test]
fn two_disks_get_overlays_in_one_transaction() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    fs::write(lab.dir().join("taken.img"), "precious").unwrap();
    let before = lab.json(&["list"]);
    lab.fails(
        &["snapshot", "disk0=4.img", "disk1=taken.img"],
        6,
        &["taken.img exists", "choose another name"],
    );
    lab.fails(&["snapshot", "disk0=4.img", "disk0=5.img"], 6, &["named twice"]);
    lab.fails(&["snapshot", "disk0=no-folder/4.img"], 6, &["no-folder"]);
    lab.fails(&["snapshot", "disk0=4.img", "vdz=5.img"], 2, &["vdz", "disk0, disk1"]);
    lab.fails(&["snapshot", "disk0"], 2, &["DISK=FILE", "qmerge live snapshot --help"]);
    assert_eq!(lab.json(&["list"]), before);
    assert_eq!(fs::read(lab.dir().join("taken.img")).unwrap(), b"precious");
    assert!(!lab.dir().join("4.img").exists());

    let said = lab.ok(&["snapshot", "disk0=4.img", "disk1=data-1.img"]);
    assert!(said.contains(&lab.path("4.img")) && said.contains(&lab.path("data.raw")), "{said}");
    let listed = lab.json(&["list"]);
    assert_eq!(
        (&listed[0]["file"], &listed[1]["file"]),
        (&json!(lab.path("4.img")), &json!(lab.path("data-1.img")))
    );
    // Nothing was renumbered.
    let chain = lab.json(&["chain", "disk0"]);
    assert_eq!((&chain[0]["index"], &chain[1]["index"]), (&json!(4), &json!(3)));
    assert_eq!(chain[1]["filename"], lab.path("3.img"));
    let made = lab.json(&["snapshot", "disk1=data-2.img"]);
    assert_eq!(made, json!([lab.json(&["list"])[1]]));
    let info = run("qemu-img", lab.dir(), &["info", "-U", "data-1.img"]);
    assert!(info.contains("backing file format: raw"), "{info}");
}

#[test]
fn the_job_of_another_client_is_shown_and_steered() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    assert_eq!(lab.ok(&["jobs"]), "no job\n");
    assert_eq!(lab.json(&["jobs"]), json!([]));
    for auto_dismiss in [false, true] {
        lab.slow_commit("theirs", auto_dismiss);
        let job = lab.job_becomes("running");
        assert_eq!(
            (&job["disk"], &job["id"], &job["type"]),
            (&json!("disk0"), &json!("theirs"), &json!("commit"))
        );
        assert_eq!((&job["speed"], &job["total-progress"]), (&json!(65536), &json!(16 << 20)));
        assert_eq!((&job["io-status"], &job["auto-dismiss"]), (&json!("ok"), &json!(auto_dismiss)));
        let table = lab.ok(&["jobs"]);
        assert_eq!(rows(&table)[1][..3], ["disk0", "commit", "running"], "{table}");
        assert!(table.contains("64 KiB/s"), "{table}");

        assert_eq!(lab.json(&["speed", "disk0", "128K"])["speed"], 128 << 10);
        assert_eq!(lab.json(&["jobs"])[0]["speed"], 128 << 10);
        lab.fails(&["speed", "disk0", "fast"], 2, &["is not a size", "qmerge live speed --help"]);
        lab.fails(&["resume", "disk0"], 1, &["not paused", "qmerge live jobs"]);
        assert!(lab.ok(&["pause", "disk0"]).contains("halted"));
        lab.job_becomes("paused");
        lab.fails(&["pause", "disk0"], 1, &["already paused"]);
        assert!(lab.ok(&["resume", "disk0"]).contains("goes on"));
        lab.job_becomes("running");

        lab.fails(
            &["cancel", "disk1"],
            1,
            &["no job works on the disk disk1", "qmerge live jobs --qmp qmp.sock"],
        );
        lab.job_becomes("running");
        assert_eq!(lab.json(&["cancel", "disk0"])["status"], "null");
        assert_eq!(lab.json(&["jobs"]), json!([]));
        assert_eq!(lab.json(&["chain", "disk0"]).as_array().unwrap().len(), 3);
    }
    lab.fails(&["cancel", "disk0"], 1, &["no job works on the disk disk0"]);
}

#[test]
fn an_active_merge_that_is_ready_is_cancelled_without_pivot() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    let monitor = lab.connect();
    let base = Graph::ask(&monitor).unwrap().disk("disk0").unwrap().layer("[1]").unwrap().node.clone();
    monitor.query("block-commit", json!({"job-id": "active", "device": "top", "base-node": base})).unwrap();
    drop(monitor);
    assert_eq!(lab.job_becomes("ready")["disk"], "disk0");
    assert!(lab.ok(&["cancel", "disk0"]).contains("is cancelled"));
    assert_eq!(lab.json(&["jobs"]), json!([]));
    let chain = lab.json(&["chain", "disk0"]);
    assert_eq!((&chain[0]["node"], &chain[2]["ro"]), (&json!("top"), &json!(true)));
}

#[test]
fn who_cannot_be_reached_is_explained() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    lab.fails(&["chain", "vdz"], 2, &["'vdz'", "disk0, disk1", "qmerge live list --qmp qmp.sock"]);
    let holding = lab.connect();
    lab.fails(&["list"], 1, &["another client holds this monitor", "then again: qmerge live list"]);
    drop(holding);
    let report = qmerge(lab.dir(), &["live", "list", "--json", "--qmp", "none.sock"]);
    let event: Value = serde_json::from_slice(&report.stdout).unwrap();
    assert_eq!(
        (&event["event"], &event["kind"], &event["exit-code"]),
        (&json!("error"), &json!("no-monitor"), &json!(1))
    );
}

#[test]
fn an_image_that_qemu_holds_leads_to_the_same_merge_as_it_runs() {
    if !tools_are_here() {
        return;
    }
    let lab = Lab::new();
    let socket = lab.path("qmp.sock");
    // A client that holds the monitor keeps it from being asked for the disk's name.
    let client = lab.connect();
    let hint = format!("qmerge live commit 3.img --pivot --qmp {socket}");
    failed(&qmerge(lab.dir(), &["commit", "3.img"]), 5, &["in use", &hint]);
    drop(client);
    let hint = format!("hint: merge it as it runs: qmerge live commit disk0 --pivot --qmp {socket}\n");
    failed(&qmerge(lab.dir(), &["commit", "3.img"]), 5, &["in use", &hint]);
    let hint = format!("hint: merge it as it runs: qmerge live commit disk0 --top '[2]' --qmp {socket}\n");
    failed(&qmerge(lab.dir(), &["commit", "3.img", "--top", "2.img"]), 5, &["in use", &hint]);
    // What is printed can be typed.
    let output = qmerge(lab.dir(), &["live", "commit", "3.img", "--top", "2.img", "--qmp", &socket]);
    assert_eq!(output.status.code(), Some(0), "{}", crate::support::text(&output.stderr));
    assert_eq!(lab.json(&["chain", "disk0"]).as_array().unwrap().len(), 2);
    failed(
        &qmerge(lab.dir(), &["flatten", "3.img", "-o", "new.img"]),
        5,
        &[&format!("qmerge live list --qmp {socket}")],
    );
}

#[test]
fn addresses_without_a_monitor_get_a_hint() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path();
    let live = |args: &[&str]| qmerge(dir, &[&["live"], args].concat());
    failed(&live(&["list", "--qmp", "none.sock"]), 1, &["none.sock", "has not made this socket", "ls -l ."]);
    drop(UnixListener::bind(dir.join("stale.sock")).unwrap());
    failed(
        &live(&["list", "--qmp", "stale.sock"]),
        1,
        &["nobody listens there any more", "leaves its socket behind"],
    );
    failed(&live(&["list"]), 2, &["--qmp ADDRESS is missing", "qmerge live list --qmp PATH"]);
    failed(&live(&["list", "--qmp", "tcp:localhost"]), 2, &["tcp:HOST:PORT", "qmerge live list --help"]);
    failed(&live(&[]), 2, &["what shall be done?", "qmerge live --help"]);
    failed(&live(&["rebase", "vda", "--qmp", "x"]), 2, &["rebase", "qmerge live --help"]);
}

#[test]
fn a_managers_monitor_is_not_gone_around() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("libvirt/qemu/domain-1-vm");
    fs::create_dir_all(&dir).unwrap();
    let socket: PathBuf = dir.join("monitor.sock");
    // It is not even connected to.
    let listener = UnixListener::bind(&socket).unwrap();
    listener.set_nonblocking(true).unwrap();
    // What the domain's definition tells: another disk, and the whole chain of the first.
    let definitions = folder.path().join("definitions");
    fs::create_dir(&definitions).unwrap();
    fs::write(definitions.join("vm.xml"), DEFINITION).unwrap();
    let virsh = "virsh -c qemu:///system";
    let live = |known: bool, args: &[&str]| {
        let nothing = folder.path().join("none");
        Command::new(env!("CARGO_BIN_EXE_qmerge"))
            .args([&["live"], args, &["--qmp", socket.to_str().unwrap()]].concat())
            .current_dir(folder.path())
            .env("QMERGE_LIBVIRT_DIR", if known { &definitions } else { &nothing })
            .output()
            .unwrap()
    };
    let here = folder.path().display();
    let snapshot = format!("{virsh} snapshot-create-as vm --no-metadata --disk-only --atomic --diskspec");
    for (known, args, instead) in [
        (
            true,
            &["snapshot", "vda=/vm/a.img"][..],
            format!("{snapshot} vda,file=/vm/a.img --diskspec vdb,snapshot=no"),
        ),
        (
            true,
            &["snapshot", "virtio-disk0=a,b"],
            format!("{snapshot} vda,file={here}/a,,b --diskspec vdb,snapshot=no"),
        ),
        // Which other disks there are is asked when the line is typed.
        (
            false,
            &["snapshot", "vda=a.img"],
            format!("{snapshot} vda,file={here}/a.img $({virsh} domblklist vm --details | "),
        ),
        (
            true,
            &["commit", "vda", "--base", "vda[1]", "--top", "[2]"],
            format!("{virsh} blockcommit vm vda --base /vm/base.raw --top '/vm/b c.qcow2' --wait --verbose"),
        ),
        (
            true,
            &["commit", "vda", "--base", "base.raw", "--pivot", "--bandwidth", "1K"],
            format!("{virsh} dumpxml vm"),
        ),
        (
            true,
            &["commit", "vda", "--base", "/vm/x", "--pivot", "--bandwidth", "1K"],
            format!(
                "{virsh} blockcommit vm vda --base /vm/x --pivot --bandwidth 1024 --bytes --wait --verbose"
            ),
        ),
        // Our numbers mean other layers there, so they are not passed on.
        (
            true,
            &["commit", "vda", "--base", "vda[7]"],
            format!("name them by their paths, which this shows: {virsh} dumpxml vm"),
        ),
        (true, &["commit", "vdb", "--base", "[1]"], format!("{virsh} dumpxml vm")),
        (false, &["commit", "vda", "--base", "vda[1]"], format!("{virsh} dumpxml vm")),
        (false, &["pull", "vda", "--base", "[1]"], format!("{virsh} dumpxml vm")),
        (
            true,
            &["pull", "vda", "--base", "[1]"],
            format!("{virsh} blockpull vm vda --base /vm/base.raw --wait --verbose"),
        ),
        (true, &["cancel", "virtio-disk0"], format!("{virsh} blockjob vm vda --abort")),
        (true, &["pivot", "vda"], format!("{virsh} blockjob vm vda --pivot")),
        (false, &["speed", "vda", "1M"], format!("{virsh} blockjob vm vda --bandwidth 1048576 --bytes")),
        (
            false,
            &["pause", "vda"],
            format!("libvirt has no command for that; its jobs can be slowed: {virsh} blockjob vm vda"),
        ),
    ] {
        let output = live(known, args);
        failed(&output, 6, &["belongs to libvirt", &instead]);
        let err = text(&output.stderr);
        assert!(!err.contains("DOMAIN") && !err.lines().last().unwrap().contains("vda["), "{err}");
    }
    assert!(listener.accept().is_err());
    // To look is allowed; libvirt, which holds its monitor, is named.
    failed(&live(false, &["list"]), 1, &["did not greet", &format!("{virsh} domblklist vm")]);
}

/// As libvirt describes a domain that runs.
/// libvirt's own commands do not ask whether an encrypted disk may lie in plain text; so they are printed only where that is
/// allowed.
#[test]
fn a_line_for_libvirt_waits_for_the_word_that_plain_text_is_meant() {
    let folder = tempfile::tempdir().unwrap();
    let dir = folder.path().join("libvirt/qemu/domain-1-vm");
    fs::create_dir_all(&dir).unwrap();
    let socket = dir.join("monitor.sock");
    let definitions = folder.path().join("definitions");
    fs::create_dir(&definitions).unwrap();
    let here = folder.path().display().to_string();
    let definition = DEFINITION.replace("/vm/", &format!("{here}/"));
    fs::write(definitions.join("vm.xml"), definition).unwrap();
    fs::write(folder.path().join("base.raw"), "plain").unwrap();
    // Their formats are told by their first bytes.
    for secret in ["c.qcow2", "b c.qcow2"] {
        fs::write(folder.path().join(secret), b"LUKS\xba\xbe\0\x01").unwrap();
    }
    let allow = "--allow-plaintext";
    for (args, tells) in [
        (&["snapshot", "vda=n.img"][..], true),
        (&["commit", "vda", "--pivot"], true),
        (&["commit", "vda", "--top", "[2]"], true),
        (&["commit", "vda", "--base", "[2]", "--pivot"], false),
        (&["commit", "vda", "--shallow", "--pivot"], false),
        (&["pull", "vda"], false),
        (&["snapshot", "vdb=n.img"], false),
    ] {
        let live = |more: &[&str]| {
            Command::new(env!("CARGO_BIN_EXE_qmerge"))
                .args([&["live"], args, more, &["--qmp", socket.to_str().unwrap()]].concat())
                .current_dir(folder.path())
                .env("QMERGE_LIBVIRT_DIR", &definitions)
                .output()
                .unwrap()
        };
        let without = live(&[]);
        if tells {
            failed(&without, 6, &["plain text", allow]);
            assert!(!text(&without.stderr).contains("virsh"), "{args:?}");
            failed(&live(&[allow]), 6, &["virsh -c qemu:///system "]);
        } else {
            failed(&without, 6, &["virsh -c qemu:///system "]);
        }
    }
}

const DEFINITION: &str = "<domstatus state='running'><domain type='qemu' id='1'><name>vm</name><devices>
<disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='/vm/c.qcow2' index='4'/>
<backingStore type='file' index='3'><format type='qcow2'/><source file='/vm/b c.qcow2'/>
<backingStore type='file' index='1'><format type='raw'/><source file='/vm/base.raw'/><backingStore/></backingStore>
</backingStore><target dev='vda' bus='virtio'/><alias name='virtio-disk0'/></disk>
<disk type='file' device='disk'><source file='/vm/data.qcow2'/><target dev='vdb'/><alias name='virtio-disk1'/></disk>
</devices></domain></domstatus>";

//! Backing names of every kind, bases that are no files, small bases and long chains.

use std::process::{Child, Command};

use serde_json::{Value, json};

use crate::machine::{Machine, Style, usual_chain};
use crate::support::{qmerge, run, text, tools_are_here};

/// The backing name in the header of an image, as QEMU's tool reads it.
fn backing(machine: &Machine, image: &str) -> String {
    let info = run("qemu-img", machine.dir(), &["info", "-U", "--output=json", image]);
    let info: Value = serde_json::from_str(&info).unwrap();
    info["backing-filename"].as_str().unwrap_or_default().to_owned()
}

#[test]
fn names_keep_their_style_and_json_names_become_plain() {
    if !tools_are_here() {
        return;
    }
    for (of_c, expected) in [
        ("b.img", "base.img"),
        ("ABSOLUTE", "ABSOLUTE"),
        (r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"ABSOLUTE"}}"#, "ABSOLUTE"),
    ] {
        let machine = Machine::with(Style::Daemon, "c.img", |dir| {
            usual_chain(dir, "raw");
            let b = dir.join("b.img").display().to_string();
            let name = of_c.replace("ABSOLUTE", &b);
            run("qemu-img", dir, &["rebase", "-u", "-F", "qcow2", "-b", &name, "c.img"]);
        });
        machine.ok("commit", &["--top", "[3]"]);
        assert_eq!(
            backing(&machine, "c.img"),
            expected.replace("ABSOLUTE", &machine.path("base.img")),
            "{of_c}"
        );
        machine.holds_the_disk("c.img");
    }
}

#[test]
fn a_name_that_is_given_is_written_if_it_leads_to_base() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Drive);
    machine.fails(
        "commit",
        &["--top", "[3]", "--backing-file", "a.img"],
        6,
        &["a.img", "not to", "base.img", "--qmp qmp.sock --backing-file NAME"],
    );
    machine.ok("commit", &["--top", "[3]", "--backing-file", "./base.img"]);
    assert_eq!(backing(&machine, "c.img"), "./base.img");
    machine.holds_the_disk("c.img");
}

#[test]
fn a_base_that_is_smaller_than_top_grows() {
    if !tools_are_here() {
        return;
    }
    for format in ["raw", "qcow2"] {
        for (style, active) in [(Style::Daemon, true), (Style::Drive, true), (Style::Drive, false)] {
            let machine = Machine::with(style, "c.img", |dir| {
                run("qemu-img", dir, &["create", "-q", "-f", format, "base.img", "8M"]);
                run("qemu-io", dir, &["-f", format, "-c", "write -q -P 1 0 8M", "base.img"]);
                run(
                    "qemu-img",
                    dir,
                    &["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", format, "a.img", "16M"],
                );
                run("qemu-io", dir, &["-f", "qcow2", "-c", "write -q -P 2 7M 2M", "a.img"]);
                run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "-b", "a.img", "-F", "qcow2", "c.img"]);
                run("qemu-io", dir, &["-f", "qcow2", "-c", "write -q -P 3 12M 1M", "c.img"]);
            });
            let args: &[&str] = if active { &["--pivot"] } else { &["--top", "[2]"] };
            let plan = machine.events("commit", &[args, &["-n"]].concat()).remove(0);
            let sizes = (&plan["base-virtual-size-before"], &plan["base-virtual-size-after"]);
            assert_eq!(sizes, (&json!(8 << 20), &json!(16 << 20)));
            if (style, active) == (Style::Drive, false) && format == "raw" {
                // The same in two calls: it is the client that switches which must be able to flush.
                machine.ok("commit", &[args, &["--async"]].concat());
                machine.job_becomes("pending");
            }
            assert!(machine.ok("commit", args).contains("merged into"));
            machine.holds_the_disk(if active { "base.img" } else { "c.img" });
        }
    }
}

#[test]
fn a_base_that_could_not_be_made_durable_is_not_begun_with() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::with(Style::Daemon, "c.img", |dir| {
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "base.img", "8M"]);
        run(
            "qemu-img",
            dir,
            &["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "qcow2", "a.img", "16M"],
        );
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "-b", "a.img", "-F", "qcow2", "c.img"]);
    });
    let before = machine.files();
    machine.fails("commit", &["--top", "[2]"], 6, &["must grow", "cannot make it durable", "hint: "]);
    assert!(before == machine.files() && machine.job().is_null());
}

/// A server for one export; it is killed with the value.
struct Server(Child);

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn a_base_behind_nbd_is_named_by_its_index() {
    if !tools_are_here() {
        return;
    }
    for active in [false, true] {
        let mut server = None;
        let machine = Machine::with(Style::Daemon, "c.img", |dir| {
            usual_chain(dir, "qcow2");
            let socket = dir.join("nbd.sock");
            let nbd = Command::new("qemu-nbd")
                .args(["-f", "qcow2", "-e", "4", "-t", "-k", socket.to_str().unwrap(), "base.img"])
                .current_dir(dir)
                .spawn();
            server = Some(Server(nbd.unwrap()));
            while std::os::unix::net::UnixStream::connect(&socket).is_err() {
                std::thread::sleep(std::time::Duration::from_millis(20));
            }
            let name = format!("nbd+unix:///?socket={}", socket.display());
            run("qemu-img", dir, &["rebase", "-u", "-F", "raw", "-b", &name, "a.img"]);
        });
        let chain = machine.document(&["chain", machine.disk()]);
        assert_eq!((&chain[3]["protocol"], &chain[3]["index"]), (&json!("nbd"), &json!(1)));
        let plan = machine.events("commit", &["--base", "[1]", "--top", "[3]", "-n"]).remove(0);
        assert_eq!(plan["counted"], false, "what lies behind the network is not read");
        assert!(plan["bytes-to-copy"].as_u64().unwrap() >= 7 << 20, "{plan}");
        let args: &[&str] =
            if active { &["--base", "[1]", "--pivot"] } else { &["--base", "[1]", "--top", "[3]"] };
        let args = if active {
            machine.fails(
                "commit",
                args,
                6,
                &["c.img could not become an empty overlay", "over nbd", "--allow-stale"],
            );
            [args, &["--allow-stale"]].concat()
        } else {
            args.to_vec()
        };
        let said = machine.ok("commit", &args);
        assert!(said.contains("merged into nbd"), "{said}");
        if active {
            assert_eq!(machine.chain().len(), 1);
            // No engine can empty an overlay onto what it cannot see; that is told before, and nothing is left to do.
            let stays =
                format!("stays as it is, with old data: start nothing from it: {}: ", machine.path("c.img"));
            assert!(said.contains(&stays) && !said.contains("qmerge live recover"), "{said}");
            assert!(!machine.has(".c.img.qmerge-live"), "{said}");
            let mut machine = machine;
            machine.stop();
            drop(server);
            crate::machine::shows(machine.dir(), "base.img", "expected.raw");
        } else {
            assert!(
                backing(&machine, "c.img").starts_with("nbd+unix:///?socket="),
                "{}",
                backing(&machine, "c.img")
            );
            let mut machine = machine;
            machine.stop();
            run(
                "qemu-img",
                machine.dir(),
                &["compare", "-q", "-f", "qcow2", "-F", "raw", "c.img", "expected.raw"],
            );
        }
    }
}

#[test]
fn a_hundred_layers_become_two_and_then_one() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::with(Style::Daemon, "100.img", |dir| {
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "1.img", "16M"]);
        let script: String = (2..=100)
            .map(|n| {
                let below = n - 1;
                format!(
                    "qemu-img create -q -f qcow2 -b {below}.img -F qcow2 {n}.img 16M
                     qemu-io -f qcow2 -c 'write -q -P {n} {}k 96k' {n}.img\n",
                    n * 100
                )
            })
            .collect();
        run("sh", dir, &["-ec", &script]);
    });
    assert_eq!(machine.chain().len(), 100);
    machine.ok("commit", &["--top", "disk0[99]", "--delete"]);
    assert_eq!(machine.chain(), ["100.img", "1.img"]);
    assert!(!machine.has("2.img") && !machine.has("99.img"));
    machine.ok("commit", &["--pivot", "--delete"]);
    let left = std::fs::read_dir(machine.dir()).unwrap().flatten();
    let left = left.filter(|e| e.file_name().to_string_lossy().ends_with(".img")).count();
    assert_eq!(left, 1);
    machine.holds_the_disk("1.img");
}

#[test]
fn a_relative_name_of_qemus_is_understood_from_another_folder() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::RelativeDrive);
    let elsewhere = tempfile::tempdir().unwrap();
    // A file of that name here is not the one that is meant.
    std::fs::write(elsewhere.path().join("c.img"), "precious").unwrap();
    let socket = machine.path("qmp.sock");
    let live = |args: &[&str]| {
        let output = qmerge(elsewhere.path(), &[&["live"], args, &["--qmp", &socket]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        text(&output.stdout)
    };
    assert!(live(&["list"]).contains(&machine.path("c.img")));
    live(&["snapshot", &format!("vda={}", machine.path("d.img"))]);
    assert_eq!(backing(&machine, "d.img"), machine.path("c.img"));
    live(&["commit", "vda", "--pivot", "--delete"]);
    assert_eq!(std::fs::read(elsewhere.path().join("c.img")).unwrap(), b"precious");
    assert!(!machine.has("c.img"));
    machine.holds_the_disk("base.img");
}

/// QEMU describes a format above a throttle by a `json:` name; the old active image was not emptied then.
#[test]
fn a_filter_below_the_base_hides_no_file() {
    if !tools_are_here() {
        return;
    }
    let mut machine = Machine::new(Style::ThrottledBase);
    let chain = machine.document(&["chain", "vda"]);
    assert_eq!(chain[3]["filename"], machine.path("base.img").as_str(), "{chain}");
    machine.ok("commit", &["--top", "[3]"]);
    let said = machine.ok("commit", &["--active", "--pivot"]);
    assert!(said.contains("is an empty overlay on") && !said.contains("not touched"), "{said}");
    machine.stop();
    assert!(!machine.has(".c.img.qmerge-live"));
    machine.holds_the_disk("c.img");
}

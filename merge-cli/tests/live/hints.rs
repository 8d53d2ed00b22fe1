//! The hints that live verbs give, typed in a shell: each does what it says.

use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use self::kind::HintKind;
use crate::machine::{Machine, Style};
use crate::support::{qmerge, run, text, tools_are_here};

#[path = "../../src/hint/kind.rs"]
mod kind;

/// Where a kind of hint is tried.
enum TriedLive {
    /// Here: the machine, the call that provokes it, and the exit code of what it says.
    Here(Box<Machine>, Vec<&'static str>, i32),
    /// Here, when the machine is stopped.
    Stopped(Box<Machine>, Vec<&'static str>),
    /// By another suite or test; or it has no command.
    By(&'static str),
}

/// A disk on a base of a format that only QEMU writes.
fn on_vmdk() -> Box<Machine> {
    Box::new(Machine::with(Style::Drive, "c.img", |dir| {
        run("qemu-img", dir, &["create", "-q", "-f", "vmdk", "base.img", "16M"]);
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "vmdk", "c.img"]);
        run("qemu-io", dir, &["-f", "qcow2", "-c", "write -q -P 4 128k 64k", "c.img"]);
    }))
}

/// A disk of which another image uses a layer.
fn shared() -> Box<Machine> {
    let machine = Box::new(Machine::new(Style::Daemon));
    let other = ["create", "-q", "-f", "qcow2", "-b", "a.img", "-F", "qcow2", "other.img"];
    run("qemu-img", machine.dir(), &other);
    machine
}

/// A disk whose base must grow, which a storage daemon cannot make durable.
fn short_base() -> Box<Machine> {
    Box::new(Machine::with(Style::Daemon, "c.img", |dir| {
        run("qemu-img", dir, &["create", "-q", "-f", "qcow2", "base.img", "8M"]);
        let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b"];
        run("qemu-img", dir, &[&create[..], &["base.img", "a.img", "16M"]].concat());
        run("qemu-img", dir, &[&create[..], &["a.img", "c.img"]].concat());
    }))
}

/// An active merge that is ready, and a call that it is in the way of.
fn ready() -> (Box<Machine>, Vec<&'static str>) {
    let machine = Box::new(Machine::new(Style::Daemon));
    machine.ok("commit", &["--active"]);
    (machine, vec!["snapshot", "disk0=new.img"])
}

/// A new kind of hint does not compile without a line here.
fn provoke(kind: HintKind) -> TriedLive {
    let daemon = || Box::new(Machine::new(Style::Daemon));
    match kind {
        HintKind::Active | HintKind::BelowActive => TriedLive::Here(daemon(), vec!["commit", "disk0"], 0),
        HintKind::AllowStale | HintKind::Delete => {
            TriedLive::Here(on_vmdk(), vec!["commit", "vda", "--pivot"], 0)
        }
        HintKind::AllowPlaintext => {
            TriedLive::Here(Box::new(Machine::encrypted()), vec!["snapshot", "vda=new.img"], 0)
        }
        HintKind::AllowSharedBase | HintKind::LivePull => {
            TriedLive::Here(shared(), vec!["commit", "disk0", "--top", "[3]"], 0)
        }
        HintKind::LiveEnd | HintKind::LiveCancel => {
            let (machine, call) = ready();
            TriedLive::Here(machine, call, 0)
        }
        HintKind::Converge => {
            let call = ["commit", "vda", "--active", "--bandwidth", "32K", "--timeout", "1"];
            // The time is up once more: it is the user's.
            TriedLive::Here(Box::new(Machine::new(Style::Drive)), call.to_vec(), 4)
        }
        HintKind::Again => {
            let call = ["commit", "disk0", "--top", "[3]", "--bandwidth", "32K", "--timeout", "1"];
            TriedLive::Here(daemon(), call.to_vec(), 4)
        }
        HintKind::LiveLook => TriedLive::Here(daemon(), vec!["chain", "nothing"], 0),
        HintKind::Offline => TriedLive::Stopped(short_base(), vec!["commit", "disk0", "--top", "[2]"]),
        HintKind::Recover | HintKind::Forget => TriedLive::By("recover"),
        HintKind::Virsh => TriedLive::By("libvirt"),
        HintKind::Advice | HintKind::Help => TriedLive::By("refusals"),
        HintKind::DropBitmaps => TriedLive::By("plans"),
        _ => TriedLive::By("the suite qemu"),
    }
}

/// The text of the hint of this kind in the error event.
fn hint(output: &Output, kind: HintKind) -> String {
    let out = text(&output.stdout) + &text(&output.stderr);
    let events = out.lines().filter_map(|line| serde_json::from_str::<Value>(line).ok());
    let hints: Vec<Value> = events.filter_map(|event| event["hints"].as_array().cloned()).flatten().collect();
    let found = hints.iter().find(|hint| hint["kind"] == kind.name());
    assert!(found.is_some(), "no hint {}: {out}", kind.name());
    found.and_then(|hint| hint["text"].as_str()).unwrap_or_default().to_owned()
}

/// Types the command at the end of a hint.
fn type_in(dir: &Path, hint: &str) -> Output {
    let line = &hint[hint.rfind("qmerge ").unwrap()..];
    let binary = Path::new(env!("CARGO_BIN_EXE_qmerge")).parent().unwrap();
    let path = format!("{}:{}", binary.display(), std::env::var("PATH").unwrap());
    Command::new("sh").args(["-c", line]).current_dir(dir).env("PATH", path).output().unwrap()
}

#[test]
fn every_kind_of_live_hint_does_what_it_says_when_it_is_typed() {
    if !tools_are_here() {
        return;
    }
    for &kind in HintKind::ALL {
        let (mut machine, call, code, stops) = match provoke(kind) {
            TriedLive::Here(machine, call, code) => (machine, call, code, false),
            TriedLive::Stopped(machine, call) => (machine, call, 0, true),
            TriedLive::By(test) => {
                assert!(!test.is_empty());
                continue;
            }
        };
        let words = [&["live"], &call[..], &["--qmp", "qmp.sock", "--json"]].concat();
        let refused = qmerge(machine.dir(), &words);
        assert!(!refused.status.success(), "{}: {call:?}", kind.name());
        let hint = hint(&refused, kind);
        if stops {
            machine.stop();
        }
        let typed = type_in(machine.dir(), &hint);
        let said = text(&typed.stdout) + &text(&typed.stderr);
        assert_eq!(typed.status.code(), Some(code), "{}: {hint}\n{said}", kind.name());
    }
}

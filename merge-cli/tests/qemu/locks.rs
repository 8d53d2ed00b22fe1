//! Images that another process holds, and our own locks.

use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};

use kit::{Holder, are_here, qemu_is_here};

use crate::support::{Article, Patch, binary};

/// Every merge of the chain is refused, names the file and the holder, and changes nothing.
#[track_caller]
fn in_use(chain: &Article, held: &str, holder: &Holder, program: &str) {
    let pid = holder.pid().to_string();
    for options in [&[][..], &["--top", "b.qcow2"], &["--dry-run"]] {
        let mut args = vec!["commit", "c.qcow2"];
        args.extend(options);
        if options == ["--dry-run"] {
            // A plan may be shown beside the holder; nothing is written either way.
            chain.folder.refused_or_ok(&args, 5);
            continue;
        }
        let run = chain.folder.refused(&args, &[5]);
        assert!(run.text().contains(held), "the file is not named:\n{run}");
        assert!(run.text().contains(program) && run.text().contains(&pid), "the holder is not named:\n{run}");
    }
    let before = chain.folder.files();
    let run = chain.folder.qmerge(&["info", "c.qcow2", "--chain"]).ok();
    chain.folder.assert_unchanged(&before, &run);
}

#[test]
fn a_layer_that_qemu_writes_is_in_use() {
    if !qemu_is_here() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let chain = Article::new("writer", format);
        // A writer of the active image holds its backing files, too; base is the first that a merge would find.
        let holder = Holder::qemu_io(chain.folder.dir(), &["-f", "qcow2"], "c.qcow2");
        in_use(&chain, "", &holder, "qemu-io");
        drop(holder);
        for (layer, format) in [("b.qcow2", "qcow2"), ("a.qcow2", "qcow2"), (chain.base, format)] {
            let holder = Holder::qemu_io(chain.folder.dir(), &["-f", format], layer);
            in_use(&chain, "", &holder, "qemu-io");
        }
        chain.folder.merge("c.qcow2", &[]);
    }
}

#[test]
fn a_layer_that_qemu_reads_is_in_use() {
    if !qemu_is_here() {
        return;
    }
    for format in ["raw", "qcow2"] {
        let chain = Article::new("reader", format);
        for (layer, format) in [("c.qcow2", "qcow2"), (chain.base, format)] {
            let holder = Holder::qemu_io(chain.folder.dir(), &["-r", "-f", format], layer);
            let held = if layer == chain.base { layer } else { "" };
            in_use(&chain, held, &holder, "qemu-io");
        }
        chain.folder.merge("c.qcow2", &["--top", "b.qcow2"]);
    }
}

#[test]
fn a_sibling_that_is_open_makes_base_in_use() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("open-sibling", "qcow2");
    let elsewhere = crate::support::lab("elsewhere");
    elsewhere.overlay("other.qcow2", &chain.folder.arg("base.qcow2"), "qcow2", None, "");
    let holder = Holder::qemu_io(elsewhere.dir(), &["-f", "qcow2"], "other.qcow2");
    in_use(&chain, "base.qcow2", &holder, "qemu-io");
}

#[test]
fn an_image_served_by_qemu_nbd_is_in_use() {
    if !are_here(&["qemu-img", "qemu-io", "qemu-nbd"]) {
        return;
    }
    let chain = Article::new("nbd", "qcow2");
    let socket = chain.folder.scratch().with_extension("sock");
    let mut server = Command::new("qemu-nbd");
    server.args(["--persistent", "-f", "qcow2", "--socket"]).arg(&socket).arg(chain.folder.join("c.qcow2"));
    let holder = Holder::start(server, || socket.exists());
    in_use(&chain, "", &holder, "qemu-nbd");
}

#[test]
fn reading_verbs_work_beside_a_reader() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("beside", "qcow2");
    let holder = Holder::qemu_io(chain.folder.dir(), &["-r", "-f", "qcow2"], "c.qcow2");
    chain.folder.qmerge(&["map", "c.qcow2", "--json"]).ok();
    chain.folder.qmerge(&["check", "b.qcow2"]).ok();
    chain.folder.qmerge(&["compare", "c.qcow2", chain.before.arg()]).ok();
    drop(holder);
}

#[test]
fn info_tells_who_uses_an_image() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("who", "qcow2");
    let holder = Holder::qemu_io(chain.folder.dir(), &["-f", "qcow2"], "c.qcow2");
    let run = chain.folder.qmerge(&["info", "c.qcow2"]).ok();
    assert!(run.stdout.contains("qemu-io") && run.stdout.contains(&holder.pid().to_string()), "{run}");
}

#[test]
fn two_merges_never_run_at_once_and_qemu_is_kept_out() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("ours", "qcow2");
    let folder = &chain.folder;
    // Enough data that the merge is still at work when it is stopped right after its plan.
    folder.img(&["resize", "-q", "c.qcow2", "256M"]);
    folder.io("qcow2", "c.qcow2", &["write -P 0x55 8M 248M"]);
    let before = folder.view("qcow2", "c.qcow2");
    let mut ours = Command::new(binary())
        .args(["commit", "c.qcow2", "--json"])
        .current_dir(folder.dir())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut lines = BufReader::new(ours.stdout.take().unwrap());
    let mut plan = String::new();
    lines.read_line(&mut plan).unwrap();
    assert!(plan.contains("\"plan\""), "the first line is no plan: {plan}");
    let process = Pid::from_child(&ours);
    let send = |signal: Signal| kill_process(process, signal).unwrap();
    send(Signal::STOP);
    assert!(Patch::of(folder, "base.qcow2").size() > 0);
    for (format, layer) in
        [("qcow2", "c.qcow2"), ("qcow2", "b.qcow2"), ("qcow2", "a.qcow2"), ("qcow2", "base.qcow2")]
    {
        let intruder = folder.try_io(format, layer, &["write -P 9 0 512"]);
        assert!(intruder.code != 0 && intruder.text().contains("lock"), "{layer} is not locked:\n{intruder}");
    }
    let reader = kit::run(folder.dir(), "qemu-io", &["-r", "-f", "qcow2", "-c", "read 0 512", "base.qcow2"]);
    assert!(reader.code != 0 && reader.text().contains("lock"), "base can be read meanwhile:\n{reader}");
    let second = folder.qmerge(&["commit", "c.qcow2"]).expect(5);
    assert!(second.last_line().starts_with("hint: "), "{second}");
    send(Signal::CONT);
    let mut rest = String::new();
    std::io::Read::read_to_string(&mut lines, &mut rest).unwrap();
    let status = ours.wait().unwrap();
    assert!(status.success(), "{plan}{rest}");
    folder.view("qcow2", "c.qcow2").assert_same(&before, "the guest's view");
    folder.view("qcow2", "base.qcow2").assert_same(&before, "base");
    folder.all_clean();
}

#[test]
fn locks_are_gone_when_the_command_ends() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("released", "raw");
    chain.folder.merge("c.qcow2", &["--top", "b.qcow2"]);
    let held = chain.folder.refused_or_ok(&["info", "c.qcow2", "--chain"], 0);
    assert!(!held.text().contains("in use by"), "{held}");
    chain.folder.io("qcow2", "c.qcow2", &["write -P 1 0 512"]);
}

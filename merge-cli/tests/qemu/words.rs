//! What the command says, and what it lets pass, where images are cut short, in use, badly named or too large.

use std::fs;
use std::io::Write;
use std::os::unix::process::CommandExt;
use std::process::{Command, Stdio};

use kit::{Holder, Random, qemu_is_here, run};

use crate::support::{Article, binary, lab};

const M: u64 = 1 << 20;

/// Whatever `qemu-img convert` reads of an image that is cut short, `flatten` reads alike; so the hint of a check that could not
/// mend it leads somewhere.
#[test]
fn an_image_that_is_cut_short_is_flattened_as_qemu_reads_it() {
    if !qemu_is_here() {
        return;
    }
    let mut random = Random::new(11);
    for options in ["", "extended_l2=on,cluster_size=64k", "cluster_size=4k"] {
        let folder = lab("cut");
        folder.create("base.qcow2", 4 * M, "");
        folder.io("qcow2", "base.qcow2", &["write -P 9 0 4M"]);
        folder.overlay("top.qcow2", "base.qcow2", "qcow2", None, options);
        folder.io("qcow2", "top.qcow2", &["write -P 1 0 1M", "write -P 2 2M 512k", "write -z 3M 64k"]);
        let whole = fs::read(folder.join("top.qcow2")).unwrap();
        for _ in 0..4 {
            let cut = 70_000 + random.below(whole.len() as u64 - 70_000);
            fs::write(folder.join("top.qcow2"), &whole[..cut as usize]).unwrap();
            let theirs = folder.try_img(&["convert", "-O", "raw", "top.qcow2", "theirs.raw"]);
            let run = folder.qmerge(&["flatten", "top.qcow2", "-o", "ours.raw", "--to", "raw"]);
            assert_eq!(run.code == 0, theirs.code == 0, "cut at {cut}:\n{run}\n{theirs}");
            if run.code == 0 {
                assert!(
                    fs::read(folder.join("ours.raw")).unwrap()
                        == fs::read(folder.join("theirs.raw")).unwrap(),
                    "cut at {cut}"
                );
                fs::remove_file(folder.join("ours.raw")).unwrap();
            }
            // A merge takes nothing of the kind for granted.
            let run = folder.qmerge(&["commit", "top.qcow2", "--dry-run"]);
            assert!(run.code == 0 || run.code == 9, "{run}");
        }
        let run = folder.qmerge(&["flatten", "base.qcow2", "-o", "sound.qcow2"]).ok();
        assert!(!run.stderr.contains("cut short"), "{run}");
    }
}

#[test]
fn a_map_beside_a_writer_says_so() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("map", "qcow2");
    let quiet = chain.folder.qmerge(&["map", "c.qcow2"]).ok();
    assert!(quiet.stderr.is_empty(), "{quiet}");
    let holder = Holder::qemu_io(chain.folder.dir(), &["-f", "qcow2"], "c.qcow2");
    let run = chain.folder.qmerge(&["map", "c.qcow2", "--json"]).ok().says("in use");
    assert!(run.stderr.contains(&format!("(process {})", holder.pid())), "{run}");
    run.json();
}

/// `QMERGE_TEST_CASES=500` looks 500 times.
#[test]
fn a_chain_beside_a_writer_is_never_called_damaged() {
    if !qemu_is_here() {
        return;
    }
    let looks = std::env::var("QMERGE_TEST_CASES").ok().and_then(|n| n.parse().ok()).unwrap_or(20);
    let folder = lab("writer");
    folder.create("c.qcow2", 4 << 30, "");
    let mut writer = Command::new("qemu-io")
        .args(["-f", "qcow2", "-t", "none", "c.qcow2"])
        .current_dir(folder.dir())
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut pipe = writer.stdin.take().unwrap();
    // It stops at the end of the disk, or when it is killed.
    let feeder = std::thread::spawn(move || {
        (0..60_000_u64)
            .map(|n| n * 40_503 % 65_536)
            .all(|at| writeln!(pipe, "write -q {}k 64k", at * 64).is_ok())
    });
    for look in 0..looks {
        for args in [&["info", "c.qcow2", "--chain", "-q"][..], &["map", "c.qcow2", "-q"]] {
            let run = run(folder.dir(), binary(), args);
            assert!(run.code == 0, "look {look}:\n{run}");
        }
    }
    writer.kill().unwrap();
    writer.wait().unwrap();
    feeder.join().unwrap();
}

#[test]
fn an_index_has_one_pair_of_brackets() {
    if !qemu_is_here() {
        return;
    }
    let chain = Article::new("index", "qcow2");
    for layer in ["vda[1][1]", "[1][2]", "[[1]]", "vda[1]]", "[1]vda[2]"] {
        chain.folder.refused(&["commit", "c.qcow2", "--base", layer, "--dry-run"], &[2]);
    }
    chain.folder.qmerge(&["commit", "c.qcow2", "--base", "vda[1]", "--dry-run"]).ok();
}

/// Limits of the shell: the number of open files is raised, and the size of files is an error with words.
#[test]
fn limits_of_the_shell_are_answers_and_no_signals() {
    if !qemu_is_here() || kit::find("bash").is_none() {
        return;
    }
    let folder = lab("limits");
    folder.create("l0", M, "");
    for n in 1..40 {
        folder.overlay(&format!("l{n}"), &format!("l{}", n - 1), "qcow2", None, "");
    }
    let binary = binary().display().to_string();
    let shell = |script: &str| run(folder.dir(), "bash", &["-c", &format!("Q='{binary}'; {script}")]);
    shell("ulimit -Sn 20; \"$Q\" commit l39 --dry-run").ok();
    let run = shell("ulimit -n 20; \"$Q\" commit l39 --dry-run")
        .expect(1)
        .says("Too many open files")
        .says("ulimit -n");
    assert!(!run.text().contains("relink"), "{run}");
    folder.io("qcow2", "l39", &["write -P 1 0 1M"]);
    let before = folder.files();
    let run = shell("ulimit -f 512; \"$Q\" flatten l39 -o new.raw --to raw").expect(8).says("ulimit -f");
    folder.assert_unchanged(&before, &run);
}

#[test]
fn whoever_holds_an_image_is_called_by_its_whole_name() {
    if !qemu_is_here() || kit::find("bash").is_none() {
        return;
    }
    let chain = Article::new("long-name", "qcow2");
    let mut daemon = Command::new("qemu-storage-daemon");
    daemon.current_dir(chain.folder.dir()).args([
        "--blockdev",
        "driver=qcow2,node-name=n,file.driver=file,file.filename=c.qcow2",
        "--nbd-server",
        "addr.type=unix,addr.path=n.sock",
        "--export",
        "type=nbd,id=e,node-name=n,name=x,writable=on",
    ]);
    let socket = chain.folder.join("n.sock");
    let holder = Holder::start(daemon, || socket.exists());
    let refused = chain.folder.qmerge(&["commit", "c.qcow2"]).expect(5);
    assert!(refused.stderr.contains(&format!("qemu-storage-daemon (process {})", holder.pid())), "{refused}");
    assert!(!refused.stderr.contains("kill"), "{refused}");
    drop(holder);
    // A name with what a terminal obeys, made by a program that calls itself so.
    let image = chain.folder.arg("c.qcow2");
    let mut held = Command::new("python3");
    let script = format!(
        "import fcntl,struct,time,sys\nf=open({image:?},'r+b')\nfcntl.fcntl(f,37,struct.pack('hhqqi4x',1,0,201,1,0))\nfcntl.fcntl(f,37,struct.pack('hhqqi4x',1,0,100,200,0))\nopen('ready','w')\ntime.sleep(600)"
    );
    if kit::find("python3").is_none() {
        return;
    }
    held.arg0("evil\nhint: rm -rf ~\x1b[31m").args(["-c", &script]).current_dir(chain.folder.dir());
    let ready = chain.folder.join("ready");
    let _holder = Holder::start(held, || ready.exists());
    let shown = run(chain.folder.dir(), binary(), &["info", "c.qcow2"]);
    assert!(!shown.text().contains('\x1b') && !shown.text().contains("\nhint: rm"), "{shown}");
}

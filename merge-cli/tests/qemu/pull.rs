//! `qmerge pull`, judged by QEMU.

use kit::{Lab, qemu_is_here};

use crate::support::lab;

const M: u64 = 1 << 20;

/// `base <- a <- b <- c` of all kinds; `n` chooses which.
fn chain(name: &str, n: usize) -> (Lab, &'static str) {
    let folder = lab(name);
    let (format, base) = if n.is_multiple_of(3) { ("raw", "base.raw") } else { ("qcow2", "base.qcow2") };
    if format == "raw" {
        folder.raw(base, 6 * M, 3 * M, 1);
    } else {
        folder.create(base, 6 * M, "cluster_size=4k");
        folder.io(format, base, &["write -P 1 0 3M", "write -z 4M 64k"]);
    }
    let options =
        ["", "compat=0.10", "extended_l2=on,cluster_size=128k", "cluster_size=4k", "lazy_refcounts=on"];
    // The layer in the middle may be short: what it hides behind its end, c must hide.
    let size = [None, Some(2 * M + 512), Some(8 * M)][n % 3];
    folder.overlay("a.qcow2", base, format, size, "");
    folder.overlay("b.qcow2", "a.qcow2", "qcow2", None, "cluster_size=32k");
    folder.overlay("c.qcow2", "b.qcow2", "qcow2", Some(5 * M), options[n % options.len()]);
    folder.io("qcow2", "a.qcow2", &["write -P 2 100k 300k", "write -z 1M 200k"]);
    folder.io("qcow2", "b.qcow2", &["write -c -P 3 512k 64k", "write -P 4 1900k 99k"]);
    folder.io("qcow2", "c.qcow2", &["write -P 5 300k 5k", "write -z 520k 10k"]);
    (folder, base)
}

#[test]
fn the_guest_sees_the_same_and_no_other_file_is_touched() {
    if !qemu_is_here() {
        return;
    }
    for n in 0..15 {
        let (folder, base) = chain("pull", n);
        let before = folder.view("qcow2", "c.qcow2");
        let files = folder.files();
        let onto = [Some(base), Some("[2]"), None][n % 3];
        let mut args = vec!["pull", "c.qcow2", "--verify"];
        args.extend(onto.into_iter().flat_map(|base| ["--base", base]));
        let planned = folder.qmerge(&[&args[..], &["--dry-run"]].concat()).ok();
        folder.assert_unchanged(&files, &planned);
        folder.qmerge(&args).ok().says("the same bytes");
        folder.view("qcow2", "c.qcow2").assert_same(&before, "the guest");
        folder.check_clean("c.qcow2");
        let backing = folder.backing_of("c.qcow2").map(|(name, _)| name);
        let expected = onto.map(|onto| if onto == "[2]" { "a.qcow2".to_owned() } else { onto.to_owned() });
        assert_eq!(backing, expected, "{n}");
        let after = folder.files();
        let touched: Vec<_> = after.iter().filter(|(name, file)| files.get(*name) != Some(file)).collect();
        assert!(touched.len() == 1 && touched[0].0 == "c.qcow2", "{n}: {touched:?}");
        let again = folder.qmerge(&args).ok().says("nothing to do");
        folder.assert_unchanged(&after, &again);
    }
}

#[test]
fn a_pull_that_was_killed_goes_on() {
    if !qemu_is_here() {
        return;
    }
    for call in 1.. {
        let (folder, base) = chain("pull-killed", 1);
        let before = folder.view("qcow2", "c.qcow2");
        let args = ["pull", "c.qcow2", "--base", base];
        let was_killed = folder.killed_at_sync(call, &args);
        folder.view("qcow2", "c.qcow2").assert_same(&before, "the guest behind the kill");
        if was_killed && folder.names().iter().any(|name| name.ends_with("qmerge-journal")) {
            let state = folder.qmerge(&["info", "c.qcow2"]).ok().text();
            assert!(!state.contains("not closed cleanly"), "{state}");
        }
        if was_killed && call % 3 == 0 {
            folder.qmerge(&["abort", "c.qcow2"]).ok();
            folder.view("qcow2", "c.qcow2").assert_same(&before, "the guest, given up");
            folder.check_clean("c.qcow2");
        }
        folder.qmerge(&args).ok();
        folder.view("qcow2", "c.qcow2").assert_same(&before, "the guest");
        folder.check_clean("c.qcow2");
        assert!(folder.names().iter().all(|name| !name.contains("qmerge")), "{:?}", folder.names());
        if !was_killed {
            assert!(call > 5, "{call}");
            break;
        }
    }
}

#[test]
fn what_cannot_be_pulled_is_refused() {
    if !qemu_is_here() {
        return;
    }
    let (folder, base) = chain("pull-refused", 1);
    folder.qmerge(&["pull", base]).ok().says("nothing to do");
    folder.refused(&["pull", "c.qcow2", "--base", "c.qcow2"], &[2]);
    folder.img(&["snapshot", "-c", "s", "c.qcow2"]);
    folder.refused(&["pull", "c.qcow2"], &[6]).says("--allow-snapshot-change");
    let before = folder.view("qcow2", "c.qcow2");
    folder.qmerge(&["pull", "c.qcow2", "--allow-snapshot-change"]).ok();
    folder.view("qcow2", "c.qcow2").assert_same(&before, "the guest");
    folder.check_clean("c.qcow2");
}

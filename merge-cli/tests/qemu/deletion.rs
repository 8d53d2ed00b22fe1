//! Merges with `--delete` that are killed while they remove layers: the same command removes the rest, and nothing
//! of which that is not certain.

use std::fs;
use std::os::unix::fs::symlink;

use kit::{Holder, Lab, View, are_here};

use crate::support::lab;

const MIB: u64 = 1 << 20;
const NAMES: [&str; 5] = ["base.qcow2", "a.qcow2", "b.qcow2", "c.qcow2", "d.qcow2"];

/// A chain of so many images.
fn chain(layers: usize) -> Lab {
    let folder = lab("deletion");
    folder.create(NAMES[0], 8 * MIB, "");
    folder.io("qcow2", NAMES[0], &["write -P 1 0 1M"]);
    for (two, n) in NAMES[..layers].windows(2).zip(1..) {
        folder.overlay(two[1], two[0], "qcow2", None, "");
        folder.io("qcow2", two[1], &[&format!("write -P 0x{n}1 {n}M 300k")]);
    }
    folder
}

/// A copy of a chain.
fn copy(of: &Lab) -> Lab {
    let folder = lab("deletion");
    for name in of.names() {
        fs::copy(of.join(&name), folder.join(&name)).unwrap();
    }
    folder
}

/// A chain of which `a.qcow2` is left over: the merge of it and of `b.qcow2` was killed behind the removal of `b.qcow2`.
fn half_removed() -> Lab {
    let folder = chain(4);
    let args = ["commit", "c.qcow2", "--top", "b.qcow2", "--delete"];
    assert!(folder.killed_at_removal("a.qcow2", &args), "it removes nothing");
    assert!(folder.join("a.qcow2").exists() && !folder.join("b.qcow2").exists(), "{:?}", folder.names());
    folder
}

fn journals(folder: &Lab) -> Vec<String> {
    folder.names().into_iter().filter(|name| name.contains("qmerge")).collect()
}

/// What a merge that is to be killed leaves when it is done.
struct Merge {
    made: Lab,
    args: Vec<&'static str>,
    active: &'static str,
    by_index: bool,
    removed: &'static [&'static str],
    before: View,
}

impl Merge {
    fn new(layers: usize, top: Option<&'static str>, removed: &'static [&'static str]) -> Self {
        let (made, active) = (chain(layers), NAMES[layers - 1]);
        let mut args = vec!["commit", active, "--delete"];
        args.extend(top.map(|top| ["--top", top]).into_iter().flatten());
        let before = made.view("qcow2", active);
        Self { made, args, active, by_index: top.is_some_and(|top| top.starts_with('[')), removed, before }
    }

    fn is_over(&self, folder: &Lab) -> bool {
        journals(folder).is_empty() && !self.removed.iter().any(|name| folder.join(name).exists())
    }

    /// What the guest sees is what it saw: through the active image, or through base when that was removed.
    fn assert_same(&self, folder: &Lab, when: &str) {
        let shown = if folder.join(self.active).exists() { self.active } else { NAMES[0] };
        folder.view("qcow2", shown).assert_same(&self.before, when);
    }

    /// Kills the merge when it is about to remove each of these files, and does it again.
    fn kill_at_removal_of(&self, names: &[&str]) {
        for name in names {
            let folder = copy(&self.made);
            let when = format!("{:?}, killed at the removal of {name}", self.args);
            assert!(folder.killed_at_removal(name, &self.args), "{when}: it ended before");
            assert!(folder.join(name).exists(), "{when}: it came too late");
            assert!(!self.is_over(&folder), "{when}");
            self.again(&folder, &when);
        }
    }

    /// Kills the merge at each sync, by `kill`, and does it again. Only the gate, which sets `CI`, has the time for all of them.
    fn kill_at_every_sync(&self, kill: fn(&Lab, u32, &[&str]) -> bool) {
        let step = if std::env::var_os("CI").is_some() { 1 } else { 3 };
        for call in (1..).step_by(step) {
            let folder = copy(&self.made);
            if !kill(&folder, call, &self.args) {
                assert!(call > 1, "{:?}: nothing is synced", self.args);
                break;
            }
            self.again(&folder, &format!("{:?}, killed at sync {call}", self.args));
        }
    }

    /// Judges what a kill has left, does the merge again, and judges the end.
    fn again(&self, folder: &Lab, when: &str) {
        self.assert_same(folder, when);
        let is_switched = folder.join(self.active).exists()
            && !folder.chain_of(self.active).contains(&"a.qcow2".to_owned());
        if is_switched && folder.join(JOURNAL).exists() {
            folder.qmerge(&["info", "base.qcow2"]).ok().says("merge pending: all of").says("goes on");
            folder.refused(&["abort", "base.qcow2"], &[6]).says("finish it: qmerge commit").says("--delete");
        }
        // When all is done and removed, nothing tells of it, and an index means another layer.
        if !self.is_over(folder) {
            let again = folder.qmerge(&self.args).ok();
            if is_switched && !self.removed.contains(&self.active) {
                again.says("already merged");
            }
        } else if !self.by_index {
            let again = folder.qmerge(&self.args);
            assert!([1, 2].contains(&again.code), "{when}: {again}");
        }
        assert!(self.is_over(folder), "{when}: {:?} are left", folder.names());
        self.assert_same(folder, &format!("{when}, and done again"));
        assert_eq!(folder.join(self.active).exists(), !self.removed.contains(&self.active), "{when}");
        folder.all_clean();
    }
}

const JOURNAL: &str = ".base.qcow2.qmerge-journal";

#[test]
fn layers_below_the_active_image_are_removed_whenever_it_is_killed() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let by_path = Merge::new(4, Some("b.qcow2"), &["a.qcow2", "b.qcow2"]);
    by_path.kill_at_removal_of(&["b.qcow2", "a.qcow2", JOURNAL]);
    by_path.kill_at_every_sync(Lab::killed_at_sync);
    by_path.kill_at_every_sync(Lab::killed_at_folder_sync);
}

/// Behind the switch, the index means the active image.
#[test]
fn an_index_never_means_another_layer() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let by_index = Merge::new(5, Some("[3]"), &["a.qcow2", "b.qcow2"]);
    by_index.kill_at_removal_of(&["b.qcow2", "a.qcow2", JOURNAL]);
    by_index.kill_at_every_sync(Lab::killed_at_sync);
}

#[test]
fn the_active_image_and_all_below_are_removed_whenever_it_is_killed() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let all = ["b.qcow2", "a.qcow2", JOURNAL, "c.qcow2", ".c.qcow2.qmerge-journal"];
    let active = Merge::new(4, None, &["a.qcow2", "b.qcow2", "c.qcow2"]);
    active.kill_at_removal_of(&all);
    active.kill_at_every_sync(Lab::killed_at_sync);
    active.kill_at_every_sync(Lab::killed_at_folder_sync);
    Merge::new(4, Some("[4]"), &["a.qcow2", "b.qcow2", "c.qcow2"]).kill_at_removal_of(&all);
}

#[test]
fn a_layer_that_was_left_over_is_only_removed_if_it_is_certain() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let again = ["commit", "c.qcow2", "--top", "b.qcow2", "--delete"];
    let kept = |why: &str, change: &dyn Fn(&Lab)| {
        let folder = half_removed();
        change(&folder);
        let before = fs::read(folder.join("a.qcow2")).unwrap();
        let run = folder.qmerge(&again).ok().says("already merged").says("not removed").says(why);
        assert_eq!(fs::read(folder.join("a.qcow2")).unwrap(), before, "{run}");
        assert_eq!(journals(&folder), [""; 0], "{run}");
    };
    // A guest has run on it, in place.
    kept("written to since", &|folder| drop(folder.io("qcow2", "a.qcow2", &["write -P 9 1M 64k"])));
    kept("another file", &|folder| {
        folder.overlay("new", "base.qcow2", "qcow2", None, "");
        fs::rename(folder.join("new"), folder.join("a.qcow2")).unwrap();
    });
    kept("another image uses it", &|folder| folder.overlay("x.qcow2", "a.qcow2", "qcow2", None, ""));
    kept("leads to another file", &|folder| {
        fs::rename(folder.join("a.qcow2"), folder.join("moved")).unwrap();
        symlink("moved", folder.join("a.qcow2")).unwrap();
    });
    // Somebody holds it: nothing is removed, and the command can be typed again.
    let folder = half_removed();
    let holder = Holder::qemu_io(folder.dir(), &["-f", "qcow2"], "a.qcow2");
    folder.refused(&again, &[5]);
    drop(holder);
    folder.qmerge(&again).ok().says("removed: ").says("a.qcow2");
    assert_eq!(folder.names(), ["base.qcow2", "c.qcow2"]);
    // Without --delete it stays, and is known for what it is.
    let folder = half_removed();
    folder.qmerge(&again[..4]).ok().says("already merged").says("marked as merged");
    assert_eq!(folder.names(), ["a.qcow2", "base.qcow2", "c.qcow2"]);
    folder.qmerge(&["info", "a.qcow2"]).ok().says("merged into").says("no longer needed");
    // Another merge with --delete removes it, too.
    let folder = half_removed();
    folder.qmerge(&["commit", "c.qcow2", "--delete", "--dry-run"]).ok().says("left over").says("a.qcow2");
    folder.qmerge(&["commit", "c.qcow2", "--delete"]).ok();
    assert_eq!(folder.names(), ["base.qcow2"]);
}

/// A link to the active image goes with it, behind the journal that is found by it.
#[test]
fn an_active_image_behind_a_link_is_known_by_it() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let folder = chain(3);
    symlink("b.qcow2", folder.join("link")).unwrap();
    let args = ["commit", "link", "--delete"];
    assert!(folder.killed_at_removal(".b.qcow2.qmerge-journal", &args));
    assert!(!folder.join("b.qcow2").exists());
    folder.qmerge(&args).ok().says("b.qcow2 was already merged into");
    assert_eq!(folder.names(), ["base.qcow2"]);
}

//! Merges that are killed at random times, and again while they go on: a small version of
//! `kill-stress`, the command in `benches`.

use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use kit::{Lab, Random, View, qemu_is_here, run};

use crate::support::{binary, lab};

const SEEDS: u64 = 5;
/// How often a merge is killed before it may finish.
const KILLS: u64 = 4;
const M: u64 = 1 << 20;

/// A chain of three images, and the command that merges it.
struct Killed {
    folder: Lab,
    base: &'static str,
    format: &'static str,
    args: Vec<&'static str>,
    before: View,
}

impl Killed {
    fn new(random: &mut Random) -> Self {
        let folder = lab("kills");
        let format = random.pick(&["raw", "qcow2", "qcow2"]);
        let base = if format == "raw" { "base.raw" } else { "base.qcow2" };
        let size = random.between(8, 48) * M;
        if format == "raw" {
            folder.raw(base, size, size / 2, 0x11);
        } else {
            folder.create(
                base,
                size,
                random.pick(&["", "cluster_size=4k", "lazy_refcounts=on", "compat=0.10"]),
            );
            folder.io(format, base, &["write -P 0x11 0 4M"]);
        }
        let options = ["", "cluster_size=4k", "extended_l2=on,cluster_size=64k"];
        folder.overlay("a.qcow2", base, format, Some(size), random.pick(&options));
        folder.overlay("b.qcow2", "a.qcow2", "qcow2", Some(size), random.pick(&options));
        for (pattern, name) in [(0x22, "a.qcow2"), (0x33, "b.qcow2")] {
            let mut commands = vec![format!("write -P {pattern} {} {}", size / 4, size / 2)];
            for _ in 0..16 {
                let at = random.below(size / 4096 - 64) * 4096;
                let what = random.pick(&["write -z", "write -P 0x44", "write -P 0x55"]);
                commands.push(format!("{what} {at} {}", random.between(1, 63) * 4096));
            }
            folder.io("qcow2", name, &commands.iter().map(String::as_str).collect::<Vec<_>>());
        }
        let mut args = vec!["commit", "b.qcow2"];
        if random.chance(25) {
            args.extend(["--top", "a.qcow2"]);
        } else if random.chance(30) {
            args.push("--keep-active");
        }
        let before = folder.view("qcow2", "b.qcow2");
        Self { folder, base, format, args, before }
    }

    /// How long the merge takes on a copy of the images.
    fn rehearse(&self) -> Duration {
        let copy = lab("kills-copy");
        for name in self.folder.names() {
            run(self.folder.dir(), "cp", &["--sparse=auto", &name, &copy.arg(&name)]).ok();
        }
        let begun = Instant::now();
        copy.qmerge(&self.args).ok();
        begun.elapsed()
    }

    /// Starts the merge and kills it; false if it was over before.
    fn kill_after(&self, delay: Duration) -> bool {
        let mut merge = Command::new(binary())
            .args(&self.args)
            .current_dir(self.folder.dir())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(delay);
        merge.kill().unwrap();
        let status = merge.wait().unwrap();
        let ended = status.code();
        assert!(matches!(ended, None | Some(0)), "{:?} ended with {ended:?}", self.args);
        ended.is_none()
    }

    fn assert_nothing_is_lost(&self, when: &str) {
        self.folder.view("qcow2", "b.qcow2").assert_same(&self.before, &format!("the view {when}"));
        for name in ["a.qcow2", "b.qcow2", self.base] {
            if name != self.base || self.format == "qcow2" {
                let check = self.folder.try_img(&["check", "-f", "qcow2", name]);
                assert!(check.code == 0 || check.code == 3, "more than leaks {when}:\n{check}");
            }
        }
    }
}

#[test]
fn killed_merges_lose_nothing_and_finish() {
    if !qemu_is_here() {
        return;
    }
    for seed in 1..=SEEDS {
        let mut takes = None;
        // A merge that was over before it was killed shows little: it is done again, and killed earlier.
        while !is_killed(seed, &mut takes) {
            takes = takes.map(|takes| takes / 2);
        }
    }
}

/// Merges, and kills that a few times within the time that it `takes`, then lets it end. False if it was never killed.
fn is_killed(seed: u64, takes: &mut Option<Duration>) -> bool {
    let mut random = Random::new(seed);
    let merge = Killed::new(&mut random);
    let takes = *takes.get_or_insert_with(|| merge.rehearse());
    let mut kills = 0;
    for n in 0..KILLS {
        let delay = takes * random.between(5, 105) as u32 / 100;
        if !merge.kill_after(delay) {
            break;
        }
        kills += 1;
        merge.assert_nothing_is_lost(&format!("after kill {n} of seed {seed}, {delay:?} from the start"));
    }
    // An intermediate layer that was merged just before the last kill is none any more.
    if !merge.args.contains(&"--top") || merge.folder.chain_of("b.qcow2").contains(&"a.qcow2".to_owned()) {
        merge.folder.qmerge(&merge.args).ok();
    }
    merge.assert_nothing_is_lost(&format!("at the end of seed {seed}"));
    if !merge.args.contains(&"--top") {
        merge.folder.view(merge.format, merge.base).assert_same(&merge.before, "base at the end");
    }
    kills > 0
}

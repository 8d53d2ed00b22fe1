//! `qmerge rebase`, judged by QEMU.

use kit::{Lab, Random, qemu_is_here};

use crate::support::lab;
use crate::traps::forget_backing_format;

const M: u64 = 1 << 20;

/// Writes of all kinds, anywhere in the first `size` bytes.
fn scatter(folder: &Lab, dice: &mut Random, format: &str, name: &str, size: u64, count: u64) {
    let mut commands = Vec::new();
    // QEMU compresses only what is not there yet.
    if format == "qcow2" && dice.below(2) == 0 {
        commands.push(format!("write -c -P 5 {} 64k", dice.below(size / 65536) * 65536));
    }
    for _ in 0..count {
        let at = dice.below(size / 512) * 512;
        let len = (1 + dice.below(300)) * 512;
        let len = len.min(size - at);
        let pattern = 1 + dice.below(4);
        commands.push(match dice.below(5) {
            0 => format!("write -z {at} {len}"),
            _ => format!("write -P {pattern} {at} {len}"),
        });
    }
    folder.io(format, name, &commands.iter().map(String::as_str).collect::<Vec<_>>());
}

/// Creation options. Clusters of 64K are compressed one by one.
const OPTIONS: [&str; 6] = [
    "cluster_size=64k",
    "compat=0.10,cluster_size=64k",
    "extended_l2=on,cluster_size=64k",
    "lazy_refcounts=on,cluster_size=64k",
    "compression_type=zstd,cluster_size=64k",
    "refcount_bits=64,cluster_size=64k",
];

/// An image of a chain, and what it is to be rebased onto: a name with its format, or nothing.
fn case(folder: &Lab, seed: u64) -> Option<(&'static str, &'static str)> {
    let mut dice = Random::new(seed);
    let size = 4 * M;
    let pick = |dice: &mut Random| OPTIONS[dice.below(OPTIONS.len() as u64) as usize];
    let other = |dice: &mut Random| (2 + dice.below(5)) * M + dice.below(3) * 512;
    if dice.below(2) == 0 {
        folder.raw("base", other(&mut dice), M, 1);
    } else {
        folder.create("base", other(&mut dice), pick(&mut dice));
    }
    let base = if folder.img(&["info", "base"]).text().contains("format: raw") { "raw" } else { "qcow2" };
    scatter(folder, &mut dice, base, "base", 2 * M, 4);
    folder.overlay("mid.qcow2", "base", base, Some(other(&mut dice)), pick(&mut dice));
    scatter(folder, &mut dice, "qcow2", "mid.qcow2", 2 * M, 4);
    let image = pick(&mut dice);
    folder.overlay("image.qcow2", "mid.qcow2", "qcow2", Some(size), image);
    scatter(folder, &mut dice, "qcow2", "image.qcow2", size, 3);
    match dice.below(7) {
        0 => None,
        1 => Some(("base", base)),
        2 => {
            folder.overlay("fork.qcow2", "base", base, Some(other(&mut dice)), pick(&mut dice));
            scatter(folder, &mut dice, "qcow2", "fork.qcow2", 2 * M, 4);
            Some(("fork.qcow2", "qcow2"))
        }
        3 => {
            // A copy of the disk in one file of another kind, changed here and there.
            folder.img(&["convert", "-O", "qcow2", "-o", "cluster_size=4k", "image.qcow2", "copy.qcow2"]);
            folder.io("qcow2", "copy.qcow2", &["write -P 9 1M 3k", "write -P 9 3M 512"]);
            Some(("copy.qcow2", "qcow2"))
        }
        4 => {
            folder.raw("other.raw", other(&mut dice), M, 3);
            scatter(folder, &mut dice, "raw", "other.raw", 2 * M, 3);
            Some(("other.raw", "raw"))
        }
        _ => {
            folder.create("under.qcow2", other(&mut dice), "cluster_size=512");
            folder.io("qcow2", "under.qcow2", &["write -P 2 100k 700k"]);
            folder.overlay("new.qcow2", "under.qcow2", "qcow2", Some(other(&mut dice)), "cluster_size=2M");
            folder.io("qcow2", "new.qcow2", &["write -P 4 1500k 100k", "write -z 300k 50k"]);
            Some(("new.qcow2", "qcow2"))
        }
    }
}

fn arguments(onto: Option<(&'static str, &'static str)>) -> Vec<&'static str> {
    match onto {
        None => vec!["rebase", "image.qcow2", "--onto-nothing"],
        Some((name, format)) => vec!["rebase", "image.qcow2", "--onto", name, "-F", format],
    }
}

#[test]
fn the_guest_sees_the_same_and_no_other_file_is_touched() {
    if !qemu_is_here() {
        return;
    }
    let number = |name: &str, otherwise| std::env::var(name).map_or(otherwise, |n| n.parse().unwrap());
    let (first, cases) = (number("QMERGE_TEST_SEED", 0), number("QMERGE_TEST_CASES", 24));
    for seed in first..first + cases {
        let folder = lab("rebase");
        let onto = case(&folder, seed);
        let before = folder.view("qcow2", "image.qcow2");
        let files = folder.files();
        let mut args = arguments(onto);
        args.push("--verify");
        let planned = folder.qmerge(&[&args[..], &["--dry-run"]].concat()).ok();
        folder.assert_unchanged(&files, &planned);
        folder.qmerge(&args).ok().says("the same bytes");
        folder.view("qcow2", "image.qcow2").assert_same(&before, &format!("the guest, seed {seed}"));
        folder.check_clean("image.qcow2");
        let below = folder.backing_of("image.qcow2");
        assert_eq!(below, onto.map(|(name, format)| (name.into(), format.into())), "seed {seed}");
        let after = folder.files();
        let touched: Vec<_> = after.iter().filter(|(name, file)| files.get(*name) != Some(file)).collect();
        assert!(touched.len() == 1 && touched[0].0 == "image.qcow2", "seed {seed}: {touched:?}");
        let again = folder.qmerge(&args).ok().says("nothing to do");
        folder.assert_unchanged(&after, &again);
    }
}

#[test]
fn a_rebase_that_was_killed_goes_on() {
    if !qemu_is_here() {
        return;
    }
    for call in 1.. {
        let folder = lab("rebase-killed");
        let onto = case(&folder, 4);
        let before = folder.view("qcow2", "image.qcow2");
        let args = arguments(onto);
        let was_killed = folder.killed_at_sync(call, &args);
        folder.view("qcow2", "image.qcow2").assert_same(&before, "the guest behind the kill");
        if was_killed && folder.names().iter().any(|name| name.ends_with("qmerge-journal")) {
            let state = folder.qmerge(&["info", "image.qcow2"]).ok().text();
            assert!(state.contains("rebase pending") && !state.contains("not closed cleanly"), "{state}");
            let facts = folder.qmerge(&["info", "image.qcow2", "--json"]).ok().json();
            let to = facts["rebase-pending"]["onto"].as_str().unwrap_or_default();
            assert!(onto.is_some_and(|(name, _)| to.ends_with(name)), "{facts}");
        }
        if was_killed && call % 3 == 0 {
            folder.qmerge(&["abort", "image.qcow2"]).ok();
            folder.view("qcow2", "image.qcow2").assert_same(&before, "the guest, given up");
            folder.check_clean("image.qcow2");
        }
        folder.qmerge(&args).ok();
        folder.view("qcow2", "image.qcow2").assert_same(&before, "the guest");
        folder.check_clean("image.qcow2");
        assert!(folder.names().iter().all(|name| !name.contains("qmerge")), "{:?}", folder.names());
        if !was_killed {
            assert!(call > 5, "{call}");
            break;
        }
    }
}

#[test]
fn what_cannot_be_rebased_is_refused() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("rebase-refused");
    folder.create("base.qcow2", 2 * M, "");
    folder.create("other.qcow2", 2 * M, "");
    folder.io("qcow2", "other.qcow2", &["write -P 1 0 64k"]);
    folder.overlay("image.qcow2", "base.qcow2", "qcow2", None, "");
    folder.overlay("above.qcow2", "image.qcow2", "qcow2", None, "");
    let onto = |name| ["rebase", "image.qcow2", "--onto", name];
    // A loop, whichever way it is closed.
    for name in ["image.qcow2", "above.qcow2"] {
        folder.refused(&onto(name), &[6]).says("loop").says("qmerge info --chain");
    }
    folder.refused(&["rebase", "image.qcow2"], &[2]);
    folder.refused(&["rebase", "image.qcow2", "--onto", "other.qcow2", "--onto-nothing"], &[2]);
    folder.refused(&onto("gone.qcow2"), &[1]);
    folder.img(&["create", "-q", "-f", "vmdk", "disk.vmdk", "1M"]);
    folder.refused(&onto("disk.vmdk"), &[7]).says("-F raw");
    // A new backing file whose own backing file has no format.
    folder.overlay("nameless.qcow2", "base.qcow2", "qcow2", None, "");
    forget_backing_format(&folder, "nameless.qcow2");
    folder.refused(&onto("nameless.qcow2"), &[6]).says("--backing-format");
    // A name for which cluster 0 has no room.
    folder.sh("qemu-img create -q -f qcow2 -o cluster_size=512 small.qcow2 1M");
    let long = format!("{0}/{0}.qcow2", "n".repeat(230));
    folder.sh(&format!("mkdir -p {} && cp other.qcow2 {long}", "n".repeat(230)));
    folder.refused(&["rebase", "small.qcow2", "--onto", &long], &[6]).says("shorter name");
    // An unfinished merge in the chain of the new backing file, or in the image's.
    folder.overlay("top.qcow2", "other.qcow2", "qcow2", None, "");
    folder.io("qcow2", "top.qcow2", &["write -P 1 0 1M"]);
    let mut call = 1;
    while folder.qmerge(&["info", "other.qcow2", "--json"]).ok().json()["dirty-flag"] != true {
        assert!(folder.killed_at_sync(call, &["commit", "top.qcow2"]), "no journal was left");
        call += 1;
    }
    folder.refused(&onto("other.qcow2"), &[6]);
    folder.refused(&["rebase", "top.qcow2", "--onto", "base.qcow2"], &[6]);
    folder.qmerge(&["commit", "top.qcow2"]).ok();
    // Snapshots of the image.
    folder.img(&["snapshot", "-c", "s", "image.qcow2"]);
    folder.refused(&onto("other.qcow2"), &[6]).says("--allow-snapshot-change");
    folder.qmerge(&["rebase", "image.qcow2", "--onto", "other.qcow2", "--allow-snapshot-change"]).ok();
    folder.check_clean("image.qcow2");
}

/// Persistent bitmaps of the image stay: its disk has not changed. So does a relative name, and one for which there was none
/// is absolute.
#[test]
fn bitmaps_stay_and_names_are_as_they_were() {
    if !qemu_is_here() {
        return;
    }
    let folder = lab("rebase-names");
    folder.sh("mkdir -p in/deep");
    folder.create("in/base.qcow2", 2 * M, "");
    folder.create("new.qcow2", 3 * M, "");
    folder.io("qcow2", "new.qcow2", &["write -P 1 0 2M"]);
    folder.sh("cd in/deep && qemu-img create -q -f qcow2 -b ../base.qcow2 -F qcow2 image.qcow2");
    folder.img(&["bitmap", "--add", "in/deep/image.qcow2", "daily"]);
    let before = folder.view("qcow2", "in/deep/image.qcow2");
    folder.qmerge(&["rebase", "in/deep/image.qcow2", "--onto", "new.qcow2"]).ok();
    assert_eq!(folder.backing_of("in/deep/image.qcow2").unwrap().0, "../../new.qcow2");
    folder.view("qcow2", "in/deep/image.qcow2").assert_same(&before, "the guest");
    let info = folder.img(&["info", "in/deep/image.qcow2"]).text();
    assert!(info.contains("daily") && !info.contains("in-use"), "{info}");
    folder.qmerge(&["rebase", "in/deep/image.qcow2", "--onto-nothing"]).ok();
    folder.qmerge(&["rebase", "in/deep/image.qcow2", "--onto", "new.qcow2"]).ok();
    assert_eq!(folder.backing_of("in/deep/image.qcow2").unwrap().0, folder.arg("new.qcow2"));
    folder.view("qcow2", "in/deep/image.qcow2").assert_same(&before, "the guest");
    folder.check_clean("in/deep/image.qcow2");
}

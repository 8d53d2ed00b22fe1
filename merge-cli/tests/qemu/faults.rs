//! The built command, whose N-th request of each kind fails: reads, writes, barriers, opens, locks, lists, renames,
//! removals. It says so with the right code, the guest's bytes stay, and the same command finishes.
//!
//! A few N of each scenario are tried; with `QMERGE_FAULTS=all` every one, with `QMERGE_FAULTS=NUMBER` so many of each
//! scenario.

use std::collections::BTreeSet;
use std::fs;

use kit::{Lab, Random, Run, are_here};

use crate::support::{Patch, lab};

/// System calls and how they fail; the exit codes of a merge then.
const KINDS: &[(&str, &str)] = &[
    ("pread64", "EIO"),
    ("pwrite64", "EIO"),
    ("pwrite64", "ENOSPC"),
    ("fdatasync", "EIO"),
    ("fsync", "EIO"),
    ("openat", "EMFILE"),
    ("openat", "EIO"),
    ("openat2", "EIO"),
    ("fcntl", "EIO"),
    ("statx", "EIO"),
    ("fstat", "EIO"),
    ("newfstatat", "EIO"),
    ("lseek", "EIO"),
    ("copy_file_range", "EIO"),
    ("copy_file_range", "ENOSPC"),
    ("fallocate", "EIO"),
    ("ftruncate", "EIO"),
    ("renameat2", "EIO"),
    ("rename", "EIO"),
    ("unlink", "EIO"),
    ("unlinkat", "EIO"),
    ("getdents64", "EIO"),
    ("madvise", "EFAULT"),
];

/// The same requests in the same order, each time.
const ONE_THREAD: &str = "RAYON_NUM_THREADS=1";

/// What is tried.
struct Scenario {
    name: &'static str,
    /// Options of the images: base, and those above.
    base: &'static str,
    layers: &'static str,
    /// What is done to the images before the command.
    prepare: fn(&Lab),
    args: &'static [&'static str],
    /// The codes of the command when nothing fails.
    codes: &'static [i32],
}

const NOTHING: fn(&Lab) = |_| {};

/// A merge that was killed at one of its barriers.
const KILLED: fn(&Lab) = |folder| {
    folder.killed_at_sync(6, &["commit", "c.qcow2", "-q"]);
};

const LEAKED: fn(&Lab) = |folder| {
    let patch = Patch::of(folder, "c.qcow2");
    let (block, cluster) = (patch.refcount_block_offset(), patch.len().div_ceil(65536));
    patch.write(block + cluster * 2, &[0, 1]).set_len((cluster + 1) * 65536);
};

const BROKEN: fn(&Lab) = |folder| {
    let patch = Patch::of(folder, "c.qcow2");
    patch.write(patch.refcount_table_offset(), &[0; 8]);
};

const SCENARIOS: &[Scenario] = &[
    Scenario {
        name: "qcow2",
        base: "",
        layers: "",
        prepare: NOTHING,
        args: &["commit", "c.qcow2"],
        codes: &[0],
    },
    Scenario {
        name: "raw",
        base: "raw",
        layers: "",
        prepare: NOTHING,
        args: &["commit", "c.qcow2"],
        codes: &[0],
    },
    Scenario {
        name: "version 2",
        base: "compat=0.10",
        layers: "compat=0.10",
        prepare: NOTHING,
        args: &["commit", "c.qcow2"],
        codes: &[0],
    },
    Scenario {
        name: "small clusters",
        base: "cluster_size=4k",
        layers: "cluster_size=512",
        prepare: NOTHING,
        args: &["commit", "c.qcow2"],
        codes: &[0],
    },
    Scenario {
        name: "subclusters",
        base: "extended_l2=on",
        layers: "extended_l2=on",
        prepare: NOTHING,
        args: &["commit", "c.qcow2"],
        codes: &[0],
    },
    Scenario {
        name: "data file",
        base: "data_file=data",
        layers: "",
        prepare: NOTHING,
        args: &["commit", "c.qcow2"],
        codes: &[0],
    },
    Scenario {
        name: "shallow",
        base: "",
        layers: "",
        prepare: NOTHING,
        args: &["commit", "c.qcow2", "--shallow"],
        codes: &[0],
    },
    Scenario {
        name: "below the top",
        base: "",
        layers: "",
        prepare: NOTHING,
        args: &["commit", "c.qcow2", "--top", "b.qcow2"],
        codes: &[0],
    },
    Scenario {
        name: "keep",
        base: "",
        layers: "",
        prepare: NOTHING,
        args: &["commit", "c.qcow2", "--keep-active"],
        codes: &[0],
    },
    Scenario {
        name: "verify",
        base: "",
        layers: "",
        prepare: NOTHING,
        args: &["commit", "c.qcow2", "--verify"],
        codes: &[0],
    },
    Scenario {
        name: "delete below",
        base: "",
        layers: "",
        prepare: NOTHING,
        args: &["commit", "c.qcow2", "--top", "b.qcow2", "--delete"],
        codes: &[0],
    },
    Scenario {
        name: "goes on",
        base: "",
        layers: "",
        prepare: KILLED,
        args: &["commit", "c.qcow2"],
        codes: &[0],
    },
    Scenario {
        name: "goes on, raw",
        base: "raw",
        layers: "",
        prepare: KILLED,
        args: &["commit", "c.qcow2"],
        codes: &[0],
    },
    Scenario {
        name: "given up",
        base: "",
        layers: "",
        prepare: KILLED,
        args: &["abort", "base"],
        codes: &[0],
    },
    Scenario {
        name: "given up, small clusters",
        base: "cluster_size=4k",
        layers: "",
        prepare: KILLED,
        args: &["abort", "base"],
        codes: &[0],
    },
    Scenario {
        name: "check",
        base: "",
        layers: "",
        prepare: NOTHING,
        args: &["check", "c.qcow2"],
        codes: &[0],
    },
    Scenario {
        name: "leaks",
        base: "",
        layers: "",
        prepare: LEAKED,
        args: &["check", "--repair", "leaks", "c.qcow2"],
        codes: &[0],
    },
    Scenario {
        name: "repair",
        base: "",
        layers: "",
        prepare: BROKEN,
        args: &["check", "--repair", "all", "c.qcow2"],
        codes: &[0],
    },
    Scenario {
        name: "plan of a repair",
        base: "",
        layers: "",
        prepare: BROKEN,
        args: &["check", "--repair", "all", "--dry-run", "c.qcow2"],
        codes: &[2],
    },
    Scenario {
        name: "restore",
        base: "",
        layers: "",
        prepare: |folder| {
            BROKEN(folder);
            folder.qmerge(&["check", "--repair", "all", "--backup", "metadata", "c.qcow2"]).ok();
        },
        args: &["check", "--restore", "metadata", "c.qcow2"],
        codes: &[0, 2],
    },
    Scenario {
        name: "compare",
        base: "",
        layers: "",
        prepare: NOTHING,
        args: &["compare", "c.qcow2", "c.qcow2"],
        codes: &[0],
    },
    Scenario { name: "map", base: "", layers: "", prepare: NOTHING, args: &["map", "c.qcow2"], codes: &[0] },
    Scenario {
        name: "info",
        base: "",
        layers: "",
        prepare: NOTHING,
        args: &["info", "--chain", "c.qcow2"],
        codes: &[0],
    },
    Scenario {
        name: "flatten",
        base: "",
        layers: "",
        prepare: NOTHING,
        args: &["flatten", "c.qcow2", "-o", "new"],
        codes: &[0],
    },
    Scenario {
        name: "flatten to raw",
        base: "",
        layers: "",
        prepare: NOTHING,
        args: &["flatten", "c.qcow2", "--to", "raw", "-o", "new"],
        codes: &[0],
    },
];

/// The images of a scenario, as the command finds them.
fn images(scenario: &Scenario) -> Lab {
    let folder = lab("faults");
    let format = if scenario.base == "raw" { "raw" } else { "qcow2" };
    match format {
        "raw" => folder.raw("base", 1 << 20, 400 << 10, 1),
        _ => {
            folder.create("base", 1 << 20, scenario.base);
            folder.io("qcow2", "base", &["write -P 1 0 400k"]);
        }
    }
    folder.overlay("b.qcow2", "base", format, None, scenario.layers);
    folder.io("qcow2", "b.qcow2", &["write -P 2 300k 200k", "write -P 3 613k 1k"]);
    folder.overlay("c.qcow2", "b.qcow2", "qcow2", None, scenario.layers);
    folder.io("qcow2", "c.qcow2", &["write -P 4 100k 64k", "write -z 0 64k", "write -c -P 5 704k 64k"]);
    folder
}

/// Puts the files of `from` into `to`, and nothing else, and prepares them: a journal is only about the very files that it
/// was made beside.
fn put_back(scenario: &Scenario, from: &Lab, to: &Lab) {
    for name in to.names() {
        fs::remove_file(to.join(&name)).unwrap();
    }
    for name in from.names() {
        fs::copy(from.join(&name), to.join(&name)).unwrap();
    }
    (scenario.prepare)(to);
}

/// The requests that an undisturbed run makes about files in the folder: which call of its kind each is.
fn requests(folder: &Lab, args: &[&str], kind: &str) -> Vec<u32> {
    let trace = folder.scratch();
    let path = trace.to_str().unwrap().to_owned();
    let set = format!("trace=?{kind}");
    folder.traced(&["-E", ONE_THREAD, "-y", "-o", &path, "-e", &set], args);
    let text = fs::read_to_string(&trace).unwrap_or_default();
    fs::remove_file(&trace).unwrap();
    let mut counts = std::collections::BTreeMap::<String, u32>::new();
    let mut numbers = BTreeSet::new();
    let here = folder.dir().to_str().unwrap();
    let call = format!(" {kind}(");
    for line in text.lines().filter(|line| line.contains(&call)) {
        let thread = line.split_whitespace().next().unwrap_or_default().to_owned();
        let count = counts.entry(thread).or_default();
        *count += 1;
        let is_foreign =
            ["\"/lib", "\"/usr", "\"/etc", "\"/proc", "\"/sys", "\"/dev"].iter().any(|at| line.contains(at));
        if (line.contains(here) || kind == "madvise") && !is_foreign {
            numbers.insert(*count);
        }
    }
    numbers.into_iter().collect()
}

/// Whether the code tells what has happened.
fn is_right_code(run: &Run, scenario: &Scenario, error: &str) -> bool {
    let verb = scenario.args[0];
    scenario.codes.contains(&run.code)
        || match (verb, error) {
            // A restore that stops half-way answers 4.
            ("check", _) => (1..=4).contains(&run.code) || run.code == 8,
            ("compare", _) => run.code == 2,
            (_, "ENOSPC") => matches!(run.code, 1 | 4 | 8),
            _ => matches!(run.code, 1 | 4),
        }
}

/// Fails one request, and judges; says what is wrong.
fn fail_one(
    start: &Lab,
    folder: &Lab,
    scenario: &Scenario,
    fault: (&str, &str, u32),
    want: &str,
) -> Option<String> {
    let (kind, error, nth) = fault;
    put_back(scenario, start, folder);
    let inject = format!("inject={kind}:error={error}:when={nth}");
    let set = format!("trace={kind}");
    let run = folder.traced(&["-E", ONE_THREAD, "-e", &set, "-e", &inject], scenario.args);
    let shows = |name: &str, format: &str| {
        let compared = folder.try_img(&["compare", "-U", "-f", format, "-F", "raw", name, want]);
        (compared.code != 0).then(|| format!("{name} shows other bytes: {}", compared.text()))
    };
    let wrong = |what: String| Some(format!("[{}] {kind}:{error} {nth}: {what}\n{run}", scenario.name));
    if run.code >= 128 || run.text().contains("panicked") {
        return wrong("a signal or a panic".into());
    }
    if !is_right_code(&run, scenario, error) {
        return wrong(format!("exit code {}", run.code));
    }
    if run.code != 0 && !matches!(scenario.args[0], "check" | "compare") && !run.stderr.contains("qmerge: ") {
        return wrong("no word".into());
    }
    if scenario.args[0] != "check"
        && let Some(what) = shows("c.qcow2", "qcow2")
    {
        return wrong(what);
    }
    let leaves_new = scenario.args[0] == "flatten" && run.code != 0;
    if leaves_new
        && let Some(left) = folder.names().iter().find(|name| name.contains("qmerge-") || *name == "new")
    {
        // The removal itself may be what has failed.
        if !kind.starts_with("unlink") {
            return wrong(format!("{left} was left behind"));
        }
    }
    // A name that is left over from a removal that failed is in the way of nothing but itself.
    if scenario.args[0] == "flatten" && folder.names().iter().any(|name| name == "new") {
        let format = if scenario.args.contains(&"raw") { "raw" } else { "qcow2" };
        return shows("new", format).and_then(wrong);
    }
    // What was merged and removed cannot be named again.
    if run.code == 0 && scenario.args.contains(&"--delete") {
        return None;
    }
    let again = folder.qmerge(scenario.args);
    if !scenario.codes.contains(&again.code) {
        return wrong(format!("the same command again: {again}"));
    }
    shows("c.qcow2", "qcow2").and_then(|what| wrong(format!("after the same command again: {what}")))
}

/// How many requests of each scenario fail, where not all of them do.
fn wanted() -> Option<usize> {
    match std::env::var("QMERGE_FAULTS").as_deref() {
        Ok("all") => None,
        Ok(number) => Some(number.parse().expect("QMERGE_FAULTS is 'all' or a number")),
        Err(_) => Some(3),
    }
}

fn fail_in(scenario: &Scenario, seed: u64) -> (usize, Vec<String>) {
    let start = images(scenario);
    let folder = lab("faults-run");
    let want = folder.scratch();
    let raw = want.to_str().unwrap().to_owned();
    start.img(&["convert", "-U", "-f", "qcow2", "-O", "raw", "c.qcow2", &raw]);
    let mut faults: Vec<(&str, &str, u32)> = Vec::new();
    let mut dice = Random::new(seed);
    let kinds: BTreeSet<&str> = KINDS.iter().map(|(kind, _)| *kind).collect();
    // One trace tells of all kinds where a few are enough.
    let picked: Vec<&str> = match wanted() {
        None => kinds.into_iter().collect(),
        Some(n) => (0..n).map(|_| dice.pick(KINDS).0).collect(),
    };
    for kind in picked {
        put_back(scenario, &start, &folder);
        let numbers = requests(&folder, scenario.args, kind);
        let errors = KINDS.iter().filter(|(name, _)| *name == kind).map(|(_, error)| *error);
        let all = errors.flat_map(|error| numbers.iter().map(move |nth| (kind, error, *nth)));
        let all: Vec<_> = all.collect();
        match wanted() {
            None => faults.extend(all),
            Some(_) if all.is_empty() => {}
            Some(_) => faults.push(dice.pick(&all)),
        }
    }
    let wrong = faults.iter().filter_map(|fault| fail_one(&start, &folder, scenario, *fault, &raw)).collect();
    (faults.len(), wrong)
}

#[test]
fn the_nth_request_fails_and_the_same_command_finishes() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let (mut tried, mut wrong) = (0, Vec::new());
    for (seed, scenario) in SCENARIOS.iter().enumerate() {
        let (n, found) = fail_in(scenario, seed as u64 + 1);
        tried += n;
        wrong.extend(found);
    }
    eprintln!("{tried} requests failed in {} scenarios, {} wrong", SCENARIOS.len(), wrong.len());
    assert!(tried >= SCENARIOS.len(), "{tried}");
    assert!(
        wrong.is_empty(),
        "{} of {tried} are wrong; the first ones:\n{}",
        wrong.len(),
        wrong[..wrong.len().min(8)].join("\n")
    );
}

/// Whichever look at a file fails, a call that makes a new one leaves nothing behind that would be in the way of the next.
#[test]
fn a_failed_look_leaves_no_new_file() {
    if !are_here(&["qemu-img", "qemu-io", "strace"]) {
        return;
    }
    let folder = lab("failed-looks");
    folder.create("a.qcow2", 1 << 20, "");
    folder.io("qcow2", "a.qcow2", &["write -P 3 0 64k"]);
    let before = folder.names();
    let mut failed = 0;
    for nth in 1.. {
        let inject = format!("inject=statx:error=EIO:when={nth}");
        let run = folder.traced(&["-e", "trace=statx", "-e", &inject], &["flatten", "a.qcow2", "-o", "new"]);
        if run.code == 0 {
            fs::remove_file(folder.join("new")).unwrap();
        }
        assert_eq!(folder.names(), before, "look {nth}: {run}");
        failed += u32::from(run.code != 0);
        // The libraries of the program look at files, too, before it begins.
        if run.code == 0 && nth > 60 {
            break;
        }
    }
    assert!(failed > 3, "{failed}");
}

/// A state file that cannot be read says nothing of its merge, and is not to be removed for that.
#[test]
fn a_state_file_that_cannot_be_read_is_no_damaged_one() {
    if !are_here(&["qemu-img", "strace"]) {
        return;
    }
    let folder = lab("unreadable-state");
    folder.create("a.qcow2", 1 << 20, "");
    let state = folder.join(".a.qcow2.qmerge-live");
    fs::write(&state, "{}").unwrap();
    let path = state.to_str().unwrap();
    let recover = ["live", "recover", "a.qcow2"];
    let options = ["-P", path, "-e", "trace=read,pread64", "-e", "inject=read,pread64:error=EIO"];
    let unread = folder.traced(&options, &recover).expect(1).says("Input/output error");
    assert!(!unread.text().contains("rm "), "{unread}");
    folder.qmerge(&recover).expect(9).says("rm ");
}

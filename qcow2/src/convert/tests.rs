//! Chains made by QEMU, flattened here, judged by QEMU.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use kit::Random;

use super::*;
use crate::chain::{Policy, digest};
use crate::check::{CheckOptions, Verdict, check};
use crate::error::ErrorKind;
use crate::image::{CreateOptions, create, create_raw};
use crate::storage::{Access, LockMode, MemHost, OsHost};
use crate::testing::{Silent, local, random_chain};

/// Runs a tool in `dir` and returns what it says.
fn tool(dir: &Path, tool: &str, args: &[&str]) -> String {
    let out = Command::new(tool).current_dir(dir).args(args).output().unwrap();
    let said = String::from_utf8_lossy(&out.stdout).into_owned();
    assert!(out.status.success(), "{tool} {args:?}: {said}{}", String::from_utf8_lossy(&out.stderr));
    said
}

fn options(output: &Path, to: ImageFormat, base: Option<&str>) -> FlattenOptions {
    let open = OpenOptions { policy: Policy::local_files(), ..OpenOptions::default() };
    FlattenOptions { base: base.map(Into::into), ..FlattenOptions::new(open, output.to_owned(), to) }
}

fn flatten(active: &Path, options: &FlattenOptions) -> Result<(FlattenPlan, FlattenReport)> {
    let never = AtomicBool::new(false);
    let flatten = Flatten::prepare(Arc::new(OsHost), active, options, &never)?;
    let plan = flatten.plan().clone();
    Ok((plan, flatten.execute(&Silent, &never)?))
}

fn crc_of(chain: &Chain) -> u32 {
    let images = chain.images();
    let view = View::new(&images, 0, chain.active());
    digest(view, view.size(), &AtomicBool::new(false)).unwrap()
}

fn open(active: &Path) -> Chain {
    let open = OpenOptions { policy: Policy::local_files(), ..OpenOptions::default() };
    Chain::open(&OsHost, active, &open).unwrap()
}

/// The files of a directory and their bytes.
fn contents(dir: &Path) -> BTreeMap<PathBuf, Vec<u8>> {
    let files = fs::read_dir(dir).unwrap().map(|entry| entry.unwrap().path());
    files.map(|path| (path.clone(), fs::read(&path).unwrap())).collect()
}

const SECTORS: u64 = 8 << 10;

/// A chain of `layers` images of all kinds and sizes, with data, zeros and discarded ranges; the last one
/// is `active`, whose format is returned.
fn random_chain_of_qemu(dir: &Path, dice: &mut Random, layers: u64) -> &'static str {
    let mut of_active = "";
    for n in 0..layers {
        let name = if n + 1 == layers { "active".to_owned() } else { format!("l{n}") };
        // Some layers are shorter than the one below, some longer.
        let size = (SECTORS - dice.below(SECTORS / 2)) * 512;
        let raw = n == 0 && dice.below(2) == 0;
        let bits = 9 + dice.below(9);
        let mut set = format!("cluster_size={}", 1 << bits);
        if bits >= 14 && dice.below(2) == 0 {
            set += ",extended_l2=on";
        } else if dice.below(4) == 0 {
            set += ",compat=0.10";
        }
        let (format, size) = (if raw { "raw" } else { "qcow2" }, size.to_string());
        let mut create = vec!["create", "-q", "-f", format];
        let below = format!("l{}", n.wrapping_sub(1));
        if !raw {
            create.extend(["-o", &set]);
        }
        if n > 0 {
            create.extend(["-b", &below, "-F", of_active]);
        }
        of_active = format;
        create.extend([&*name, &*size]);
        tool(dir, "qemu-img", &create);
        let mut writes = Vec::new();
        for _ in 0..3 + dice.below(12) {
            let at = dice.below(SECTORS / 2 - 600) * 512;
            let len = (1 + dice.below(500)) * 512;
            writes.push(match dice.below(6) {
                0 => format!("write -z {at} {len}"),
                1 if !raw => {
                    let cluster = 1 << bits;
                    format!("write -c -P {} {} {cluster}", 1 + dice.below(255), at / cluster * cluster)
                }
                2 => format!("discard {at} {len}"),
                _ => format!("write -P {} {at} {len}", 1 + dice.below(255)),
            });
        }
        let mut args = vec!["-f", format];
        // QEMU compresses only into clusters that hold no plain data.
        writes.sort_by_key(|write| !write.starts_with("write -c"));
        args.extend(writes.iter().flat_map(|write| ["-c", write]));
        args.push(&name);
        tool(dir, "qemu-io", &args);
    }
    of_active
}

#[test]
fn chains_of_every_kind_become_one_file() {
    if !kit::qemu_is_here() {
        return;
    }
    for seed in 0..16 {
        let dir = tempfile::tempdir().unwrap();
        let at = |name: &str| dir.path().join(name);
        let mut dice = Random::new(seed);
        let layers = 1 + dice.below(4);
        let active_format = random_chain_of_qemu(dir.path(), &mut dice, layers);
        let inputs = contents(dir.path());
        let crc = crc_of(&open(&at("active")));
        tool(dir.path(), "qemu-img", &["convert", "-O", "raw", "active", "theirs.raw"]);
        assert_eq!(crc, crc32fast::hash(&fs::read(at("theirs.raw")).unwrap()), "seed {seed}: digest");
        fs::remove_file(at("theirs.raw")).unwrap();

        for to in [ImageFormat::Raw, ImageFormat::Qcow2] {
            let output = at("out");
            let keep_zeros = seed % 2 == 0;
            let options = FlattenOptions { keep_zeros, ..options(&output, to, None) };
            let (plan, report) = flatten(&at("active"), &options).unwrap();
            // What the plan said is what happened, but for zeros that nobody had looked for.
            let parts = |of: &Totals| [of.bytes_to_write, of.bytes_to_copy, of.clusters_to_allocate];
            let (planned, done) = (parts(&plan.totals), parts(&report.totals));
            assert!(planned == done || !keep_zeros, "seed {seed}: {planned:?} {done:?}");
            assert!(planned.iter().zip(&done).all(|(planned, done)| done <= planned), "seed {seed}");
            let compare = ["compare", "-f", active_format, "-F", to.name(), "active", "out"];
            tool(dir.path(), "qemu-img", &compare);
            if to == ImageFormat::Raw {
                assert_eq!(crc32fast::hash(&fs::read(&output).unwrap()), crc, "seed {seed}");
            } else {
                tool(dir.path(), "qemu-img", &["check", "-q", "-f", "qcow2", "out"]);
                assert!(report.file_size <= plan.file_size_after, "seed {seed}: {plan:?} {report:?}");
                assert_eq!(crc_of(&open(&output)), crc, "seed {seed}");
            }
            fs::remove_file(&output).unwrap();
        }
        for base in 1..layers {
            let output = at("out");
            let made =
                flatten(&at("active"), &options(&output, ImageFormat::Qcow2, Some(&format!("[{base}]"))));
            let (plan, _) = made.unwrap();
            assert_eq!(plan.backing_name, Some(format!("l{}", base - 1).into()));
            tool(dir.path(), "qemu-img", &["check", "-q", "out"]);
            tool(dir.path(), "qemu-img", &["compare", "active", "out"]);
            assert_eq!(crc_of(&open(&output)), crc, "seed {seed}, base {base}");
            fs::remove_file(&output).unwrap();
        }
        assert!(contents(dir.path()) == inputs, "seed {seed}: an input was touched, or a file left behind");
    }
}

#[test]
fn a_base_elsewhere_is_named_so_that_qemu_finds_it() {
    if !kit::qemu_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    fs::create_dir(at("new")).unwrap();
    tool(dir.path(), "qemu-img", &["create", "-q", "-f", "raw", "base.raw", "4M"]);
    tool(dir.path(), "qemu-io", &["-f", "raw", "-c", "write -P 1 0 4M", "base.raw"]);
    tool(dir.path(), "qemu-img", &["create", "-q", "-f", "qcow2", "-b", "base.raw", "-F", "raw", "a"]);
    tool(dir.path(), "qemu-io", &["-c", "write -z 1M 1M", "-c", "write -P 2 3M 1M", "a"]);
    let output = at("new/out.qcow2");
    let base = at("base.raw");
    let (plan, report) =
        flatten(&at("a"), &options(&output, ImageFormat::Qcow2, Some(base.to_str().unwrap()))).unwrap();
    assert_eq!(plan.backing_name.as_deref(), Some("../base.raw".as_ref()));
    assert_eq!((report.totals.bytes_to_copy, report.totals.bytes_to_zero), (1 << 20, 1 << 20));
    tool(dir.path(), "qemu-img", &["compare", "a", "new/out.qcow2"]);
    tool(dir.path(), "qemu-img", &["check", "-q", "new/out.qcow2"]);
}

/// A chain in memory: 4 MiB of ones, and an empty overlay.
fn in_memory() -> MemHost {
    let host = MemHost::new();
    host.add("/d/base.raw", &[1; 4 << 20]).unwrap();
    let backing = Some((b"base.raw".to_vec(), "raw".to_owned()));
    let options = CreateOptions { backing, ..CreateOptions::new(8 << 20) };
    crate::image::create(&host, Path::new("/d/a"), &options).unwrap();
    host
}

fn prepare(host: &MemHost, options: &FlattenOptions) -> Result<Flatten> {
    Flatten::prepare(Arc::new(host.clone()), Path::new("/d/a"), options, &AtomicBool::new(false))
}

#[test]
fn random_chains_in_memory_become_what_their_models_are() {
    for seed in 100..130 {
        let host = MemHost::new();
        let mut dice = Random::new(seed);
        let layers = 1 + dice.below(4);
        let model = random_chain(&host, &mut dice, layers);
        let active = format!("/{}", layers - 1);
        let never = AtomicBool::new(false);
        let make = |output: &str, to, base: Option<&str>| {
            let options = options(Path::new(output), to, base);
            let made = Flatten::prepare(Arc::new(host.clone()), Path::new(&active), &options, &never);
            made.unwrap().execute(&Silent, &never).unwrap();
        };
        make("/raw", ImageFormat::Raw, None);
        assert!(host.content("/raw").unwrap() == model, "seed {seed}");
        make("/q0", ImageFormat::Qcow2, None);
        for base in 1..layers {
            make(&format!("/q{base}"), ImageFormat::Qcow2, Some(&format!("[{base}]")));
        }
        for base in 0..layers {
            let chain = Chain::open(&host, Path::new(&format!("/q{base}")), &local()).unwrap();
            assert_eq!(chain.layers().len() as u64, base + 1);
            assert_eq!(crc_of(&chain), crc32fast::hash(&model), "seed {seed}, base {base}");
            let new = &chain.layers()[chain.active()];
            let found = check(&new.path, &**new.image.file(), None, &CheckOptions::default()).unwrap();
            assert_eq!(found.verdict(), Verdict::Clean, "seed {seed}, base {base}");
        }
    }
}

#[test]
fn what_cannot_be_made_is_refused_before_anything_is_written() {
    let host = in_memory();
    let before = host.list(Path::new("/d")).unwrap();
    let refused = |output: &str, to, base: Option<&str>| {
        prepare(&host, &options(Path::new(output), to, base)).unwrap_err().kind()
    };
    assert_eq!(refused("/d/base.raw", ImageFormat::Raw, None), ErrorKind::Refused);
    assert_eq!(refused("/d", ImageFormat::Raw, None), ErrorKind::Refused);
    assert_eq!(refused("/nowhere/x", ImageFormat::Raw, None), ErrorKind::Io);
    assert_eq!(refused("/d/x", ImageFormat::Raw, Some("[1]")), ErrorKind::Usage);
    assert_eq!(refused("/d/x", ImageFormat::Qcow2, Some("[2]")), ErrorKind::Usage);
    assert_eq!(refused("/d/x", ImageFormat::Qcow2, Some("[3]")), ErrorKind::Usage);
    let user = host.open(Path::new("/d/base.raw"), Access::ReadWrite).unwrap();
    user.lock(LockMode::Write).unwrap();
    assert_eq!(refused("/d/x", ImageFormat::Raw, None), ErrorKind::InUse);
    assert_eq!(host.list(Path::new("/d")).unwrap(), before);
}

#[test]
fn a_flatten_that_stops_leaves_nothing_behind() {
    let host = in_memory();
    let before = host.list(Path::new("/d")).unwrap();
    for to in [ImageFormat::Raw, ImageFormat::Qcow2] {
        let flatten = prepare(&host, &options(Path::new("/d/x"), to, None)).unwrap();
        let error = flatten.execute(&Silent, &AtomicBool::new(true)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Cancelled);
        assert_eq!(host.list(Path::new("/d")).unwrap(), before);
        // Somebody else takes the name in the meantime.
        let flatten = prepare(&host, &options(Path::new("/d/x"), to, None)).unwrap();
        host.add("/d/x", b"precious").unwrap();
        let error = flatten.execute(&Silent, &AtomicBool::new(false)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Refused);
        assert_eq!(host.content("/d/x").unwrap(), b"precious");
        host.unlink(Path::new("/d/x")).unwrap();
        assert_eq!(host.list(Path::new("/d")).unwrap(), before);
    }
}

#[test]
fn a_leftover_of_a_killed_process_is_no_obstacle() {
    let host = in_memory();
    host.add(format!("/d/.x.qmerge-{}-0", std::process::id()), b"left over").unwrap();
    let flatten = prepare(&host, &options(Path::new("/d/x"), ImageFormat::Raw, None)).unwrap();
    flatten.execute(&Silent, &AtomicBool::new(false)).unwrap();
    let content = host.content("/d/x").unwrap();
    assert!(content.len() == 8 << 20 && content[..4 << 20].iter().all(|&b| b == 1));
    assert!(content[4 << 20..].iter().all(|&b| b == 0));
}

#[test]
fn long_names_get_a_temporary_name_that_fits() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    fs::write(&raw, [7; 4096]).unwrap();
    let output = dir.path().join("n".repeat(255));
    flatten(&raw, &options(&output, ImageFormat::Raw, None)).unwrap();
    assert_eq!(fs::read(&output).unwrap(), [7; 4096]);
}

#[test]
fn zeros_become_holes_in_a_raw_file() {
    let dir = tempfile::tempdir().unwrap();
    let raw = dir.path().join("raw");
    let file = fs::File::create(&raw).unwrap();
    file.set_len(1 << 30).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, &[7; 4096], 512 << 20).unwrap();
    let output = dir.path().join("out");
    let (plan, report) = flatten(&raw, &options(&output, ImageFormat::Raw, None)).unwrap();
    assert_eq!(plan.virtual_size, 1 << 30);
    assert_eq!(report.file_size, 1 << 30);
    assert!(report.allocated < 1 << 20 && report.totals.bytes_to_write < 1 << 20, "{report:?}");
}

#[test]
fn zeros_among_the_data_are_not_written() {
    if !kit::qemu_is_here() {
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    tool(dir.path(), "qemu-img", &["create", "-q", "-f", "qcow2", "active", "8M"]);
    let writes = ["write -P 0 0 4M", "write -P 7 1000k 4k", "write -c -P 0 5M 64k", "write -P 9 6M 1M"];
    let args: Vec<&str> = writes.iter().flat_map(|write| ["-c", write]).collect();
    tool(dir.path(), "qemu-io", &[&["-f", "qcow2"], &args[..], &["active"]].concat());
    let kept = 4 * 1024 + (64 << 10) + (1 << 20);
    for (to, keep_zeros, most) in [
        (ImageFormat::Raw, false, kept),
        (ImageFormat::Qcow2, false, kept + (600 << 10)),
        (ImageFormat::Raw, true, 8 << 20),
        (ImageFormat::Qcow2, true, 9 << 20),
    ] {
        let output = at("out");
        let options = FlattenOptions { keep_zeros, ..options(&output, to, None) };
        let (_, report) = flatten(&at("active"), &options).unwrap();
        tool(dir.path(), "qemu-img", &["compare", "-q", "-F", to.name(), "active", "out"]);
        assert!(report.allocated <= most, "{to:?}: {report:?}");
        assert_eq!(report.totals.bytes_to_copy >= 5 << 20, keep_zeros, "{to:?}: {report:?}");
        fs::remove_file(&output).unwrap();
    }
}

#[test]
fn a_new_file_is_for_those_who_may_read_its_layers() {
    use std::os::unix::fs::{MetadataExt, PermissionsExt};
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name);
    let host = OsHost;
    create_raw(&host, &at("base"), 1 << 20).unwrap();
    let backing = Some((b"base".to_vec(), "raw".to_owned()));
    create(&host, &at("active"), &CreateOptions { backing, ..CreateOptions::new(1 << 20) }).unwrap();
    let is_root = fs::metadata(at("base")).unwrap().uid() == 0;
    let private = if is_root { 65_534 } else { fs::metadata(at("base")).unwrap().uid() };
    if is_root {
        std::os::unix::fs::chown(at("active"), Some(private), Some(private)).unwrap();
    }
    for (active, base, wanted) in [(0o600, 0o644, 0o600), (0o644, 0o444, 0o644), (0o640, 0o644, 0o640)] {
        fs::set_permissions(at("active"), fs::Permissions::from_mode(active)).unwrap();
        fs::set_permissions(at("base"), fs::Permissions::from_mode(base)).unwrap();
        flatten(&at("active"), &options(&at("out"), ImageFormat::Qcow2, None)).unwrap();
        let made = fs::metadata(at("out")).unwrap();
        assert_eq!((made.mode() & 0o777, made.uid()), (wanted, private), "{active:o} {base:o}");
        fs::remove_file(at("out")).unwrap();
    }
    // Whoever owns the active image may not read base: what was in base does not become theirs.
    fs::set_permissions(at("active"), fs::Permissions::from_mode(0o644)).unwrap();
    fs::set_permissions(at("base"), fs::Permissions::from_mode(0o600)).unwrap();
    flatten(&at("active"), &options(&at("out"), ImageFormat::Raw, None)).unwrap();
    let made = fs::metadata(at("out")).unwrap();
    assert_eq!(made.mode() & 0o077, 0);
    assert!(!is_root || made.uid() == 0);
}

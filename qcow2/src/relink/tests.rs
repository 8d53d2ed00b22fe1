//! Relinks in memory: what is proved and what is not, power cuts, operations that fail, names exchanged meanwhile.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::*;
use crate::chain::MovedFolder;
use crate::error::{Doubt, Error, Refusal, Result, Role};
use crate::format::{Cluster0, Extension, Mark, plan_mark};
use crate::image::{CreateOptions, ImageFormat, create, create_raw};
use crate::merge::heal_image;
use crate::storage::sim::{Cuts, Fault, FaultKind, Garbage, SimHost, power_cuts};
use crate::storage::{Access, Host, LockMode, MemHost, Place};
use crate::testing::{Silent, local};
use crate::transfer::put;
use crate::units::GuestOffset;

const SIZE: u64 = 1 << 20;

fn on(backing: &str, format: &str) -> CreateOptions {
    CreateOptions {
        backing: Some((backing.as_bytes().to_vec(), format.to_owned())),
        ..CreateOptions::new(SIZE)
    }
}

/// Makes an image, instead of one that is there.
fn make(host: &MemHost, path: &str, options: &CreateOptions) {
    if host.content(path).is_ok() {
        remove(host, path);
    }
    create(host, Path::new(path), options).unwrap();
}

fn fill(host: &MemHost, path: &str, byte: u8) {
    put(host, Path::new(path), &local(), &[(GuestOffset::new(4096), vec![byte; 9000])]).unwrap();
}

/// `/vm/base`, `/vm/top` on it, and in `/new` a copy and a wrong file.
fn folder() -> MemHost {
    let host = MemHost::new();
    for (path, byte) in [("/vm/base", 1), ("/new/base", 1), ("/new/wrong", 2)] {
        make(&host, path, &CreateOptions::new(SIZE));
        fill(&host, path, byte);
    }
    make(&host, "/vm/top", &on("base", "qcow2"));
    host
}

fn remove(host: &dyn Host, path: &str) {
    Place::at(host, Path::new(path)).unwrap().unlink(host).unwrap();
}

fn options(backing: &str) -> RelinkOptions {
    RelinkOptions { backing: Some(backing.into()), open: local(), ..RelinkOptions::default() }
}

fn prepare(host: &MemHost, options: &RelinkOptions) -> Result<PreparedRelink> {
    let never = AtomicBool::new(false);
    Relink::prepare(Arc::new(host.clone()), Path::new("/vm/top"), options, &Silent, &never)
}

fn proof(host: &MemHost, options: &RelinkOptions) -> Proof {
    let prepared = prepare(host, options).unwrap();
    prepared.plan().changes().next().unwrap().1.proved.clone().unwrap()
}

fn doubt(host: &MemHost, options: &RelinkOptions) -> Doubt {
    let before = host.content("/vm/top").unwrap();
    let doubt = match prepare(host, options) {
        Err(Error::Refused { reason: Refusal::NotProved { doubt, .. }, .. }) => doubt,
        other => panic!("{other:?}"),
    };
    // The word of the user is enough, and the plan says that it is nothing more.
    let trusted = prepare(host, &RelinkOptions { vouched: Vouched::Files, ..options.clone() }).unwrap();
    assert!(trusted.plan().changes().next().unwrap().1.proved.is_err());
    assert!(host.content("/vm/top").unwrap() == before);
    doubt
}

fn header(host: &dyn Host, path: &str) -> Cluster0 {
    let file = host.open(Path::new(path), Access::Read).unwrap();
    crate::image::Qcow2::read_cluster0(Path::new(path), &*file).unwrap()
}

fn backing(host: &dyn Host, path: &str) -> String {
    String::from_utf8(header(host, path).backing_name.unwrap()).unwrap()
}

#[test]
fn what_is_the_same_is_proved_and_what_is_not_is_refused() {
    let host = folder();
    assert_eq!(proof(&host, &options("/vm/base")), Proof::SameFile);
    assert_eq!(proof(&host, &options("file:/vm/base")), Proof::SameFile);
    assert_eq!(proof(&host, &options("/new/base")), Proof::SameContent);
    assert!(matches!(doubt(&host, &options("/new/wrong")), Doubt::Content { .. }));
    make(&host, "/new/large", &CreateOptions::new(2 * SIZE));
    assert!(matches!(doubt(&host, &options("/new/large")), Doubt::Size { size: SIZE, .. }));
    assert!(matches!(prepare(&host, &options("base")).unwrap(), PreparedRelink::Nothing(_)));
    remove(&host, "/vm/base");
    for there in ["/new/base", "/new/wrong"] {
        assert_eq!(doubt(&host, &options(there)), Doubt::Gone { old: "/vm/base".into() });
    }
    let moved = |to: &str| RelinkOptions { vouched: Vouched::Folder, ..options(to) };
    assert_eq!(proof(&host, &moved("/new/base")), Proof::MovedFolder);
    assert_eq!(doubt(&host, &moved("/new/large")), Doubt::Fit { size: 2 * SIZE, above: SIZE });
}

#[test]
fn a_format_is_never_another_one_by_proof() {
    let host = folder();
    create_raw(&host, Path::new("/vm/raw"), SIZE).unwrap();
    make(&host, "/vm/top", &on("raw", "raw"));
    // The same disk in another format is the same disk.
    make(&host, "/new/empty", &CreateOptions::new(SIZE));
    let as_qcow2 = |to: &str| RelinkOptions { backing_format: Some(ImageFormat::Qcow2), ..options(to) };
    assert_eq!(proof(&host, &as_qcow2("/new/empty")), Proof::SameContent);
    let mismatch = prepare(&host, &options("/new/empty")).unwrap_err();
    assert!(matches!(mismatch, Error::Refused { reason: Refusal::FormatMismatch { .. }, .. }), "{mismatch}");
    // A header that calls an image raw: as qcow2 it is another disk.
    make(&host, "/vm/top", &on("base", "raw"));
    assert_eq!(doubt(&host, &as_qcow2("/vm/base")), Doubt::Format { old: "raw".into(), new: "qcow2" });
}

#[test]
fn a_mark_of_a_merge_names_its_base() {
    let host = folder();
    make(&host, "/vm/top", &on("gone", "qcow2"));
    assert!(matches!(doubt(&host, &options("base")), Doubt::Gone { .. }));
    let file = host.open(Path::new("/vm/top"), Access::ReadWrite).unwrap();
    let mut cluster = vec![0; 1 << 16];
    file.read_exact_or_zero(&mut cluster, 0).unwrap();
    for write in plan_mark(&cluster, "/vm/base", Mark::Emptied).unwrap().writes {
        file.write_all_at(&write.bytes, write.offset).unwrap();
    }
    assert_eq!(proof(&host, &options("base")), Proof::Marked);
    assert!(matches!(doubt(&host, &options("/new/base")), Doubt::Gone { .. }));
}

#[test]
fn what_is_no_layer_to_be_is_refused() {
    let host = folder();
    let refused = |options: &RelinkOptions| match prepare(&host, options) {
        Err(Error::Refused { reason, .. }) => reason,
        other => panic!("{other:?}"),
    };
    make(&host, "/vm/above", &on("top", "qcow2"));
    for own in ["top", "above", "/vm/./top"] {
        assert!(matches!(refused(&options(own)), Refusal::Loop { .. }), "{own}");
    }
    assert!(matches!(refused(&options("nbd://host/x")), Refusal::NotLocal { .. }));
    let data = RelinkOptions { backing: None, data_file: Some("d".into()), ..options("") };
    assert_eq!(refused(&data), Refusal::NoDataFile);
    let long = format!("/new/{}base", "./".repeat(500));
    assert_eq!(proof(&host, &options(&long)), Proof::SameContent);
    let small = CreateOptions { cluster_bits: 9, ..on("base", "qcow2") };
    make(&host, "/vm/top", &small);
    assert!(matches!(refused(&options(&long)), Refusal::HeaderRoom { .. }));
    make(&host, "/vm/top", &CreateOptions::new(SIZE));
    assert_eq!(refused(&options("base")), Refusal::NoBackingFile);
    assert!(matches!(prepare(&host, &options("/none")), Err(Error::Refused { .. })));
}

#[test]
fn an_image_in_use_stays_as_it_is() {
    let host = folder();
    for path in ["/vm/top", "/new/base"] {
        let held = host.open(Path::new(path), Access::ReadWrite).unwrap();
        held.lock(LockMode::Write).unwrap();
        let result = prepare(&host, &options("/new/base"));
        assert!(matches!(result, Err(Error::InUse { .. })), "{path}: {result:?}");
    }
    assert!(prepare(&host, &options("/new/base")).is_ok());
}

#[test]
fn a_name_that_is_given_to_another_file_meanwhile_is_not_written() {
    for exchanged in ["/new/base", "/vm/top"] {
        let host = folder();
        let prepared = prepare(&host, &options("/new/base")).unwrap();
        let content = host.content(exchanged).unwrap();
        host.add(exchanged, &content).unwrap();
        let result = prepared.execute();
        assert!(matches!(result, Err(Error::Refused { reason: Refusal::NameMoved, .. })), "{result:?}");
        assert_eq!(backing(&host, "/vm/top"), "base");
    }
}

#[test]
fn a_missing_file_further_below_is_said_and_no_obstacle() {
    let host = folder();
    make(&host, "/new/middle", &on("none", "qcow2"));
    let prepared =
        prepare(&host, &RelinkOptions { vouched: Vouched::Files, ..options("/new/middle") }).unwrap();
    assert_eq!(prepared.plan().missing_below.as_deref(), Some(Path::new("/new/none")));
    drop(prepared);
    let missing = prepare(&host, &options("/new/nothing")).unwrap_err();
    assert!(matches!(missing, Error::MissingLayer { role: Role::BackingFile, .. }), "{missing}");
}

/// `/vm/top` with a data file, and room for long names or none.
fn with_data_file(bits: u32) -> MemHost {
    let host = folder();
    make(&host, "/vm/top", &CreateOptions { cluster_bits: bits, ..on("base", "qcow2") });
    host.add("/vm/data", &vec![7; SIZE as usize]).unwrap();
    host.add("/new/data", &vec![7; SIZE as usize]).unwrap();
    let file = host.open(Path::new("/vm/top"), Access::ReadWrite).unwrap();
    let mut cluster0 = header(&host, "/vm/top");
    cluster0.set_data_file(b"/vm/data", false);
    if bits > 12 {
        // An extension that is not known pushes the name out of the first sector.
        cluster0.set_extension(Extension::new(0x1234_5678, vec![3; 700]));
    }
    file.write_all_at(&cluster0.encode().unwrap(), 0).unwrap();
    host
}

#[test]
fn both_names_change_together_at_every_power_cut() {
    let mut states = 0;
    for (seed, bits) in [9, 12, 16, 9, 16].into_iter().enumerate() {
        let host = with_data_file(bits);
        let names = RelinkOptions {
            // Cluster 0 of the smallest images has room for short names alone.
            backing: Some(if bits == 9 {
                "/new/base".into()
            } else {
                format!("/new/{}base", "./".repeat(90 * seed)).into()
            }),
            data_file: Some("/new/data".into()),
            ..options("")
        };
        let disk = SimHost::over(&host);
        let run = |host: Arc<dyn Host>| -> Result<bool> {
            heal_image(&*host, Path::new("/vm/top"), &local(), None)?;
            let prepared =
                Relink::prepare(host, Path::new("/vm/top"), &names, &Silent, &AtomicBool::new(false))?;
            let was_done = matches!(prepared, PreparedRelink::Nothing(_));
            prepared.execute().map(|()| was_done)
        };
        assert!(!run(Arc::new(disk.clone())).unwrap());
        let (before, after) = (header(&host, "/vm/top"), header(&disk, "/vm/top"));
        assert_eq!(after.backing_name.as_deref(), Some(names.backing.clone().unwrap().as_encoded_bytes()));
        assert_eq!(after.data_file_name(), Some(&b"/new/data"[..]));
        let cluster = 1usize << bits;
        let rest = |host: &MemHost| host.content("/vm/top").unwrap()[cluster..].to_vec();
        let others = |host: &MemHost| {
            ["/vm/base", "/new/base", "/vm/data", "/new/data"].map(|path| host.content(path).unwrap())
        };
        for garbage in [Garbage::None, Garbage::Sectors] {
            let cuts =
                Cuts { garbage, damaged: 2, exhaustive: 4, ..crate::merge::crash_tests::cuts(seed as u64) };
            states += power_cuts(disk.start(), &disk.log(), &cuts, |cut| {
                let now = cut.state.host();
                let what = format!("seed {seed}: {cut}");
                assert!(run(Arc::new(now.clone())).is_ok(), "{what}");
                assert_eq!(header(&now, "/vm/top"), after, "{what}");
                assert!(rest(&now) == rest(&host) && others(&now) == others(&host), "{what}");
                let left = now.list(Path::new("/vm")).unwrap();
                assert!(
                    left.iter().all(|path| !path.to_string_lossy().contains("qmerge")),
                    "{what}: {left:?}"
                );
                // Whoever looks before that sees the old names or the new ones, or is told.
                let torn = cut.state.host();
                let healed = heal_image(&torn, Path::new("/vm/top"), &local(), None);
                assert!(healed.is_ok(), "{what}");
                let whole = header(&torn, "/vm/top");
                assert!(whole == before || whole == after, "{what}: {whole:?}");
            });
        }
        for nth in 1.. {
            let disk = SimHost::over(&host);
            disk.fail(Some(Fault { kind: FaultKind::Io, nth, for_ever: nth % 2 == 0 }));
            let failed = run(Arc::new(disk.clone()));
            let is_hit = disk.failed() > 0;
            disk.fail(None);
            let again = run(Arc::new(disk.clone()));
            assert!(again.is_ok(), "operation {nth}: {failed:?}, again: {again:?}");
            assert_eq!(header(&disk, "/vm/top"), after, "operation {nth}");
            if !is_hit {
                break;
            }
        }
    }
    assert!(states > 100, "{states}");
}

#[test]
fn a_data_file_is_proved_by_its_bytes() {
    let host = with_data_file(16);
    let data = |name: &str| RelinkOptions { backing: None, data_file: Some(name.into()), ..options("") };
    assert_eq!(proof(&host, &data("/new/data")), Proof::SameContent);
    host.add("/new/other", &vec![8; SIZE as usize]).unwrap();
    assert!(matches!(doubt(&host, &data("/new/other")), Doubt::Content { .. }));
    host.add("/new/short", &vec![7; SIZE as usize / 2]).unwrap();
    assert!(matches!(doubt(&host, &data("/new/short")), Doubt::Size { .. }));
    // What the backing name leads to does not matter then.
    remove(&host, "/vm/base");
    assert_eq!(proof(&host, &data("/new/data")), Proof::SameContent);
    // What the image names is its base's, or its own.
    assert!(matches!(prepare(&host, &data("/vm/top")), Err(Error::Refused { .. })));
    remove(&host, "/vm/data");
    assert!(matches!(doubt(&host, &data("/new/data")), Doubt::Gone { .. }));
    let moved = |name: &str| RelinkOptions { vouched: Vouched::Folder, ..data(name) };
    assert_eq!(proof(&host, &moved("/new/data")), Proof::MovedFolder);
    host.add("/new/empty", b"").unwrap();
    assert!(matches!(doubt(&host, &moved("/new/empty")), Doubt::Fit { .. }));
}

#[test]
fn names_of_a_moved_folder_are_found_and_others_left_alone() {
    let host = MemHost::new();
    for base in ["/srv/vms/b/base", "/templates/t", "/other/base", "/srv/vmsx/base"] {
        make(&host, base, &CreateOptions::new(SIZE));
    }
    let json = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/vms/b/base"}}"#;
    let new = "/srv/vms/b/base";
    let cases = [
        ("absolute", "/vms/b/base", Some(new)),
        ("untidy", "/vms/./b//base", Some(new)),
        ("through", "/vms/a/../b/base", Some(new)),
        ("prefix", "file:/vms/b/base", Some(new)),
        ("json", json, Some(new)),
        ("gone", "/vms/nothing", Some("/srv/vms/nothing")),
        // It lay in /vms, and named what lies beside that.
        ("out", "../templates/t", Some("../../templates/t")),
        ("inside", "b/base", None),
        ("done", new, None),
        ("other", "/other/base", None),
        ("longer", "/vmsx/base", None),
        ("leaves", "/vms/../other/base", None),
        ("remote", "nbd://h/vms/b/base", None),
    ];
    for (name, backing, _) in cases {
        let path = PathBuf::from(format!("/srv/vms/{name}"));
        create(&host, &path, &on(backing, "qcow2")).unwrap();
    }
    make(&host, "/elsewhere/rel", &on("../vms/b/base", "qcow2"));
    let folder = MovedFolder::new(&host, Path::new("/vms/"), Path::new("/srv/vms")).unwrap();
    let find = |dirs: &[&str]| {
        let dirs: Vec<PathBuf> = dirs.iter().map(PathBuf::from).collect();
        let found = find_renamed(&host, &folder, &dirs).unwrap();
        assert!(found.unreadable.is_empty() && found.left_out.is_empty());
        found.images
    };
    let images = find(&["/srv"]);
    for (name, _, expected) in cases {
        let image = images.iter().find(|image| image.image.ends_with(name));
        let found = image.and_then(|image| image.backing.as_deref()).map(|name| name.to_str().unwrap());
        assert_eq!(found, expected, "{name}");
    }
    let relative = find(&["/elsewhere"]);
    assert_eq!(relative[0].backing.as_deref(), Some("../srv/vms/b/base".as_ref()));
    // A folder that was moved into itself: its new names begin with the old one, too.
    let inner = MovedFolder::new(&host, Path::new("/srv"), Path::new("/srv/vms")).unwrap();
    let again = find_renamed(&host, &inner, &["/srv".into()]).unwrap();
    assert!(again.images.iter().all(|image| !image.image.ends_with("done")), "{again:?}");
}

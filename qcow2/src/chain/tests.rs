//! Chains in memory: what is opened, what is refused, and what the errors say.

use std::path::Path;

use super::*;
use crate::error::{Error, ErrorKind, Refusal, Result, Role};
use crate::format::{Cluster0, Container, Geometry, Header};
use crate::image::ImageFormat;
use crate::storage::Access;
use crate::storage::{Host, LockMode, MemHost};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// An empty image of 1 MiB that names a backing file, and its format unless that is empty.
pub(super) fn overlay(name: &str, format: &str) -> Vec<u8> {
    let mut cluster0 = empty();
    if !name.is_empty() {
        cluster0.set_backing(name.as_bytes(), if format.is_empty() { "x" } else { format }).unwrap();
        if format.is_empty() {
            cluster0.remove_extension(crate::format::EXT_BACKING_FORMAT);
        }
    }
    image(&cluster0)
}

/// An empty image of 1 MiB without a backing file whose guest data lies in another file.
pub(super) fn with_data_file(name: &str) -> Vec<u8> {
    let mut cluster0 = empty();
    cluster0.set_data_file(name.as_bytes(), false);
    image(&cluster0)
}

fn empty() -> Cluster0 {
    let mut header = Header::new(3, Geometry::new(16, 4, false).unwrap(), 1 << 20);
    header.l1_entries = 1;
    header.l1_offset = HostOffset::new(0x30000);
    header.refcount_table_offset = HostOffset::new(0x10000);
    header.refcount_table_clusters = 1;
    Cluster0::new(header)
}

fn image(cluster0: &Cluster0) -> Vec<u8> {
    let mut bytes = cluster0.encode().unwrap();
    bytes.resize(0x40000, 0);
    bytes
}

fn local() -> OpenOptions {
    OpenOptions { policy: Policy::local_files(), ..OpenOptions::default() }
}

fn host(files: &[(&str, Vec<u8>)]) -> MemHost {
    let host = MemHost::new();
    for (path, content) in files {
        host.add(path, content).unwrap();
    }
    host
}

fn open(host: &MemHost, active: &str) -> Result<Chain> {
    Chain::open(host, Path::new(active), &local())
}

fn refusal(result: Result<Chain>) -> Refusal {
    match result {
        Err(Error::Refused { reason, .. }) => reason,
        other => panic!("not refused: {other:?}"),
    }
}

/// `/d/base.raw <- /d/a <- /e/b <- /e/c`
fn four() -> MemHost {
    host(&[
        ("/d/base.raw", vec![7; 1 << 20]),
        ("/d/a", overlay("base.raw", "raw")),
        ("/e/b", overlay("../d/a", "qcow2")),
        ("/e/c", overlay("b", "qcow2")),
    ])
}

#[test]
fn layers_are_numbered_from_the_bottom_and_spelt_as_qemu_does() {
    let chain = open(&four(), "/e/c").unwrap();
    let paths: Vec<_> = chain.layers().iter().map(|l| l.path.display().to_string()).collect();
    assert_eq!(paths, ["/e/../d/base.raw", "/e/../d/a", "/e/b", "/e/c"]);
    assert_eq!(chain.layers().iter().map(|l| l.index).collect::<Vec<_>>(), [1, 2, 3, 4]);
    let names: Vec<_> = chain.layers().iter().map(|l| l.written_name.as_deref()).collect();
    assert_eq!(names, [Some(&b"base.raw"[..]), Some(&b"../d/a"[..]), Some(&b"b"[..]), None]);
    assert_eq!(chain.images()[0].format(), ImageFormat::Raw);
    assert_eq!(chain.active(), 3);
    assert_eq!(chain.files().len(), 4);
}

#[test]
fn a_layer_is_found_by_any_of_its_names_and_by_its_index() {
    let host = four();
    let chain = open(&host, "/e/c").unwrap();
    for (spec, at) in [
        ("/e/../d/a", 1),
        ("/d/a", 1),
        ("../d/a", 1),
        ("b", 2),
        ("[1]", 0),
        ("vda[4]", 3),
        ("/e/c", 3),
        ("base.raw", 0),
    ] {
        assert_eq!(chain.find(&host, spec).unwrap(), at, "{spec}");
    }
    for spec in ["[0]", "[5]", "gone", "", "[x]"] {
        let error = chain.find(&host, spec).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Usage);
        assert!(error.to_string().contains("[4] /e/c (active)"), "{error}");
    }
}

#[test]
fn a_name_that_two_layers_have_is_ambiguous() {
    let host = host(&[
        ("/d/x", overlay("", "")),
        ("/e/top", overlay("../d/sub/x", "qcow2")),
        ("/d/sub/x", overlay("../x", "qcow2")),
        ("/e/next", overlay("x", "qcow2")),
        ("/e/x", overlay("top", "qcow2")),
        ("/x", overlay("/e/next", "qcow2")),
    ]);
    let chain = open(&host, "/x").unwrap();
    let error = chain.find(&host, "x").unwrap_err();
    assert!(error.to_string().contains("more than one"), "{error}");
    assert_eq!(chain.find(&host, "/d/sub/x").unwrap(), 1);
}

#[test]
fn the_library_follows_no_name_unless_told() {
    let result = Chain::open(&four(), Path::new("/e/c"), &OpenOptions::default());
    assert!(matches!(refusal(result), Refusal::NamesDenied { role: Role::BackingFile, .. }));
    let alone = host(&[("/a", overlay("", ""))]);
    assert!(Chain::open(&alone, Path::new("/a"), &OpenOptions::default()).is_ok());
}

/// Other engines overflow their stack here.
#[test]
fn an_image_that_names_itself_is_a_loop() {
    let host = host(&[("/d/a", overlay("a", "qcow2"))]);
    assert_eq!(refusal(open(&host, "/d/a")), Refusal::Loop { file: "/d/a".into() });
}

#[test]
fn two_images_that_name_each_other_are_a_loop_however_spelt() {
    let host = host(&[("/d/a", overlay("../d/b", "qcow2")), ("/d/b", overlay("./a", "qcow2"))]);
    assert!(matches!(refusal(open(&host, "/d/a")), Refusal::Loop { .. }));
}

#[test]
fn a_chain_may_not_be_deeper_than_the_limit() {
    let files = [("/0", overlay("", "")), ("/1", overlay("0", "qcow2")), ("/2", overlay("1", "qcow2"))];
    let host = host(&files);
    let options = OpenOptions { policy: Policy::local_files().with_max_depth(2), ..local() };
    assert!(Chain::open(&host, Path::new("/1"), &options).is_ok());
    assert!(matches!(refusal(Chain::open(&host, Path::new("/2"), &options)), Refusal::TooDeep { limit: 2 }));
}

/// CVE-2008-2004 and its relatives: a raw disk into which the guest wrote a header.
#[test]
fn a_backing_file_without_a_format_is_never_probed() {
    let host = host(&[("/base", overlay("", "")), ("/top", overlay("base", ""))]);
    assert_eq!(refusal(open(&host, "/top")), Refusal::MissingFormat { name: "base".to_owned() });
    for key in ["base", "/base", "/x/../base"] {
        let options = OpenOptions { backing_formats: [(key.into(), ImageFormat::Qcow2)].into(), ..local() };
        let chain = Chain::open(&host, Path::new("/top"), &options).unwrap();
        assert_eq!(chain.images()[0].format(), ImageFormat::Qcow2);
    }
}

/// CVE-2026-24708, GHSA-jmr4-g2hv-mjj6.
#[test]
fn a_raw_base_into_which_the_guest_wrote_a_qcow2_header_is_not_an_image() {
    let mut evil = overlay("/etc/shadow", "raw");
    evil.resize(1 << 20, 0);
    let host = host(&[("/base.raw", evil), ("/top", overlay("base.raw", "raw"))]);
    assert!(matches!(
        refusal(open(&host, "/top")),
        Refusal::FormatMismatch { declared, found, .. } if declared == "raw" && found == Some("qcow2")
    ));
    let options = OpenOptions { backing_formats: [("/base.raw".into(), ImageFormat::Raw)].into(), ..local() };
    let chain = Chain::open(&host, Path::new("/top"), &options).unwrap();
    assert_eq!(chain.layers().len(), 2);
    assert_eq!(chain.images()[0].format(), ImageFormat::Raw);
}

#[test]
fn a_base_declared_qcow2_must_be_one() {
    let host = host(&[("/base", vec![0; 4096]), ("/top", overlay("base", "qcow2"))]);
    assert!(matches!(
        refusal(open(&host, "/top")),
        Refusal::FormatMismatch { declared, found, .. } if declared == "qcow2" && found.is_none()
    ));
}

#[test]
fn the_overlays_word_on_the_format_goes_before_the_one_in_json_and_is_not_overruled() {
    let json = r#"json:{"driver":"raw","file":{"driver":"file","filename":"/base"}}"#;
    let files = [("/base", overlay("", "")), ("/top", overlay(json, "qcow2")), ("/top2", overlay(json, ""))];
    let host = host(&files);
    assert_eq!(open(&host, "/top").unwrap().images()[0].format(), ImageFormat::Qcow2);
    assert!(matches!(refusal(open(&host, "/top2")), Refusal::FormatMismatch { .. }));
    let options = OpenOptions { backing_formats: [("/base".into(), ImageFormat::Raw)].into(), ..local() };
    let error = Chain::open(&host, Path::new("/top"), &options).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Usage);
}

#[test]
fn other_formats_are_refused_by_name() {
    for format in ["QCOW2", "rbd", "host_device", "gzip"] {
        let host = host(&[("/base", vec![0; 4096]), ("/top", overlay("base", format))]);
        let error = open(&host, "/top").unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        assert!(error.to_string().contains(format), "{error}");
    }
}

/// The start of a file of another format.
fn foreign(magic: &[u8]) -> Vec<u8> {
    [magic, &[0; 4096]].concat()
}

#[test]
fn a_layer_of_another_format_is_held_and_never_read() {
    for format in ["vmdk", "vdi", "vhdx", "vpc", "qed", "qcow", "luks", ""] {
        let files = [
            ("/base", foreign(b"KDMV")),
            ("/a", overlay("base", if format.is_empty() { "" } else { "vmdk" })),
            ("/b", overlay("a", "qcow2")),
        ];
        let chain = open(&host(&files), "/b").unwrap();
        let images = chain.images();
        assert_eq!((images.len(), images[0].format()), (3, ImageFormat::Foreign(Container::Vmdk)));
        let view = view::View::new(&images, 0, 2);
        let range = GuestRange { start: GuestOffset::ZERO, len: 1 << 16 };
        let error = view.resolve(range, &mut Vec::new()).unwrap_err();
        assert!(matches!(error, Error::Foreign { container: Container::Vmdk, .. }), "{error}");
        assert!(view::View::new(&images, 1, 2).resolve(range, &mut Vec::new()).is_ok());
    }
}

#[test]
fn raw_is_believed_as_far_as_it_may_be() {
    let open = |magic: &[u8], declared: &str, given: bool, access| {
        let files = [("/base", foreign(magic)), ("/top", overlay("base", declared))];
        let host = host(&files);
        let mut options = local();
        if given {
            options.backing_formats.insert("base".into(), ImageFormat::Raw);
        }
        options.access.insert(host.stat(Path::new("/base")).unwrap().id, access);
        Chain::open(&host, Path::new("/top"), &options).map(|chain| chain.images()[0].format())
    };
    let (read, write) = (Access::Read, Access::ReadWrite);
    // A guest's own disk, or one that a container lies in: what the overlay says is true.
    for magic in [&b"LUKS\xba\xbe\0\x02"[..], b"\x1f\x8b\x08", b"PK\x03\x04"] {
        assert_eq!(open(magic, "raw", false, write).unwrap(), ImageFormat::Raw);
    }
    // A mistake, or a guest that wrote another format's magic: a second word is needed.
    for magic in [&b"KDMV"[..], b"vhdxfile", b"QED\0", b"conectix", b"QFI\xfb\0\0\0\x01"] {
        let refused = open(magic, "raw", false, read).unwrap_err();
        assert!(matches!(refused, Error::Refused { reason: Refusal::FormatMismatch { .. }, .. }));
        assert_eq!(open(magic, "raw", true, write).unwrap(), ImageFormat::Raw);
        // The user's word alone is enough to read, and not to write.
        assert_eq!(open(magic, "", true, read).unwrap(), ImageFormat::Raw);
        let refused = open(magic, "", true, write).unwrap_err();
        assert!(matches!(refused, Error::Refused { reason: Refusal::FormatMismatch { .. }, .. }));
    }
    let refused = open(b"LUKS\xba\xbe\0\x01", "", true, write).unwrap_err();
    assert!(matches!(refused, Error::Refused { reason: Refusal::FormatMismatch { .. }, .. }));
    assert_eq!(open(b"any", "file", false, write).unwrap(), ImageFormat::Raw);
}

#[test]
fn a_named_file_of_another_format_is_not_raw() {
    let host = host(&[("/x", foreign(b"KDMV"))]);
    assert!(matches!(open(&host, "/x"), Err(Error::Foreign { .. })));
    let raw = OpenOptions { active_format: Some(ImageFormat::Raw), ..local() };
    assert!(Chain::open(&host, Path::new("/x"), &raw).is_ok());
}

#[test]
fn what_a_name_states_of_the_layers_below_must_be_so() {
    let node = |file: &str, backing: &str| {
        format!(r#"{{"driver":"qcow2","file":{{"driver":"file","filename":"{file}"}}{backing}}}"#)
    };
    let on = |node: String| format!(r#","backing":{node}"#);
    let chain = |stated: &str| {
        let name = format!("json:{}", node("/b", stated));
        let host = host(&[
            ("/base", overlay("", "")),
            ("/other", overlay("", "")),
            ("/a", overlay("base", "qcow2")),
            ("/b", overlay("a", "qcow2")),
            ("/c", overlay(&name, "qcow2")),
        ]);
        open(&host, "/c").map(|chain| chain.layers().len())
    };
    let nothing = r#","backing":null"#;
    for right in [
        on(node("/a", "")),
        on(node("/a", &on(node("/base", "")))),
        on(node("/a", &on(node("/base", nothing)))),
    ] {
        assert_eq!(chain(&right).unwrap(), 4, "{right}");
    }
    let raw = r#","backing":{"driver":"raw","file":{"filename":"/a"}}"#;
    for wrong in [
        on(node("/base", "")),
        on(node("/gone", "")),
        on(node("/a", &on(node("/other", "")))),
        on(node("/a", &on(node("/base", &on(node("/other", "")))))),
        on(node("/a", nothing)),
        nothing.to_owned(),
        raw.to_owned(),
    ] {
        assert_eq!(chain(&wrong).unwrap_err().kind(), ErrorKind::Refused, "{wrong}");
    }
}

#[test]
fn a_chain_may_have_any_number_of_layers() {
    let names: Vec<String> = (0..1000).map(|n| format!("/{n}")).collect();
    let below = |n: usize| if n == 0 { overlay("", "") } else { overlay(&names[n - 1], "qcow2") };
    let files: Vec<_> = names.iter().enumerate().map(|(n, name)| (name.as_str(), below(n))).collect();
    assert_eq!(open(&host(&files), "/999").unwrap().layers().len(), 1000);
}

#[test]
fn the_active_image_is_recognised_by_its_magic_or_taken_as_told() {
    let host = host(&[("/raw", vec![0; 1 << 20]), ("/q", overlay("", ""))]);
    assert_eq!(open(&host, "/raw").unwrap().images()[0].format(), ImageFormat::Raw);
    assert_eq!(open(&host, "/q").unwrap().images()[0].format(), ImageFormat::Qcow2);
    let raw = OpenOptions { active_format: Some(ImageFormat::Raw), ..local() };
    assert_eq!(Chain::open(&host, Path::new("/q"), &raw).unwrap().images()[0].format(), ImageFormat::Raw);
    let qcow2 = OpenOptions { active_format: Some(ImageFormat::Qcow2), ..local() };
    assert!(matches!(Chain::open(&host, Path::new("/raw"), &qcow2), Err(Error::Format { .. })));
}

#[test]
fn a_missing_layer_names_the_image_that_wants_it() {
    let host = host(&[("/d/a", overlay("gone", "raw")), ("/d/b", overlay("a", "qcow2"))]);
    let text = open(&host, "/d/b").unwrap_err().to_string();
    assert!(text.starts_with("/d/a: its backing file 'gone' (/d/gone)"), "{text}");
    let text = open(&host, "/d/none").unwrap_err().to_string();
    assert!(text.contains("/d/none"), "{text}");
}

#[test]
fn network_names_are_refused_before_anything_is_tried() {
    for name in ["nbd://h/x", r#"json:{"driver":"qcow2","file":{"driver":"https","url":"x"}}"#, "fat:/d"] {
        let host = host(&[("/d/a", overlay(name, "raw"))]);
        assert!(matches!(
            refusal(open(&host, "/d/a")),
            Refusal::NotLocal { role: Role::BackingFile, name: found, .. } if found == name
        ));
    }
}

/// CVE-2024-32498: a data file that is any file of the host.
#[test]
fn data_files_go_through_the_policy_too() {
    let host = host(&[("/d/a", with_data_file("/d/a.data")), ("/d/a.data", vec![0; 1 << 20])]);
    let chain = open(&host, "/d/a").unwrap();
    assert_eq!(chain.layers()[0].data_file.as_ref().unwrap().path, Path::new("/d/a.data"));
    assert_eq!(chain.files().len(), 2);
    let denied = Chain::open(&host, Path::new("/d/a"), &OpenOptions::default());
    assert!(matches!(refusal(denied), Refusal::NamesDenied { role: Role::DataFile, .. }));
    let elsewhere = OpenOptions { policy: Policy::deny().allow_dir("/e"), ..local() };
    host.add("/e/x", b"").unwrap();
    let outside = Chain::open(&host, Path::new("/d/a"), &elsewhere);
    assert!(matches!(refusal(outside), Refusal::OutsideAllowed { .. }));
}

#[test]
fn a_missing_data_file_is_a_missing_layer() {
    let host = host(&[("/d/a", with_data_file("/d/gone"))]);
    let error = open(&host, "/d/a").unwrap_err();
    assert!(matches!(error, Error::MissingLayer { role: Role::DataFile, .. }), "{error}");
}

#[test]
fn a_data_file_that_is_the_image_or_another_layer_is_refused() {
    let host = host(&[
        ("/self", with_data_file("/self")),
        ("/base", with_data_file("/top")),
        ("/top", overlay("base", "qcow2")),
    ]);
    for active in ["/self", "/top"] {
        let text = refusal(open(&host, active)).to_string();
        assert!(text.contains("also another file of the chain"), "{text}");
    }
}

#[test]
fn every_layer_is_locked_and_an_image_in_use_is_refused() {
    let host = four();
    let base = host.stat(Path::new("/d/base.raw")).unwrap().id;
    let options = OpenOptions { lock: true, access: [(base, Access::ReadWrite)].into(), ..local() };
    let chain = Chain::open(&host, Path::new("/e/c"), &options).unwrap();
    assert_eq!(chain.layers()[0].access, Access::ReadWrite);
    assert_eq!(chain.layers()[1].access, Access::Read);
    let other = |path: &str, mode| host.open(Path::new(path), Access::Read).unwrap().lock(mode);
    assert!(other("/d/base.raw", LockMode::Read).is_err());
    assert!(other("/d/a", LockMode::Read).is_ok());
    assert!(other("/d/a", LockMode::Write).is_err());
    let again = Chain::open(&host, Path::new("/e/c"), &options).unwrap_err();
    assert!(matches!(&again, Error::InUse { path, .. } if path.ends_with("base.raw")), "{again}");
    drop(chain);
    assert!(Chain::open(&host, Path::new("/e/c"), &options).is_ok());
}

/// CVE-2024-4467: QEMU once read options in a data file's name.
#[test]
fn a_data_file_name_is_a_path_and_nothing_else() {
    let name = r#"json:{"driver":"file","filename":"/secret"}"#;
    let host = host(&[("/a", with_data_file(name)), ("/secret", vec![0; 1 << 20])]);
    let error = open(&host, "/a").unwrap_err();
    assert!(matches!(&error, Error::MissingLayer { resolved, .. } if resolved == Path::new(name)), "{error}");
}

/// CVE-2015-5163: an image that names any file of the host as its backing file.
#[test]
fn a_backing_file_outside_the_allowed_folders_is_not_opened() {
    let host = host(&[("/etc/shadow", vec![b'x'; 512]), ("/d/a", overlay("/etc/shadow", "raw"))]);
    let options = OpenOptions { policy: Policy::local_files().allow_dir("/d"), ..local() };
    let result = Chain::open(&host, Path::new("/d/a"), &options);
    assert_eq!(refusal(result), Refusal::OutsideAllowed { file: "/etc/shadow".into() });
}

/// No byte of a name makes reading it panic, and none makes it a name of something that was not meant.
#[test]
fn names_of_any_bytes_are_read_or_refused() {
    let seeds: [&[u8]; 4] = [
        b"base",
        b"./a:b",
        b"file:/x/base",
        br#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/x"}}"#,
    ];
    for seed in seeds {
        for at in 0..seed.len() {
            for byte in 0..=255 {
                let mut name = seed.to_vec();
                name[at] = byte;
                for name in [&name[..], &name[..at]] {
                    if let Ok(parsed) = BackingName::parse(name) {
                        assert!(!parsed.resolve(Path::new("/d/top")).as_os_str().is_empty());
                    }
                }
            }
        }
    }
}

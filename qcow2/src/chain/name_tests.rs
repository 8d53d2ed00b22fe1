use super::*;

fn resolved(name: &str, overlay: &str) -> String {
    BackingName::parse(name.as_bytes()).unwrap().resolve(Path::new(overlay)).display().to_string()
}

fn why(name: &str) -> String {
    BackingName::parse(name.as_bytes()).unwrap_err()
}

#[test]
fn relative_names_start_at_the_overlays_directory_as_named() {
    assert_eq!(resolved("base", "top"), "base");
    assert_eq!(resolved("base", "./top"), "./base");
    assert_eq!(resolved("base", "d//top"), "d//base");
    assert_eq!(resolved("../base", "/a/b/../top"), "/a/b/../../base");
    assert_eq!(resolved("/abs", "d/top"), "/abs");
    assert_eq!(resolved("base", "/top"), "/base");
}

#[test]
fn a_colon_before_a_slash_is_a_protocol_and_behind_one_it_is_not() {
    assert_eq!(resolved("./a:b", "d/top"), "d/./a:b");
    assert_eq!(resolved("/d/a:b", "top"), "/d/a:b");
    assert_eq!(resolved("d/nbd:x", "top"), "d/nbd:x");
    assert_eq!(why("a:b"), "protocol 'a'");
    assert_eq!(why(":x"), "protocol ''");
    assert_eq!(why(" json:{}"), "protocol ' json'");
    assert_eq!(why("JSON:{}"), "protocol 'JSON'");
    assert_eq!(why(r"C:\VMs\base.qcow2"), "a path of Windows");
    assert_eq!(why("d:/VMs/base.qcow2"), "a path of Windows");
    assert_eq!(why("d:base.qcow2"), "protocol 'd'");
}

#[test]
fn every_other_protocol_is_refused_by_name() {
    for name in [
        "nbd:localhost:10809",
        "nbd+unix:///?socket=/s",
        "nbd://h/x",
        "http://h/x",
        "https://h/x",
        "ftp://h/x",
        "ssh://h/x",
        "rbd:pool/image",
        "iscsi://h/t/0",
        "nfs://h/x",
        "gluster://h/x",
        "fat:/etc",
        "data:,x",
        "blkdebug::/x",
        "host_cdrom:/dev/sr0",
        "null-co://",
    ] {
        let protocol = name.split(':').next().unwrap();
        assert_eq!(why(name), format!("protocol '{protocol}'"));
    }
}

#[test]
fn behind_a_prefix_relative_names_start_at_the_working_directory() {
    assert_eq!(resolved("file:base", "d/top"), "base");
    assert_eq!(resolved("file:a:b", "d/top"), "a:b");
    assert_eq!(resolved("file:///x/base", "d/top"), "///x/base");
    assert_eq!(resolved("host_device:/dev/vdb", "d/top"), "/dev/vdb");
    assert!(BackingName::parse(b"file:base").unwrap().depends_on_working_dir());
    assert!(!BackingName::parse(b"file:/base").unwrap().depends_on_working_dir());
    assert!(!BackingName::parse(b"base").unwrap().depends_on_working_dir());
}

#[test]
fn json_names_of_local_files_are_read() {
    for (name, format) in [
        (r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"/b"}}"#, Some("qcow2")),
        (r#"json:{"driver":"raw","file.driver":"file","file.filename":"/b"}"#, Some("raw")),
        (r#"json:{"file":{"filename":"/b"},"node-name":"n","file.locking":"off"}"#, None),
        (r#"json:{'driver':'file','filename':'/b','read-only':true}"#, Some("raw")),
        (r#"json:{"driver":"raw","file":{"driver":"host_device","filename":"/b"}}"#, Some("raw")),
    ] {
        let parsed = BackingName::parse(name.as_bytes()).unwrap();
        assert_eq!(parsed.resolve(Path::new("d/top")), Path::new("/b"), "{name}");
        assert_eq!(parsed.format(), format, "{name}");
        assert_eq!(parsed.spelling(), Spelling::Json);
    }
    let literal = r#"json:{"file.filename":"file:/b"}"#;
    assert_eq!(resolved(literal, "d/top"), "file:/b");
}

#[test]
fn filters_are_looked_through() {
    for (name, format) in [
        (
            r#"{"driver":"throttle","throttle-group":"g","file":{"driver":"qcow2","file":{"driver":"file","filename":"/b"}}}"#,
            "qcow2",
        ),
        (
            r#"{"driver":"qcow2","file":{"driver":"throttle","throttle-group":"g","file":{"driver":"file","filename":"/b"}}}"#,
            "qcow2",
        ),
        (
            r#"{"driver":"copy-on-read","file.driver":"compress","file.file.driver":"raw","file.file.file.filename":"/b"}"#,
            "raw",
        ),
        (r#"{"driver":"copy-on-read","bottom":"n","file":{"driver":"host_device","filename":"/b"}}"#, "raw"),
    ] {
        let parsed = BackingName::parse(format!("json:{name}").as_bytes()).unwrap();
        assert_eq!(parsed.resolve(Path::new("d/top")), Path::new("/b"), "{name}");
        assert_eq!(parsed.format(), Some(format), "{name}");
    }
}

#[test]
fn what_lies_below_is_stated_as_qemu_does() {
    let name = r#"json:{"backing":{"backing":null,"driver":"qcow2","file":{"driver":"file","filename":"/a"}},"driver":"qcow2","file":{"driver":"file","filename":"/b"},"data-file":{"driver":"file","filename":"/d"}}"#;
    let parsed = BackingName::parse(name.as_bytes()).unwrap();
    let Some(Stated::File(below)) = parsed.backing() else { panic!("{parsed:?}") };
    assert_eq!((below.path.as_path(), below.backing()), (Path::new("/a"), Some(&Stated::Nothing)));
    assert_eq!(parsed.data_file().map(|name| name.path.as_path()), Some(Path::new("/d")));
}

#[test]
fn json_that_means_anything_else_is_refused_by_name() {
    for (name, expected) in [
        (r#"json:{"driver":"qcow2","file":{"driver":"nbd","host":"h"}}"#, "driver 'nbd'"),
        (r#"json:{"driver":"qcow2","file.driver":"https","file.url":"u"}"#, "driver 'https'"),
        (r#"json:{"driver":"raw","offset":512,"file":{"filename":"/b"}}"#, "'offset'"),
        (r#"json:{"driver":"qcow2","backing":"node","file":{"filename":"/b"}}"#, "'backing'"),
        (
            r#"json:{"driver":"qcow2","backing":{"driver":"nbd"},"file":{"filename":"/b"}}"#,
            "without a file name",
        ),
        (r#"json:{"driver":"quorum","file":{"filename":"/b"},"vote-threshold":1}"#, "'vote-threshold'"),
        (r#"json:{"driver":"blkdebug","image":{"driver":"file","filename":"/b"}}"#, "'image.driver'"),
        (r#"json:{"driver":"throttle","offset":1,"file":{"driver":"file","filename":"/b"}}"#, "'offset'"),
        (r#"json:{"driver":"raw","file":{"driver":"qcow2","file":{"filename":"/b"}}}"#, "driver 'qcow2'"),
        (r#"json:{"driver":"qcow2","file":"node"}"#, "'file'"),
        (r#"json:{"driver":"qcow2"}"#, "without a file name"),
        (r#"json:{"file":{"filename":5}}"#, "is 5, not a string"),
        (r#"json:{"file":{"filename":"a\u0000b"}}"#, "zero byte"),
        (r#"json:{"driver":"qcow2","driver":"raw","file.filename":"/b"}"#, "given twice"),
        ("json:", "invalid json"),
    ] {
        assert!(why(name).contains(expected), "{name}: {}", why(name));
    }
    assert!(BackingName::parse(b"json:{\"file.filename\":\"\xff\"}").is_err());
}

#[test]
fn a_zero_byte_cannot_hide_the_rest_of_a_name() {
    assert!(why("base\0/etc/shadow").contains("zero byte"));
    assert_eq!(resolved("base\0\0", "top"), "base");
    assert!(why("").contains("empty"));
    assert!(why("\0").contains("empty"));
    assert!(why("file:").contains("empty"));
}

#[test]
fn names_longer_than_the_format_allows_are_refused() {
    assert!(BackingName::parse(&[b'x'; 1023]).is_ok());
    assert!(BackingName::parse(&[b'x'; 1024]).is_err());
}

#[test]
fn names_that_are_not_utf8_are_kept_byte_for_byte() {
    let name = BackingName::parse(b"b\xffse").unwrap();
    assert_eq!(name.resolve(Path::new("d/top")).as_os_str().as_bytes(), b"d/b\xffse");
}

#[test]
fn data_file_names_are_literal_paths_from_the_working_directory() {
    for name in ["d.raw", "file:d.raw", "json:{}", "nbd://h"] {
        let parsed = BackingName::parse_data_file(name.as_bytes()).unwrap();
        assert_eq!(parsed.resolve(Path::new("d/top")), Path::new(name));
        assert!(parsed.depends_on_working_dir());
    }
    assert!(BackingName::parse_data_file(b"").is_err());
}

#[test]
fn drivers_demand_the_kind_of_file_that_qemu_demands() {
    let kind = |name: &str, kind| BackingName::parse(name.as_bytes()).unwrap().check_kind(kind).is_ok();
    assert!(kind("/b", FileKind::Regular) && kind("/b", FileKind::Block));
    assert!(kind("file:/b", FileKind::Regular) && !kind("file:/b", FileKind::Block));
    assert!(!kind("host_device:/b", FileKind::Regular) && kind("host_device:/b", FileKind::Block));
    assert!(!kind("/b", FileKind::Other("a fifo")));
}

#[test]
fn a_search_for_users_takes_names_that_opening_refuses() {
    let paths = |name: &str| possible_paths(name.as_bytes(), Path::new("/d/top"));
    let has = |name: &str, path: &str| paths(name).contains(&PathBuf::from(path));
    assert!(has(r#"json:{"driver":"raw","offset":0,"file":{"filename":"/b"}}"#, "/b"));
    assert!(has(r#"json:{"file":{"driver":"raw","file":{"filename":"b"}}}"#, "/d/b"));
    assert!(has("base\0junk", "/d/base"));
    assert!(has("blkdebug::/b", "/b"));
    assert!(has("file:b", "b") && has("file:b", "/d/b"));
    assert!(has("a:b", "/d/a:b"));
    assert_eq!(paths("b"), [Path::new("/d/b")]);
}

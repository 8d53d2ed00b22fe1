//! Names inside images, as QEMU resolves them and as we do: the same files, or an error on both sides.

#![allow(clippy::unwrap_used, clippy::panic, reason = "helpers of tests")]

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use qcow2::chain::{Chain, OpenOptions, Policy, new_backing_name};
use qcow2::fuzzing::{set_backing, set_data_file};
use qcow2::image::ImageFormat;
use qcow2::storage::OsHost;
use serde_json::Value;
use tempfile::TempDir;

fn run(command: &mut Command) -> Output {
    let output = command.output().unwrap();
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
    output
}

fn qemu_img(arguments: &[&str]) {
    run(Command::new("qemu-img").args(arguments));
}

/// The chain that QEMU sees, top first, as names and formats.
fn qemu_chain(active: &Path) -> Result<Vec<(String, String)>, String> {
    let mut command = Command::new("qemu-img");
    let output = command.args(["info", "--backing-chain", "--output=json"]).arg(active).output().unwrap();
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    let layers: Vec<Value> = serde_json::from_slice(&output.stdout).unwrap();
    let text = |layer: &Value, key: &str| layer[key].as_str().unwrap().to_owned();
    Ok(layers.iter().map(|l| (text(l, "filename"), text(l, "format"))).collect())
}

fn our_chain(active: &Path) -> Result<Vec<(String, String)>, String> {
    let options = OpenOptions::new(Policy::local_files());
    let chain = Chain::open(&OsHost, active, &options).map_err(|e| e.to_string())?;
    let layers = chain.layers().iter().rev();
    Ok(layers.map(|l| (l.path.display().to_string(), l.image.format().name().to_owned())).collect())
}

/// `base` and `base.raw`, `top` above a name that a test chooses, and the same in `other`.
struct ChainFolder {
    dir: TempDir,
}

impl ChainFolder {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let this = Self { dir };
        for sub in ["", "other/", "d:x/"] {
            fs::create_dir_all(this.path(sub)).unwrap();
            qemu_img(&["create", "-q", "-f", "qcow2", &this.text(&format!("{sub}base")), "1M"]);
            qemu_img(&["create", "-q", "-f", "raw", &this.text(&format!("{sub}base.raw")), "1M"]);
            qemu_img(&["create", "-q", "-f", "qcow2", &this.text(&format!("{sub}top")), "1M"]);
        }
        fs::copy(this.path("base"), this.path("a:b")).unwrap();
        fs::copy(this.path("base"), this.path("json:{}")).unwrap();
        this
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    /// The way from the working directory to a file in this folder.
    fn text_from_here(&self, name: &str) -> String {
        let here = std::env::current_dir().unwrap();
        let up = "../".repeat(here.components().count() - 1);
        format!("{up}{}", self.text(name).trim_start_matches('/'))
    }

    /// Gives `top` a backing name and format, byte for byte; no format if it is empty.
    fn set_backing(&self, top: &str, name: &[u8], format: &str) {
        let path = self.path(top);
        let mut bytes = fs::read(&path).unwrap();
        set_backing(&mut bytes[..65536], name, format);
        fs::write(&path, bytes).unwrap();
    }

    /// Compares what QEMU and we make of a name in `top`.
    fn compare(&self, active: &Path, name: &str, format: &str) {
        let (theirs, ours) = (qemu_chain(active), our_chain(active));
        match (&theirs, &ours) {
            (Ok(theirs), Ok(ours)) => assert_eq!(theirs, ours, "{name} as {format}"),
            (Err(_), Err(_)) => {}
            _ => panic!("{name} as {format}: QEMU {theirs:?}, we {ours:?}"),
        }
    }
}

#[test]
fn names_lead_where_qemu_goes() {
    if !kit::qemu_is_here() {
        return;
    }
    let folder = ChainFolder::new();
    let base = folder.text("base");
    let relative = folder.text_from_here("base");
    let names = [
        ("base".to_owned(), "qcow2"),
        ("base.raw".to_owned(), "raw"),
        ("./base".to_owned(), "qcow2"),
        ("other/../base".to_owned(), "qcow2"),
        ("other//base".to_owned(), "qcow2"),
        ("gone".to_owned(), "qcow2"),
        ("base/".to_owned(), "qcow2"),
        (base.clone(), "qcow2"),
        ("a:b".to_owned(), "qcow2"),
        ("./a:b".to_owned(), "qcow2"),
        (":x".to_owned(), "raw"),
        ("d:x/base".to_owned(), "qcow2"),
        ("./d:x/base".to_owned(), "qcow2"),
        (format!("file:{base}"), "qcow2"),
        (format!("file://{base}"), "qcow2"),
        (format!("file:{relative}"), "qcow2"),
        ("file:base".to_owned(), "qcow2"),
        (format!("host_device:{base}"), "qcow2"),
        ("nbd:localhost:1".to_owned(), "raw"),
        ("foo:x".to_owned(), "raw"),
        ("JSON:{}".to_owned(), "raw"),
        ("json:{}".to_owned(), "qcow2"),
        ("./json:{}".to_owned(), "qcow2"),
        ("json:[]".to_owned(), "qcow2"),
    ];
    for (name, format) in names {
        for top in ["top", "other/top"] {
            folder.set_backing(top, name.as_bytes(), format);
            folder.compare(&folder.path(top), &name, format);
            folder.compare(&folder.path(&format!("other/../{top}")), &name, format);
            folder.compare(Path::new(&folder.text_from_here(top)), &name, format);
        }
    }
}

#[test]
fn json_names_lead_where_qemu_goes() {
    if !kit::qemu_is_here() {
        return;
    }
    let folder = ChainFolder::new();
    let relative = folder.text_from_here("base");
    for (json, format) in [
        (r#"{"driver":"qcow2","file":{"driver":"file","filename":"BASE"}}"#, "qcow2"),
        (r#"{"driver":"qcow2","file":{"driver":"file","filename":"BASE"}}"#, ""),
        (r#" {"driver":"qcow2", "file":{"driver":"file","filename":"BASE"}} "#, ""),
        (r#"{"driver":"raw","file":{"driver":"file","filename":"BASE"}}"#, "qcow2"),
        (r#"{"driver":"qcow2","file.driver":"file","file.filename":"BASE"}"#, ""),
        (r#"{'driver':'qcow2','file':{'driver':'file','filename':'BASE'}}"#, ""),
        (r#"{"file":{"filename":"BASE"}}"#, "qcow2"),
        (r#"{"file.filename":"BASE"}"#, "qcow2"),
        (r#"{"file.filename":"RELATIVE"}"#, "qcow2"),
        (r#"{"file.filename":"base"}"#, "qcow2"),
        (r#"{"file.filename":"file:BASE"}"#, "qcow2"),
        (r#"{"file":{"filename":"BASE","locking":"off"},"node-name":"x","discard":"unmap"}"#, "qcow2"),
        (r#"{"file.driver":"host_device","file.filename":"BASE"}"#, "qcow2"),
        (r#"{"driver":"qcow2","file":"BASE"}"#, ""),
        (r#"{"driver":"qcow2"}"#, ""),
        (r#"{"file":{"filename":5}}"#, "qcow2"),
        (r#"{"driver":"qcow2","driver":"raw","file":{"filename":"BASE"}}"#, ""),
        (r#"{"file.filename":"BASE"}x"#, "qcow2"),
        (r#"{"file.filename":"BASE"#, "qcow2"),
    ] {
        let name =
            format!("json:{}", json.replace("BASE", &folder.text("base")).replace("RELATIVE", &relative));
        folder.set_backing("top", name.as_bytes(), format);
        folder.compare(&folder.path("top"), &name, format);
    }
}

#[test]
fn symbolic_links_in_the_overlays_name_are_not_followed_first() {
    if !kit::qemu_is_here() {
        return;
    }
    let folder = ChainFolder::new();
    folder.set_backing("other/top", b"base", "qcow2");
    symlink("other/top", folder.path("link")).unwrap();
    folder.compare(&folder.path("link"), "base", "qcow2");
    assert_eq!(our_chain(&folder.path("link")).unwrap()[1].0, folder.text("base"));
    assert_eq!(our_chain(&folder.path("other/top")).unwrap()[1].0, folder.text("other/base"));
    symlink("other", folder.path("folder")).unwrap();
    folder.set_backing("other/top", b"../base", "qcow2");
    folder.compare(&folder.path("folder/top"), "../base", "qcow2");
}

#[test]
fn relative_names_below_a_json_name_start_at_the_file_in_it() {
    if !kit::qemu_is_here() {
        return;
    }
    let folder = ChainFolder::new();
    folder.set_backing("other/top", b"base", "qcow2");
    let json = r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"MID"}}"#;
    let name = json.replace("MID", &folder.text("other/top"));
    folder.set_backing("top", name.as_bytes(), "qcow2");
    folder.compare(&folder.path("top"), &name, "qcow2");
    assert_eq!(our_chain(&folder.path("top")).unwrap().len(), 3);
}

#[test]
fn data_file_names_lead_where_qemu_goes() {
    if !kit::qemu_is_here() {
        return;
    }
    let folder = ChainFolder::new();
    let opens = |path: &Path| {
        let output = Command::new("qemu-io").args(["-r", "-c", "read 0 512"]).arg(path).output().unwrap();
        // Its exit code is 1 too when a command inside fails.
        output.status.success()
    };
    fs::write(folder.path("data"), vec![0; 1 << 20]).unwrap();
    for name in [
        folder.text("data"),
        folder.text_from_here("data"),
        "data".to_owned(),
        format!("file:{}", folder.text("data")),
        format!(r#"json:{{"driver":"file","filename":"{}"}}"#, folder.text("data")),
    ] {
        let path = folder.path("with-data");
        let option = format!("data_file={}", folder.text("data"));
        qemu_img(&["create", "-q", "-f", "qcow2", "-o", &option, path.to_str().unwrap(), "1M"]);
        let mut bytes = fs::read(&path).unwrap();
        set_data_file(&mut bytes[..65536], name.as_bytes());
        fs::write(&path, bytes).unwrap();
        assert_eq!(opens(&path), our_chain(&path).is_ok(), "{name}");
        fs::remove_file(&path).unwrap();
    }
}

#[test]
fn a_new_backing_name_leads_qemu_to_the_base() {
    if !kit::qemu_is_here() {
        return;
    }
    let folder = ChainFolder::new();
    symlink("other", folder.path("folder")).unwrap();
    fs::create_dir_all(folder.path("deep/er")).unwrap();
    symlink("../deep/er", folder.path("other/far")).unwrap();
    fs::copy(folder.path("top"), folder.path("deep/er/top")).unwrap();
    let json = r#"json:{"file.filename":"/x"}"#;
    let mut relative = BTreeMap::new();
    for old in ["old", "/old", "file:old", json] {
        for top in ["top", "other/top", "folder/top", "other/far/top", "d:x/top", "other/../top"] {
            for base in ["base", "a:b", "json:{}", "other/base", "folder/base", "d:x/base", "other/../base"] {
                for paths in [ChainFolder::text, ChainFolder::text_from_here] {
                    let (overlay, base) =
                        (PathBuf::from(paths(&folder, top)), PathBuf::from(paths(&folder, base)));
                    let name = new_backing_name(&OsHost, old.as_bytes(), &overlay, &base).unwrap();
                    *relative.entry(old).or_insert(0) += u32::from(!name.starts_with(b"/"));
                    folder.set_backing(top, &name, "qcow2");
                    let chain = qemu_chain(&overlay).unwrap();
                    let (found, wanted) = (fs::metadata(&chain[1].0).unwrap(), fs::metadata(&base).unwrap());
                    assert_eq!(
                        (found.dev(), found.ino()),
                        (wanted.dev(), wanted.ino()),
                        "{overlay:?} {base:?}"
                    );
                    folder.compare(&overlay, &String::from_utf8_lossy(&name), "qcow2");
                }
            }
        }
    }
    // Relative where it was relative, always; absolute otherwise.
    assert_eq!(relative, BTreeMap::from([("old", 84), ("/old", 0), ("file:old", 0), (json, 0)]));
}

/// A loop device on a file, given back at the end.
struct LoopDevice(String);

impl LoopDevice {
    fn new(file: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--find", "--show"]).arg(file).output().ok()?;
        let name = String::from_utf8(output.stdout).ok()?.trim().to_owned();
        output.status.success().then_some(Self(name))
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

#[test]
fn block_devices_are_opened_where_qemu_opens_them() {
    if !kit::qemu_is_here() {
        return;
    }
    let folder = ChainFolder::new();
    let Some(device) = LoopDevice::new(&folder.path("base.raw")) else {
        kit::not_tried("no loop device (needs root), block devices were not compared");
        return;
    };
    let device = &device.0;
    let json = |driver: &str| {
        format!(r#"json:{{"driver":"raw","file":{{"driver":"{driver}","filename":"{device}"}}}}"#)
    };
    for name in [
        device.clone(),
        format!("host_device:{device}"),
        format!("file:{device}"),
        json("host_device"),
        json("file"),
    ] {
        folder.set_backing("top", name.as_bytes(), "raw");
        folder.compare(&folder.path("top"), &name, "raw");
    }
}

#[test]
fn what_qemu_opens_and_we_refuse() {
    if !kit::qemu_is_here() {
        return;
    }
    let folder = ChainFolder::new();
    let base = folder.text("base");
    for (name, format, reason) in [
        // Probing: QEMU takes whatever the first bytes of the file say.
        (base.clone(), "", "has no format"),
        (format!(r#"json:{{"file.filename":"{base}"}}"#), "", "has no format"),
        // The guest's first sector, or an image's header, taken for the other.
        (base.clone(), "raw", "own bytes say qcow2"),
        // Not a disk.
        ("/dev/zero".to_owned(), "raw", "not a regular file"),
        // Cut at the zero byte by one program, not by another.
        (format!("{base}\0/x"), "qcow2", "zero byte"),
        // Options that change what is read, or what lies below.
        (format!(r#"json:{{"driver":"raw","offset":512,"file.filename":"{base}"}}"#), "", "'offset'"),
    ] {
        folder.set_backing("top", name.as_bytes(), format);
        assert!(qemu_chain(&folder.path("top")).is_ok(), "{name:?} as {format}");
        let error = our_chain(&folder.path("top")).unwrap_err();
        assert!(error.contains(reason), "{name:?} as {format}: {error}");
    }
}

#[test]
fn what_qemu_refuses_for_other_reasons() {
    if !kit::qemu_is_here() {
        return;
    }
    let folder = ChainFolder::new();
    // A loop. QEMU compares names, so that it may go round until the name is too long.
    folder.set_backing("top", b"other/top", "qcow2");
    folder.set_backing("other/top", b"../top", "qcow2");
    assert!(qemu_chain(&folder.path("top")).is_err());
    assert!(our_chain(&folder.path("top")).unwrap_err().contains("loop"));
    // A declared format that the file is not.
    folder.set_backing("top", b"base.raw", "qcow2");
    folder.compare(&folder.path("top"), "base.raw", "qcow2");
    assert!(our_chain(&folder.path("top")).is_err());
    let given = OpenOptions::new(Policy::local_files())
        .with_backing_formats([(folder.path("base.raw"), ImageFormat::Raw)]);
    assert!(Chain::open(&OsHost, &folder.path("top"), &given).is_err());
}

//! What a merge says of domains whose definitions name its images. No libvirt is needed for that.

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use serde_json::Value;

use crate::support::{run, text};

/// A folder with a chain `base.qcow2 <- a.qcow2 <- b.qcow2 <- c.qcow2`, and one for definitions.
struct Lab(tempfile::TempDir);

impl Lab {
    fn new() -> Self {
        let lab = Self(tempfile::tempdir().unwrap());
        fs::create_dir(lab.path("xml")).unwrap();
        for (n, name) in ["base", "a", "b", "c"].iter().enumerate() {
            let mut create = Command::new("qemu-img");
            create.args(["create", "-q", "-f", "qcow2"]).current_dir(lab.0.path());
            if n > 0 {
                create.args(["-F", "qcow2", "-b", &format!("{}.qcow2", ["base", "a", "b"][n - 1])]);
            }
            run(create.args([&format!("{name}.qcow2"), "8M"]));
            let write = format!("write -q -P {} {n}M 2M", n + 1);
            run(Command::new("qemu-io")
                .args(["-f", "qcow2", "-c", &write])
                .arg(lab.path(&format!("{name}.qcow2"))));
        }
        lab
    }

    fn path(&self, name: &str) -> String {
        self.0.path().join(name).display().to_string()
    }

    /// A domain whose disk is the first of these images, with the others recorded.
    fn define(&self, name: &str, images: &[&str], live: bool) {
        let mut inner = "<backingStore/>".to_owned();
        for image in images[1..].iter().rev() {
            let file = self.path(image);
            inner = format!(
                "<backingStore type='file'><format type='qcow2'/><source file='{file}'/>{inner}</backingStore>"
            );
        }
        let disk = format!(
            "<disk type='file'><source file='{}'/>{inner}<target dev='vda'/></disk>",
            self.path(images[0])
        );
        let domain = format!("<domain type='kvm'><name>{name}</name><devices>{disk}</devices></domain>");
        let text = if live { format!("<domstatus>{domain}</domstatus>") } else { domain };
        let file = if live { format!("{name}.live.xml") } else { format!("{name}.xml") };
        fs::write(Path::new(&self.path("xml")).join(file), text).unwrap();
    }

    fn qmerge(&self, args: &[&str]) -> Output {
        let mut command = Command::new(env!("CARGO_BIN_EXE_qmerge"));
        command.args(args).current_dir(self.0.path()).env("QMERGE_LIBVIRT_DIR", self.path("xml"));
        command.output().unwrap()
    }

    #[track_caller]
    fn plan(&self, args: &[&str]) -> Value {
        let output = self.qmerge(&[&["commit"], args, &["--dry-run", "--json"]].concat());
        assert_eq!(output.status.code(), Some(0), "{}", text(&output.stderr));
        serde_json::from_str(text(&output.stdout).lines().next().unwrap()).unwrap()
    }
}

#[test]
fn the_plan_names_the_domains_and_what_they_boot_afterwards() {
    if !kit::are_here(&["qemu-img", "qemu-io"]) {
        return;
    }
    let lab = Lab::new();
    lab.define("vm1", &["c.qcow2", "b.qcow2", "a.qcow2", "base.qcow2"], false);
    lab.define("old", &["b.qcow2"], false);
    lab.define("stranger", &["d.qcow2"], false);
    fs::write(Path::new(&lab.path("xml")).join("broken.xml"), "<domain").unwrap();
    let said = text(&lab.qmerge(&["commit", "c.qcow2", "--dry-run"]).stdout);
    assert!(
        said.contains("the domain vm1 names c.qcow2 as vda, and records b.qcow2, a.qcow2, base.qcow2"),
        "{said}"
    );
    assert!(said.contains("the domain old names b.qcow2 as vda") && !said.contains("stranger"), "{said}");
    assert!(said.contains("it boots the right disk afterwards"), "{said}");
    assert!(said.contains("could not be read: ") && said.contains("broken.xml"), "{said}");

    let plan = lab.plan(&["c.qcow2"]);
    let domains = plan["libvirt"].as_array().unwrap();
    let of = |name: &str| domains.iter().find(|domain| domain["domain"] == name).unwrap();
    assert_eq!(
        (domains.len(), &of("vm1")["records"], &of("vm1")["afterwards"]),
        (2, &"chain".into(), &"right".into())
    );
    let roles: Vec<_> =
        of("vm1")["images"].as_array().unwrap().iter().map(|i| i["role"].as_str().unwrap()).collect();
    assert_eq!(roles, ["active", "merged", "merged", "base"]);
    assert_eq!(
        (&of("old")["afterwards"], &of("old")["files"][0]),
        (&"other-disk".into(), &lab.path("b.qcow2").into())
    );
    assert_eq!(plan["libvirt-unread"][0]["file"], lab.path("xml/broken.xml").as_str());

    // What is removed is missed by a domain that records it.
    for (args, missing) in [
        (&["c.qcow2", "--delete"][..], &["c.qcow2", "b.qcow2", "a.qcow2"][..]),
        (&["c.qcow2", "--top", "b.qcow2", "--delete"], &["b.qcow2", "a.qcow2"]),
    ] {
        let plan = lab.plan(args);
        let vm1 = plan["libvirt"].as_array().unwrap().iter().find(|d| d["domain"] == "vm1").unwrap().clone();
        assert_eq!(vm1["afterwards"], "missing-files", "{args:?}");
        let files: Vec<_> = missing.iter().map(|file| lab.path(file)).collect();
        assert_eq!(vm1["files"], Value::from(files), "{args:?}");
    }
    let said = text(&lab.qmerge(&["commit", "c.qcow2", "--delete", "--dry-run"]).stdout);
    assert!(
        said.contains("does not start until") && said.contains("virsh -c qemu:///system edit vm1"),
        "{said}"
    );

    // A domain that boots base alone sees the whole chain's data then.
    lab.define("vm1", &["base.qcow2"], false);
    let plan = lab.plan(&["c.qcow2"]);
    let vm1 = plan["libvirt"].as_array().unwrap().iter().find(|d| d["domain"] == "vm1").unwrap().clone();
    assert_eq!(vm1["afterwards"], "other-disk");
}

#[test]
fn an_image_in_use_is_told_with_its_domain() {
    if !kit::are_here(&["qemu-img", "qemu-io", "qemu-storage-daemon"]) {
        return;
    }
    let lab = Lab::new();
    let node = format!(
        r#"{{"driver":"qcow2","node-name":"n","file":{{"driver":"file","filename":"{}"}}}}"#,
        lab.path("c.qcow2")
    );
    let pid = lab.path("pid");
    run(Command::new("qemu-storage-daemon")
        .args(["--daemonize", "--pidfile", &pid, "--blockdev", &node])
        .args(["--nbd-server", &format!("addr.type=unix,addr.path={}", lab.path("nbd"))])
        .args(["--export", "type=nbd,id=e,node-name=n,writable=on"]));
    let process: i32 = fs::read_to_string(&pid).unwrap().trim().parse().unwrap();
    let chain = ["c.qcow2", "b.qcow2", "a.qcow2", "base.qcow2"];
    // A domain that is shut off holds nothing: somebody else does.
    lab.define("vm 1", &chain, false);
    let output = lab.qmerge(&["commit", "c.qcow2"]);
    let err = text(&output.stderr);
    assert!(output.status.code() == Some(5) && !err.contains("virsh"), "{err}");
    lab.define("vm 1", &chain, true);
    for (args, virsh) in [
        (
            &["commit", "c.qcow2"][..],
            "virsh -c qemu:///system blockcommit 'vm 1' vda --pivot --wait --verbose".to_owned(),
        ),
        (
            &["commit", "c.qcow2", "--base", "[2]", "--top", "[3]"],
            format!(
                "virsh -c qemu:///system blockcommit 'vm 1' vda --base {} --top {} --wait --verbose",
                lab.path("a.qcow2"),
                lab.path("b.qcow2")
            ),
        ),
        (
            &["commit", "c.qcow2", "--shallow", "--keep-active"],
            "virsh -c qemu:///system blockcommit 'vm 1' vda --shallow --keep-overlay --wait --verbose"
                .to_owned(),
        ),
    ] {
        let output = lab.qmerge(args);
        let err = text(&output.stderr);
        assert_eq!(output.status.code(), Some(5), "{err}");
        for word in [virsh.as_str(), "libvirt's domain 'vm 1'", "virsh -c qemu:///system shutdown 'vm 1'"] {
            assert!(err.contains(word), "'{word}' is missing: {err}");
        }
    }
    let process = rustix::process::Pid::from_raw(process).unwrap();
    rustix::process::kill_process(process, rustix::process::Signal::KILL).unwrap();
}

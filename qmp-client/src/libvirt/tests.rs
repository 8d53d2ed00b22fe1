//! Domains from files, and words for virsh.

use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};

use super::*;

/// As libvirt 9.0 writes it after two external snapshots.
fn definition(name: &str, chain: &[&str], ended: bool) -> String {
    let opened = chain
        .iter()
        .skip(1)
        .map(|file| format!("<backingStore type='file'><format type='qcow2'/><source file='{file}'/>"));
    let mut inner: String = opened.collect();
    inner.push_str(if ended { "<backingStore/>" } else { "" });
    inner.push_str(&"</backingStore>".repeat(chain.len() - 1));
    format!(
        "<!-- WARNING: THIS IS AN AUTO-GENERATED FILE. -->\n<domain type='qemu'><name>{name}</name><devices>\
         <disk type='file' device='disk'><driver name='qemu' type='qcow2'/><source file='{}'/>{inner}\
         <target dev='vda' bus='virtio'/></disk>\
         <disk type='file' device='cdrom'><target dev='sda' bus='sata'/><readonly/></disk>\
         </devices></domain>",
        chain[0]
    )
}

fn parse(text: &str) -> Result<Option<Domain>, String> {
    Domain::parse(text, Path::new("/etc/libvirt/qemu/vm.xml"), false, &|_| None)
}

#[test]
fn a_recorded_chain_is_read_down_to_its_end() {
    let files = |disk: &DomainDisk| -> Vec<String> {
        disk.images.iter().map(|image| image.as_ref().unwrap().display().to_string()).collect()
    };
    let chain = ["/vm/c.qcow2", "/vm/b&amp;.qcow2", "/vm/base.raw"];
    let domain = parse(&definition("vm1", &chain, true)).unwrap().unwrap();
    assert_eq!((domain.name.as_str(), domain.is_live, domain.disks.len()), ("vm1", false, 2));
    assert_eq!(files(&domain.disks[0]), ["/vm/c.qcow2", "/vm/b&.qcow2", "/vm/base.raw"]);
    assert_eq!((domain.disks[0].target.as_str(), domain.disks[0].recorded), ("vda", Recorded::Whole));
    assert_eq!(domain.disks[1].images, [None]);

    let part = parse(&definition("vm1", &chain, false)).unwrap().unwrap();
    assert_eq!(part.disks[0].recorded, Recorded::Part);
    let plain = parse(&definition("vm1", &chain[..1], false)).unwrap().unwrap();
    assert_eq!(plain.disks[0].recorded, Recorded::ActiveOnly);
}

#[test]
fn a_domain_that_runs_tells_its_aliases() {
    let disk = "<disk type='block'><source dev='/dev/vg/a'/><backingStore/><target dev='vdb'/><alias name='virtio-disk1'/></disk>";
    let text = format!(
        "<domstatus state='running'><domain><name>x</name><devices>{disk}</devices></domain></domstatus>"
    );
    let domain = parse(&text).unwrap().unwrap();
    assert!(domain.is_live);
    assert_eq!(domain.disks[0].alias.as_deref(), Some("virtio-disk1"));
    assert_eq!(domain.disks[0].images, [Some(PathBuf::from("/dev/vg/a"))]);
}

#[test]
fn files_about_something_else_and_hostile_ones_do_no_harm() {
    assert_eq!(parse("<network><name>default</name></network>"), Ok(None));
    assert_eq!(parse("<domstatus/>"), Ok(None));
    let bomb = "<!DOCTYPE d [<!ENTITY a 'aaaa'><!ENTITY b '&a;&a;&a;'>]><domain><name>&b;</name></domain>";
    let outside = "<!DOCTYPE d [<!ENTITY x SYSTEM 'file:///etc/passwd'>]><domain><name>&x;</name></domain>";
    for bad in ["", "<domain>", "<domain/>", "<domain><name/></domain>", bomb, outside, "\u{0}", "<a></b>"] {
        assert!(parse(bad).is_err(), "{bad}");
    }
    // As deep as the limits let it be, and far deeper.
    for depth in [999, 100_000] {
        let chain: Vec<String> = (0..depth).map(|n| format!("/vm/{n}")).collect();
        let chain: Vec<&str> = chain.iter().map(String::as_str).collect();
        match parse(&definition("deep", &chain, true)) {
            Ok(domain) => assert_eq!(domain.unwrap().disks[0].images.len(), depth),
            Err(_) => assert_eq!(depth, 100_000),
        }
    }
    let relative = definition("vm", &["c.qcow2"], true);
    assert_eq!(parse(&relative).unwrap().unwrap().disks[0].images, [None]);
}

#[test]
fn definitions_name_images_by_any_of_their_names() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for dir in ["qemu", "storage", "images"] {
        fs::create_dir(path(dir)).unwrap();
    }
    for image in ["base", "b", "c", "other"] {
        fs::write(path("images").join(image), "").unwrap();
    }
    symlink("images", path("link")).unwrap();
    let image = |name: &str| path("images").join(name).display().to_string();
    let by_link = path("link/c").display().to_string();
    let put = |name: &str, text: &str| fs::write(path("qemu").join(name), text).unwrap();
    put("a.xml", &definition("a", &[&by_link, &image("b"), &image("base")], true));
    put("b.xml", &definition("b", &[&image("other")], true));
    let volume = "<disk type='volume'><source pool='p' volume='base'/><target dev='vdc'/></disk>";
    put("c.xml", &format!("<domain><name>c</name><devices>{volume}</devices></domain>"));
    let pool = format!("<pool><target><path>{}</path></target></pool>", path("images").display());
    fs::write(path("storage/p.xml"), pool).unwrap();
    put("broken.xml", "<domain>");
    put("latin1.xml", "x");
    fs::write(path("qemu/latin1.xml"), b"<domain>\xe4</domain>").unwrap();
    put("not-xml.txt", "<domain>");
    fs::create_dir(path("qemu/networks")).unwrap();
    rustix::fs::mknodat(
        rustix::fs::CWD,
        path("qemu/pipe.xml"),
        rustix::fs::FileType::Fifo,
        rustix::fs::Mode::RUSR,
        0,
    )
    .unwrap();

    let definitions = Definitions::read(&Folders::of([path("qemu"), path("absent")]));
    let unread: Vec<_> =
        definitions.unread.iter().map(|(path, _)| path.file_name().unwrap().to_str().unwrap()).collect();
    assert_eq!(unread, ["broken.xml", "latin1.xml", "pipe.xml"]);
    let (c, base) = (path("images/c"), path("images/base"));
    let mentions = definitions.naming(&[&c, &base]);
    let told: Vec<_> = mentions
        .iter()
        .map(|m| {
            (m.domain.name.as_str(), m.disk.target.as_str(), m.named().collect::<Vec<_>>(), m.is_by_source())
        })
        .collect();
    assert_eq!(told, [("a", "vda", vec![0, 1], true), ("c", "vdc", vec![1], true)]);
    assert!(definitions.naming(&[&path("images/nothing")]).is_empty());
    let b = path("images/b");
    assert!(!definitions.naming(&[&b])[0].is_by_source());

    let after = |fates: [Fate; 2]| definitions.naming(&[&c, &base])[0].after(&fates);
    assert_eq!(after([Fate::Right, Fate::Changes]), After::Right);
    assert_eq!(after([Fate::Changes, Fate::Changes]), After::OtherDisk(by_link.clone().into()));
    assert_eq!(after([Fate::Right, Fate::Stale]), After::Stale(vec![image("base").into()]));
    assert_eq!(after([Fate::Removed, Fate::Stale]), After::Missing(vec![by_link.clone().into()]));

    // A domain that runs is told once.
    let live = definition("a", &[&image("c"), &image("base")], true);
    put("live.xml", &format!("<domstatus>{}</domstatus>", live.split_once('\n').unwrap().1));
    let definitions = Definitions::read(&Folders::of([path("qemu")]));
    let mentions = definitions.naming(&[&c]);
    assert_eq!(mentions.len(), 1);
    assert!(!mentions[0].domain.is_live && definitions.runs(mentions[0].domain));
    assert!(definitions.domain("a").unwrap().is_live && definitions.domain("z").is_none());
}

#[test]
fn a_folder_that_may_not_be_read_is_told() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let below = file.path().join("qemu");
    assert!(Definitions::read(&Folders::of([below])).unread.is_empty());
    let folder = tempfile::tempdir().unwrap();
    symlink("loop", folder.path().join("loop")).unwrap();
    assert_eq!(Definitions::read(&Folders::of([folder.path().join("loop")])).unread.len(), 1);
}

#[test]
fn the_domain_is_known_from_the_socket_and_from_the_command_line() {
    let of = |path: &str| domain_of_socket(Path::new(path)).map(|name| name.word());
    assert_eq!(of("/var/lib/libvirt/qemu/domain-7-vm1/monitor.sock").as_deref(), Some("vm1"));
    assert_eq!(of("/x/domain-12-my vm-2/monitor.sock").as_deref(), Some("my vm-2"));
    assert_eq!(of("/x/domain-3-a-name-that-is-cut-o/monitor.sock").as_deref(), Some("3"));
    for none in ["/run/vm1/qmp.sock", "/x/domain-vm1/monitor.sock", "monitor.sock", "/"] {
        assert_eq!(of(none), None, "{none}");
    }
    let of = |line: &str| domain_of_arguments(&line.split(' ').collect::<Vec<_>>());
    assert_eq!(of("kvm -name guest=vm1,debug-threads=on -S").as_deref(), Some("vm1"));
    assert_eq!(of("kvm -name debug-threads=on,guest=a,,b").as_deref(), Some("a,b"));
    assert_eq!(of("kvm -name vm,,1,process=x").as_deref(), Some("vm,1"));
    for none in ["kvm", "kvm -name", "kvm -name debug-threads=on", "kvm -name guest="] {
        assert_eq!(of(none), None, "{none}");
    }
}

#[test]
fn virsh_is_given_paths_and_only_the_disks_that_are_meant() {
    let virsh = Virsh::new(&DomainName::Name("my vm".into()), false);
    let wanted = BlockCommit {
        base: Some(Path::new("/vm/base.qcow2")),
        top: Some(Path::new("/vm/b c.qcow2")),
        bandwidth: Some(1 << 20),
        ..BlockCommit::default()
    };
    assert_eq!(
        virsh.block_commit("vda", &wanted).join("|"),
        "virsh|-c|qemu:///system|blockcommit|my vm|vda|--base|/vm/base.qcow2|--top|/vm/b c.qcow2|--bandwidth|1048576|--bytes|\
         --wait|--verbose"
    );
    let active = BlockCommit { end: Some("--pivot"), shallow: true, ..BlockCommit::default() };
    let session = Virsh::new(&DomainName::Id(3), true);
    assert_eq!(
        session.block_commit("sda", &active).join(" "),
        "virsh -c qemu:///session blockcommit 3 sda --shallow --pivot --wait --verbose"
    );
    assert_eq!(
        session.block_pull("sda", Some(Path::new("/a"))).join(" "),
        "virsh -c qemu:///session blockpull 3 sda --base /a --wait --verbose"
    );
    assert_eq!(
        session.snapshot(&[("vda", Path::new("/a,b"))], &["vdb", "vdc"]).join(" "),
        "virsh -c qemu:///session snapshot-create-as 3 --no-metadata --disk-only --atomic --diskspec vda,file=/a,,b \
         --diskspec vdb,snapshot=no --diskspec vdc,snapshot=no"
    );
}

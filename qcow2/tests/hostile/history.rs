//! Bugs that other engines had, as far as no other test here has them; `testdata/README.md` lists them all.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use qcow2::chain::{Chain, OpenOptions, Policy};
use qcow2::check::{CheckOptions, Verdict, check};
use qcow2::error::Error;
use qcow2::fuzzing::sample::{Content, Sample};
use qcow2::merge::{Commit, CommitOptions, Silent};
use qcow2::storage::{Access, Host, MemHost};

fn local() -> OpenOptions {
    OpenOptions::new(Policy::local_files())
}

/// QEMU read the L1 table of a snapshot into the buffer of the active one, which was smaller.
#[test]
fn cve_2014_0145_the_l1_table_of_a_snapshot_is_larger_than_that_of_the_disk() {
    let sample = Sample { snapshots: vec!["larger".into()], ..Sample::new(100) };
    let mut base = sample.with(0, Content::Data(1)).build();
    // A disk of 2 MiB then, with 64 tables of which all but the first are not there.
    base.put_u32(base.at.snapshots + 8, 64);
    base.put_u64(base.at.snapshots + 48, 2 << 20);
    let top = Sample::new(100).with(0, Content::Data(2)).over("base.qcow2", "qcow2").build();
    let host = MemHost::new();
    host.add("/vm/base.qcow2", &base.bytes).unwrap();
    host.add("/vm/top.qcow2", &top.bytes).unwrap();
    let options = CommitOptions::new(local());
    let never = AtomicBool::new(false);
    let commit =
        Commit::prepare(Arc::new(host.clone()), Path::new("/vm/top.qcow2"), &options, &never).unwrap();
    commit.execute(&Silent, &never).unwrap();
    let path = Path::new("/vm/base.qcow2");
    let file = host.open(path, Access::Read).unwrap();
    let report = check(path, &*file, None, &CheckOptions::default()).unwrap();
    assert_eq!(report.verdict(), Verdict::Clean, "{:?}", report.findings);
    let kept = base.at.hosts[&0] as usize;
    assert!(
        host.content(path).unwrap()[kept..kept + 512] == base.bytes[kept..kept + 512],
        "the snapshot's data"
    );
}

/// A VMDK descriptor is text that names other files; OpenStack handed their bytes to the guest.
#[test]
fn cve_2022_47951_a_vmdk_descriptor_leads_nowhere() {
    let descriptor = b"# Disk DescriptorFile\nversion=1\ncreateType=\"monolithicFlat\"\n\
                       RW 8 FLAT \"/etc/shadow\" 0\n";
    let host = MemHost::new();
    host.add("/etc/shadow", b"root").unwrap();
    host.add("/vm/disk.vmdk", &[&descriptor[..], &[0; 4000]].concat()).unwrap();
    let refused = Chain::open(&host, Path::new("/vm/disk.vmdk"), &local()).unwrap_err();
    assert!(matches!(refused, Error::Foreign { .. }), "{refused}");
    // An overlay may lie on it: then it is held, and neither it nor what it names is read.
    let overlay = Sample::new(8).over("disk.vmdk", "vmdk").build();
    host.add("/vm/overlay.qcow2", &overlay.bytes).unwrap();
    let chain = Chain::open(&host, Path::new("/vm/overlay.qcow2"), &local()).unwrap();
    let files: Vec<_> = chain.layers().iter().map(|layer| layer.path.clone()).collect();
    assert_eq!(files, [Path::new("/vm/disk.vmdk"), Path::new("/vm/overlay.qcow2")]);
}

//! The example does what it says.

#[path = "../examples/merge.rs"]
mod merge;

use qcow2::chain::{OpenOptions, Policy};
use qcow2::image::{CreateOptions, create};
use qcow2::merge::put;
use qcow2::storage::OsHost;
use qcow2::units::GuestOffset;

#[test]
fn a_chain_is_shown_read_and_merged() {
    let dir = tempfile::tempdir().unwrap();
    let (base, top) = (dir.path().join("base.qcow2"), dir.path().join("top.qcow2"));
    create(&OsHost, &base, &CreateOptions::new(1 << 20)).unwrap();
    let backing = Some((b"base.qcow2".to_vec(), "qcow2".to_owned()));
    let mut options = CreateOptions::new(1 << 20);
    options.backing = backing;
    create(&OsHost, &top, &options).unwrap();
    let open = OpenOptions::new(Policy::local_files());
    put(&OsHost, &base, &open, &[(GuestOffset::ZERO, vec![1; 200_000])]).unwrap();
    put(&OsHost, &top, &open, &[(GuestOffset::new(65536), vec![2; 65536])]).unwrap();
    let told = || {
        let mut out = Vec::new();
        merge::merge_chain(&top, 65530, &mut out).unwrap();
        String::from_utf8(out).unwrap()
    };
    let first = told();
    assert!(first.contains("[2] ") && first.contains("supplies 65536 bytes"), "{first}");
    assert!(first.contains("at 65530: [01, 01, 01, 01, 01, 01, 02, 02,"), "{first}");
    assert!(first.contains("65536 bytes were copied"), "{first}");
    let again = told();
    assert!(again.contains("nothing to do") && again.contains("01, 01, 02, 02,"), "{again}");
}

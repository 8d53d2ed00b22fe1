use super::*;
use crate::units::GuestOffset;

#[test]
fn what_cannot_be_read_is_told_with_the_range_that_the_guest_would_see() {
    let told = |in_data_file, guest| {
        let source = rustix::io::Errno::IO.into();
        Error::Unreadable { path: "a\n.qcow2".into(), in_data_file, guest, offset: 0x5000, source }
            .to_string()
    };
    let range = GuestRange { start: GuestOffset::new(0x10000), len: 0x200 };
    assert_eq!(
        told(false, Some(range)),
        r"a\n.qcow2: cannot read guest range 0x10000..0x10200 at offset 0x5000: Input/output error (os error 5)"
    );
    assert_eq!(
        told(true, None),
        r"a\n.qcow2: cannot read its data file at offset 0x5000: Input/output error (os error 5)"
    );
}

//! The oldest QEMU that is supported, 7.2. It ends, and the guest with it, when a client of an NBD export of a disk with an
//! iothread goes away.

use qmp_client::Execute;
use serde_json::json;

use crate::machine::{Machine, Style};
use crate::support::{oldest_is_here, qmerge, text, tools_are_here};

#[test]
fn whole_merges_under_qemu_7_2_with_an_iothread() {
    if !tools_are_here() || !oldest_is_here() {
        return;
    }
    for running in [true, false] {
        let machine = Machine::new(Style::Oldest);
        let status = |machine: &Machine| {
            machine.connect().query("query-status", json!({})).unwrap()["running"].clone()
        };
        let (major, minor, _) = machine.connect().version();
        assert_eq!((major, minor), (7, 2));
        if running {
            machine.connect().query("cont", json!({})).unwrap();
        }
        machine.guest_writes(40, "20M", "1M");
        let said = machine.ok("commit", &["--base", "[1]", "--top", "[2]"]);
        assert!(said.contains("merged into"), "{said}");
        assert_eq!(machine.chain(), ["c.img", "b.img", "base.img"]);
        machine.guest_writes(41, "21M", "1M");
        let snapshot = qmerge(machine.dir(), &["live", "snapshot", "vda=d.img", "--qmp", "qmp.sock"]);
        assert_eq!(snapshot.status.code(), Some(0), "{}", text(&snapshot.stderr));
        machine.guest_writes(42, "22M", "1M");
        machine.ok("pull", &["--base", "[2]"]);
        assert_eq!(machine.chain(), ["d.img", "b.img", "base.img"]);
        // A pull leaves the layers that it has taken in, and this one would be broken.
        std::fs::remove_file(machine.path("c.img")).unwrap();
        machine.ok("commit", &["--active", "--pivot"]);
        assert_eq!(machine.chain(), ["base.img"]);
        machine.guest_writes(43, "23M", "1M");
        assert_eq!(status(&machine), running, "the guest runs as it did before");
        machine.holds_the_disk("base.img");
    }
}

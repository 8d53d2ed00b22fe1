//! Merges upwards.

use serde_json::json;

use crate::machine::{Machine, Style};
use crate::support::tools_are_here;

#[test]
fn everything_is_pulled_and_the_layers_below_stay_what_they_were() {
    if !tools_are_here() {
        return;
    }
    for style in [Style::Daemon, Style::Drive, Style::Blockdev] {
        let machine = Machine::new(style);
        let before = machine.files();
        let said = machine.ok("pull", &[]);
        assert!(said.contains("c.img has no backing file any more"), "{said}");
        assert!(said.contains("not needed any more by this disk"), "{said}");
        assert_eq!(machine.chain(), ["c.img"], "{style:?}");
        let after = machine.files();
        for name in ["base.img", "a.img", "b.img"] {
            assert!(before[name] == after[name], "{name} was written");
        }
        assert!(!machine.has(".c.img.qmerge-live"));
        assert!(machine.ok("pull", &[]).contains("nothing to do"));
        machine.holds_the_disk("c.img");
    }
}

#[test]
fn a_part_is_pulled_in_two_calls() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Drive);
    machine.fails("pull", &["--base", "[9]"], 2, &["outside the chain", "qmerge live chain vda"]);
    machine.fails("pull", &["--backing-file", "x"], 2, &["--base"]);
    machine.ok("pull", &["--base", "[2]", "--async"]);
    let job = machine.job_becomes("pending");
    assert_eq!(
        (&job["merge"]["kind"], &job["merge"]["base"]),
        (&json!("pull"), &json!(machine.path("a.img")))
    );
    let last = machine.events("finish", &[]).pop().unwrap();
    assert_eq!((&last["kind"], &last["unneeded"]), (&json!("pull"), &json!([machine.path("b.img")])));
    assert_eq!(machine.chain(), ["c.img", "a.img", "base.img"]);
    assert!(machine.ok("pull", &["--base", "[2]"]).contains("nothing to do"));
    machine.holds_the_disk("c.img");
}

#[test]
fn a_pull_that_runs_out_of_time_changes_nothing_that_is_seen() {
    if !tools_are_here() {
        return;
    }
    let machine = Machine::new(Style::Daemon);
    let output = machine.live("pull", &["--bandwidth", "256K", "--timeout", "1"]);
    crate::support::failed(&output, 4, &["is as it was"]);
    assert!(!crate::support::text(&output.stderr).contains("restore points"));
    assert_eq!(machine.chain().len(), 4);
    machine.holds_the_disk("c.img");
}

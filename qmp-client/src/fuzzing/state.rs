//! The file that describes a merge under way.

use super::assert_short;
use crate::state::State;

/// Any text as a state file: refused in few words, or a state whose parts fit together, and which reads the same
/// when it is written again.
pub fn state(bytes: &[u8]) {
    let state = match State::parse(bytes) {
        Ok(state) => state,
        Err(why) => return assert_short(&why),
    };
    assert!(state.active().is_some() && state.target().is_some(), "a merge without layers");
    let (merged, left) = (state.merged().count(), state.left().count());
    assert!(merged > 0 && left > 0, "{merged} layers go and {left} stay");
    assert_eq!(merged + left, state.layers.len());
    assert!(state.layer(state.top).is_some(), "there is no top");
    assert!(!state.left().any(|kept| state.merged().any(|gone| gone.index == kept.index)));
    if let Some(rename) = &state.backing {
        assert!(state.left().any(|layer| layer.index == rename.index), "the switch changes what goes");
    }
    let text = match serde_json::to_vec_pretty(&state) {
        Ok(text) => text,
        Err(error) => unreachable!("what was read cannot be written: {error}"),
    };
    assert_eq!(State::parse(&text).as_ref(), Ok(&state), "what is written reads otherwise");
}

/// A file of each kind of merge, and a few that contradict themselves.
pub(super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    let layer = |index: usize| {
        format!(
            r#"{{"index": {index}, "node": "n{index}", "protocol-node": null, "file": "/vm/{index}.qcow2",
                "format": "qcow2", "virtual-size": 1073741824, "identity": null}}"#
        )
    };
    let file = |kind: &str, phase: &str, base: usize, top: usize, backing: &str| {
        let layers: Vec<_> = (1..=4).rev().map(layer).collect();
        format!(
            r#"{{"version": 1, "created-ns": 1, "changed-ns": 2, "boot": "b", "address": "/run/qmp.sock",
                "disk": "vda", "job": "merge.vda.{base}.{top}.0", "kind": "{kind}", "phase": "{phase}",
                "valid-top": "/vm/4.qcow2", "layers": [{}], "base": {base}, "top": {top}, "backing": {backing},
                "delete": false, "pivot": true, "keep-overlay": false, "nbd-socket": null,
                "throttled": {{"qdev": "/machine/peripheral/vda", "former": {{"bps": 0}}}}}}"#,
            layers.join(",")
        )
        .into_bytes()
    };
    let rename = |index: usize| {
        format!(
            r#"{{"overlay": "/vm/{index}.qcow2", "index": {index}, "old": "3.qcow2", "old-format": null, "new": "1.qcow2"}}"#
        )
    };
    vec![
        ("commit", file("commit", "copying", 1, 3, &rename(4))),
        ("active", file("active-commit", "switching", 1, 4, "null")),
        ("pull", file("pull", "switched", 0, 3, &rename(4))),
        ("top-below-base", file("commit", "copying", 3, 1, &rename(2))),
        ("wrong-overlay", file("commit", "copying", 1, 2, &rename(4))),
        ("beyond-the-chain", file("commit", "copying", 1, 9, &rename(10))),
    ]
}

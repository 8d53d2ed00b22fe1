//! The file that describes a merge under way.

use super::assert_short;
use crate::live::verdict::{Compared, Header, Leads, Seen, Treated, Verdict};
use crate::state::{Kind, Qemu, State, StateLayer};
use qcow2::stamp::{Stamp, Times};
use qcow2::storage::FileId;

/// Any text as a state file: refused in few words, or a state whose parts fit together, and which reads the same
/// when it is written again. Whatever is seen of such a merge, a verdict on it keeps to what was seen.
pub fn state(bytes: &[u8]) {
    let state = match State::parse(bytes) {
        Ok(state) => state,
        Err(why) => return assert_short(&why.to_string()),
    };
    assert!(state.active().is_some() && state.target().is_some(), "a merge without layers");
    let (merged, left) = (state.merged().count(), state.layers_after().count());
    assert!(merged > 0 && left > 0, "{merged} layers go and {left} stay");
    assert_eq!(merged + left, state.layers.len());
    assert!(state.layer(state.top).is_some(), "there is no top");
    assert!(!state.layers_after().any(|kept| state.merged().any(|gone| gone.index == kept.index)));
    if let Some(relink) = &state.backing {
        assert!(
            state.layers_after().any(|layer| layer.index == relink.index),
            "the switch changes what goes"
        );
    }
    let text = match serde_json::to_vec_pretty(&state) {
        Ok(text) => text,
        Err(error) => unreachable!("what was read cannot be written: {error}"),
    };
    assert_eq!(State::parse(&text).ok().as_ref(), Some(&state), "what is written reads otherwise");
    assert_judged(&state);
}

/// The merge is judged with files as they were, written since, other ones and gone; with each name in the header; and
/// with each thing that QEMU may show.
fn assert_judged(state: &State) {
    let as_they_were: Vec<_> = state.layers.iter().map(|layer| layer.stamp.clone()).collect();
    let changed = |change: fn(&Stamp) -> Stamp| -> Vec<_> {
        as_they_were.iter().map(|stamp| stamp.as_ref().map(change)).collect()
    };
    let written = changed(|stamp| {
        let times = Times { modified_ns: stamp.times.modified_ns.saturating_add(1), ..stamp.times };
        Stamp { times, ..stamp.clone() }
    });
    let others = changed(|stamp| {
        let id = FileId { inode: !stamp.id.inode, device: !stamp.id.device };
        Stamp { id, path: "/other".into(), ..stamp.clone() }
    });
    let gone = vec![None; state.layers.len()];
    let (old, new) = match &state.backing {
        Some(relink) => (Some(relink.old.clone()), relink.new.clone()),
        None => (None, None),
    };
    let header = |name: Option<String>| name.map_or(Header::Nothing, Header::Names);
    let switches = header(new);
    let headers = [Header::Unread, header(old), switches.clone()];
    let compared =
        [Compared::NotYet, Compared::Equal, Compared::Differs(9), Compared::InUse, Compared::Unsupported];
    // A name in the state may lead to what nobody may look at.
    let Ok(mut seen) = Seen::of(state, Qemu::Gone, Header::Unread) else { return };
    let as_seen = seen.clone();
    for stamps in [&as_they_were, &written, &others, &gone] {
        seen.stamps.clone_from(stamps);
        for header in &headers {
            seen.header.clone_from(header);
            for qemu in [Qemu::Gone, Qemu::ShowsBefore, Qemu::ShowsAfter, Qemu::ShowsNeither] {
                for (flags, compared) in (0..8).flat_map(|flags| compared.map(|compared| (flags, compared))) {
                    let [retired, closing_writes_base, same_boot] = [1, 2, 4].map(|flag| flags & flag != 0);
                    let begun = if closing_writes_base { Treated::Sealed } else { Treated::Emptied };
                    seen.treated.fill(if retired { begun } else { Treated::Not });
                    (seen.qemu, seen.compared) = (qemu, compared);
                    (seen.closing_writes_base, seen.same_boot) = (closing_writes_base, same_boot);
                    assert_verdict(state, &seen, &switches);
                }
            }
        }
    }
    let seen = Seen { stamps: as_they_were, ..as_seen };
    assert!(state.touched(&seen).is_empty(), "touched, and as it was");
    // A name that leads to a file is that file, whatever its letters are.
    for layer in &state.layers {
        let leads = Leads::To(layer.index);
        let seen = Seen { header: switches.clone(), leads, compared: Compared::Equal, ..seen.clone() };
        let verdict = state.judge(&seen);
        let is_switched = verdict == Verdict::Switched;
        assert!(
            state.kind == Kind::ActiveCommit
                || switches == Header::Nothing
                || layer.index == state.base
                || !is_switched,
            "switched, and the overlay leads to layer {}",
            layer.index
        );
    }
}

fn assert_verdict(state: &State, seen: &Seen, switches: &Header) {
    let verdict = state.judge(seen);
    let needed: Vec<usize> = match &verdict {
        Verdict::AtWork => unreachable!("QEMU has no job"),
        Verdict::InDoubt { doubt, likely } => {
            assert_eq!(likely, &state.valid_top);
            return assert_short(&doubt.to_string());
        }
        Verdict::Switched => state.layers_after().map(|layer| layer.index).collect(),
        Verdict::NotSwitched => state.layers.iter().map(|layer| layer.index).collect(),
        Verdict::RelinkBack { .. } => {
            assert!(matches!(seen.compared, Compared::Differs(_)), "relinked back without a difference");
            assert_ne!(state.kind, Kind::Pull, "a pull has no layer to relink to");
            state.layers.iter().map(|layer| layer.index).filter(|index| *index >= state.base).collect()
        }
        Verdict::Compare => {
            assert_eq!(seen.compared, Compared::NotYet, "asked to compare again");
            Vec::new()
        }
        Verdict::NotComparable => {
            assert!(matches!(seen.compared, Compared::InUse | Compared::Unsupported));
            Vec::new()
        }
    };
    let is_there = |(layer, now): (&StateLayer, &Option<Stamp>)| {
        let same = |before: &Stamp| {
            let is_it = |now: &Stamp| before.is_device || now.id.inode == before.id.inode;
            now.as_ref().is_some_and(is_it)
        };
        !needed.contains(&layer.index) || layer.stamp.as_ref().is_none_or(same)
    };
    assert!(state.layers.iter().zip(&seen.stamps).all(is_there), "a chain with a layer that is not there");
    if state.kind != Kind::ActiveCommit {
        let says_switched = seen.header == *switches;
        assert_eq!(verdict != Verdict::NotSwitched, says_switched, "not what the header says");
    }
}

/// A file of each kind of merge, and a few that contradict themselves.
pub(super) fn seeds() -> Vec<(&'static str, Vec<u8>)> {
    // All but the second layer are files here.
    let layer = |index: usize| {
        let id = format!(
            r#"{{"path": "/vm/{index}.qcow2", "device": 1, "inode": {index}, "is-device": false, "file-system": 3,
                "born-ns": 1, "size": 9, "modified-ns": {index}, "changed-ns": {index}, "head-crc": 7}}"#
        );
        let id = if index == 2 { "null" } else { &id };
        format!(
            r#"{{"index": {index}, "node": "n{index}", "protocol-node": null, "file": "/vm/{index}.qcow2",
                "format": "qcow2", "virtual-size": 1073741824, "data-file-stamp": null, "stamp": {id}}}"#
        )
    };
    let file = |kind: &str, phase: &str, base: usize, top: usize, backing: &str| {
        let layers: Vec<_> = (1..=4).rev().map(layer).collect();
        format!(
            r#"{{"version": 2, "created-ns": 1, "changed-ns": 2, "boot": "b", "address": "/run/qmp.sock",
                "disk": "vda", "job": "merge.vda.{base}.{top}.0", "kind": "{kind}", "phase": "{phase}",
                "valid-top": "/vm/4.qcow2", "layers": [{}], "base": {base}, "top": {top}, "backing": {backing},
                "delete": false, "pivot": true, "keep-overlay": false, "nbd-socket": null,
                "throttled": {{"qdev": "/machine/peripheral/vda", "former": {{"bps": 0}}}}}}"#,
            layers.join(",")
        )
        .into_bytes()
    };
    let relink = |index: usize| {
        format!(
            r#"{{"overlay": "/vm/{index}.qcow2", "index": {index}, "old": "3.qcow2", "old-format": null, "new": "1.qcow2"}}"#
        )
    };
    vec![
        ("commit", file("commit", "copying", 1, 3, &relink(4))),
        ("active", file("active-commit", "switching", 1, 4, "null")),
        ("pull", file("pull", "switched", 0, 3, &relink(4))),
        ("top-below-base", file("commit", "copying", 3, 1, &relink(2))),
        ("wrong-overlay", file("commit", "copying", 1, 2, &relink(4))),
        ("beyond-the-chain", file("commit", "copying", 1, 9, &relink(10))),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Seeds that are all refused would try the reading of files only.
    #[test]
    fn a_file_of_each_kind_of_merge_is_a_seed() {
        let kinds: Vec<_> =
            seeds().iter().filter_map(|(_, text)| Some(State::parse(text).ok()?.kind)).collect();
        assert_eq!(kinds, [Kind::Commit, Kind::ActiveCommit, Kind::Pull]);
    }
}

//! Every phase of every kind of merge, with everything that can be seen afterwards.

use super::tests::state;
use super::verdict::{Header, Qemu, Seen, Verdict};
use super::*;
use qapi::qmp::JobStatus;

const PENDING: u64 = 1_000_000_000;
/// When QEMU was seen to be gone.
const GONE: u64 = PENDING + 1_000_000_000;
const QEMUS: [Qemu; 4] = [Qemu::Gone, Qemu::ShowsBefore, Qemu::ShowsAfter, Qemu::ShowsNeither];

fn identity(inode: u64, modified_ns: u64) -> FileIdentity {
    FileIdentity { device: 1, inode, size: 1 << 20, modified_ns }
}

fn merge(kind: Kind, phase: Phase) -> State {
    let mut state = state("/vm");
    (state.kind, state.phase) = (kind, phase);
    for layer in &mut state.layers {
        layer.identity = Some(identity(layer.index as u64, PENDING));
    }
    match kind {
        Kind::Commit => {}
        Kind::ActiveCommit => (state.top, state.backing) = (4, None),
        Kind::Pull => (state.base, state.top) = (1, 3),
    }
    state.changed_ns = PENDING;
    state.valid_top = if phase == Phase::Copying { state.top_before() } else { state.top_after() };
    state.check().unwrap();
    state
}

fn seen(state: &State, qemu: Qemu, header: Header) -> Seen {
    let identities = state.layers.iter().map(|layer| layer.identity).collect();
    Seen { qemu, header, identities, retired: false, closing_writes_base: false, same_boot: true }
}

fn names(name: &str) -> Header {
    Header::Names(name.into())
}

fn is_doubt(verdict: &Verdict, words: &str) -> bool {
    matches!(verdict, Verdict::InDoubt { why, .. } if why.contains(words))
}

#[test]
fn a_job_that_is_there_is_gone_on_with() {
    for kind in [Kind::Commit, Kind::ActiveCommit, Kind::Pull] {
        for phase in [Phase::Copying, Phase::Switching, Phase::Switched] {
            let state = merge(kind, phase);
            for status in [JobStatus::running, JobStatus::pending, JobStatus::concluded] {
                let seen = seen(&state, Qemu::HasJob(status), Header::Unread);
                assert_eq!(state.judge(&seen), Verdict::AtWork);
            }
        }
    }
}

#[test]
fn a_header_tells_whether_an_intermediate_merge_or_a_pull_is_switched() {
    for kind in [Kind::Commit, Kind::Pull] {
        for phase in [Phase::Copying, Phase::Switching, Phase::Switched] {
            for qemu in QEMUS {
                let state = merge(kind, phase);
                let judge = |header| state.judge(&seen(&state, qemu, header));
                let (old, new) = (judge(names("3.img")), judge(names("1.img")));
                let case = format!("{kind:?} {phase:?} {qemu:?}: {old:?} {new:?}");
                match (phase, qemu) {
                    (Phase::Copying | Phase::Switching, Qemu::ShowsAfter) => {
                        assert!(is_doubt(&old, "QEMU shows"), "{case}")
                    }
                    (Phase::Switched, Qemu::ShowsAfter) => assert!(is_doubt(&old, "QEMU shows"), "{case}"),
                    (Phase::Switched, _) => assert!(is_doubt(&old, "names again"), "{case}"),
                    _ => assert_eq!(old, Verdict::NotSwitched, "{case}"),
                }
                match (phase, qemu) {
                    (_, Qemu::ShowsBefore) => assert!(is_doubt(&new, "QEMU shows"), "{case}"),
                    (Phase::Copying, Qemu::Gone | Qemu::ShowsNeither) => {
                        assert!(is_doubt(&new, "another client"), "{case}");
                    }
                    _ => assert_eq!(new, Verdict::Switched, "{case}"),
                }
                assert!(is_doubt(&judge(Header::Unread), "cannot be read"));
                assert!(is_doubt(&judge(Header::Nothing), "no backing file"));
                assert!(is_doubt(&judge(names("5.img")), "'5.img'"));
            }
        }
    }
}

#[test]
fn a_pull_of_everything_leaves_a_header_that_names_nothing() {
    let mut state = merge(Kind::Pull, Phase::Switching);
    state.base = 0;
    state.backing.as_mut().unwrap().new = None;
    state.check().unwrap();
    assert_eq!(state.judge(&seen(&state, Qemu::Gone, Header::Nothing)), Verdict::Switched);
    assert_eq!(state.judge(&seen(&state, Qemu::Gone, names("3.img"))), Verdict::NotSwitched);
    assert!(is_doubt(&state.judge(&seen(&state, Qemu::Gone, Header::Unread)), "cannot be read"));
}

#[test]
fn before_the_switch_nothing_that_was_written_matters() {
    let state = merge(Kind::ActiveCommit, Phase::Copying);
    for qemu in QEMUS {
        let mut seen = seen(&state, qemu, Header::Unread);
        for written in [[0, 0], [0, 9], [9, 0], [9, 9]] {
            seen.identities[0] = Some(identity(4, PENDING + written[0]));
            seen.identities[3] = Some(identity(1, PENDING + written[1]));
            if qemu == Qemu::ShowsAfter {
                // Another client has pivoted, or somebody has started base.
                assert!(is_doubt(&state.judge(&seen), "no pivot is noted"), "{written:?}");
            } else {
                assert_eq!(state.judge(&seen), Verdict::NotSwitched, "{qemu:?} {written:?}");
            }
        }
    }
}

#[test]
fn at_the_pivot_the_file_that_was_written_tells_where_the_guest_went() {
    let late = PENDING + 10_000_000_000;
    let soon = PENDING + 1_000;
    let doubt = "cannot be seen";
    type Expected = std::result::Result<Verdict, &'static str>;
    let switched = || -> Expected { Ok(Verdict::Switched) };
    // Base, the old active layer, whether the host ran on, and what is true.
    let table: [(u64, u64, bool, Expected); 18] = [
        (PENDING, PENDING, true, switched()),
        (PENDING, PENDING, false, switched()),
        (late, PENDING, true, switched()),
        (late, PENDING, false, switched()),
        (late, soon, true, Err(doubt)),
        (late, soon, false, Err(doubt)),
        (PENDING, late, true, Ok(Verdict::NotSwitched)),
        (PENDING, late, false, Err(doubt)),
        // Both: QEMU closed the old one, or somebody opened it again, or the guest went on there.
        (soon, soon, true, switched()),
        (GONE, GONE, true, switched()),
        (soon, soon, false, Err(doubt)),
        (soon, GONE + 1, true, Err(doubt)),
        (GONE + 1, soon, true, Err(doubt)),
        (soon, late, true, Err(doubt)),
        // A block device keeps no time.
        (0, PENDING, true, switched()),
        (0, late, true, Err(doubt)),
        (late, 0, true, Err(doubt)),
        (0, 0, true, Err(doubt)),
    ];
    for (base, active, same_boot, expected) in table {
        let mut state = merge(Kind::ActiveCommit, Phase::Switching);
        state.gone_ns = Some(GONE);
        let now =
            |inode, time| FileIdentity { size: if time == 0 { 0 } else { 1 << 20 }, ..identity(inode, time) };
        let mut seen = seen(&state, Qemu::Gone, Header::Unread);
        (seen.identities[0], seen.identities[3]) = (Some(now(4, active)), Some(now(1, base)));
        seen.same_boot = same_boot;
        for (layer, time) in [(0, active), (3, base)] {
            if time == 0 {
                state.layers[layer].identity = seen.identities[layer];
            }
        }
        for qemu in [Qemu::Gone, Qemu::ShowsNeither, Qemu::ShowsAfter] {
            seen.qemu = qemu;
            let verdict = state.judge(&seen);
            match &expected {
                // It runs on base, so it cannot be said that the guest never came there.
                Ok(Verdict::NotSwitched) if qemu == Qemu::ShowsAfter => assert!(is_doubt(&verdict, doubt)),
                Ok(expected) => assert_eq!(&verdict, expected, "{base} {active} {same_boot}"),
                Err(words) => {
                    assert!(is_doubt(&verdict, words), "{base} {active} {same_boot}: {verdict:?}");
                    assert!(matches!(verdict, Verdict::InDoubt { likely, .. } if likely == "/vm/1.img"));
                }
            }
        }
        // A write to base tells nothing where closing it makes one.
        seen.closing_writes_base = true;
        if base != PENDING && active != PENDING {
            assert!(is_doubt(&state.judge(&seen), doubt), "{base} {active} {same_boot}");
        }
        seen.closing_writes_base = false;
        // Nor where nobody saw QEMU go: the guest may have stayed, and somebody else have started base.
        state.gone_ns = None;
        if base != PENDING && active != PENDING {
            assert!(is_doubt(&state.judge(&seen), doubt), "{base} {active} {same_boot}");
        }
        seen.retired = true;
        assert_eq!(state.judge(&seen), Verdict::Switched);
    }
}

#[test]
fn a_qemu_that_runs_and_the_files_must_agree() {
    for (phase, base, qemu, expected) in [
        (Phase::Switching, PENDING, Qemu::ShowsBefore, Some(Verdict::NotSwitched)),
        (Phase::Switching, PENDING + 9, Qemu::ShowsBefore, None),
        (Phase::Switching, PENDING, Qemu::ShowsAfter, Some(Verdict::Switched)),
        (Phase::Switched, PENDING, Qemu::ShowsBefore, None),
        (Phase::Switched, PENDING + 9, Qemu::ShowsAfter, Some(Verdict::Switched)),
        (Phase::Switched, PENDING + 9, Qemu::Gone, Some(Verdict::Switched)),
    ] {
        let state = merge(Kind::ActiveCommit, phase);
        let mut seen = seen(&state, qemu, Header::Unread);
        seen.identities[3] = Some(identity(1, base));
        let verdict = state.judge(&seen);
        match expected {
            Some(expected) => assert_eq!(verdict, expected, "{phase:?} {qemu:?}"),
            None => {
                assert!(is_doubt(&verdict, "runs on the old active image"), "{phase:?} {qemu:?}: {verdict:?}")
            }
        }
    }
}

#[test]
fn an_old_active_image_that_was_used_after_the_pivot_is_a_doubt_unless_it_was_retired() {
    let state = merge(Kind::ActiveCommit, Phase::Switched);
    let mut seen = seen(&state, Qemu::Gone, Header::Unread);
    seen.identities[0] = Some(identity(4, PENDING + 9));
    assert!(is_doubt(&state.judge(&seen), "written after the pivot"));
    assert_eq!(state.touched(&seen), [4]);
    // Somebody has started base again, too.
    seen.qemu = Qemu::ShowsAfter;
    seen.identities[3] = Some(identity(1, PENDING + 99));
    assert!(is_doubt(&state.judge(&seen), "written after the pivot"));
    seen.retired = true;
    assert_eq!(state.judge(&seen), Verdict::Switched);
}

/// A block device, or an image whose bytes are in another file.
#[test]
fn an_old_active_image_that_keeps_no_time_is_a_doubt_after_the_pivot() {
    let state = merge(Kind::ActiveCommit, Phase::Switched);
    for qemu in [Qemu::Gone, Qemu::ShowsNeither, Qemu::ShowsAfter] {
        let mut seen = seen(&state, qemu, Header::Unread);
        assert_eq!(state.judge(&seen), Verdict::Switched);
        seen.tells_no_time(&state, 4);
        assert!(is_doubt(&state.judge(&seen), "cannot be seen"), "{qemu:?}");
        seen.identities[0] = None;
        assert_eq!(state.judge(&seen), Verdict::Switched);
    }
}

#[test]
fn a_file_that_is_needed_and_gone_or_replaced_is_a_doubt() {
    for (place, name) in [(0, "4.img"), (1, "3.img"), (3, "1.img")] {
        let state = merge(Kind::Commit, Phase::Switching);
        for now in [None, Some(identity(77, PENDING))] {
            let judge = |header, same_boot| {
                let mut seen = seen(&state, Qemu::Gone, header);
                seen.identities[place] = now;
                seen.same_boot = same_boot;
                assert_eq!(state.touched(&seen), [4 - place]);
                state.judge(&seen)
            };
            for same_boot in [true, false] {
                assert!(is_doubt(&judge(names("3.img"), same_boot), name));
                // What was merged is not needed once it is switched.
                let switched = judge(names("1.img"), same_boot);
                if place == 1 {
                    assert_eq!(switched, Verdict::Switched);
                } else {
                    assert!(is_doubt(&switched, name), "{switched:?}");
                }
            }
        }
    }
}

#[test]
fn a_file_system_may_have_another_number_after_a_start_of_the_host() {
    let state = merge(Kind::Commit, Phase::Switching);
    let mut seen = seen(&state, Qemu::Gone, names("1.img"));
    for identity in seen.identities.iter_mut().flatten() {
        identity.device = 2;
    }
    assert!(is_doubt(&state.judge(&seen), "another file"));
    seen.same_boot = false;
    assert_eq!(state.judge(&seen), Verdict::Switched);
    assert_eq!(state.touched(&seen), [0; 0]);
}

#[test]
fn layers_that_nobody_should_have_written_are_told() {
    use Kind::{ActiveCommit, Commit, Pull};
    use Phase::{Copying, Switched, Switching};
    for (kind, phase, expected) in [
        (Commit, Copying, &[3, 2][..]),
        (Commit, Switching, &[3, 2]),
        (Commit, Switched, &[3, 2, 1]),
        (ActiveCommit, Copying, &[3, 2]),
        (ActiveCommit, Switching, &[3, 2]),
        (ActiveCommit, Switched, &[4, 3, 2]),
        (Pull, Copying, &[3, 2, 1]),
        (Pull, Switched, &[3, 2, 1]),
    ] {
        let mut state = merge(kind, phase);
        let mut seen = seen(&state, Qemu::Gone, Header::Unread);
        assert_eq!(state.touched(&seen), [0; 0]);
        for (place, identity) in seen.identities.iter_mut().flatten().enumerate() {
            identity.modified_ns += 1 + place as u64;
        }
        assert_eq!(state.touched(&seen), expected, "{kind:?} {phase:?}");
        // What was no file here is not looked at.
        state.layers.iter_mut().for_each(|layer| layer.identity = None);
        assert_eq!(state.touched(&seen), [0; 0]);
    }
}

//! Every phase of every kind of merge, with everything that can be seen afterwards.

use qapi::qmp::JobStatus;
use qcow2::stamp::Times;
use qcow2::storage::FileId;

use super::*;
use crate::state::tests::state;

const PENDING: u64 = 1_000_000_000;
/// When QEMU was seen to be gone.
const GONE: u64 = PENDING + 1_000_000_000;
const QEMUS: [Qemu; 4] = [Qemu::Gone, Qemu::ShowsBefore, Qemu::ShowsAfter, Qemu::ShowsNeither];

fn stamp(inode: u64, written_ns: u64) -> Stamp {
    Stamp {
        path: format!("/vm/{inode}.img").into(),
        id: FileId { device: 1, inode },
        is_device: false,
        file_system: None,
        born_ns: None,
        times: times(written_ns, written_ns),
        head_crc: 7,
    }
}

fn times(modified_ns: u64, changed_ns: u64) -> Times {
    Times { len: 1 << 20, modified_ns: modified_ns.into(), changed_ns: changed_ns.into() }
}

fn merge(kind: Kind, phase: Phase) -> State {
    let mut state = state("/vm");
    (state.kind, state.phase) = (kind, phase);
    for layer in &mut state.layers {
        layer.stamp = Some(stamp(layer.index as u64, PENDING));
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
    Seen {
        qemu,
        header,
        leads: Leads::Nowhere,
        stamps: state.layers.iter().map(|layer| layer.stamp.clone()).collect(),
        timeless: vec![false; state.layers.len()],
        treated: vec![Treated::Not; state.layers.len()],
        closing_writes_base: false,
        same_boot: true,
        compared: Compared::Equal,
        never_copied: false,
    }
}

fn names(name: &str) -> Header {
    Header::Names(name.into())
}

fn is_doubt(verdict: &Verdict, words: &str) -> bool {
    matches!(verdict, Verdict::InDoubt { doubt, .. } if doubt.to_string().contains(words))
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
                match qemu {
                    Qemu::ShowsAfter => assert!(is_doubt(&old, "QEMU shows"), "{case}"),
                    _ => assert_eq!(old, Verdict::NotSwitched, "{case}"),
                }
                match (kind, phase, qemu) {
                    (_, _, Qemu::ShowsBefore) => assert!(is_doubt(&new, "QEMU shows"), "{case}"),
                    // Base can be compared with what a commit has merged; a pull leaves nothing to compare.
                    (Kind::Pull, Phase::Copying, Qemu::Gone | Qemu::ShowsNeither) => {
                        assert!(is_doubt(&new, "another client"), "{case}");
                    }
                    _ => assert_eq!(new, Verdict::Switched, "{case}"),
                }
                assert!(is_doubt(&judge(Header::Unread), "cannot be read"));
                assert!(is_doubt(&judge(Header::Nothing), "has nothing as its backing file"));
                assert!(is_doubt(&judge(names("5.img")), "has 5.img as its backing file"));
            }
        }
    }
}

/// Where a name leads counts, not how it is spelt.
#[test]
fn a_name_is_followed_where_it_leads_to_a_file() {
    for kind in [Kind::Commit, Kind::Pull] {
        let state = merge(kind, Phase::Switching);
        let judge = |name, leads| state.judge(&Seen { leads, ..seen(&state, Qemu::Gone, names(name)) });
        assert_eq!(judge("/other/3.img", Leads::To(3)), Verdict::NotSwitched);
        assert_eq!(judge("/other/1.img", Leads::To(1)), Verdict::Switched);
        for leads in [Leads::Elsewhere, Leads::To(2), Leads::To(4)] {
            for name in ["1.img", "3.img"] {
                assert!(is_doubt(&judge(name, leads), "neither top nor base"), "{leads:?}");
            }
        }
    }
}

/// Somebody has given the overlay its old backing file back, as the report of a doubt says. Layers that were written since do
/// not hold the disk any more.
#[test]
fn a_switched_overlay_that_names_top_again_is_on_the_old_chain_if_that_is_whole() {
    let state = merge(Kind::Commit, Phase::Switched);
    let mut seen = seen(&state, Qemu::Gone, names("3.img"));
    assert_eq!(state.judge(&seen), Verdict::NotSwitched);
    seen.stamps[1] = Some(stamp(3, PENDING + 9));
    assert!(is_doubt(&state.judge(&seen), "names again"));
}

#[test]
fn a_base_is_compared_before_it_is_trusted() {
    for phase in [Phase::Copying, Phase::Switching, Phase::Switched] {
        let state = merge(Kind::Commit, phase);
        let judge = |compared, base: u64| {
            let mut seen = Seen { compared, ..seen(&state, Qemu::Gone, names("1.img")) };
            seen.stamps[3] = Some(stamp(1, PENDING + base));
            state.judge(&seen)
        };
        for base in [0, 9] {
            assert_eq!(judge(Compared::NotYet, base), Verdict::Compare);
            assert_eq!(judge(Compared::Equal, base), Verdict::Switched);
            assert_eq!(judge(Compared::Unsupported, base), Verdict::NotComparable);
            let in_use = judge(Compared::InUse, base);
            let expected = if phase == Phase::Switched { Verdict::Switched } else { Verdict::NotComparable };
            assert_eq!(in_use, expected, "{phase:?}");
            let differs = judge(Compared::Differs(7), base);
            if phase == Phase::Switched && base > 0 {
                // Somebody may have written there what is wanted.
                assert!(is_doubt(&differs, "byte 7"), "{differs:?}");
            } else {
                assert_eq!(differs, Verdict::RelinkBack { at: 7 }, "{phase:?}");
            }
        }
    }
}

#[test]
fn merged_layers_must_be_what_was_merged_before_an_overlay_goes_back_to_them() {
    let state = merge(Kind::Commit, Phase::Switching);
    let differs = |change: &dyn Fn(&mut Seen)| {
        let mut seen = Seen { compared: Compared::Differs(7), ..seen(&state, Qemu::Gone, names("1.img")) };
        change(&mut seen);
        state.judge(&seen)
    };
    assert_eq!(differs(&|_| {}), Verdict::RelinkBack { at: 7 });
    let written = differs(&|seen| seen.stamps[1] = Some(stamp(3, PENDING + 9)));
    assert!(is_doubt(&written, "3.img was merged"), "{written:?}");
    let timeless = differs(&|seen| seen.tells_no_time(&state, 2));
    assert!(is_doubt(&timeless, "byte 7"), "{timeless:?}");
    let gone = differs(&|seen| seen.stamps[2] = None);
    assert!(is_doubt(&gone, "merged layers are gone"), "{gone:?}");
    // A clean-up begins only when base is known to be whole.
    for treated in [Treated::Marked, Treated::Emptied, Treated::Sealed] {
        let begun = differs(&|seen| {
            (seen.treated[1], seen.stamps[1]) = (treated, Some(stamp(3, PENDING + 9)));
        });
        assert_eq!(begun, Verdict::Switched, "{treated:?}");
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
fn before_the_switch_nothing_that_was_written_matters_where_base_has_everything() {
    let state = merge(Kind::ActiveCommit, Phase::Copying);
    for qemu in QEMUS {
        let mut seen = seen(&state, qemu, Header::Unread);
        for written in [[0, 0], [0, 9], [9, 0], [9, 9]] {
            seen.stamps[0] = Some(stamp(4, PENDING + written[0]));
            seen.stamps[3] = Some(stamp(1, PENDING + written[1]));
            if qemu == Qemu::ShowsAfter {
                // Another client has pivoted, or somebody has started base.
                assert!(is_doubt(&state.judge(&seen), "no pivot is noted"), "{written:?}");
            } else {
                assert_eq!(state.judge(&seen), Verdict::NotSwitched, "{qemu:?} {written:?}");
            }
        }
    }
}

/// Another client may have pivoted with QEMU's own commands: then base alone has what the guest wrote last.
#[test]
fn a_base_that_differs_and_may_have_been_the_disk_is_a_doubt_though_no_pivot_is_noted() {
    for qemu in [Qemu::Gone, Qemu::ShowsNeither] {
        for (base, gone, same_boot, never_copied, proved) in [
            (9, None, true, false, false),
            (9, None, true, true, true),
            (9, None, false, true, true),
            (9, Some(9), true, false, true),
            (9, Some(9), false, false, false),
            (9, Some(8), true, false, false),
            (0, None, true, false, true),
            // A power cut may have lost the time.
            (0, None, false, false, false),
        ] {
            let mut state = merge(Kind::ActiveCommit, Phase::Copying);
            state.gone_ns = gone.map(|gone| PENDING + gone);
            let judge = |compared| {
                let mut seen =
                    Seen { compared, same_boot, never_copied, ..seen(&state, qemu, Header::Unread) };
                seen.stamps[3] = Some(stamp(1, PENDING + base));
                state.judge(&seen)
            };
            let (case, differs) = ((base, gone, same_boot, never_copied), judge(Compared::Differs(7)));
            match proved {
                true => assert_eq!(differs, Verdict::NotSwitched, "{case:?}"),
                false => assert!(is_doubt(&differs, "another client has pivoted"), "{case:?}: {differs:?}"),
            }
            let by_times = proved && !never_copied;
            let not_yet = if by_times { Verdict::NotSwitched } else { Verdict::Compare };
            assert_eq!(judge(Compared::NotYet), not_yet, "{case:?}");
            assert_eq!(judge(Compared::Equal), Verdict::NotSwitched, "{case:?}");
        }
    }
}

/// What the times of base and of the old active image tell, and what a comparison adds.
#[test]
fn at_the_pivot_the_file_that_was_written_tells_where_the_guest_went() {
    let late = PENDING + 10_000_000_000;
    let soon = PENDING + 1_000;
    /// Why it is switched, or not.
    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Is {
        /// The times tell that the guest went on with base.
        Switched,
        /// They tell that it stayed.
        NotSwitched,
        /// Only a comparison tells whether base has everything.
        Compared,
    }
    // Base, the old active layer, whether the host ran on, and what is true.
    let table: [(u64, u64, bool, Is); 18] = [
        (PENDING, PENDING, true, Is::Compared),
        (PENDING, PENDING, false, Is::Compared),
        (late, PENDING, true, Is::Switched),
        (late, PENDING, false, Is::Switched),
        (late, soon, true, Is::Compared),
        (late, soon, false, Is::Compared),
        (PENDING, late, true, Is::NotSwitched),
        (PENDING, late, false, Is::Compared),
        // Both: QEMU closed the old one, or somebody opened it again, or the guest went on there.
        (soon, soon, true, Is::Switched),
        (GONE, GONE, true, Is::Switched),
        (soon, soon, false, Is::Compared),
        (soon, GONE + 1, true, Is::Compared),
        (GONE + 1, soon, true, Is::Compared),
        (soon, late, true, Is::Compared),
        // A block device keeps no time.
        (0, PENDING, true, Is::Switched),
        (0, late, true, Is::Compared),
        (late, 0, true, Is::Compared),
        (0, 0, true, Is::Compared),
    ];
    for (base, active, same_boot, expected) in table {
        let mut state = merge(Kind::ActiveCommit, Phase::Switching);
        state.gone_ns = Some(GONE);
        let now = |inode, time| Stamp { is_device: time == 0, ..stamp(inode, time) };
        let mut seen = seen(&state, Qemu::Gone, Header::Unread);
        (seen.stamps[0], seen.stamps[3]) = (Some(now(4, active)), Some(now(1, base)));
        seen.same_boot = same_boot;
        for (layer, time) in [(0, active), (3, base)] {
            if time == 0 {
                state.layers[layer].stamp = seen.stamps[layer].clone();
            }
        }
        let assert_is = |state: &State, seen: &mut Seen, is: Is| {
            let case = format!("{base} {active} {same_boot} {:?} {is:?}", seen.qemu);
            for compared in [Compared::NotYet, Compared::Equal, Compared::Differs(9)] {
                seen.compared = compared;
                let verdict = state.judge(seen);
                match (is, compared) {
                    (Is::Switched, _) | (Is::Compared, Compared::Equal) => {
                        assert_eq!(verdict, Verdict::Switched, "{case}");
                    }
                    (Is::NotSwitched, _) => assert_eq!(verdict, Verdict::NotSwitched, "{case}"),
                    (Is::Compared, Compared::NotYet) => assert_eq!(verdict, Verdict::Compare, "{case}"),
                    (Is::Compared, _) => {
                        assert!(is_doubt(&verdict, "bytes that base does not"), "{case}: {verdict:?}");
                        assert!(matches!(verdict, Verdict::InDoubt { likely, .. } if likely == "/vm/1.img"));
                    }
                }
            }
        };
        for qemu in [Qemu::Gone, Qemu::ShowsNeither, Qemu::ShowsAfter] {
            seen.qemu = qemu;
            // It runs on base, so it cannot be said that the guest never came there.
            let by_times = expected == Is::NotSwitched && qemu == Qemu::ShowsAfter;
            assert_is(&state, &mut seen, if by_times { Is::Compared } else { expected });
        }
        let both = ![base, active].contains(&PENDING);
        // A write to base tells nothing where closing it makes one.
        seen.closing_writes_base = true;
        if both {
            assert_is(&state, &mut seen, Is::Compared);
        }
        seen.closing_writes_base = false;
        // Nor where nobody saw QEMU go: the guest may have stayed, and somebody else have started base.
        state.gone_ns = None;
        if both {
            assert_is(&state, &mut seen, Is::Compared);
        }
        seen.treated[0] = Treated::Emptied;
        assert_is(&state, &mut seen, Is::Switched);
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
        seen.stamps[3] = Some(stamp(1, base));
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
fn an_old_active_image_that_was_used_after_the_pivot_is_a_doubt_unless_it_was_emptied() {
    let state = merge(Kind::ActiveCommit, Phase::Switched);
    let mut seen = seen(&state, Qemu::Gone, Header::Unread);
    seen.compared = Compared::Differs(9);
    seen.stamps[0] = Some(stamp(4, PENDING + 9));
    assert!(is_doubt(&state.judge(&seen), "bytes that base does not"));
    assert_eq!(state.touched(&seen), [4]);
    // Somebody has started base again, too.
    seen.qemu = Qemu::ShowsAfter;
    seen.stamps[3] = Some(stamp(1, PENDING + 99));
    assert!(is_doubt(&state.judge(&seen), "bytes that base does not"));
    for treated in [Treated::Emptied, Treated::Sealed] {
        seen.treated[0] = treated;
        assert_eq!(state.judge(&seen), Verdict::Switched);
    }
    // It is gone, and base had all of it.
    seen.treated[0] = Treated::Not;
    seen.stamps[0] = None;
    assert_eq!(state.judge(&seen), Verdict::Switched);
}

/// Any program can set the time of a write: one that is older than the state excuses nothing, nor does one that is the same.
#[test]
fn an_old_active_image_whose_time_was_set_back_is_compared() {
    for phase in [Phase::Switching, Phase::Switched] {
        for (modified_ns, changed_ns) in
            [(PENDING - 9, PENDING + 9), (PENDING - 9, PENDING), (PENDING, PENDING + 9)]
        {
            let state = merge(Kind::ActiveCommit, phase);
            for base in [PENDING, PENDING + 9] {
                let mut seen = seen(&state, Qemu::Gone, Header::Unread);
                seen.stamps[0] = Some(Stamp { times: times(modified_ns, changed_ns), ..stamp(4, PENDING) });
                seen.stamps[3] = Some(stamp(1, base));
                let case = format!("{phase:?} {modified_ns} {changed_ns} {base}");
                seen.compared = Compared::Differs(9);
                let verdict = state.judge(&seen);
                if phase == Phase::Switching && base == PENDING {
                    // Nobody came to base; the old one is the disk, whoever changed it.
                    assert_eq!(verdict, Verdict::NotSwitched, "{case}");
                    continue;
                }
                assert!(is_doubt(&verdict, "bytes that base does not"), "{case}: {verdict:?}");
                assert!(state.touched(&seen).contains(&4) == (phase == Phase::Switched), "{case}");
                seen.compared = Compared::NotYet;
                assert_eq!(state.judge(&seen), Verdict::Compare, "{case}");
                seen.compared = Compared::InUse;
                assert_eq!(state.judge(&seen), Verdict::NotComparable, "{case}");
                seen.compared = Compared::Equal;
                assert_eq!(state.judge(&seen), Verdict::Switched, "{case}");
                seen.treated[0] = Treated::Sealed;
                assert_eq!(state.judge(&seen), Verdict::Switched, "{case}");
            }
        }
    }
}

/// A block device, or an image whose bytes are in another file.
#[test]
fn an_old_active_image_that_keeps_no_time_is_compared_after_the_pivot() {
    let state = merge(Kind::ActiveCommit, Phase::Switched);
    for qemu in [Qemu::Gone, Qemu::ShowsNeither, Qemu::ShowsAfter] {
        let mut seen = seen(&state, qemu, Header::Unread);
        assert_eq!(state.judge(&seen), Verdict::Switched);
        seen.tells_no_time(&state, 4);
        for (compared, is_switched) in
            [(Compared::Equal, true), (Compared::Differs(9), false), (Compared::Unsupported, false)]
        {
            seen.compared = compared;
            let verdict = state.judge(&seen);
            assert_eq!(verdict == Verdict::Switched, is_switched, "{qemu:?} {verdict:?}");
        }
        seen.compared = Compared::InUse;
        assert_eq!(state.judge(&seen), Verdict::NotComparable);
    }
}

/// A base that only QEMU can look at: the times of the old active image alone tell.
#[test]
fn a_base_that_is_no_file_here_leaves_the_old_active_image_to_tell() {
    let mut state = merge(Kind::ActiveCommit, Phase::Switching);
    state.layers[3].stamp = None;
    let mut seen = seen(&state, Qemu::Gone, Header::Unread);
    assert_eq!(state.judge(&seen), Verdict::Switched);
    seen.stamps[0] = Some(stamp(4, PENDING + 9));
    assert!(is_doubt(&state.judge(&seen), "cannot be seen"));
    let mut state = merge(Kind::Commit, Phase::Copying);
    state.layers[3].stamp = None;
    let judge = |qemu, phase, name| {
        let state = State { phase, ..state.clone() };
        state.judge(&Seen { compared: Compared::NotYet, ..self::seen(&state, qemu, names(name)) })
    };
    assert!(is_doubt(&judge(Qemu::Gone, Phase::Copying, "1.img"), "another client"));
    assert_eq!(judge(Qemu::ShowsAfter, Phase::Copying, "1.img"), Verdict::Switched);
    assert_eq!(judge(Qemu::Gone, Phase::Switching, "1.img"), Verdict::Switched);
    assert_eq!(judge(Qemu::Gone, Phase::Switching, "3.img"), Verdict::NotSwitched);
}

#[test]
fn a_file_that_is_needed_and_gone_or_replaced_is_a_doubt() {
    for (place, name) in [(0, "4.img"), (1, "3.img"), (3, "1.img")] {
        let state = merge(Kind::Commit, Phase::Switching);
        for now in [None, Some(stamp(77, PENDING))] {
            let judge = |header, same_boot| {
                let mut seen = seen(&state, Qemu::Gone, header);
                seen.stamps[place] = now.clone();
                seen.same_boot = same_boot;
                assert_eq!(state.touched(&seen), [4 - place]);
                state.judge(&seen)
            };
            for same_boot in [true, false] {
                assert!(is_doubt(&judge(names("3.img"), same_boot), name));
                let switched = judge(names("1.img"), same_boot);
                if place == 1 && now.is_none() {
                    // Nobody can tell any more whether base holds what it held.
                    assert!(is_doubt(&switched, "merged layers are gone"), "{switched:?}");
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
    for stamp in seen.stamps.iter_mut().flatten() {
        stamp.id.device = 2;
    }
    assert!(is_doubt(&state.judge(&seen), "not the file that it was"));
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
        for (place, stamp) in seen.stamps.iter_mut().flatten().enumerate() {
            stamp.times.modified_ns += 1 + place as i128;
        }
        assert_eq!(state.touched(&seen), expected, "{kind:?} {phase:?}");
        // What was no file here is not looked at.
        state.layers.iter_mut().for_each(|layer| layer.stamp = None);
        assert_eq!(state.touched(&seen), [0; 0]);
    }
}

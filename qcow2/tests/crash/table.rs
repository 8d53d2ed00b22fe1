//! Unfinished work and others: each kind of base, stopped in each way at many moments, and what may become of base until the
//! same merge is asked for again. In no row the guest loses a byte, and what is lost already is not said to be merged.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kit::Random;
use qcow2::chain::Chain;
use qcow2::chain::view::View;
use qcow2::fuzzing::sample::Content;
use qcow2::image::ClusterCache;
use qcow2::merge::{Commit, CommitOptions, Report, Silent, abort, heal, heal_image, unfinished_merge};
use qcow2::storage::sim::{Cuts, Fault, FaultKind, Garbage, SimHost, power_cuts};
use qcow2::storage::{Access, Host};
use qcow2::units::GuestOffset;
use qcow2::{Error, ErrorKind, Result};

use crate::chain::{BuiltLayer, JOURNALS, Room, Scenario, guest, options};
use crate::power::disk;
use crate::run::{say, seed, share};
use crate::scenarios::{SHAPE, Shape, overlay};

/// What base is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum BaseKind {
    Raw,
    Version2,
    Version3,
    DataFile,
    RawDevice,
    Device,
}

/// How the merge is stopped.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Stop {
    Killed,
    /// By a write for which there is no room: it notes that it stops.
    InOrder,
    PowerCut,
    /// It is killed, goes on, and is killed again.
    Twice,
}

/// What becomes of base.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum LayerFate {
    Untouched,
    /// Somebody writes to it two seconds later.
    Newer,
    /// It is put back from a backup, in place and with its times.
    Older,
    /// The same, with the time of now.
    OlderAtOnce,
    /// The same as a new file of the name.
    Replaced,
    /// What was merged is other bytes, and the time of modification is as before.
    OtherBytes,
    Copied,
    Moved,
    CopiedWithoutJournal,
}

const KINDS: [BaseKind; 6] = [
    BaseKind::Raw,
    BaseKind::Version2,
    BaseKind::Version3,
    BaseKind::DataFile,
    BaseKind::RawDevice,
    BaseKind::Device,
];
const STOPS: [Stop; 4] = [Stop::Killed, Stop::InOrder, Stop::PowerCut, Stop::Twice];
const FATES: [LayerFate; 9] = [
    LayerFate::Untouched,
    LayerFate::Newer,
    LayerFate::Older,
    LayerFate::OlderAtOnce,
    LayerFate::Replaced,
    LayerFate::OtherBytes,
    LayerFate::Copied,
    LayerFate::Moved,
    LayerFate::CopiedWithoutJournal,
];

/// Bytes of base that no overlay hides, and bytes of the overlays.
const OF_BASE: u8 = 0x77;
const OF_TOP: u8 = 0x41;
const FOREIGN: u8 = 0xee;
/// How much later somebody writes, in nanoseconds.
const LATER: u64 = 2_000_000_000;

impl BaseKind {
    fn is_device(self) -> bool {
        matches!(self, Self::RawDevice | Self::Device)
    }

    fn has_dirty_bit(self) -> bool {
        matches!(self, Self::Version3 | Self::DataFile | Self::Device)
    }

    /// Base below two layers that write to the same places and to others.
    fn scenario(self) -> Scenario {
        let shape = if self == Self::Version2 { Shape { version: 2, ..SHAPE } } else { SHAPE };
        let mut sample = shape.sample(40);
        for n in [1, 5, 20] {
            sample = sample.with(n, Content::Data(OF_BASE));
        }
        if self == Self::DataFile {
            sample.data_file = Some(("/vm/0.data".into(), false));
        }
        let base = match self {
            Self::Raw | Self::RawDevice => {
                let mut raw = BuiltLayer::raw("/vm/0", 40, 0);
                for sector in [1, 5, 20] {
                    raw.file[sector * 512..][..512].fill(OF_BASE);
                }
                raw.says = raw.file.iter().map(|byte| Some(*byte)).collect();
                raw
            }
            _ => BuiltLayer::qcow2("/vm/0", &sample, Room::Dirty(60)),
        };
        let layer = |n: usize, below: &BuiltLayer, at: &[u64], fill: u8| {
            let sample = at.iter().fold(SHAPE.sample(40), |sample, at| sample.with(*at, Content::Data(fill)));
            let mut layer = overlay(sample, below, n);
            layer.path = format!("/vm/{n}.qcow2").into();
            layer
        };
        let lower = layer(1, &base, &[2, 3, 5, 9, 30], OF_TOP);
        let upper = layer(2, &lower, &[3, 4, 5, 25, 39], OF_TOP + 1);
        let mut scenario = Scenario::new(format!("{self:?}"), vec![base, lower, upper], 0, 2);
        scenario.device = self.is_device();
        scenario
    }
}

/// A base, a way to stop, and a fate, of which some do not go together.
fn is_possible(kind: BaseKind, stop: Stop, fate: LayerFate) -> bool {
    let elsewhere = matches!(
        fate,
        LayerFate::Replaced
            | LayerFate::Older
            | LayerFate::Copied
            | LayerFate::Moved
            | LayerFate::CopiedWithoutJournal
    );
    // A data file is named by its path.
    let moved = matches!(fate, LayerFate::Copied | LayerFate::Moved | LayerFate::CopiedWithoutJournal);
    let never = match kind {
        BaseKind::RawDevice | BaseKind::Device => elsewhere,
        BaseKind::DataFile => moved,
        _ => stop == Stop::Twice && fate == LayerFate::CopiedWithoutJournal,
    };
    !never
}

/// The options of the merge when the chain lies in another folder.
fn merge_options(scenario: &Scenario) -> CommitOptions {
    let mut options = CommitOptions::new(options());
    options.journal_dir = scenario.device.then(|| PathBuf::from(JOURNALS));
    options
}

fn merge(host: &SimHost, active: &Path, options: &CommitOptions) -> Result<Report> {
    let never = AtomicBool::new(false);
    heal(host, active, options)?;
    Commit::prepare(Arc::new(host.clone()), active, options, &never)?.execute(&Silent, &never)
}

/// The guest's bytes through an image.
fn shows(host: &SimHost, path: &Path) -> Result<Vec<u8>> {
    let chain = Chain::open(host, path, &options())?;
    let images = chain.images();
    let view = View::new(&images, 0, chain.active());
    let mut bytes = vec![0xdd; view.size() as usize];
    view.read(GuestOffset::ZERO, &mut bytes, &mut ClusterCache::new())?;
    Ok(bytes)
}

/// How many operations a merge of the disk has that can fail so.
fn operations(scenario: &Scenario, host: &SimHost, kind: FaultKind) -> u64 {
    let host = disk(scenario, &host.now());
    host.fail(Some(Fault { kind, nth: u64::MAX, for_ever: false }));
    merge(&host, scenario.path(2), &merge_options(scenario)).unwrap();
    host.seen()
}

/// The disk when its merge was stopped at the N-th operation, in the same run of the system.
fn stop(scenario: &Scenario, host: SimHost, kind: FaultKind, nth: u64) -> SimHost {
    host.fail(Some(Fault { kind, nth, for_ever: kind == FaultKind::Io }));
    let _ = merge(&host, scenario.path(2), &merge_options(scenario));
    host.fail(None);
    host
}

/// Disks on which the merge was stopped, `most` of them or a few more; each can be made again.
fn stopped(scenario: &Scenario, how: Stop, most: u64, dice: &mut Random) -> Vec<Box<dyn Fn() -> SimHost>> {
    let fresh = {
        let (scenario, start) = (scenario.clone(), scenario.start());
        move || disk(&scenario, &start)
    };
    let mut all: Vec<Box<dyn Fn() -> SimHost>> = Vec::new();
    let kind = if how == Stop::InOrder { FaultKind::NoSpace } else { FaultKind::Io };
    let count = operations(scenario, &fresh(), kind);
    let step = (count / most).max(1);
    match how {
        Stop::Killed | Stop::InOrder => {
            for nth in (1 + dice.below(step)..count).step_by(step as usize) {
                let (scenario, fresh) = (scenario.clone(), fresh.clone());
                all.push(Box::new(move || stop(&scenario, fresh(), kind, nth)));
            }
        }
        Stop::Twice => {
            // Most of what a merge does when it goes on has nothing new to say before layers are emptied.
            for nth in (count / 2 + dice.below(step)..count).step_by((4 * step) as usize) {
                let once = stop(scenario, fresh(), kind, nth);
                let again = operations(scenario, &once, kind);
                for second in (1..again).step_by((again / 4).max(1) as usize) {
                    let (scenario, fresh) = (scenario.clone(), fresh.clone());
                    let second = second + dice.below((again / 4).max(1));
                    all.push(Box::new(move || {
                        stop(&scenario, stop(&scenario, fresh(), kind, nth), kind, second)
                    }));
                }
            }
        }
        Stop::PowerCut => {
            let host = fresh();
            merge(&host, scenario.path(2), &merge_options(scenario)).unwrap();
            let cuts = Cuts {
                seed: dice.next(),
                exhaustive: 2,
                listed: 1,
                random: 2,
                garbage: Garbage::None,
                damaged: 0,
                tear: qcow2::storage::sim::Tear::Sector,
            };
            let mut states = Vec::new();
            power_cuts(host.start(), &host.log(), &cuts, |cut| states.push(cut.state.clone()));
            let step = (states.len() as u64 / most).max(1);
            for state in states.into_iter().skip(dice.below(step) as usize).step_by(step as usize) {
                let scenario = scenario.clone();
                all.push(Box::new(move || disk(&scenario, &state)));
            }
        }
    }
    all
}

/// The files of base: the image, and its data file.
fn of_base(scenario: &Scenario) -> Vec<(PathBuf, Vec<u8>)> {
    let base = &scenario.layers[0];
    let data = base.data_file.clone();
    [Some((base.path.clone(), base.file.clone())), data].into_iter().flatten().collect()
}

/// Writes `new` over each run of 512 bytes of `old` in the files of base, the first one only if `one`.
fn change(host: &SimHost, scenario: &Scenario, old: u8, new: u8, one: bool) {
    for (path, _) in of_base(scenario) {
        let bytes = host.now().content(&path).unwrap();
        let file = host.open(&path, Access::ReadWrite).unwrap();
        let sectors = bytes.chunks(512).zip(0..).filter(|(sector, _)| sector.iter().all(|byte| *byte == old));
        for (_, n) in sectors.take(if one { 1 } else { usize::MAX }) {
            file.write_all_at(&[new; 512], n * 512).unwrap();
        }
    }
}

/// Lets it happen; the folder of the chain afterwards.
fn happen(host: &SimHost, scenario: &Scenario, kind: BaseKind, fate: LayerFate) -> &'static str {
    let start = scenario.start().host();
    let modified = |path: &Path| host.stat(path).unwrap().modified_ns;
    let put_back = |with_times: bool| {
        for (path, bytes) in of_base(scenario) {
            let file = host.open(&path, Access::ReadWrite).unwrap();
            file.write_all_at(&bytes, 0).unwrap();
            file.set_len(bytes.len() as u64).unwrap();
            if with_times {
                host.set_modified(&path, start.stat(&path).unwrap().modified_ns).unwrap();
            }
        }
    };
    let elsewhere = |to: &str, moves: bool, with_journals: bool| {
        for name in host.now().names() {
            let is_journal = name.to_string_lossy().contains(".qmerge-");
            let Ok(inside) = name.strip_prefix("/vm") else { continue };
            if is_journal && !with_journals {
                continue;
            }
            let there = Path::new(to).join(inside);
            if moves {
                host.rename(name, &there).unwrap();
                continue;
            }
            let bytes = host.now().content(name).unwrap();
            host.create_new(&there).unwrap().write_all_at(&bytes, 0).unwrap();
            host.set_modified(&there, modified(name)).unwrap();
        }
    };
    match fate {
        LayerFate::Untouched => {}
        LayerFate::Newer => {
            change(host, scenario, OF_BASE, FOREIGN, true);
            if kind.has_dirty_bit() {
                // QEMU clears it when it opens the image.
                let file = host.open(scenario.path(0), Access::ReadWrite).unwrap();
                let mut byte = [0];
                const DIRTY: u64 = qcow2::fuzzing::sample::field::COMPATIBLE - 1;
                file.read_exact_or_zero(&mut byte, DIRTY).unwrap();
                file.write_all_at(&[byte[0] & !1], DIRTY).unwrap();
            }
            of_base(scenario).iter().for_each(|(path, _)| host.write_later(path, LATER).unwrap());
        }
        LayerFate::Older => put_back(true),
        LayerFate::OlderAtOnce => put_back(false),
        LayerFate::Replaced => {
            for (path, bytes) in of_base(scenario) {
                host.unlink(&path).unwrap();
                host.create_new(&path).unwrap().write_all_at(&bytes, 0).unwrap();
                host.set_modified(&path, start.stat(&path).unwrap().modified_ns).unwrap();
            }
        }
        LayerFate::OtherBytes => {
            let times: Vec<_> = of_base(scenario).iter().map(|(path, _)| modified(path)).collect();
            change(host, scenario, OF_TOP, FOREIGN, false);
            change(host, scenario, OF_TOP + 1, FOREIGN, false);
            for ((path, _), modified) in of_base(scenario).iter().zip(times) {
                host.set_modified(path, modified).unwrap();
            }
        }
        LayerFate::Copied => elsewhere("/copy", false, true),
        LayerFate::CopiedWithoutJournal => elsewhere("/copy", false, false),
        LayerFate::Moved => elsewhere("/moved", true, true),
    }
    match fate {
        LayerFate::Copied | LayerFate::CopiedWithoutJournal => "/copy",
        LayerFate::Moved => "/moved",
        _ => "/vm",
    }
}

/// What came of one row, in a word; or what is wrong.
fn row(
    scenario: &Scenario,
    (kind, how, fate): (BaseKind, Stop, LayerFate),
    host: &SimHost,
    gives_up: bool,
) -> std::result::Result<&'static str, String> {
    let original = guest(&scenario.layers, 2);
    let journals = |host: &SimHost| {
        let ours = |name: &Path| name.to_string_lossy().contains(".qmerge-journal");
        host.now().names().filter(|name| ours(name)).count()
    };
    let folder = Path::new(happen(host, scenario, kind, fate));
    let [base, active] = ["0", "2.qcow2"].map(|name| folder.join(name));
    let before = shows(host, &active);
    let options = merge_options(scenario);
    let dir = options.journal_dir.as_deref();
    let begun = unfinished_merge(host, &base, dir).ok().flatten();
    let is_begun = begun.is_some();
    if gives_up {
        let healed = heal_image(host, &base, &options.open, dir);
        let given_up = healed.and_then(|_| abort(host, &base, &options.open, dir, &AtomicBool::new(false)));
        let same = match (&before, shows(host, &active)) {
            (Ok(before), Ok(after)) => *before == after,
            (Err(_), _) => true,
            (Ok(_), Err(_)) => false,
        };
        return match given_up {
            _ if !same => Err("given up: the guest's bytes differ".into()),
            Ok(_) => Ok("given up"),
            Err(e) if matches!(e.kind(), ErrorKind::Refused | ErrorKind::Damaged) => Ok("not given up"),
            Err(e) => Err(format!("given up: {e}")),
        };
    }
    let judge = |result: &Result<Report>, with: &str| {
        let after = shows(host, &active);
        let is_lost = |bytes: &Vec<u8>| *bytes != original && !matches!(fate, LayerFate::Newer);
        match (&before, &after, result) {
            (Ok(before), Ok(after), _) if before != after => {
                let at = before.iter().zip(after).position(|(a, b)| a != b);
                Err(format!("{with}the guest's bytes differ at {at:?}: {result:?}"))
            }
            (Ok(_), Err(e), _) => Err(format!("{with}the chain cannot be read any more: {e}")),
            (Ok(before), _, Ok(_)) if is_lost(before) && is_begun => {
                Err(format!("{with}what is lost is said to be merged"))
            }
            (_, _, Err(e)) if !matches!(e.kind(), ErrorKind::Refused | ErrorKind::Damaged) => {
                Err(format!("{with}the error is {e}"))
            }
            _ => Ok(()),
        }
    };
    let result = merge(host, &active, &options);
    judge(&result, "")?;
    let must_go_on = |e: &Error| match fate {
        LayerFate::Untouched | LayerFate::Moved | LayerFate::Copied => true,
        // Base, or a layer that was being emptied, is dirty, and nothing tells why.
        LayerFate::CopiedWithoutJournal => e.kind() != ErrorKind::Damaged,
        _ => false,
    };
    // Behind a restart of the system, the times of a device tell nothing: what was done is read back, and where nothing was
    // done but to set the dirty bit, the merge is an ordinary one.
    let has_done = begun.is_some_and(|begun| begun.done > 0 || begun.is_switching);
    let is_known = !(kind.is_device() && how == Stop::PowerCut) || (kind.has_dirty_bit() && has_done);
    match &result {
        Err(e) if must_go_on(e) => return Err(format!("it is refused: {e}")),
        Ok(_) if fate == LayerFate::Newer && is_begun && is_known => {
            return Err("what somebody wrote later is merged over".into());
        }
        Ok(_) if shows(host, &base).ok() != shows(host, &active).ok() => {
            return Err("base does not show what was merged".into());
        }
        Ok(_)
            if journals(host) > 0 && fate != LayerFate::Copied && fate != LayerFate::CopiedWithoutJournal =>
        {
            return Err("a journal is left".into());
        }
        Ok(_) => return Ok("merged"),
        Err(_) => {}
    }
    // Begun again, it is done or refused: never less than the guest has.
    let mut anew = options.clone();
    anew.restart = true;
    let again = merge(host, &active, &anew);
    judge(&again, "with --restart: ")?;
    Ok(if again.is_ok() { "refused, merged with --restart" } else { "refused" })
}

#[test]
fn no_row_of_the_table_of_unfinished_work_loses_a_byte() {
    let most = if share() == 1 { 24 } else { 5 };
    let mut counts: BTreeMap<(BaseKind, LayerFate, &str), u64> = BTreeMap::new();
    let (mut rows, mut bad) = (0, Vec::new());
    for kind in KINDS {
        let scenario = kind.scenario();
        for how in STOPS {
            let mut dice = Random::new(seed(&format!("{kind:?} {how:?}")));
            for (n, make) in stopped(&scenario, how, most, &mut dice).iter().enumerate() {
                for fate in FATES.into_iter().filter(|fate| is_possible(kind, how, *fate)) {
                    // Every other one is given up instead, in turn.
                    for gives_up in [false, true] {
                        if gives_up && !(n + fate as usize).is_multiple_of(3) {
                            continue;
                        }
                        rows += 1;
                        match row(&scenario, (kind, how, fate), &make(), gives_up) {
                            Ok(what) => *counts.entry((kind, fate, what)).or_default() += 1,
                            Err(what) => bad.push(format!("{kind:?}, {how:?} {n}, {fate:?}: {what}")),
                        }
                    }
                }
            }
        }
    }
    say(&format!("crash tests, table of unfinished work: {rows} rows, {} bad", bad.len()));
    if std::env::var_os("QMERGE_CRASH_TIMES").is_some() {
        counts.iter().for_each(|(row, count)| say(&format!("  {row:?}: {count}")));
    }
    assert!(bad.is_empty(), "{} bad:\n{}", bad.len(), bad[..bad.len().min(30)].join("\n"));
    // Each base is gone on with, begun anew, and refused somewhere.
    for kind in KINDS {
        for what in ["merged", "refused", "given up"] {
            assert!(
                counts.keys().any(|(of, _, came)| *of == kind && *came == what),
                "{kind:?}: never {what}"
            );
        }
    }
}

//! Journals of commits that were stopped: damaged, made up, or about something else.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use kit::Random;

use super::chain::options;
use super::crash::{ENDINGS, Merge, is_journal, on_one_thread};
use super::model::Input;
use super::mutate::{VALUES, mutate};
use crate::journal::record::{BLOCK, Guard, Header, Phase, Purpose, Record};
use crate::merge::{CommitOptions, unfinished_merge};
use crate::merge::{abort, heal_image};
use crate::stamp::{Stamp, Times};
use crate::storage::sim::{Fault, FaultKind, State};
use crate::storage::{Boot, MemHost};

/// The bytes of an input that say what becomes of the journals; the chain is made from the others.
const HEAD: usize = 32;
/// What a record begins with.
const RECORD: &[u8; 8] = b"qmgJR004";

/// The files of a disk by name.
type JournalFiles = BTreeMap<PathBuf, Vec<u8>>;

/// A commit that is stopped by a failing disk, and whose journals are then replaced by any bytes, damaged, or
/// changed with a right checksum. An image is written only because of a journal that is whole and about that very
/// file; where there is none, the commit afterwards finishes or is refused with nothing written. The guest sees what it
/// saw, unless a journal lies with a right checksum.
pub fn journal(bytes: &[u8]) {
    let (head, rest) = bytes.split_at(bytes.len().min(HEAD));
    let merge = Merge::choose(&mut Input::new(rest));
    on_one_thread(|| {
        let mut input = Input::new(head);
        let left = stopped(&merge, &mut input).host();
        let is_honest = !tamper(&merge, &left, &mut input, rest);
        Tampered { merge: &merge, is_honest, state: State::of(&left) }.judge();
    });
}

/// What a commit leaves when the N-th operation fails, once or for ever after.
/// What a work may be that moves data.
const PURPOSES: [Purpose; 4] = [Purpose::Merge, Purpose::Empty, Purpose::Pull, Purpose::Rebase];

fn stopped(merge: &Merge, input: &mut Input<'_>) -> State {
    let disk = merge.disk();
    let kind =
        [FaultKind::Io, FaultKind::NoSpace, FaultKind::Short, FaultKind::Sync][input.below(4) as usize];
    let nth = u64::from(input.byte()) + input.below(2) * 256;
    disk.fail(Some(Fault { kind, nth, for_ever: !input.one_in(3) }));
    // Refused, stopped or finished: all of it is a state to begin with.
    let _ = merge.run(Arc::new(disk.clone()));
    disk.now()
}

/// The journals that are there.
fn journals(host: &MemHost) -> JournalFiles {
    let state = State::of(host);
    let names = state.names().filter(|path| is_journal(path));
    names.filter_map(|path| Some((path.to_owned(), state.content(path)?))).collect()
}

/// Changes the journals that are there, or makes one. Says whether one of them is whole and not what the commit has
/// written.
fn tamper(merge: &Merge, host: &MemHost, input: &mut Input<'_>, any: &[u8]) -> bool {
    let mut files = journals(host);
    let mut lies = false;
    if files.is_empty() || input.one_in(8) {
        let layer = &merge.layers[input.below(merge.layers.len() as u64) as usize].path;
        let name = layer.file_name().map(|name| name.to_string_lossy().into_owned()).unwrap_or_default();
        let ending = ENDINGS[input.below(2) as usize];
        // Bytes of another journal are a journal, but not about this image.
        let bytes = files.values().next().cloned().unwrap_or_else(|| any.to_vec());
        files.insert(layer.with_file_name(format!(".{name}{ending}")), bytes);
        lies = true;
    }
    for (path, bytes) in &mut files {
        let old = bytes.clone();
        match input.below(6) {
            0 => any.clone_into(bytes),
            // A checksum tells: what is damaged is no journal, or a record less.
            1 => mutate(bytes, &mut Random::new(u64::from(input.byte()))),
            change @ 2..=4 => {
                if change == 4 {
                    change_records(bytes, input);
                } else {
                    change_header(bytes, input);
                }
                lies |= *bytes != old;
            }
            _ => {}
        }
        assert!(host.add(path, bytes).is_ok(), "files in memory can be added");
    }
    lies
}

fn value(input: &mut Input<'_>, old: u64) -> u64 {
    match input.below(4) {
        0 => old.wrapping_add(1),
        1 => old.wrapping_sub(1),
        2 => old ^ 1 << input.below(64),
        _ => VALUES[input.below(VALUES.len() as u64) as usize],
    }
}

/// Changes what the header says, with a right checksum.
fn change_header(bytes: &mut [u8], input: &mut Input<'_>) {
    let Some(mut header) = Header::parse(bytes) else { return };
    match input.below(14) {
        0 => header.nonce = value(input, header.nonce),
        1 => header.purpose = PURPOSES[input.below(PURPOSES.len() as u64) as usize],
        2 => header.purpose = Purpose::Header { atomic: input.one_in(2) },
        3 => {
            header.guard = [Guard::Stamp, Guard::DirtyBit { lazy: false }, Guard::DirtyBit { lazy: true }]
                [input.below(3) as usize];
        }
        4 => header.max_blocks = value(input, header.max_blocks.into()) as u32,
        5 => header.new_size = value(input, header.new_size),
        6 => header.zero_until = value(input, header.zero_until),
        7 => header.total = value(input, header.total),
        8 => header.layers.clear(),
        9 => header.layers.iter_mut().for_each(|layer| change_stamp(layer, input)),
        10 => header.has_emptied = !header.has_emptied,
        11 => header.samples.iter_mut().for_each(|sample| sample.offset = value(input, sample.offset)),
        _ => header.targets.iter_mut().for_each(|target| change_stamp(target, input)),
    }
    put(bytes, 0, header.encode());
}

fn change_stamp(stamp: &mut Stamp, input: &mut Input<'_>) {
    match input.below(9) {
        0 => stamp.path = "/vm/other".into(),
        1 => stamp.is_device = !stamp.is_device,
        2 => stamp.times = times(stamp.times, input),
        3 => stamp.file_system = stamp.file_system.is_none().then(|| value(input, 0)),
        4 => stamp.born_ns = stamp.born_ns.is_none().then(|| value(input, 0).into()),
        5 => stamp.head_crc ^= 1,
        6 => stamp.id.device = value(input, stamp.id.device),
        _ => stamp.id.inode = value(input, stamp.id.inode),
    }
}

fn times(mut times: Times, input: &mut Input<'_>) -> Times {
    match input.below(3) {
        0 => times.len = value(input, times.len),
        1 => times.modified_ns = value(input, times.modified_ns as u64).into(),
        _ => times.changed_ns = value(input, times.changed_ns as u64).into(),
    }
    times
}

/// Changes what the records say, with right checksums.
fn change_records(bytes: &mut [u8], input: &mut Input<'_>) {
    let Some(header) = Header::parse(bytes) else { return };
    for at in (0..bytes.len()).step_by(BLOCK as usize) {
        let rest = &bytes[at..];
        let Some(mut record) = Record::parse(rest, header.nonce).filter(|_| rest.starts_with(RECORD)) else {
            continue;
        };
        match input.below(12) {
            0 => record.sequence = value(input, record.sequence),
            1 => {
                let phases = [Phase::Arming, Phase::Moving, Phase::Switching, Phase::Done, Phase::Removing];
                record.phase = phases[input.below(5) as usize];
            }
            2 => record.watermark = value(input, record.watermark),
            3 => record.done = value(input, record.done),
            4 => match input.below(3) {
                0 => record.stopped = !record.stopped,
                1 => {
                    let boot = || Boot { id: value(input, 0), started_ns: 0 };
                    record.boot = record.boot.is_none().then(boot);
                }
                _ => record.known.iter_mut().for_each(|known| *known = times(*known, input)),
            },
            5 => record.target = input.byte(),
            6 | 7 => record.len = value(input, record.len),
            8 => record.blocks.iter_mut().for_each(|block| block.before[0] ^= 1),
            9 => record.blocks.iter_mut().take(1).for_each(|block| block.number = value(input, block.number)),
            10 => {
                let fill = input.byte();
                let spoil = |byte: &mut u8| *byte ^= fill;
                record.blocks.iter_mut().flat_map(|block| block.bytes.iter_mut()).step_by(61).for_each(spoil);
            }
            _ => record.blocks.clear(),
        }
        put(bytes, at, Some(record.encode()));
    }
}

fn put(bytes: &mut [u8], at: usize, new: Option<Vec<u8>>) {
    for (old, new) in bytes.iter_mut().skip(at).zip(new.unwrap_or_default()) {
        *old = new;
    }
}

/// A stopped commit with the journals that it has now.
struct Tampered<'a> {
    merge: &'a Merge,
    /// Whether all that is whole of the journals is what the commit has left.
    is_honest: bool,
    state: State,
}

impl Tampered<'_> {
    fn judge(&self) {
        let believed = self.believed();
        let images: Vec<&Path> = self.state.names().filter(|path| !is_journal(path)).collect();
        let unwritten = |host: &MemHost, what: &str| {
            let now = State::of(host);
            for path in images.iter().filter(|path| !believed.iter().any(|image| image == *path)) {
                // A merged layer may have been removed before, and nothing is removed now.
                assert!(now.has_same(path, &self.state), "{what} has written to {}", path.display());
            }
        };
        let host = self.state.host();
        for image in &images {
            let _ = unfinished_merge(&host, image, None);
        }
        drop(self.merge.prepare(Arc::new(host.clone())));
        unwritten(&host, "planning");
        for restart in [false, true] {
            let options = CommitOptions { restart, ..self.merge.options.clone() };
            let host = self.state.host();
            let done = self.merge.run_with(&options, Arc::new(host.clone()));
            if done.is_err() && believed.is_empty() {
                unwritten(&host, "a refused commit");
            }
            if believed.is_empty() || self.is_honest {
                self.merge.assert_sound(&State::of(&host), &host);
                self.merge.assert_guest(&host);
            }
        }
        let host = self.state.host();
        let base = &self.merge.layers[self.merge.case.base].path;
        let healed = heal_image(&host, base, &options(), None);
        let _ = healed.and_then(|_| abort(&host, base, &options(), None, &AtomicBool::new(false)));
        unwritten(&host, "giving up");
        if believed.is_empty() || self.is_honest {
            self.merge.assert_guest(&host);
        }
    }

    /// The files that may be written because a journal says so: it is whole, and about that very file.
    fn believed(&self) -> Vec<PathBuf> {
        let mut believed = Vec::new();
        for path in self.state.names().filter(|path| is_journal(path)) {
            let header = self.state.content(path).and_then(|bytes| Header::parse(&bytes));
            for target in header.iter().flat_map(|header| &header.targets) {
                let is_it = |path: &&Path| {
                    self.state.inode(path) == Some(target.id.inode)
                        || (target.is_device && target.path == **path)
                        || target.path.file_name() == path.file_name()
                };
                believed.extend(self.state.names().filter(is_it).map(Path::to_owned));
            }
        }
        believed
    }
}

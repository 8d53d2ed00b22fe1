//! Backups of metadata: damaged, made up, or about an image that was written since.

use std::path::Path;

use kit::Random;

use super::model::Input;
use super::mutate::{VALUES, mutate};
use super::repair::seeds;
use crate::check::CheckOptions;
use crate::repair::{RepairMode, RestoreOptions, plan_restore, repair_with_backup, restore as put_back};
use crate::storage::{Access, Host, MemHost};

const IMAGE: &str = "/image.qcow2";
const BACKUP: &str = "/image.metadata";
/// The bytes of an input that say what is done; the backup may be made from the others.
const INPUT: usize = 64;
/// The length of a record's head, and of what a backup begins with.
const HEAD: usize = 40;
const MAGIC: usize = 16;

/// An image that was repaired with a backup; then backup, image or both are changed, by chance or with right
/// checksums. A restore writes what its plan says, or is refused with nothing written; the image never grows, a
/// second restore has nothing to do, and where nothing was changed the image is as before the repair.
pub fn restore(bytes: &[u8]) {
    let (head, rest) = bytes.split_at(bytes.len().min(INPUT));
    let mut input = Input::new(head);
    let mut images = seeds();
    let (_, image) = images.swap_remove(input.below(images.len() as u64) as usize);
    let mode = [RepairMode::All, RepairMode::Leaks][input.below(2) as usize];
    let host = MemHost::new();
    assert!(host.add(IMAGE, &image).is_ok(), "files in memory can be added");
    let (path, backup, how) = (Path::new(IMAGE), Path::new(BACKUP), CheckOptions::default());
    let Ok(file) = host.open(path, Access::ReadWrite) else { unreachable!("the image is there") };
    let repaired = repair_with_backup(path, &*file, None, mode, &host, backup, &how);
    assert!(repaired.is_ok(), "a repair in memory failed: {:?}", repaired.err());
    let known = (content(&host, IMAGE), content(&host, BACKUP));
    let mut now = known.clone();
    if input.one_in(4) {
        mutate(&mut now.0, &mut Random::new(u64::from(input.byte())));
    }
    match input.below(4) {
        0 => now.1.splice(MAGIC.min(now.1.len()).., rest.iter().copied()).for_each(drop),
        1 => mutate(&mut now.1, &mut Random::new(u64::from(input.byte()))),
        2 => now.1 = made_up(&now.1, &mut input),
        _ => {}
    }
    overwrite(&host, IMAGE, &now.0);
    overwrite(&host, BACKUP, &now.1);
    let options = RestoreOptions { allow_copy: input.one_in(2), ..RestoreOptions::default() };
    let planned = plan_restore(path, &*file, &host, backup, &options);
    assert!((content(&host, IMAGE), content(&host, BACKUP)) == now, "a plan has written");
    let done = put_back(path, &*file, &host, backup, &options);
    match (planned, done) {
        (Ok(planned), Ok(done)) => assert_eq!(planned, done, "the plan was not what was done"),
        (Err(_), Err(_)) => {
            assert!((content(&host, IMAGE), content(&host, BACKUP)) == now, "a refused restore has written");
            assert!(now != known, "a restore is refused for no reason");
            return;
        }
        (planned, done) => unreachable!("a plan, and something else: {planned:?} {done:?}"),
    }
    let restored = content(&host, IMAGE);
    assert!(restored.len() <= now.0.len(), "a restore has made the image longer");
    assert!(now != known || restored == image, "a restore does not bring back what was there");
    let again = put_back(path, &*file, &host, backup, &options);
    assert!(again.is_ok_and(|again| again.is_empty()), "a second restore has something to do");
    assert!(content(&host, IMAGE) == restored, "a second restore has written");
}

fn content(host: &MemHost, path: &str) -> Vec<u8> {
    host.content(path).unwrap_or_default()
}

/// Gives a file another content; it is the same file.
fn overwrite(host: &MemHost, path: &str, bytes: &[u8]) {
    let file = host.open(Path::new(path), Access::ReadWrite);
    let written =
        file.and_then(|file| file.set_len(bytes.len() as u64).and_then(|()| file.write_all_at(bytes, 0)));
    assert!(written.is_ok(), "files in memory can be written");
}

/// What a record says, without what ties it to the one before.
#[derive(Clone)]
struct RecordDraft {
    kind: [u8; 4],
    numbers: [u64; 2],
    content: Vec<u8>,
}

/// The records of a backup as the engine writes it.
fn records(backup: &[u8]) -> Vec<RecordDraft> {
    let mut records = Vec::new();
    let mut at = MAGIC;
    while let Some(head) = backup.get(at..at + HEAD) {
        let number = |from: usize, len: usize| {
            head.iter().skip(from).take(len).fold(0u64, |number, byte| number << 8 | u64::from(*byte))
        };
        let mut kind = [0; 4];
        kind.iter_mut().zip(head).for_each(|(to, from)| *to = *from);
        if kind == [0; 4] {
            at = (at + 1).next_multiple_of(4096);
            continue;
        }
        let end = at + HEAD + number(4, 4) as usize;
        let content = backup.get(at + HEAD..end).unwrap_or_default().to_vec();
        records.push(RecordDraft { kind, numbers: [number(8, 8), number(16, 8)], content });
        at = end;
    }
    records
}

/// Changes what records say, with right checksums.
fn made_up(backup: &[u8], input: &mut Input<'_>) -> Vec<u8> {
    let mut records = records(backup);
    for _ in 0..=input.below(3) {
        let len = records.len() as u64;
        let at = if input.one_in(2) { input.below(len) } else { len - 1 - input.below(len.min(4)) } as usize;
        let other = records[input.below(len) as usize].clone();
        let record = &mut records[at];
        match input.below(9) {
            0 => record.kind = [*b"kept", *b"chng", *b"done", *b"back", *b"home"][input.below(5) as usize],
            1 => record.numbers[0] = VALUES[input.below(VALUES.len() as u64) as usize],
            2 => record.numbers[0] = record.numbers[0].wrapping_add(512),
            3 => record.numbers[input.below(2) as usize] ^= 1 << input.below(64),
            4 => record.content.truncate(input.byte().into()),
            5 => record.content.iter_mut().skip(input.byte().into()).step_by(97).for_each(|byte| *byte ^= 4),
            6 => records.insert(at, other),
            7 => records.push(other),
            _ if len > 1 => drop(records.remove(at)),
            _ => {}
        }
    }
    let mut bytes = backup.get(..MAGIC).unwrap_or_default().to_vec();
    let mut last = (0u64, 0u32);
    for record in &records {
        let at = bytes.len() as u64;
        let mut head = record.kind.to_vec();
        head.extend((record.content.len() as u32).to_be_bytes());
        head.extend(record.numbers.iter().flat_map(|number| number.to_be_bytes()));
        head.extend(last.0.to_be_bytes());
        head.extend(last.1.to_be_bytes());
        let crc = crc32fast::hash(&[&head[..], &record.content].concat());
        last = (at, crc);
        bytes.extend(head);
        bytes.extend(crc.to_be_bytes());
        bytes.extend(&record.content);
    }
    bytes
}

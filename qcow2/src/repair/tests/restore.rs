//! Backups and the way back: byte for byte, or refused with nothing written.

use std::collections::BTreeSet;
use std::ops::Range;
use std::path::Path;

use super::{damaged_images, repaired};
use crate::check::CheckOptions;
use crate::error::{Error, FileOp, Refusal, Result};
use crate::format::parts;
use crate::repair::{RepairMode, RestoreOptions, RestorePlan, plan_restore, repair_with_backup, restore};
use crate::storage::sim::{Fault, FaultKind, SimHost, State};
use crate::storage::{Access, Host, MemHost};

pub(crate) const IMAGE: &str = "/image";
pub(crate) const BACKUP: &str = "/backup";

/// Puts an image back from its backup.
pub(crate) fn put_back(host: &dyn Host, image: &str) -> Result<RestorePlan> {
    put_back_with(host, image, &RestoreOptions::default())
}

fn put_back_with(host: &dyn Host, image: &str, options: &RestoreOptions<'_>) -> Result<RestorePlan> {
    let image = Path::new(image);
    let file = host.open(image, Access::ReadWrite).map_err(|e| Error::io(image, FileOp::Open, None, e))?;
    restore(image, &*file, host, Path::new(BACKUP), options)
}

/// The damaged image that most is done to.
struct RebuiltImage {
    /// As it was.
    image: Vec<u8>,
    /// As the repair leaves it.
    after: Vec<u8>,
    backup: Vec<u8>,
    state: State,
}

fn rebuilt() -> RebuiltImage {
    let (_, image) = damaged_images().into_iter().find(|(name, _)| *name == "no-refcount-block").unwrap();
    let host = MemHost::new();
    host.add(IMAGE, &image).unwrap();
    repaired(&host, RepairMode::All);
    let (after, backup) = (host.content(IMAGE).unwrap(), host.content(BACKUP).unwrap());
    assert!(after.len() > image.len(), "new structures lie behind the end");
    RebuiltImage { image, after, backup, state: State::of(&host) }
}

impl RebuiltImage {
    /// The same two files with other content.
    fn host(&self, image: &[u8], backup: &[u8]) -> MemHost {
        let host = self.state.host();
        overwrite(&host, IMAGE, image);
        overwrite(&host, BACKUP, backup);
        host
    }
}

/// Gives a file another content; it is the same file.
fn overwrite(host: &MemHost, path: &str, content: &[u8]) {
    let file = host.open(Path::new(path), Access::ReadWrite).unwrap();
    file.set_len(content.len() as u64).unwrap();
    file.write_all_at(content, 0).unwrap();
}

/// A record of a backup.
struct RecordRanges {
    /// The bytes of the image that it is about: metadata, or a change.
    image: Range<usize>,
    /// The bytes of the backup that it takes.
    backup: Range<usize>,
}

fn records(backup: &[u8]) -> Vec<RecordRanges> {
    let (mut records, mut at) = (Vec::new(), 16);
    while at < backup.len() {
        let number = |from: usize, len: usize| {
            backup[at + from..at + from + len].iter().fold(0, |n, byte| n << 8 | usize::from(*byte))
        };
        let (kind, len, offset) = (&backup[at..at + 4], number(4, 4), number(8, 8));
        let end = at + 40 + len;
        let image = match kind {
            b"kept" => offset..offset + len,
            b"chng" => offset..offset + len / 2,
            b"\0\0\0\0" => {
                at = at.next_multiple_of(4096);
                continue;
            }
            _ => 0..0,
        };
        records.push(RecordRanges { image, backup: at..end });
        at = end;
    }
    records
}

fn is_refusal(error: &Error, is: impl Fn(&Refusal) -> bool) -> bool {
    matches!(error, Error::Refused { reason, .. } if is(reason))
}

#[test]
fn what_was_repaired_comes_back_once() {
    let known = rebuilt();
    let RebuiltImage { image, after, backup, .. } = &known;
    let host = known.host(after, backup);
    let file = host.open(Path::new(IMAGE), Access::Read).unwrap();
    let planned =
        plan_restore(Path::new(IMAGE), &*file, &host, Path::new(BACKUP), &RestoreOptions::default()).unwrap();
    assert!(
        host.content(IMAGE).unwrap() == *after && host.content(BACKUP).unwrap() == *backup,
        "only planned"
    );
    assert!(!planned.is_empty() && !planned.continues);
    assert_eq!((planned.len, planned.len_after), (after.len() as u64, image.len() as u64));
    assert_eq!(planned.ranges.iter().map(|r| r.end - r.start).sum::<u64>(), planned.bytes);
    assert_eq!(put_back(&host, IMAGE).unwrap(), planned);
    assert!(host.content(IMAGE).unwrap() == *image);
    assert!(put_back(&host, IMAGE).unwrap().is_empty());
    // The same repair again leaves what the backup knows.
    overwrite(&host, IMAGE, after);
    assert!(!put_back(&host, IMAGE).unwrap().continues);
    assert!(host.content(IMAGE).unwrap() == *image);
}

#[test]
fn another_image_is_refused_and_a_copy_may_be_allowed() {
    let known = rebuilt();
    let RebuiltImage { image, after, backup, .. } = &known;
    let host = known.host(after, backup);
    host.add("/copy", after).unwrap();
    let error = put_back(&host, "/copy").unwrap_err();
    assert!(is_refusal(&error, |r| matches!(r, Refusal::OtherImage { image } if image == Path::new(IMAGE))));
    assert!(host.content("/copy").unwrap() == *after);
    let allowed = RestoreOptions { allow_copy: true, ..RestoreOptions::default() };
    put_back_with(&host, "/copy", &allowed).unwrap();
    assert!(host.content("/copy").unwrap() == *image);
    // Another content is another image, whatever is allowed.
    let (_, other) = damaged_images().remove(0);
    host.add("/other", &other).unwrap();
    put_back_with(&host, "/other", &allowed).unwrap_err();
    assert!(host.content("/other").unwrap() == other);
}

#[test]
fn a_damaged_backup_is_refused_or_changes_nothing_for_the_worse() {
    let known = rebuilt();
    let RebuiltImage { image, after, backup, .. } = &known;
    let (mut refused, mut whole) = (0, 0);
    // The mark at the end says only that the repair was not stopped, and between records lies nothing.
    let mut records = records(backup);
    assert_eq!(records.pop().unwrap().backup.len(), 40);
    let (cut, flipped) =
        (records.last().unwrap().backup.end, records.iter().map(|record| record.backup.len()).sum::<usize>());
    let mut attempt = |bytes: &[u8], what: &str| {
        let host = known.host(after, bytes);
        let before = host.content(BACKUP).unwrap();
        match put_back(&host, IMAGE) {
            Ok(_) => {
                assert!(host.content(IMAGE).unwrap() == *image, "{what}");
                whole += 1;
            }
            Err(error) => {
                let expected = |r: &Refusal| {
                    matches!(r, Refusal::BackupDamaged { .. } | Refusal::WrittenSinceRepair { .. })
                };
                assert!(is_refusal(&error, expected), "{what}: {error}");
                assert!(host.content(IMAGE).unwrap() == *after, "{what}: the image was written");
                assert!(host.content(BACKUP).unwrap() == before, "{what}: the backup was written");
                refused += 1;
            }
        }
    };
    for at in 0..backup.len() {
        attempt(&backup[..at], &format!("cut at {at}"));
        let mut flipped = backup.clone();
        flipped[at] ^= 1 << (at % 8);
        attempt(&flipped, &format!("flipped at {at}"));
    }
    let needed = cut + 16 + flipped;
    assert_eq!((whole, refused), (2 * backup.len() - needed, needed));
}

#[test]
fn an_image_that_was_written_since_is_refused() {
    let known = rebuilt();
    let RebuiltImage { after, backup, .. } = &known;
    let places: BTreeSet<_> =
        records(backup).into_iter().flat_map(|record| record.image.step_by(512)).collect();
    assert!(places.len() > 5);
    for at in places {
        let mut written = after.clone();
        written[at + 100] ^= 4;
        let host = known.host(&written, backup);
        let error = put_back(&host, IMAGE).unwrap_err();
        assert!(
            is_refusal(
                &error,
                |r| matches!(r, Refusal::WrittenSinceRepair { offset, .. } if *offset == at as u64)
            ),
            "{at:#x}: {error}"
        );
        assert!(host.content(IMAGE).unwrap() == written);
    }
    for len in [after.len() + 512, 1024] {
        let mut written = after.clone();
        written.resize(len, 0);
        put_back(&known.host(&written, backup), IMAGE).unwrap_err();
    }
}

#[test]
fn what_others_marked_corrupt_is_refused() {
    let known = rebuilt();
    let mut marked = known.after.clone();
    assert_eq!(marked[parts::DIRTY_AND_CORRUPT], 0);
    marked[parts::DIRTY_AND_CORRUPT] = 2;
    let error = put_back(&known.host(&marked, &known.backup), IMAGE).unwrap_err();
    assert!(error.to_string().contains("it has been marked corrupt"), "{error}");
}

#[test]
fn a_repair_that_fails_anywhere_is_undone_from_its_backup() {
    let (mut failed, mut without) = (0, 0);
    for (name, image) in damaged_images() {
        for nth in 1.. {
            let host = MemHost::new();
            host.add(IMAGE, &image).unwrap();
            let disk = SimHost::over(&host);
            let file = disk.open(Path::new(IMAGE), Access::ReadWrite).unwrap();
            let kind = [FaultKind::Io, FaultKind::Short, FaultKind::Sync][nth as usize % 3];
            disk.fail(Some(Fault { kind, nth: nth / 3 + 1, for_ever: true }));
            let (path, to, how) = (Path::new(IMAGE), Path::new(BACKUP), CheckOptions::default());
            let done = repair_with_backup(path, &*file, None, RepairMode::All, &disk, to, &how);
            if disk.failed() == 0 && kind == FaultKind::Io {
                break;
            }
            let left = disk.now().host();
            failed += u32::from(done.is_err());
            match put_back(&left, IMAGE) {
                Ok(_) => {}
                // There is no backup yet, and so no repair.
                Err(_) => without += 1,
            }
            assert!(left.content(IMAGE).unwrap() == image, "{name}: {kind:?} {nth}");
        }
    }
    assert!(failed > without && without > 0, "{failed} {without}");
}

#[test]
fn a_restore_that_fails_anywhere_is_finished_by_the_same_one() {
    let (mut failed, mut marked) = (0, 0);
    for (name, image) in damaged_images() {
        let repaired = {
            let host = MemHost::new();
            host.add(IMAGE, &image).unwrap();
            self::repaired(&host, RepairMode::All);
            host
        };
        for nth in 1.. {
            let disk = SimHost::over(&repaired);
            let kind = [FaultKind::Io, FaultKind::Short, FaultKind::Sync][nth as usize % 3];
            disk.fail(Some(Fault { kind, nth: nth / 3 + 1, for_ever: true }));
            let done = put_back(&disk, IMAGE);
            if disk.failed() == 0 && kind == FaultKind::Io {
                break;
            }
            let left = disk.now().host();
            failed += u32::from(done.is_err());
            marked += u32::from(
                left.content(IMAGE).unwrap()[parts::DIRTY_AND_CORRUPT] & 2 != 0
                    && image[parts::DIRTY_AND_CORRUPT] & 2 == 0,
            );
            put_back(&left, IMAGE).unwrap_or_else(|e| panic!("{name}: {kind:?} {nth}: {e}"));
            assert!(left.content(IMAGE).unwrap() == image, "{name}: {kind:?} {nth}");
        }
    }
    assert!(failed > 20 && marked > 10, "{failed} {marked}");
}

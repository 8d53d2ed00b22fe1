//! The file of a journal: which record counts, and where records lie.

use super::super::record::tests::{header, obsolete};
use super::super::record::{SECTORS, sector_crcs};
use super::*;
use crate::storage::MemHost;

/// A place in a namespace, whether or not there is a file.
pub(crate) fn at(host: &dyn Host, path: &str) -> Place {
    Place::of_new(host, Path::new(path)).unwrap()
}

fn block(number: u64) -> Block {
    let bytes = vec![number as u8; BLOCK as usize];
    Block { number, before: sector_crcs(&bytes), bytes: bytes.into() }
}

#[test]
fn the_last_whole_record_counts() {
    let host = MemHost::new();
    let path = &at(&host, "/x.journal");
    let journal = Journal::create(&host, path, header()).unwrap();
    let (opened, none) = Journal::open(&host, path, Access::Read).unwrap().unwrap();
    assert_eq!((opened.header(), none), (&header(), None));
    journal.note(Phase::Moving, 100, 7).unwrap();
    journal.append(&mut journal.turn(), 1, 50, false, vec![block(3)]).unwrap();
    let last = Journal::open(&host, path, Access::Read).unwrap().unwrap().1.unwrap();
    assert_eq!((last.sequence, last.watermark, last.done, last.target), (2, 100, 7, 1));
    assert_eq!(last.blocks, [block(3)]);
    // The last one is torn: the one before it counts.
    let place = journal.record_at(2);
    let file = path.open(&host, Access::ReadWrite).unwrap();
    file.write_all_at(&[0xa5; 512], place + 512).unwrap();
    let (again, last) = Journal::open(&host, path, Access::ReadWrite).unwrap().unwrap();
    assert_eq!(last.unwrap().sequence, 1);
    // The next record takes the slot of the torn one.
    again.append(&mut again.turn(), 0, 1, true, vec![]).unwrap();
    let last = Journal::open(&host, path, Access::Read).unwrap().unwrap().1.unwrap();
    assert_eq!((last.sequence, last.stopped, last.obsolete), (2, true, None));
    // From then on every record lists the files to be removed.
    again.set_obsolete(Some(obsolete()));
    again.note(Phase::Switching, 1, 1).unwrap();
    again.note(Phase::Removing, 1, 1).unwrap();
    let (opened, last) = Journal::open(&host, path, Access::Read).unwrap().unwrap();
    assert_eq!((opened.obsolete(), last.unwrap().phase), (Some(obsolete()), Phase::Removing));
    journal.remove(&host).unwrap();
    journal.remove(&host).unwrap();
    assert!(Journal::open(&host, path, Access::Read).unwrap().is_none());
}

#[test]
fn a_new_journal_takes_the_place_of_an_old_one() {
    let host = MemHost::new();
    let path = &at(&host, "/x.journal");
    host.add("/x.journal.new", b"left by a crash").unwrap();
    let old = Journal::create(&host, path, header()).unwrap();
    old.note(Phase::Moving, 9, 9).unwrap();
    Journal::create(&host, path, Header { nonce: 1, ..header() }).unwrap();
    let (opened, last) = Journal::open(&host, path, Access::Read).unwrap().unwrap();
    assert_eq!((opened.header().nonce, last), (1, None));
    host.add("/y.journal", b"not a journal").unwrap();
    assert!(Journal::open(&host, &at(&host, "/y.journal"), Access::Read).unwrap().is_none());
}

/// The remains of a journal of somebody who may write the image do not keep root from making one.
#[test]
fn what_the_owner_of_the_image_has_left_is_in_nobody_s_way() {
    for (user, is_removed) in [(7, true), (8, false)] {
        let host = MemHost::new();
        for target in &header().targets {
            host.add(&target.path, b"").unwrap();
            host.give(&target.path, Owner { user: 7, group: 7, mode: 0o600 }).unwrap();
        }
        host.add("/x.journal.new", b"left by a kill").unwrap();
        host.give("/x.journal.new", Owner { user, group: 7, mode: 0o600 }).unwrap();
        let made = Journal::create(&host, &at(&host, "/x.journal"), header());
        match made {
            Ok(_) => assert!(is_removed),
            Err(Error::Refused { reason: Refusal::Stranger { user: 8, .. }, .. }) => assert!(!is_removed),
            Err(e) => panic!("{e}"),
        }
    }
}

#[test]
fn records_do_not_reach_into_each_other() {
    let host = MemHost::new();
    let journal = Journal::create(&host, &at(&host, "/x.journal"), header()).unwrap();
    let blocks: Vec<Block> = (0..7).map(block).collect();
    let record = Record {
        nonce: 0,
        sequence: 0,
        phase: Phase::Moving,
        watermark: 0,
        done: 0,
        stopped: true,
        known: vec![Times::default(); 2],
        is_doubtful: false,
        boot: None,
        obsolete: Some(obsolete()),
        target: 0,
        len: 0,
        blocks,
    };
    assert_eq!(journal.max_blocks(), 7);
    assert!(journal.record_at(0) + record.encode().len() as u64 <= journal.record_at(1));
    assert!(header().encode().unwrap().len() as u64 <= journal.beat_place());
    assert_eq!(block(0).before.len(), SECTORS);
}

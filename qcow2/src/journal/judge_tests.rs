//! The verdicts that follow from phase, dirty bit, times and sectors.

use std::path::Path;
use std::sync::Arc;

use super::super::file::tests::at;
use super::super::record::tests::header;
use super::super::record::{Block, Header, sector_crcs};
use super::*;
use crate::storage::{Access, MemHost};

/// A host with an image of one block of zeros, a journal about it, and a record that turns the first sector to ones.
struct JudgeCase {
    host: MemHost,
    journal: Journal,
    file: Arc<dyn Storage>,
}

impl JudgeCase {
    fn new(guard: Guard) -> Self {
        let host = MemHost::new();
        host.add("/i", &[0; BLOCK as usize]).unwrap();
        let file = host.open(Path::new("/i"), Access::ReadWrite).unwrap();
        let targets = vec![Stamp::of(&host, Path::new("/i"), &*file).unwrap()];
        let boot = host.boot();
        let header = Header { guard, targets, boot, ..header() };
        let journal = Journal::create(&host, &at(&host, "/j"), header).unwrap();
        Self { host, journal, file }
    }

    fn record(&self, phase: Phase) -> Record {
        let mut bytes = vec![0; BLOCK as usize];
        bytes[..SECTOR].fill(1);
        let block = Block { number: 0, before: sector_crcs(&[0; BLOCK as usize]), bytes: bytes.into() };
        let now = Stamp::of(&self.host, Path::new("/i"), &*self.file).unwrap();
        Record {
            nonce: 42,
            sequence: 1,
            phase,
            watermark: 0,
            done: 0,
            stopped: false,
            known: vec![now.times],
            is_doubtful: false,
            boot: self.host.boot(),
            obsolete: None,
            target: 0,
            len: BLOCK,
            blocks: vec![block],
        }
    }

    fn judge(&self, last: Option<&Record>, dirty: bool) -> Judgement {
        let file = self.host.open(Path::new("/i"), Access::Read).unwrap();
        let stamps = vec![Stamp::of(&self.host, Path::new("/i"), &*file).unwrap()];
        let now = Now { stamps, files: vec![&*file], dirty: Some(dirty) };
        judge(&self.host, &self.journal, last, &now).unwrap()
    }

    fn verdict(&self, last: &Record, dirty: bool) -> JournalVerdict {
        self.judge(Some(last), dirty).verdict
    }

    /// As if the system had started again.
    fn restarted(mut self) -> Self {
        let (journal, _) =
            Journal::open(&self.host, &at(&self.host, "/j"), Access::ReadWrite).unwrap().unwrap();
        let host = crate::storage::sim::State::of(&self.host).host();
        self.file = host.open(Path::new("/i"), Access::ReadWrite).unwrap();
        (self.host, self.journal) = (host, journal);
        self
    }
}

const DIRTY_BIT: Guard = Guard::DirtyBit { lazy: false };

#[test]
fn the_dirty_bit_decides() {
    let case = JudgeCase::new(DIRTY_BIT);
    for (phase, dirty, verdict) in [
        (Phase::Arming, false, JournalVerdict::Over),
        (Phase::Arming, true, JournalVerdict::Unfinished),
        (Phase::Moving, true, JournalVerdict::Unfinished),
        (Phase::Moving, false, JournalVerdict::Foreign),
        (Phase::Switching, false, JournalVerdict::Foreign),
        (Phase::Done, false, JournalVerdict::Finished),
        (Phase::Done, true, JournalVerdict::Finished),
        // The image was released: the bit is somebody else's.
        (Phase::Removing, true, JournalVerdict::Over),
        (Phase::Removing, false, JournalVerdict::Over),
    ] {
        assert_eq!(case.verdict(&case.record(phase), dirty), verdict, "{phase:?} {dirty:?}");
    }
    assert_eq!(case.judge(None, true).verdict, JournalVerdict::Over);
}

#[test]
fn without_a_dirty_bit_times_and_sectors_decide() {
    let case = JudgeCase::new(Guard::Stamp);
    let mut record = case.record(Phase::Moving);
    assert_eq!(case.verdict(&record, false), JournalVerdict::Unfinished);
    record.stopped = true;
    assert_eq!(case.verdict(&record, false), JournalVerdict::Unfinished);
    case.file.write_all_at(&[1; SECTOR], 0).unwrap();
    assert_eq!(case.verdict(&record, false), JournalVerdict::Foreign, "written after a stop in good order");
    record.stopped = false;
    assert_eq!(case.verdict(&record, false), JournalVerdict::Unfinished, "killed as it wrote that");
    assert_eq!(case.verdict(&case.record(Phase::Done), false), JournalVerdict::Over);
    // Without a power cut no sector is torn.
    case.file.write_all_at(&[2], 100).unwrap();
    assert_eq!(case.verdict(&record, false), JournalVerdict::Foreign);
    let case = case.restarted();
    assert_eq!(case.verdict(&record, false), JournalVerdict::Unfinished);
    assert!(case.judge(Some(&record), false).replays);
}

#[test]
fn an_older_image_is_never_gone_on_with() {
    for guard in [Guard::Stamp, DIRTY_BIT] {
        for dirty in [false, true] {
            let case = JudgeCase::new(guard);
            let record = case.record(Phase::Moving);
            case.host.set_modified("/i", record.known[0].modified_ns - 1).unwrap();
            let judged = case.judge(Some(&record), dirty);
            assert_eq!(
                (judged.verdict, judged.replays),
                (JournalVerdict::PutBack, false),
                "{guard:?} {dirty}"
            );
            // Layers must not be removed if base does not hold their data.
            let removing = case.judge(Some(&case_record(&record, Phase::Removing)), dirty);
            assert!(removing.is_older && removing.verdict == JournalVerdict::Over);
        }
    }
}

fn case_record(record: &Record, phase: Phase) -> Record {
    Record { phase, ..record.clone() }
}

#[test]
fn what_is_not_certain_is_unsure() {
    // Somebody has changed the file's times or rights.
    let case = JudgeCase::new(DIRTY_BIT);
    let record = case.record(Phase::Moving);
    case.host.set_modified("/i", record.known[0].modified_ns).unwrap();
    let judged = case.judge(Some(&record), true);
    assert_eq!((judged.verdict, judged.replays, judged.may_be_newer), (JournalVerdict::Unsure, false, false));
    // Sectors that the record does not change differ: this is another state of the image.
    case.file.write_all_at(&[3], 2048).unwrap();
    case.host.set_modified("/i", record.known[0].modified_ns).unwrap();
    assert_eq!(case.verdict(&record, true), JournalVerdict::PutBack);
    case.host.set_modified("/i", record.known[0].modified_ns + 1).unwrap();
    assert_eq!(case.verdict(&record, true), JournalVerdict::Foreign);
}

/// The write that mended a torn header is noted, but it stays unknown whether the rest of the file is as the
/// work left it.
#[test]
fn an_image_that_was_made_whole_is_as_certain_as_it_was_before() {
    for (guard, dirty) in [(DIRTY_BIT, true), (Guard::Stamp, false)] {
        let case = JudgeCase::new(guard);
        let mut record = case.record(Phase::Moving);
        let judged = case.judge(Some(&record), dirty);
        assert!(judged.is_as_known && !judged.may_be_newer, "{guard:?}");
        record.is_doubtful = true;
        let judged = case.judge(Some(&record), dirty);
        assert_eq!((judged.verdict, judged.is_as_known), (JournalVerdict::Unfinished, false), "{guard:?}");
        assert!(judged.may_be_newer, "a proof that fails is no reason to write over it");
    }
}

#[test]
fn a_clock_that_was_set_back_makes_nothing_older() {
    let case = JudgeCase::new(Guard::Stamp);
    let mut record = case.record(Phase::Moving);
    let now = case.host.boot().unwrap();
    record.boot = Some(Boot { started_ns: now.started_ns + (1 << 40), ..now });
    assert_eq!(case.verdict(&record, false), JournalVerdict::Unfinished, "nobody has written");
    record.known[0] = Times { modified_ns: 1 << 50, changed_ns: 1 << 50, ..record.known[0] };
    let judged = case.judge(Some(&record), false);
    assert_eq!((judged.verdict, judged.may_be_newer), (JournalVerdict::Unsure, true));
}

#[test]
fn another_file_of_the_name_is_known_for_it() {
    let case = JudgeCase::new(DIRTY_BIT);
    let mut record = case.record(Phase::Moving);
    record.known[0].modified_ns += 1 << 40;
    case.host.add("/i", &[0; BLOCK as usize]).unwrap();
    assert_eq!(case.verdict(&record, true), JournalVerdict::Copied);
    assert_eq!(case.verdict(&record, false), JournalVerdict::Copied);
    let mut torn = vec![0; BLOCK as usize];
    torn[7] = 9;
    case.host.add("/i", &torn).unwrap();
    assert!(case.judge(Some(&record), true).replays, "torn where the record has changed it");
    torn[2048] = 9;
    case.host.add("/i", &torn).unwrap();
    assert!(!case.judge(Some(&record), true).replays);
}

#[test]
fn a_merge_that_had_not_begun_is_no_reason_to_write_over_newer_bytes() {
    let mut case = JudgeCase::new(DIRTY_BIT);
    let host = case.host.clone();
    assert_eq!(case.judge(None, false).verdict, JournalVerdict::Over);
    // The journal's last sign of life was long before.
    let header = Header { boot: host.boot(), ..case.journal.header().clone() };
    case.journal = Journal::create(&host, &at(&host, "/j"), header).unwrap();
    host.set_modified("/j", -1 << 60).unwrap();
    let late = case.journal.header().targets[0].times.changed_ns + (1 << 40);
    host.set_modified("/i", late).unwrap();
    assert_eq!(case.judge(None, false).verdict, JournalVerdict::Foreign);
    assert_eq!(case.verdict(&case.record(Phase::Arming), false), JournalVerdict::Over);
}

#[test]
fn what_is_written_at_once_before_the_dirty_bit_is_set_is_somebody_elses() {
    let case = JudgeCase::new(DIRTY_BIT);
    let record = case.record(Phase::Arming);
    assert_eq!(case.verdict(&record, false), JournalVerdict::Over);
    case.host.set_modified("/i", record.known[0].modified_ns + 1).unwrap();
    assert_eq!(case.verdict(&record, false), JournalVerdict::Foreign);
    assert_ne!(case.verdict(&record, true), JournalVerdict::Foreign, "the work itself has set the bit");
    // A power cut may have taken the bit.
    let case = case.restarted();
    assert_eq!(case.verdict(&record, false), JournalVerdict::Over);
}

//! A file under a journal against a plain one, and the order of what reaches the disk.

use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use super::file::tests::at;
use super::record::tests::header;
use super::record::{BLOCK, Phase};
use super::{Edit, Journal, Journaled, edit_headers, heal};
use crate::error::{Error, ErrorKind, Holder, Refusal};
use crate::storage::sim::{DiskOp, SimHost};
use crate::storage::{
    Access, CopyError, FileId, FileStat, Host, LockError, LockMode, MemFile, MemHost, OsHost, Owner, Storage,
};
use kit::Random;

fn journal(host: &dyn Host) -> Arc<Journal> {
    Arc::new(Journal::create(host, &at(host, "/journal"), header()).unwrap())
}

fn last(host: &dyn Host) -> super::record::Record {
    Journal::open(host, &at(host, "/journal"), Access::Read).unwrap().unwrap().1.unwrap()
}

#[test]
fn reads_see_what_a_plain_file_would_show() {
    for seed in 0..60 {
        let mut dice = Random::new(seed);
        let host = MemHost::new();
        let (plain, inner) = (MemFile::new(), Arc::new(MemFile::new()));
        let source = MemFile::new();
        source.write_all_at(&(0..60_000u32).map(|n| n as u8).collect::<Vec<_>>(), 100).unwrap();
        let start: Vec<u8> = (0..dice.below(30_000)).map(|_| dice.below(256) as u8).collect();
        plain.write_all_at(&start, 0).unwrap();
        inner.write_all_at(&start, 0).unwrap();
        let file = Journaled::new(inner.clone(), journal(&host), 0);
        for step in 0..40 {
            let (at, len) = (dice.below(50_000), dice.below(20_000));
            // Many ranges end where blocks do.
            let (at, len) = if dice.below(3) == 0 { (at & !4095, len & !4095) } else { (at, len) };
            let bytes = vec![step as u8 + 1; len as usize]; // never 0 or 0xee
            let kind = dice.below(6);
            for each in [&plain as &dyn Storage, &file] {
                match kind {
                    0 => each.write_all_at(&bytes, at).unwrap(),
                    1 => each.write_live(&bytes, at).unwrap(),
                    2 => each.write_zeroes(at, len).unwrap(),
                    3 => each.copy_from(&source, at / 2, at, len).unwrap(),
                    4 => each.set_len(at + len).unwrap(),
                    _ => each.sync().unwrap(),
                }
            }
            assert_eq!(
                file.size().unwrap(),
                plain.size().unwrap(),
                "seed {seed}, step {step}, kind {kind}, {at}+{len}"
            );
            let (at, mut want) = (dice.below(60_000), vec![0xee; 30_000]);
            let mut got = want.clone();
            assert_eq!(file.read_at(&mut got, at).unwrap(), plain.read_at(&mut want, at).unwrap());
            assert!(got == want, "seed {seed}, step {step}, kind {kind}");
            // Nothing but zeros may be passed over.
            let data = file.next_data(at).unwrap().map_or(u64::MAX, |data| data.start);
            let skipped = (data - at).min(want.len() as u64) as usize;
            assert!(want[..skipped].iter().all(|byte| matches!(byte, 0 | 0xee)), "seed {seed}, step {step}");
        }
        file.sync().unwrap();
        let (mut want, mut got) = (vec![0; 80_000], vec![0; 80_000]);
        let n = plain.read_at(&mut want, 0).unwrap();
        assert_eq!(inner.read_at(&mut got, 0).unwrap(), n);
        assert!(got == want, "seed {seed}");
    }
}

/// A block is kept with the file's bytes behind the written part. A file that was shortened has lost those
/// bytes.
#[test]
fn what_a_shorter_file_has_lost_does_not_come_back() {
    let host = MemHost::new();
    let file = Journaled::new(Arc::new(MemFile::new()), journal(&host), 0);
    file.write_all_at(&[9; 8192], 0).unwrap();
    file.sync().unwrap();
    file.write_live(&[1; 10], 0).unwrap();
    file.set_len(100).unwrap();
    file.set_len(8192).unwrap();
    let mut bytes = [7; 8192];
    assert_eq!(file.read_at(&mut bytes, 0).unwrap(), 8192);
    assert!(
        bytes[..10] == [1; 10] && bytes[10..100] == [9; 90] && bytes[100..].iter().all(|byte| *byte == 0)
    );
}

/// Old content is copied inside base. Once, a lock that was held meanwhile stopped the merge for ever.
#[test]
fn a_file_is_copied_from_itself_while_blocks_are_kept() {
    let host = MemHost::new();
    let file = Journaled::new(Arc::new(MemFile::new()), journal(&host), 0);
    file.write_all_at(&(0..20_000u32).map(|n| n as u8).collect::<Vec<_>>(), 0).unwrap();
    file.write_live(&[1; 10], 7).unwrap();
    let (sent, done) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        file.copy_from(&file, 5, 30_000, 512).unwrap();
        file.copy_from(&file, 100, 40_001, 9000).unwrap();
        let mut bytes = vec![0; 9000];
        file.read_at(&mut bytes, 40_001).unwrap();
        sent.send(bytes).unwrap();
    });
    let bytes = done.recv_timeout(std::time::Duration::from_secs(600)).unwrap();
    assert_eq!(bytes, (100..9100u32).map(|n| n as u8).collect::<Vec<_>>());
}

/// What was done to a file: `w` a write, `s` a barrier.
type Log = Arc<Mutex<Vec<String>>>;

/// A file that notes what is done to it.
#[derive(Debug)]
struct Noted(&'static str, Arc<dyn Storage>, Log);

impl Noted {
    fn note(&self, what: String) {
        self.2.lock().unwrap().push(format!("{} {what}", self.0));
    }
}

impl Storage for Noted {
    fn size(&self) -> io::Result<u64> {
        self.1.size()
    }
    fn read_at(&self, buf: &mut [u8], offset: u64) -> io::Result<usize> {
        self.1.read_at(buf, offset)
    }
    fn write_all_at(&self, buf: &[u8], offset: u64) -> io::Result<()> {
        // Signs of life depend on the clock, and are left out.
        if self.0 == "base" || buf.len() > 8 {
            self.note(if self.0 == "base" { format!("w {offset}+{}", buf.len()) } else { "w".into() });
        }
        self.1.write_all_at(buf, offset)
    }
    fn write_zeroes(&self, offset: u64, len: u64) -> io::Result<()> {
        self.note(format!("z {offset}+{len}"));
        self.1.write_zeroes(offset, len)
    }
    fn punch_hole(&self, offset: u64, len: u64) -> io::Result<()> {
        self.note(format!("p {offset}+{len}"));
        self.1.punch_hole(offset, len)
    }
    fn copy_from(
        &self,
        src: &dyn Storage,
        src_offset: u64,
        dst_offset: u64,
        len: u64,
    ) -> Result<(), CopyError> {
        self.note(format!("c {dst_offset}+{len}"));
        self.1.copy_from(src, src_offset, dst_offset, len)
    }
    fn set_len(&self, len: u64) -> io::Result<()> {
        self.1.set_len(len)
    }
    fn sync(&self) -> io::Result<()> {
        self.note("s".into());
        self.1.sync()
    }
    fn next_data(&self, offset: u64) -> io::Result<Option<Range<u64>>> {
        self.1.next_data(offset)
    }
    fn stat(&self) -> io::Result<FileStat> {
        self.1.stat()
    }
    fn lock(&self, mode: LockMode) -> Result<(), LockError> {
        self.1.lock(mode)
    }
    fn used_by_others(&self) -> io::Result<Option<LockMode>> {
        self.1.used_by_others()
    }
    fn drop_cache(&self) -> io::Result<()> {
        self.1.drop_cache()
    }
}

/// A host whose new files note what is done to them, and whose renames do not hide that.
#[derive(Debug)]
struct Noting(MemHost, Log);

impl Host for Noting {
    fn open(&self, path: &Path, access: Access) -> io::Result<Arc<dyn Storage>> {
        self.0.open(path, access)
    }
    fn create_new(&self, path: &Path) -> io::Result<Arc<dyn Storage>> {
        Ok(Arc::new(Noted("journal", self.0.create_new(path)?, self.1.clone())))
    }
    fn stat(&self, path: &Path) -> io::Result<FileStat> {
        self.0.stat(path)
    }
    fn canonicalize(&self, path: &Path) -> io::Result<PathBuf> {
        self.0.canonicalize(path)
    }
    fn list(&self, dir: &Path) -> io::Result<Vec<PathBuf>> {
        self.0.list(dir)
    }
    fn rename(&self, from: &Path, to: &Path) -> io::Result<()> {
        self.0.rename(from, to)
    }
    fn unlink(&self, path: &Path) -> io::Result<()> {
        self.0.unlink(path)
    }
    fn sync_dir(&self, dir: &Path) -> io::Result<()> {
        self.1.lock().unwrap().push("folder s".into());
        self.0.sync_dir(dir)
    }
    fn free_space(&self, path: &Path) -> io::Result<Option<u64>> {
        self.0.free_space(path)
    }
    fn holders(&self, id: FileId) -> Vec<Holder> {
        self.0.holders(id)
    }
}

#[test]
fn the_journal_is_durable_before_anything_is_written_in_place() {
    let log = Log::default();
    let host = Noting(MemHost::new(), log.clone());
    let journal = journal(&host);
    assert_eq!(log.lock().unwrap().split_off(0), ["journal w", "journal s", "folder s"]);
    let inner = MemFile::new();
    inner.write_all_at(&[9; 40_000], 0).unwrap();
    let file = Journaled::new(Arc::new(Noted("base", Arc::new(inner), log.clone())), journal, 1);
    file.write_live(&[1; 100], 0).unwrap();
    file.write_live(&[2; 100], 4096).unwrap();
    // Whole blocks of data go straight to the file, the ends wait.
    file.write_all_at(&[3; 10_000], 20_000).unwrap();
    file.write_zeroes(12_288, 4096).unwrap();
    file.punch_hole(16_000, 1000).unwrap();
    assert_eq!(log.lock().unwrap().split_off(0), ["base w 20480+8192", "base z 12288+4096"]);
    file.sync().unwrap();
    let expected = [
        "journal w",
        "journal s",
        "base w 0+512",
        "base w 4096+512",
        "base w 19968+512",
        "base w 28672+1536",
        "base s",
    ];
    assert_eq!(log.lock().unwrap().split_off(0), expected);
    // A barrier with nothing in memory writes no record.
    file.sync().unwrap();
    assert_eq!(log.lock().unwrap().split_off(0), ["base s"]);
    let record = last(&host);
    assert_eq!((record.target, record.len), (1, 40_000));
    assert_eq!(record.blocks.iter().map(|b| b.number).collect::<Vec<_>>(), [0, 1, 4, 7]);
    assert_eq!(record.blocks[0].bytes[..101], [&[1; 100][..], &[9]].concat());
    assert_eq!(record.blocks[0].before, super::record::sector_crcs(&[9; BLOCK as usize]));
}

#[test]
fn memory_is_bounded_by_barriers_of_its_own() {
    let host = MemHost::new();
    let file = Journaled::new(Arc::new(MemFile::new()), journal(&host), 0);
    let most = u64::from(header().max_blocks);
    for n in 0..most {
        file.write_live(&[1; 10], n * BLOCK + 7).unwrap();
    }
    assert_eq!(last(&host).blocks.len() as u64, most);
    assert_eq!(file.inner().size().unwrap(), (most - 1) * BLOCK + 17);
}

#[test]
fn a_record_heals_what_a_power_cut_has_torn() {
    let host = MemHost::new();
    let journal = journal(&host);
    let inner = Arc::new(MemFile::new());
    let file = Journaled::new(inner.clone(), journal.clone(), 0);
    file.write_live(&[1; 9000], 100).unwrap();
    file.sync().unwrap();
    inner.write_all_at(&[0xa5; 512], 4096).unwrap();
    inner.set_len(8000).unwrap();
    let record = last(&host);
    let again = Journaled::replaying(inner.clone(), journal, 0, record.blocks, record.len);
    let mut bytes = vec![0; 9100];
    assert_eq!((again.read_at(&mut bytes, 0).unwrap(), again.size().unwrap()), (9100, 9100));
    assert_eq!(bytes, [vec![0; 100], vec![1; 9000]].concat());
    assert_eq!(inner.size().unwrap(), 8000, "nothing is written before the first barrier");
    again.sync().unwrap();
    inner.read_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, [vec![0; 100], vec![1; 9000]].concat());
}

/// A second power cut may tear what is written again, and no record explains a torn sector that it does not change.
#[test]
fn only_the_torn_sectors_of_a_record_are_written_again() {
    let disk = SimHost::over(&MemHost::new());
    let journal = journal(&disk);
    let inner = disk.create_new(Path::new("/image")).unwrap();
    inner.write_all_at(&[7; 8192], 0).unwrap();
    let file = Journaled::new(inner.clone(), journal.clone(), 0);
    file.write_live(&[1; 1024], 1024).unwrap();
    file.sync().unwrap();
    inner.write_all_at(&[0xa5; 512], 1536).unwrap();
    let record = last(&disk);
    let again = Journaled::replaying(inner, journal, 0, record.blocks, record.len);
    let (before, image) = (disk.log().len(), disk.now().inode(Path::new("/image")));
    again.sync().unwrap();
    let is_image = |op: &DiskOp| op.changed_file().is_some() && op.changed_file() == image;
    let written: Vec<_> = disk.log().into_iter().skip(before).filter(is_image).collect();
    let DiskOp::Write { offset, bytes, .. } = &written[0] else { panic!("{written:?}") };
    assert_eq!((written.len(), *offset, bytes.as_slice()), (1, 1536, &[1; 512][..]));
}

/// A header of two sectors that is switched from one name to another.
fn torn(atomic: bool, tear: impl Fn(&mut Vec<u8>)) -> (MemHost, Vec<u8>, Vec<u8>) {
    let host = MemHost::new();
    let kind = crate::image::CreateOptions::new(1 << 20);
    crate::image::create(&host, Path::new("/i"), &kind).unwrap();
    let old = host.content("/i").unwrap();
    let file = host.open(Path::new("/i"), Access::ReadWrite).unwrap();
    file.lock(LockMode::Write).unwrap();
    let writes = vec![(24, vec![0, 0, 0, 0, 0, 0x20]), (600, vec![7; 300])];
    let edit = Edit { path: Path::new("/i"), file: &*file, writes, atomic };
    // The record as it is when the power goes.
    let path = super::heal::record(&host, &edit, None).unwrap().path().to_owned();
    let record = host.content(&path).unwrap();
    edit_headers(&host, &[edit], None).unwrap();
    assert!(host.content(&path).is_err(), "the record is gone when all is done");
    let new = host.content("/i").unwrap();
    assert_ne!(old, new);
    drop(file);
    let mut now = old.clone();
    tear(&mut now);
    host.add("/i", &now).unwrap();
    // The same file, as far as the record can tell.
    let mut header = super::record::Header::parse(&record).unwrap();
    header.targets[0].id = host.stat(Path::new("/i")).unwrap().id;
    let mut moved = record.clone();
    let bytes = header.encode().unwrap();
    moved[..bytes.len()].copy_from_slice(&bytes);
    host.add(&path, &moved).unwrap();
    heal(&host, Path::new("/i"), None, false).unwrap();
    assert!(host.content(&path).is_err(), "the record is gone");
    let healed = host.content("/i").unwrap();
    (host, healed, if atomic { old } else { new })
}

#[test]
fn a_torn_header_is_made_whole() {
    // A sector of garbage.
    let garbage = |bytes: &mut Vec<u8>| bytes[..512].fill(0xa5);
    let (_, healed, _) = torn(true, garbage);
    assert_eq!(healed[600..900], [7; 300]);
    // One of two sectors was written.
    let half = |bytes: &mut Vec<u8>| bytes[600..900].fill(7);
    let (_, healed, new) = torn(false, half);
    assert!(healed == new);
    // Nothing was written: the edit was not begun, and somebody may have used the old header since.
    let (_, healed, _) = torn(false, |_| {});
    assert_eq!(healed[600..900], [0; 300]);
    // The switch of an atomic edit was not written yet.
    let (_, healed, old) = torn(true, half);
    assert_eq!((&healed[..512], &healed[600..900]), (&old[..512], &[7; 300][..]));
}

/// The record of a mark of a layer that is in no chain any more.
#[test]
fn records_that_a_power_cut_has_left_are_swept() {
    let host = MemHost::new();
    let kind = crate::image::CreateOptions::new(1 << 20);
    for name in ["/whole", "/torn", "/held"] {
        crate::image::create(&host, Path::new(name), &kind).unwrap();
    }
    let whole = host.open(Path::new("/whole"), Access::ReadWrite).unwrap();
    let edit =
        Edit { path: Path::new("/whole"), file: &*whole, writes: vec![(24, vec![0; 6])], atomic: true };
    super::heal::record(&host, &edit, None).unwrap();
    whole.write_all_at(&[0xa5; 512], 0).unwrap();
    drop(whole);
    host.add("/.torn.qmerge-switch", b"").unwrap();
    host.add("/.held.qmerge-switch", b"qmerge").unwrap();
    let held = host.open(Path::new("/held"), Access::Read).unwrap();
    held.lock(LockMode::Read).unwrap();
    super::sweep(&host, &[PathBuf::from("/")], None, false).unwrap();
    assert_eq!(host.content("/whole").unwrap()[..4], *b"QFI\xfb", "made whole");
    let left: Vec<PathBuf> = host
        .list(Path::new("/"))
        .unwrap()
        .into_iter()
        .filter(|p| p.to_string_lossy().contains("qmerge"))
        .collect();
    assert_eq!(left, [PathBuf::from("/.held.qmerge-switch")]);
}

/// A file, torn as it is while a record of an edit of it lies in another folder; and that record.
fn torn_elsewhere(content: &[u8]) -> (MemHost, Vec<u8>, PathBuf) {
    let host = MemHost::new();
    host.add("/etc/conf", content).unwrap();
    let file = host.open(Path::new("/etc/conf"), Access::ReadWrite).unwrap();
    let writes = vec![(24, b"theirs".to_vec())];
    let edit = Edit { path: Path::new("/etc/conf"), file: &*file, writes, atomic: true };
    let made = super::heal::record(&host, &edit, None).unwrap().path().to_owned();
    file.write_all_at(&[0xa5; 512], 0).unwrap();
    host.add("/vm/image", b"").unwrap();
    let planted = PathBuf::from("/vm/.conf.qmerge-switch");
    host.add(&planted, &host.content(&made).unwrap()).unwrap();
    host.unlink(&made).unwrap();
    let torn = host.content("/etc/conf").unwrap();
    (host, torn, planted)
}

/// The bytes of an empty image.
fn image() -> Vec<u8> {
    let host = MemHost::new();
    crate::image::create(&host, Path::new("/i"), &crate::image::CreateOptions::new(1 << 20)).unwrap();
    host.content("/i").unwrap()
}

/// Somebody who may write in the folder of a chain, and knows a file elsewhere, makes a record about that.
#[test]
fn a_record_about_a_file_elsewhere_is_not_carried_out() {
    let (host, torn, planted) = torn_elsewhere(&image());
    super::sweep(&host, &[PathBuf::from("/vm")], None, false).unwrap();
    assert!(host.content("/etc/conf").unwrap() == torn);
    // In a folder that the caller names for journals, it is believed.
    super::sweep(&host, &[], Some(Path::new("/vm")), false).unwrap();
    assert_eq!(host.content("/etc/conf").unwrap()[24..30], *b"theirs");
    assert!(host.content(planted).is_err());
}

#[test]
fn a_record_makes_nothing_whole_that_is_no_image() {
    let (host, torn, _) = torn_elsewhere(&[b'#'; 4096]);
    super::sweep(&host, &[], Some(Path::new("/vm")), false).unwrap();
    assert!(host.content("/etc/conf").unwrap() == torn);
    // Nor is an edit carried out if sectors differ that the record does not change.
    let (host, _, _) = torn_elsewhere(&image());
    let file = host.open(Path::new("/etc/conf"), Access::ReadWrite).unwrap();
    file.write_all_at(b"else", 1024).unwrap();
    let other = host.content("/etc/conf").unwrap();
    super::sweep(&host, &[], Some(Path::new("/vm")), false).unwrap();
    assert!(host.content("/etc/conf").unwrap() == other);
}

/// Somebody who may write in the folder of an image, but not the image, puts a record or a journal there.
#[test]
fn what_a_stranger_says_is_left_alone() {
    let eve = |mode| Owner { user: 7, group: 7, mode };
    let (host, torn, planted) = torn_elsewhere(&image());
    host.give(&planted, eve(0o600)).unwrap();
    super::sweep(&host, &[], Some(Path::new("/vm")), false).unwrap();
    let path = Path::new("/etc/conf");
    let beside = Path::new("/etc/.conf.qmerge-switch");
    host.add(beside, &host.content(&planted).unwrap()).unwrap();
    host.give(beside, eve(0o644)).unwrap();
    super::sweep(&host, &[PathBuf::from("/etc")], None, false).unwrap();
    heal(&host, path, Some(Path::new("/vm")), false).unwrap();
    assert!(host.content(path).unwrap() == torn);
    assert!(host.content(beside).is_ok() && host.content(&planted).is_ok(), "nor is it removed");
    // It is in the way, and is named.
    let file = host.open(path, Access::ReadWrite).unwrap();
    let refused = super::place(&host, path, &*file, None, super::SWITCH).unwrap_err();
    assert!(
        matches!(&refused, Error::Refused { reason: Refusal::Stranger { file, user: 7 }, .. } if file == beside),
        "{refused}"
    );
    // It is believed if its owner may write the image.
    host.give(path, eve(0o600)).unwrap();
    heal(&host, path, None, false).unwrap();
    assert_eq!(host.content(path).unwrap()[24..30], *b"theirs");
}

/// A version 3 base whose header was torn, and that somebody may have touched since.
#[test]
fn a_header_that_is_made_whole_proves_nothing_of_the_rest() {
    let host = MemHost::new();
    let path = Path::new("/i");
    crate::image::create(&host, path, &crate::image::CreateOptions::new(1 << 20)).unwrap();
    let file = host.open(path, Access::ReadWrite).unwrap();
    let targets = vec![crate::stamp::Stamp::of(&host, path, &*file).unwrap()];
    let place = super::place(&host, path, &*file, None, super::JOURNAL).unwrap();
    let made = super::record::Header { targets, ..header() };
    let journal = Arc::new(Journal::create(&host, &place, made).unwrap());
    journal.watch(vec![file.clone()]);
    journal.note(Phase::Moving, 0, 0).unwrap();
    let image = Journaled::new(file.clone(), journal.clone(), 0);
    image.write_live(&[9], 300).unwrap();
    image.sync().unwrap();
    drop((image, journal));
    file.write_all_at(&[0xa5; 4], 0).unwrap();
    drop(file);
    let last = || Journal::open(&host, &place, Access::ReadWrite).unwrap().unwrap();
    assert!(!last().1.unwrap().is_doubtful);
    let before = host.content(path).unwrap();
    assert!(super::is_torn_header(&host, path, None).unwrap());
    assert!(host.content(path).unwrap() == before, "looking has written");
    assert!(heal(&host, path, None, false).unwrap());
    assert!(!super::is_torn_header(&host, path, None).unwrap());
    assert_eq!(host.content(path).unwrap()[..4], *b"QFI\xfb");
    let (journal, record) = last();
    assert!(record.unwrap().is_doubtful);
    // What is proved, or begun anew, is certain again.
    journal.note(Phase::Moving, 0, 0).unwrap();
    assert!(!last().1.unwrap().is_doubtful);
}

/// Something that no version of this program can have put there is named, and never removed.
#[test]
fn what_is_no_file_is_in_the_way() {
    for ending in [super::JOURNAL, super::SWITCH] {
        for new in ["", ".new"] {
            let host = MemHost::new();
            let path = Path::new("/vm/i");
            crate::image::create(&host, path, &crate::image::CreateOptions::new(1 << 20)).unwrap();
            let folder = format!("/vm/.i{ending}{new}");
            host.add(Path::new(&folder).join("theirs"), b"x").unwrap();
            let file = host.open(path, Access::ReadWrite).unwrap();
            heal(&host, path, None, false).unwrap();
            super::sweep(&host, &[PathBuf::from("/vm")], None, false).unwrap();
            let refused = super::place(&host, path, &*file, None, ending).unwrap_err();
            assert!(
                matches!(&refused, Error::Refused { reason: Refusal::InTheWay { file, what: "a directory" }, .. } if *file == Path::new(&folder)),
                "{refused}"
            );
            assert!(host.content(Path::new(&folder).join("theirs")).is_ok());
        }
    }
}

#[test]
fn a_torn_header_is_not_touched_while_somebody_holds_the_image() {
    let host = MemHost::new();
    let kind = crate::image::CreateOptions::new(1 << 20);
    crate::image::create(&host, Path::new("/i"), &kind).unwrap();
    let file = host.open(Path::new("/i"), Access::ReadWrite).unwrap();
    let edit = Edit { path: Path::new("/i"), file: &*file, writes: vec![(24, vec![0; 6])], atomic: true };
    super::heal::record(&host, &edit, None).unwrap();
    file.lock(LockMode::Write).unwrap();
    assert_eq!(heal(&host, Path::new("/i"), None, false).unwrap_err().kind(), ErrorKind::InUse);
}

#[test]
fn a_journal_is_for_nobody_else_to_read() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("j");
    let journal = Journal::create(&OsHost, &at(&OsHost, path.to_str().unwrap()), header()).unwrap();
    journal.note(Phase::Moving, 1, 1).unwrap();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
}

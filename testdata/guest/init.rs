//! The only process of a guest: writes records to its disks without pause, and keeps the list of those that were
//! acknowledged, here and on a disk of its own.
//!
//! Built alone, by `rustc -C target-feature=+crt-static`, and started by the kernel as `/init`. Commands come by
//! the serial line, one a line; every answer begins with `guest: `:
//!
//! | command | does |
//! | --- | --- |
//! | `go SEED BLOCKS DISK…` | writes at random among the first so many blocks of these disks (`vda`, `vdb`); says `seq N` now and then |
//! | `pause` | finishes the batch: `paused seq=N stall-ms=N`, the longest time that a write took |
//! | `verify` | reads every acknowledged block back: `verified blocks=N bad=N` |
//! | `replay` | takes what the journal says for acknowledged: `replayed blocks=N`; a later write may have followed |
//! | `quit` | ends the machine |

#[path = "../kit/src/random.rs"]
#[allow(dead_code, reason = "the tests use all of it")]
mod random;
mod record;

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::sync::mpsc::{self, Receiver};
use std::thread;
use std::time::{Duration, Instant};

use random::Random;
use record::{BLOCK, Block, Write, journal_block, journal_writes};

const MODULES: [&str; 6] =
    ["virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk"];
/// Writes between two flushes; as many may be lost by a crash, since nobody was told that they are safe.
const BATCH: u64 = 16;
const O_DIRECT: i32 = 0o40_000;
const O_DSYNC: i32 = 0o10_000;

fn main() {
    if let Err(error) = run() {
        println!("guest: failed: {error}");
    }
    system::end();
}

fn run() -> io::Result<()> {
    system::mount_dev()?;
    system::raw_console()?;
    for name in MODULES {
        system::load_module(&File::open(format!("/{name}.ko"))?)
            .map_err(|e| io::Error::new(e.kind(), format!("{name}: {e}")))?;
    }
    let mut guest = Guest {
        disks: vec![open("vda", 0)?, open("vdb", 0)?],
        journal: open("vdc", O_DSYNC)?.0,
        journal_blocks: 0,
        table: BTreeMap::new(),
        replayed: false,
        seq: 0,
        random: Random::new(0),
        blocks: 0,
        longest: Duration::ZERO,
    };
    let (send, commands) = mpsc::channel();
    thread::spawn(move || {
        for line in io::stdin().lock().lines() {
            if !line.is_ok_and(|line| send.send(line).is_ok()) {
                return;
            }
        }
    });
    println!("guest: ready");
    while let Ok(command) = commands.recv() {
        let words: Vec<&str> = command.split_whitespace().collect();
        match words.as_slice() {
            ["go", seed, blocks, disks @ ..] => {
                guest.random = Random::new(seed.parse().map_err(io::Error::other)?);
                guest.blocks = blocks.parse().map_err(io::Error::other)?;
                let disks: Vec<usize> = disks.iter().map(|d| usize::from(*d == "vdb")).collect();
                guest.write_until_paused(&disks, &commands)?;
            }
            ["verify"] => guest.verify()?,
            ["replay"] => guest.replay()?,
            ["quit"] => return Ok(()),
            other => return Err(io::Error::other(format!("unknown command {other:?}"))),
        }
    }
    Ok(())
}

struct Guest {
    /// Each with its number of blocks.
    disks: Vec<(File, u64)>,
    journal: File,
    journal_blocks: u64,
    /// The last acknowledged write of each block of each disk.
    table: BTreeMap<(u64, u64), u64>,
    /// Whether the table comes from the journal, which the machine may have outlived by a few writes.
    replayed: bool,
    seq: u64,
    random: Random,
    /// How many of each disk are written.
    blocks: u64,
    longest: Duration,
}

impl Guest {
    fn write_until_paused(&mut self, disks: &[usize], commands: &Receiver<String>) -> io::Result<()> {
        while commands.try_recv().is_err() {
            let mut batch = Vec::new();
            for _ in 0..BATCH {
                let disk = self.random.pick(disks);
                let (file, blocks) = &self.disks[disk];
                let lba = self.random.below(self.blocks.min(*blocks));
                self.seq += 1;
                let write = Write { disk: disk as u64, lba, seq: self.seq };
                let start = Instant::now();
                file.write_all_at(&write.block().0, lba * BLOCK as u64)?;
                self.longest = self.longest.max(start.elapsed());
                batch.push(write);
            }
            let start = Instant::now();
            for disk in disks {
                self.disks[*disk].0.sync_data()?;
            }
            self.longest = self.longest.max(start.elapsed());
            self.acknowledge(&batch)?;
            if self.seq % (BATCH * 4) == 0 {
                println!("guest: seq {}", self.seq);
            }
        }
        println!("guest: paused seq={} stall-ms={}", self.seq, self.longest.as_millis());
        self.longest = Duration::ZERO;
        Ok(())
    }

    fn acknowledge(&mut self, batch: &[Write]) -> io::Result<()> {
        let at = self.journal_blocks * BLOCK as u64;
        self.journal.write_all_at(&journal_block(self.journal_blocks, batch).0, at)?;
        self.journal_blocks += 1;
        self.table.extend(batch.iter().map(|w| ((w.disk, w.lba), w.seq)));
        Ok(())
    }

    fn verify(&self) -> io::Result<()> {
        let mut bad = 0;
        let mut block = Block([0; BLOCK]);
        for (&(disk, lba), &seq) in &self.table {
            let (file, _) = &self.disks[disk as usize];
            file.read_exact_at(&mut block.0, lba * BLOCK as u64)?;
            let found = Write::of(&block.0);
            let right = match found {
                Some(found) if self.replayed => (found.disk, found.lba) == (disk, lba) && found.seq >= seq,
                found => found == Some(Write { disk, lba, seq }),
            };
            if !right {
                bad += 1;
                println!("guest: disk {disk} block {lba}: {found:?} in place of write {seq}");
            }
        }
        println!("guest: verified blocks={} bad={bad}", self.table.len());
        Ok(())
    }

    fn replay(&mut self) -> io::Result<()> {
        let mut block = Block([0; BLOCK]);
        loop {
            self.journal.read_exact_at(&mut block.0, self.journal_blocks * BLOCK as u64)?;
            let Some(writes) = journal_writes(self.journal_blocks, &block.0) else { break };
            self.journal_blocks += 1;
            for write in writes {
                self.table.insert((write.disk, write.lba), write.seq);
                // Those that followed unseen are at most a batch.
                self.seq = write.seq + BATCH;
            }
        }
        self.replayed = true;
        println!("guest: replayed blocks={}", self.table.len());
        Ok(())
    }
}

/// A disk, past the guest's cache, and its number of blocks.
fn open(name: &str, flags: i32) -> io::Result<(File, u64)> {
    let path = format!("/dev/{name}");
    let start = Instant::now();
    // The driver makes the device a moment after its module is loaded.
    let file = loop {
        match OpenOptions::new().read(true).write(true).custom_flags(O_DIRECT | flags).open(&path) {
            Err(error) if start.elapsed() > Duration::from_secs(60) => {
                return Err(io::Error::new(error.kind(), format!("{path}: {error}")));
            }
            Err(_) => thread::sleep(Duration::from_millis(10)),
            Ok(file) => break file,
        }
    };
    let bytes = io::Seek::seek(&mut &file, io::SeekFrom::End(0))?;
    Ok((file, bytes / BLOCK as u64))
}

/// The system calls that the standard library lacks.
mod system {
    use super::{File, fs, io};
    use std::ffi::{c_char, c_int, c_long, c_ulong, c_void};
    use std::os::fd::AsRawFd;

    // Of the C library that the standard library links anyway: a crate for five calls would need cargo and a lock
    // file of its own here.
    unsafe extern "C" {
        fn mount(
            source: *const c_char,
            target: *const c_char,
            kind: *const c_char,
            flags: c_ulong,
            data: *const c_void,
        ) -> c_int;
        fn syscall(number: c_long, ...) -> c_long;
        fn reboot(command: c_int) -> c_int;
        fn tcgetattr(file: c_int, termios: *mut Termios) -> c_int;
        fn cfmakeraw(termios: *mut Termios);
        fn tcsetattr(file: c_int, when: c_int, termios: *const Termios) -> c_int;
    }

    /// Room for the C library's structure, which has 60 bytes; nothing here looks into it.
    #[repr(C, align(8))]
    struct Termios([u8; 256]);

    const FINIT_MODULE: c_long = 313;
    const RB_AUTOBOOT: c_int = 0x0123_4567;

    pub fn mount_dev() -> io::Result<()> {
        fs::create_dir_all("/dev")?;
        let name = c"devtmpfs".as_ptr();
        // SAFETY: the strings end with a zero byte and live long enough; no data is passed.
        check(unsafe { mount(name, c"/dev".as_ptr(), name, 0, std::ptr::null()) }.into())
    }

    /// No echo, no translation of line ends: what comes back on the serial line are answers alone.
    pub fn raw_console() -> io::Result<()> {
        let mut termios = Termios([0; 256]);
        // SAFETY: the structure is larger than the one that the C library fills in.
        check(unsafe { tcgetattr(0, &mut termios) }.into())?;
        // SAFETY: it was filled in by the call before.
        unsafe { cfmakeraw(&mut termios) };
        // SAFETY: as before.
        check(unsafe { tcsetattr(0, 0, &termios) }.into())
    }

    pub fn load_module(file: &File) -> io::Result<()> {
        // SAFETY: an open file, an empty string of parameters, no flags: as finit_module(2) wants them.
        check(unsafe { syscall(FINIT_MODULE, file.as_raw_fd(), c"".as_ptr(), 0) })
    }

    pub fn end() {
        // SAFETY: takes a number; it returns only if it fails, and then the kernel panics, which ends QEMU too.
        unsafe { reboot(RB_AUTOBOOT) };
    }

    fn check(result: c_long) -> io::Result<()> {
        if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }
}

//! A guest's disk traffic: writes through NBD that know what was acknowledged.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use kit::Random;

pub(crate) const BLOCK: usize = 4096;

/// Writes blocks at random places of an export until it is stopped.
pub(crate) struct Writer {
    stop: Arc<AtomicBool>,
    acknowledged: Arc<AtomicU64>,
    thread: JoinHandle<Vec<u64>>,
}

impl Writer {
    /// Begins to write to the export `x` of the server at this socket, whose size is `size` bytes.
    pub(crate) fn start(socket: &Path, size: usize) -> Self {
        let mut stream = UnixStream::connect(socket).unwrap();
        shake_hands(&mut stream);
        let stop = Arc::new(AtomicBool::new(false));
        let acknowledged = Arc::new(AtomicU64::new(0));
        let (ended, count) = (Arc::clone(&stop), Arc::clone(&acknowledged));
        let thread = std::thread::spawn(move || {
            let mut last = vec![0; size / BLOCK];
            let mut random = Random::new(1);
            let mut sequence = 0;
            while !ended.load(Ordering::Relaxed) {
                let block = random.below(last.len() as u64) as usize;
                sequence += 1;
                request(&mut stream, 1, sequence, block, &content(block, sequence));
                last[block] = sequence;
                count.store(sequence, Ordering::Relaxed);
                if sequence % 64 == 0 {
                    request(&mut stream, 3, sequence, 0, &[]);
                }
            }
            last
        });
        Self { stop, acknowledged, thread }
    }

    /// Waits until so many more writes have been acknowledged.
    pub(crate) fn wait_for(&self, more: u64) {
        let wanted = self.acknowledged.load(Ordering::Relaxed) + more;
        while self.acknowledged.load(Ordering::Relaxed) < wanted {
            assert!(!self.thread.is_finished(), "the writer has failed");
            std::thread::sleep(std::time::Duration::from_millis(2));
        }
    }

    /// Stops, and lays what was acknowledged over what the disk held before.
    pub(crate) fn stop(self, disk: &mut [u8]) -> u64 {
        self.stop.store(true, Ordering::Relaxed);
        let last = self.thread.join().unwrap();
        for (block, sequence) in last.into_iter().enumerate().filter(|(_, sequence)| *sequence > 0) {
            disk[block * BLOCK..(block + 1) * BLOCK].copy_from_slice(&content(block, sequence));
        }
        self.acknowledged.load(Ordering::Relaxed)
    }
}

fn content(block: usize, sequence: u64) -> Vec<u8> {
    let mut content = [block as u64, sequence].map(u64::to_be_bytes).concat();
    content.resize(BLOCK, sequence as u8 | 1);
    content
}

fn shake_hands(stream: &mut UnixStream) {
    stream.read_exact(&mut [0; 18]).unwrap();
    let mut hello = 1u32.to_be_bytes().to_vec();
    hello.extend(b"IHAVEOPT");
    for number in [7, 7, 1] {
        hello.extend(u32::to_be_bytes(number));
    }
    hello.extend(b"x\0\0");
    stream.write_all(&hello).unwrap();
    loop {
        let mut reply = [0; 20];
        stream.read_exact(&mut reply).unwrap();
        let number = |at: usize| u32::from_be_bytes([reply[at], reply[at + 1], reply[at + 2], reply[at + 3]]);
        let (kind, length) = (number(12), number(16));
        stream.read_exact(&mut vec![0; length as usize]).unwrap();
        assert!(kind == 1 || kind == 3, "the server refuses the export");
        if kind == 1 {
            return;
        }
    }
}

/// Sends a request, and waits until it is acknowledged.
fn request(stream: &mut UnixStream, command: u16, cookie: u64, block: usize, data: &[u8]) {
    let mut request = 0x2560_9513_u32.to_be_bytes().to_vec();
    request.extend([0, 0]);
    request.extend(command.to_be_bytes());
    request.extend(cookie.to_be_bytes());
    request.extend(((block * BLOCK) as u64).to_be_bytes());
    request.extend((data.len() as u32).to_be_bytes());
    request.extend(data);
    stream.write_all(&request).unwrap();
    let mut reply = [0; 16];
    stream.read_exact(&mut reply).unwrap();
    assert_eq!(reply[4..8], [0; 4], "the write failed");
    assert_eq!(reply[8..], cookie.to_be_bytes());
}

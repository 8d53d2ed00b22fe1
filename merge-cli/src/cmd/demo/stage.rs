//! The files of the demonstration.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use qcow2::chain::{OpenOptions, Policy};
use qcow2::convert::{Flatten, FlattenOptions};
use qcow2::error::FileOp;
use qcow2::image::{ImageFormat, Qcow2};
use qcow2::merge::Silent;
use qcow2::storage::{Access, Host, OsHost};
use qcow2::{Error, Refusal, Result};

/// Everything is written in pieces of this many bytes: a cluster of the overlays.
pub(super) const CLUSTER: u64 = 64 << 10;

/// A piece of the disk in hundredths: where it starts, and where it ends.
type Piece = (u64, u64);

/// Refuses a disk whose files would not fit into the folder.
pub(super) fn room(folder: &Path, size: u64) -> Result<()> {
    let free = OsHost.free_space(folder).map_err(|e| Error::io(folder, FileOp::FreeSpace, None, e))?;
    // Half of the disk in base, some in each overlay, and all of it in the copy.
    let needed = size.saturating_add(size / 2);
    match free {
        Some(available) if available < needed => {
            Err(Error::NoSpace { path: folder.join("base.raw"), needed, available })
        }
        _ => Ok(()),
    }
}

/// Makes `base.raw <- a.qcow2 <- b.qcow2 <- c.qcow2`, each with data that hides some of what lies below.
pub(super) fn build(size: u64, cancel: &AtomicBool) -> Result<()> {
    write("base.raw", size, 1, &[(0, 40), (60, 70)])?;
    overlay("a.qcow2", ("base.raw", "raw"), size, 2, &[(5, 15), (40, 45)], cancel)?;
    overlay("b.qcow2", ("a.qcow2", "qcow2"), size, 3, &[(10, 20), (80, 85)], cancel)?;
    overlay("c.qcow2", ("b.qcow2", "qcow2"), size, 4, &[(12, 14), (41, 43), (90, 91)], cancel)
}

/// Writes what the guest sees through `active` into one raw file.
pub(super) fn copy(active: &str, output: &str, cancel: &AtomicBool) -> Result<()> {
    flatten(active, output, ImageFormat::Raw, cancel)
}

/// A raw file of `size` bytes that holds noise in some pieces, and holes elsewhere.
fn write(name: &str, size: u64, seed: u64, pieces: &[Piece]) -> Result<()> {
    let path = Path::new(name);
    let failed = |op, offset| move |e| Error::io(path, op, offset, e);
    let file = File::create_new(path).map_err(failed(FileOp::Create, None))?;
    file.set_len(size).map_err(failed(FileOp::Grow, Some(size)))?;
    let mut noise = Noise(seed);
    for &(from, to) in pieces {
        let place = |hundredths: u64| size / CLUSTER * hundredths / 100 * CLUSTER;
        for at in (place(from)..place(to).max(place(from) + CLUSTER)).step_by(CLUSTER as usize) {
            file.write_all_at(&noise.cluster(), at).map_err(failed(FileOp::Write, Some(at)))?;
        }
    }
    Ok(())
}

/// An overlay that holds noise in some pieces: a raw file with holes as a qcow2 image, which is then given
/// a backing file to show through where there is no data.
fn overlay(
    name: &str,
    (backing, format): (&str, &str),
    size: u64,
    seed: u64,
    pieces: &[Piece],
    cancel: &AtomicBool,
) -> Result<()> {
    let raw = format!("{name}.tmp");
    write(&raw, size, seed, pieces)?;
    flatten(&raw, name, ImageFormat::Qcow2, cancel)?;
    fs::remove_file(&raw).map_err(|e| Error::io(Path::new(&raw), FileOp::Remove, None, e))?;

    let path = Path::new(name);
    let io = |op| move |e: io::Error| Error::io(path, op, Some(0), e);
    let file = OsHost.open(path, Access::ReadWrite).map_err(io(FileOp::Open))?;
    let mut cluster0 = Qcow2::read_cluster0(path, &*file)?;
    let bytes = cluster0.set_backing(backing.as_bytes(), format).and_then(|()| cluster0.encode());
    let bytes = bytes.map_err(|e| Error::refused(path, Refusal::Header { why: e }))?;
    file.write_all_at(&bytes, 0).map_err(io(FileOp::Write))?;
    file.sync().map_err(|e| Error::barrier(path, e))
}

fn flatten(active: &str, output: &str, to: ImageFormat, cancel: &AtomicBool) -> Result<()> {
    let open = OpenOptions::new(Policy::local_files());
    let options = FlattenOptions::new(open, output.into(), to);
    Flatten::prepare(Arc::new(OsHost), Path::new(active), &options, cancel)?
        .execute(&Silent, cancel)
        .map(drop)
}

/// Bytes without a pattern, the same in every run (xorshift64).
struct Noise(u64);

impl Noise {
    fn cluster(&mut self) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(CLUSTER as usize);
        while bytes.len() < CLUSTER as usize {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            bytes.extend_from_slice(&self.0.to_be_bytes());
        }
        bytes
    }
}

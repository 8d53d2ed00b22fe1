//! Which processes have a file open, as far as `/proc` tells.

use std::fs;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;
use std::time::{Duration, Instant};

use crate::error::Holder;

use super::FileId;

/// The longest time that a search takes. The answer only makes a message more helpful.
const PATIENCE: Duration = Duration::from_secs(2);

/// The longest command line that is reported, in bytes.
const COMMAND_LINE: usize = 64 << 10;

/// The processes other than this one that have the file open. Processes of other users are left out
/// where the system does not let us look.
pub(super) fn holders(id: FileId) -> Vec<Holder> {
    let deadline = Instant::now() + PATIENCE;
    let mut found = Vec::new();
    let Ok(processes) = fs::read_dir("/proc") else { return found };
    for process in processes.flatten() {
        let Some(pid) = process.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        if Instant::now() > deadline {
            break;
        }
        if pid != std::process::id() && has_open(&process.path(), id) {
            found.push(describe(pid, &process.path()));
        }
    }
    found.sort_by_key(|h| h.pid);
    found
}

/// The identity of a file, from what the system says about it. A block device has one, whatever node leads to it.
pub(super) fn id_of(meta: &fs::Metadata) -> FileId {
    if meta.file_type().is_block_device() {
        return FileId { device: 0, inode: meta.rdev() };
    }
    FileId { device: meta.dev(), inode: meta.ino() }
}

fn has_open(process: &Path, id: FileId) -> bool {
    let Ok(descriptors) = fs::read_dir(process.join("fd")) else { return false };
    descriptors.flatten().any(|d| {
        // Sockets and pipes have no absolute name: most descriptors need no second look.
        fs::read_link(d.path()).is_ok_and(|name| name.is_absolute())
            && fs::metadata(d.path()).is_ok_and(|meta| id_of(&meta) == id)
    })
}

fn describe(pid: u32, process: &Path) -> Holder {
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let name = fs::read(process.join("comm")).unwrap_or_default();
    let mut line = fs::read(process.join("cmdline")).unwrap_or_default();
    line.truncate(COMMAND_LINE);
    let line = line.strip_suffix(b"\0").unwrap_or(&line);
    let command_line = if line.is_empty() { Vec::new() } else { line.split(|&b| b == 0).map(text).collect() };
    let name = whole_name(name.trim_ascii_end(), process, line);
    Holder { pid, name: text(&name), command_line }
}

/// The name of a process, of which the kernel keeps 15 bytes: its program's name, where that begins alike.
fn whole_name(kept: &[u8], process: &Path, line: &[u8]) -> Vec<u8> {
    let exe = fs::read_link(process.join("exe")).map(|exe| exe.into_os_string().into_encoded_bytes());
    let called = line.split(|&byte| byte == 0).next().unwrap_or_default();
    let base = |path: &[u8]| path.rsplit(|&byte| byte == b'/').next().unwrap_or_default().to_vec();
    let mut names = [base(called), base(&exe.unwrap_or_default())].into_iter();
    names.find(|name| kept.len() >= 15 && name.starts_with(kept)).unwrap_or_else(|| kept.to_vec())
}

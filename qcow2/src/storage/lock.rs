//! Byte locks that QEMU understands.
//!
//! QEMU guards an image file with *open file description* locks on single bytes: byte 100+i says
//! that the holder uses permission i, byte 200+i that it does not share permission i with others. The
//! permissions are 0 consistent read, 1 write, 2 write unchanged, 3 resize. All bytes are locked
//! *shared*; a conflict is found afterwards, by asking for each byte that matters whether an exclusive
//! lock would be possible: 200+i for every permission used, 100+i for every permission not shared.
//!
//! The locks belong to the open file description, not to the process: a second open of the same file
//! by the same process conflicts like any other, and closing it does not drop the locks of the first.
//! They are advisory, end with the process, and lie on bytes that need not exist.

use std::fs::File;
use std::io;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, fcntl};
use nix::libc;

use super::{LockError, LockMode};

/// The bytes that a mode holds.
///
/// The writer also holds byte 200 (it does not share consistent read), which keeps out even readers
/// that allow writers (`qemu-img -U`): what they would see in the middle of a merge is not a disk.
const fn held(mode: LockMode) -> &'static [u64] {
    match mode {
        LockMode::Read => &[100, 201, 203],
        LockMode::Write => &[100, 101, 103, 200, 201, 203],
    }
}

/// The bytes that nobody else may hold in a mode.
const fn tested(mode: LockMode) -> &'static [u64] {
    match mode {
        LockMode::Read => &[101, 103, 200],
        LockMode::Write => &[100, 101, 103, 200, 201, 203],
    }
}

/// Takes the locks of `mode` on `file`, where those of `before` are held already. Never waits. After a
/// failure exactly the locks of `before` are held.
pub(super) fn acquire(file: &File, before: Option<LockMode>, mode: LockMode) -> Result<(), LockError> {
    let had = before.map_or(&[][..], held);
    let mut taken = Vec::new();
    let result = take(file, had, mode, &mut taken);
    if result.is_err() {
        give_back(file, &taken);
    }
    result
}

/// Gives the locks of `mode` back. Closing the file is not enough: a process that another thread is
/// just starting may share the open file description until it runs its own program.
pub(super) fn release(file: &File, mode: LockMode) {
    give_back(file, held(mode));
}

fn give_back(file: &File, bytes: &[u64]) {
    for &byte in bytes {
        // Nothing better can be done if the system refuses: closing the file drops the lock too.
        let _ = set(file, byte, libc::F_UNLCK);
    }
}

fn take(file: &File, had: &[u64], mode: LockMode, taken: &mut Vec<u64>) -> Result<(), LockError> {
    for &byte in held(mode) {
        if had.contains(&byte) {
            continue;
        }
        match set(file, byte, libc::F_RDLCK) {
            Ok(()) => taken.push(byte),
            // Somebody who does not follow QEMU's rules holds an exclusive lock.
            Err(Errno::EAGAIN | Errno::EACCES) => return Err(LockError::Held { byte }),
            Err(e) => return Err(LockError::Io(e.into())),
        }
    }
    for &byte in tested(mode) {
        if foreign(file, byte)? {
            return Err(LockError::Held { byte });
        }
    }
    Ok(())
}

/// How others use the file: whether anybody else holds a lock for writing or resizing, or else any lock.
pub(super) fn foreign_mode(file: &File) -> io::Result<Option<LockMode>> {
    for byte in [101, 103] {
        if foreign(file, byte)? {
            return Ok(Some(LockMode::Write));
        }
    }
    for byte in [100, 200, 201, 203] {
        if foreign(file, byte)? {
            return Ok(Some(LockMode::Read));
        }
    }
    Ok(None)
}

/// Whether the system's answer means that the file system has no such locks: NFS without its lock service, some FUSE
/// file systems, kernels without locks of open file descriptions. QEMU goes on without locks there.
pub(super) fn has_none(error: &io::Error) -> bool {
    const NONE: [Errno; 4] = [Errno::ENOLCK, Errno::EOPNOTSUPP, Errno::ENOSYS, Errno::EINVAL];
    error.raw_os_error().is_some_and(|code| NONE.contains(&Errno::from_raw(code)))
}

fn set(file: &File, byte: u64, kind: i32) -> Result<(), Errno> {
    let range = one_byte(byte, kind)?;
    loop {
        match fcntl(file, FcntlArg::F_OFD_SETLK(&range)) {
            Err(Errno::EINTR) => {}
            other => return other.map(|_| ()),
        }
    }
}

/// Whether another open file description holds a lock on the byte.
fn foreign(file: &File, byte: u64) -> io::Result<bool> {
    loop {
        let mut range = one_byte(byte, libc::F_WRLCK)?;
        match fcntl(file, FcntlArg::F_OFD_GETLK(&mut range)) {
            Err(Errno::EINTR) => {}
            Err(e) => return Err(e.into()),
            Ok(_) => return Ok(i32::from(range.l_type) != libc::F_UNLCK),
        }
    }
}

fn one_byte(byte: u64, kind: i32) -> Result<libc::flock, Errno> {
    Ok(libc::flock {
        l_type: kind.try_into().map_err(|_| Errno::EINVAL)?,
        l_whence: libc::SEEK_SET.try_into().map_err(|_| Errno::EINVAL)?,
        l_start: byte.try_into().map_err(|_| Errno::EINVAL)?,
        l_len: 1,
        l_pid: 0,
    })
}

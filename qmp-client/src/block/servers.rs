//! Finds the NBD server that a QEMU already runs, through the system's list of its sockets.
//!
//! A QEMU runs at most one NBD server, and QMP does not tell where it listens. A merge must know: base is
//! flushed through a server, and if one runs, no second can be started.

use std::fs;
use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::block::nbd::GREETING;

/// How long to wait for a server's greeting, which it sends at once.
const GREETS_WITHIN: Duration = Duration::from_secs(1);
/// The mark of a listening socket in the system's table (Linux, `__SO_ACCEPTCON`).
const LISTENS: &str = "00010000";

/// The socket of the NBD server that the process runs; `None` if it runs none on a UNIX socket, or if its
/// sockets cannot be read.
///
/// Only sockets that may belong to such a server by the process's command line are tried: a connection to
/// another one, a guest agent's for instance, would disturb it.
pub fn nbd_server(process: u32) -> Option<PathBuf> {
    let arguments = fs::read(format!("/proc/{process}/cmdline")).ok()?;
    let arguments: Vec<String> =
        arguments.split(|&byte| byte == 0).map(|word| String::from_utf8_lossy(word).into_owned()).collect();
    let folder = fs::read_link(format!("/proc/{process}/cwd")).ok()?;
    let named = listening(process)?.into_iter().filter(|name| may_be_nbd(&arguments, name));
    named.map(|name| folder.join(name)).find(|path| greets(path))
}

/// The names of the UNIX sockets on which a process listens, as it has bound them.
fn listening(process: u32) -> Option<Vec<String>> {
    let mut inodes = Vec::new();
    for entry in fs::read_dir(format!("/proc/{process}/fd")).ok()?.flatten() {
        let Ok(target) = fs::read_link(entry.path()) else { continue };
        let inode = target.to_str().and_then(|t| t.strip_prefix("socket:[")?.strip_suffix(']'));
        inodes.extend(inode.map(str::to_owned));
    }
    let table = fs::read_to_string(format!("/proc/{process}/net/unix")).ok()?;
    Some(table.lines().filter_map(|line| bound(line, &inodes)).collect())
}

/// The name in a line of the table, if it is that of a listening socket with one of these inodes.
fn bound(line: &str, inodes: &[String]) -> Option<String> {
    // Number, references, protocol, flags, type, state, inode, name; a name may hold spaces.
    let mut fields = line.splitn(8, ' ').map(str::trim);
    let flags = fields.nth(3)?;
    let rest = fields.nth(2)?.to_owned() + " " + fields.next().unwrap_or_default();
    let (inode, name) = rest.trim_start().split_once(' ')?;
    let name = name.trim_start();
    let is_meant = flags == LISTENS && inodes.iter().any(|known| known == inode);
    // Names without a file begin with an @.
    (is_meant && !name.is_empty() && !name.starts_with('@')).then(|| name.to_owned())
}

/// Whether a socket of this name may belong to an NBD server: the command line says so, or does not name it, as
/// where the server was started through a monitor.
fn may_be_nbd(arguments: &[String], name: &str) -> bool {
    let names_it = |word: &String| word.contains(name) || word.replace(",,", ",").contains(name);
    let mut others = arguments.iter().enumerate().filter(|(_, word)| names_it(word));
    others.all(|(place, word)| {
        let before = place.checked_sub(1).and_then(|before| arguments.get(before));
        word.trim_start_matches('-').starts_with("nbd-server=")
            || before.is_some_and(|before| before.trim_start_matches('-') == "nbd-server")
    })
}

fn greets(path: &Path) -> bool {
    let greeting = || {
        let mut stream = UnixStream::connect(path).ok()?;
        stream.set_read_timeout(Some(GREETS_WITHIN)).ok()?;
        let mut word = [0; 8];
        stream.read_exact(&mut word).ok()?;
        Some(u64::from_be_bytes(word))
    };
    greeting() == Some(GREETING)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;
    use std::os::unix::net::UnixListener;

    #[test]
    fn the_server_is_told_from_other_sockets_of_the_process() {
        let folder = tempfile::tempdir().unwrap();
        let (silent, nbd) = (folder.path().join("a silent one"), folder.path().join("an nbd one"));
        let _silent = UnixListener::bind(&silent).unwrap();
        let server = UnixListener::bind(&nbd).unwrap();
        let names = listening(std::process::id()).unwrap();
        for path in [&silent, &nbd] {
            assert!(names.iter().any(|name| Path::new(name) == path), "{names:?}");
        }
        std::thread::scope(|scope| {
            scope.spawn(|| server.accept().unwrap().0.write_all(b"NBDMAGICIHAVEOPT").unwrap());
            assert!(greets(&nbd));
        });
        assert!(!greets(&silent) && !greets(folder.path()));
    }

    #[test]
    fn sockets_that_the_command_line_gives_to_something_else_are_left_alone() {
        let words = |line: &str| line.split(' ').map(str::to_owned).collect::<Vec<_>>();
        let daemon = words(
            "qemu-storage-daemon --nbd-server addr.type=unix,addr.path=/run/n --chardev socket,path=/run/q,id=m",
        );
        assert!(may_be_nbd(&daemon, "/run/n") && !may_be_nbd(&daemon, "/run/q"));
        assert!(may_be_nbd(&words("q --nbd-server=addr.type=unix,addr.path=/run/a,,b"), "/run/a,b"));
        assert!(may_be_nbd(&daemon, "/run/made-later"));
    }

    #[test]
    fn a_line_of_the_table_gives_a_listening_name() {
        let known = ["4711".to_owned()];
        let line = "0000000000000000: 00000002 00000000 00010000 0001 01  4711 /run/a socket";
        assert_eq!(bound(line, &known).as_deref(), Some("/run/a socket"));
        assert_eq!(bound(&line.replace("00010000", "00000000"), &known), None);
        assert_eq!(bound(&line.replace("4711", "4712"), &known), None);
        assert_eq!(bound(&line.replace("/run", "@/run"), &known), None);
        assert_eq!(bound("Num       RefCount Protocol Flags    Type St Inode Path", &known), None);
    }
}

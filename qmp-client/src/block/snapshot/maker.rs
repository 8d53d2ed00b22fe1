//! The names of the nodes and jobs that a snapshot makes in QEMU before the switch. They tell which client
//! makes them, so that another client can recognise and undo the remains of a killed one.

use std::fs;
use std::sync::atomic::{AtomicU32, Ordering};

use crate::block::ids::{escaped, unescaped};

const NODE: &str = "snap-";
const STORAGE: &str = "-file";
const JOB: &str = "create-";

/// One new overlay of one process: `PROCESS.START.NUMBER`, the first two in hexadecimal.
///
/// A node's name has 31 letters at most.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Maker {
    process: u32,
    /// When the process started, in clock ticks since the system did. It is needed because process ids are
    /// reused.
    started: u64,
    number: u32,
}

impl Maker {
    /// The next overlay of this process.
    pub(super) fn next() -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let process = std::process::id();
        let number = NUMBER.fetch_add(1, Ordering::Relaxed) % 1000;
        Self { process, started: start_of(process).unwrap_or(0), number }
    }

    /// The overlay's node.
    pub(super) fn node(self) -> String {
        format!("{NODE}{:x}.{:x}.{}", self.process, self.started, self.number)
    }

    /// The node that holds its file.
    pub(super) fn storage(self) -> String {
        self.node() + STORAGE
    }

    /// The job that creates the file.
    pub(super) fn job(self, file: &str) -> String {
        format!("{JOB}{:x}.{:x}.{}-{}", self.process, self.started, self.number, escaped(file))
    }

    /// The maker of a node, and whether the node holds the file.
    pub(super) fn of_node(name: &str) -> Option<(Self, bool)> {
        let name = name.strip_prefix(NODE)?;
        let storage = name.strip_suffix(STORAGE);
        Some((Self::parse(storage.unwrap_or(name))?, storage.is_some()))
    }

    /// The maker of a job, and the file that the job creates.
    pub(super) fn of_job(id: &str) -> Option<(Self, String)> {
        let (name, file) = id.strip_prefix(JOB)?.split_once('-')?;
        Some((Self::parse(name)?, unescaped(file)?))
    }

    fn parse(name: &str) -> Option<Self> {
        let mut parts = name.split('.');
        let process = u32::from_str_radix(parts.next()?, 16).ok()?;
        let started = u64::from_str_radix(parts.next()?, 16).ok()?;
        let number = parts.next()?.parse().ok()?;
        parts.next().is_none().then_some(Self { process, started, number })
    }

    /// Whether the client still runs. A client on another host, or in another container, is not seen, and
    /// counts as gone.
    pub(super) fn lives(self) -> bool {
        start_of(self.process) == Some(self.started)
    }
}

/// When a process started, in clock ticks since the system did; `None` if there is no such process.
fn start_of(process: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{process}/stat")).ok()?;
    // The program's name, in parentheses, may hold spaces and parentheses.
    let (_, fields) = stat.rsplit_once(')')?;
    // The first of these fields is the third of the line; the start is the 22nd.
    fields.split_whitespace().nth(19)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_their_maker_and_fit() {
        let maker = Maker::next();
        assert_eq!(Maker::of_node(&maker.node()), Some((maker, false)));
        assert_eq!(Maker::of_node(&maker.storage()), Some((maker, true)));
        for file in ["/vm/d.img", "/v m/\u{e4}-_.img", "/"] {
            assert_eq!(Maker::of_job(&maker.job(file)), Some((maker, file.to_owned())), "{file}");
        }
        assert!(maker.lives() && maker != Maker::next());
        // The largest number of a process, and a host that has run for twenty years.
        let largest = Maker { process: 1 << 22, started: 63_072_000_000, number: 999 };
        assert!(largest.storage().len() <= 31, "{}", largest.storage());
        assert!(!largest.lives() && !Maker { started: maker.started + 1, ..maker }.lives());
    }

    #[test]
    fn names_of_others_have_no_maker() {
        for name in ["snap-1", "snap-a.b.c", "snap-1.2.3.4", "snapshot", "#block123", "snap-x.1.1-file", ""] {
            assert_eq!(Maker::of_node(name), None, "{name}");
        }
        for id in ["create-1.2.3", "create-0badcafe", "merge.vda.1.2.3", "create-1.2.3-_zz"] {
            assert_eq!(Maker::of_job(id), None, "{id}");
        }
    }
}

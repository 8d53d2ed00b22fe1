//! What can go wrong between this side of a monitor and QEMU.

mod code;
mod fault;
mod refusal;

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::qmp::message::Failure;
pub use fault::StateFault;
pub use refusal::Refusal;

/// The result of every fallible operation of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A failed operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A monitor's address that cannot be one.
    #[error("'{address}' is no QMP address: {why}; expected the path of a UNIX socket, or tcp:HOST:PORT")]
    Address {
        /// The address as given.
        address: String,
        /// What is wrong with it.
        why: &'static str,
    },
    /// A TCP address, where TCP was not allowed.
    #[error("{address} is TCP: nothing protects such a monitor, so it must be allowed by name")]
    TcpNotAllowed {
        /// The address.
        address: String,
    },
    /// A monitor that cannot be reached.
    #[error("cannot connect to {address}: {source}{}", connect_hint(.source))]
    Connect {
        /// The address.
        address: String,
        /// Why.
        source: io::Error,
    },
    /// A monitor that took the connection but did not greet.
    #[error(
        "{address} took the connection but did not greet within {waited:?}: another client holds this \
         monitor (libvirt, perhaps), or it is no QMP monitor"
    )]
    NoGreeting {
        /// The address.
        address: String,
        /// How long the greeting was waited for.
        waited: Duration,
    },
    /// The connection is gone; jobs go on in QEMU, if QEMU still runs.
    #[error("the connection to QEMU is closed: {why}")]
    Disconnected {
        /// What ended it.
        why: String,
    },
    /// A command that was not answered in time. It may still be carried out.
    #[error("QEMU did not answer {command} within {waited:?}; it may still carry it out")]
    TimedOut {
        /// The command.
        command: String,
        /// How long the answer was waited for.
        waited: Duration,
    },
    /// A command that QEMU refused.
    #[error("QEMU refused {command}: {}", printable(&.failure.description))]
    Command {
        /// The command.
        command: String,
        /// QEMU's words.
        failure: Failure,
    },
    /// A command during which QEMU sent a line that could not be read: its answer, perhaps. It may have
    /// been carried out.
    #[error("the answer to {command} could not be read: {why}")]
    Unreadable {
        /// The command.
        command: String,
        /// What is wrong with the line.
        why: String,
    },
    /// A disk that does not exist, or a name that fits several.
    #[error("no disk is called '{}'; there are: {}", printable(.disk), printable(.disks))]
    NoSuchDisk {
        /// The name as given.
        disk: String,
        /// The names of the disks.
        disks: String,
    },
    /// A layer, or a range of layers, that the chain does not have.
    #[error("{why}; the chain of {disk} is\n{chain}")]
    Layer {
        /// The disk.
        disk: String,
        /// What is wrong.
        why: String,
        /// The chain, a line for each layer, from the active one down.
        chain: String,
    },
    /// A job that did not do what it was for.
    #[error("the job {} failed: {}", printable(.id), printable(.why))]
    Job {
        /// The job's id.
        id: String,
        /// Why, in QEMU's words where it gave some.
        why: String,
    },
    /// Something that would do harm, or could not end well, and was not begun.
    #[error("{}", printable(&.reason.to_string()))]
    Refused {
        /// Why.
        reason: Refusal,
    },
    /// A node that was to be made durable, and QEMU's command or export failed at it.
    #[error("{} was not flushed: {}", printable(.node), printable(.why))]
    Flush {
        /// The node.
        node: String,
        /// Why.
        why: String,
    },
    /// A backing name that would not lead the overlay to base, or one that is not known; nothing was begun.
    #[error("{}", printable(.why))]
    BackingName {
        /// What is wrong.
        why: String,
        /// Whether another name can be given; if not, this merge takes none.
        takes_another: bool,
    },
    /// A disk that is libvirt's, which would lose track of it.
    #[error("the node {} belongs to libvirt, which would lose track of the disk", printable(.node))]
    Managed {
        /// A node of the disk.
        node: String,
    },
    /// A node that nothing makes durable, so that a merge could not be switched safely; it was not begun.
    #[error("{} cannot be flushed: {}", printable(.node), printable(.why))]
    NotFlushed {
        /// The node.
        node: String,
        /// Why each means has failed.
        why: String,
        /// Whether an NBD server that QEMU runs already could be a means.
        exports: bool,
    },
    /// A state file that says nothing, or that is not believed.
    #[error("the state file {}: {}", printable(&.path.to_string_lossy()), printable(&.why.to_string()))]
    State {
        /// Its path, or that of its folder.
        path: PathBuf,
        /// What is wrong with it.
        why: StateFault,
    },
    /// A file that the system does not let this program look at, read, write or remove.
    #[error("{}: {source}", printable(&.file.to_string_lossy()))]
    File {
        /// Its path.
        file: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// QEMU did what it was told, and shows no disk with the node that it made.
    #[error("QEMU shows no disk with the node {}", printable(.node))]
    NoSuchNode {
        /// The node.
        node: String,
    },
    /// A live merge that would do harm, or could not end well, as this host sees it; it was not begun.
    #[error("{0}")]
    Hindered(Box<crate::live::Hindrance>),
    /// An image that could not be looked at or tidied.
    #[error("{0}")]
    Engine(#[from] qcow2::Error),
    /// A line that QMP does not allow.
    #[error("QEMU sent a line that is no QMP message: {why}: {}", printable(.line))]
    Protocol {
        /// What is wrong with it.
        why: String,
        /// The line, shortened.
        line: String,
    },
    /// An answer whose shape is not the one that the command's answer has.
    #[error("QEMU's answer to {command} is not understood: {source}")]
    Answer {
        /// The command.
        command: String,
        /// Which part of it.
        source: serde_json::Error,
    },
    /// A command whose arguments cannot be written as JSON.
    #[error("the command {command} cannot be written: {source}")]
    Request {
        /// The command.
        command: String,
        /// Why.
        source: serde_json::Error,
    },
}

impl From<Refusal> for Error {
    fn from(reason: Refusal) -> Self {
        Self::Refused { reason }
    }
}

impl From<crate::live::Hindrance> for Error {
    fn from(hindrance: crate::live::Hindrance) -> Self {
        Self::Hindered(Box::new(hindrance))
    }
}

fn connect_hint(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ConnectionRefused => "; nobody listens there any more: QEMU has ended, or is starting",
        io::ErrorKind::NotFound => "; QEMU has not made this socket, or has ended",
        io::ErrorKind::PermissionDenied => "; only those who may write to the socket may command QEMU",
        _ => "",
    }
}

/// Words from QEMU as they may be shown on a terminal: without control characters.
pub(crate) fn printable(text: &str) -> String {
    text.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect()
}

//! What can go wrong between this side of a monitor and QEMU.

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
    /// A line that QMP does not allow.
    #[error("QEMU sent a line that is no QMP message: {why}: {line}")]
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
        command: &'static str,
        /// Which part of it.
        source: serde_json::Error,
    },
    /// A command whose arguments cannot be written as JSON.
    #[error("the command {command} cannot be written: {source}")]
    Request {
        /// The command.
        command: &'static str,
        /// Why.
        source: serde_json::Error,
    },
}

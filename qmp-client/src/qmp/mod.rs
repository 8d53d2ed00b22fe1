//! The control socket: where it listens, its lines, a connection that stays in step, and whose it is.

pub(crate) mod address;
pub(crate) mod connection;
pub(crate) mod message;
pub(crate) mod monitor;
pub(crate) mod monitors;
pub(crate) mod naming;
pub(crate) mod owner;
#[cfg(test)]
pub(crate) mod replay;

//! Machines that libvirt owns: what the command says of them, and what they boot after a merge.
//!
//! `real` starts a libvirt of its own, without systemd, with its sockets and its state in a temporary folder: the session
//! daemon of an ordinary user. Without libvirt or QEMU its tests say `SKIPPED` on standard error and pass, except where
//! `CI` is set.

#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod definitions;
mod real;
mod session;
mod support;

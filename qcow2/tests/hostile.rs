//! Damaged and hostile images: each is refused with an error that names file, offset, field, what was
//! found and what was expected; nothing is written, nothing panics.
//!
//! The images are laid out by [`qcow2::fuzzing::sample`], without the engine's encoders, and damaged
//! one field at a time. QEMU judges that they are sound before the damage.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, reason = "helpers of tests")]

#[path = "hostile/commits.rs"]
mod commits;
#[path = "hostile/compressed.rs"]
mod compressed;
#[path = "hostile/header.rs"]
mod header;
#[path = "hostile/history.rs"]
mod history;
#[path = "hostile/kit.rs"]
mod kit;
#[path = "hostile/mappings.rs"]
mod mappings;
#[path = "hostile/repairs.rs"]
mod repairs;
#[path = "hostile/sound.rs"]
mod sound;

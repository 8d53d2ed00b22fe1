//! Finds out what exists before anything is planned: QEMU's files, unfinished merges, and other images that
//! read through a disk's layers.

mod files;
mod unfinished;
mod users;

pub use files::Files;
pub(crate) use files::{Place, file_id};
pub(crate) use unfinished::states;
pub use unfinished::{
    Interrupted, Unfinished, folders_of_disks, folders_of_image, sweep_folders, unbelieved_states,
};
pub use users::Searched;
pub(crate) use users::{absolute, search};

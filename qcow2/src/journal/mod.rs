//! The redo journal: what is about to be written over bytes in use is durable elsewhere first.
//!
//! The order of writes (see [`crate::merge`]) leaves an image sound after a power cut as long as each sector of
//! 512 bytes is either old or new. A disk that loses its power in the middle of one may leave neither. So
//! the image that is being written lies under a journal: a small file beside it that holds, of the last
//! barrier, every block that was written over something in use, or beside somebody else's bytes. Going on
//! with the work begins by writing these blocks again.
//!
//! Whether that is allowed must be certain: somebody may have written to the image in between, or put it back from a
//! copy. For version 3 the dirty bit tells the first, which is set together with clearing `lazy refcounts`: QEMU
//! clears it when it opens the image for writing, and without lazy refcounts does not set it again. For the rest the
//! journal holds stamps of the files (see [`mod@crate::stamp`]), as they were behind each barrier, and its own time of
//! modification is kept fresh: a work that was killed has written to its files shortly after it at the latest.

mod bytes;
mod device;
mod file;
mod heal;
mod judge;
mod obsolete;
mod place;
pub(crate) mod record;
mod sample;
mod strangers;
mod unnamed;

pub(crate) use device::Journaled;
pub(crate) use file::Journal;
pub(crate) use heal::has_edit;
pub(crate) use heal::{Edit, edit_headers, heal, is_torn_header, nonce, sweep};
pub(crate) use judge::{JournalVerdict, Judgement, Now, are_names_clean, judge};
pub(crate) use place::JOURNAL;
pub(crate) use place::SWITCH;
pub(crate) use place::{FoundJournal, find, find_removed, place, refuse_renamed, refuse_strangers};
pub(crate) use strangers::strangers;
pub use strangers::{Stranger, strangers_about};

#[cfg(test)]
mod tests;

//! The redo journal: bytes that will overwrite something in use are made durable in another file first.
//!
//! The order of writes (see [`crate::merge`]) leaves an image sound after a power cut if each sector of 512
//! bytes is either old or new. But a disk that loses power while it writes a sector may leave neither. So the
//! image that is being written lies under a journal. This is a small file beside it with the blocks that the
//! last barrier wrote over something in use, or only in part. To continue unfinished work, these blocks are
//! written again first.
//!
//! It must be certain that this is allowed: somebody may have written to the image in between, or restored it
//! from a copy. For version 3 the dirty bit tells the former. The work sets it and clears `lazy refcounts`;
//! QEMU clears the dirty bit when it opens the image for writing, and does not set it again without lazy
//! refcounts. For everything else the journal holds stamps of the files (see [`mod@crate::stamp`]) as they were
//! behind each barrier. The work also keeps the journal's time of modification fresh: work that was killed
//! cannot have written to its files much later than that.

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
mod sweep;
mod unnamed;

pub(crate) use device::Journaled;
pub(crate) use file::Journal;
pub(crate) use heal::has_edit;
pub(crate) use heal::{Edit, edit_headers, heal, is_torn_header, nonce};
pub(crate) use judge::{JournalVerdict, Judgement, Now, are_names_clean, judge};
pub(crate) use place::JOURNAL;
pub(crate) use place::SWITCH;
pub(crate) use place::{FoundJournal, find, find_removed, place, refuse_renamed, refuse_strangers};
pub(crate) use strangers::strangers;
pub use strangers::{Stranger, strangers_about};
pub(crate) use sweep::sweep;

#[cfg(test)]
mod tests;

//! Data moves up: what a pull and a rebase share.
//!
//! An image takes in what it would not show any more, and then reads through other layers, or through nothing. The guest
//! sees the same bytes at every instant. What the image takes in is what it shows already; when all of it is durable, its
//! backing name changes by one write, or under the journal. So whatever stops the work, the same command takes in what is
//! still missing. No other file is written, and whoever reads through the image, or through the layers below, goes on to
//! see the same.

mod execute;
mod image;
mod lower;

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::Serialize;

pub(super) use image::{fits, judge, name_of, open, refuse_merges, room, unfinished};
pub(super) use lower::Lower;

use super::resume::unfinished_work::UnfinishedWork;
use super::resume::work::Work;
use crate::chain::{Chain, OpenOptions};
use crate::journal::record::Header;
use crate::serial;
use crate::storage::Host;
use crate::transfer::Totals;

/// What a caller may ask of a pull and of a rebase alike.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct UpOptions {
    /// How the chains are opened: policy and formats. Access and locks are the work's own matter.
    pub open: OpenOptions,
    /// Read everything back before the backing name changes.
    pub verify: bool,
    /// Go on although internal snapshots of the image will show something else.
    pub allow_snapshot_change: bool,
    /// Where the journal is kept if it cannot lie beside the image.
    pub journal_dir: Option<PathBuf>,
}

impl UpOptions {
    /// Chains are opened like this.
    pub fn new(open: OpenOptions) -> Self {
        Self { open, ..Self::default() }
    }
}

/// An image that is ready to take data: its chain is open and locked.
#[derive(Debug)]
pub(super) struct Up {
    pub(super) host: Arc<dyn Host>,
    pub(super) options: UpOptions,
    /// The image, and what lies below it now.
    pub(super) chain: Chain,
    /// What will lie below it.
    pub(super) lower: Lower,
    /// What is moved and taken.
    pub(super) totals: Totals,
    /// The backing name that will stand in the header.
    pub(super) backing_name: Option<OsString>,
    /// What a journal says of this work.
    pub(super) header: Header,
    /// What a work that was stopped has left, and the image under its journal.
    pub(super) unfinished: Option<(UnfinishedWork, Option<Work>)>,
    /// Clusters of the image that nothing refers to.
    pub(super) leaks: u64,
}

impl Up {
    /// The layers whose file systems have no locks, though locks were asked for.
    pub(super) fn unlocked(&self) -> Vec<PathBuf> {
        let other = match &self.lower {
            Lower::Other { chain: Some(chain), .. } => chain.unlocked(),
            Lower::Other { chain: None, .. } | Lower::Layer(_) => Vec::new(),
        };
        [self.chain.unlocked(), other].concat()
    }
}

/// How a pull or a rebase came out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct UpReport {
    /// What was moved and taken.
    #[serde(flatten)]
    pub totals: Totals,
    /// How long it took.
    #[serde(rename = "seconds", serialize_with = "serial::seconds")]
    pub elapsed: Duration,
    /// The digest (CRC-32) of the guest's view, if everything was verified.
    #[serde(skip_serializing_if = "Option::is_none", serialize_with = "serial::checksum")]
    pub digest: Option<u32>,
    /// The length of the image's file, in bytes.
    #[serde(rename = "file-size-after")]
    pub file_size: u64,
}

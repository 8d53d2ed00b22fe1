//! What is asked of a relink, and what it will do.

use std::ffi::OsString;
use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use serde::{Serialize, Serializer};

use crate::chain::{Chain, OpenOptions};
use crate::error::{Doubt, Error, Role};
use crate::format::Switch;
use crate::image::ImageFormat;
use crate::serial;
use crate::storage::{FileId, Host};

/// What a caller may ask.
#[derive(Clone, Debug, Default)]
#[non_exhaustive]
pub struct RelinkOptions {
    /// The name of the backing file, as it is to stand in the header; without it, the old one stays.
    pub backing: Option<OsString>,
    /// The format of the backing file; without it, what the header or the new name says.
    pub backing_format: Option<ImageFormat>,
    /// The name of the external data file, as it is to stand in the header; without it, the old one stays.
    pub data_file: Option<OsString>,
    /// What the caller answers for.
    pub vouched: Vouched,
    /// How the chain is opened: policy and formats. Access and locks are the relink's own matter.
    pub open: OpenOptions,
    /// Where the record of the change is kept if it cannot lie beside the image.
    pub journal_dir: Option<PathBuf>,
}

impl RelinkOptions {
    /// No name changes yet, nothing is vouched for, and the chain is opened so.
    pub fn new(open: OpenOptions) -> Self {
        Self { open, ..Self::default() }
    }
}

/// What the caller answers for, where the files themselves prove nothing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Vouched {
    /// Nothing.
    #[default]
    Nothing,
    /// The folder of the old names was moved, as a whole, to where the new names lead. Then a file that is at its old
    /// place in the moved folder counts, if nothing is left at the old name and the file is what the header says of it.
    Folder,
    /// The new names lead to the right files.
    Files,
}

/// What proves that a file is the one that the image was made with.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Proof {
    /// The name changes, and the file does not.
    SameFile,
    /// The old file is still there, and the new one shows the same bytes.
    SameContent,
    /// A journal beside the file says that it had the old name.
    Recorded,
    /// The image's mark says that a merge has put it on this file.
    Marked,
    /// It lies at its old place in a folder that was moved, by the word of the caller.
    MovedFolder,
}

impl Proof {
    /// A stable word for it.
    pub fn code(&self) -> &'static str {
        match self {
            Self::SameFile => "same-file",
            Self::SameContent => "same-content",
            Self::Recorded => "recorded",
            Self::Marked => "marked",
            Self::MovedFolder => "moved-folder",
        }
    }
}

impl fmt::Display for Proof {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::SameFile => "it is the same file",
            Self::SameContent => "it shows the same bytes as the old file, which is still there",
            Self::Recorded => "the journal beside it says that it had the old name",
            Self::Marked => "the image is marked as put onto it by a merge",
            Self::MovedFolder => {
                "it lies at its old place in the folder that was moved, and is what the header says"
            }
        })
    }
}

/// Another name for one file.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct NameChange {
    /// The name that stands in the header.
    #[serde(serialize_with = "serial::name")]
    pub before: OsString,
    /// The name that will stand there.
    #[serde(serialize_with = "serial::name")]
    pub after: OsString,
    /// The file that the new name leads to, as resolved.
    #[serde(serialize_with = "serial::name")]
    pub file: PathBuf,
    /// Its format, if it is the backing file.
    pub format: Option<ImageFormat>,
    /// What proves that it is the right file, or why nothing does. Then the caller has vouched for it.
    #[serde(rename = "proof", serialize_with = "proof")]
    pub proved: Result<Proof, Doubt>,
    /// The base that it was merged into before, if it still holds the data of that time.
    #[serde(serialize_with = "serial::some_name")]
    pub merged_into: Option<PathBuf>,
}

fn proof<S: Serializer>(proved: &Result<Proof, Doubt>, to: S) -> Result<S::Ok, S::Error> {
    #[derive(Serialize)]
    #[serde(rename_all = "kebab-case")]
    struct Told {
        proved: bool,
        kind: &'static str,
        text: String,
    }
    let told = match proved {
        Ok(proof) => Told { proved: true, kind: proof.code(), text: proof.to_string() },
        Err(doubt) => Told { proved: false, kind: doubt.code(), text: doubt.to_string() },
    };
    told.serialize(to)
}

/// What a relink will do.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct RelinkPlan {
    /// The image whose header changes.
    #[serde(serialize_with = "serial::name")]
    pub image: PathBuf,
    /// The name of the backing file, if that changes.
    pub backing: Option<NameChange>,
    /// The name of the external data file, if that changes.
    pub data_file: Option<NameChange>,
    /// Whether one sector holds the change; else a record makes it whole.
    pub atomic: bool,
    /// A file further below that is named and is not there.
    #[serde(serialize_with = "serial::some_name")]
    pub missing_below: Option<PathBuf>,
}

impl RelinkPlan {
    /// The changes, each with what it is about.
    pub fn changes(&self) -> impl Iterator<Item = (Role, &NameChange)> {
        let backing = self.backing.iter().map(|change| (Role::BackingFile, change));
        backing.chain(self.data_file.iter().map(|change| (Role::DataFile, change)))
    }
}

/// What a relink comes to.
#[derive(Debug)]
#[non_exhaustive]
pub enum PreparedRelink {
    /// It is ready to be carried out.
    Ready(Box<Relink>),
    /// The names stand there already.
    Nothing(Box<RelinkPlan>),
}

/// A relink that is ready to be carried out: the chain with the new names is open and locked.
#[derive(Debug)]
pub struct Relink {
    pub(super) host: Arc<dyn Host>,
    pub(super) chain: Chain,
    pub(super) plan: RelinkPlan,
    pub(super) switch: Switch,
    /// What each new name must still lead to when the header changes.
    pub(super) files: Vec<(PathBuf, FileId)>,
    pub(super) journal_dir: Option<PathBuf>,
}

impl PreparedRelink {
    /// What will be done.
    pub fn plan(&self) -> &RelinkPlan {
        match self {
            Self::Ready(relink) => &relink.plan,
            Self::Nothing(plan) => plan,
        }
    }

    /// The chain as it will be, open and locked, if there is something to do.
    pub fn chain(&self) -> Option<&Chain> {
        match self {
            Self::Ready(relink) => Some(&relink.chain),
            Self::Nothing(_) => None,
        }
    }

    /// Changes the names.
    ///
    /// # Errors
    /// [`Refusal::NameMoved`](crate::Refusal::NameMoved) if a name was given to another file meanwhile; the system's. The
    /// header has the old names or the new ones, or is made whole by [`heal_image`](crate::merge::heal_image).
    pub fn execute(self) -> Result<(), Error> {
        match self {
            Self::Ready(relink) => relink.execute(),
            Self::Nothing(_) => Ok(()),
        }
    }
}

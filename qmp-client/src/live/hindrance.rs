//! Why a live merge is not begun, as values. The caller finds the words and the ways out.

use std::path::PathBuf;

use qcow2::Refusal as OfImage;
use qcow2::error::shown;

use super::outline::Outline;
use super::plan::Obstacle;

/// Why a live merge is not begun: it would do harm, or could not end well. Nothing was changed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Hindrance {
    /// Persistent bitmaps of the layers that are given up would be lost.
    #[error("persistent bitmaps of the merged layers would be lost: {}", list(.names))]
    Bitmaps {
        /// Their names.
        names: Vec<String>,
    },
    /// Internal snapshots would show other bytes.
    #[error("{} holds {count} internal snapshot(s), whose content would change", shown(.file))]
    Snapshots {
        /// The image that holds them.
        file: String,
        /// How many they are.
        count: usize,
    },
    /// The data of an encrypted layer would go to an image that is not encrypted.
    #[error(
        "{} is encrypted, and {} is not: what it holds would lie there in plain text", shown(.from), shown(.into)
    )]
    Plaintext {
        /// The encrypted layer.
        from: String,
        /// The layer that receives its data.
        into: String,
    },
    /// The old active image would stay as it is after the pivot: bootable, with old data.
    #[error(
        "{} could not become an empty overlay on base after the pivot: {obstacle}; it would stay bootable, with old data",
        shown(.file)
    )]
    StaleActive {
        /// The image.
        file: String,
        /// What keeps it from being emptied, or from being removed if that is wanted.
        obstacle: Obstacle,
    },
    /// A layer's name leads to another file here than in QEMU.
    #[error(
        "QEMU has another file open than the {} that lies here: it runs in a container or in another root, perhaps",
        shown(.file)
    )]
    NotHere {
        /// The layer's file.
        file: String,
    },
    /// Another job works on the disk.
    #[error(
        "the job {} ({}) works on the disk {} already; QEMU runs one at a time", shown(.job), shown(.kind), shown(.disk)
    )]
    JobExists {
        /// The job's id.
        job: String,
        /// What it does, in QEMU's words.
        kind: String,
        /// The disk.
        disk: String,
    },
    /// An earlier merge of the disk is under way.
    #[error("the merge of {} is under way", shown(&.merge.disk))]
    UnderWay {
        /// That merge.
        merge: Box<Outline>,
    },
    /// The receiving file system certainly has too little room.
    #[error("{} will grow by {needed} bytes, and {free} are free in {}", shown(.file), shown(.folder))]
    NoSpace {
        /// The image that receives the data.
        file: String,
        /// Bytes by which it grows.
        needed: u64,
        /// Bytes that are free.
        free: u64,
        /// The folder of that image.
        folder: PathBuf,
    },
    /// An image outside the chain uses base or a merged layer.
    #[error("{}", shared(.used, .users))]
    SharedBase {
        /// The layer that is used.
        used: PathBuf,
        /// The images that use it.
        users: Vec<PathBuf>,
    },
    /// Another node of the same QEMU, that of another disk perhaps, reads through base or a merged layer.
    #[error(
        "the node {} ({}) of the same QEMU reads through {} and is no part of this disk: it would show other bytes",
        shown(.node), shown(.file), shown(.used)
    )]
    SharedInside {
        /// The layer that is read.
        used: String,
        /// The topmost node that reads it.
        node: String,
        /// That node's file, as QEMU calls it.
        file: String,
    },
    /// A folder could not be searched for other users of the files.
    #[error("{source}")]
    NotSearched {
        /// Why.
        source: qcow2::Error,
    },
    /// The file in which the merge would be noted has the note of another merge.
    #[error(
        "{} notes the merge of another disk, {} in {}; one file cannot note both", shown(.state_file), shown(.disk),
        shown(.image)
    )]
    StateOfAnother {
        /// The file.
        state_file: PathBuf,
        /// The other disk.
        disk: String,
        /// Its active image when that merge began.
        image: String,
    },
    /// The progress of the merge cannot be noted.
    #[error("{}", no_place(.folder, .file, .source))]
    NoStateFolder {
        /// The active image.
        file: String,
        /// The folder that cannot be written; none where the active image is no file here.
        folder: Option<PathBuf>,
        /// Why it cannot be written.
        source: Option<std::io::Error>,
    },
    /// An earlier merge of the disk must be recovered first.
    #[error(
        "{}: an earlier merge of {} (job {}) was {}; the image that holds the disk is {}",
        shown(.unfinished.state_file()), shown(&.unfinished.disk), shown(&.unfinished.job), .unfinished.how_far(),
        shown(&.unfinished.valid_top)
    )]
    RecoverFirst {
        /// That merge.
        unfinished: Box<Outline>,
    },
    /// The active layer is in the range, and was not asked for.
    #[error(
        "[{index}] {} is the active layer, which the guest writes to; it is merged only when that is asked for", shown(.file)
    )]
    ActiveNotAskedFor {
        /// The layer's index.
        index: usize,
        /// Its file.
        file: String,
        /// The index of the layer below, if that can be merged in its place.
        below: Option<usize>,
    },
    /// An option was given that only a merge of the active layer has.
    #[error("the active layer is [{active}], and [{top}] is a layer below it, so there is no pivot")]
    OnlyForActive {
        /// The index of the active layer.
        active: usize,
        /// The index of the highest layer of the range.
        top: usize,
    },
    /// The guest's writes cannot be limited.
    #[error("{source}")]
    NotSlowed {
        /// Why.
        source: Box<crate::Error>,
    },
}

fn shared(used: &std::path::Path, users: &[PathBuf]) -> String {
    qcow2::Error::refused(used, OfImage::SharedBase { users: users.to_vec() }).to_string()
}

fn list(names: &[String]) -> String {
    names.iter().map(shown).collect::<Vec<_>>().join(", ")
}

fn no_place(folder: &Option<PathBuf>, file: &str, source: &Option<std::io::Error>) -> String {
    match (folder, source) {
        (Some(folder), Some(source)) => {
            format!("{}: how far the merge is cannot be noted there: {source}", shown(folder))
        }
        _ => format!(
            "{} is no file here, so there is no folder beside it to note how far the merge is",
            shown(file)
        ),
    }
}

//! Why it cannot be told whether a merge has switched.

use std::fmt;

use qcow2::error::shown;

/// Why the files, the state and QEMU do not tell which image is the disk. Only the user can know it.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Doubt {
    /// A file of the chain is gone, is another file, or was never a file on this host.
    Moved {
        /// The file.
        file: String,
        /// Whether there is no file at all.
        gone: bool,
    },
    /// The state names no header that the switch changes.
    NoHeader,
    /// The header of the overlay cannot be read.
    Unread {
        /// The overlay.
        overlay: String,
    },
    /// The overlay names neither its former backing file nor the one that the merge writes.
    NamesOther {
        /// The overlay.
        overlay: String,
        /// What it names; `None` if it names nothing.
        name: Option<String>,
    },
    /// The merge writes the name that the overlay had before.
    SameName {
        /// The overlay.
        overlay: String,
    },
    /// The header names one chain, and QEMU shows the other.
    QemuDisagrees {
        /// The overlay.
        overlay: String,
        /// Whether QEMU shows the chain that the merge leaves.
        shows_after: bool,
    },
    /// The overlay was switched, but names its former backing file again, and somebody has written to merged
    /// layers since.
    NamesAgain {
        /// The overlay.
        overlay: String,
    },
    /// Another client has switched, and it is unknown whether the copied data was durable then.
    OtherClient {
        /// The overlay.
        overlay: String,
    },
    /// Somebody has written to a layer that was merged.
    Written {
        /// The layer's file.
        file: String,
    },
    /// QEMU was about to switch, and merged layers are gone, so that no comparison is possible.
    LayersMissing,
    /// Base does not hold what was merged into it, and somebody may have written to it since.
    BaseDiffers {
        /// The first byte of the disk that differs.
        at: u64,
    },
    /// QEMU is gone, and no pivot is noted; but another client may have pivoted.
    PivotUnseen,
    /// QEMU runs on base, though no pivot is noted.
    RunsOnBase,
    /// QEMU runs on the old active image, and base may have been written since the pivot.
    RunsOnOld,
    /// The old active image holds bytes that base does not, and nothing shows where the guest wrote last.
    TwoDisks {
        /// Whether the old active image was written to since the state was noted; `None` if its times do not
        /// show it.
        old_written: Option<bool>,
        /// The same for base.
        base_written: Option<bool>,
    },
    /// The old active image was written after the pivot.
    OldWritten,
    /// It cannot be seen whether the old active image was written after the pivot.
    OldUnseen,
    /// It cannot be seen whether the guest went on with base or with the old active image.
    Unseen,
}

impl fmt::Display for Doubt {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Moved { file, gone: true } => write!(f, "{} is not there any more", shown(file)),
            Self::Moved { file, gone: false } => write!(f, "{} is not the file that it was", shown(file)),
            Self::NoHeader => f.write_str("the state names no header that the switch changes"),
            Self::Unread { overlay } => write!(f, "the header of {} cannot be read", shown(overlay)),
            Self::NamesOther { overlay, name } => {
                let name = name.as_ref().map_or_else(|| "nothing".to_owned(), shown);
                write!(
                    f,
                    "{} has {name} as its backing file, which is neither top nor base of this merge",
                    shown(overlay)
                )
            }
            Self::SameName { overlay } => write!(f, "{} is to name what it named before", shown(overlay)),
            Self::QemuDisagrees { overlay, shows_after } => {
                let shows = if *shows_after { "after" } else { "before" };
                write!(
                    f,
                    "{} names one backing file, and QEMU shows the chain {shows} the merge",
                    shown(overlay)
                )
            }
            Self::NamesAgain { overlay } => {
                write!(
                    f,
                    "{} was switched, and names again what it named before; somebody has written to merged layers since",
                    shown(overlay)
                )
            }
            Self::OtherClient { overlay } => write!(
                f,
                "{} was switched by another client, and it is not known whether what was copied was durable",
                shown(overlay)
            ),
            Self::Written { file } => {
                write!(f, "{} was merged, and somebody has written to it since", shown(file))
            }
            Self::LayersMissing => f.write_str(
                "QEMU was about to switch, and merged layers are gone, so nobody can tell whether base holds what they held",
            ),
            Self::BaseDiffers { at } => {
                write!(f, "base differs from what was merged into it, first at byte {at} of the disk")
            }
            Self::PivotUnseen => {
                f.write_str("no pivot is noted, and base may have been the disk all the same: it cannot be seen whether another client has pivoted")
            }
            Self::RunsOnBase => f.write_str("QEMU runs on base, and no pivot is noted"),
            Self::RunsOnOld => f.write_str(
                "QEMU runs on the old active image, and base may have been written since the pivot",
            ),
            Self::TwoDisks { .. } => f.write_str("the old active image holds bytes that base does not"),
            Self::OldWritten => f.write_str("the old active image was written after the pivot"),
            Self::OldUnseen => {
                f.write_str("it cannot be seen whether the old active image was written after the pivot")
            }
            Self::Unseen => f.write_str(
                "it cannot be seen whether the guest went on with base or with the old active image",
            ),
        }
    }
}

//! Other names in a header after files were moved: the backing file, the external data file, or both.
//!
//! Only cluster 0 is written, by one sector or under a record that makes it whole. Before that it is proved that each new
//! name leads to the file that the image was made with: a wrong one would show the guest wrong data, and nobody could tell
//! afterwards which of the data is right. What cannot be proved, the caller must vouch for.
//!
//! The chain is opened as it would be with the new names, under the rules that every other verb has: policy, locks, formats,
//! loops.

mod plan;
mod prepare;
mod prove;
#[cfg(test)]
mod tests;
mod unfinished;

pub use crate::chain::{MovedFolder, RenamedImage, RenamedImages, find_renamed};
pub use plan::{NameChange, PreparedRelink, Proof, Relink, RelinkOptions, RelinkPlan, Vouched};

//! How values are written for programs: JSON is text, so bytes of names that are no UTF-8 are replaced.

use std::fmt::Display;
use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

/// A name of a file.
pub(crate) fn name<S: Serializer>(name: impl AsRef<Path>, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&name.as_ref().to_string_lossy())
}

/// A list of names.
pub(crate) fn names<S: Serializer>(list: &[PathBuf], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(list.iter().map(|path| path.to_string_lossy()))
}

/// Files, each with a reason.
pub(crate) fn reasons<S: Serializer>(list: &[(PathBuf, impl Display)], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(list.iter().map(|(file, why)| Reason { file, reason: why.to_string() }))
}

#[derive(Serialize)]
struct Reason<'f> {
    #[serde(serialize_with = "name")]
    file: &'f Path,
    reason: String,
}

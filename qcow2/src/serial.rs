//! How values are written for programs: JSON is text, so bytes of names that are no UTF-8 are replaced.

use std::ffi::OsStr;
use std::fmt::Display;
use std::path::Path;
use std::time::Duration;

use serde::Serializer;

/// A name of a file.
pub(crate) fn name<S: Serializer>(name: impl AsRef<OsStr>, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&name.as_ref().to_string_lossy())
}

/// A name that there need not be.
pub(crate) fn some_name<S: Serializer, N: AsRef<OsStr>>(found: &Option<N>, to: S) -> Result<S::Ok, S::Error> {
    match found {
        Some(found) => name(found, to),
        None => to.serialize_none(),
    }
}

/// A list of names.
pub(crate) fn names<S: Serializer, P: AsRef<Path>>(list: &[P], to: S) -> Result<S::Ok, S::Error> {
    to.collect_seq(list.iter().map(|path| path.as_ref().to_string_lossy()))
}

/// What people read of a value.
pub(crate) fn words<S: Serializer>(value: &impl Display, to: S) -> Result<S::Ok, S::Error> {
    to.collect_str(value)
}

/// The same of one that there need not be.
pub(crate) fn some_words<S: Serializer>(value: &Option<impl Display>, to: S) -> Result<S::Ok, S::Error> {
    match value {
        Some(value) => to.collect_str(value),
        None => to.serialize_none(),
    }
}

/// A time in seconds.
pub(crate) fn seconds<S: Serializer>(time: &Duration, to: S) -> Result<S::Ok, S::Error> {
    to.serialize_f64(time.as_secs_f64())
}

/// A checksum, as eight hexadecimal digits.
pub(crate) fn checksum<S: Serializer>(sum: &Option<u32>, to: S) -> Result<S::Ok, S::Error> {
    match sum {
        Some(sum) => to.collect_str(&format_args!("{sum:08x}")),
        None => to.serialize_none(),
    }
}

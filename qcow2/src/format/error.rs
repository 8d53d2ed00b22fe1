//! A broken rule of the format.

use std::fmt;

/// A field that breaks a rule of the format, or asks for a feature that is not supported.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{field} at offset {offset:#x}: found {found}, expected {expected}")]
pub struct FormatError {
    field: String,
    offset: u64,
    found: String,
    expected: String,
    unsupported: bool,
}

impl FormatError {
    /// The image breaks a rule: `field` at host offset `offset` holds `found` instead of `expected`.
    pub(crate) fn malformed(
        field: impl Into<String>,
        offset: u64,
        found: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Self {
        Self {
            field: field.into(),
            offset,
            found: found.to_string(),
            expected: expected.to_string(),
            unsupported: false,
        }
    }

    /// The image is valid, but uses a feature that is not supported.
    pub(crate) fn unsupported(
        field: impl Into<String>,
        offset: u64,
        found: impl fmt::Display,
        expected: impl fmt::Display,
    ) -> Self {
        Self { unsupported: true, ..Self::malformed(field, offset, found, expected) }
    }

    /// Whether the image may be valid, but uses a feature that is not supported.
    pub fn is_unsupported(&self) -> bool {
        self.unsupported
    }

    /// The field or structure concerned.
    pub fn field(&self) -> &str {
        &self.field
    }

    /// The host offset of the field, in bytes.
    pub fn offset(&self) -> u64 {
        self.offset
    }
}

//! The plan of a live merge, for people and for programs.

mod human;
mod json;

pub(super) use self::human::{show, text};
pub(super) use self::json::fields;

//! Where nothing is merged, for programs: what a plan has, of nothing, so that they read both alike.

use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use super::plan::{Afterwards, Signs};
use super::settled::Settled;
use crate::serial;
use crate::transfer::job::Totals;

/// What is always empty.
type Empty = [(); 0];

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct PlanOfNothing<'s> {
    #[serde(serialize_with = "serial::name")]
    base: &'s Path,
    #[serde(serialize_with = "serial::name")]
    top: &'s Path,
    #[serde(serialize_with = "serial::name")]
    active: &'s Path,
    nothing_to_do: String,
    #[serde(serialize_with = "serial::names")]
    left_over: &'s [PathBuf],
    #[serde(flatten)]
    totals: Totals,
    base_virtual_size_before: u64,
    base_virtual_size_after: u64,
    base_file_size_after: u64,
    old_tail: u64,
    bytes_freed: u64,
    afterwards: Afterwards,
    signs: Signs,
    resumed: Option<()>,
    begins_anew: Option<()>,
    obsolete: Empty,
    emptied: Empty,
    not_emptied: Empty,
    restore_points_lost: Empty,
    data_files: Empty,
    bitmaps_lost: Empty,
    searched: Empty,
    unreadable: Empty,
    room_unknown: Empty,
    strangers: Empty,
}

impl Serialize for Settled {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        PlanOfNothing {
            base: &self.base,
            top: &self.top,
            active: &self.active,
            nothing_to_do: self.reason.to_string(),
            left_over: &self.unremoved,
            totals: Totals::default(),
            base_virtual_size_before: self.base_size,
            base_virtual_size_after: self.base_size,
            base_file_size_after: 0,
            old_tail: 0,
            bytes_freed: 0,
            afterwards: Afterwards::Keep,
            signs: Signs::default(),
            resumed: None,
            begins_anew: None,
            obsolete: [],
            emptied: [],
            not_emptied: [],
            restore_points_lost: [],
            data_files: [],
            bitmaps_lost: [],
            searched: [],
            unreadable: [],
            room_unknown: [],
            strangers: [],
        }
        .serialize(to)
    }
}

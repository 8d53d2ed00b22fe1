//! The chains that are merged: every kind of entry, table, growth and switch, each as small as it can be.

#[path = "scenarios/entries.rs"]
mod entries;
#[path = "scenarios/files.rs"]
mod files;
#[path = "scenarios/random.rs"]
mod random;
#[path = "scenarios/recorded.rs"]
mod recorded;
#[path = "scenarios/removed.rs"]
mod removed;
#[path = "scenarios/shape.rs"]
mod shape;
#[path = "scenarios/tables.rs"]
mod tables;

pub(crate) use shape::{SHAPE, Shape, overlay};
pub(crate) use tables::full_records;

use crate::chain::Scenario;
use crate::run::{Tier, share};

/// Every `step`th scenario, or a sample of these; all of them where names were asked for.
pub(crate) fn some(tier: Tier, step: usize) -> Vec<Scenario> {
    let asked = std::env::var_os("QMERGE_CRASH_ONLY").is_some();
    all(tier).into_iter().step_by(if asked { 1 } else { step * share() }).collect()
}

/// All scenarios of a tier.
pub(crate) fn all(tier: Tier) -> Vec<Scenario> {
    let mut list = entries::entries();
    list.extend(tables::growth());
    list.extend(tables::sizes());
    list.extend(files::raw());
    list.extend(files::data_files());
    list.extend(files::switches());
    list.extend(tables::emptied());
    list.extend(tables::bitmaps());
    list.extend(files::cluster_sizes());
    list.extend(removed::removed());
    list.extend(recorded::recorded());
    list.extend((0..tier.of(60, 600)).map(random::chain));
    list
}

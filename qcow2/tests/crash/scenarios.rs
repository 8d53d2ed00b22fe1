//! The chains that are merged: every kind of entry, table, growth and switch, each as small as it can be.

#[path = "scenarios/entries.rs"]
mod entries;
#[path = "scenarios/files.rs"]
mod files;
#[path = "scenarios/random.rs"]
mod random;
#[path = "scenarios/shape.rs"]
mod shape;
#[path = "scenarios/tables.rs"]
mod tables;

use crate::chain::Scenario;
use crate::run::Tier;

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
    list.extend((0..tier.of(60, 600)).map(random::chain));
    list
}

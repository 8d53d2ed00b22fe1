//! What a merge does to single layers once base holds their data: it relinks, marks, empties or removes one.

pub(crate) mod empty;
pub(crate) mod mark;
pub(crate) mod relink;

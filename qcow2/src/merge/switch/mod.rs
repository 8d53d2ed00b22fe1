//! The switch of metadata, a layer at a time: another backing name, a mark, an empty disk, a removed file.

pub(crate) mod empty;
pub(crate) mod mark;
pub(crate) mod relink;

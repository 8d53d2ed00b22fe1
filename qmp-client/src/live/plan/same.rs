//! Whether a merge that was begun before is the one that is asked for now: names and indexes are those of the chain from
//! before it.

use std::path::Path;

use super::Request;
use crate::block::graph::Disk;
use crate::block::merge::Direction;
use crate::live::discover::file_id;
use crate::state::{Kind, State, StateLayer};

/// Whether the state speaks of this merge.
pub(super) fn is_asked_for(state: &State, disk: &Disk, request: &Request) -> bool {
    let at = |name: &String| index(state, disk, name);
    if request.direction == Direction::Up {
        let base = request.base.as_ref().map_or(Some(0), at);
        return state.kind == Kind::Pull && base == Some(state.base);
    }
    let Some(top) = request.top.as_ref().map_or(Some(state.layers.len()), at) else { return false };
    let base = match &request.base {
        Some(base) => at(base),
        None if request.shallow => top.checked_sub(1),
        None => Some(1),
    };
    let kind = match state.kind {
        Kind::Commit => true,
        Kind::ActiveCommit => request.allows_active(),
        Kind::Pull => false,
    };
    kind && base == Some(state.base) && top == state.top
}

/// The index that a layer had when the merge began, by the name that a user gives it.
fn index(state: &State, disk: &Disk, name: &str) -> Option<usize> {
    let bracket = name.strip_suffix(']').and_then(|name| name.rsplit_once('['));
    if let Some((of, index)) = bracket.and_then(|(of, index)| Some((of, index.parse::<usize>().ok()?))) {
        let is_disk = ["", disk.name(), state.disk.as_str()].contains(&of);
        return state.layer(index).filter(|_| is_disk).map(|layer| layer.index);
    }
    let is_file = |layer: &&StateLayer| {
        let (path, file) = (Path::new(name), Path::new(&layer.file));
        let same = file_id(path).is_some_and(|id| file_id(file) == Some(id));
        same || std::path::absolute(path).is_ok_and(|path| path == file) || layer.file == name
    };
    let by_node = state.layers.iter().find(|layer| layer.node == name);
    by_node.or_else(|| state.layers.iter().find(is_file)).map(|layer| layer.index)
}

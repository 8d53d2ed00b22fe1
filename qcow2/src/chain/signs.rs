//! Signs that somebody else uses a file of a chain, where no image says so for certain.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use rayon::prelude::*;

use super::Layer;
use super::name::possible_paths;
use super::siblings::read_names;
use crate::storage::{Access, FileId, FileKind, Host, NameKind, if_there};

/// An image whose backing name leads nowhere, and ends in the name of a layer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lookalike {
    /// The image.
    pub path: PathBuf,
    /// The layer that it may have used before one of the two was moved.
    pub may_use: FileId,
    /// Whether its disk is as large as the layer's, and it states no other format.
    pub fits: bool,
}

/// The images among `files` that may have used one of the layers before they, or it, were moved: the backing name leads
/// nowhere and ends in the layer's name, and no file of that name lies beside the image.
pub(crate) fn find_lookalikes(host: &dyn Host, files: &[PathBuf], layers: &[Layer]) -> Vec<Lookalike> {
    let names: Vec<(OsString, &Layer)> =
        layers.iter().filter_map(|layer| Some((layer.path.file_name()?.to_owned(), layer))).collect();
    files.par_iter().filter_map(|path| lookalike(host, path, &names)).collect()
}

fn lookalike(host: &dyn Host, path: &Path, names: &[(OsString, &Layer)]) -> Option<Lookalike> {
    let stat = host.stat(path).ok()?;
    if stat.kind != FileKind::Regular || names.iter().any(|(_, layer)| layer.id == stat.id) {
        return None;
    }
    // What cannot be read was told by the search for users.
    let cluster0 = read_names(&*host.open(path, Access::Read).ok()?).ok()??;
    if cluster0.merged_into().or_else(|| cluster0.merging_into()).is_some() {
        return None;
    }
    let led_to = possible_paths(cluster0.backing_name.as_deref()?, path);
    let (_, layer) = names.iter().find(|(name, _)| led_to.iter().any(|led| led.file_name() == Some(name)))?;
    let name = layer.path.file_name()?;
    // Where nobody can say whether there is a file, nothing leads nowhere.
    let leads_nowhere = |path: &Path| matches!(if_there(host.stat(path)), Ok(None));
    if !led_to.iter().all(|led| leads_nowhere(led)) || !leads_nowhere(&path.with_file_name(name)) {
        return None;
    }
    let stated = cluster0.backing_format();
    let fits = cluster0.header.size == layer.image.virtual_size()
        && stated.is_none_or(|stated| stated == layer.image.format().name());
    Some(Lookalike { path: path.to_owned(), may_use: layer.id, fits })
}

/// The other names of a layer's file among `files`: hard links.
pub(crate) fn other_names(host: &dyn Host, files: &[PathBuf], layer: &Layer) -> Vec<PathBuf> {
    let own = host.canonicalize(&layer.path).ok();
    let is_other = |path: &&PathBuf| {
        host.stat(path).is_ok_and(|stat| stat.id == layer.id)
            && !matches!(host.name_kind(path), Ok(NameKind::Link))
            && host.canonicalize(path).ok() != own
    };
    files.iter().filter(is_other).cloned().collect()
}

//! The switch of metadata when base holds the data: relinking the overlay above top, or turning the
//! active image into an empty overlay; marking and removing what is no longer needed.

use std::path::{Path, PathBuf};

use super::options::{CommitOptions, Span};
use super::plan::Afterwards;
use crate::chain::{Chain, Layer, new_backing_name};
use crate::error::{Error, Refusal, Result};
use crate::format::{Mark, RewriteError, Switch, plan_backing_switch, plan_mark};
use crate::image::Qcow2;
use crate::journal::{Edit, edit_headers};
use crate::storage::Host;
use crate::units::HostOffset;

/// Decides what happens above base, and whether it fits into the headers; nothing is written.
pub(super) fn plan(
    host: &dyn Host,
    chain: &Chain,
    span: Span,
    options: &CommitOptions,
) -> Result<Afterwards> {
    if span.top < span.active {
        let (name, atomic) = switch(host, chain, span, span.top + 1)?;
        let overlay = layer(chain, span.top + 1)?.path.clone();
        return Ok(Afterwards::Relink { overlay, name, atomic });
    }
    if options.keep_active {
        return Ok(Afterwards::Keep);
    }
    let (name, atomic) = if span.base + 1 == span.active {
        (None, true)
    } else {
        let (name, atomic) = switch(host, chain, span, span.active)?;
        (Some(name), atomic)
    };
    Ok(if options.delete { Afterwards::Delete { name, atomic } } else { Afterwards::Empty { name, atomic } })
}

fn layer(chain: &Chain, at: usize) -> Result<&Layer> {
    chain.layers().get(at).ok_or_else(|| Error::Usage("the chain has no such layer".into()))
}

fn qcow2(layer: &Layer) -> Result<&Qcow2> {
    let not =
        || Error::refused(&layer.path, Refusal::Other("it is raw, and has no backing name to change".into()));
    layer.image.as_qcow2().ok_or_else(not)
}

/// The name that the layer at `at` will use for base, and whether writing it is atomic.
fn switch(host: &dyn Host, chain: &Chain, span: Span, at: usize) -> Result<(String, bool)> {
    let overlay = layer(chain, at)?;
    let base = layer(chain, span.base)?;
    let old = qcow2(overlay)?.cluster0().backing_name.clone().unwrap_or_default();
    let name = new_backing_name(host, &old, &overlay.path, &base.path)?;
    let name = String::from_utf8(name).map_err(|_| {
        let reason = Refusal::Other("the path of its new backing file is not valid UTF-8".into());
        Error::refused(&overlay.path, reason)
    })?;
    let switch = plan_switch(overlay, &name, base.image.format().name())?;
    Ok((name, switch.atomic))
}

fn plan_switch(overlay: &Layer, name: &str, format: &str) -> Result<Switch> {
    let cluster = read_cluster(qcow2(overlay)?)?;
    plan_backing_switch(&cluster, name, format).map_err(|e| rewrite_error(&overlay.path, name, e))
}

/// Gives the layer at `at` base as its backing file. A record of the edit lies beside it or in `dir`
/// meanwhile.
pub(super) fn relink(
    host: &dyn Host,
    chain: &Chain,
    span: Span,
    at: usize,
    name: &str,
    dir: Option<&Path>,
) -> Result<()> {
    let format = layer(chain, span.base)?.image.format().name();
    let overlay = layer(chain, at)?;
    let switch = plan_switch(overlay, name, format)?;
    edit_headers(host, &edit(overlay, switch).into_iter().collect::<Vec<_>>(), dir)
}

/// Gives an image that is written under a journal another backing file.
pub(super) fn relink_journaled(image: &Qcow2, name: &str, format: &str) -> Result<()> {
    let cluster = read_cluster(image)?;
    let switch =
        plan_backing_switch(&cluster, name, format).map_err(|e| rewrite_error(image.path(), name, e))?;
    apply(image, &switch)
}

/// Marks layers, side by side; says for each whether its header had room. One without room stays as it is.
pub(super) fn mark(
    host: &dyn Host,
    layers: &[&Layer],
    base: &Path,
    mark: Mark,
    dir: Option<&Path>,
) -> Result<Vec<(PathBuf, bool)>> {
    let (mut edits, mut marked) = (Vec::new(), Vec::new());
    for layer in layers {
        let cluster = read_cluster(qcow2(layer)?)?;
        let switch = plan_mark(&cluster, &base.to_string_lossy(), mark).ok();
        marked.push((layer.path.clone(), switch.is_some()));
        edits.extend(switch.and_then(|switch| edit(layer, switch)));
    }
    edit_headers(host, &edits, dir)?;
    Ok(marked)
}

/// The edit of a layer's header, if there is anything to write.
fn edit(layer: &Layer, switch: Switch) -> Option<Edit<'_>> {
    let writes: Vec<_> = switch.writes.into_iter().map(|write| (write.offset, write.bytes)).collect();
    let file = &**layer.image.file();
    (!writes.is_empty()).then_some(Edit { path: &layer.path, file, writes, atomic: switch.atomic })
}

/// Cluster 0 of an opened image, as bytes.
pub(super) fn read_cluster(image: &Qcow2) -> Result<Vec<u8>> {
    let mut cluster = vec![0; image.geometry().cluster_size() as usize];
    image.read_table(HostOffset::ZERO, &mut cluster)?;
    Ok(cluster)
}

/// Carries an edit of cluster 0 out, with a barrier behind each write, which the journal makes whole.
pub(super) fn apply(image: &Qcow2, switch: &Switch) -> Result<()> {
    for write in &switch.writes {
        image.write(HostOffset::new(write.offset), &write.bytes)?;
        image.barrier()?;
    }
    Ok(())
}

/// An edit of cluster 0 that cannot be planned.
pub(super) fn rewrite_error(path: &Path, name: &str, error: RewriteError) -> Error {
    match error {
        RewriteError::Format(source) => Error::format(path, source),
        _ => Error::refused(path, Refusal::HeaderRoom { name: name.to_owned() }),
    }
}

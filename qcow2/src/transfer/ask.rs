//! Determines which layer of a chain must hold what the others show. The code behind this knows no direction.

use super::job::Job;
use super::needs::{Only, Question};
use super::zeros::Zeros;
use crate::chain::view::View;
use crate::error::{Error, Result};
use crate::image::{Image, read_snapshots};
use crate::units::GuestOffset;

/// Which layers of a chain a merge concerns, by their positions, the bottom first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Span {
    pub(crate) base: usize,
    pub(crate) top: usize,
    pub(crate) active: usize,
}

/// The job that lets base hold what the layers above it show, up to top: data moves down.
///
/// # Errors
/// A snapshot table that cannot be read.
pub(crate) fn down<'a>(images: &'a [&'a Image], span: Span) -> Result<Job<'a>> {
    let size = |at: usize| images.get(at).map_or(0, |image| image.virtual_size());
    let (base, top) = (size(span.base), size(span.top));
    // Behind the end of a short top the layer above it read zeros; it must not see base's old data.
    let seen_above = if span.top < span.active { seen_through(images, span.top + 1)? } else { 0 };
    let image = images.get(span.base).ok_or(Error::Broken { invariant: "a merge has all its layers" })?;
    let question = Question {
        view: View::new(images, span.base + 1, span.top),
        base: image,
        below_size: span.base.checked_sub(1).map_or(0, size),
        own: None,
        only: None,
        base_size: base,
        zero_until: base.min(seen_above).max(top),
        limit: u64::MAX,
    };
    let from = GuestOffset::ZERO;
    Ok(Job {
        layers: images,
        base: span.base,
        question,
        new_size: base.max(top),
        from,
        zeros: Zeros::Mapped,
        lost: None,
    })
}

/// The job that lets the image at `active` hold what the layers between it and `base` show: data moves up.
/// Without a base, these are all layers below it.
///
/// # Errors
/// [`Error::Broken`]: a merge has all its layers.
pub(crate) fn up<'a>(images: &'a [&'a Image], base: Option<usize>, active: usize) -> Result<Job<'a>> {
    let image = images.get(active).ok_or(Error::Broken { invariant: "a merge has all its layers" })?;
    let size = image.virtual_size();
    let question = Question {
        view: View::new(images, base.map_or(0, |base| base + 1), active),
        base: image,
        below_size: base.and_then(|base| images.get(base)).map_or(0, |image| image.virtual_size()),
        own: Some(active),
        only: None,
        // Its disk stays as large as it is.
        base_size: u64::MAX,
        zero_until: size,
        limit: size,
    };
    let from = GuestOffset::ZERO;
    Ok(Job { layers: images, base: active, question, new_size: size, from, zeros: Zeros::Mapped, lost: None })
}

/// Has the image at `active` hold what it would not show any more if other layers lay below it, those of `only`: data moves
/// up.
///
/// # Errors
/// [`Error::Broken`]: a merge has all its layers.
pub(crate) fn under_others<'a>(images: &'a [&'a Image], active: usize, only: Only<'a>) -> Result<Job<'a>> {
    let image = images.get(active).ok_or(Error::Broken { invariant: "a merge has all its layers" })?;
    let size = image.virtual_size();
    let question = Question {
        view: View::new(images, 0, active),
        base: image,
        below_size: only.sides.size_then(),
        own: Some(active),
        only: Some(only),
        base_size: u64::MAX,
        zero_until: size,
        limit: size,
    };
    let from = GuestOffset::ZERO;
    Ok(Job { layers: images, base: active, question, new_size: size, from, zeros: Zeros::Mapped, lost: None })
}

/// How far the overlay at `at` looks: its own disk, or that of an internal snapshot that is larger.
fn seen_through(images: &[&Image], at: usize) -> Result<u64> {
    let Some(image) = images.get(at) else { return Ok(0) };
    let snapshots = match image.as_qcow2() {
        Some(qcow2) => read_snapshots(qcow2.path(), &**qcow2.file(), qcow2.header())?,
        None => Vec::new(),
    };
    Ok(snapshots.iter().filter_map(|s| s.disk_size).fold(image.virtual_size(), u64::max))
}

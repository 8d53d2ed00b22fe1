//! What a domain boots after a merge that it was not told of.

use std::path::PathBuf;

use super::definitions::Mention;

/// What becomes of an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fate {
    /// It shows what it showed, or, as an empty overlay on base, what base shows.
    Right,
    /// It shows what the active image shows, and showed something else before.
    Changes,
    /// It keeps data that is out of date, and hides what base holds.
    Stale,
    /// Its file is removed.
    Removed,
}

/// What a domain boots that keeps its definition.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum After {
    /// The right disk.
    Right,
    /// It boots one of the images that stop being restore points.
    OtherDisk(PathBuf),
    /// Old data, as it names these images.
    Stale(Vec<PathBuf>),
    /// Nothing: it does not start, as these images are missing.
    Missing(Vec<PathBuf>),
}

impl Mention<'_> {
    /// What the domain boots when the images that were asked about have met these fates, in the same order.
    pub(crate) fn after(&self, fates: &[Fate]) -> After {
        let with = |wanted: Fate| -> Vec<PathBuf> {
            let of = |(image, place): (&Option<PathBuf>, &Option<usize>)| {
                image.clone().filter(|_| place.and_then(|place| fates.get(place)) == Some(&wanted))
            };
            self.disk.images.iter().zip(&self.places).filter_map(of).collect()
        };
        let (missing, stale) = (with(Fate::Removed), with(Fate::Stale));
        if !missing.is_empty() {
            return After::Missing(missing);
        }
        if !stale.is_empty() {
            return After::Stale(stale);
        }
        let source = self.places.first().copied().flatten().and_then(|place| fates.get(place));
        match (source, self.disk.images.first()) {
            (Some(Fate::Changes), Some(Some(image))) => After::OtherDisk(image.clone()),
            _ => After::Right,
        }
    }
}

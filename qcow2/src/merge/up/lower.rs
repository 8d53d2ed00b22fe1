//! What will lie below an image that takes data.

use crate::chain::Chain;
use crate::chain::differences::{Differences, Sides};
use crate::error::{Error, Result};
use crate::image::Image;
use crate::transfer::Job;
use crate::transfer::ask::{under_others, up};
use crate::transfer::needs::Only;

/// What will lie below an image.
#[derive(Debug)]
pub(in crate::merge) enum Lower {
    /// The layer at this position of its own chain, or nothing. What lies between is taken in without a comparison.
    Layer(Option<usize>),
    /// Another chain, or nothing. Only what would show something else is taken in.
    Other {
        /// The chain.
        chain: Option<Box<Chain>>,
        /// Where the image would show something else.
        differences: Differences,
    },
}

impl Lower {
    /// The layers that will lie below the image, the bottom first; `images` is its chain.
    pub(in crate::merge) fn images<'a>(&'a self, images: &[&'a Image]) -> Vec<&'a Image> {
        match self {
            Self::Layer(base) => base.and_then(|base| images.get(..=base)).unwrap_or_default().to_vec(),
            Self::Other { chain, .. } => chain.as_ref().map(|chain| chain.images()).unwrap_or_default(),
        }
    }

    /// The format of the new backing file; `chain` is that of the image.
    ///
    /// # Errors
    /// [`Error::Broken`]: positions come from the chain itself.
    pub(in crate::merge) fn format(&self, chain: &Chain) -> Result<Option<&'static str>> {
        let layer = match self {
            Self::Layer(base) => base.map(|base| chain.layer(base)).transpose()?,
            Self::Other { chain: other, .. } => {
                other.as_ref().map(|other| other.layer(other.active())).transpose()?
            }
        };
        Ok(layer.map(|layer| layer.image.format().name()))
    }

    /// Calls `f` with what is to be moved into the image that is the last of `images`.
    ///
    /// # Errors
    /// A file whose identity cannot be read; what `f` returns.
    pub(in crate::merge) fn with_job<T>(
        &self,
        images: &[&Image],
        f: impl FnOnce(&Job<'_>) -> Result<T>,
    ) -> Result<T> {
        let at = images.len().checked_sub(1).ok_or(Error::Broken { invariant: "a chain has its image" })?;
        match self {
            Self::Layer(base) => f(&up(images, *base, at)?),
            Self::Other { differences, .. } => {
                let then = self.images(images);
                let sides = Sides::new(images, at, &then)?;
                f(&under_others(images, at, Only { sides: &sides, differences })?)
            }
        }
    }
}

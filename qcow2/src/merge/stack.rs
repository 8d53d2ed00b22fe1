//! The layers of a merge, found once.

use crate::chain::{Chain, Layer};
use crate::error::{Error, Result};
use crate::transfer::ask::Span;

/// The layers that a merge concerns: none of them can be missing.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stack<'a> {
    /// The whole chain.
    pub(crate) chain: &'a Chain,
    /// Where the layers are in it.
    pub(crate) span: Span,
    /// The layer that takes the data.
    pub(crate) base: &'a Layer,
    /// What is merged: the layers above base up to top, the lowest first. There is one at least.
    pub(crate) merged: &'a [Layer],
    /// Base and what is merged.
    pub(crate) touched: &'a [Layer],
    /// The uppermost layer that is merged.
    pub(crate) top: &'a Layer,
    /// The layer above top; `None` if top is the active image.
    pub(crate) overlay: Option<&'a Layer>,
    /// The active image.
    pub(crate) active: &'a Layer,
}

impl<'a> Stack<'a> {
    /// The layers of a span.
    ///
    /// # Errors
    /// [`Error::Broken`] for a span of another chain.
    pub(crate) fn of(chain: &'a Chain, span: Span) -> Result<Self> {
        Self::find(chain, span).ok_or(Error::Broken { invariant: "a merge has all its layers" })
    }

    fn find(chain: &'a Chain, span: Span) -> Option<Self> {
        let layers = chain.layers();
        let touched = layers.get(span.base..=span.top)?;
        let (base, merged) = touched.split_first()?;
        let (top, active) = (merged.last()?, layers.get(span.active)?);
        let overlay = layers.get(span.top + 1);
        Some(Self { chain, span, base, merged, touched, top, overlay, active })
    }

    /// Whether the active image is merged, too.
    pub(crate) fn has_active(&self) -> bool {
        self.overlay.is_none()
    }
}

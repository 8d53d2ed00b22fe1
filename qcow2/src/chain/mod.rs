//! Chains of images: how names inside images become files, safely, and the map through the layers.

mod json;
mod name;
pub mod view;

pub use name::{BackingName, Spelling};

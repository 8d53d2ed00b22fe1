//! Chains of images: how names inside images become files, safely, and the map through the layers.

mod json;
mod name;
mod policy;
pub mod view;

pub use name::{BackingName, Spelling};
pub use policy::{DEFAULT_MAX_DEPTH, Policy};

//! Chains of images.
pub mod view;

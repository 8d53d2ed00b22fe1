//! What every suite needs, beside the kit: the article's chain, the built command, damaged headers.

mod chain;
mod patch;

pub(crate) use chain::Article;
pub(crate) use patch::Patch;

use std::path::PathBuf;

use kit::Lab;

/// The command to judge.
pub(crate) fn binary() -> PathBuf {
    kit::under_test(env!("CARGO_BIN_EXE_qmerge"))
}

/// An empty folder with the built command; `name` appears in its path.
pub(crate) fn lab(name: &str) -> Lab {
    Lab::with_command(name, binary())
}

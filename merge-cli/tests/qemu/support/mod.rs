//! What every suite needs: folders, processes, QEMU as the oracle, random numbers, damaged headers.

mod chain;
mod folder;
mod patch;
mod process;
mod random;
mod typed;
mod view;

pub(crate) use chain::Chain;
pub(crate) use folder::{Files, Folder};
pub(crate) use patch::Patch;
pub(crate) use process::{Holder, Run, merge_binary, run, tool_present};
pub(crate) use random::Random;
pub(crate) use typed::{command, type_hints, type_line};
pub(crate) use view::View;

/// Whether QEMU's tools are here; says so when they are not, and fails where `CI` is set.
pub(crate) fn qemu_present() -> bool {
    needs_tools(&["qemu-img", "qemu-io"])
}

/// Whether all `tools` are here; says which is not, and fails where `CI` is set.
pub(crate) fn needs_tools(tools: &[&str]) -> bool {
    match tools.iter().find(|tool| !tool_present(tool)) {
        None => true,
        Some(tool) => {
            skipped(&format!("{tool} is not installed"));
            false
        }
    }
}

/// Reports a test that cannot run here; fails where `CI` is set.
pub(crate) fn skipped(why: &str) {
    let test = std::thread::current().name().unwrap_or("?").to_owned();
    assert!(std::env::var_os("CI").is_none(), "{test}: {why}; with CI set nothing may be skipped");
    crate::skipped::skipped(&format!("{why}: the tests that need it pass without having tried anything"));
}

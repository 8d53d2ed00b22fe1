//! Ctrl-C: the run ends at the next step, and everything is cleaned up on the way out.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock};

use signal_hook::consts::{SIGHUP, SIGINT, SIGTERM};

use crate::tools::Result;

static STOPPED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// From here on SIGINT, SIGTERM and SIGHUP only set a flag.
pub(crate) fn install() -> Result<()> {
    let flag = STOPPED.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM, SIGHUP] {
        signal_hook::flag::register(signal, flag.clone())?;
    }
    Ok(())
}

/// Whether the run is to end.
pub(crate) fn asked() -> bool {
    STOPPED.get().is_some_and(|flag| flag.load(Ordering::Relaxed))
}

/// An error if the run is to end.
pub(crate) fn check() -> Result<()> {
    if asked() { Err("stopped by a signal".into()) } else { Ok(()) }
}

//! Other programs: finding them, running them.

use std::path::PathBuf;
use std::process::{Command, Stdio};

use crate::stop;

/// What may fail for any reason: it is told, and ends the run.
pub(crate) type Result<T> = std::result::Result<T, Box<dyn std::error::Error + Send + Sync>>;

/// Where a program lies on the search path (and where administrators' programs usually lie).
pub(crate) fn find(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let dirs = std::env::split_paths(&path).chain(["/usr/sbin".into(), "/sbin".into()]);
    dirs.map(|dir| dir.join(name)).find(|file| file.is_file())
}

/// Runs a program to its end and returns what it printed.
pub(crate) fn output(program: &str, args: &[&str]) -> Result<String> {
    stop::check()?;
    let path = find(program).ok_or_else(|| format!("{program} is not installed"))?;
    let out = Command::new(path).args(args).stdin(Stdio::null()).output()?;
    if !out.status.success() {
        let said = String::from_utf8_lossy(&out.stderr);
        return Err(format!("{program} {} failed: {}", args.join(" "), said.trim()).into());
    }
    Ok(String::from_utf8_lossy(&out.stdout).into_owned())
}

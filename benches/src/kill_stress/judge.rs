//! What must hold after a kill, and at the end: QEMU says.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use crate::chain::Chain;
use crate::{Result, stop};

/// What the guest saw before anything was merged.
const FLAT: &str = "flat.raw";

/// Keeps what the guest sees.
pub(crate) fn flatten(dir: &Path, chain: &Chain) -> Result<()> {
    let output = qemu_img(dir, &["convert", "-f", "qcow2", "-O", "raw", chain.active(), FLAT])?;
    if output.status.success() { Ok(()) } else { Err(text(&output).into()) }
}

/// Whether a merge that deletes layers is done, and has left nothing: it cannot be asked for again.
pub(crate) fn is_over(dir: &Path, chain: &Chain) -> Result<bool> {
    Ok(chain.deletes() && left_over(dir, chain)?.is_none())
}

/// A file that is not there when the merge is done: of a layer that is deleted, or the program's own.
fn left_over(dir: &Path, chain: &Chain) -> Result<Option<PathBuf>> {
    let deleted = if chain.deletes() { chain.base + 1..chain.top + 1 } else { 0..0 };
    let mut layers = chain.layers[deleted].iter().map(|(name, _)| dir.join(name));
    if let Some(layer) = layers.find(|path| path.exists()) {
        return Ok(Some(layer));
    }
    for entry in std::fs::read_dir(dir)? {
        let path = entry?.path();
        if path.to_string_lossy().contains(".qmerge-") {
            return Ok(Some(path));
        }
    }
    Ok(None)
}

/// Whether the active image was deleted: the merge was switched, and base is the disk.
fn is_gone(dir: &Path, chain: &Chain) -> bool {
    chain.deletes() && chain.is_active() && !dir.join(chain.active()).exists()
}

/// Whether a merge says that it goes on where an earlier one stopped.
pub(crate) fn went_on(said: &str) -> bool {
    said.contains("\"resumed\":{")
}

/// Leaks at most, and the guest's bytes are what they were.
pub(crate) fn after_a_kill(dir: &Path, chain: &Chain) -> Result<()> {
    check(dir, chain, &[0, 3])?;
    same_guest(dir, chain)
}

/// The guest's bytes are what they were, base has them if everything was merged, nothing is corrupt, and nothing is
/// left behind.
pub(crate) fn at_the_end(dir: &Path, chain: &Chain) -> Result<()> {
    if let Some(file) = left_over(dir, chain)? {
        return Err(format!("{} was left behind", file.display()).into());
    }
    check(dir, chain, &[0, 3])?;
    same_guest(dir, chain)?;
    if chain.is_active() { same_base(dir, chain) } else { Ok(()) }
}

fn same_guest(dir: &Path, chain: &Chain) -> Result<()> {
    if is_gone(dir, chain) {
        return same_base(dir, chain);
    }
    let output = qemu_img(dir, &["compare", "-f", "qcow2", "-F", "raw", chain.active(), FLAT])?;
    if output.status.success() {
        return Ok(());
    }
    Err(format!("{} differs from what the guest saw: {}", chain.active(), text(&output)).into())
}

/// Base begins with what the guest saw; a longer one keeps its tail.
fn same_base(dir: &Path, chain: &Chain) -> Result<()> {
    const COPY: &str = "base.raw";
    let (name, format) = &chain.layers[chain.base];
    let output = qemu_img(dir, &["convert", "-f", format, "-O", "raw", name, COPY])?;
    if !output.status.success() {
        return Err(format!("{name}: {}", text(&output)).into());
    }
    let copy = File::open(dir.join(COPY))?.take(std::fs::metadata(dir.join(FLAT))?.len());
    let (mut base, mut guest) = (BufReader::new(copy), BufReader::new(File::open(dir.join(FLAT))?));
    let mut at = 0;
    loop {
        let (a, b) = (base.fill_buf()?, guest.fill_buf()?);
        let len = a.len().min(b.len());
        if a[..len] != b[..len] || (len == 0 && a.len() != b.len()) {
            return Err(format!("{name} differs from what the guest saw, in the 8 KiB from {at}").into());
        }
        if len == 0 {
            return Ok(std::fs::remove_file(dir.join(COPY))?);
        }
        base.consume(len);
        guest.consume(len);
        at += len;
    }
}

/// Checks every layer that is there.
fn check(dir: &Path, chain: &Chain, allowed: &[i32]) -> Result<()> {
    for (name, format) in &chain.layers {
        if *format != "qcow2" || !dir.join(name).exists() {
            continue;
        }
        let output = qemu_img(dir, &["check", "-f", "qcow2", name])?;
        if !output.status.code().is_some_and(|code| allowed.contains(&code)) {
            return Err(format!("qemu-img check of {name}: {}", text(&output)).into());
        }
    }
    Ok(())
}

fn qemu_img(dir: &Path, args: &[&str]) -> Result<Output> {
    stop::check()?;
    Ok(Command::new("qemu-img").args(args).current_dir(dir).stdin(Stdio::null()).output()?)
}

fn text(output: &Output) -> String {
    let all = [&output.stdout[..], &output.stderr].concat();
    let text = String::from_utf8_lossy(&all);
    text.lines().take(12).collect::<Vec<_>>().join("; ")
}

//! Random chains, made by QEMU.

use std::fmt;
use std::path::Path;
use std::process::{Command, Stdio};

use kit::Random;

use crate::{Result, stop, tools};

const M: u64 = 1 << 20;
const K: u64 = 1 << 10;

/// A chain in a folder: `layer0` is the bottom.
#[derive(Debug)]
pub(crate) struct Chain {
    /// Name and format, bottom first.
    pub(crate) layers: Vec<(String, &'static str)>,
    /// The layer that receives the data.
    pub(crate) base: usize,
    /// The uppermost layer that is merged.
    pub(crate) top: usize,
    /// More files: data files.
    others: Vec<String>,
    options: Vec<&'static str>,
    /// How the images were made, for messages.
    made: String,
}

impl Chain {
    /// Makes a chain of two to four images of 8 to 160 MiB.
    pub(crate) fn new(dir: &Path, random: &mut Random) -> Result<Self> {
        let depth = 2 + random.below(3) as usize;
        let (base, top) = match random.below(3) {
            0 => {
                let base = random.below(depth as u64 - 1) as usize;
                (base, base + 1 + random.below((depth - base) as u64 - 1) as usize)
            }
            _ => (0, depth - 1),
        };
        let mut chain = Self {
            layers: Vec::new(),
            base,
            top,
            others: Vec::new(),
            options: Vec::new(),
            made: String::new(),
        };
        let largest = if random.below(3) == 0 { 152 } else { 40 };
        let size = M * (8 + random.below(largest));
        for index in 0..depth {
            chain.add(dir, index, size, random)?;
        }
        if random.below(5) == 0 {
            chain.options.push("--verify");
        }
        if random.below(5) == 0 {
            chain.options.push("--delete");
        } else if chain.is_active() && random.below(6) == 0 {
            chain.options.push("--keep-active");
        }
        Ok(chain)
    }

    /// Whether the active image itself is merged.
    pub(crate) fn is_active(&self) -> bool {
        self.top + 1 == self.layers.len()
    }

    /// The name of the active image.
    pub(crate) fn active(&self) -> &str {
        self.layers.last().map_or("", |(name, _)| name)
    }

    /// Whether merged layers are deleted.
    pub(crate) fn deletes(&self) -> bool {
        self.options.contains(&"--delete")
    }

    /// The arguments of the merge.
    pub(crate) fn arguments(&self) -> Vec<&str> {
        let mut args = vec!["commit", self.active(), "--json", "--base", &self.layers[self.base].0];
        if !self.is_active() {
            args.extend(["--top", &self.layers[self.top].0]);
        }
        args.extend(&self.options);
        args
    }

    /// Copies the images to a new folder.
    pub(crate) fn copy_to(&self, to: &Path) -> Result<()> {
        std::fs::create_dir(to)?;
        let from = to.parent().unwrap_or(to);
        let names = self.layers.iter().map(|(name, _)| name).chain(&self.others);
        let mut args = vec!["--sparse=auto".to_owned()];
        args.extend(names.map(|name| from.join(name).to_string_lossy().into_owned()));
        args.push(to.to_string_lossy().into_owned());
        tools::output("cp", &args.iter().map(String::as_str).collect::<Vec<_>>()).map(drop)
    }

    fn add(&mut self, dir: &Path, index: usize, size: u64, random: &mut Random) -> Result<()> {
        let is_raw = index == 0 && random.below(4) == 0;
        let format = if is_raw { "raw" } else { "qcow2" };
        let name = format!("layer{index}.{format}");
        // A layer may be shorter or longer than the one below it.
        let size = match random.below(6) {
            0 => size / 2,
            1 => size + M,
            _ => size,
        };
        let size = size.to_string();
        let mut args = vec!["create".to_owned(), "-q".to_owned(), "-f".to_owned(), format.to_owned()];
        if !is_raw {
            let options = self.options_of(&name, index, random);
            self.made += &format!(" [{name} {size} {options}]");
            args.extend(["-o".to_owned(), options]);
        }
        if let Some((below, format)) = self.layers.last() {
            args.extend(["-b", below, "-F", format].map(str::to_owned));
        }
        args.extend([name.clone(), size.clone()]);
        run(dir, "qemu-img", &args.iter().map(String::as_str).collect::<Vec<_>>())?;
        fill(dir, &name, format, size.parse()?, random)?;
        // Version 2 has snapshots that a base with them could not grow past; QEMU makes none with a data file.
        let may_have_snapshots =
            index == 0 && !is_raw && self.others.is_empty() && !self.made.contains("compat");
        if may_have_snapshots && random.below(5) == 0 {
            run(dir, "qemu-img", &["snapshot", "-c", "before", &name])?;
            self.options.push("--allow-snapshot-change");
            fill(dir, &name, format, size.parse()?, random)?;
        }
        self.layers.push((name, format));
        Ok(())
    }

    fn options_of(&mut self, name: &str, index: usize, random: &mut Random) -> String {
        const CLUSTERS: [u64; 8] = [512, 4 * K, 4 * K, 64 * K, 64 * K, 64 * K, 256 * K, 2 * M];
        // Two names fit in no header of 512 bytes beside everything else.
        let from = usize::from(index > 0);
        let cluster = CLUSTERS[from + random.below((CLUSTERS.len() - from) as u64) as usize];
        let mut options = format!("cluster_size={cluster}");
        match random.below(8) {
            0 => options += ",compat=0.10",
            1 if cluster >= 16 * K => options += ",extended_l2=on",
            2 => options += ",lazy_refcounts=on",
            3 => options += &format!(",refcount_bits={}", [8, 32, 64][random.below(3) as usize]),
            4 if index == 0 => {
                let data = format!("{name}.data");
                // A relative name starts at the working directory, so copies of the images use their own.
                options += &format!(",data_file={data}");
                self.others.push(data);
            }
            5 if index == 0 => options += ",preallocation=metadata",
            _ => {}
        }
        options
    }
}

impl fmt::Display for Chain {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "qmerge {} in{}", self.arguments().join(" "), self.made)
    }
}

/// Writes data and zeros to an image.
fn fill(dir: &Path, name: &str, format: &str, size: u64, random: &mut Random) -> Result<()> {
    let mut commands = Vec::new();
    for _ in 0..4 + random.below(24) {
        let pattern = 1 + random.below(255);
        let longest = if random.below(6) == 0 { size / 3 } else { 512 * K };
        let at = random.below(size / 512) * 512;
        let len = (1 + random.below(longest / 512)) * 512;
        let len = len.min(size - at);
        commands.push(match random.below(8) {
            0 => format!("write -z {at} {len}"),
            1 if format == "qcow2" => format!("discard {at} {len}"),
            _ => format!("write -P {pattern} {at} {len}"),
        });
    }
    let mut args = vec!["-d", "unmap", "-f", format];
    for command in &commands {
        args.extend(["-c", command]);
    }
    args.push(name);
    run(dir, "qemu-io", &args)
}

/// Runs one of QEMU's tools in the folder of the images.
fn run(dir: &Path, program: &str, args: &[&str]) -> Result<()> {
    stop::check()?;
    let output = Command::new(program).args(args).current_dir(dir).stdin(Stdio::null()).output()?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(format!("{program} {} failed: {}", args.join(" "), said.trim()).into())
}

//! A random chain and a random merge, from a seed.

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;

use kit::{Lab, Random};

use crate::support::{Patch, lab};

const K: u64 = 1 << 10;
const M: u64 = 1 << 20;
const G: u64 = 1 << 30;

/// One image of the chain.
#[derive(Clone, Debug)]
pub(super) struct RandomLayer {
    pub(super) name: String,
    pub(super) format: &'static str,
    pub(super) size: u64,
    pub(super) cluster: u64,
    pub(super) data_file: Option<String>,
    /// Names of its internal snapshots.
    pub(super) snapshots: Vec<String>,
    /// Names of its persistent bitmaps.
    pub(super) bitmaps: Vec<String>,
    /// The words that made it, for the description of a failed case.
    made: String,
}

/// How base and top are told to the command.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    Path,
    Absolute,
    Index,
    /// Left out where that means the same, a path otherwise.
    Default,
    /// `--shallow` where that means the same, a path otherwise.
    Shallow,
}

/// A chain, bottom first, and what is to be merged: the layers above `base`, up to `top`.
#[derive(Debug)]
pub(super) struct MergeCase {
    pub(super) folder: Lab,
    pub(super) layers: Vec<RandomLayer>,
    pub(super) base: usize,
    pub(super) top: usize,
    base_naming: Naming,
    top_naming: Naming,
    pub(super) delete: bool,
    pub(super) keep_active: bool,
    pub(super) verify: bool,
    pub(super) dry_run_first: bool,
    pub(super) flatten: Option<&'static str>,
}

impl MergeCase {
    /// The case that belongs to `seed`.
    pub(super) fn new(seed: u64) -> Self {
        let random = &mut Random::new(seed.wrapping_mul(0x2545_f491_4f6c_dd1d));
        let folder = lab(&format!("seed-{seed}"));
        let depth = random.pick(&[2, 2, 2, 3, 3, 3, 3, 4, 4, 4, 5, 5, 6, 8, 16]);
        let active = depth - 1;
        let base = if random.chance(45) { 0 } else { random.below(active) as usize };
        let active = active as usize;
        let top =
            if random.chance(45) { active } else { random.between(base as u64 + 1, active as u64) as usize };
        let namings = [Naming::Path, Naming::Absolute, Naming::Index, Naming::Default, Naming::Shallow];
        let mut case = Self {
            folder,
            layers: Vec::new(),
            base,
            top,
            base_naming: random.pick(&namings),
            top_naming: random.pick(&namings),
            delete: random.chance(15),
            keep_active: random.chance(10),
            verify: random.chance(20),
            dry_run_first: random.chance(15),
            flatten: random.pick(&[None, None, None, Some("raw"), Some("qcow2")]),
        };
        case.keep_active &= top == active && !case.delete;
        let first_size = size(random);
        for index in 0..depth as usize {
            let size = match case.layers.last() {
                None => first_size,
                Some(below) => next_size(random, below.size),
            };
            let layer = if index == 0 { case.bottom(random, size) } else { case.overlay(random, size) };
            case.layers.push(layer);
            case.fill(random, index);
        }
        case
    }

    /// The active image.
    pub(super) fn active(&self) -> &RandomLayer {
        &self.layers[self.layers.len() - 1]
    }

    /// Whether the active image itself is merged.
    pub(super) fn consolidates(&self) -> bool {
        self.top == self.layers.len() - 1
    }

    /// The arguments of the merge.
    pub(super) fn arguments(&self) -> Vec<String> {
        let mut args = vec!["commit".to_owned(), self.active().name.clone()];
        match self.base_naming {
            Naming::Default if self.base == 0 => {}
            Naming::Shallow if self.base + 1 == self.top => args.push("--shallow".to_owned()),
            naming => args.extend(["--base".to_owned(), self.name(self.base, naming)]),
        }
        match self.top_naming {
            Naming::Default if self.consolidates() => {}
            naming => args.extend(["--top".to_owned(), self.name(self.top, naming)]),
        }
        self.add_flags(&mut args);
        args
    }

    /// The arguments of the same merge with every layer named by its path, which keeps its meaning.
    pub(super) fn arguments_by_path(&self) -> Vec<String> {
        let (active, base, top) = (self.active(), &self.layers[self.base], &self.layers[self.top]);
        let mut args: Vec<_> =
            ["commit", &active.name, "--base", &base.name, "--top", &top.name].map(str::to_owned).into();
        self.add_flags(&mut args);
        args
    }

    fn add_flags(&self, args: &mut Vec<String>) {
        let flags =
            [(self.delete, "--delete"), (self.keep_active, "--keep-active"), (self.verify, "--verify")];
        args.extend(flags.into_iter().filter(|(set, _)| *set).map(|(_, flag)| flag.to_owned()));
    }

    fn name(&self, index: usize, naming: Naming) -> String {
        let name = &self.layers[index].name;
        match naming {
            Naming::Index => format!("vda[{}]", index + 1),
            Naming::Absolute => self.folder.arg(name),
            _ => name.clone(),
        }
    }

    fn bottom(&self, random: &mut Random, size: u64) -> RandomLayer {
        if random.chance(40) {
            // A raw file may end anywhere; QEMU counts the last sector as whole.
            let odd = if size > 0 && random.chance(40) { random.between(1, 511) } else { 0 };
            self.folder.raw("layer0.raw", size - odd, 0, 0);
            return RandomLayer {
                name: "layer0.raw".to_owned(),
                format: "raw",
                size,
                cluster: 4096,
                data_file: None,
                snapshots: Vec::new(),
                bitmaps: Vec::new(),
                made: format!("raw of {} bytes", size - odd),
            };
        }
        let mut layer = self.qcow2(random, 0, size);
        let mut options = layer.made.clone();
        if layer.data_file.is_some() && random.chance(40) {
            options += ",data_file_raw=on";
        }
        if random.chance(12) {
            options += ",preallocation=metadata";
        }
        let grown = random.chance(10) && size > 0;
        let first_size = if grown { size / 1024 * 512 } else { size };
        self.folder.create(&layer.name, first_size, &options);
        if grown {
            self.folder.img(&["resize", "-q", "-f", "qcow2", &layer.name, &size.to_string()]);
        } else if random.chance(10) && size > 0 && size < M {
            // A table that is longer than the size asks for.
            self.folder.img(&["resize", "-q", "-f", "qcow2", &layer.name, &(size * 5).to_string()]);
            self.folder.img(&["resize", "-q", "--shrink", "-f", "qcow2", &layer.name, &size.to_string()]);
            options += ", shrunk";
        }
        layer.made = options;
        layer
    }

    fn overlay(&self, random: &mut Random, size: u64) -> RandomLayer {
        let index = self.layers.len();
        let layer = self.qcow2(random, index, size);
        let below = &self.layers[index - 1];
        let path = self.folder.arg(&below.name);
        let json = format!(
            "json:{{\"driver\":\"{}\",\"file\":{{\"driver\":\"file\",\"filename\":\"{path}\"}}}}",
            below.format
        );
        let backing = match random.below(20) {
            // The header of small clusters has no room for long names.
            0 | 1 if layer.cluster >= 2048 => json,
            2 => format!("./{}", below.name),
            3..=6 if layer.cluster >= 1024 => path,
            7 if layer.cluster >= 1024 => format!("file:{path}"),
            _ => below.name.clone(),
        };
        self.folder.overlay(&layer.name, &backing, below.format, Some(size), &layer.made);
        RandomLayer { made: format!("{} over {backing}", layer.made), ..layer }
    }

    /// Options for a qcow2 image, in `made`; nothing is created.
    fn qcow2(&self, random: &mut Random, index: usize, size: u64) -> RandomLayer {
        let large = size > 64 * M;
        let clusters: &[u64] = match large {
            true => &[4 * K, 16 * K, 64 * K, 64 * K],
            false => &[
                512,
                512,
                1024,
                2048,
                4 * K,
                4 * K,
                8 * K,
                16 * K,
                32 * K,
                64 * K,
                64 * K,
                64 * K,
                256 * K,
                2 * M,
            ],
        };
        let cluster = random.pick(clusters);
        let version2 = random.chance(15);
        let mut options = format!("compat={},cluster_size={cluster}", if version2 { "0.10" } else { "1.1" });
        let mut data_file = None;
        if !version2 {
            if random.chance(40) {
                options += &format!(",refcount_bits={}", random.pick(&[1, 2, 4, 8, 32, 64]));
            }
            if cluster >= 16 * K && random.chance(30) {
                options += ",extended_l2=on";
            }
            if random.chance(30) {
                options += ",compression_type=zstd";
            }
            if random.chance(10) {
                options += ",lazy_refcounts=on";
            }
            if random.chance(12) {
                let name = format!("layer{index}.data");
                options += &format!(",data_file={name}");
                data_file = Some(name);
            }
        }
        RandomLayer {
            name: format!("layer{index}.qcow2"),
            format: "qcow2",
            size,
            cluster,
            data_file,
            snapshots: Vec::new(),
            bitmaps: Vec::new(),
            made: options,
        }
    }

    /// Random content, with snapshots and bitmaps on the way where the merge allows them.
    fn fill(&mut self, random: &mut Random, index: usize) {
        let free = index <= self.base || index > self.top;
        let layer = self.layers[index].clone();
        let few = self.layers.len() > 5 || layer.cluster >= M;
        let mut snapshots = Vec::new();
        let mut bitmaps = Vec::new();
        let whole =
            layer.format == "qcow2" && index == 0 && layer.size > 0 && layer.size <= M && random.chance(25);
        let mut commands = Vec::new();
        if whole {
            commands.push(format!("write -P {} 0 {}", pattern(index, 99), layer.size));
        }
        for part in 0..random.between(1, 3) {
            if layer.format == "qcow2" && free && layer.data_file.is_none() && part > 0 {
                // Refcounts of one bit have no room for snapshots; then there is none.
                if random.chance(30) {
                    let name = format!("snap{part}");
                    let args = ["snapshot", "-c", &name, "-f", "qcow2", &layer.name];
                    if self.folder.try_img(&args).code == 0 {
                        snapshots.push(name);
                    }
                }
                if random.chance(12) && layer.made.contains("compat=1.1") && layer.size > 0 {
                    let name = format!("bitmap{part}");
                    let args = ["bitmap", "--add", "-f", "qcow2", &layer.name, &name];
                    if self.folder.try_img(&args).code == 0 {
                        bitmaps.push(name);
                    }
                }
            }
            for seq in 0..random.below(if few { 4 } else { 9 }) {
                commands.push(operation(random, &layer, pattern(index, part * 10 + seq)));
            }
            let commands: Vec<_> = std::mem::take(&mut commands);
            let commands: Vec<_> = commands.iter().map(String::as_str).filter(|c| !c.is_empty()).collect();
            if !commands.is_empty() {
                // Some operations fail by design: a compressed cluster never overwrites an allocated one.
                let run = self.folder.try_io(layer.format, &layer.name, &commands);
                assert!(!run.text().contains("can't open"), "{run}");
            }
        }
        if layer.format == "qcow2" {
            self.mend(&layer.name);
        }
        if layer.format == "raw" && layer.size > 0 {
            let file = OpenOptions::new().write(true).open(self.folder.join(&layer.name)).unwrap();
            let len = file.metadata().unwrap().len();
            let at = random.below(len.max(1));
            let count = random.between(1, 70_000).min(len - at);
            file.write_all_at(&vec![pattern(index, 200) as u8; count as usize], at).unwrap();
        }
        if index == 0 && layer.format == "qcow2" && layer.data_file.is_none() && random.chance(10) {
            snapshots.clear();
            bitmaps.clear();
            self.compress_base(&layer);
        }
        let layer = &mut self.layers[index];
        layer.snapshots = snapshots;
        layer.bitmaps = bitmaps;
    }

    /// Undoes what QEMU 10.0.2 itself leaves where a compressed write fails: leaks, wrong flags, the corrupt bit.
    fn mend(&self, name: &str) {
        let image = Patch::of(&self.folder, name);
        let marked = image.u32(4) == 3 && image.u64(72) & 2 != 0;
        if marked || self.folder.try_img(&["check", "-q", "-f", "qcow2", name]).code != 0 {
            self.folder.img(&["check", "-q", "-r", "all", "-f", "qcow2", name]);
        }
    }

    /// Whether base must be refused: QEMU does not resize a version 2 image with snapshots either, because they
    /// do not say how large their disk was.
    pub(super) fn base_cannot_grow(&self) -> bool {
        let (base, top) = (&self.layers[self.base], &self.layers[self.top]);
        base.made.contains("compat=0.10") && !base.snapshots.is_empty() && base.size < top.size
    }

    /// Writes the bottom image again with every cluster compressed.
    fn compress_base(&mut self, layer: &RandomLayer) {
        let options: Vec<_> = layer
            .made
            .trim_end_matches(", shrunk")
            .split(',')
            .filter(|option| !option.starts_with("preallocation") && !option.starts_with("lazy"))
            .collect();
        let made = options.join(",");
        let plain = "plain.qcow2";
        fs::rename(self.folder.join(&layer.name), self.folder.join(plain)).unwrap();
        self.folder.img(&["convert", "-c", "-f", "qcow2", "-O", "qcow2", "-o", &made, plain, &layer.name]);
        fs::remove_file(self.folder.join(plain)).unwrap();
        self.layers[0].made = format!("{made}, compressed");
    }
}

impl std::fmt::Display for MergeCase {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        for layer in &self.layers {
            write!(f, "{} {} bytes: {}", layer.name, layer.size, layer.made)?;
            if !layer.snapshots.is_empty() || !layer.bitmaps.is_empty() {
                write!(f, ", with {} {}", layer.snapshots.join(" "), layer.bitmaps.join(" "))?;
            }
            writeln!(f)?;
        }
        writeln!(f, "qmerge {}", self.arguments().join(" "))
    }
}

/// A byte that tells layer and write apart, never 0.
fn pattern(layer: usize, seq: u64) -> u64 {
    (layer as u64 * 37 + seq) % 251 + 1
}

/// The size of the bottom image: mostly small, sometimes odd, seldom large and sparse.
fn size(random: &mut Random) -> u64 {
    match random.below(100) {
        0..=3 => random.pick(&[0, 512, 1024]),
        4..=7 => random.pick(&[2 * G + 512, 4 * G]),
        8..=30 => {
            let cluster = random.pick(&[4 * K, 64 * K]);
            cluster * random.between(1, 20) + random.pick(&[512, 1024, cluster - 512])
        }
        31..=60 => 64 * K * random.between(1, 64),
        _ => 512 * random.between(1, 8192),
    }
}

fn next_size(random: &mut Random, below: u64) -> u64 {
    match random.below(100) {
        0..=59 => below,
        60..=79 => below + 512 * random.between(1, 4096),
        80..=84 => below + 64 * K,
        _ => below / 512 * random.between(1, 4) / 4 * 512,
    }
}

/// One `qemu-io` command inside the disk, or nothing where the disk has no room.
fn operation(random: &mut Random, layer: &RandomLayer, pattern: u64) -> String {
    if layer.size < 512 {
        return String::new();
    }
    let area = if layer.size > 64 * M {
        // A few busy places of a large disk: both ends, and where 32-bit sizes wrap.
        random.pick(&[0, layer.size - 512 * K, (2 * G).min(layer.size - 512 * K)])
    } else {
        0
    };
    let room = (layer.size - area).min(if layer.size > 64 * M { 512 * K } else { layer.size });
    let aligned = random.chance(50);
    let unit = if aligned { layer.cluster.min(64 * K) } else { random.pick(&[512, 512, 4096]) };
    let at = (area + random.below(room)) / unit * unit;
    let count = if aligned { random.between(1, 6) } else { random.pick(&[1, 2, 3, 7, 16, 40, 200]) };
    let len = (unit * count).min(layer.size - at).min(4 * M);
    match random.below(100) {
        0..=49 => format!("write -P {pattern} {at} {len}"),
        50..=61 => format!("write -z {at} {len}"),
        62..=71 => format!("write -z -u {at} {len}"),
        72..=82 => format!("discard {at} {len}"),
        _ => {
            let at = at / layer.cluster * layer.cluster;
            let len = layer.cluster.min(layer.size - at);
            format!("write -c -P {pattern} {at} {len}")
        }
    }
}

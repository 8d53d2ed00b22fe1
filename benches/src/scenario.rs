//! What is measured: the files of each scenario, and the two commands.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use kit::Random;

use crate::content::{shuffle, write_noise, write_text};
use crate::image::{Fill, Image};
use crate::{Result, tools};

const MIB: u64 = 1 << 20;
const GIB: u64 = 1 << 30;
const TIB: u64 = 1 << 40;

/// What a scenario should reach.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Goal {
    /// So many times as fast as `qemu-img`: where blocks are copied, and where they can be shared.
    Faster { copied: f64, shared: f64 },
    /// Anonymous memory of at most 64 MiB plus buffers in flight.
    Memory,
}

/// A scenario.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Scenario {
    /// Its name on the command line.
    pub(crate) name: &'static str,
    /// What it is.
    pub(crate) about: &'static str,
    /// What it should reach.
    pub(crate) goal: Goal,
    /// Whether the file system makes a difference, so that it runs on all of them.
    pub(crate) everywhere: bool,
    /// Makes the files.
    pub(crate) prepare: fn(&mut Maker) -> Result<Work>,
}

/// What is run on the files of a scenario.
#[derive(Clone, Debug, Default)]
pub(crate) struct Work {
    /// Whether the commands change the files, so that each run gets its own copy.
    pub(crate) changes: bool,
    /// Arguments for `qmerge`.
    pub(crate) ours: Vec<String>,
    /// Arguments for `qemu-img`.
    pub(crate) theirs: Option<Vec<String>>,
    /// Arguments for a run of `qmerge` that is a part of `ours` and is counted apart.
    pub(crate) apart: Option<Vec<String>>,
    /// The image that must hold the same bytes after both.
    pub(crate) compare: Option<&'static str>,
    /// Whether it takes so long that one round is enough.
    pub(crate) once: bool,
}

/// All scenarios.
pub(crate) const ALL: &[Scenario] = &[
    Scenario {
        name: "dense",
        about: "1 GiB in order, 64 KiB clusters, into an empty base",
        goal: Goal::Faster { copied: 1.0, shared: 8.0 },
        everywhere: true,
        prepare: |m| m.one_overlay(16, GIB, Pattern::Dense, false),
    },
    Scenario {
        name: "dense-over",
        about: "1 GiB in order, 64 KiB clusters, over a full base",
        goal: Goal::Faster { copied: 1.0, shared: 8.0 },
        everywhere: true,
        prepare: |m| m.one_overlay(16, GIB, Pattern::Dense, true),
    },
    Scenario {
        name: "dense-raw",
        about: "1 GiB in order, 64 KiB clusters, over a full raw base",
        goal: Goal::Faster { copied: 1.0, shared: 8.0 },
        everywhere: true,
        prepare: Maker::raw_base,
    },
    Scenario {
        name: "scattered",
        about: "1 GiB in shuffled 64 KiB clusters, into an empty base",
        goal: Goal::Faster { copied: 1.3, shared: 8.0 },
        everywhere: true,
        prepare: |m| m.one_overlay(16, GIB, Pattern::Shuffled, false),
    },
    Scenario {
        name: "scattered-over",
        about: "1 GiB in shuffled 64 KiB clusters, over a full base of 2 GiB",
        goal: Goal::Faster { copied: 1.3, shared: 8.0 },
        everywhere: true,
        prepare: |m| m.one_overlay(16, GIB, Pattern::Shuffled, true),
    },
    Scenario {
        name: "small-clusters",
        about: "256 MiB in shuffled 4 KiB clusters, into an empty base",
        goal: Goal::Faster { copied: 5.0, shared: 5.0 },
        everywhere: true,
        prepare: |m| m.one_overlay(12, GIB / 4, Pattern::Shuffled, false),
    },
    Scenario {
        name: "small-clusters-over",
        about: "256 MiB in shuffled 4 KiB clusters, over a full base of 512 MiB",
        goal: Goal::Faster { copied: 5.0, shared: 5.0 },
        everywhere: false,
        prepare: |m| m.one_overlay(12, GIB / 4, Pattern::Shuffled, true),
    },
    Scenario {
        name: "zlib",
        about: "512 MiB of zlib clusters (ratio 0.75)",
        goal: Goal::Faster { copied: 1.0, shared: 1.0 },
        everywhere: false,
        prepare: |m| m.compressed("zlib"),
    },
    Scenario {
        name: "zstd",
        about: "512 MiB of zstd clusters (ratio 0.75)",
        goal: Goal::Faster { copied: 1.0, shared: 1.0 },
        everywhere: false,
        prepare: |m| m.compressed("zstd"),
    },
    Scenario {
        name: "layers-16",
        about: "16 overlays, each owns every 16th 64 KiB cluster of 1 GiB",
        goal: Goal::Faster { copied: 1.0, shared: 8.0 },
        everywhere: true,
        prepare: |m| m.interleaved(16),
    },
    Scenario {
        name: "layers-32",
        about: "32 overlays, each owns every 32nd 64 KiB cluster of 1 GiB",
        goal: Goal::Faster { copied: 1.0, shared: 8.0 },
        everywhere: false,
        prepare: |m| m.interleaved(32),
    },
    Scenario {
        name: "sparse",
        about: "4096 clusters of 64 KiB spread over 1 TiB",
        goal: Goal::Faster { copied: 1.0, shared: 1.0 },
        everywhere: false,
        prepare: Maker::sparse,
    },
    Scenario {
        name: "tiny",
        about: "16 clusters onto a fully allocated base of 1 TiB",
        goal: Goal::Faster { copied: 1.0, shared: 1.0 },
        everywhere: false,
        prepare: Maker::tiny,
    },
    Scenario {
        name: "check",
        about: "`check` of 1 TiB, fully allocated",
        goal: Goal::Faster { copied: 8.0, shared: 8.0 },
        everywhere: false,
        prepare: |m| m.look("check", &[], &[]),
    },
    Scenario {
        name: "map",
        about: "`map` as JSON of 1 TiB, fully allocated",
        goal: Goal::Faster { copied: 5.0, shared: 5.0 },
        everywhere: false,
        prepare: |m| m.look("map", &["--json"], &["--output=json"]),
    },
    Scenario {
        name: "map-scattered",
        about: "`map` as JSON of 1 TiB, 4 million extents",
        goal: Goal::Faster { copied: 5.0, shared: 5.0 },
        everywhere: false,
        prepare: Maker::map_scattered,
    },
    Scenario {
        name: "extents-plan",
        about: "`commit --dry-run`, 10 million extents of 512 bytes",
        goal: Goal::Memory,
        everywhere: false,
        prepare: |m| m.extents(&["commit", "--dry-run", "-q", "top.qcow2"]),
    },
    Scenario {
        name: "extents",
        about: "`commit`, 10 million extents of 512 bytes",
        goal: Goal::Memory,
        everywhere: false,
        prepare: |m| m.extents(&["commit", "-q", "top.qcow2"]),
    },
];

/// How the clusters of an overlay lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pattern {
    /// All clusters, in order.
    Dense,
    /// Every second cluster of the disk, in random order.
    Shuffled,
}

/// Makes the files of a scenario in a folder.
#[derive(Debug)]
pub(crate) struct Maker {
    /// The folder.
    pub(crate) dir: PathBuf,
    /// Whether a hundredth of the data is enough.
    pub(crate) quick: bool,
    /// The same sequence in every run.
    pub(crate) random: Random,
}

impl Maker {
    /// Makes things in `dir`.
    pub(crate) fn new(dir: &Path, quick: bool) -> Self {
        Self { dir: dir.to_owned(), quick, random: Random::new(0x9e37_79b9_7f4a_7c15) }
    }

    fn scaled(&self, bytes: u64) -> u64 {
        if self.quick { (bytes / 64).next_multiple_of(MIB) } else { bytes }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    fn image(&mut self, name: &str, image: &Image<'_>) -> Result<()> {
        let path = self.path(name);
        image.create(&path, &mut self.random)
    }

    fn qemu_img(&self, args: &[&str], file: &str) -> Result<()> {
        let path = self.path(file);
        let mut all = args.to_vec();
        let text = path.to_string_lossy();
        all.push(&text);
        tools::output("qemu-img", &all).map(drop)
    }

    /// A base of `bytes` with clusters of the given size, empty or full.
    fn base(&mut self, cluster_bits: u32, bytes: u64, full: bool) -> Result<()> {
        let count = if full { bytes >> cluster_bits } else { 0 };
        let clusters: Vec<u32> = (0..u32::try_from(count)?).collect();
        let fill = Fill::Random;
        self.image(
            "base.qcow2",
            &Image { size: bytes, cluster_bits, clusters: &clusters, backing: None, fill },
        )
    }

    /// One overlay with `bytes` of data.
    fn one_overlay(&mut self, cluster_bits: u32, bytes: u64, pattern: Pattern, over: bool) -> Result<Work> {
        let bytes = self.scaled(bytes);
        let count = u32::try_from(bytes >> cluster_bits)?;
        let step = if pattern == Pattern::Shuffled { 2 } else { 1 };
        let mut clusters: Vec<u32> = (0..count).map(|n| n * step).collect();
        if pattern == Pattern::Shuffled {
            shuffle(&mut self.random, &mut clusters);
        }
        let size = bytes * u64::from(step);
        self.base(cluster_bits, size, over)?;
        let fill = Fill::Random;
        let overlay = Image { size, cluster_bits, clusters: &clusters, backing: Some("base.qcow2"), fill };
        self.image("top.qcow2", &overlay)?;
        Ok(commit_top("base.qcow2"))
    }

    fn raw_base(&mut self) -> Result<Work> {
        let bytes = self.scaled(GIB);
        let mut out = BufWriter::with_capacity(1 << 20, File::create_new(self.path("base.raw"))?);
        write_noise(&mut self.random, &mut out, bytes)?;
        out.flush()?;
        let clusters: Vec<u32> = (0..u32::try_from(bytes >> 16)?).collect();
        let fill = Fill::Random;
        let overlay = Image { size: bytes, cluster_bits: 16, clusters: &clusters, backing: None, fill };
        self.image("top.qcow2", &overlay)?;
        self.qemu_img(&["rebase", "-u", "-b", "base.raw", "-F", "raw"], "top.qcow2")?;
        Ok(commit_top("base.raw"))
    }

    fn compressed(&mut self, kind: &str) -> Result<Work> {
        let bytes = self.scaled(GIB / 2);
        let plain = self.path("plain.raw");
        let mut out = BufWriter::with_capacity(1 << 20, File::create_new(&plain)?);
        write_text(&mut self.random, &mut out, bytes)?;
        out.flush()?;
        self.base(16, bytes, false)?;
        let kind = format!("compression_type={kind}");
        let mut args = vec!["convert", "-c", "-f", "raw", "-O", "qcow2", "-o", &kind];
        let text = plain.to_string_lossy();
        args.push(&text);
        self.qemu_img(&args, "top.qcow2")?;
        std::fs::remove_file(&plain)?;
        self.qemu_img(&["rebase", "-u", "-b", "base.qcow2", "-F", "qcow2"], "top.qcow2")?;
        Ok(commit_top("base.qcow2"))
    }

    fn interleaved(&mut self, layers: u32) -> Result<Work> {
        let bytes = self.scaled(GIB);
        self.base(16, bytes, false)?;
        let mut below = "base.qcow2".to_owned();
        for layer in 0..layers {
            let clusters: Vec<u32> = (layer..u32::try_from(bytes >> 16)?).step_by(layers as usize).collect();
            let name =
                if layer + 1 == layers { "top.qcow2".to_owned() } else { format!("layer-{layer}.qcow2") };
            let fill = Fill::Random;
            let image =
                Image { size: bytes, cluster_bits: 16, clusters: &clusters, backing: Some(&below), fill };
            self.image(&name, &image)?;
            below = name;
        }
        // `-b` is what lets qemu-img go down more than one layer; it keeps top as it is then.
        let theirs = ["commit", "-q", "-f", "qcow2", "-b", "base.qcow2", "top.qcow2"];
        Ok(Work { theirs: Some(owned(&theirs)), ..commit_top("base.qcow2") })
    }

    fn sparse(&mut self) -> Result<Work> {
        let size = if self.quick { TIB / 16 } else { TIB };
        let mut clusters: Vec<u32> = (0..4096).map(|n| n * ((size >> 16) / 4096) as u32).collect();
        shuffle(&mut self.random, &mut clusters);
        self.base(16, size, false)?;
        let fill = Fill::Random;
        let overlay =
            Image { size, cluster_bits: 16, clusters: &clusters, backing: Some("base.qcow2"), fill };
        self.image("top.qcow2", &overlay)?;
        Ok(commit_top("base.qcow2"))
    }

    /// A qcow2 file of 1 TiB whose clusters are all allocated, and hold nothing.
    fn huge(&mut self, name: &str) -> Result<u64> {
        let size = if self.quick { TIB / 16 } else { TIB };
        let text = self.path(name).to_string_lossy().into_owned();
        let bytes = size.to_string();
        let args = ["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", &text, &bytes];
        tools::output("qemu-img", &args)?;
        Ok(size)
    }

    fn tiny(&mut self) -> Result<Work> {
        let size = self.huge("base.qcow2")?;
        let clusters: Vec<u32> = (0..16).map(|n| n * ((size >> 16) / 16) as u32).collect();
        let fill = Fill::Random;
        let overlay =
            Image { size, cluster_bits: 16, clusters: &clusters, backing: Some("base.qcow2"), fill };
        self.image("top.qcow2", &overlay)?;
        // The bytes are not compared: that would read 1 TiB.
        let apart = Some(owned(&["check", "-q", "base.qcow2"]));
        Ok(Work { apart, compare: None, ..commit_top("base.qcow2") })
    }

    fn look(&mut self, verb: &str, ours: &[&str], theirs: &[&str]) -> Result<Work> {
        self.huge("image.qcow2")?;
        let args = |options: &[&str]| owned(&[&[verb], options, &["image.qcow2"]].concat());
        Ok(Work { ours: args(ours), theirs: Some(args(theirs)), ..Work::default() })
    }

    fn map_scattered(&mut self) -> Result<Work> {
        let size = if self.quick { TIB / 16 } else { TIB };
        let mut clusters: Vec<u32> = (0..u32::try_from(size >> 18)?).map(|n| n * 4).collect();
        shuffle(&mut self.random, &mut clusters);
        let fill = Fill::Hole;
        self.image(
            "image.qcow2",
            &Image { size, cluster_bits: 16, clusters: &clusters, backing: None, fill },
        )?;
        Ok(Work {
            ours: owned(&["map", "--json", "image.qcow2"]),
            theirs: Some(owned(&["map", "--output=json", "image.qcow2"])),
            ..Work::default()
        })
    }

    /// Ten million extents that neither join in the overlay nor in the base.
    fn extents(&mut self, ours: &[&str]) -> Result<Work> {
        let count = if self.quick { 200_000 } else { 10_000_000u32 };
        let mut clusters: Vec<u32> = (0..count).map(|n| n * 2).collect();
        // In pieces of 1024: their order is random, but tables are still used again and again.
        for piece in clusters.chunks_mut(1024) {
            shuffle(&mut self.random, piece);
        }
        let size = u64::from(count) * 2 * 512;
        self.base(9, size, false)?;
        let (fill, backing) = (Fill::Hole, Some("base.qcow2"));
        self.image("top.qcow2", &Image { size, cluster_bits: 9, clusters: &clusters, backing, fill })?;
        Ok(Work { changes: true, ours: owned(ours), once: true, ..Work::default() })
    }
}

/// A plain commit of `top.qcow2`, which both commands leave as an empty overlay.
fn commit_top(base: &'static str) -> Work {
    Work {
        changes: true,
        ours: owned(&["commit", "-q", "top.qcow2"]),
        theirs: Some(owned(&["commit", "-q", "-f", "qcow2", "top.qcow2"])),
        compare: Some(base),
        ..Work::default()
    }
}

fn owned(args: &[&str]) -> Vec<String> {
    args.iter().map(|arg| (*arg).to_owned()).collect()
}

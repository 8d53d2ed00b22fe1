//! The chain of the article, `base <- a <- b <- c`, with content that tells the layers apart.

use kit::{Lab, View};

use super::lab;

const M: u64 = 1 << 20;

/// The article's chain in a folder of its own.
#[derive(Debug)]
pub(crate) struct Article {
    /// Where the images lie.
    pub(crate) folder: Lab,
    /// The name of the bottom image.
    pub(crate) base: &'static str,
    /// Its format.
    pub(crate) format: &'static str,
    /// What the guest sees before anything is merged.
    pub(crate) before: View,
}

impl Article {
    /// Four images of 8 MiB with relative backing names; the base is `raw` or `qcow2`.
    #[track_caller]
    pub(crate) fn new(test: &str, format: &'static str) -> Self {
        let folder = lab(test);
        let base = if format == "raw" { "base.raw" } else { "base.qcow2" };
        folder.img(&["create", "-q", "-f", format, base, "8M"]);
        folder.io(format, base, &["write -P 0x10 0 4M", "write -P 0x11 6M 1M"]);
        let layers =
            [("a.qcow2", base, format), ("b.qcow2", "a.qcow2", "qcow2"), ("c.qcow2", "b.qcow2", "qcow2")];
        for (seq, (name, backing, format)) in layers.into_iter().enumerate() {
            folder.overlay(name, backing, format, Some(8 * M), "");
            fill(&folder, name, seq as u64);
        }
        let before = folder.view("qcow2", "c.qcow2");
        Self { folder, base, format, before }
    }

    /// What the guest sees through the active image now.
    #[track_caller]
    pub(crate) fn active(&self) -> View {
        self.folder.view("qcow2", "c.qcow2")
    }

    /// Fails unless the guest sees through `c.qcow2` what it saw before.
    #[track_caller]
    pub(crate) fn assert_guest_unchanged(&self) {
        self.active().assert_same(&self.before, "the guest's view through c.qcow2");
    }

    /// The content of base by itself.
    #[track_caller]
    pub(crate) fn base_view(&self) -> View {
        self.folder.view(self.format, self.base)
    }

    /// Fails if QEMU finds fault with one of `names`, or with base.
    #[track_caller]
    pub(crate) fn check_clean(&self, names: &[&str]) {
        for name in names {
            self.folder.check_clean(name);
        }
        if self.format == "qcow2" {
            self.folder.check_clean(self.base);
        }
    }
}

/// Data of its own, data over the layer below, zeros over data, and an unaligned piece.
fn fill(folder: &Lab, name: &str, seq: u64) {
    let pattern = 0x20 + 0x10 * seq;
    let write = |pattern: u64, at: u64, len: u64| format!("write -P {pattern} {at} {len}");
    let commands = [
        write(pattern, 512 * 1024 * (seq + 1), M),
        write(pattern + 1, 5 * M + seq * 65536, 65536),
        format!("write -z {} 128k", 3 * M + seq * 65536),
        write(pattern + 2, 7 * M + seq * 4096 + 512, 1536),
    ];
    folder.io("qcow2", name, &commands.each_ref().map(String::as_str));
}

//! What the files of a lab hold, to see whether somebody has changed them.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File};
use std::hash::Hasher;
use std::os::unix::fs::FileExt;
use std::path::Path;

use super::Lab;
use crate::Run;
use crate::view::data_ranges;

/// What the files of a folder hold, by name: length and digest. Holes count as zeros.
pub type Files = BTreeMap<String, (u64, u64)>;

impl Lab {
    /// The content of every file here, folders within included.
    pub fn files(&self) -> Files {
        let mut files = Files::new();
        add_files(&self.images, "", &mut files);
        files
    }

    /// The names of the files here.
    pub fn names(&self) -> Vec<String> {
        self.files().into_keys().collect()
    }

    /// Fails unless every file is as `before` says, with none more and none less.
    #[track_caller]
    pub fn assert_unchanged(&self, before: &Files, run: &Run) {
        let after = self.files();
        let mut names: Vec<_> = before.keys().chain(after.keys()).collect();
        names.dedup();
        let changed: Vec<_> =
            names.into_iter().filter(|name| before.get(*name) != after.get(*name)).collect();
        assert!(changed.is_empty(), "these files changed: {changed:?}\n{run}");
    }
}

fn add_files(folder: &Path, prefix: &str, files: &mut Files) {
    for entry in fs::read_dir(folder).unwrap() {
        let entry = entry.unwrap();
        let name = format!("{prefix}{}", entry.file_name().to_string_lossy());
        let kind = entry.file_type().unwrap();
        if kind.is_dir() {
            add_files(&entry.path(), &format!("{name}/"), files);
        } else if kind.is_file() {
            files.insert(name, digest(&entry.path()));
        } else {
            files.insert(name, (0, 0));
        }
    }
}

/// Length and digest of a file; blocks of zeros count as holes.
fn digest(path: &Path) -> (u64, u64) {
    const BLOCK: usize = 4096;
    let file = File::open(path).unwrap();
    let len = file.metadata().unwrap().len();
    let mut hasher = DefaultHasher::new();
    let mut buffer = vec![0; 256 * BLOCK];
    let mut done = 0;
    for (start, end) in data_ranges(&file) {
        let mut at = (start / BLOCK as u64 * BLOCK as u64).max(done);
        while at < end {
            let count = ((end - at).min(buffer.len() as u64)) as usize;
            file.read_exact_at(&mut buffer[..count], at).unwrap();
            for (index, block) in buffer[..count].chunks(BLOCK).enumerate() {
                if block.iter().any(|byte| *byte != 0) {
                    hasher.write_u64(at + (index * BLOCK) as u64);
                    hasher.write(block);
                }
            }
            at += count as u64;
        }
        done = at;
    }
    (len, hasher.finish())
}

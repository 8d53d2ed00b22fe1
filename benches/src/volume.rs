//! Where scenarios run: a folder of the machine's own file system, or a file system made in a file and
//! mounted for the run.

use std::path::{Path, PathBuf};

use tempfile::TempDir;

use crate::{Result, tools};

/// A folder to work in; removed, with the mount under it, when dropped.
#[derive(Debug)]
pub(crate) struct Volume {
    /// The type of the file system.
    pub(crate) fs: String,
    /// Whether files may share blocks.
    pub(crate) shares: bool,
    /// The folder.
    pub(crate) path: PathBuf,
    // Fields are dropped in this order: the mount first, then the folder that holds it.
    _mount: Option<Mount>,
    _dir: TempDir,
}

#[derive(Debug)]
struct Mount(PathBuf);

impl Drop for Mount {
    fn drop(&mut self) {
        let path = self.0.to_string_lossy();
        // A stopped run comes here too, so this does not go through `tools`. The loop device goes away
        // with the mount.
        let done = std::process::Command::new("umount").arg(&self.0).status();
        if !done.is_ok_and(|status| status.success()) {
            eprintln!("side-by-side: {path} could not be unmounted; `umount {path}`, then remove its folder");
        }
    }
}

impl Volume {
    /// A new folder inside `parent`.
    pub(crate) fn plain(parent: &Path) -> Result<Self> {
        let dir = temporary(parent)?;
        let out = tools::output("df", &["--output=fstype", &parent.to_string_lossy()])?;
        let fs = out.lines().nth(1).unwrap_or("unknown").trim().to_owned();
        let shares = shares(&fs);
        Ok(Self { fs, shares, path: dir.path().to_owned(), _mount: None, _dir: dir })
    }

    /// A new file system (`ext4`, `xfs`, `btrfs`) of `size` bytes in a sparse file inside `parent`.
    pub(crate) fn mounted(parent: &Path, fs: &str, size: u64) -> Result<Self> {
        let dir = temporary(parent)?;
        let file = dir.path().join("file-system");
        std::fs::File::create_new(&file)?.set_len(size)?;
        let name = file.to_string_lossy();
        match fs {
            "xfs" => tools::output("mkfs.xfs", &["-q", "-m", "reflink=1", &name])?,
            _ => tools::output(&format!("mkfs.{fs}"), &["-q", &name])?,
        };
        let path = dir.path().join("mounted");
        std::fs::create_dir(&path)?;
        tools::output("mount", &["-t", fs, "-o", "loop", &name, &path.to_string_lossy()])?;
        let mount = Mount(path.clone());
        let shares = shares(fs);
        Ok(Self { fs: fs.to_owned(), shares, path, _mount: Some(mount), _dir: dir })
    }
}

fn temporary(parent: &Path) -> Result<TempDir> {
    Ok(tempfile::Builder::new().prefix("side-by-side-").tempdir_in(parent)?)
}

fn shares(fs: &str) -> bool {
    matches!(fs, "xfs" | "btrfs" | "bcachefs")
}

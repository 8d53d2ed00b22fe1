//! A folder with images, and the programs that work in it: QEMU's, the shell, and the command `qmerge`.
//!
//! `QMERGE_TEST_DIR` says where the folders lie, `QMERGE_TEST_KEEP` keeps that of a failed test.

mod command;
mod files;

pub use files::Files;

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::{Run, View, run};

/// The command to judge: the one that was built, unless `QMERGE_TEST_BINARY` names another.
pub fn under_test(built: impl Into<PathBuf>) -> PathBuf {
    std::env::var_os("QMERGE_TEST_BINARY").map_or_else(|| built.into(), PathBuf::from)
}

/// Two folders that go when the test ends: one for images, one for what they should read as.
#[derive(Debug)]
pub struct Lab {
    temporary: Option<tempfile::TempDir>,
    images: PathBuf,
    views: PathBuf,
    next_view: AtomicUsize,
    /// The command that is under test.
    command: PathBuf,
}

impl Lab {
    /// An empty folder; `name` appears in its path. The command under test is what `PATH` knows as `qmerge`.
    pub fn new(name: &str) -> Self {
        Self::with_command(name, "qmerge")
    }

    /// The same, with the command that was built; see [`under_test`].
    pub fn with_command(name: &str, built: impl Into<PathBuf>) -> Self {
        let command = under_test(built);
        let parent = std::env::var_os("QMERGE_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let temporary =
            tempfile::Builder::new().prefix(&format!("qmerge-{name}-")).tempdir_in(parent).unwrap();
        let images = temporary.path().canonicalize().unwrap().join("images");
        let views = temporary.path().join("views");
        fs::create_dir(&images).unwrap();
        fs::create_dir(&views).unwrap();
        Self { temporary: Some(temporary), images, views, next_view: AtomicUsize::new(0), command }
    }

    /// Where the images lie.
    pub fn dir(&self) -> &Path {
        &self.images
    }

    /// The path of the image `name`.
    pub fn join(&self, name: &str) -> PathBuf {
        self.images.join(name)
    }

    /// The path of the image `name` as an argument.
    pub fn arg(&self, name: &str) -> String {
        self.join(name).to_str().unwrap().to_owned()
    }

    /// A path outside the image folder for a new file.
    pub fn scratch(&self) -> PathBuf {
        self.views.join(format!("{}.raw", self.next_view.fetch_add(1, Ordering::Relaxed)))
    }

    /// Runs a program here, whatever it answers.
    #[track_caller]
    pub fn run(&self, program: &str, args: &[&str]) -> Run {
        run(&self.images, program, args)
    }

    /// Runs a script of the shell here; it must succeed.
    #[track_caller]
    pub fn sh(&self, script: &str) {
        run(&self.images, "sh", &["-ec", script]).ok();
    }

    /// Runs `qemu-img` here, whatever it answers.
    #[track_caller]
    pub fn try_img(&self, args: &[&str]) -> Run {
        run(&self.images, "qemu-img", args)
    }

    /// Runs `qemu-img` here; it must succeed.
    #[track_caller]
    pub fn img(&self, args: &[&str]) -> Run {
        self.try_img(args).ok()
    }

    /// `qemu-img create` of a qcow2 image.
    #[track_caller]
    pub fn create(&self, name: &str, size: u64, options: &str) {
        let size = size.to_string();
        let mut args = vec!["create", "-q", "-f", "qcow2"];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.extend([name, &size]);
        self.img(&args);
    }

    /// `qemu-img create` of an overlay; `size` is its backing file's if `None`.
    #[track_caller]
    pub fn overlay(&self, name: &str, backing: &str, format: &str, size: Option<u64>, options: &str) {
        let size = size.map(|size| size.to_string());
        let mut args = vec!["create", "-q", "-f", "qcow2", "-b", backing, "-F", format];
        if !options.is_empty() {
            args.extend(["-o", options]);
        }
        args.push(name);
        args.extend(size.as_deref());
        self.img(&args);
    }

    /// Runs `qemu-io` commands on an image; all must succeed.
    #[track_caller]
    pub fn io(&self, format: &str, name: &str, commands: &[&str]) -> Run {
        let run = self.try_io(format, name, commands).ok();
        assert!(!run.text().contains("Pattern verification failed"), "{run}");
        run
    }

    /// Runs `qemu-io` commands on an image, discards reaching it; they may fail.
    #[track_caller]
    pub fn try_io(&self, format: &str, name: &str, commands: &[&str]) -> Run {
        let mut args = vec!["-d", "unmap", "-f", format];
        for command in commands {
            args.extend(["-c", *command]);
        }
        args.push(name);
        run(&self.images, "qemu-io", &args)
    }

    /// A raw file of `size` bytes: the first `filled` bytes hold `pattern`, the rest is a hole.
    pub fn raw(&self, name: &str, size: u64, filled: u64, pattern: u8) {
        let file = File::create(self.join(name)).unwrap();
        file.set_len(size).unwrap();
        file.write_all_at(&vec![pattern; filled as usize], 0).unwrap();
    }

    /// What QEMU reads from an image, through its whole chain.
    #[track_caller]
    pub fn view(&self, format: &str, name: &str) -> View {
        let target = self.scratch();
        self.img(&["convert", "-U", "-f", format, "-O", "raw", name, target.to_str().unwrap()]);
        View::new(target)
    }

    /// What QEMU reads from the internal snapshot `snapshot` of a qcow2 image.
    #[track_caller]
    pub fn snapshot_view(&self, name: &str, snapshot: &str) -> View {
        let target = self.scratch();
        let target_name = target.to_str().unwrap();
        self.img(&["convert", "-U", "-l", snapshot, "-f", "qcow2", "-O", "raw", name, target_name]);
        View::new(target)
    }

    /// Fails unless QEMU finds neither corruption nor leak in a qcow2 image.
    #[track_caller]
    pub fn check_clean(&self, name: &str) {
        let run = self.try_img(&["check", "-q", "-U", "-f", "qcow2", &self.arg(name)]);
        assert!(run.code == 0, "qemu-img check of {name}:\n{run}");
    }

    /// The chain from `name` down, as file names relative to this folder.
    #[track_caller]
    pub fn chain_of(&self, name: &str) -> Vec<String> {
        let run = self.img(&["info", "-U", "--backing-chain", "--output=json", "-f", "qcow2", name]);
        let prefix = format!("{}/", self.images.display());
        let layers = run.json();
        let names = layers.as_array().unwrap().iter().map(|layer| {
            let name = layer["filename"].as_str().unwrap();
            let name = name.strip_prefix(&prefix).unwrap_or(name);
            name.trim_start_matches("./").to_owned()
        });
        names.collect()
    }

    /// The backing name of a qcow2 image as written in its header, and the format beside it.
    #[track_caller]
    pub fn backing_of(&self, name: &str) -> Option<(String, String)> {
        let info = self.img(&["info", "-U", "--output=json", "-f", "qcow2", name]).json();
        let text = |key: &str| info[key].as_str().map(str::to_owned);
        Some((text("backing-filename")?, text("backing-filename-format").unwrap_or_default()))
    }

    /// Fails unless QEMU finds every qcow2 file here sound.
    #[track_caller]
    pub fn all_clean(&self) {
        for name in self.names() {
            let mut magic = [0; 4];
            let head = fs::File::open(self.join(&name)).and_then(|mut file| file.read_exact(&mut magic));
            if head.is_ok() && &magic == b"QFI\xfb" {
                self.check_clean(&name);
            }
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking()
            && std::env::var_os("QMERGE_TEST_KEEP").is_some()
            && let Some(temporary) = self.temporary.take()
        {
            eprintln!("images kept in {}", temporary.keep().display());
        }
    }
}

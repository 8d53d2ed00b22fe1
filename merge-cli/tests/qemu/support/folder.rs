//! A folder of images, and the commands that work in it.

use std::collections::BTreeMap;
use std::collections::hash_map::DefaultHasher;
use std::fs::{self, File};
use std::hash::Hasher;
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};

use super::view::data_ranges;
use super::{Patch, Run, View, merge_binary, run, type_hints};

/// Two folders that go when the test ends: one for images, one for what they should read as.
#[derive(Debug)]
pub(crate) struct Folder {
    temporary: Option<tempfile::TempDir>,
    images: PathBuf,
    views: PathBuf,
    next_view: AtomicUsize,
}

/// What the files of a folder hold, by name; holes count as zeros.
pub(crate) type Files = BTreeMap<String, (u64, u64)>;

impl Folder {
    /// An empty folder; `name` appears in its path.
    pub(crate) fn new(name: &str) -> Self {
        let parent = std::env::var_os("QMERGE_TEST_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let temporary =
            tempfile::Builder::new().prefix(&format!("qmerge-{name}-")).tempdir_in(parent).unwrap();
        let images = temporary.path().canonicalize().unwrap().join("images");
        let views = temporary.path().join("views");
        fs::create_dir(&images).unwrap();
        fs::create_dir(&views).unwrap();
        Self { temporary: Some(temporary), images, views, next_view: AtomicUsize::new(0) }
    }

    /// Where the images lie.
    pub(crate) fn path(&self) -> &Path {
        &self.images
    }

    /// The path of the image `name`.
    pub(crate) fn join(&self, name: &str) -> PathBuf {
        self.images.join(name)
    }

    /// The path of the image `name` as an argument.
    pub(crate) fn arg(&self, name: &str) -> String {
        self.join(name).to_str().unwrap().to_owned()
    }

    /// A path outside the image folder for a new file.
    pub(crate) fn scratch(&self) -> PathBuf {
        self.views.join(format!("{}.raw", self.next_view.fetch_add(1, Ordering::Relaxed)))
    }

    /// Runs `qmerge` here, and types the hints that it prints, if it does; see [`type_hints`].
    #[track_caller]
    pub(crate) fn qmerge(&self, args: &[&str]) -> Run {
        let run = run(&self.images, merge_binary(), args);
        type_hints(&self.images, &run);
        run
    }

    /// Runs the built command here, and kills it when it is about to sync for the `call`-th time. False if it ends before.
    pub(crate) fn killed_at_sync(&self, call: u32, args: &[&str]) -> bool {
        self.signalled_at_sync("SIGKILL", call, args).code != 0
    }

    /// Runs the built command here, and sends it a signal when it is about to sync for the `call`-th time. It copies slowly
    /// if it may answer the signal: a thread of its own takes it, and comes late on a busy machine.
    pub(crate) fn signalled_at_sync(&self, signal: &str, call: u32, args: &[&str]) -> Run {
        let inject = format!("inject=fdatasync:signal={signal}:when={call}");
        let slowly = ["-e", "inject=fadvise64:delay_enter=100000"];
        let slowly: &[&str] = if signal == "SIGKILL" { &[] } else { &slowly };
        self.traced(&[&["-e", "trace=fdatasync,fadvise64", "-e", &inject], slowly].concat(), args)
    }

    /// Runs the built command here, and kills it when it is about to remove the file `name`. False if it ends before.
    pub(crate) fn killed_at_removal(&self, name: &str, args: &[&str]) -> bool {
        let kill = ["-e", "trace=?unlink,unlinkat", "-e", "inject=?unlink,unlinkat:signal=SIGKILL:when=1"];
        // By the bare name, as it is removed from its folder, which is open.
        self.traced(&[&kill[..], &["-P", name]].concat(), args).code != 0
    }

    /// Runs the built command here, and kills it when one of its threads is about to sync a folder for the `call`-th time.
    /// False if it ends before.
    pub(crate) fn killed_at_folder_sync(&self, call: u32, args: &[&str]) -> bool {
        let inject = format!("inject=fsync:signal=SIGKILL:when={call}");
        self.traced(&["-e", "trace=fsync", "-e", &inject], args).code != 0
    }

    /// Runs the built command here under strace with these options.
    pub(crate) fn traced(&self, options: &[&str], args: &[&str]) -> Run {
        let binary = merge_binary().display().to_string();
        let strace = ["-qq", "-f", "-o", "/dev/null"];
        run(&self.images, "strace", &[&strace, options, &[&binary], args].concat())
    }

    /// Runs a script of the shell here; it must succeed.
    #[track_caller]
    pub(crate) fn sh(&self, script: &str) {
        run(&self.images, "sh", &["-ec", script]).ok();
    }

    /// Runs `qemu-img` here, whatever it answers.
    #[track_caller]
    pub(crate) fn try_img(&self, args: &[&str]) -> Run {
        run(&self.images, "qemu-img", args)
    }

    /// Runs `qemu-img` here; it must succeed.
    #[track_caller]
    pub(crate) fn img(&self, args: &[&str]) -> Run {
        self.try_img(args).ok()
    }

    /// `qemu-img create` of a qcow2 image.
    #[track_caller]
    pub(crate) fn create(&self, name: &str, size: u64, options: &str) {
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
    pub(crate) fn overlay(&self, name: &str, backing: &str, format: &str, size: Option<u64>, options: &str) {
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
    pub(crate) fn io(&self, format: &str, name: &str, commands: &[&str]) -> Run {
        let run = self.try_io(format, name, commands).ok();
        assert!(!run.text().contains("Pattern verification failed"), "{run}");
        run
    }

    /// Runs `qemu-io` commands on an image, discards reaching it; they may fail.
    #[track_caller]
    pub(crate) fn try_io(&self, format: &str, name: &str, commands: &[&str]) -> Run {
        let mut args = vec!["-d", "unmap", "-f", format];
        for command in commands {
            args.extend(["-c", *command]);
        }
        args.push(name);
        run(&self.images, "qemu-io", &args)
    }

    /// A raw file of `size` bytes: the first `filled` bytes hold `pattern`, the rest is a hole.
    pub(crate) fn raw(&self, name: &str, size: u64, filled: u64, pattern: u8) {
        let file = File::create(self.join(name)).unwrap();
        file.set_len(size).unwrap();
        file.write_all_at(&vec![pattern; filled as usize], 0).unwrap();
    }

    /// What QEMU reads from an image, through its whole chain.
    #[track_caller]
    pub(crate) fn view(&self, format: &str, name: &str) -> View {
        let target = self.scratch();
        self.img(&["convert", "-U", "-f", format, "-O", "raw", name, target.to_str().unwrap()]);
        View::new(target)
    }

    /// What QEMU reads from the internal snapshot `snapshot` of a qcow2 image.
    #[track_caller]
    pub(crate) fn snapshot_view(&self, name: &str, snapshot: &str) -> View {
        let target = self.scratch();
        let target_name = target.to_str().unwrap();
        self.img(&["convert", "-U", "-l", snapshot, "-f", "qcow2", "-O", "raw", name, target_name]);
        View::new(target)
    }

    /// Opens a qcow2 file for changing single fields.
    #[track_caller]
    pub(crate) fn patch(&self, name: &str) -> Patch {
        Patch::open(&self.join(name))
    }

    /// Fails unless QEMU finds neither corruption nor leak in a qcow2 image.
    #[track_caller]
    pub(crate) fn check_clean(&self, name: &str) {
        let run = self.try_img(&["check", "-q", "-U", "-f", "qcow2", &self.arg(name)]);
        assert!(run.code == 0, "qemu-img check of {name}:\n{run}");
    }

    /// The chain from `name` down, as file names relative to this folder.
    #[track_caller]
    pub(crate) fn chain_of(&self, name: &str) -> Vec<String> {
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
    pub(crate) fn backing_of(&self, name: &str) -> Option<(String, String)> {
        let info = self.img(&["info", "-U", "--output=json", "-f", "qcow2", name]).json();
        let text = |key: &str| info[key].as_str().map(str::to_owned);
        Some((text("backing-filename")?, text("backing-filename-format").unwrap_or_default()))
    }

    /// Runs a merge that must succeed, keep what the guest sees through `active`, and leave every image sound.
    #[track_caller]
    pub(crate) fn merge(&self, active: &str, args: &[&str]) -> Run {
        let before = self.view("qcow2", active);
        let mut words = vec!["commit", active];
        words.extend(args);
        let run = self.qmerge(&words).ok();
        if self.join(active).exists() {
            self.view("qcow2", active).assert_same(&before, &format!("{run}\nthe view through {active}"));
        }
        self.all_clean();
        run
    }

    /// Fails unless QEMU finds every qcow2 file here sound.
    #[track_caller]
    pub(crate) fn all_clean(&self) {
        for name in self.names() {
            let mut magic = [0; 4];
            let head = fs::File::open(self.join(&name)).and_then(|mut file| file.read_exact(&mut magic));
            if head.is_ok() && &magic == b"QFI\xfb" {
                self.check_clean(&name);
            }
        }
    }

    /// The content of every file here, folders within included.
    pub(crate) fn files(&self) -> Files {
        let mut files = Files::new();
        add_files(&self.images, "", &mut files);
        files
    }

    /// The names of the files here.
    pub(crate) fn names(&self) -> Vec<String> {
        self.files().into_keys().collect()
    }

    /// Fails unless `qmerge` refuses with one of `codes`, ends with a hint, and leaves every file as it was.
    #[track_caller]
    pub(crate) fn refused(&self, args: &[&str], codes: &[i32]) -> Run {
        let before = self.files();
        let run = self.qmerge(args);
        assert!(codes.contains(&run.code), "expected an exit code of {codes:?}:\n{run}");
        assert!(run.last_line().starts_with("hint: "), "the last line is no hint:\n{run}");
        self.assert_unchanged(&before, &run);
        run
    }

    /// As [`Self::refused`] with `code`, or done without a change.
    #[track_caller]
    pub(crate) fn refused_or_ok(&self, args: &[&str], code: i32) -> Run {
        let before = self.files();
        let run = self.qmerge(args);
        assert!(run.code == 0 || run.code == code, "expected exit code 0 or {code}:\n{run}");
        self.assert_unchanged(&before, &run);
        run
    }

    /// Fails unless every file is as `before` says, with none more and none less.
    #[track_caller]
    pub(crate) fn assert_unchanged(&self, before: &Files, run: &Run) {
        let after = self.files();
        let mut names: Vec<_> = before.keys().chain(after.keys()).collect();
        names.dedup();
        let changed: Vec<_> =
            names.into_iter().filter(|name| before.get(*name) != after.get(*name)).collect();
        assert!(changed.is_empty(), "these files changed: {changed:?}\n{run}");
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        if std::thread::panicking()
            && std::env::var_os("QMERGE_TEST_KEEP").is_some()
            && let Some(temporary) = self.temporary.take()
        {
            eprintln!("images kept in {}", temporary.keep().display());
        }
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

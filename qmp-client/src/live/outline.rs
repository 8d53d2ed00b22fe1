//! The public description of an unfinished merge.

use std::path::{Path, PathBuf};

use serde::{Serialize, Serializer};

use crate::serial;
use crate::state::{Kind, Phase, State, StateFile, StateLayer};

/// A merge as its state file describes it: what is merged into what, and the progress.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Outline {
    /// The disk, as QEMU called it.
    pub disk: String,
    /// The id of the job.
    pub job: String,
    /// What is merged which way.
    pub kind: Kind,
    /// How far it is.
    pub phase: Phase,
    /// The file that holds the disk, as far as the state file tells.
    pub valid_top: String,
    /// The layers from before the merge, from the active one down.
    pub layers: Vec<OutlineLayer>,
    /// The index of base: the highest layer that stays below; 0 for a pull of everything.
    pub base: usize,
    /// The index of the highest layer that goes.
    pub top: usize,
    /// The header that the switch changes; none if the guest moves to base.
    pub relink: Option<Relink>,
    /// Whether the merged files are to be removed.
    pub delete: bool,
    pub(super) state_file: PathBuf,
}

/// A layer of such a merge.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct OutlineLayer {
    /// Its index, counted from the bottom: 1 is the base of all.
    pub index: usize,
    /// Its file, as QEMU called it.
    pub file: String,
    /// Its format.
    pub format: String,
}

/// A backing name that a switch changes.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Relink {
    /// The overlay whose header it is.
    pub overlay: String,
    /// The name before.
    pub old: String,
    /// The name after; none after a pull of everything.
    pub new: Option<String>,
}

/// A merge for programs.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct OutlineShape<'o> {
    disk: &'o str,
    job: &'o str,
    kind: Kind,
    phase: Phase,
    base: Option<&'o str>,
    top: Option<&'o str>,
    obsolete: Vec<&'o str>,
    valid_top: &'o str,
    #[serde(serialize_with = "serial::name")]
    state_file: &'o Path,
}

impl Serialize for Outline {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let file = |index| self.layer(index).map(|layer| layer.file.as_str());
        OutlineShape {
            disk: &self.disk,
            job: &self.job,
            kind: self.kind,
            phase: self.phase,
            base: file(self.base),
            top: file(self.top),
            obsolete: self.merged().map(|layer| layer.file.as_str()).collect(),
            valid_top: &self.valid_top,
            state_file: &self.state_file,
        }
        .serialize(to)
    }
}

impl Outline {
    /// What a state file says.
    pub(crate) fn of(file: &StateFile, state: &State) -> Self {
        let layer = |layer: &StateLayer| OutlineLayer {
            index: layer.index,
            file: layer.file.clone(),
            format: layer.format.clone(),
        };
        let relink = state.backing.as_ref().map(|relink| Relink {
            overlay: relink.overlay.clone(),
            old: relink.old.clone(),
            new: relink.new.clone(),
        });
        Self {
            disk: state.disk.clone(),
            job: state.job.clone(),
            kind: state.kind,
            phase: state.phase,
            valid_top: state.valid_top.clone(),
            layers: state.layers.iter().map(layer).collect(),
            base: state.base,
            top: state.top,
            relink,
            delete: state.delete,
            state_file: file.path().to_owned(),
        }
    }

    /// The state file that says so.
    pub fn state_file(&self) -> &Path {
        &self.state_file
    }

    /// The folder of the state file, if it does not lie beside the active image, where it is looked for.
    pub fn state_dir(&self) -> Option<&Path> {
        let folder = |path: &Path| path.parent().and_then(|folder| folder.canonicalize().ok());
        let beside = self.active().and_then(|layer| Path::new(&layer.file).canonicalize().ok());
        let lies_beside = beside.is_some_and(|image| folder(&image) == folder(&self.state_file));
        self.state_file.parent().filter(|_| !lies_beside)
    }

    /// The layer of this index.
    pub fn layer(&self, index: usize) -> Option<&OutlineLayer> {
        self.layers.iter().find(|layer| layer.index == index)
    }

    /// The layer that was active when the merge began.
    pub fn active(&self) -> Option<&OutlineLayer> {
        self.layers.first()
    }

    /// The layer that receives the data.
    pub fn target(&self) -> Option<&OutlineLayer> {
        match self.kind {
            Kind::Pull => self.active(),
            Kind::Commit | Kind::ActiveCommit => self.layer(self.base),
        }
    }

    /// The layers that the disk no longer needs once the merge is switched, from the top.
    pub fn merged(&self) -> impl Iterator<Item = &OutlineLayer> {
        self.layers.iter().filter(|layer| layer.index > self.base && layer.index <= self.top)
    }

    /// The layers that stop being restore points when the job starts, from the bottom: base, and those between
    /// it and top. A pull changes none.
    pub fn restore_points_lost(&self) -> impl Iterator<Item = &OutlineLayer> {
        let writes = self.kind != Kind::Pull;
        self.layers
            .iter()
            .rev()
            .filter(move |layer| writes && layer.index >= self.base && layer.index < self.top)
    }

    /// Whether the guest moves to base at the end.
    pub fn merges_active(&self) -> bool {
        self.kind == Kind::ActiveCommit
    }

    pub(super) fn how_far(&self) -> &'static str {
        match self.phase {
            Phase::Switched => "switched, and not cleaned up after",
            Phase::Switching => "about to switch when it was lost",
            Phase::Copying => {
                "copying when it was lost, by the note of it, and QEMU shows the chain that it leaves"
            }
        }
    }
}

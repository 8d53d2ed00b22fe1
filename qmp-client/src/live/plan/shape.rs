//! The plan of a live merge, for programs.

use serde::{Serialize, Serializer};
use serde_json::Value;

use super::{DataFate, End, Plan};
use crate::block::graph::Layer;
use crate::state::Kind;

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct PlanShape<'p> {
    disk: &'p str,
    kind: Kind,
    job: &'p str,
    base: Option<&'p str>,
    top: Option<&'p str>,
    active: &'p str,
    bytes_to_copy: u64,
    bytes_to_zero: u64,
    /// QEMU decides, and does not tell.
    clusters_to_allocate: Option<u64>,
    base_file_size_after: Option<u64>,
    counted: bool,
    obsolete: Vec<&'p str>,
    becomes_empty: Vec<&'p str>,
    stale: Vec<StaleShape<'p>>,
    restore_points_lost: Vec<&'p str>,
    bitmaps_lost: Vec<BitmapShape<'p>>,
    snapshots_changed: Vec<&'p str>,
    data_files: Vec<DataFileShape<'p>>,
    searched: Vec<String>,
    unreadable: Vec<String>,
    broken: Vec<String>,
    afterwards: AfterwardsShape<'p>,
    commands: Vec<CommandShape<'p>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    free_space: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base_virtual_size_before: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    base_virtual_size_after: Option<u64>,
}

#[derive(Serialize)]
struct StaleShape<'p> {
    file: &'p str,
    reason: String,
}

#[derive(Serialize)]
struct BitmapShape<'p> {
    file: &'p str,
    name: &'p str,
}

#[derive(Serialize)]
struct DataFileShape<'p> {
    file: &'p str,
    image: &'p str,
    action: &'static str,
}

#[derive(Serialize)]
struct CommandShape<'p> {
    execute: &'static str,
    arguments: &'p Value,
}

#[derive(Serialize)]
#[serde(tag = "action", rename_all = "kebab-case", rename_all_fields = "kebab-case")]
enum AfterwardsShape<'p> {
    Relink { overlay: &'p str, backing_filename: Option<&'p str>, waits: bool },
    Pivot,
    KeepOverlay,
    Ready,
}

fn file(layer: &Layer) -> &str {
    &layer.file
}

fn names(paths: &[std::path::PathBuf]) -> Vec<String> {
    paths.iter().map(|path| path.to_string_lossy().into_owned()).collect()
}

impl<'p> AfterwardsShape<'p> {
    fn of(plan: &'p Plan) -> Self {
        match (&plan.relink, plan.end) {
            (Some((overlay, name)), end) => Self::Relink {
                overlay: &overlay.file,
                backing_filename: name.as_deref(),
                waits: end == End::WaitForFinish,
            },
            (None, End::Pivot) => Self::Pivot,
            (None, End::KeepOverlay) => Self::KeepOverlay,
            (None, End::Ready | End::Finish | End::WaitForFinish) => Self::Ready,
        }
    }
}

impl Serialize for Plan {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        let of_data = |(file, image, fate): (_, &'_ Layer, _)| {
            let action = match fate {
                DataFate::Written => "write",
                DataFate::Emptied => "empty",
                DataFate::Stays => "keep",
            };
            (file, image.file.clone(), action)
        };
        let data: Vec<(&str, String, &'static str)> = self.data_files().map(of_data).collect();
        let grows = self.grows_disk_of_base();
        PlanShape {
            disk: self.disk.name(),
            kind: self.kind(),
            job: &self.job,
            base: self.base.as_ref().map(file),
            top: self.merged.first().map(file),
            active: file(self.disk.active()),
            bytes_to_copy: self.bytes_to_copy(),
            bytes_to_zero: self.bytes.zero,
            clusters_to_allocate: None,
            base_file_size_after: self.receiver().actual_size.map(|size| size.saturating_add(self.growth())),
            counted: self.bytes.counted,
            obsolete: self.merged.iter().filter(|_| self.end != End::KeepOverlay).map(file).collect(),
            becomes_empty: self.emptied().map(file).collect(),
            stale: self
                .stale()
                .map(|(at, why)| StaleShape { file: file(at), reason: why.to_string() })
                .collect(),
            restore_points_lost: self.restore_points_lost().into_iter().map(file).collect(),
            bitmaps_lost: self
                .bitmaps_lost()
                .map(|(at, name)| BitmapShape { file: file(at), name })
                .collect(),
            snapshots_changed: self.snapshots_changed().map(file).collect(),
            data_files: data
                .iter()
                .map(|(file, image, action)| DataFileShape { file, image, action })
                .collect(),
            searched: names(&self.searched.folders),
            unreadable: names(&self.searched.unreadable),
            broken: names(&self.searched.broken),
            afterwards: AfterwardsShape::of(self),
            commands: self
                .commands
                .iter()
                .map(|(execute, arguments)| CommandShape { execute, arguments })
                .collect(),
            free_space: self.room.as_ref().map(|(_, free)| *free),
            base_virtual_size_before: grows.map(|(before, _)| before),
            base_virtual_size_after: grows.map(|(_, after)| after),
        }
        .serialize(to)
    }
}

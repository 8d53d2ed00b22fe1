//! Plan and result of a live merge in words.

use crate::output::human::{self, Fields, printable};
use crate::output::size;
use qmp_client::{DataFate, Direction, End, Layer, Plan};

/// The plan.
pub(super) fn text(plan: &Plan) -> String {
    let mut fields = Fields::default();
    let from = list(plan.merged.iter().rev());
    fields.add("merge", format!("{from} into {}", show(plan.receiver())));
    fields.add("to copy", amount(plan));
    if plan.writes_zeros() && plan.bytes.zero > 0 {
        let zeros = size::exact(plan.bytes.zero);
        fields
            .add("to zero", format!("{zeros}; QEMU writes them as data, so that base's file grows by them"));
    } else if plan.bytes.zero > 0 {
        fields.add("to zero", size::exact(plan.bytes.zero));
    }
    if let Some((folder, free)) = &plan.room {
        let (growth, free) = (plan.growth(), size::short(*free));
        let growth = if growth == 0 { "nothing".into() } else { format!("at most {}", size::short(growth)) };
        fields
            .add("room", format!("takes {growth} more of the {free} that are free in {}", folder.display()));
    }
    if let Some((before, after)) = plan.grows_disk_of_base() {
        fields.add("base's disk", format!("grows from {} to {}", size::short(before), size::exact(after)));
    }
    fields.add("afterwards", afterwards(plan));
    if plan.end != End::KeepOverlay {
        not_needed(plan, &mut fields);
    }
    let lost = plan.restore_points_lost();
    if !lost.is_empty() {
        let what = if lost.len() == 1 { "a restore point" } else { "restore points" };
        let lost = list(lost.into_iter());
        fields.add("restore points", format!("{lost} will be {what} no more, as soon as the job starts"));
    }
    for (file, image, fate) in plan.data_files() {
        let what = match fate {
            DataFate::Written => "it takes the data",
            DataFate::Emptied => {
                "it is emptied, if it lies beside its image and the image's owner may write it"
            }
            DataFate::Stays => "it stays",
            _ => continue,
        };
        fields.add("data file", format!("{} of {}: {what}", printable(file), show(image)));
    }
    for (layer, name) in plan.bitmaps_lost() {
        fields.add("lost", format!("the persistent bitmap {} of {}", printable(name), show(layer)));
    }
    for layer in plan.snapshots_changed() {
        let what = format!("the content of {}'s internal snapshots ({})", show(layer), layer.snapshots);
        fields.add("changes", what);
    }
    for file in &plan.searched.broken {
        fields.add("breaks", format!("{}, which uses base or a merged layer", file.display()));
    }
    if !plan.searched.unreadable.is_empty() {
        let files = human::list(&plan.searched.unreadable);
        fields.add("not known", format!("whether these use base, as they could not be read: {files}"));
    }
    fields.render()
}

fn amount(plan: &Plan) -> String {
    let bytes = size::exact(plan.bytes_to_copy());
    match plan.bytes.counted {
        true if plan.merges_active() => {
            format!("{bytes}, and what the guest wrote last and writes meanwhile")
        }
        true => bytes,
        false => format!("at most {bytes}, which the layers hold"),
    }
}

fn afterwards(plan: &Plan) -> String {
    let disk = printable(plan.disk.name());
    let (into, active) = (show(plan.receiver()), show(plan.disk.active()));
    if let Some((overlay, name)) = &plan.relink {
        let overlay = show(overlay);
        let mut text = match name {
            Some(name) => format!("{overlay} gets {} as its backing file", printable(name)),
            None => format!("{overlay} stands alone"),
        };
        if plan.end == End::WaitForFinish {
            text += ", when live finish is called";
        }
        return text;
    }
    match plan.end {
        End::KeepOverlay => {
            format!("{disk} goes on writing to {active}; {into} holds what the disk showed at that moment")
        }
        End::Pivot => format!("{disk} writes to {into}, which must be named at its next start"),
        End::Ready | End::Finish | End::WaitForFinish => {
            format!(
                "{disk} goes on writing to {active}, and what it writes to {into} too, until live pivot or live cancel"
            )
        }
    }
}

/// What becomes of the layers that the disk no longer needs.
fn not_needed(plan: &Plan, fields: &mut Fields) {
    let one = |count: usize, one: &'static str, more: &'static str| if count == 1 { one } else { more };
    if plan.delete || plan.direction == Direction::Up {
        let (count, needless) = (plan.merged.len(), list(plan.merged.iter()));
        let what =
            if plan.delete { "will be removed" } else { one(count, "stays as it is", "stay as they are") };
        fields.add("not needed then", format!("{needless}: {what}"));
        return;
    }
    let emptied: Vec<_> = plan.emptied().collect();
    if !emptied.is_empty() {
        let what =
            one(emptied.len(), "stays, as an empty overlay on base", "stay, as empty overlays on base");
        fields.add("not needed then", format!("{}: {what}", list(emptied.into_iter())));
    }
    for (layer, obstacle) in plan.stale() {
        fields.add("keeps old data", format!("{}: {obstacle}; {}", show(layer), stale(plan, layer)));
    }
}

/// What it means that a layer keeps its data.
fn stale(plan: &Plan, layer: &Layer) -> &'static str {
    if plan.merges_active() && layer.index == plan.disk.active().index {
        "a virtual machine that is started from it shows an old disk"
    } else {
        "a configuration that names it between base and the disk shows old data"
    }
}

/// A layer as people know it.
pub(super) fn show(layer: &Layer) -> String {
    printable(&layer.file)
}

fn list<'a>(layers: impl Iterator<Item = &'a Layer>) -> String {
    human::list(layers.map(|layer| &layer.file))
}

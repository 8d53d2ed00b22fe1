//! Plan and result of a live merge in words.

use qmp_client::Layer;

use super::{End, Plan};
use crate::output::human::{Fields, printable};
use crate::output::size;

/// The plan.
pub(in crate::cmd::live) fn text(plan: &Plan) -> String {
    let mut fields = Fields::default();
    let from = list(plan.merged.iter().rev());
    fields.add("merge", format!("{from} into {}", show(plan.receiver())));
    fields.add("to copy", amount(plan));
    if plan.writes_zeros() && plan.amounts.zero > 0 {
        let zeros = size::exact(plan.amounts.zero);
        fields
            .add("to zero", format!("{zeros}; QEMU writes them as data, so that base's file grows by them"));
    } else if plan.amounts.zero > 0 {
        fields.add("to zero", size::exact(plan.amounts.zero));
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
    let needless = list(plan.merged.iter());
    if plan.end != End::KeepOverlay {
        fields.add("not needed then", format!("{needless}: {}", obsolete(plan)));
    }
    let lost = plan.restore_points_lost();
    if !lost.is_empty() {
        let what = if lost.len() == 1 { "a restore point" } else { "restore points" };
        let lost = list(lost.into_iter());
        fields.add("restore points", format!("{lost} will be {what} no more, as soon as the job starts"));
    }
    for (layer, name) in plan.bitmaps_lost() {
        fields.add("lost", format!("the persistent bitmap {} of {}", printable(name), show(layer)));
    }
    for file in &plan.searched.broken {
        fields.add("breaks", format!("{}, which uses base or a merged layer", file.display()));
    }
    if !plan.searched.unreadable.is_empty() {
        let files: Vec<_> = plan.searched.unreadable.iter().map(|f| f.display().to_string()).collect();
        let files = files.join(", ");
        fields.add("not known", format!("whether these use base, as they could not be read: {files}"));
    }
    fields.render()
}

fn amount(plan: &Plan) -> String {
    let bytes =
        size::exact(if plan.pull && plan.amounts.counted { plan.amounts.new } else { plan.amounts.copy });
    match plan.amounts.counted {
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

fn obsolete(plan: &Plan) -> &'static str {
    match plan.end {
        _ if plan.delete => "will be removed",
        _ if plan.pull && plan.merged.len() == 1 => "stays as it is",
        _ if plan.pull => "stay as they are",
        End::KeepOverlay | End::Finish | End::WaitForFinish if plan.merged.len() == 1 => {
            "stays, marked as merged"
        }
        End::KeepOverlay | End::Finish | End::WaitForFinish => "stay, marked as merged",
        End::Pivot | End::Ready if plan.merged.len() == 1 => "stays, as an empty overlay on base",
        End::Pivot | End::Ready => "stay; the first as an empty overlay on base, the others marked as merged",
    }
}

/// A layer as people know it.
pub(in crate::cmd::live) fn show(layer: &Layer) -> String {
    printable(&layer.file)
}

fn list<'a>(layers: impl Iterator<Item = &'a Layer>) -> String {
    layers.map(show).collect::<Vec<_>>().join(", ")
}

//! Images as text.

use std::path::{Path, PathBuf};

use qcow2::ErrorKind;
use qcow2::error::shown;
use qcow2::facts::{ImageFacts, LayerFacts};
use qcow2::image::{Bitmap, Cluster0, Snapshot};
use qcow2::merge::{UnfinishedMerge, UnfinishedUp};
use qcow2::storage::LockMode;

use super::LiveMerge;
use crate::cmd::live::recover::tell::what;
use crate::hint::{Command, word};
use crate::output::human::{Fields, Table, plural};
use crate::output::size;

/// A table of the layers, the active image first, and remarks about single layers.
pub(super) fn chain(layers: &[(LiveMerge, LayerFacts)]) -> String {
    let mut table = Table::new(&["LAYER", "FORMAT", ">VIRTUAL SIZE", ">ON DISK", ">VISIBLE", "FILE"]);
    let mut notes = Vec::new();
    for (live, layer) in layers {
        let facts = &layer.facts;
        table.row(vec![
            format!("[{}]", layer.index),
            facts.format.name().to_owned(),
            facts.virtual_size().map_or("not known".into(), size::short),
            size::short(facts.stat.allocated),
            size::short(layer.visible_data),
            shown(&facts.path),
        ]);
        notes.extend(remarks(facts, live).map(|remark| format!("[{}] {remark}", layer.index)));
    }
    let mut text = table.render();
    text += "\n\nVISIBLE is the data that the guest still sees through a layer; [1] is the bottom.";
    if !notes.is_empty() {
        text += "\n\n";
        text += &notes.join("\n");
    }
    text
}

/// What a user who wants to merge must know about a layer.
fn remarks(facts: &ImageFacts, live: &LiveMerge) -> impl Iterator<Item = String> {
    let header = facts.cluster0.as_ref().map(|c| &c.header);
    let all = [
        facts.used.map(|_| format!("in use {}", in_use(facts))),
        facts.is_unexpectedly_dirty().then(|| "marked dirty: not closed cleanly".to_owned()),
        header.filter(|h| h.is_corrupt()).map(|_| "marked corrupt".to_owned()),
        facts.cluster0.as_ref().and_then(|cluster0| merged(cluster0, facts.holds_data)),
        facts.unfinished.as_ref().map(unfinished),
        facts.unfinished_up.as_ref().map(|up| up_pending(up, facts)),
        facts.emptying_into.as_deref().map(emptying),
        live_merge(facts, live),
        (!facts.strangers.is_empty()).then(|| format!("not believed: {}", strangers(facts).join("; "))),
        (!facts.snapshots.is_empty())
            .then(|| plural(facts.snapshots.len() as u64, "internal snapshot", "internal snapshots")),
        (!facts.bitmaps.is_empty())
            .then(|| plural(facts.bitmaps.len() as u64, "persistent bitmap", "persistent bitmaps")),
    ];
    all.into_iter().flatten()
}

/// What there is to say of an image that was to take in more.
fn up_pending(up: &UnfinishedUp, facts: &ImageFacts) -> String {
    let command = Command::qmerge(["rebase"]).file(&facts.path);
    let command = match up {
        UnfinishedUp::Rebase(Some(onto)) => command.word("--onto").file(onto),
        UnfinishedUp::Rebase(None) => command.word("--onto-nothing"),
        _ => return "pull pending: the guest sees the same; the same pull goes on".to_owned(),
    };
    format!("rebase pending: the guest sees the same; to go on: {command}")
}

/// `merge pending: 42 % of b.qcow2 into base.qcow2`, and what to do.
fn unfinished(unfinished: &UnfinishedMerge) -> String {
    if unfinished.is_removing {
        return format!(
            "merge pending: all of {} is in {}, and layers that nobody needs any more are being removed; the same commit \
             goes on",
            shown(&unfinished.top),
            shown(&unfinished.base)
        );
    }
    let part =
        if unfinished.is_switching { "all of".to_owned() } else { format!("{} % of", unfinished.percent) };
    format!(
        "merge pending: {part} {} is in {}; the same commit goes on",
        shown(&unfinished.top),
        shown(&unfinished.base)
    )
}

/// Files beside the image that are not believed.
fn strangers(facts: &ImageFacts) -> Vec<String> {
    let all = facts.strangers.iter().map(|stranger| (shown(&stranger.file), stranger.user));
    all.map(|(file, user)| format!("{file}: it belongs to the user {user}, who may not write the image"))
        .collect()
}

/// That the image is being emptied, and where all of it is.
fn emptying(base: &Path) -> String {
    format!("being emptied: all of it is in {}; the same commit goes on", shown(base))
}

fn merged(cluster0: &Cluster0, holds_data: bool) -> Option<String> {
    let name = |into: PathBuf| if into.as_os_str().is_empty() { "its base".to_owned() } else { shown(into) };
    if let Some(into) = cluster0.merged_into() {
        let rest = match holds_data {
            false => "no longer needed",
            true => "it holds data that was written since",
        };
        return Some(format!("merged into {}; {rest}", name(into)));
    }
    let into = cluster0.merging_into()?;
    Some(format!("a merge into {} was stopped; the same commit goes on", name(into)))
}

/// An unfinished live merge.
fn live_merge(facts: &ImageFacts, live: &LiveMerge) -> Option<String> {
    let (file, state) = live.as_ref()?;
    let recover = format!("qmerge live recover {}", word(&facts.path));
    Some(match state {
        Ok(state) => format!("{} has not ended; how it stands: {recover}", what(state)),
        Err(why) if why.is_disbelief() => format!("{} is not believed: {why}", shown(file)),
        Err(_) => format!("{} cannot be read: {recover}", shown(file)),
    })
}

/// Lines for one image.
pub(super) fn image(facts: &ImageFacts, live: &LiveMerge) -> String {
    let mut fields = Fields::default();
    fields.add("image", shown(&facts.path));
    let version = facts.cluster0.as_ref().map(|c| format!(", version {}", c.header.version));
    fields.add("format", format!("{}{}", facts.format.name(), version.unwrap_or_default()));
    fields.add("virtual size", facts.virtual_size().map_or("not known".into(), size::exact));
    fields.add("on disk", size::exact(facts.stat.allocated));
    if let Some(cluster0) = &facts.cluster0 {
        fields.add("cluster size", size::short(cluster0.header.geometry().cluster_size()));
        fields.add("backing file", backing(facts, cluster0));
        if cluster0.header.has_data_file() {
            fields.add("data file", data_file(cluster0));
        }
        if let Some(method) = encryption(cluster0) {
            fields.add("encryption", method);
        }
        fields.add("features", features_of(cluster0));
        fields.add("snapshots", list(facts.snapshots.iter().map(snapshot)));
        fields.add("bitmaps", list(facts.bitmaps.iter().map(bitmap)));
        fields.add("state", state(facts, cluster0));
    }
    if let Some(up) = &facts.unfinished_up {
        fields.add("pending", up_pending(up, facts));
    }
    if let Some(merge) = &facts.unfinished {
        fields.add("pending", unfinished(merge));
    }
    if let Some(base) = &facts.emptying_into {
        fields.add("pending", emptying(base));
    }
    for stranger in strangers(facts) {
        fields.add("not believed", stranger);
    }
    fields.add("in use", in_use(facts));
    if let Some(live) = live_merge(facts, live) {
        fields.add("live merge", live);
    }
    fields.render()
}

/// `a.qcow2 (qcow2)`, and the path that the name leads to where that is another.
fn backing(facts: &ImageFacts, cluster0: &Cluster0) -> String {
    let Some((name, resolved)) = facts.backing() else { return "none".to_owned() };
    let format = cluster0.backing_format().map_or("no format stated".to_owned(), |f| format!("format {f}"));
    match resolved {
        Ok(path) if path.as_os_str() == name.as_str() => format!("{name} ({format})"),
        Ok(path) => format!("{name} ({format})\nthat is {}", shown(&path)),
        Err(why) => format!("{name} ({format})\nnot a local file: {why}"),
    }
}

fn data_file(cluster0: &Cluster0) -> String {
    let name = cluster0.data_file_name().map_or("not named".into(), String::from_utf8_lossy);
    let raw = if cluster0.header.data_file_raw() { " (a raw image by itself)" } else { "" };
    format!("{name}{raw}")
}

fn encryption(cluster0: &Cluster0) -> Option<String> {
    match cluster0.header.crypt_method {
        0 => None,
        1 => Some("AES".to_owned()),
        2 => Some("LUKS".to_owned()),
        other => Some(format!("method {other}, unknown")),
    }
}

fn features_of(cluster0: &Cluster0) -> String {
    let header = &cluster0.header;
    let mut all = cluster0.features();
    all.push(format!("{} compression", header.compression.name()));
    all.push(format!("{} refcount bits", header.geometry().refcount_bits()));
    all.join(", ")
}

fn list(items: impl Iterator<Item = String>) -> String {
    let items: Vec<_> = items.collect();
    if items.is_empty() { "none".to_owned() } else { items.join("\n") }
}

fn snapshot(snapshot: &Snapshot) -> String {
    let name = String::from_utf8_lossy(&snapshot.name);
    let id = String::from_utf8_lossy(&snapshot.id);
    let state = match snapshot.vm_state_size {
        0 => String::new(),
        bytes => format!(", with {} of machine state", size::short(bytes)),
    };
    format!("{name} (id {id}), taken {}{state}", utc(u64::from(snapshot.date_sec)))
}

fn bitmap(bitmap: &Bitmap) -> String {
    let state = if bitmap.is_in_use() {
        "not saved when the image was last closed"
    } else if bitmap.is_auto() {
        "recording"
    } else {
        "disabled"
    };
    format!("{}, one bit for {}, {state}", bitmap.display_name(), size::short(bitmap.granularity()))
}

fn state(facts: &ImageFacts, cluster0: &Cluster0) -> String {
    let header = &cluster0.header;
    let mut words = Vec::new();
    if header.is_corrupt() {
        words.push("marked corrupt: must not be written".to_owned());
    }
    if facts.is_unexpectedly_dirty() {
        words.push("marked dirty: not closed cleanly, its refcounts cannot be trusted".to_owned());
    }
    if let Some(problem) = &facts.problem {
        let what = if problem.kind() == ErrorKind::Unsupported { "not supported" } else { "cannot be used" };
        words.push(format!("{what}: {problem}"));
    }
    words.extend(merged(cluster0, facts.holds_data));
    if words.is_empty() { "no mark of damage".to_owned() } else { words.join("\n") }
}

fn in_use(facts: &ImageFacts) -> String {
    let how = match facts.used {
        None if !facts.has_locks && facts.holders.is_empty() => {
            return "not known: its file system has no locks, and no process is seen that has it open"
                .to_owned();
        }
        None if !facts.has_locks => "perhaps (its file system has no locks)",
        None => return "no".to_owned(),
        Some(LockMode::Write) => "for writing",
        Some(LockMode::Read) => "for reading",
    };
    if facts.holders.is_empty() {
        return format!("{how}, by a process that is not visible here (those of other users: to root only)");
    }
    let holders: Vec<_> = facts.holders.iter().map(|h| format!("{} (process {})", h.name, h.pid)).collect();
    format!("{how}, by {}", holders.join(", "))
}

/// Seconds since 1970 as a date and time, `2026-11-23 00:16:19 UTC` (proleptic Gregorian calendar).
fn utc(seconds: u64) -> String {
    let (days, rest) = (seconds / 86_400, seconds % 86_400);
    // Years counted from 1 March 0000, so that the leap day comes last.
    let days = days + 719_468;
    let (era, day_of_era) = (days / 146_097, days % 146_097);
    let year_of_era = (day_of_era - day_of_era / 1460 + day_of_era / 36_524 - day_of_era / 146_096) / 365;
    let day_of_year = day_of_era - (365 * year_of_era + year_of_era / 4 - year_of_era / 100);
    let shifted_month = (5 * day_of_year + 2) / 153;
    let day = day_of_year - (153 * shifted_month + 2) / 5 + 1;
    let month = if shifted_month < 10 { shifted_month + 3 } else { shifted_month - 9 };
    let year = era * 400 + year_of_era + u64::from(month <= 2);
    let (hour, minute, second) = (rest / 3600, rest / 60 % 60, rest % 60);
    format!("{year}-{month:02}-{day:02} {hour:02}:{minute:02}:{second:02} UTC")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_dates() {
        assert_eq!(utc(0), "1970-01-01 00:00:00 UTC");
        assert_eq!(utc(951_782_399), "2000-02-28 23:59:59 UTC");
        assert_eq!(utc(951_782_400), "2000-02-29 00:00:00 UTC");
        assert_eq!(utc(1_795_392_979), "2026-11-23 00:16:19 UTC");
        assert_eq!(utc(u64::from(u32::MAX)), "2106-02-07 06:28:15 UTC");
    }
}

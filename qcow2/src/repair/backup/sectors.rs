//! Keeps what is known about the sectors that a repair changed, for a bounded number of them at a time.

use std::collections::BTreeMap;
use std::ops::Range;

use super::SECTOR;

/// Groups of 64 sectors that are held at once: some 30 MiB.
const GROUPS: usize = 1 << 18;
const GROUP: u64 = 64;

/// A window of an image's sectors, by number. It ends before the first sector for which there was no room.
#[derive(Debug)]
pub(super) struct Sectors {
    window: Range<u64>,
    most: usize,
    groups: BTreeMap<u64, Group>,
}

/// One bit for each sector.
#[derive(Clone, Copy, Debug, Default)]
struct Group {
    changed: u64,
    known: u64,
    differs: u64,
}

impl Sectors {
    /// A window that begins at a sector, and extends as far as memory allows.
    pub(super) fn from(first: u64) -> Self {
        Self { window: first..u64::MAX, most: GROUPS, groups: BTreeMap::new() }
    }

    pub(super) fn window(&self) -> Range<u64> {
        self.window.clone()
    }

    /// Notes that the repair changed a sector. `is_before` says that it holds the bytes from before this
    /// change, `is_after` those from after it. Changes must come in their order: the first one to a sector
    /// knows its original.
    pub(super) fn changed(&mut self, sector: u64, is_before: bool, is_after: bool) {
        if !self.window.contains(&sector) {
            return;
        }
        let bit = 1 << (sector % GROUP);
        let group = self.groups.entry(sector / GROUP).or_default();
        if group.changed & bit == 0 && !is_before {
            group.differs |= bit;
        }
        group.changed |= bit;
        if is_before || is_after {
            group.known |= bit;
        }
        if self.groups.len() > self.most
            && let Some((last, _)) = self.groups.pop_last()
        {
            self.window.end = last * GROUP;
        }
    }

    /// Whether the repair changed a sector of the window.
    pub(super) fn is_changed(&self, sector: u64) -> bool {
        self.groups.get(&(sector / GROUP)).is_some_and(|group| group.changed >> (sector % GROUP) & 1 == 1)
    }

    /// The first changed sector whose content is in no change.
    pub(super) fn first_unknown(&self) -> Option<u64> {
        self.first(|group| group.changed & !group.known)
    }

    fn first(&self, bits: impl Fn(&Group) -> u64) -> Option<u64> {
        let found = self.groups.iter().find(|(_, group)| bits(group) != 0)?;
        Some(found.0 * GROUP + u64::from(bits(found.1).trailing_zeros()))
    }

    /// The runs of sectors, in bytes, that do not hold their content from before the repair.
    pub(super) fn differing(&self) -> Vec<Range<u64>> {
        let mut runs: Vec<Range<u64>> = Vec::new();
        for (&number, group) in &self.groups {
            for sector in (0..GROUP).filter(|bit| group.differs >> bit & 1 == 1).map(|b| number * GROUP + b) {
                let start = sector * SECTOR;
                match runs.last_mut() {
                    Some(last) if last.end == start => last.end += SECTOR,
                    _ => runs.push(start..start + SECTOR),
                }
            }
        }
        runs
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_window_ends_where_there_is_no_room() {
        let changes =
            [(70, false, true), (3, true, false), (1000, false, true), (71, false, false), (3, false, false)];
        let mut seen = Vec::new();
        let mut windows = 0;
        let mut first = 0;
        while first < u64::MAX {
            let mut sectors = Sectors { most: 1, ..Sectors::from(first) };
            for (sector, is_before, is_after) in changes {
                sectors.changed(sector, is_before, is_after);
            }
            seen.extend(sectors.differing());
            assert_eq!(sectors.first_unknown(), (windows == 1).then_some(71), "window {windows}");
            assert!(!sectors.is_changed(4) && sectors.is_changed([3, 70, 1000][windows]));
            first = sectors.window().end;
            windows += 1;
        }
        assert_eq!((windows, seen), (3, vec![70 * 512..72 * 512, 1000 * 512..1001 * 512]));
    }
}

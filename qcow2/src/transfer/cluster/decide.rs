//! Decides what becomes of a cluster, from its entry and from what it must hold.
//!
//! A cluster consists of units: its 32 subclusters, or the whole cluster if the image has none. Each unit is
//! unallocated, zero or allocated, before and after. If something else refers to the host cluster too (an
//! internal snapshot), it must not be written: the cluster moves to a new one.

use super::Effect;
use crate::format::{L2Entry, SubclusterState, Subclusters};
use crate::image::CompressedPart;
use crate::transfer::needs::Need;
use crate::transfer::origin::Origin;
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// A cluster as it is.
#[derive(Clone, Copy, Debug)]
pub(super) struct Cluster {
    pub(super) start: GuestOffset,
    /// The host cluster, and whether only the base's active table refers to it.
    pub(super) host: Option<HostOffset>,
    pub(super) owned: bool,
    /// The content, if it is compressed.
    pub(super) compressed: Option<CompressedPart>,
    /// The states of its units.
    pub(super) states: Subclusters,
    /// How many units there are.
    pub(super) units: u32,
}

impl Cluster {
    pub(super) fn new(start: GuestOffset, entry: L2Entry, units: u32) -> Self {
        let all = u32::MAX >> (32 - units);
        let (allocated, zero) =
            (Subclusters { allocated: all, zero: 0 }, Subclusters { allocated: 0, zero: all });
        let (host, owned, states) = match entry {
            L2Entry::Unallocated => (None, false, Subclusters::default()),
            // A compressed cluster cannot be changed in place: it is data without a host cluster of its own.
            L2Entry::Compressed { .. } => (None, false, allocated),
            L2Entry::Zero { host, copied } => (host, copied, zero),
            L2Entry::Standard { host, copied } => (Some(host), copied, allocated),
            L2Entry::Mixed { host, copied, subclusters } => (host, copied, subclusters),
        };
        let compressed = match entry {
            L2Entry::Compressed { host, len } => Some(CompressedPart { host, len, skip: 0 }),
            _ => None,
        };
        Self { start, host, owned, compressed, states, units }
    }
}

/// The properties of the base that matter for every cluster.
#[derive(Clone, Copy, Debug)]
pub(super) struct Terms {
    /// How many units a cluster has, 1 or 32.
    pub(super) units: u32,
    /// The size of a unit in bytes.
    pub(super) unit_size: u64,
    /// Whether the format can say that a cluster is zero.
    pub(super) has_zero_clusters: bool,
    /// Whether the data lies in an external data file, each cluster at its guest offset.
    pub(super) has_data_file: bool,
    /// The size of the disk below base, in bytes; zero if there is none.
    pub(super) below: u64,
    /// The size of the disk when the merge is done, in bytes.
    pub(super) size: u64,
}

/// What becomes of a cluster.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ClusterOutcome {
    /// It stays as it is.
    Unchanged,
    /// It loses its data and its host cluster: each unit is zero, or shows the layers below.
    NoData(Subclusters),
    /// It keeps, or gets, the host cluster `host`; only units that change are written.
    InPlace {
        /// The host cluster.
        host: HostOffset,
        /// Whether only the base's active table refers to it. If not, no unit is written.
        owned: bool,
        /// What is there afterwards.
        units: Units,
    },
    /// It gets a new host cluster, and all of its data moves there.
    Moved(Units),
}

/// The units of a cluster after the merge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Units {
    /// Their states.
    pub(super) states: Subclusters,
    /// Bit n: unit n gets new content.
    pub(super) written: u32,
}

/// Decides what becomes of a cluster, and how much of the disk that changes. `needs` must be sorted, disjoint,
/// and inside the cluster.
pub(super) fn decide(cluster: &Cluster, needs: &[Need], terms: &Terms) -> (ClusterOutcome, Effect) {
    let (units, effect) = terms.units_of(cluster, needs);
    let outcome = match units {
        Units { written: 0, states } if states == cluster.states => ClusterOutcome::Unchanged,
        units => terms.place(cluster, units),
    };
    (outcome, effect)
}

impl Terms {
    /// The range of unit `n` of a cluster on the guest's disk.
    pub(super) fn unit(&self, cluster: &Cluster, n: u32) -> GuestRange {
        GuestRange { start: cluster.start + u64::from(n) * self.unit_size, len: self.unit_size }
    }

    /// Decides which units are written, and which become zero without data.
    fn units_of(&self, cluster: &Cluster, needs: &[Need]) -> (Units, Effect) {
        let mut units = Units { states: cluster.states, written: 0 };
        let mut effect = Effect::default();
        for n in 0..self.units {
            let unit = self.unit(cluster, n);
            let parts: Vec<Need> = needs.iter().filter_map(|need| need.clip(&unit)).collect();
            if parts.is_empty() {
                continue;
            }
            let (zeros, data): (Vec<_>, Vec<_>) = parts.iter().partition(|part| part.origin == Origin::Zeros);
            // The unit reads as the zeros that it must hold: nothing to do.
            if data.is_empty() && self.reads_zero(cluster.states.get(n), unit) {
                continue;
            }
            let bytes = |parts: &[&Need]| -> u64 { parts.iter().map(|part| part.range.len).sum() };
            effect.copied += bytes(&data);
            effect.zeroed += bytes(&zeros);
            let bit = 1 << n;
            // The whole unit becomes zero, up to the end of the disk. Its state can say so, without any data.
            if data.is_empty()
                && bytes(&zeros) >= unit.len.min(self.rest(unit.start))
                && let Some(zero) = self.zero_without_data(unit)
            {
                units.states.allocated &= !bit;
                units.states.zero = if zero { units.states.zero | bit } else { units.states.zero & !bit };
                continue;
            }
            // The unit needs data. If needs cover only a part of it, `emit` fills the gaps with its old
            // content.
            units.written |= bit;
            units.states.allocated |= bit;
            units.states.zero &= !bit;
        }
        (units, effect)
    }

    /// Decides where the data of a changed cluster goes.
    fn place(&self, cluster: &Cluster, units: Units) -> ClusterOutcome {
        if units.states.allocated == 0 && (!self.has_data_file || cluster.host.is_none()) {
            // A data file has a fixed place for each cluster, so a cluster that has its place there keeps it.
            return ClusterOutcome::NoData(units.states);
        }
        if self.has_data_file {
            let host = HostOffset::new(cluster.start.get());
            return ClusterOutcome::InPlace { host, owned: true, units };
        }
        match cluster.host {
            // A host cluster that something else refers to may stay if no unit is written: to become zero, a
            // unit only needs a change of the entry.
            Some(host) if cluster.compressed.is_none() && (cluster.owned || units.written == 0) => {
                ClusterOutcome::InPlace { host, owned: cluster.owned, units }
            }
            _ => ClusterOutcome::Moved(units),
        }
    }

    /// Whether a unit in this state already reads as zeros.
    fn reads_zero(&self, state: SubclusterState, unit: GuestRange) -> bool {
        match state {
            SubclusterState::Zero => true,
            SubclusterState::Unallocated => !self.shows_below(unit),
            SubclusterState::Allocated => false,
        }
    }

    /// Whether layers below the base show through where the base has nothing.
    pub(super) fn shows_below(&self, range: GuestRange) -> bool {
        range.start.get() < self.below
    }

    /// Bytes from `start` to the end of the disk.
    pub(super) fn rest(&self, start: GuestOffset) -> u64 {
        self.size.saturating_sub(start.get())
    }

    /// Whether a unit needs the zero flag to read as zeros without data; `None` if it cannot.
    fn zero_without_data(&self, unit: GuestRange) -> Option<bool> {
        match self.has_zero_clusters {
            true => Some(true),
            // Version 2 has no zero clusters. But if nothing lies below, an unallocated cluster reads as zeros.
            false => (!self.shows_below(unit)).then_some(false),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const CLUSTER: u64 = 64 << 10;
    /// The size of a subcluster.
    const SUB: u64 = CLUSTER / 32;
    /// Where the cluster of the tests begins.
    const START: GuestOffset = GuestOffset::new(5 * CLUSTER);
    /// Where its host cluster lies.
    const HOST: HostOffset = HostOffset::new(9 * CLUSTER);

    const WHOLE: Terms = Terms {
        units: 1,
        unit_size: CLUSTER,
        has_zero_clusters: true,
        has_data_file: false,
        below: 0,
        size: 100 * CLUSTER,
    };
    const OVER: Terms = Terms { below: 100 * CLUSTER, ..WHOLE };
    const OLD: Terms = Terms { has_zero_clusters: false, ..WHOLE };
    const OLD_OVER: Terms = Terms { has_zero_clusters: false, ..OVER };
    const DATA_FILE: Terms = Terms { has_data_file: true, ..WHOLE };
    const SUBS: Terms = Terms { units: 32, unit_size: SUB, ..WHOLE };
    const SUBS_OVER: Terms = Terms { below: 100 * CLUSTER, ..SUBS };
    /// The disk ends 1000 bytes into the cluster.
    const ENDS: Terms = Terms { size: 5 * CLUSTER + 1000, ..OVER };

    const OWN: L2Entry = L2Entry::Standard { host: HOST, copied: true };
    const SHARED: L2Entry = L2Entry::Standard { host: HOST, copied: false };
    const COMPRESSED: L2Entry = L2Entry::Compressed { host: HostOffset::new(77_777), len: 512 };
    const ZERO: L2Entry = L2Entry::Zero { host: None, copied: false };
    const ZERO_KEPT: L2Entry = L2Entry::Zero { host: Some(HOST), copied: true };

    const DATA: Origin = Origin::Plain { layer: 3, host: HostOffset::new(1 << 30) };

    fn mixed(copied: bool, allocated: u32, zero: u32) -> L2Entry {
        L2Entry::Mixed { host: Some(HOST), copied, subclusters: Subclusters { allocated, zero } }
    }

    fn need(from: u64, to: u64, origin: Origin) -> Need {
        Need { range: GuestRange::between(START + from, START + to), origin: origin.advance(from) }
    }

    fn units(allocated: u32, zero: u32, written: u32) -> Units {
        Units { states: Subclusters { allocated, zero }, written }
    }

    fn in_place(allocated: u32, zero: u32, written: u32) -> ClusterOutcome {
        ClusterOutcome::InPlace { host: HOST, owned: true, units: units(allocated, zero, written) }
    }

    fn moved(allocated: u32, zero: u32, written: u32) -> ClusterOutcome {
        ClusterOutcome::Moved(units(allocated, zero, written))
    }

    fn no_data(zero: u32) -> ClusterOutcome {
        ClusterOutcome::NoData(Subclusters { allocated: 0, zero })
    }

    #[test]
    fn what_a_cluster_becomes() {
        use ClusterOutcome::{InPlace, Unchanged};
        use Origin::Zeros;
        const ALL: u64 = CLUSTER;
        let in_data_file = |allocated, zero, written| InPlace {
            host: HostOffset::new(START.get()),
            owned: true,
            units: units(allocated, zero, written),
        };
        let shared = |allocated, zero| InPlace { host: HOST, owned: false, units: units(allocated, zero, 0) };
        let unallocated = L2Entry::Unallocated;
        type Row<'a> = (&'a str, Terms, L2Entry, &'a [(u64, u64, Origin)], ClusterOutcome);
        let table: &[Row<'_>] = &[
            ("data, all of it", WHOLE, unallocated, &[(0, ALL, DATA)], moved(1, 0, 1)),
            ("data, a part", OVER, unallocated, &[(7, 9, DATA)], moved(1, 0, 1)),
            ("over its own data", WHOLE, OWN, &[(7, 9, DATA)], in_place(1, 0, 1)),
            ("over a snapshot's data", WHOLE, SHARED, &[(7, 9, DATA)], moved(1, 0, 1)),
            ("over a compressed cluster", WHOLE, COMPRESSED, &[(7, 9, DATA)], moved(1, 0, 1)),
            ("over a zero cluster", WHOLE, ZERO, &[(0, ALL, DATA)], moved(1, 0, 1)),
            ("over a preallocated cluster", WHOLE, ZERO_KEPT, &[(0, ALL, DATA)], in_place(1, 0, 1)),
            ("zeros over nothing", WHOLE, unallocated, &[(0, ALL, Zeros)], Unchanged),
            ("zeros over what lies below", OVER, unallocated, &[(0, ALL, Zeros)], no_data(1)),
            ("some zeros over what lies below", OVER, unallocated, &[(7, 9, Zeros)], moved(1, 0, 1)),
            ("zeros up to the disk's end", ENDS, unallocated, &[(0, 1000, Zeros)], no_data(1)),
            ("zeros short of the disk's end", ENDS, unallocated, &[(0, 999, Zeros)], moved(1, 0, 1)),
            ("zeros over zeros", OVER, ZERO, &[(0, ALL, Zeros)], Unchanged),
            ("zeros over data", WHOLE, OWN, &[(0, ALL, Zeros)], no_data(1)),
            ("zeros over a snapshot's data", WHOLE, SHARED, &[(0, ALL, Zeros)], no_data(1)),
            ("zeros over a compressed cluster", WHOLE, COMPRESSED, &[(0, ALL, Zeros)], no_data(1)),
            ("some zeros over data", WHOLE, OWN, &[(7, 9, Zeros)], in_place(1, 0, 1)),
            ("zeros in two parts", WHOLE, OWN, &[(0, 9, Zeros), (9, ALL, Zeros)], no_data(1)),
            ("zeros and data", WHOLE, OWN, &[(0, 9, Zeros), (9, ALL, DATA)], in_place(1, 0, 1)),
            ("version 2: zeros over data", OLD, OWN, &[(0, ALL, Zeros)], no_data(0)),
            ("version 2: zeros over a layer", OLD_OVER, OWN, &[(0, ALL, Zeros)], in_place(1, 0, 1)),
            ("version 2: zeros, shared", OLD_OVER, SHARED, &[(0, ALL, Zeros)], moved(1, 0, 1)),
            ("version 2: zeros on a layer", OLD_OVER, unallocated, &[(0, ALL, Zeros)], moved(1, 0, 1)),
            ("data file: data", DATA_FILE, unallocated, &[(7, 9, DATA)], in_data_file(1, 0, 1)),
            ("data file: zeros over nothing", DATA_FILE, unallocated, &[(0, ALL, Zeros)], Unchanged),
            (
                "data file: zeros over data",
                DATA_FILE,
                L2Entry::Standard { host: HostOffset::new(START.get()), copied: true },
                &[(0, ALL, Zeros)],
                in_data_file(0, 1, 0),
            ),
            ("one subcluster", SUBS, unallocated, &[(SUB, 2 * SUB, DATA)], moved(2, 0, 2)),
            ("two, in part", SUBS, unallocated, &[(SUB + 7, 2 * SUB + 7, DATA)], moved(6, 0, 6)),
            ("beside data", SUBS, mixed(true, 1, 4), &[(SUB, 3 * SUB, DATA)], in_place(7, 0, 6)),
            ("beside shared data", SUBS, mixed(false, 1, 4), &[(SUB, 2 * SUB, DATA)], moved(3, 4, 2)),
            ("one zero", SUBS, mixed(true, 3, 0), &[(SUB, 2 * SUB, Zeros)], in_place(1, 2, 0)),
            ("one zero, shared", SUBS, mixed(false, 3, 0), &[(SUB, 2 * SUB, Zeros)], shared(1, 2)),
            (
                "a part of one zero, shared",
                SUBS,
                mixed(false, 3, 0),
                &[(SUB, SUB + 9, Zeros)],
                moved(3, 0, 2),
            ),
            ("the last data becomes zero", SUBS, mixed(true, 2, 4), &[(SUB, 2 * SUB, Zeros)], no_data(6)),
            ("zero among unallocated", SUBS, mixed(true, 1, 0), &[(SUB, 2 * SUB, Zeros)], Unchanged),
            ("zero over a layer", SUBS_OVER, mixed(true, 1, 0), &[(SUB, 2 * SUB, Zeros)], in_place(1, 2, 0)),
            ("one of a compressed", SUBS, COMPRESSED, &[(0, SUB, Zeros)], moved(!1, 1, 0)),
        ];
        for (what, terms, entry, needs, expected) in table {
            let cluster = Cluster::new(START, *entry, terms.units);
            let needs: Vec<Need> = needs.iter().map(|(from, to, origin)| need(*from, *to, *origin)).collect();
            assert_eq!(decide(&cluster, &needs, terms).0, *expected, "{what}");
        }
    }

    #[test]
    fn the_effect_counts_what_changes() {
        let effect = |entry, needs: &[Need], terms: &Terms| {
            decide(&Cluster::new(START, entry, terms.units), needs, terms).1
        };
        let zeros = |from, to| need(from, to, Origin::Zeros);
        let both = [need(0, 100, DATA), zeros(100, 150)];
        assert_eq!(effect(OWN, &both, &WHOLE), Effect { copied: 100, zeroed: 50 });
        assert_eq!(effect(ZERO, &[zeros(0, CLUSTER)], &WHOLE), Effect::default());
        // Each subcluster by itself: the second is zero already.
        let half = mixed(true, 1, 2);
        assert_eq!(effect(half, &[zeros(0, 2 * SUB)], &SUBS), Effect { copied: 0, zeroed: SUB });
    }

    #[test]
    fn nobody_elses_data_is_written_and_no_need_is_forgotten() {
        let kept = L2Entry::Zero { host: Some(HOST), copied: false };
        let entries = [
            L2Entry::Unallocated,
            OWN,
            SHARED,
            COMPRESSED,
            ZERO,
            ZERO_KEPT,
            kept,
            mixed(true, 0xff, 0xff00),
            mixed(false, 0xff, 0xff00),
        ];
        let borders = [0, 9, SUB, 9 * SUB, 20 * SUB + 1, CLUSTER];
        let ranges = borders.iter().flat_map(|from| borders.iter().map(move |to| (*from, *to)));
        for (from, to) in ranges.filter(|(from, to)| from < to) {
            for entry in entries {
                for terms in [WHOLE, OVER, OLD, OLD_OVER, SUBS, SUBS_OVER, ENDS] {
                    for origin in [DATA, Origin::Zeros] {
                        if terms.units == 1 && matches!(entry, L2Entry::Mixed { .. }) {
                            continue;
                        }
                        let cluster = Cluster::new(START, entry, terms.units);
                        let needs = [need(from, to, origin)];
                        holds(&cluster, &needs, &terms, decide(&cluster, &needs, &terms).0);
                    }
                }
            }
        }
    }

    /// Each unit reads as it must afterwards, and what others refer to is not written.
    fn holds(cluster: &Cluster, needs: &[Need], terms: &Terms, outcome: ClusterOutcome) {
        let told = format!("{cluster:?} {needs:?} {terms:?}: {outcome:?}");
        let after = match outcome {
            ClusterOutcome::Unchanged => Units { states: cluster.states, written: 0 },
            ClusterOutcome::NoData(states) => Units { states, written: 0 },
            ClusterOutcome::InPlace { host, owned, units } => {
                assert_eq!((Some(host), owned), (cluster.host, cluster.owned), "{told}");
                assert!(owned || units.written == 0, "{told}");
                units
            }
            ClusterOutcome::Moved(units) => units,
        };
        assert_eq!(after.written & !after.states.allocated, 0, "{told}");
        for n in 0..terms.units {
            let unit = terms.unit(cluster, n);
            let before = cluster.states.get(n);
            let now = after.states.get(n);
            match needs.iter().find_map(|need| need.clip(&unit)) {
                None => assert_eq!((now, after.written >> n & 1), (before, 0), "{told}"),
                Some(Need { origin: Origin::Zeros, .. }) if after.written >> n & 1 == 0 => {
                    assert!(terms.reads_zero(now, unit), "{told}");
                }
                Some(_) => assert_eq!(after.written >> n & 1, 1, "{told}"),
            }
        }
    }
}

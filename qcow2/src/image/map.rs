//! The map of a qcow2 image: L1 and L2 tables to extents.
//!
//! Only the parts of the tables that cover the asked range are read, tables that lie side by side in
//! one piece. Runs of clusters whose entries count up by one cluster are not decoded one by one.

use super::{CompressedPart, Extent, Mapping, Qcow2, push};
use crate::error::{Error, Result};
use crate::format::{FormatError, L1Entry, L2Entry, SubclusterState, Subclusters, read_be_u64s};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// The most bytes of tables read in one piece.
const TABLE_READ: u64 = 1 << 20;

/// A slice of an L2 table that covers a part of the asked range.
#[derive(Clone, Copy, Debug)]
struct Slice {
    /// Where the first entry lies.
    host: HostOffset,
    /// Length of the slice in bytes.
    len: u64,
    /// Length of the gap to where the next table would start, in bytes.
    guest: GuestRange,
}

impl Qcow2 {
    /// See [`super::Image::map`].
    ///
    /// # Errors
    /// As there.
    pub(crate) fn map(&self, range: GuestRange, out: &mut Vec<Extent>) -> Result<()> {
        let end = range.end().min(GuestOffset::new(self.virtual_size()));
        let range = GuestRange::between(range.start, end);
        let mut pending: Vec<Slice> = Vec::new();
        let mut buf = Vec::new();
        self.for_each_l1_around(range, |part, entry| {
            match entry {
                None => {
                    self.decode_slices(&mut pending, &mut buf, out)?;
                    self.lose(part, out);
                }
                Some(L1Entry::Unallocated) => {
                    self.decode_slices(&mut pending, &mut buf, out)?;
                    push(out, part.start, part.len, Mapping::Unallocated);
                }
                Some(L1Entry::Table { host, .. }) => {
                    let slice = self.slice(host, part);
                    let joins = pending.last().is_some_and(|last| last.host + last.len == slice.host)
                        && pending.iter().map(|s| s.len).sum::<u64>() + slice.len <= TABLE_READ;
                    if !joins {
                        self.decode_slices(&mut pending, &mut buf, out)?;
                    }
                    pending.push(slice);
                }
            }
            Ok(())
        })?;
        self.decode_slices(&mut pending, &mut buf, out)
    }

    /// See [`super::Image::next_allocated`].
    ///
    /// # Errors
    /// The L1 table cannot be read.
    pub fn next_allocated(&self, from: GuestOffset) -> Result<Option<GuestOffset>> {
        Ok(self.next_table(from)?.filter(|next| next.get() < self.virtual_size()))
    }

    /// The first offset at or behind `from` that an L1 entry other than zero covers, also behind the
    /// disk's end: the table may be longer than the disk asks for.
    ///
    /// # Errors
    /// The L1 table cannot be read.
    pub(crate) fn next_table(&self, from: GuestOffset) -> Result<Option<GuestOffset>> {
        let geometry = *self.geometry();
        let entries = u64::from(self.header().l1_entries);
        let mut index = geometry.l1_index(from);
        let mut buf = Vec::new();
        let mut most = 64;
        while index < entries {
            let count = (entries - index).min(most);
            most = (most * 2).min(TABLE_READ / 8);
            buf.resize(count as usize * 8, 0);
            match self.read_table(self.header().l1_offset + index * 8, &mut buf) {
                // There may be something everywhere.
                Err(_) if self.lost().is_some() => {
                    return Ok(Some(GuestOffset::new(index * geometry.l2_coverage()).max(from)));
                }
                read => read?,
            }
            if let Some(n) = read_be_u64s(&buf).position(|raw| raw != 0) {
                let start = GuestOffset::new((index + n as u64) * geometry.l2_coverage());
                return Ok(Some(start.max(from)));
            }
            index += count;
        }
        Ok(None)
    }

    /// Calls `f` with each part of `range` that one L1 entry covers, and the entry. Entries that the
    /// L1 table does not have are unallocated.
    pub(crate) fn for_each_l1(
        &self,
        range: GuestRange,
        mut f: impl FnMut(GuestRange, L1Entry) -> Result<()>,
    ) -> Result<()> {
        self.for_each_l1_around(range, |part, entry| {
            f(part, entry.ok_or(Error::Broken { invariant: "an image that is salvaged is only read" })?)
        })
    }

    /// As [`for_each_l1`](Self::for_each_l1), with nothing for entries that are lost where the image is salvaged.
    fn for_each_l1_around(
        &self,
        range: GuestRange,
        mut f: impl FnMut(GuestRange, Option<L1Entry>) -> Result<()>,
    ) -> Result<()> {
        let geometry = *self.geometry();
        let coverage = geometry.l2_coverage();
        let mut at = range.start;
        let mut buf = Vec::new();
        while at < range.end() {
            let first = geometry.l1_index(at);
            let wanted = (range.end().get() - 1) / coverage - first + 1;
            let have = u64::from(self.header().l1_entries).saturating_sub(first);
            if have == 0 {
                return f(GuestRange::between(at, range.end()), Some(L1Entry::Unallocated));
            }
            let count = wanted.min(have).min(TABLE_READ / 8);
            buf.resize(count as usize * 8, 0);
            let table = self.header().l1_offset + first * 8;
            let unreadable = self.read_table_around(table, &mut buf)?;
            for (n, raw) in read_be_u64s(&buf).enumerate() {
                let host = table + n as u64 * 8;
                let entry = match unreadable.iter().any(|part| part.contains(&(n * 8))) {
                    true => None,
                    false => self.or_lost(self.l1_entry(raw, host, at))?,
                };
                let next = GuestOffset::new((first + n as u64 + 1).saturating_mul(coverage));
                f(GuestRange::between(at, next.min(range.end())), entry)?;
                at = next;
            }
        }
        Ok(())
    }

    /// The entry that stands in the L1 table at `host`.
    fn l1_entry(&self, raw: u64, host: HostOffset, guest: GuestOffset) -> Result<L1Entry> {
        let entry =
            L1Entry::decode(raw, self.geometry(), host.get()).map_err(|e| self.mapping_error(guest, e))?;
        if let L1Entry::Table { host: table, .. } = entry {
            if self.is_read_as_qemu() && self.lost().is_none() && !self.is_inside_file(table)? {
                self.note_behind_end();
                return Ok(L1Entry::Unallocated);
            }
            self.check_table("L2 table offset in L1 entry", host.get(), table)?;
        }
        Ok(entry)
    }

    /// Nothing for what is damaged, where the image is salvaged.
    fn or_lost<T>(&self, found: Result<T>) -> Result<Option<T>> {
        match found {
            Err(Error::Mapping { .. } | Error::Format { .. }) if self.lost().is_some() => Ok(None),
            found => found.map(Some),
        }
    }

    /// Notes that a range cannot be mapped, and has it read as zeros.
    fn lose(&self, range: GuestRange, out: &mut Vec<Extent>) {
        if let Some(lost) = self.lost() {
            lost.add(range);
        }
        push(out, range.start, range.len, Mapping::Zero { host: None });
    }

    /// The slice of an L2 table that covers `part`, which lies inside the table's coverage.
    fn slice(&self, table: HostOffset, part: GuestRange) -> Slice {
        let geometry = self.geometry();
        let first = geometry.l2_index(part.start);
        let last = geometry.l2_index(GuestOffset::new(part.end().get() - 1));
        let size = geometry.l2_entry_size();
        Slice { host: table + first * size, len: (last - first + 1) * size, guest: part }
    }

    /// Reads slices that lie side by side, and appends what they say.
    fn decode_slices(&self, slices: &mut Vec<Slice>, buf: &mut Vec<u8>, out: &mut Vec<Extent>) -> Result<()> {
        let (Some(first), Some(last)) = (slices.first(), slices.last()) else { return Ok(()) };
        let start = first.host;
        buf.resize(((last.host + last.len) - start) as usize, 0);
        let unreadable = self.read_table_around(start, buf)?;
        for slice in slices.drain(..) {
            let from = (slice.host - start) as usize;
            let bytes = &buf[from..from + slice.len as usize];
            if unreadable.is_empty() {
                self.decode(slice, bytes, out)?;
                continue;
            }
            // Entries lie in one page each.
            let size = self.geometry().l2_entry_size();
            for (n, bytes) in bytes.chunks(size as usize).enumerate() {
                let entry = self.entry_of(&slice, n as u64);
                match unreadable.iter().any(|part| part.contains(&(from + n * size as usize))) {
                    true => self.lose(entry.guest, out),
                    false => self.decode(entry, bytes, out)?,
                }
            }
        }
        Ok(())
    }

    /// The slice with but one entry of another one.
    fn entry_of(&self, slice: &Slice, n: u64) -> Slice {
        let (size, cluster) = (self.geometry().l2_entry_size(), self.geometry().cluster_size());
        let first = slice.guest.start.align_down(cluster) + n * cluster;
        let whole = GuestRange { start: first, len: cluster };
        let guest = whole.intersect(&slice.guest).unwrap_or(GuestRange { start: first, len: 0 });
        Slice { host: slice.host + n * size, len: size, guest }
    }

    fn decode(&self, slice: Slice, bytes: &[u8], out: &mut Vec<Extent>) -> Result<()> {
        match self.geometry().extended_l2() {
            true => self.decode_extended(slice, bytes, out),
            false => self.decode_standard(slice, bytes, out),
        }
    }

    fn decode_standard(&self, slice: Slice, bytes: &[u8], out: &mut Vec<Extent>) -> Result<()> {
        let cluster = self.geometry().cluster_size();
        let mut at = slice.guest.start;
        let mut words = read_be_u64s(bytes).enumerate().peekable();
        while let Some((n, raw)) = words.next() {
            let host = slice.host + n as u64 * 8;
            let Some(entry) = self.or_lost(self.decode_entry(raw, 0, host, at))? else {
                let next = (at.align_down(cluster) + cluster).min(slice.guest.end());
                self.lose(GuestRange::between(at, next), out);
                at = next;
                continue;
            };
            // How the raw entry of the next cluster looks if it goes on as this one.
            let step = match entry {
                L2Entry::Unallocated | L2Entry::Zero { host: None, .. } => Some(0),
                L2Entry::Zero { .. } | L2Entry::Standard { .. } => Some(cluster),
                L2Entry::Compressed { .. } | L2Entry::Mixed { .. } => None,
            };
            let mut clusters = 1;
            if let Some(step) = step {
                let mut expected = raw.wrapping_add(step);
                while words.next_if(|&(_, next)| next == expected).is_some() {
                    expected = expected.wrapping_add(step);
                    clusters += 1;
                }
            }
            let next = (at.align_down(cluster) + clusters * cluster).min(slice.guest.end());
            self.push_entry_or_lost(entry, GuestRange::between(at, next), host, out)?;
            at = next;
        }
        Ok(())
    }

    fn decode_extended(&self, slice: Slice, bytes: &[u8], out: &mut Vec<Extent>) -> Result<()> {
        let cluster = self.geometry().cluster_size();
        let mut at = slice.guest.start;
        let mut words = read_be_u64s(bytes);
        let mut host = slice.host;
        while let (Some(first), Some(second)) = (words.next(), words.next()) {
            let entry = self.or_lost(self.decode_entry(first, second, host, at))?;
            let next = (at.align_down(cluster) + cluster).min(slice.guest.end());
            match entry {
                Some(entry) => {
                    self.push_entry_or_lost(entry, GuestRange::between(at, next), host, out)?;
                }
                None => self.lose(GuestRange::between(at, next), out),
            }
            at = next;
            host = host + 16;
        }
        Ok(())
    }

    fn decode_entry(&self, first: u64, second: u64, host: HostOffset, guest: GuestOffset) -> Result<L2Entry> {
        let version = self.header().version;
        L2Entry::decode(first, second, self.geometry(), version, self.has_data_file(), host.get()).or_else(
            |e| match L2Entry::is_bare_flag(first)
                && second == 0
                && self.is_read_as_qemu()
                && !self.has_data_file()
            {
                true => Ok(L2Entry::Unallocated),
                false => Err(self.mapping_error(guest, e)),
            },
        )
    }

    /// As [`push_entry`](Self::push_entry); an entry that leads nowhere is lost where the image is salvaged.
    fn push_entry_or_lost(
        &self,
        entry: L2Entry,
        range: GuestRange,
        at: HostOffset,
        out: &mut Vec<Extent>,
    ) -> Result<()> {
        if self.or_lost(self.push_entry(entry, range, at, out))?.is_none() {
            self.lose(range, out);
        }
        Ok(())
    }

    /// Appends what an entry says about `range`, which starts inside its cluster.
    fn push_entry(
        &self,
        entry: L2Entry,
        range: GuestRange,
        at: HostOffset,
        out: &mut Vec<Extent>,
    ) -> Result<()> {
        let skip = self.geometry().in_cluster(range.start);
        match entry {
            L2Entry::Unallocated => push(out, range.start, range.len, Mapping::Unallocated),
            L2Entry::Zero { host, .. } => {
                push(out, range.start, range.len, Mapping::Zero { host: host.map(|h| h + skip) });
            }
            L2Entry::Standard { host, .. } => {
                self.check_data(host, range, at)?;
                self.push_data(host + skip, range, out);
            }
            L2Entry::Compressed { host, len } => {
                if !self.is_inside_file(host)? {
                    return Err(self.beyond_end(
                        "compressed cluster offset in L2 entry",
                        host,
                        range.start,
                        at,
                    ));
                }
                push(out, range.start, range.len, Mapping::Compressed(CompressedPart { host, len, skip }));
            }
            L2Entry::Mixed { host, subclusters, .. } => self.push_mixed(host, subclusters, range, at, out)?,
        }
        Ok(())
    }

    /// Appends data; what lies behind the end of the file reads as zeros, where that is allowed at all.
    fn push_data(&self, host: HostOffset, range: GuestRange, out: &mut Vec<Extent>) {
        let held = match self.is_read_as_qemu() && !self.has_data_file() {
            true => self.file_len().saturating_sub(host.get()).min(range.len),
            false => range.len,
        };
        if held < range.len {
            self.note_behind_end();
        }
        push(out, range.start, held, Mapping::Data { host });
        if held < range.len {
            self.lose(GuestRange::between(range.start + held, range.end()), out);
        }
    }

    fn push_mixed(
        &self,
        host: Option<HostOffset>,
        subclusters: Subclusters,
        range: GuestRange,
        at: HostOffset,
        out: &mut Vec<Extent>,
    ) -> Result<()> {
        let geometry = self.geometry();
        let base = range.start.align_down(geometry.cluster_size());
        let size = geometry.subcluster_size();
        if let Some(host) = host
            && subclusters.allocated != 0
        {
            self.check_data(host, range, at)?;
        }
        for n in 0..32 {
            let part = GuestRange { start: base + u64::from(n) * size, len: size };
            let Some(part) = part.intersect(&range) else { continue };
            let here = host.map(|h| h + (part.start - base));
            let mapping = match (subclusters.get(n), here) {
                (SubclusterState::Allocated, Some(host)) => {
                    self.push_data(host, part, out);
                    continue;
                }
                (SubclusterState::Zero, host) => Mapping::Zero { host },
                _ => Mapping::Unallocated,
            };
            push(out, part.start, part.len, mapping);
        }
        Ok(())
    }

    /// Checks a run of data clusters: its last cluster begins inside the file, and in a data file each
    /// cluster lies at its guest offset.
    fn check_data(&self, host: HostOffset, range: GuestRange, at: HostOffset) -> Result<()> {
        let cluster = self.geometry().cluster_size();
        let first = range.start.align_down(cluster);
        if self.has_data_file() && host.get() != first.get() {
            let error = FormatError::malformed(
                "host offset in L2 entry",
                at.get(),
                host,
                format!("the guest offset {first}, as data files have it"),
            );
            return Err(self.mapping_error(range.start, error));
        }
        let last = host + (GuestOffset::new(range.end().get() - 1).align_down(cluster) - first);
        // A data file may be shorter than the disk: what is not there reads as zeros.
        if !self.has_data_file() && !self.is_inside_file(last)? && !self.is_read_as_qemu() {
            return Err(self.beyond_end("host offset in L2 entry", last, range.start, at));
        }
        Ok(())
    }

    fn beyond_end(&self, what: &str, host: HostOffset, guest: GuestOffset, at: HostOffset) -> Error {
        let expected = format!("an offset inside the file of {} bytes", self.data_len());
        self.mapping_error(guest, FormatError::malformed(what, at.get(), host, expected))
    }

    fn mapping_error(&self, guest: GuestOffset, source: FormatError) -> Error {
        Error::Mapping { path: self.path().to_owned(), guest, source }
    }
}

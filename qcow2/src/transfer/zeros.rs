//! Zeros among the data that is copied: a new file does without them. And what of the data cannot be read, if that is to
//! become zeros.

use std::sync::Arc;

use rayon::prelude::*;

use super::needs::Need;
use super::origin::Origin;
use crate::image::{ClusterCache, Image, Lost, Qcow2};
use crate::storage::{Storage, read_around};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// The shortest run of zeros that is looked for, and how it is aligned, in bytes.
const BLOCK: u64 = 4096;
/// How much one worker looks at in one go, in bytes.
const PIECE: u64 = 1 << 20;
/// How much is looked at before it is copied, in bytes, so that it need not be read from the disk twice. A multiple of every
/// cluster size.
pub(crate) const AHEAD: u64 = 64 << 20;

static ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// Which zeros of the layers count as such.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Zeros {
    /// Those that an image's tables tell of.
    #[default]
    Mapped,
    /// Also holes of the layers' files.
    Holes,
    /// Also aligned runs of 4 KiB or more among the data, which is read for that.
    Read,
}

impl Zeros {
    /// The needs with the zeros that were looked for. What cannot be read is data, and whoever copies it has the error; with
    /// `lost` all is read, what cannot be is noted there, and becomes zeros.
    pub(crate) fn found_in(self, needs: Vec<Need>, layers: &[&Image], lost: Option<&Lost>) -> Vec<Need> {
        if self == Self::Mapped && lost.is_none() {
            return needs;
        }
        let pieces: Vec<Need> = needs.iter().flat_map(pieces).collect();
        let look = |cache: &mut Looker, need: &Need| {
            let mut found = Vec::new();
            cache.look((self, lost), need, layers, &mut found);
            found
        };
        let found: Vec<Vec<Need>> = pieces.par_iter().map_init(Looker::default, look).collect();
        let mut joined: Vec<Need> = Vec::new();
        for need in found.into_iter().flatten() {
            push(&mut joined, need);
        }
        joined
    }
}

/// Cuts needs where those behind `end` begin.
pub(crate) fn split(needs: &mut Vec<Need>, end: GuestOffset) -> Vec<Need> {
    let inside = GuestRange::between(GuestOffset::ZERO, end);
    let behind = GuestRange::between(end, GuestOffset::new(u64::MAX));
    let first = needs.partition_point(|need| need.range.end() <= end);
    let rest = needs.split_off(first);
    needs.extend(rest.first().and_then(|need| need.clip(&inside)));
    let rest = rest.iter().filter_map(|need| need.clip(&behind)).collect();
    std::mem::replace(needs, rest)
}

/// Plain data in pieces that end at borders of [`PIECE`]; the rest as it is.
fn pieces(need: &Need) -> Vec<Need> {
    if !matches!(need.origin, Origin::Plain { .. }) {
        return vec![*need];
    }
    let mut all = Vec::new();
    let mut at = need.range.start;
    while at < need.range.end() {
        let end = (at.align_down(PIECE) + PIECE).min(need.range.end());
        all.extend(need.clip(&GuestRange::between(at, end)));
        at = end;
    }
    all
}

/// Adds a need, joined to the last one where it goes on from it.
fn push(out: &mut Vec<Need>, need: Need) {
    if let Some(last) = out.last_mut()
        && last.range.end() == need.range.start
        && last.origin.advance(last.range.len) == need.origin
        && !matches!(need.origin, Origin::Compressed { .. })
    {
        last.range.len += need.range.len;
    } else if !need.range.is_empty() {
        out.push(need);
    }
}

/// What is looked for, and where it is noted what cannot be read.
type How<'a> = (Zeros, Option<&'a Lost>);

/// What a worker keeps.
#[derive(Default)]
struct Looker {
    bytes: Vec<u8>,
    cache: ClusterCache,
}

impl Looker {
    fn look(&mut self, how: How<'_>, need: &Need, layers: &[&Image], out: &mut Vec<Need>) {
        let (zeros, lost) = how;
        match need.origin {
            Origin::Plain { layer, host } => match layers.get(layer) {
                Some(image) => self.plain(how, need, (image.data_file(), host), out),
                None => push(out, *need),
            },
            Origin::Compressed { layer, part, guest } if zeros == Zeros::Read || lost.is_some() => {
                let image = layers.get(layer).and_then(|image| image.as_qcow2());
                // A stream of nothing but zeros is short, whatever its type.
                let is_short = |q: &&Qcow2| part.len <= 1024 + q.geometry().cluster_size() / 256;
                let Some(image) = image.filter(|q| lost.is_some() || is_short(q)) else {
                    push(out, *need);
                    return;
                };
                let from = part.skip as usize;
                let as_zeros = match (self.cache.cluster(image, layer, &part, guest), lost) {
                    (Ok(bytes), _) if zeros == Zeros::Read => {
                        let bytes = bytes.get(from..from + need.range.len as usize);
                        bytes.is_some_and(|bytes| bytes.chunks(ZEROS.len()).all(is_zero))
                    }
                    (Err(_), Some(lost)) => {
                        lost.add(need.range);
                        true
                    }
                    _ => false,
                };
                push(out, if as_zeros { Need { origin: Origin::Zeros, ..*need } } else { *need });
            }
            _ => push(out, *need),
        }
    }

    /// Data of a file from `host` on: first its holes, then what is read.
    fn plain(
        &mut self,
        how: How<'_>,
        need: &Need,
        (file, host): (&Arc<dyn Storage>, HostOffset),
        out: &mut Vec<Need>,
    ) {
        let GuestRange { start, len } = need.range;
        let part = |from: u64, to: u64| need.clip(&GuestRange::between(start + from, start + to));
        let zero = |from: u64, to: u64| part(from, to).map(|part| Need { origin: Origin::Zeros, ..part });
        let mut at = 0;
        while at < len {
            // Only whole blocks of a hole are left out: the rest belongs to a block of data.
            let data = match file.next_data(host.get() + at) {
                _ if how.0 == Zeros::Mapped => at..len,
                Ok(Some(data)) => data.start.max(host.get() + at) - host.get()..data.end - host.get(),
                Ok(None) => len..len,
                Err(_) => at..len,
            };
            let from = if data.start >= len {
                len
            } else {
                (start + data.start).align_down(BLOCK).get().saturating_sub(start.get()).max(at)
            };
            if from > at {
                zero(at, from).into_iter().for_each(|need| push(out, need));
            }
            let to = (start + data.end.min(len)).get().next_multiple_of(BLOCK).saturating_sub(start.get());
            let to = if data.start >= len { len } else { to.clamp(from, len) };
            if to > from {
                match how {
                    (Zeros::Read, _) | (_, Some(_)) => self.read(how, &part, (file, host), from..to, out),
                    _ => part(from, to).into_iter().for_each(|need| push(out, need)),
                }
            }
            at = to.max(from);
        }
    }

    /// Looks at the bytes of a range.
    fn read(
        &mut self,
        (zeros, lost): How<'_>,
        part: &dyn Fn(u64, u64) -> Option<Need>,
        (file, host): (&Arc<dyn Storage>, HostOffset),
        range: std::ops::Range<u64>,
        out: &mut Vec<Need>,
    ) {
        self.bytes.resize((range.end - range.start) as usize, 0);
        let start = host.get() + range.start;
        let unreadable = match (file.read_exact_or_zero(&mut self.bytes, start), lost) {
            (Ok(()), _) => Vec::new(),
            (Err(_), Some(_)) => read_around(&**file, &mut self.bytes, start),
            (Err(_), None) => {
                part(range.start, range.end).into_iter().for_each(|need| push(out, need));
                return;
            }
        };
        let mut unreadable = unreadable.into_iter().peekable();
        let mut at = range.start;
        while let Some(whole) = part(at, range.end) {
            let from = (at - range.start) as usize;
            // Up to the next border of a block of the guest's disk, or of what cannot be read.
            let guest = whole.range.start;
            let len = (BLOCK - guest.get() % BLOCK).min(whole.range.len);
            let (len, is_lost) = match unreadable.peek() {
                Some(bad) if bad.start <= from => (len.min((bad.end - from) as u64), true),
                Some(bad) => (len.min((bad.start - from) as u64), false),
                None => (len, false),
            };
            let to = from + len as usize;
            unreadable.next_if(|bad| bad.end <= to);
            let bytes = self.bytes.get(from..to).unwrap_or_default();
            if let Some(need) = part(at, at + len) {
                if let Some(lost) = lost.filter(|_| is_lost) {
                    lost.add(need.range);
                }
                let as_zeros = is_lost || zeros == Zeros::Read && is_zero(bytes);
                push(out, if as_zeros { Need { origin: Origin::Zeros, ..need } } else { need });
            }
            at += len;
        }
    }
}

/// Whether at most [`BLOCK`] bytes are zeros.
fn is_zero(bytes: &[u8]) -> bool {
    ZEROS.get(..bytes.len()) == Some(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::Raw;
    use crate::storage::MemFile;

    /// A raw image in which the bytes of these ranges are not zeros.
    fn image(len: u64, data: &[std::ops::Range<u64>]) -> Image {
        let file = MemFile::new();
        file.set_len(len).unwrap();
        for range in data {
            file.write_all_at(&vec![7; (range.end - range.start) as usize], range.start).unwrap();
        }
        Image::Raw(Raw::open(std::path::Path::new("/i"), Arc::new(file)).unwrap())
    }

    fn need(start: u64, len: u64, host: u64) -> Need {
        let origin = Origin::Plain { layer: 0, host: HostOffset::new(host) };
        Need { range: GuestRange { start: GuestOffset::new(start), len }, origin }
    }

    /// The ranges of the guest's disk that are copied, and that are zeros.
    fn found(zeros: Zeros, needs: Vec<Need>, image: &Image) -> [Vec<(u64, u64)>; 2] {
        let (start, end) = (needs[0].range.start, needs.last().unwrap().range.end());
        let found = zeros.found_in(needs, &[image], None);
        let mut at = start;
        for need in &found {
            assert_eq!(need.range.start, at, "{found:?}");
            at = need.range.end();
        }
        assert_eq!(at, end);
        [false, true].map(|zeros| {
            let of = found.iter().filter(|need| (need.origin == Origin::Zeros) == zeros);
            of.map(|need| (need.range.start.get(), need.range.len)).collect()
        })
    }

    #[test]
    fn runs_of_zeros_are_found_at_the_borders_of_the_guests_blocks() {
        let image = image(1 << 20, &[10_000..10_010, 40_000..50_000]);
        let [copied, zeros] = found(Zeros::Read, vec![need(0, 1 << 20, 0)], &image);
        assert_eq!(copied, [(8192, 4096), (36_864, 16_384)]);
        assert_eq!(zeros, [(0, 8192), (12_288, 24_576), (53_248, (1 << 20) - 53_248)]);
        // The guest's blocks lie across the file's.
        let [copied, _] = found(Zeros::Read, vec![need(512, 65_536, 0)], &image);
        assert_eq!(copied, [(8192, 4096), (36_864, 16_384)]);
        let [copied, zeros] = found(Zeros::Mapped, vec![need(0, 8192, 0)], &image);
        assert_eq!((copied.len(), zeros.len()), (1, 0));
    }

    #[test]
    fn holes_are_found_without_reading() {
        let image = image(8 << 20, &[0..1, 3 << 20..(3 << 20) + 5000]);
        // Zeros that lie there as data.
        image.data_file().write_all_at(&[0; 8192], 1 << 20).unwrap();
        let [copied, zeros] = found(Zeros::Holes, vec![need(0, 8 << 20, 0)], &image);
        assert_eq!(copied, [(0, 4096), (1 << 20, 8192), (3 << 20, 8192)]);
        assert_eq!(zeros.iter().map(|z| z.1).sum::<u64>(), (8 << 20) - 4096 - 16_384);
        let [copied, _] = found(Zeros::Read, vec![need(0, 8 << 20, 0)], &image);
        assert_eq!(copied, [(0, 4096), (3 << 20, 8192)]);
        // Behind the end of the file there are zeros.
        let [copied, _] = found(Zeros::Holes, vec![need(0, 1 << 20, (8 << 20) - 100)], &image);
        assert!(copied.is_empty());
    }

    #[test]
    fn needs_are_cut_at_a_border() {
        let mut rest = vec![need(0, 100, 0), need(100, 100, 500), need(300, 10, 0)];
        let first = split(&mut rest, GuestOffset::new(150));
        assert_eq!(first, [need(0, 100, 0), need(100, 50, 500)]);
        assert_eq!(rest, [need(150, 50, 550), need(300, 10, 0)]);
        assert!(split(&mut rest, GuestOffset::new(150)).is_empty());
        assert_eq!(split(&mut rest, GuestOffset::new(1000)).len(), 2);
    }
}

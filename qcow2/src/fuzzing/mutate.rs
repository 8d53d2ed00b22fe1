//! Deterministic mutations, for running fuzz bodies without a fuzzer.

use kit::Random;

/// Values at which parsers break: limits of the format, of integers, of cluster sizes.
pub(super) const VALUES: [u64; 28] = [
    0,
    1,
    2,
    3,
    4,
    7,
    8,
    9,
    21,
    22,
    63,
    64,
    0x1ff,
    0x200,
    0x400,
    0xffff,
    0x1_0000,
    0x10_0000,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    0x00ff_ffff_ffff_fe00,
    1 << 62,
    (1 << 62) | 0x1ff,
    0x7fff_ffff_ffff_fe00,
    1 << 63,
    0xffff_ffff_ffff_fe00,
    u64::MAX,
];

/// Changes `bytes` in one to four places, mostly where tables and headers are.
pub fn mutate(bytes: &mut Vec<u8>, random: &mut Random) {
    for _ in 0..=random.below(4) {
        once(bytes, random);
    }
}

fn once(bytes: &mut Vec<u8>, random: &mut Random) {
    let len = bytes.len() as u64;
    // The header is a small part of most images, and the most telling.
    let within = if random.below(3) == 0 { len.min(256) } else { len };
    let at = random.below(within);
    match random.below(8) {
        0 => put(bytes, at, &[1 << random.below(8)], |old, bit| old ^ bit),
        1 => put(bytes, at, &[random.next() as u8], |_, new| new),
        2 => {
            let value = VALUES[random.below(VALUES.len() as u64) as usize];
            put(bytes, at & !7, &value.to_be_bytes(), |_, new| new);
        }
        3 => {
            let value = VALUES[random.below(VALUES.len() as u64) as usize] as u32;
            put(bytes, at & !3, &value.to_be_bytes(), |_, new| new);
        }
        4 => {
            // A place in the file, or just behind it, as a table entry would name it.
            let flags = random.below(4) << 62;
            let host = (random.below(len / 512 + 4) * 512) | flags;
            put(bytes, at & !7, &host.to_be_bytes(), |_, new| new);
        }
        5 => {
            // One word of the file at another place.
            let from = random.below(len / 8) as usize * 8;
            let word = bytes.get(from..from + 8).map(<[u8]>::to_vec).unwrap_or_default();
            put(bytes, at & !7, &word, |_, new| new);
        }
        6 => bytes.truncate(at as usize),
        _ => {
            let add = random.below(2048) as usize;
            bytes.resize(bytes.len() + add, random.next() as u8);
        }
    }
}

fn put(bytes: &mut [u8], at: u64, new: &[u8], mix: impl Fn(u8, u8) -> u8) {
    for (old, new) in bytes.iter_mut().skip(at as usize).zip(new) {
        *old = mix(*old, *new);
    }
}

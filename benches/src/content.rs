//! Orders and bytes that look random and are the same in every run.

use std::io::Write;

use kit::Random;

use crate::Result;

/// Brings a list into random order.
pub(crate) fn shuffle(random: &mut Random, list: &mut [u32]) {
    for n in (1..list.len()).rev() {
        let other = random.below(n as u64 + 1);
        list.swap(n, other as usize);
    }
}

/// Writes `len` bytes (a multiple of 8) that do not compress.
pub(crate) fn write_noise(random: &mut Random, out: &mut impl Write, len: u64) -> Result<()> {
    for _ in 0..len / 8 {
        out.write_all(&random.next().to_be_bytes())?;
    }
    Ok(())
}

/// Writes `len` bytes (a multiple of 8) of 64 different values, which compress to about three quarters.
pub(crate) fn write_text(random: &mut Random, out: &mut impl Write, len: u64) -> Result<()> {
    for _ in 0..len / 8 {
        let letters = (random.next() & 0x3f3f_3f3f_3f3f_3f3f) + 0x3030_3030_3030_3030;
        out.write_all(&letters.to_be_bytes())?;
    }
    Ok(())
}

//! Sizes, rates and durations in words; powers of 1024.

const UNITS: [&str; 7] = ["bytes", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];

/// A short size with at most three significant digits: `1.5 GiB`, `512 bytes`.
pub(crate) fn short(bytes: u64) -> String {
    let mut unit = 0;
    let mut scale = 1_u64;
    // Rounding to three digits must not print "1024 KiB".
    while unit + 1 < UNITS.len() && bytes / scale >= 1000 {
        unit += 1;
        scale = scale.saturating_mul(1024);
    }
    let name = UNITS.get(unit).copied().unwrap_or_default();
    if unit == 0 {
        return if bytes == 1 { "1 byte".to_owned() } else { format!("{bytes} {name}") };
    }
    if bytes.is_multiple_of(scale) {
        return format!("{} {name}", bytes / scale);
    }
    let value = bytes as f64 / scale as f64;
    let digits = if value < 9.995 { 2 } else { usize::from(value < 99.95) };
    let text = format!("{value:.digits$}");
    let text = if text.contains('.') { text.trim_end_matches('0').trim_end_matches('.') } else { &text };
    format!("{text} {name}")
}

/// Two sizes of one thing, before and after: in bytes, if short sizes would look equal.
pub(crate) fn change(before: u64, after: u64) -> String {
    let unit = |text: &str| text.rsplit(' ').next().unwrap_or_default().to_owned();
    let (short_before, short_after) = (short(before), short(after));
    let is_clear = unit(&short_before) == unit(&short_after) && short_before != short_after
        || before / 2 < before.abs_diff(after);
    if is_clear {
        format!("from {short_before} to {}", exact(after))
    } else {
        format!("from {before} to {after} bytes")
    }
}

/// A size with its exact bytes: `1.5 GiB (1610612736 bytes)`.
pub(crate) fn exact(bytes: u64) -> String {
    if bytes < 1000 { short(bytes) } else { format!("{} ({bytes} bytes)", short(bytes)) }
}

/// A duration: `0.42 s`, `1m 32s`, `2h 05m`.
pub(crate) fn duration(seconds: f64) -> String {
    if seconds < 9.95 { format!("{seconds:.2} s") } else { countdown(seconds) }
}

/// A duration in whole seconds, rounded up: `5 s`, `1m 32s`, `2h 05m`.
pub(crate) fn countdown(seconds: f64) -> String {
    let whole = seconds.ceil() as u64;
    match (whole / 3600, whole / 60 % 60, whole % 60) {
        (0, 0, s) => format!("{s} s"),
        (0, m, s) => format!("{m}m {s:02}s"),
        (h, m, _) => format!("{h}h {m:02}m"),
    }
}

/// Reads a size: digits, a fraction if need be, and one of K, M, G, T (also `KiB` and the like).
pub(crate) fn parse(text: &str) -> Result<u64, String> {
    let bad =
        || format!("'{text}' is not a size: write bytes, or a number with K, M, G or T, as in 512M or 1.5G");
    let split = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(split);
    let suffix = suffix.trim_start().to_ascii_lowercase();
    let scale: u64 = match suffix.strip_suffix("ib").or(suffix.strip_suffix('b')).unwrap_or(&suffix) {
        "" if suffix.len() < 2 => 1,
        "k" => 1 << 10,
        "m" => 1 << 20,
        "g" => 1 << 30,
        "t" => 1 << 40,
        _ => return Err(bad()),
    };
    if let Ok(whole) = number.parse::<u64>() {
        return whole
            .checked_mul(scale)
            .ok_or_else(|| format!("'{text}' is too large: it does not fit in 64 bits"));
    }
    let value: f64 = number.parse().map_err(|_| bad())?;
    let bytes = value * scale as f64;
    if bytes.fract() != 0.0 || bytes >= 2_f64.powi(63) {
        return Err(bad());
    }
    Ok(bytes as u64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_three_digits_and_binary_units() {
        for (bytes, expected) in [
            (0, "0 bytes"),
            (1, "1 byte"),
            (999, "999 bytes"),
            (1000, "0.98 KiB"),
            (1024, "1 KiB"),
            (1_610_612_736, "1.5 GiB"),
            (1023 * 1024, "1 MiB"),
            (196 << 10, "196 KiB"),
            (123_456_789, "118 MiB"),
            (64 << 40, "64 TiB"),
            (u64::MAX, "16 EiB"),
        ] {
            assert_eq!(short(bytes), expected, "{bytes}");
        }
        assert_eq!(exact(1_610_612_736), "1.5 GiB (1610612736 bytes)");
        assert_eq!(exact(512), "512 bytes");
    }

    #[test]
    fn a_change_of_size_shows_what_changes() {
        for (before, after, expected) in [
            (1 << 30, 4 << 30, "from 1 GiB to 4 GiB (4294967296 bytes)"),
            (1 << 20, 4 << 30, "from 1 MiB to 4 GiB (4294967296 bytes)"),
            (1000 * (1 << 20) - 100, 1000 << 20, "from 1048575900 to 1048576000 bytes"),
            ((1 << 30) - 512, 1 << 30, "from 1073741312 to 1073741824 bytes"),
            (0, 512, "from 0 bytes to 512 bytes"),
        ] {
            assert_eq!(change(before, after), expected);
        }
    }

    #[test]
    fn durations_read_naturally() {
        assert_eq!(duration(0.0), "0.00 s");
        assert_eq!(duration(9.99), "10 s");
        assert_eq!(duration(92.0), "1m 32s");
        assert_eq!(duration(7530.0), "2h 05m");
    }

    #[test]
    fn sizes_are_read_with_suffixes() {
        assert_eq!(parse("0"), Ok(0));
        assert_eq!(parse("4096"), Ok(4096));
        assert_eq!(parse("64K"), Ok(65536));
        assert_eq!(parse("1.5G"), Ok(1_610_612_736));
        assert_eq!(parse("2MiB"), Ok(2 << 20));
        assert_eq!(parse("512B"), Ok(512));
        assert_eq!(parse("1 t"), Ok(1 << 40));
        for bad in ["", "K", "1X", "-1", "1.5", "1ib", "..K", "17179869184G", "99999999999999999999"] {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}

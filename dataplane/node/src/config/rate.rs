//! Speeds of links as people write them.

use super::size::{ByteSize, SizeError};

/// The bytes a second of a text such as `10 Gbit/s`, `25Gbit` or `800 Mbit/s`.
pub(super) fn bytes_per_s(text: &str) -> Result<u64, SizeError> {
    let wrong = || SizeError::NotASize(text.to_owned());
    let text = text.strip_suffix("/s").unwrap_or(text);
    let (number, unit) = ["Mbit", "Gbit", "Tbit"]
        .into_iter()
        .find_map(|unit| Some((text.strip_suffix(unit)?.trim_end(), unit)))
        .ok_or_else(wrong)?;
    // The same number in bytes, an eighth of it.
    let as_bytes = format!("{number}{}B", &unit[..1]);
    let ByteSize(bits) = as_bytes.parse().map_err(|_| wrong())?;
    Ok(bits / 8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn links_are_named_by_their_bits() {
        assert_eq!(bytes_per_s("10 Gbit/s"), Ok(1_250_000_000));
        assert_eq!(bytes_per_s("800Mbit"), Ok(100_000_000));
        assert_eq!(bytes_per_s("2.5 Gbit/s"), Ok(312_500_000));
        assert_eq!(bytes_per_s("0.4 Tbit/s"), Ok(50_000_000_000));
        for text in [
            "",
            "10",
            "10 GB/s",
            "Gbit",
            "-1 Gbit/s",
            "ten Gbit/s",
            "10 Gbit/h",
        ] {
            assert!(bytes_per_s(text).is_err(), "{text:?}");
        }
    }
}

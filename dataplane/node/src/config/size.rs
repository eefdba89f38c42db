//! Amounts of bytes as people write them.

use std::fmt;
use std::str::FromStr;

/// An amount of bytes: `1048576`, `512MiB`, `100GiB`, `1.5TiB`, `20GB`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct ByteSize(pub u64);

/// How much disk the store may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StoreLimit {
    /// So many bytes.
    Bytes(u64),
    /// So much of the file system that holds the data directory; 1 to 100.
    PercentOfDisk(u8),
}

impl StoreLimit {
    /// The limit in bytes on a file system of `disk_bytes`.
    pub fn bytes_of(self, disk_bytes: u64) -> u64 {
        match self {
            Self::Bytes(bytes) => bytes,
            // Through u128: a product of a large disk and 100 need not fit in u64.
            Self::PercentOfDisk(percent) => {
                u64::try_from(u128::from(disk_bytes) * u128::from(percent) / 100)
                    .unwrap_or(u64::MAX)
            }
        }
    }
}

/// The text is not an amount.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SizeError {
    /// No number, or one with an unknown unit.
    #[error("{0:?} is not an amount of bytes")]
    NotASize(String),
    /// A part of a disk outside 1 to 100.
    #[error("{0:?} is not a percentage from 1% to 100%")]
    NotAPercentage(String),
}

const UNITS: [(&str, u64); 9] = [
    ("", 1),
    ("B", 1),
    ("KiB", 1 << 10),
    ("MiB", 1 << 20),
    ("GiB", 1 << 30),
    ("TiB", 1 << 40),
    ("MB", 1_000_000),
    ("GB", 1_000_000_000),
    ("TB", 1_000_000_000_000),
];

/// Digits behind the point that are taken: enough for any use, few enough to stay exact in u128.
const FRACTION_DIGITS_MAX: usize = 6;

impl FromStr for ByteSize {
    type Err = SizeError;
    fn from_str(text: &str) -> Result<Self, SizeError> {
        let error = || SizeError::NotASize(text.chars().take(40).collect());
        let text = text.trim();
        let number_len = text
            .find(|c: char| !c.is_ascii_digit() && c != '.')
            .unwrap_or(text.len());
        let (number, unit) = text.split_at(number_len);
        let unit = unit.trim_start();
        let (_, factor) = UNITS
            .iter()
            .find(|(name, _)| name.eq_ignore_ascii_case(unit))
            .ok_or_else(error)?;
        let (whole, fraction) = number.split_once('.').unwrap_or((number, "0"));
        if fraction.is_empty() || fraction.len() > FRACTION_DIGITS_MAX {
            return Err(error());
        }
        let whole: u64 = whole.parse().map_err(|_| error())?;
        let scale = 10u128.pow(u32::try_from(fraction.len()).map_err(|_| error())?);
        let fraction: u64 = fraction.parse().map_err(|_| error())?;
        let bytes = u128::from(whole) * u128::from(*factor)
            + u128::from(fraction) * u128::from(*factor) / scale;
        u64::try_from(bytes).map(Self).map_err(|_| error())
    }
}

impl FromStr for StoreLimit {
    type Err = SizeError;
    fn from_str(text: &str) -> Result<Self, SizeError> {
        let Some(number) = text.trim().strip_suffix('%') else {
            return text.parse().map(|ByteSize(bytes)| Self::Bytes(bytes));
        };
        match number.trim().parse() {
            Ok(percent @ 1..=100) => Ok(Self::PercentOfDisk(percent)),
            _ => Err(SizeError::NotAPercentage(text.chars().take(40).collect())),
        }
    }
}

impl fmt::Display for ByteSize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (name, factor) = UNITS[2..6]
            .iter()
            .rev()
            .find(|(_, factor)| self.0 >= *factor)
            .unwrap_or(&UNITS[1]);
        if *factor == 1 {
            return write!(f, "{} B", self.0);
        }
        // One decimal is as much as a person reads; the rounding error does not matter there.
        #[allow(clippy::cast_precision_loss)]
        let value = self.0 as f64 / *factor as f64;
        write!(f, "{value:.1} {name}")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_are_read_as_people_write_them() {
        for (text, bytes) in [
            ("0", 0),
            ("1048576", 1 << 20),
            ("100GiB", 100 << 30),
            ("100 gib", 100 << 30),
            ("1.5TiB", 3 << 39),
            ("20GB", 20_000_000_000),
            ("16777215TiB", 16_777_215 << 40),
        ] {
            assert_eq!(text.parse(), Ok(ByteSize(bytes)), "{text}");
        }
        for bad in [
            "",
            "GiB",
            "-1",
            "1.GiB",
            "1..2GiB",
            "5 apples",
            "99999999TiB",
            "1e9",
            "1.0000001GiB",
        ] {
            assert!(bad.parse::<ByteSize>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_limit_is_bytes_or_a_part_of_the_disk() {
        assert_eq!("80%".parse(), Ok(StoreLimit::PercentOfDisk(80)));
        assert_eq!("100 %".parse(), Ok(StoreLimit::PercentOfDisk(100)));
        assert_eq!("1GiB".parse(), Ok(StoreLimit::Bytes(1 << 30)));
        assert_eq!(StoreLimit::PercentOfDisk(80).bytes_of(u64::MAX / 2), {
            u64::try_from(u128::from(u64::MAX / 2) * 80 / 100).unwrap()
        });
        for bad in ["0%", "101%", "%", "-5%", "8.5%"] {
            assert!(bad.parse::<StoreLimit>().is_err(), "{bad}");
        }
    }

    #[test]
    fn sizes_are_written_with_one_decimal() {
        assert_eq!(ByteSize(999).to_string(), "999 B");
        assert_eq!(ByteSize(1536).to_string(), "1.5 KiB");
        assert_eq!(ByteSize(3 << 30).to_string(), "3.0 GiB");
    }
}

//! The `Range` request header: which bytes of a blob a client asks for (RFC 9110, section 14).

use pantala_wire::ByteRange;

/// What to answer to a `Range` header.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum RangeOutcome {
    /// 200 with everything: no range, or one that is ignored.
    Whole,
    /// 206 with exactly these bytes.
    Part(ByteRange),
    /// 416: well-formed, and nothing of it lies in the blob.
    Unsatisfiable,
}

/// Reads a `Range` header's value against a representation of `size_bytes`.
///
/// A single range is answered exactly. Everything else that is not a request error is ignored,
/// as section 14.2 allows ("A server MAY ignore the Range header field"): other units, malformed
/// specifiers, and several ranges, whose multipart answer no registry client asks for.
pub fn parse_range(header: &str, size_bytes: u64) -> RangeOutcome {
    let Some((unit, set)) = header.trim().split_once('=') else {
        return RangeOutcome::Whole;
    };
    if !unit.eq_ignore_ascii_case("bytes") {
        return RangeOutcome::Whole;
    }
    // Empty list elements are allowed and mean nothing (RFC 9110, section 5.6.1.2).
    let mut ranges = set.split(',').map(trim_ows).filter(|spec| !spec.is_empty());
    let (Some(spec), None) = (ranges.next(), ranges.next()) else {
        return RangeOutcome::Whole;
    };
    let Some((first, last)) = spec.split_once('-') else {
        return RangeOutcome::Whole;
    };
    match (first, last) {
        ("", suffix) => match parse_position(suffix) {
            None => RangeOutcome::Whole,
            Some(0) => RangeOutcome::Unsatisfiable,
            // The suffix of nothing is everything there is.
            Some(_) if size_bytes == 0 => RangeOutcome::Whole,
            Some(len) => part(size_bytes - len.min(size_bytes), size_bytes),
        },
        (first, last) => {
            let Some(start) = parse_position(first) else {
                return RangeOutcome::Whole;
            };
            let last = match last {
                "" => u64::MAX,
                text => match parse_position(text) {
                    // "An int-range is invalid if the last-pos value is present and less than
                    // first-pos": and an invalid one is ignored.
                    Some(last) if last >= start => last,
                    _ => return RangeOutcome::Whole,
                },
            };
            if start >= size_bytes {
                return RangeOutcome::Unsatisfiable;
            }
            part(start, last.saturating_add(1).min(size_bytes))
        }
    }
}

fn part(start: u64, end: u64) -> RangeOutcome {
    ByteRange::new(start, end).map_or(RangeOutcome::Unsatisfiable, RangeOutcome::Part)
}

fn trim_ows(text: &str) -> &str {
    text.trim_matches([' ', '\t'])
}

/// Decimal digits; a number beyond `u64` is as good as the largest, since no blob reaches it.
fn parse_position(text: &str) -> Option<u64> {
    if text.is_empty() || !text.bytes().all(|b| b.is_ascii_digit()) {
        return None;
    }
    Some(text.parse().unwrap_or(u64::MAX))
}

/// The `Content-Range` of a 206.
pub fn content_range(range: ByteRange, size_bytes: u64) -> String {
    format!("bytes {}-{}/{size_bytes}", range.start(), range.end() - 1)
}

/// The `Content-Range` of a 416.
pub fn unsatisfied_range(size_bytes: u64) -> String {
    format!("bytes */{size_bytes}")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(start: u64, end: u64) -> RangeOutcome {
        RangeOutcome::Part(ByteRange::new(start, end).unwrap())
    }

    #[test]
    fn single_suffix_and_open_ranges_are_exact() {
        for (header, outcome) in [
            ("bytes=0-0", bytes(0, 1)),
            ("bytes=0-99", bytes(0, 100)),
            ("bytes=99-99", bytes(99, 100)),
            ("bytes=10-19", bytes(10, 20)),
            ("bytes=90-", bytes(90, 100)),
            ("bytes=0-", bytes(0, 100)),
            ("bytes=-1", bytes(99, 100)),
            ("bytes=-100", bytes(0, 100)),
            ("bytes=-5000", bytes(0, 100)),
            ("bytes=50-5000", bytes(50, 100)),
            ("Bytes=1-2", bytes(1, 3)),
            ("bytes= 1-2 ,", bytes(1, 3)),
            ("bytes=0-18446744073709551615", bytes(0, 100)),
            ("bytes=0-99999999999999999999999999", bytes(0, 100)),
            ("bytes=-99999999999999999999999999", bytes(0, 100)),
        ] {
            assert_eq!(parse_range(header, 100), outcome, "{header}");
        }
    }

    #[test]
    fn a_range_past_the_end_cannot_be_satisfied() {
        for header in [
            "bytes=100-",
            "bytes=100-100",
            "bytes=-0",
            "bytes=99999999999999999999-",
        ] {
            assert_eq!(
                parse_range(header, 100),
                RangeOutcome::Unsatisfiable,
                "{header}"
            );
        }
        assert_eq!(parse_range("bytes=0-", 0), RangeOutcome::Unsatisfiable);
        assert_eq!(parse_range("bytes=-1", 0), RangeOutcome::Whole);
    }

    #[test]
    fn what_is_no_single_byte_range_is_ignored() {
        for header in [
            "",
            "bytes",
            "bytes=",
            "bytes=-",
            "bytes=5",
            "bytes=5-2",
            "bytes=a-b",
            "bytes=+1-2",
            "bytes=1--2",
            "bytes=1-2-3",
            "bytes=0x1-2",
            "bytes=0-1,3-4",
            "bytes=-1,0-",
            "items=0-1",
            "bytes 0-1/100",
        ] {
            assert_eq!(parse_range(header, 100), RangeOutcome::Whole, "{header}");
        }
    }

    proptest! {
        #[test]
        fn any_text_is_answered_within_the_blob(header in "(bytes=)?[-0-9, a-z=]{0,60}", size: u64) {
            if let RangeOutcome::Part(range) = parse_range(&header, size) {
                prop_assert!(range.end() <= size && range.start() < range.end());
            }
        }

        #[test]
        fn an_int_range_is_what_it_says(start: u64, len in 1u64.., size in 1u64..) {
            let end = start.saturating_add(len);
            let outcome = parse_range(&format!("bytes={start}-{}", end - 1), size);
            let expected = ByteRange::new(start, end.min(size))
                .map_or(RangeOutcome::Unsatisfiable, RangeOutcome::Part);
            prop_assert_eq!(outcome, expected);
        }

        #[test]
        fn an_absurdly_long_number_counts_as_the_largest(digits in "[1-9][0-9]{20,200}", size in 1u64..) {
            prop_assert_eq!(parse_range(&format!("bytes={digits}-"), size), RangeOutcome::Unsatisfiable);
            let all = RangeOutcome::Part(ByteRange::new(0, size).unwrap());
            prop_assert_eq!(parse_range(&format!("bytes=-{digits}"), size), all);
            prop_assert_eq!(parse_range(&format!("bytes=0-{digits}"), size), all);
        }
    }
}

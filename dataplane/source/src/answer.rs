//! What an answer's head means for the question asked. Pure; made for origins that lie.

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::header::{
    CONNECTION, CONTENT_ENCODING, CONTENT_LENGTH, CONTENT_RANGE, HeaderName, RETRY_AFTER,
};
use http::{HeaderMap, StatusCode};
use pantala_wire::ByteRange;

use crate::error::{Lie, SourceError};

/// How to read the body of an accepted answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BodyPlan {
    /// Bytes at its start that were not asked for.
    pub(crate) skip: u64,
    /// Bytes it has in all.
    pub(crate) announced: u64,
}

impl BodyPlan {
    /// Whether the origin sent the whole although a part was asked for.
    pub(crate) fn range_ignored(&self, asked: ByteRange) -> bool {
        self.announced > asked.len()
    }
}

/// Checks the head of an answer to a request for bytes `asked` of `size`.
pub(crate) fn judge_body(
    host: &str,
    status: StatusCode,
    headers: &HeaderMap,
    asked: ByteRange,
    size: u64,
    now: SystemTime,
) -> Result<BodyPlan, SourceError> {
    let lied = |lie| SourceError::Lied {
        host: host.to_owned(),
        lie,
    };
    if !status.is_success() {
        return Err(status_error(host, status, headers, now));
    }
    if let Some(encoding) = foreign_encoding(headers) {
        return Err(lied(Lie::Encoded(encoding)));
    }
    let length = content_length(headers);
    match status {
        StatusCode::OK => match length {
            Some(announced) if announced != size => Err(lied(Lie::Size {
                expected: size,
                announced,
            })),
            _ => Ok(BodyPlan {
                skip: asked.start(),
                announced: size,
            }),
        },
        StatusCode::PARTIAL_CONTENT => {
            let got = content_range(headers).ok_or_else(|| lied(Lie::ContentRange))?;
            if let Some(announced) = got.total
                && announced != size
            {
                return Err(lied(Lie::Size {
                    expected: size,
                    announced,
                }));
            }
            // RFC 9110, section 15.3.7: the server "might send only a subset of the data
            // requested", so a shorter range is honest: the rest is asked for again.
            if got.range.start() != asked.start() || got.range.end() > asked.end() {
                return Err(lied(Lie::WrongRange {
                    start: asked.start(),
                    end: asked.end(),
                    got_start: got.range.start(),
                    got_end: got.range.end(),
                }));
            }
            let range_len = got.range.len();
            match length {
                Some(length) if length != range_len => Err(lied(Lie::Length { length, range_len })),
                _ => Ok(BodyPlan {
                    skip: 0,
                    announced: range_len,
                }),
            }
        }
        other => Err(lied(Lie::Status(other))),
    }
}

/// The error that an answer without success is.
pub(crate) fn status_error(
    host: &str,
    status: StatusCode,
    headers: &HeaderMap,
    now: SystemTime,
) -> SourceError {
    let host = host.to_owned();
    let retry_after = retry_after(headers, now);
    match status {
        StatusCode::NOT_FOUND | StatusCode::GONE => SourceError::NotFound { host, status },
        StatusCode::RANGE_NOT_SATISFIABLE => SourceError::Lied {
            host,
            lie: Lie::RangeRefused,
        },
        StatusCode::TOO_MANY_REQUESTS => SourceError::RateLimited {
            host,
            status,
            retry_after,
        },
        StatusCode::SERVICE_UNAVAILABLE if retry_after.is_some() => SourceError::RateLimited {
            host,
            status,
            retry_after,
        },
        StatusCode::REQUEST_TIMEOUT => SourceError::Unavailable {
            host,
            reason: format!("status {status}"),
            status: Some(status),
        },
        _ if status.is_server_error() => SourceError::Unavailable {
            host,
            reason: format!("status {status}"),
            status: Some(status),
        },
        _ if status.is_client_error() => {
            let mut headers = headers.clone();
            remove_hop_by_hop(&mut headers);
            SourceError::Refused {
                host,
                status,
                headers: Arc::new(headers),
            }
        }
        _ => SourceError::Lied {
            host,
            lie: Lie::Status(status),
        },
    }
}

/// `Content-Range: bytes 0-9/100`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ContentRange {
    pub(crate) range: ByteRange,
    /// Size of the whole; `None` for `*`.
    pub(crate) total: Option<u64>,
}

/// The content range, where there is exactly one and it is well-formed.
pub(crate) fn content_range(headers: &HeaderMap) -> Option<ContentRange> {
    let text = single(headers, &CONTENT_RANGE)?;
    let (unit, rest) = text.split_once(' ')?;
    if !unit.eq_ignore_ascii_case("bytes") {
        return None;
    }
    let (range, total) = rest.trim().split_once('/')?;
    let (first, last) = range.split_once('-')?;
    let range = ByteRange::new(decimal(first)?, decimal(last)?.checked_add(1)?)?;
    let total = match total {
        "*" => None,
        digits => Some(decimal(digits)?),
    };
    // RFC 9110, section 14.4: a last position at or past the complete length is invalid.
    if total.is_some_and(|total| range.end() > total) {
        return None;
    }
    Some(ContentRange { range, total })
}

/// The announced length of the body.
pub(crate) fn content_length(headers: &HeaderMap) -> Option<u64> {
    decimal(single(headers, &CONTENT_LENGTH)?)
}

/// The content encoding, where the body is not the content itself.
pub(crate) fn foreign_encoding(headers: &HeaderMap) -> Option<String> {
    headers
        .get_all(CONTENT_ENCODING)
        .iter()
        .find(|value| !value.is_empty() && !value.as_bytes().eq_ignore_ascii_case(b"identity"))
        .map(|value| {
            String::from_utf8_lossy(value.as_bytes())
                .chars()
                .take(32)
                .collect()
        })
}

/// How long the origin asks to be left alone: seconds or a date (RFC 9110, section 10.2.3).
pub(crate) fn retry_after(headers: &HeaderMap, now: SystemTime) -> Option<Duration> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if let Some(seconds) = decimal(text) {
        return Some(Duration::from_secs(seconds));
    }
    let until = httpdate::parse_http_date(text).ok()?;
    // A date in the past means now.
    Some(until.duration_since(now).unwrap_or_default())
}

/// The value of a header that stands there once.
fn single<'a>(headers: &'a HeaderMap, name: &HeaderName) -> Option<&'a str> {
    let mut values = headers.get_all(name).iter();
    let value = values.next()?.to_str().ok()?;
    // Equal repetitions are a proxy's carelessness; different ones are an attack.
    values
        .all(|other| other.as_bytes() == value.as_bytes())
        .then_some(value)
}

/// A number of digits only: `parse` alone would take a sign.
fn decimal(text: &str) -> Option<u64> {
    text.bytes()
        .all(|b| b.is_ascii_digit())
        .then(|| text.parse().ok())
        .flatten()
}

/// Headers that belong to one connection and not to the message (RFC 9110, section 7.6.1).
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "proxy-connection",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "proxy-authenticate",
    "proxy-authorization",
];

/// Removes what may not be passed on: the headers of the connection, and those that it names.
pub(crate) fn remove_hop_by_hop(headers: &mut HeaderMap) {
    let named: Vec<HeaderName> = headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| name.trim().parse().ok())
        .collect();
    for name in named {
        headers.remove(name);
    }
    for name in HOP_BY_HOP {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use http::HeaderValue;
    use proptest::prelude::*;
    use std::time::UNIX_EPOCH;

    fn headers(lines: &[(&'static str, &str)]) -> HeaderMap {
        let mut map = HeaderMap::new();
        for (name, value) in lines {
            map.append(*name, HeaderValue::from_str(value).unwrap());
        }
        map
    }

    fn judge(status: u16, lines: &[(&'static str, &str)]) -> Result<BodyPlan, SourceError> {
        let asked = ByteRange::new(10, 20).unwrap();
        let status = StatusCode::from_u16(status).unwrap();
        judge_body("h", status, &headers(lines), asked, 100, UNIX_EPOCH)
    }

    fn lie(result: Result<BodyPlan, SourceError>) -> Lie {
        match result {
            Err(SourceError::Lied { lie, .. }) => lie,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn the_range_asked_for_is_accepted() {
        let plan = BodyPlan {
            skip: 0,
            announced: 10,
        };
        for lines in [
            &[
                ("content-range", "bytes 10-19/100"),
                ("content-length", "10"),
            ][..],
            &[("content-range", "bytes 10-19/*")],
            &[("content-range", "Bytes 10-19/100")],
        ] {
            assert_eq!(judge(206, lines).unwrap(), plan);
        }
    }

    #[test]
    fn a_shorter_range_is_accepted_and_a_longer_or_shifted_one_is_not() {
        let short = judge(206, &[("content-range", "bytes 10-14/100")]).unwrap();
        assert_eq!(short.announced, 5);
        for value in [
            "bytes 10-20/100",
            "bytes 9-19/100",
            "bytes 11-19/100",
            "bytes 0-99/100",
        ] {
            let lie = lie(judge(206, &[("content-range", value)]));
            assert!(matches!(lie, Lie::WrongRange { .. }), "{value}");
        }
    }

    #[test]
    fn malformed_content_ranges_are_lies() {
        for value in [
            "bytes 10-19",
            "bytes=10-19/100",
            "bytes 19-10/100",
            "bytes 10-19/15",
            "bytes -10-19/100",
            "bytes +10-19/100",
            "bytes 10-18446744073709551615/100",
            "bytes */100",
            "items 10-19/100",
            "",
        ] {
            assert_eq!(
                lie(judge(206, &[("content-range", value)])),
                Lie::ContentRange,
                "{value}"
            );
        }
        assert_eq!(lie(judge(206, &[])), Lie::ContentRange);
        let twice = [
            ("content-range", "bytes 10-19/100"),
            ("content-range", "bytes 0-9/100"),
        ];
        assert_eq!(lie(judge(206, &twice)), Lie::ContentRange);
    }

    #[test]
    fn sizes_and_lengths_that_disagree_are_lies() {
        assert_eq!(
            lie(judge(206, &[("content-range", "bytes 10-19/200")])),
            Lie::Size {
                expected: 100,
                announced: 200
            }
        );
        let lines = [
            ("content-range", "bytes 10-19/100"),
            ("content-length", "9"),
        ];
        assert_eq!(
            lie(judge(206, &lines)),
            Lie::Length {
                length: 9,
                range_len: 10
            }
        );
        assert!(matches!(
            lie(judge(200, &[("content-length", "99")])),
            Lie::Size { .. }
        ));
    }

    #[test]
    fn an_origin_that_ignores_ranges_has_its_start_skipped() {
        for lines in [&[("content-length", "100")][..], &[]] {
            let plan = judge(200, lines).unwrap();
            assert_eq!(
                plan,
                BodyPlan {
                    skip: 10,
                    announced: 100
                }
            );
            assert!(plan.range_ignored(ByteRange::new(10, 20).unwrap()));
            assert!(!plan.range_ignored(ByteRange::new(0, 100).unwrap()));
        }
    }

    #[test]
    fn encoded_bodies_are_refused() {
        for status in [200, 206] {
            let lines = [
                ("content-encoding", "gzip"),
                ("content-range", "bytes 10-19/100"),
            ];
            assert_eq!(lie(judge(status, &lines)), Lie::Encoded("gzip".into()));
        }
        judge(200, &[("content-encoding", "identity")]).unwrap();
    }

    #[test]
    fn each_status_has_its_meaning() {
        let error = |status, lines: &[(&'static str, &str)]| judge(status, lines).unwrap_err();
        assert!(matches!(error(404, &[]), SourceError::NotFound { .. }));
        assert!(matches!(error(410, &[]), SourceError::NotFound { .. }));
        assert!(matches!(error(500, &[]), SourceError::Unavailable { .. }));
        assert!(matches!(error(503, &[]), SourceError::Unavailable { .. }));
        assert_eq!(lie(judge(416, &[])), Lie::RangeRefused);
        assert_eq!(lie(judge(304, &[])), Lie::Status(StatusCode::NOT_MODIFIED));
        assert_eq!(lie(judge(204, &[])), Lie::Status(StatusCode::NO_CONTENT));
        let limited = error(503, &[("retry-after", "3")]);
        assert_eq!(limited.retry_after(), Some(Duration::from_secs(3)));
        let refused = error(
            401,
            &[
                ("www-authenticate", "Basic realm=r"),
                ("connection", "close"),
            ],
        );
        match refused {
            SourceError::Refused {
                status, headers, ..
            } => {
                assert_eq!(status, StatusCode::UNAUTHORIZED);
                assert_eq!(headers["www-authenticate"], "Basic realm=r");
                assert!(!headers.contains_key("connection"));
            }
            other => panic!("{other}"),
        }
    }

    #[test]
    fn retry_after_is_read_as_seconds_and_as_a_date() {
        let now = UNIX_EPOCH + Duration::from_secs(784_111_777 - 60);
        let read = |value: &str| retry_after(&headers(&[("retry-after", value)]), now);
        assert_eq!(read("120"), Some(Duration::from_secs(120)));
        assert_eq!(
            read("Sun, 06 Nov 1994 08:49:37 GMT"),
            Some(Duration::from_secs(60))
        );
        assert_eq!(read("Tue, 06 Nov 1984 08:49:37 GMT"), Some(Duration::ZERO));
        for bad in ["-1", "soon", "", "99999999999999999999999", "1.5"] {
            assert!(read(bad).is_none_or(|d| d == Duration::ZERO), "{bad}");
        }
    }

    #[test]
    fn headers_of_the_connection_are_removed_and_others_kept() {
        let mut map = headers(&[
            ("connection", "close, X-Private"),
            ("x-private", "1"),
            ("transfer-encoding", "chunked"),
            ("proxy-authorization", "Basic x"),
            ("accept", "a"),
            ("accept", "b"),
        ]);
        remove_hop_by_hop(&mut map);
        assert_eq!(map.len(), 2);
        assert_eq!(map.get_all("accept").iter().count(), 2);
    }

    proptest! {
        #[test]
        fn no_content_range_makes_it_panic(text in "[ -~]{0,60}") {
            let lines = [("content-range", text.as_str())];
            if let Some(found) = content_range(&headers(&lines)) {
                prop_assert!(found.range.start() < found.range.end());
            }
        }

        #[test]
        fn every_content_range_comes_back(start in 0_u64..1 << 60, len in 1_u64..1 << 60, more in 0_u64..1 << 60) {
            let (end, total) = (start + len, start + len + more);
            let text = format!("bytes {start}-{}/{total}", end - 1);
            let found = content_range(&headers(&[("content-range", &text)])).unwrap();
            prop_assert_eq!(Some(found.range), ByteRange::new(start, end));
            prop_assert_eq!(found.total, Some(total));
        }
    }
}

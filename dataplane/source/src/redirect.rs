//! Which redirects are followed. Pure; the shell sends, this decides where to.

use http::header::LOCATION;
use http::{HeaderMap, Method, StatusCode};
use url::Url;

use crate::address::check_url;
use crate::error::{RedirectFault, SourceError};
use crate::upstream::host_port;

/// Hops of one request. Registries use one (to their object store), seldom two.
pub(crate) const REDIRECTS_MAX: usize = 5;
/// Longest target; signed URLs have up to about 2 KiB.
const LOCATION_LEN_MAX: usize = 16 * 1024;

/// Where to go next.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Hop {
    pub(crate) url: Url,
    /// Whether the target is another origin, which must see no credentials.
    pub(crate) crosses_origin: bool,
}

/// Whether an answer with this status sends such a request elsewhere. Requests that change
/// something are never sent on: their caller decides.
pub(crate) fn is_redirect(method: &Method, status: StatusCode) -> bool {
    matches!(*method, Method::GET | Method::HEAD)
        && matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// The target of a redirect from `from`, after `hops_done` earlier ones.
pub(crate) fn next_hop(
    from: &Url,
    headers: &HeaderMap,
    hops_done: usize,
) -> Result<Hop, SourceError> {
    let fault = |fault| SourceError::Redirect {
        host: host_port(from),
        fault,
    };
    if hops_done >= REDIRECTS_MAX {
        return Err(fault(RedirectFault::TooMany(REDIRECTS_MAX)));
    }
    let mut url = headers
        .get(LOCATION)
        .filter(|value| value.len() <= LOCATION_LEN_MAX)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| from.join(text).ok())
        .ok_or_else(|| fault(RedirectFault::Location))?;
    url.set_fragment(None);
    if !matches!(url.scheme(), "http" | "https")
        || !url.username().is_empty()
        || url.password().is_some()
    {
        return Err(fault(RedirectFault::Kind));
    }
    if from.scheme() == "https" && url.scheme() == "http" {
        return Err(fault(RedirectFault::Downgrade));
    }
    check_url(&url)?;
    let crosses_origin = url.origin() != from.origin();
    Ok(Hop {
        url,
        crosses_origin,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hop(from: &str, to: &str) -> Result<Hop, SourceError> {
        let mut headers = HeaderMap::new();
        headers.insert(LOCATION, to.parse().unwrap());
        next_hop(&Url::parse(from).unwrap(), &headers, 0)
    }

    #[test]
    fn a_change_of_scheme_host_or_port_crosses_the_origin() {
        for (from, to, crosses) in [
            ("http://a/x", "/y", false),
            ("http://a/x/z", "../y?q=1", false),
            ("http://a/x", "http://a:80/y", false),
            ("http://a/x", "http://A/y", false),
            ("http://a/x", "https://a/y", true),
            ("http://a/x", "http://a:81/y", true),
            ("https://a/x", "https://b.a/y", true),
            ("https://a/x", "//b/y", true),
        ] {
            assert_eq!(hop(from, to).unwrap().crosses_origin, crosses, "{to}");
        }
    }

    #[test]
    fn bad_targets_are_refused() {
        for (to, expected) in [
            ("http://a/", RedirectFault::Downgrade),
            ("ftp://a/", RedirectFault::Kind),
            ("file:///etc/passwd", RedirectFault::Kind),
            ("https://user:pass@a/", RedirectFault::Kind),
            ("https://", RedirectFault::Location),
            ("https://a:99999/", RedirectFault::Location),
        ] {
            match hop("https://a/x", to).unwrap_err() {
                SourceError::Redirect { fault, .. } => assert_eq!(fault, expected, "{to}"),
                other => panic!("{to}: {other}"),
            }
        }
        for to in [
            "https://169.254.169.254/latest/meta-data",
            "//[fe80::1]/",
            "https://2852039166/",
        ] {
            let error = hop("https://a/x", to).unwrap_err();
            assert!(matches!(error, SourceError::Forbidden(_)), "{to}: {error}");
        }
    }

    #[test]
    fn there_is_an_end_to_redirects_and_no_redirect_without_a_target() {
        let from = Url::parse("http://a/").unwrap();
        let mut headers = HeaderMap::new();
        assert!(next_hop(&from, &headers, 0).is_err());
        headers.insert(LOCATION, "/b".parse().unwrap());
        next_hop(&from, &headers, REDIRECTS_MAX - 1).unwrap();
        assert!(next_hop(&from, &headers, REDIRECTS_MAX).is_err());
    }

    #[test]
    fn requests_that_change_something_are_not_sent_on() {
        assert!(is_redirect(&Method::GET, StatusCode::TEMPORARY_REDIRECT));
        assert!(is_redirect(&Method::HEAD, StatusCode::FOUND));
        assert!(!is_redirect(&Method::POST, StatusCode::FOUND));
        assert!(!is_redirect(&Method::GET, StatusCode::NOT_MODIFIED));
    }
}

//! A request as the handlers see it: upstream chosen, path understood, headers sorted.

use http::header::{self, HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode, Uri};
use pantala_wire::Priority;
use tokio::time::Instant;

use crate::policy::{Naming, Policy};
use crate::reply::{Reject, strip_hop_by_hop};
use crate::route::{Route, RouteError, parse_path, parse_registry_path};
use crate::upstream::UpstreamUrl;

const DRAGONFLY_PREFIX: &str = "x-dragonfly-";
const REGISTRY: HeaderName = HeaderName::from_static("x-dragonfly-registry");
const PRIORITY: HeaderName = HeaderName::from_static("x-dragonfly-priority");
const USE_P2P: HeaderName = HeaderName::from_static("x-dragonfly-use-p2p");
const PREFETCH: HeaderName = HeaderName::from_static("x-dragonfly-prefetch");

/// What a request asks for.
#[derive(Debug)]
pub(crate) enum Target {
    /// This server's own pages.
    Own(Route),
    /// Something of a registry's.
    Registry(Route),
    /// Any other URL, by forward proxy.
    Elsewhere,
}

/// A request, understood.
#[derive(Debug)]
pub(crate) struct Ask {
    pub(crate) is_head: bool,
    pub(crate) target: Target,
    pub(crate) upstream: UpstreamUrl,
    /// As the upstream shall see it: without `ns`.
    pub(crate) path_and_query: String,
    /// As the upstream shall see them.
    pub(crate) headers: HeaderMap,
    pub(crate) priority: Priority,
    pub(crate) use_p2p: bool,
    pub(crate) prefetch: Option<bool>,
    /// By when the first byte must be there.
    pub(crate) deadline: Instant,
}

impl Ask {
    pub(crate) fn method(&self) -> Method {
        if self.is_head {
            Method::HEAD
        } else {
            Method::GET
        }
    }

    pub(crate) fn authorization(&self) -> Option<HeaderValue> {
        self.headers.get(header::AUTHORIZATION).cloned()
    }

    /// Reads a request's head; everything that is wrong with it is found here.
    pub(crate) fn read(
        method: &Method,
        uri: &Uri,
        mut headers: HeaderMap,
        policy: &Policy,
        deadline: Instant,
    ) -> Result<Self, Reject> {
        if method != Method::GET && method != Method::HEAD {
            return Err(Reject::new(
                StatusCode::METHOD_NOT_ALLOWED,
                "UNSUPPORTED",
                format!("{} is not served by a mirror", quoted(method.as_str())),
            )
            .with_header(header::ALLOW, HeaderValue::from_static("GET, HEAD"))
            .with_hint("push to the registry directly"));
        }
        let absolute = absolute_base(uri)?;
        let target = match (&absolute, parse(uri, absolute.is_some())) {
            (None, Ok(route @ (Route::Healthy | Route::Ping | Route::Metrics))) => {
                Target::Own(route)
            }
            (_, Ok(route)) => Target::Registry(route),
            (Some(_), Err(RouteError::Unknown)) => Target::Elsewhere,
            (_, Err(error)) => return Err(error.into()),
        };
        let registry = single(&headers, REGISTRY, "X-Dragonfly-Registry")?;
        single(&headers, header::AUTHORIZATION, "Authorization")?;
        let query = uri.query().unwrap_or_default();
        let ns = match target {
            Target::Registry(_) => ns_of(query)?,
            Target::Own(_) | Target::Elsewhere => None,
        };
        let upstream = match target {
            Target::Own(_) => policy.default_upstream().clone(),
            Target::Registry(_) | Target::Elsewhere => policy.choose(Naming {
                absolute: absolute.as_deref(),
                header: registry.as_deref(),
                ns: ns.as_deref(),
            })?,
        };
        let path_and_query = match target {
            Target::Elsewhere => uri
                .path_and_query()
                .map_or_else(|| "/".to_owned(), ToString::to_string),
            Target::Own(_) | Target::Registry(_) => without_ns(uri.path(), query),
        };
        let priority = priority_of(&headers);
        let use_p2p = flag(&headers, USE_P2P).unwrap_or(true);
        let prefetch = flag(&headers, PREFETCH);
        keep_forwardable(&mut headers);
        Ok(Self {
            is_head: method == Method::HEAD,
            target,
            upstream,
            path_and_query,
            headers,
            priority,
            use_p2p,
            prefetch,
            deadline,
        })
    }
}

fn parse(uri: &Uri, is_absolute: bool) -> Result<Route, RouteError> {
    if is_absolute {
        parse_registry_path(uri.path())
    } else {
        parse_path(uri.path())
    }
}

/// The base URL of an absolute-form request.
fn absolute_base(uri: &Uri) -> Result<Option<String>, Reject> {
    match (uri.scheme_str(), uri.authority()) {
        (None, None) => Ok(None),
        (Some(scheme), Some(authority)) => Ok(Some(format!("{scheme}://{authority}"))),
        _ => Err(Reject::new(
            StatusCode::BAD_REQUEST,
            "UNSUPPORTED",
            "the request's target is neither a path nor a full URL",
        )
        .with_hint("ask for /v2/..., or for http://HOST/v2/... as of a forward proxy")),
    }
}

/// The value of a header that must not be ambiguous.
fn single(headers: &HeaderMap, name: HeaderName, shown: &str) -> Result<Option<String>, Reject> {
    let mut values = headers.get_all(name).iter();
    let first = values.next();
    let bad = |what: &str| {
        Reject::new(
            StatusCode::BAD_REQUEST,
            "UNSUPPORTED",
            format!("the header {shown} {what}"),
        )
        .with_hint("send it once, in plain ASCII")
    };
    if values.next().is_some() {
        return Err(bad("stands more than once"));
    }
    first
        .map(|value| {
            value
                .to_str()
                .map(|text| text.trim().to_owned())
                .map_err(|_| bad("is not plain ASCII"))
        })
        .transpose()
}

fn is_ns(pair: &str) -> bool {
    url::form_urlencoded::parse(pair.as_bytes())
        .next()
        .is_some_and(|(key, _)| key == "ns")
}

/// The registry that containerd names in `?ns=`.
fn ns_of(query: &str) -> Result<Option<String>, Reject> {
    let mut found: Option<String> = None;
    for (key, value) in url::form_urlencoded::parse(query.as_bytes()) {
        if key != "ns" {
            continue;
        }
        if found.as_ref().is_some_and(|earlier| *earlier != value) {
            return Err(Reject::new(
                StatusCode::BAD_REQUEST,
                "UNSUPPORTED",
                "the query parameter ns stands twice, with different registries",
            )
            .with_hint("name one registry"));
        }
        found = Some(value.into_owned());
    }
    // "?ns=" names nothing.
    Ok(found.filter(|ns| !ns.is_empty()))
}

fn without_ns(path: &str, query: &str) -> String {
    let rest: Vec<&str> = query
        .split('&')
        .filter(|pair| !pair.is_empty() && !is_ns(pair))
        .collect();
    if rest.is_empty() {
        path.to_owned()
    } else {
        format!("{path}?{}", rest.join("&"))
    }
}

/// nydusd sends 6 for a read that a process waits for and 3 for prefetching; 0 has no meaning of
/// its own. Anything unreadable is an ordinary request.
fn priority_of(headers: &HeaderMap) -> Priority {
    let number = headers
        .get(PRIORITY)
        .and_then(|value| value.to_str().ok())
        .and_then(|text| text.trim().parse::<u8>().ok());
    match number {
        Some(6) => Priority::Fault,
        Some(4) => Priority::Bulk,
        Some(1..=3) => Priority::Prefetch,
        _ => Priority::Client,
    }
}

fn flag(headers: &HeaderMap, name: HeaderName) -> Option<bool> {
    let text = headers.get(name)?.to_str().ok()?.trim();
    match text {
        "1" => Some(true),
        "0" => Some(false),
        _ if text.eq_ignore_ascii_case("true") => Some(true),
        _ if text.eq_ignore_ascii_case("false") => Some(false),
        _ => None,
    }
}

/// Leaves what the upstream may see; every line of what stays, stays.
fn keep_forwardable(headers: &mut HeaderMap) {
    strip_hop_by_hop(headers);
    let dragonfly: Vec<HeaderName> = headers
        .keys()
        .filter(|name| name.as_str().starts_with(DRAGONFLY_PREFIX))
        .cloned()
        .collect();
    for name in dragonfly {
        headers.remove(name);
    }
    for name in [header::HOST, header::CONTENT_LENGTH, header::EXPECT] {
        headers.remove(name);
    }
    for (name, value) in headers.iter_mut() {
        if *name == header::AUTHORIZATION || *name == header::COOKIE {
            value.set_sensitive(true);
        }
    }
}

fn quoted(text: &str) -> String {
    text.chars().take(20).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ns_is_taken_out_however_it_is_spelt_and_nothing_else_is() {
        for (query, left) in [
            ("", "/p"),
            ("ns=a.test", "/p"),
            ("n%73=a.test", "/p"),
            ("n=10&ns=a.test&last=x%2Fy", "/p?n=10&last=x%2Fy"),
            ("nsx=1&xns=2", "/p?nsx=1&xns=2"),
        ] {
            assert_eq!(without_ns("/p", query), left, "{query}");
        }
        assert_eq!(ns_of("ns=r.test%3A5000").unwrap().unwrap(), "r.test:5000");
        assert!(ns_of("ns=").unwrap().is_none());
        assert!(ns_of("ns=a&ns=b").is_err());
        assert!(ns_of("ns=a&ns=a").is_ok());
    }

    #[test]
    fn dragonfly_hints_are_honoured_and_garbage_never_breaks_a_request() {
        let headers = |name: HeaderName, value: &[u8]| {
            let mut map = HeaderMap::new();
            map.insert(name, HeaderValue::from_bytes(value).unwrap());
            map
        };
        for (text, priority) in [
            (&b"6"[..], Priority::Fault),
            (b" 3 ", Priority::Prefetch),
            (b"0", Priority::Client),
            (b"999999", Priority::Client),
            (b"-1", Priority::Client),
            (b"\xff\xfe", Priority::Client),
            (b"", Priority::Client),
        ] {
            assert_eq!(priority_of(&headers(PRIORITY, text)), priority);
        }
        for (text, value) in [
            (&b"true"[..], Some(true)),
            (b"FALSE", Some(false)),
            (b"1", Some(true)),
            (b"yes please", None),
            (b"\xff", None),
        ] {
            assert_eq!(flag(&headers(USE_P2P, text), USE_P2P), value);
        }
    }
}

//! Where a registry is: the scheme, host and port that requests go to.

use std::fmt;
use std::str::FromStr;

use pantala_wire::name::is_host;
use url::{Host, Url};

use crate::address::{ForbiddenAddress, check_url};

/// Where Docker Hub really answers; its advertised names only redirect or serve web pages.
const DOCKER_HUB_URL: &str = "https://registry-1.docker.io";
/// The names that people and clients know Docker Hub by.
const DOCKER_HUB_NAMES: [&str; 2] = ["docker.io", "index.docker.io"];
/// Longest upstream text that is looked at: a host, a scheme and some room.
const UPSTREAM_LEN_MAX: usize = 512;

/// A text that names no upstream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UpstreamError {
    /// Neither a URL nor a host.
    #[error(
        "malformed upstream: expected \"http://host:port\", \"https://host\" or a host with an optional port"
    )]
    Malformed,
    /// A URL of another scheme.
    #[error("unsupported scheme in the upstream: use http:// or https://")]
    Scheme,
    /// A user name or password stands in the URL.
    #[error("the upstream URL contains a user or password: configure credentials apart from it")]
    UserInfo,
    /// A path, query or fragment stands in the URL.
    #[error("the upstream URL goes on after host and port: remove the path, query or fragment")]
    Path,
    /// The path asked for would leave the upstream or is not a path.
    #[error("malformed request path: expected an absolute path with an optional query")]
    RequestPath,
    /// An address that is never connected to.
    #[error(transparent)]
    Forbidden(#[from] ForbiddenAddress),
}

/// A registry's base URL: scheme, host and port, normalised.
///
/// Two texts that mean the same place give equal values (case, default ports, spellings of an IP
/// address, the names of Docker Hub).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Upstream(Url);

impl Upstream {
    /// `host`, or `host:port` where the port is not the scheme's own.
    pub fn host_port(&self) -> String {
        host_port(&self.0)
    }

    /// The base URL; its path is `/`.
    pub fn url(&self) -> &Url {
        &self.0
    }

    /// Whether requests travel over TLS.
    pub fn is_https(&self) -> bool {
        self.0.scheme() == "https"
    }

    /// The upstream that a plain URL points into.
    pub fn of_url(url: &Url) -> Result<Self, UpstreamError> {
        let mut base = url.clone();
        base.set_path("/");
        base.set_query(None);
        base.set_fragment(None);
        Self::from_url(&base)
    }

    /// The URL of a path (with an optional query) below this upstream.
    pub fn join(&self, path_and_query: &str) -> Result<Url, UpstreamError> {
        let plain = |b: u8| b.is_ascii_graphic() && !matches!(b, b'#' | b'\\');
        if !path_and_query.starts_with('/')
            || path_and_query.starts_with("//")
            || !path_and_query.bytes().all(plain)
        {
            return Err(UpstreamError::RequestPath);
        }
        let url = self
            .0
            .join(path_and_query)
            .map_err(|_| UpstreamError::RequestPath)?;
        if url.origin() == self.0.origin() {
            Ok(url)
        } else {
            Err(UpstreamError::RequestPath)
        }
    }

    fn from_url(url: &Url) -> Result<Self, UpstreamError> {
        if !matches!(url.scheme(), "http" | "https") {
            return Err(UpstreamError::Scheme);
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(UpstreamError::UserInfo);
        }
        if !matches!(url.path(), "" | "/") || url.query().is_some() || url.fragment().is_some() {
            return Err(UpstreamError::Path);
        }
        let host = url.host_str().unwrap_or_default();
        if !is_host(host) || url.port() == Some(0) {
            return Err(UpstreamError::Malformed);
        }
        if DOCKER_HUB_NAMES.contains(&host) && url.port().is_none() {
            return DOCKER_HUB_URL
                .parse()
                .map(Self)
                .map_err(|_| UpstreamError::Malformed);
        }
        check_url(url)?;
        Ok(Self(url.clone()))
    }
}

impl FromStr for Upstream {
    type Err = UpstreamError;

    /// Reads a URL, or a host as it stands in an image reference: that means https, but for
    /// `localhost` and loopback addresses, where container tools expect plain http.
    fn from_str(text: &str) -> Result<Self, UpstreamError> {
        if text.len() > UPSTREAM_LEN_MAX {
            return Err(UpstreamError::Malformed);
        }
        if text.contains("://") {
            let url = Url::parse(text).map_err(|_| UpstreamError::Malformed)?;
            return Self::from_url(&url);
        }
        if !is_host(text) {
            return Err(UpstreamError::Malformed);
        }
        let url = Url::parse(&format!("https://{text}")).map_err(|_| UpstreamError::Malformed)?;
        let is_loopback = match url.host() {
            Some(Host::Ipv4(v4)) => v4.is_loopback(),
            Some(Host::Ipv6(v6)) => v6.is_loopback(),
            Some(Host::Domain(name)) => name == "localhost",
            None => false,
        };
        if is_loopback {
            // Parsed anew: changing the scheme of a URL would keep a port of 443 hidden.
            let url =
                Url::parse(&format!("http://{text}")).map_err(|_| UpstreamError::Malformed)?;
            return Self::from_url(&url);
        }
        Self::from_url(&url)
    }
}

impl fmt::Display for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.0.scheme(), self.host_port())
    }
}

impl fmt::Debug for Upstream {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// `host`, or `host:port` where the port is not the scheme's own: safe to log, unlike the rest of
/// a URL, whose query may be a signature.
pub(crate) fn host_port(url: &Url) -> String {
    let host = url.host_str().unwrap_or("(no host)");
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(text: &str) -> String {
        text.parse::<Upstream>()
            .map_or_else(|e| format!("error: {e}"), |u| u.to_string())
    }

    #[test]
    fn urls_and_hosts_are_normalised() {
        for (text, expected) in [
            ("http://Registry.Test:5000", "http://registry.test:5000"),
            ("http://registry.test:80/", "http://registry.test"),
            ("https://registry.test:443", "https://registry.test"),
            ("https://registry.test:80", "https://registry.test:80"),
            ("registry.test:5000", "https://registry.test:5000"),
            ("ghcr.io", "https://ghcr.io"),
            ("localhost:5000", "http://localhost:5000"),
            ("localhost:443", "http://localhost:443"),
            ("127.0.0.1:5000", "http://127.0.0.1:5000"),
            ("[::1]:5000", "http://[::1]:5000"),
            ("http://127.1:5000", "http://127.0.0.1:5000"),
            ("docker.io", "https://registry-1.docker.io"),
            ("https://index.docker.io", "https://registry-1.docker.io"),
            ("https://index.docker.io/", "https://registry-1.docker.io"),
        ] {
            assert_eq!(parsed(text), expected, "{text}");
        }
    }

    #[test]
    fn what_is_no_upstream_is_refused() {
        for (text, error) in [
            ("", UpstreamError::Malformed),
            ("ftp://h", UpstreamError::Scheme),
            ("file:///etc/passwd", UpstreamError::Scheme),
            ("http://user@h", UpstreamError::UserInfo),
            ("http://user:pass@h:5000", UpstreamError::UserInfo),
            ("http://h/v2/", UpstreamError::Path),
            ("http://h?a=b", UpstreamError::Path),
            ("http://h#f", UpstreamError::Path),
            ("http://", UpstreamError::Malformed),
            ("a b", UpstreamError::Malformed),
            ("h/path", UpstreamError::Malformed),
            ("http://h:0", UpstreamError::Malformed),
            ("http://h:99999", UpstreamError::Malformed),
            (&"h".repeat(10_000), UpstreamError::Malformed),
        ] {
            assert_eq!(text.parse::<Upstream>().unwrap_err(), error, "{text}");
        }
        for text in [
            "http://169.254.169.254",
            "169.254.169.254:80",
            "https://[fe80::1]",
        ] {
            let error = text.parse::<Upstream>().unwrap_err();
            assert!(matches!(error, UpstreamError::Forbidden(_)), "{text}");
        }
    }

    #[test]
    fn a_request_path_cannot_leave_the_upstream() {
        let upstream: Upstream = "http://registry.test:5000".parse().unwrap();
        let url = upstream.join("/v2/a/b/manifests/v1?ns=x").unwrap();
        assert_eq!(
            url.as_str(),
            "http://registry.test:5000/v2/a/b/manifests/v1?ns=x"
        );
        for bad in [
            "",
            "v2/",
            "//evil.test/",
            "http://evil.test/",
            "/\\evil",
            "/a b",
            "/a\r\nb",
            "/#f",
            "\\\\evil.test",
            "@evil.test/",
        ] {
            assert!(upstream.join(bad).is_err(), "{bad:?}");
        }
    }
}

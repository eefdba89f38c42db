//! Where a registry is, as a validated base URL, and which addresses are never one.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use pantala_wire::address::address_is_forbidden;
use url::{Host, Url};

/// Longest upstream accepted: a scheme, a DNS name and a port.
const UPSTREAM_LEN_MAX: usize = 300;

/// Where Docker Hub's registry answers; all of its other names mean this one.
const DOCKER_HUB_HOST: &str = "registry-1.docker.io";

/// A text that is no usable upstream.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UpstreamUrlError {
    /// Not a URL.
    #[error(
        "malformed upstream: expected a host such as \"registry.example:5000\" or an http(s) URL of one"
    )]
    Malformed,
    /// Neither http nor https.
    #[error("unsupported scheme in the upstream URL: only http and https are spoken")]
    Scheme,
    /// A user name or password in the URL.
    #[error("credentials in the upstream URL: send them in the Authorization header")]
    Credentials,
    /// A path, query or fragment where only a base is expected.
    #[error("the upstream URL has a path or query: give the scheme, host and port only")]
    Path,
}

/// How the upstream is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Scheme {
    /// Plain text.
    Http,
    /// TLS.
    Https,
}

impl Scheme {
    /// The scheme's name in a URL.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Http => "http",
            Self::Https => "https",
        }
    }
    /// The port used where none is given.
    pub const fn default_port(self) -> u16 {
        match self {
            Self::Http => 80,
            Self::Https => 443,
        }
    }
}

/// The base URL of an upstream: scheme, host and port, nothing else.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UpstreamUrl {
    scheme: Scheme,
    host: Host<String>,
    port: u16,
}

impl UpstreamUrl {
    /// The upstream behind a registry's name as it stands in image references: `https`, and
    /// Docker Hub's real address for `docker.io` and its other names.
    pub fn for_registry(name: &str) -> Result<Self, UpstreamUrlError> {
        if name.len() > UPSTREAM_LEN_MAX || !pantala_wire::name::is_host(name) {
            return Err(UpstreamUrlError::Malformed);
        }
        let upstream: Self = format!("https://{name}").parse()?;
        Ok(upstream.canonical())
    }

    /// How it is spoken to.
    pub const fn scheme(&self) -> Scheme {
        self.scheme
    }
    /// The host, without port; an IPv6 address in brackets.
    pub fn host(&self) -> String {
        self.host.to_string()
    }
    /// The host's address, where it is given as one.
    pub fn literal_address(&self) -> Option<IpAddr> {
        match &self.host {
            Host::Domain(_) => None,
            Host::Ipv4(v4) => Some(IpAddr::V4(*v4)),
            Host::Ipv6(v6) => Some(IpAddr::V6(*v6)),
        }
    }
    /// The port, explicit or the scheme's own.
    pub const fn port(&self) -> u16 {
        self.port
    }
    /// `host:port`, the port always there.
    pub fn host_and_port(&self) -> String {
        format!("{}:{}", self.host, self.port)
    }
    /// `host`, with `:port` where it is not the scheme's own.
    pub fn authority(&self) -> String {
        if self.port == self.scheme.default_port() {
            self.host.to_string()
        } else {
            self.host_and_port()
        }
    }
    /// Whether the host is one at which no registry can be: see [`address_is_forbidden`].
    pub fn is_forbidden(&self) -> bool {
        match &self.host {
            Host::Domain(name) => is_forbidden_name(name),
            Host::Ipv4(v4) => address_is_forbidden(IpAddr::V4(*v4)),
            Host::Ipv6(v6) => address_is_forbidden(IpAddr::V6(*v6)),
        }
    }

    fn canonical(self) -> Self {
        let is_hub = matches!(&self.host, Host::Domain(name)
            if matches!(name.as_str(), "docker.io" | "index.docker.io" | DOCKER_HUB_HOST));
        if is_hub && self.port == self.scheme.default_port() {
            return Self {
                scheme: Scheme::Https,
                host: Host::Domain(DOCKER_HUB_HOST.to_owned()),
                port: 443,
            };
        }
        self
    }
}

impl FromStr for UpstreamUrl {
    type Err = UpstreamUrlError;

    /// `http://host[:port][/]` or `https://...`; unusual spellings of addresses (`0x7f.1`) come
    /// out as what they mean.
    fn from_str(text: &str) -> Result<Self, UpstreamUrlError> {
        if text.len() > UPSTREAM_LEN_MAX {
            return Err(UpstreamUrlError::Malformed);
        }
        // The URL standard drops tabs and newlines and takes backslashes for slashes; a header
        // value with any of them is not what it seems.
        if text.bytes().any(|b| b <= b' ' || b == b'\\' || b == 0x7f) {
            return Err(UpstreamUrlError::Malformed);
        }
        let url = Url::parse(text).map_err(|_| UpstreamUrlError::Malformed)?;
        let scheme = match url.scheme() {
            "http" => Scheme::Http,
            "https" => Scheme::Https,
            _ => return Err(UpstreamUrlError::Scheme),
        };
        if !url.username().is_empty() || url.password().is_some() {
            return Err(UpstreamUrlError::Credentials);
        }
        if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            return Err(UpstreamUrlError::Path);
        }
        let host = match url.host().ok_or(UpstreamUrlError::Malformed)? {
            Host::Domain(name) => {
                // "registry.example." is the same host; one form keeps the allow-list honest.
                let name = name.strip_suffix('.').unwrap_or(name);
                if !pantala_wire::name::is_host(name) {
                    return Err(UpstreamUrlError::Malformed);
                }
                Host::Domain(name.to_owned())
            }
            Host::Ipv4(v4) => Host::Ipv4(v4),
            Host::Ipv6(v6) => Host::Ipv6(v6),
        };
        let port = url.port_or_known_default().unwrap_or_default();
        if port == 0 {
            return Err(UpstreamUrlError::Malformed);
        }
        Ok(Self { scheme, host, port }.canonical())
    }
}

impl fmt::Display for UpstreamUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{}", self.scheme.as_str(), self.authority())
    }
}

impl fmt::Debug for UpstreamUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// Names under which clouds serve instance credentials.
fn is_forbidden_name(name: &str) -> bool {
    let name = name.to_ascii_lowercase();
    matches!(
        name.as_str(),
        "metadata" | "metadata.google.internal" | "instance-data" | "instance-data.ec2.internal"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_base_url_survives_its_text_form_and_anything_more_is_refused() {
        for (text, shown) in [
            ("http://127.0.0.1:25000", "http://127.0.0.1:25000"),
            ("http://127.0.0.1:25000/", "http://127.0.0.1:25000"),
            ("HTTPS://Registry.Example:443", "https://registry.example"),
            ("https://registry.example.", "https://registry.example"),
            ("http://[::1]:5000", "http://[::1]:5000"),
            ("https://docker.io", "https://registry-1.docker.io"),
            ("https://index.docker.io/", "https://registry-1.docker.io"),
        ] {
            let parsed: UpstreamUrl = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert_eq!(parsed.to_string(), shown);
            assert_eq!(shown.parse::<UpstreamUrl>().unwrap(), parsed);
        }
        for (text, error) in [
            ("registry.example", UpstreamUrlError::Malformed),
            ("ftp://registry.example", UpstreamUrlError::Scheme),
            ("file:///etc/passwd", UpstreamUrlError::Scheme),
            (
                "http://user:secret@registry.example",
                UpstreamUrlError::Credentials,
            ),
            ("http://registry.example/v2/", UpstreamUrlError::Path),
            ("http://registry.example?x", UpstreamUrlError::Path),
            ("http://regi stry", UpstreamUrlError::Malformed),
            ("http:\\\\registry.example", UpstreamUrlError::Malformed),
            ("http://registry.example:0", UpstreamUrlError::Malformed),
            ("http://", UpstreamUrlError::Malformed),
        ] {
            assert_eq!(text.parse::<UpstreamUrl>().unwrap_err(), error, "{text}");
        }
        assert!(
            format!("http://{}", "a".repeat(400))
                .parse::<UpstreamUrl>()
                .is_err()
        );
    }

    #[test]
    fn addresses_of_metadata_services_are_forbidden_however_they_are_spelt() {
        for text in [
            "http://169.254.169.254",
            "http://2852039166",
            "http://0xa9fea9fe",
            "http://0251.0376.0251.0376",
            "http://169.254.43518",
            "http://[::ffff:169.254.169.254]",
            "http://[::169.254.169.254]",
            "http://[64:ff9b::a9fe:a9fe]",
            "http://[2002:a9fe:a9fe::1]",
            "http://[fe80::1]",
            "http://[fd00:ec2::254]",
            "http://0.0.0.0:5000",
            "http://0",
            "http://[::]:5000",
            "http://224.0.0.1",
            "http://255.255.255.255",
            "http://[ff02::1]",
            "http://100.100.100.200",
            "http://168.63.129.16",
            "http://Metadata.Google.Internal",
            "http://metadata.google.internal.",
        ] {
            let upstream: UpstreamUrl = text.parse().unwrap_or_else(|e| panic!("{text}: {e}"));
            assert!(upstream.is_forbidden(), "{text} -> {upstream}");
        }
        for text in [
            "http://127.0.0.1:5000",
            "http://[::1]:5000",
            "http://10.0.0.1",
            "https://registry.example",
            "http://[fd00::1]:5000",
        ] {
            assert!(
                !text.parse::<UpstreamUrl>().unwrap().is_forbidden(),
                "{text}"
            );
        }
    }
}

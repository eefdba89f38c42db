//! Which upstream a request means, and whether it is served: an allow-list, open only on request.
//!
//! Without it a mirror is a way into every network that its node can reach.

use std::collections::BTreeMap;
use std::net::IpAddr;

use pantala_wire::address::address_is_forbidden;

use crate::upstream::{UpstreamUrl, UpstreamUrlError};

/// Why no upstream is chosen.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PolicyError {
    /// What the request names is no upstream.
    #[error("{what}: {source}")]
    Malformed {
        /// Which part of the request.
        what: &'static str,
        /// What is wrong with it.
        source: UpstreamUrlError,
    },
    /// Not in the allow-list.
    #[error("the upstream {0:?} is not in the list of registries that this node serves")]
    NotAllowed(String),
    /// An address that is never served.
    #[error("the upstream {0:?} is a link-local, metadata, unspecified or multicast address")]
    ForbiddenAddress(String),
}

impl PolicyError {
    /// What to do about it.
    pub const fn hint(&self) -> &'static str {
        match self {
            Self::Malformed { .. } => "name a registry host or its http(s) base URL",
            Self::NotAllowed(_) => {
                "add it to the node's configuration as [registries.\"HOST\"], or set mirror.allow_any_upstream = true"
            }
            Self::ForbiddenAddress(_) => {
                "such addresses are never served, whatever mirror.allow_any_upstream says"
            }
        }
    }
}

/// How a request names its upstream, most binding first.
#[derive(Debug, Clone, Copy, Default)]
pub struct Naming<'a> {
    /// The base URL of an absolute-form request (forward proxy).
    pub absolute: Option<&'a str>,
    /// The `X-Dragonfly-Registry` header: a host or a base URL.
    pub header: Option<&'a str>,
    /// The `ns` query parameter: a host.
    pub ns: Option<&'a str>,
}

/// The table of registries and what is allowed beyond it.
#[derive(Debug, Clone)]
pub struct Policy {
    default: UpstreamUrl,
    table: BTreeMap<String, UpstreamUrl>,
    allow_any: bool,
}

impl Policy {
    /// The policy of a configuration: the default registry's name (or base URL), the table from
    /// registry hosts to where they really are, and whether upstreams beyond them are served.
    pub fn new(
        default_registry: &str,
        registries: BTreeMap<String, UpstreamUrl>,
        allow_any: bool,
    ) -> Result<Self, PolicyError> {
        let mut table = BTreeMap::new();
        for (host, upstream) in registries {
            // A key is a host; its canonical form makes "Registry.Example" and ":443" match.
            let key =
                UpstreamUrl::for_registry(&host).map_err(|source| PolicyError::Malformed {
                    what: "a key of [registries]",
                    source,
                })?;
            if upstream.is_forbidden() {
                return Err(PolicyError::ForbiddenAddress(upstream.to_string()));
            }
            table.insert(key.authority(), upstream);
        }
        let named = parse_name(default_registry).map_err(|source| PolicyError::Malformed {
            what: "mirror.default_registry",
            source,
        })?;
        let default = table.get(&named.authority()).cloned().unwrap_or(named);
        if default.is_forbidden() {
            return Err(PolicyError::ForbiddenAddress(default.to_string()));
        }
        Ok(Self {
            default,
            table,
            allow_any,
        })
    }

    /// The upstream of a request that names none.
    pub const fn default_upstream(&self) -> &UpstreamUrl {
        &self.default
    }

    /// The upstream that a request means, if it is served.
    pub fn choose(&self, naming: Naming<'_>) -> Result<UpstreamUrl, PolicyError> {
        let malformed = |what| move |source| PolicyError::Malformed { what, source };
        let (named, is_bare_host) = if let Some(text) = naming.absolute {
            (text.parse().map_err(malformed("the request's URL"))?, false)
        } else if let Some(text) = naming.header {
            let named = parse_name(text).map_err(malformed("X-Dragonfly-Registry"))?;
            (named, !text.contains("://"))
        } else if let Some(text) = naming.ns {
            (
                UpstreamUrl::for_registry(text).map_err(malformed("the query parameter ns"))?,
                true,
            )
        } else {
            return Ok(self.default.clone());
        };
        if named.is_forbidden() {
            return Err(PolicyError::ForbiddenAddress(named.to_string()));
        }
        if let Some(known) = self.known(&named, is_bare_host) {
            return Ok(known.clone());
        }
        if self.allow_any {
            return Ok(named);
        }
        Err(PolicyError::NotAllowed(named.to_string()))
    }

    fn known(&self, named: &UpstreamUrl, is_bare_host: bool) -> Option<&UpstreamUrl> {
        // A host in the table means what the table says. A full URL means itself where it is one
        // of the table's, and otherwise the table's entry for its host: never plain text where
        // the table has TLS.
        let exact = self
            .table
            .values()
            .chain([&self.default])
            .find(|upstream| *upstream == named);
        let by_host = self.table.get(&named.authority()).or_else(|| {
            let same = |upstream: &&UpstreamUrl| upstream.host_and_port() == named.host_and_port();
            self.table.values().chain([&self.default]).find(same)
        });
        if is_bare_host {
            by_host.or(exact)
        } else {
            exact.or(by_host)
        }
    }

    /// Where a tunnel (`CONNECT host:port`) leads, if it is allowed: only host and port of the
    /// answer count. The addresses that the name resolves to must still pass
    /// [`Policy::allows_address`].
    pub fn allows_tunnel(&self, authority: &str) -> Result<UpstreamUrl, PolicyError> {
        let target: UpstreamUrl =
            format!("https://{authority}")
                .parse()
                .map_err(|source| PolicyError::Malformed {
                    what: "the CONNECT target",
                    source,
                })?;
        if target.is_forbidden() {
            return Err(PolicyError::ForbiddenAddress(target.authority()));
        }
        if let Some(real) = self.known(&target, true) {
            return Ok(real.clone());
        }
        if self.allow_any {
            Ok(target)
        } else {
            Err(PolicyError::NotAllowed(target.authority()))
        }
    }

    /// Whether a connection to this address may be made at all.
    pub fn allows_address(&self, address: IpAddr) -> bool {
        !address_is_forbidden(address)
    }
}

/// A host (`registry.example:5000`) or a base URL.
fn parse_name(text: &str) -> Result<UpstreamUrl, UpstreamUrlError> {
    if text.contains("://") {
        text.parse()
    } else {
        UpstreamUrl::for_registry(text)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> BTreeMap<String, UpstreamUrl> {
        [
            ("registry.test:5000", "http://127.0.0.1:25000"),
            ("Private.Example", "https://10.1.2.3:8443"),
        ]
        .map(|(host, url)| (host.to_owned(), url.parse().unwrap()))
        .into()
    }

    fn policy(allow_any: bool) -> Policy {
        Policy::new("docker.io", table(), allow_any).unwrap()
    }

    fn by_header(text: &str) -> Naming<'_> {
        Naming {
            header: Some(text),
            ns: Some("registry.test:5000"),
            ..Naming::default()
        }
    }

    #[test]
    fn the_header_beats_ns_and_ns_beats_the_default() {
        let policy = policy(false);
        let chosen = |naming| policy.choose(naming).unwrap().to_string();
        assert_eq!(chosen(Naming::default()), "https://registry-1.docker.io");
        let ns = Naming {
            ns: Some("registry.test:5000"),
            ..Naming::default()
        };
        assert_eq!(chosen(ns), "http://127.0.0.1:25000");
        assert_eq!(
            chosen(by_header("private.example")),
            "https://10.1.2.3:8443"
        );
        let absolute = Naming {
            absolute: Some("http://registry.test:5000"),
            ..by_header("private.example")
        };
        assert_eq!(chosen(absolute), "http://127.0.0.1:25000");
    }

    #[test]
    fn a_registry_is_found_under_its_host_and_under_its_url() {
        let policy = policy(false);
        for (text, url) in [
            ("http://127.0.0.1:25000", "http://127.0.0.1:25000"),
            ("http://127.0.0.1:25000/", "http://127.0.0.1:25000"),
            ("127.0.0.1:25000", "http://127.0.0.1:25000"),
            ("http://registry.test:5000", "http://127.0.0.1:25000"),
            ("https://PRIVATE.example:443", "https://10.1.2.3:8443"),
            ("https://index.docker.io", "https://registry-1.docker.io"),
            // Never plain text where the table has TLS.
            ("http://10.1.2.3:8443", "https://10.1.2.3:8443"),
        ] {
            assert_eq!(
                policy.choose(by_header(text)).unwrap().to_string(),
                url,
                "{text}"
            );
        }
    }

    #[test]
    fn what_is_not_listed_is_served_only_by_an_open_mirror() {
        for text in [
            "other.example",
            "http://127.0.0.1:22",
            "https://private.example:444",
        ] {
            let error = policy(false).choose(by_header(text)).unwrap_err();
            assert!(
                matches!(error, PolicyError::NotAllowed(_)),
                "{text}: {error}"
            );
            assert!(error.hint().contains("allow_any_upstream"));
            policy(true).choose(by_header(text)).unwrap();
        }
        for text in [
            "",
            "a b",
            "ftp://registry.test:5000",
            "http://u:p@registry.test:5000",
        ] {
            let error = policy(true).choose(by_header(text)).unwrap_err();
            assert!(matches!(error, PolicyError::Malformed { .. }), "{text}");
        }
    }

    #[test]
    fn metadata_addresses_are_refused_even_by_an_open_mirror() {
        for text in [
            "169.254.169.254",
            "http://[::ffff:a9fe:a9fe]",
            "http://0xa9fea9fe/",
            "0.0.0.0:80",
        ] {
            let error = policy(true).choose(by_header(text)).unwrap_err();
            assert!(
                matches!(error, PolicyError::ForbiddenAddress(_)),
                "{text}: {error}"
            );
        }
        assert!(matches!(
            policy(true).allows_tunnel("169.254.169.254:80"),
            Err(PolicyError::ForbiddenAddress(_))
        ));
        let poisoned = [(
            "r.test".to_owned(),
            "http://169.254.169.254".parse().unwrap(),
        )];
        assert!(Policy::new("docker.io", poisoned.into(), false).is_err());
    }

    #[test]
    fn a_tunnel_leads_to_listed_hosts_only() {
        let policy = policy(false);
        for (target, real) in [
            ("registry.test:5000", "127.0.0.1:25000"),
            ("127.0.0.1:25000", "127.0.0.1:25000"),
            ("private.example:443", "10.1.2.3:8443"),
            ("registry-1.docker.io:443", "registry-1.docker.io:443"),
        ] {
            assert_eq!(policy.allows_tunnel(target).unwrap().host_and_port(), real);
        }
        for target in [
            "127.0.0.1:22",
            "other.example:443",
            "registry-1.docker.io:22",
            "x/y:1",
            "",
        ] {
            assert!(policy.allows_tunnel(target).is_err(), "{target}");
        }
    }
}

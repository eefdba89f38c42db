//! Which addresses an origin may have: the guard against being sent to a cloud's metadata service.
//!
//! Anybody who can name an upstream, or answer for one with a redirect or a DNS record, chooses
//! where this process connects to. Registries do live on loopback and private addresses, so those
//! stay open; what no registry ever has is refused. Literal addresses are looked at in every URL
//! and every redirect; names are looked at after they are resolved, by the resolver that the
//! connection itself uses, so that an answer that changes between check and use changes nothing.

use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::Arc;

use pantala_wire::address::address_is_forbidden;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use url::{Host, Url};

/// The host may not be connected to, whatever the configuration says.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{host} is or resolves to a link-local, metadata, multicast or unspecified address, which no origin may have"
)]
pub struct ForbiddenAddress {
    /// The host as it stands in the URL.
    pub host: String,
}

/// Refuses a URL whose host is a literal address of a forbidden kind.
pub(crate) fn check_url(url: &Url) -> Result<(), ForbiddenAddress> {
    let literal = match url.host() {
        Some(Host::Ipv4(v4)) => Some(IpAddr::V4(v4)),
        Some(Host::Ipv6(v6)) => Some(IpAddr::V6(v6)),
        _ => None,
    };
    match literal {
        Some(address) if address_is_forbidden(address) => Err(ForbiddenAddress {
            host: address.to_string(),
        }),
        _ => Ok(()),
    }
}

/// What a name resolves to, in order of preference.
pub type Resolution = Pin<Box<dyn Future<Output = io::Result<Vec<SocketAddr>>> + Send>>;

/// Turns host names into addresses. Ports in the answer are used where they are not 0 and the URL
/// names none.
pub trait ResolveNames: Send + Sync + 'static {
    /// The addresses of `host`.
    fn resolve(&self, host: String) -> Resolution;
}

/// The resolver of the operating system.
#[derive(Debug, Clone, Copy, Default)]
pub struct SystemNames;

impl ResolveNames for SystemNames {
    fn resolve(&self, host: String) -> Resolution {
        Box::pin(async move { Ok(tokio::net::lookup_host((host, 0)).await?.collect()) })
    }
}

/// A resolver without the answers that no origin may have.
pub(crate) struct GuardedNames(pub(crate) Arc<dyn ResolveNames>);

impl Resolve for GuardedNames {
    fn resolve(&self, name: Name) -> Resolving {
        let host = name.as_str().to_owned();
        let resolution = self.0.resolve(host.clone());
        Box::pin(async move {
            let allowed = allowed_addresses(&host, resolution.await?)?;
            Ok(Box::new(allowed.into_iter()) as Addrs)
        })
    }
}

/// The addresses that may be connected to; an error where none of several is left.
fn allowed_addresses(
    host: &str,
    found: Vec<SocketAddr>,
) -> Result<Vec<SocketAddr>, ForbiddenAddress> {
    let found_any = !found.is_empty();
    let allowed: Vec<_> = found
        .into_iter()
        .filter(|address| !address_is_forbidden(address.ip()))
        .collect();
    if found_any && allowed.is_empty() {
        return Err(ForbiddenAddress {
            host: host.to_owned(),
        });
    }
    Ok(allowed)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_spelling_of_a_literal_address_is_recognised_in_a_url() {
        for text in [
            "http://169.254.169.254/latest/meta-data",
            "http://0xa9fea9fe/",
            "http://2852039166/",
            "http://0251.0376.0251.0376/",
            "http://169.254.43518/",
            "http://[::ffff:a9fe:a9fe]/",
            "http://[fe80::1]:5000/",
            "http://0/",
        ] {
            let url = Url::parse(text).unwrap();
            assert!(check_url(&url).is_err(), "{text} -> {url}");
        }
        check_url(&Url::parse("http://127.0.0.1:5000/v2/").unwrap()).unwrap();
        check_url(&Url::parse("https://registry.test/v2/").unwrap()).unwrap();
    }

    #[test]
    fn forbidden_answers_are_dropped_and_a_name_with_nothing_else_is_refused() {
        let socket = |text: &str| text.parse::<SocketAddr>().unwrap();
        let mixed = vec![socket("169.254.169.254:0"), socket("10.0.0.1:0")];
        assert_eq!(
            allowed_addresses("h", mixed).unwrap(),
            [socket("10.0.0.1:0")]
        );
        let bad = vec![socket("169.254.169.254:0"), socket("[fe80::1]:0")];
        assert_eq!(allowed_addresses("h", bad).unwrap_err().host, "h");
        assert!(allowed_addresses("h", vec![]).unwrap().is_empty());
    }
}

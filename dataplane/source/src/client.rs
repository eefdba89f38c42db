//! Sends one request: connection, address rule, redirects, and the time until an answer's head.

use std::collections::BTreeMap;
use std::error::Error as StdError;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http::header::{ACCEPT_ENCODING, AUTHORIZATION, COOKIE, HOST};
use http::{HeaderMap, HeaderValue, Method, StatusCode};
use tokio::time::timeout;
use url::Url;

use crate::address::{ForbiddenAddress, GuardedNames, ResolveNames, check_url};
use crate::config::{ConfigError, SourceConfig};
use crate::error::{Lie, Phase, SourceError};
use crate::redirect::{is_redirect, next_hop};
use crate::tls;
use crate::upstream::host_port;

/// Headers of one answer. Real ones have under 40; more are a bomb. (HTTP/1 bounds their bytes to
/// about 400 KiB by itself.)
const HEADERS_MAX: usize = 128;
/// Bytes of headers of one HTTP/2 answer.
const HEADER_BYTES_MAX: u32 = 64 * 1024;
/// HTTP/2 flow control: what one stream, and all of a connection, may have in flight. At 25 Gbit/s
/// and 5 ms that is one connection's bandwidth-delay product; it also bounds what a slow reader
/// leaves in memory.
const H2_STREAM_WINDOW_BYTES: u32 = 8 << 20;
const H2_CONNECTION_WINDOW_BYTES: u32 = 16 << 20;
/// HTTP/2 frames: large ones cost less CPU per byte.
const H2_FRAME_BYTES: u32 = 256 * 1024;
/// Idle connections kept per host: as many as run at the same time by default, so that a burst of
/// ranges finds them open.
const IDLE_PER_HOST_MAX: usize = 32;
/// How long an idle connection is kept: below the 60 s after which common proxies close theirs.
const IDLE_TIMEOUT: Duration = Duration::from_secs(50);
/// Finds origins that vanished without a word.
const KEEPALIVE: Duration = Duration::from_secs(20);
/// A redirect's body up to this length is read, so that its connection can be used again.
const DRAIN_BYTES_MAX: u64 = 8 * 1024;
/// ... and for no longer than this.
const DRAIN_TIMEOUT: Duration = Duration::from_millis(200);
/// Longest text of a lower layer that an error repeats.
const REASON_CHARS_MAX: usize = 200;

/// One request, ready to be sent.
#[derive(Debug, Clone)]
pub(crate) struct Request {
    pub(crate) method: Method,
    pub(crate) url: Url,
    pub(crate) headers: HeaderMap,
    /// Sent to the URL's own origin only.
    pub(crate) authorization: Option<HeaderValue>,
    /// Empty for most.
    pub(crate) body: Bytes,
}

/// The head of an answer, with its body still to be read.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) response: reqwest::Response,
    /// Who answered, for messages.
    pub(crate) host: String,
    /// Whether the answer is of another origin than the request was for.
    pub(crate) crossed_origin: bool,
    /// Whether it answers a HEAD: then its length is that of a body which does not come.
    pub(crate) is_head: bool,
}

impl Answer {
    pub(crate) fn status(&self) -> StatusCode {
        self.response.status()
    }

    pub(crate) fn headers(&self) -> &HeaderMap {
        self.response.headers()
    }
}

/// HTTP clients by the CAs that they trust.
pub(crate) struct Client {
    shared: reqwest::Client,
    /// Hosts (with or without a port) that have CAs of their own.
    by_host: BTreeMap<String, reqwest::Client>,
    connect_timeout: Duration,
    first_byte_timeout: Duration,
}

impl Client {
    pub(crate) fn new(
        config: &SourceConfig,
        names: Arc<dyn ResolveNames>,
    ) -> Result<Self, ConfigError> {
        let mut roots = tls::platform_roots();
        tls::add_ca_files(&mut roots, &config.ca_files)?;
        let build = |roots| http_client(config, roots, Arc::clone(&names));
        let mut by_host = BTreeMap::new();
        for (host, files) in &config.host_ca_files {
            let mut roots = roots.clone();
            tls::add_ca_files(&mut roots, files)?;
            by_host.insert(host.to_ascii_lowercase(), build(roots)?);
        }
        Ok(Self {
            shared: build(roots)?,
            by_host,
            connect_timeout: config.connect_timeout,
            first_byte_timeout: config.first_byte_timeout,
        })
    }

    fn http(&self, url: &Url) -> &reqwest::Client {
        if self.by_host.is_empty() {
            return &self.shared;
        }
        let host = url.host_str().unwrap_or_default();
        let with_port = format!("{host}:{}", url.port_or_known_default().unwrap_or_default());
        self.by_host
            .get(&with_port)
            .or_else(|| self.by_host.get(host))
            .unwrap_or(&self.shared)
    }

    /// Sends the request and follows its redirects, up to the head of the last answer.
    ///
    /// The time limit is one for all hops. Nothing is remembered of where redirects lead: signed
    /// URLs expire.
    pub(crate) async fn send(&self, request: Request) -> Result<Answer, SourceError> {
        let host = host_port(&request.url);
        timeout(self.first_byte_timeout, self.follow(request))
            .await
            .unwrap_or(Err(SourceError::TimedOut {
                host,
                phase: Phase::FirstByte,
                limit: self.first_byte_timeout,
            }))
    }

    async fn follow(&self, request: Request) -> Result<Answer, SourceError> {
        let Request {
            method,
            mut url,
            mut headers,
            authorization,
            body,
        } = request;
        headers.remove(HOST);
        headers.remove(AUTHORIZATION);
        headers
            .entry(ACCEPT_ENCODING)
            .or_insert(HeaderValue::from_static("identity"));
        if let Some(authorization) = authorization {
            headers.insert(AUTHORIZATION, authorization);
        }
        let mut crossed_origin = false;
        let mut hops_count = 0;
        loop {
            check_url(&url)?;
            let host = host_port(&url);
            let mut attempt = reqwest::Request::new(method.clone(), url.clone());
            *attempt.headers_mut() = headers.clone();
            if !body.is_empty() {
                *attempt.body_mut() = Some(body.clone().into());
            }
            let response = self
                .http(&url)
                .execute(attempt)
                .await
                .map_err(|error| self.classify(host.clone(), &error))?;
            if !is_redirect(&method, response.status()) {
                return Ok(Answer {
                    response,
                    host,
                    crossed_origin,
                    is_head: method == Method::HEAD,
                });
            }
            let hop = next_hop(&url, response.headers(), hops_count)?;
            drain(response).await;
            if hop.crosses_origin {
                // For good: a way back to the first origin may be another's choice.
                headers.remove(AUTHORIZATION);
                headers.remove(COOKIE);
                crossed_origin = true;
            }
            tracing::debug!(from = %host, to = %host_port(&hop.url), "redirected");
            url = hop.url;
            hops_count += 1;
        }
    }

    /// What a failure of the HTTP client is to us.
    fn classify(&self, host: String, error: &reqwest::Error) -> SourceError {
        if let Some(forbidden) = cause::<ForbiddenAddress>(error) {
            return SourceError::Forbidden(forbidden.clone());
        }
        if let Some(rustls::Error::InvalidCertificate(why)) = rustls_cause(error) {
            return SourceError::Untrusted {
                host,
                reason: bounded(&why.to_string()),
            };
        }
        if error.is_timeout() {
            return SourceError::TimedOut {
                host,
                phase: Phase::Connect,
                limit: self.connect_timeout,
            };
        }
        if let Some(parse) = cause::<hyper::Error>(error).filter(|error| error.is_parse()) {
            return SourceError::Lied {
                host,
                lie: Lie::Malformed(bounded(&parse.to_string())),
            };
        }
        SourceError::Unavailable {
            host,
            reason: bounded(&innermost(error)),
            status: None,
        }
    }
}

fn http_client(
    config: &SourceConfig,
    roots: rustls::RootCertStore,
    names: Arc<dyn ResolveNames>,
) -> Result<reqwest::Client, ConfigError> {
    reqwest::Client::builder()
        .tls_backend_preconfigured(tls::client_config(roots)?)
        .redirect(reqwest::redirect::Policy::none())
        // A proxy of the environment would connect in our place, past the address rule.
        .no_proxy()
        .referer(false)
        .dns_resolver(GuardedNames(names))
        .connect_timeout(config.connect_timeout)
        .pool_max_idle_per_host(IDLE_PER_HOST_MAX)
        .pool_idle_timeout(IDLE_TIMEOUT)
        .tcp_nodelay(true)
        .tcp_keepalive(KEEPALIVE)
        .http1_max_headers(HEADERS_MAX)
        .http2_max_header_list_size(HEADER_BYTES_MAX)
        .http2_initial_stream_window_size(H2_STREAM_WINDOW_BYTES)
        .http2_initial_connection_window_size(H2_CONNECTION_WINDOW_BYTES)
        .http2_max_frame_size(H2_FRAME_BYTES)
        .user_agent(&config.user_agent)
        .build()
        .map_err(|error| ConfigError::Client(innermost(&error)))
}

/// Reads the rest of a short answer that nobody wants, so that the connection stays usable.
pub(crate) async fn drain(mut response: reqwest::Response) {
    let is_short = crate::answer::content_length(response.headers())
        .is_some_and(|length| length <= DRAIN_BYTES_MAX);
    if is_short {
        let rest = async { while let Ok(Some(_)) = response.chunk().await {} };
        // Late or cut: then the connection is closed, which costs a new one and nothing else.
        let _ = timeout(DRAIN_TIMEOUT, rest).await;
    }
}

/// An error and what caused it, outermost first.
fn chain<'a>(
    error: &'a (dyn StdError + 'static),
) -> impl Iterator<Item = &'a (dyn StdError + 'static)> {
    std::iter::successors(Some(error), |error| (**error).source())
}

/// The first cause of this type.
fn cause<'a, T: StdError + 'static>(error: &'a (dyn StdError + 'static)) -> Option<&'a T> {
    chain(error).find_map(|error| error.downcast_ref::<T>())
}

/// The TLS failure, which travels inside of an I/O error that hides it from `source`.
fn rustls_cause<'a>(error: &'a (dyn StdError + 'static)) -> Option<&'a rustls::Error> {
    let inside = |error: &'a std::io::Error| {
        let inner = error.get_ref()?;
        let inner: &'a (dyn StdError + 'static) = inner;
        rustls_cause(inner)
    };
    cause::<rustls::Error>(error).or_else(|| {
        chain(error)
            .filter_map(|error| error.downcast_ref::<std::io::Error>())
            .find_map(inside)
    })
}

/// The innermost message: the outer ones repeat the URL, which may carry a signature.
fn innermost(error: &(dyn StdError + 'static)) -> String {
    chain(error)
        .last()
        .map_or_else(|| "unknown reason".to_owned(), ToString::to_string)
}

fn bounded(text: &str) -> String {
    text.chars().take(REASON_CHARS_MAX).collect()
}

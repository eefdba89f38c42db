//! What stands in front of a registry: it counts every body byte sent, and misbehaves on request.
//!
//! Counting here, and not at network interfaces, tells blobs from manifests and one caller from
//! another. Bytes are counted when they are handed to the connection, so a caller that goes away
//! makes the count too high by what was buffered, never too low.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context as TaskContext, Poll};
use std::time::{Duration, Instant};

use anyhow::Result;
use bytes::Bytes;
use futures_util::{Stream, StreamExt};
use http_body_util::{BodyExt, Full, StreamBody, combinators::UnsyncBoxBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;

use super::machine::Machine;

type Body = UnsyncBoxBody<Bytes, std::io::Error>;

/// What a request is for, as the registry's paths say.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    Blob,
    Manifest,
    Other,
}

/// A way to misbehave.
#[derive(Debug, Clone)]
pub(crate) enum Fault {
    /// Closes the connection without an answer.
    HangUp,
    /// Answers with this status, and `Retry-After` in seconds.
    Status(u16, Option<u32>),
    /// Accepts the request and never answers.
    Silent,
    /// Cuts the body after so many bytes.
    CutAfter(u64),
    /// Stops sending after so many bytes, and keeps the connection.
    StallAfter(u64),
    /// Changes one byte in each of the body's chunks.
    Corrupt,
    /// Answers a range request with 200 and the whole blob.
    IgnoreRange,
    /// Sends at most so many bytes a second on each connection.
    Slow(u64),
}

/// A fault for the requests of one kind, for the next `times` of them.
#[derive(Debug, Clone)]
pub(crate) struct Rule {
    pub(crate) target: Target,
    pub(crate) fault: Fault,
    pub(crate) times: u32,
}

impl Rule {
    /// For every request.
    pub(crate) fn always(target: Target, fault: Fault) -> Self {
        Self {
            target,
            fault,
            times: u32::MAX,
        }
    }
}

/// One request as the registry saw it.
#[derive(Debug, Clone)]
pub(crate) struct Exchange {
    pub(crate) target: Target,
    pub(crate) path: String,
    /// When it came, since the proxy's start.
    pub(crate) at: Duration,
    /// The `Range` header.
    pub(crate) range: Option<String>,
    pub(crate) from: IpAddr,
    pub(crate) body_bytes: u64,
}

#[derive(Default)]
struct Book {
    /// How many were forgotten: the number of the first of `exchanges`.
    forgotten: usize,
    exchanges: Vec<Exchange>,
    rules: Vec<Rule>,
    refusing: bool,
}

struct Shared {
    upstream: SocketAddr,
    started: Instant,
    client: reqwest::Client,
    book: Mutex<Book>,
}

impl Shared {
    fn book(&self) -> MutexGuard<'_, Book> {
        self.book.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A running proxy; ends when dropped.
pub(crate) struct RegistryProxy {
    machine: Machine,
    address: SocketAddr,
    shared: Arc<Shared>,
    task: tokio::task::JoinHandle<()>,
}

impl RegistryProxy {
    /// Listens on `machine`, in front of the registry at `upstream`.
    pub(crate) fn start(machine: &Machine, port: u16, upstream: SocketAddr) -> Result<Self> {
        let shared = Arc::new(Shared {
            upstream,
            started: Instant::now(),
            client: reqwest::Client::builder()
                .no_proxy()
                .redirect(reqwest::redirect::Policy::none())
                .build()?,
            book: Mutex::default(),
        });
        let listener = machine.listen(port)?;
        let address = listener.local_addr()?;
        let task = serve(listener, shared.clone())?;
        Ok(Self {
            machine: machine.clone(),
            address,
            shared,
            task,
        })
    }

    /// `http://IP:PORT`.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// Misbehaves by `rules` from now on, instead of by those given before.
    pub(crate) fn set_rules(&self, rules: Vec<Rule>) {
        self.shared.book().rules = rules;
    }

    /// Refuses connections and ends those it has, or accepts them again.
    pub(crate) fn refuse(&mut self, refuse: bool) -> Result<()> {
        let was = std::mem::replace(&mut self.shared.book().refusing, refuse);
        if refuse && !was {
            self.task.abort();
        } else if was && !refuse {
            let listener = self.machine.listen(self.address.port())?;
            self.task = serve(listener, self.shared.clone())?;
        }
        Ok(())
    }

    /// Every request so far.
    pub(crate) fn exchanges(&self) -> Vec<Exchange> {
        self.shared.book().exchanges.clone()
    }

    /// Body bytes sent so far for requests of one kind.
    pub(crate) fn bytes(&self, target: Target) -> u64 {
        let book = self.shared.book();
        let of_kind = book
            .exchanges
            .iter()
            .filter(|exchange| exchange.target == target);
        of_kind.map(|exchange| exchange.body_bytes).sum()
    }

    /// Places of blobs that were asked for more than once, with who asked; `most` of them.
    pub(crate) fn repeated(&self, most: usize) -> Vec<String> {
        let mut places: BTreeMap<(String, u64), Vec<String>> = BTreeMap::new();
        for exchange in self.exchanges() {
            if exchange.target != Target::Blob || exchange.body_bytes == 0 {
                continue;
            }
            let range = exchange
                .range
                .as_deref()
                .and_then(|range| range.strip_prefix("bytes="));
            let start = range.and_then(|range| range.split('-').next()?.parse::<u64>().ok());
            let digest = exchange.path.rsplit(':').next().unwrap_or_default();
            places
                .entry((digest.chars().take(8).collect(), start.unwrap_or_default()))
                .or_default()
                .push(format!(
                    "{} {} ({} bytes at {:.2?})",
                    exchange.from,
                    exchange.range.as_deref().unwrap_or("whole"),
                    exchange.body_bytes,
                    exchange.at
                ));
        }
        let repeated = places.iter().filter(|(_, who)| who.len() > 1).take(most);
        repeated
            .map(|((digest, start), who)| format!("{digest} from {start}: {}", who.join(", ")))
            .collect()
    }

    /// Forgets what was counted.
    pub(crate) fn reset_count(&self) {
        let mut book = self.shared.book();
        book.forgotten += book.exchanges.len();
        book.exchanges.clear();
    }
}

impl Drop for RegistryProxy {
    fn drop(&mut self) {
        self.task.abort();
    }
}

fn serve(
    listener: std::net::TcpListener,
    shared: Arc<Shared>,
) -> Result<tokio::task::JoinHandle<()>> {
    listener.set_nonblocking(true)?;
    let listener = tokio::net::TcpListener::from_std(listener)?;
    Ok(tokio::spawn(async move {
        // Connections live in this set, so that they end with the task.
        let mut connections = tokio::task::JoinSet::new();
        while let Ok((stream, from)) = listener.accept().await {
            while connections.try_join_next().is_some() {}
            let shared = shared.clone();
            let _ = stream.set_nodelay(true);
            connections.spawn(async move {
                let service = service_fn(move |request| answer(shared.clone(), from.ip(), request));
                // Errors here are callers that went away, or faults that were asked for.
                let _ = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
            });
        }
    }))
}

fn target_of(path: &str) -> Target {
    if path.contains("/blobs/") {
        Target::Blob
    } else if path.contains("/manifests/") {
        Target::Manifest
    } else {
        Target::Other
    }
}

async fn answer(
    shared: Arc<Shared>,
    from: IpAddr,
    mut request: Request<Incoming>,
) -> Result<Response<Body>> {
    let path = request
        .uri()
        .path_and_query()
        .map_or("/", |path| path.as_str())
        .to_owned();
    let target = target_of(&path);
    let (number, fault) = {
        let mut book = shared.book();
        book.exchanges.push(Exchange {
            target,
            path: path.clone(),
            at: shared.started.elapsed(),
            range: request
                .headers()
                .get("range")
                .and_then(|value| value.to_str().ok())
                .map(str::to_owned),
            from,
            body_bytes: 0,
        });
        let rule = book
            .rules
            .iter_mut()
            .find(|rule| rule.target == target && rule.times > 0);
        let fault = rule.map(|rule| {
            rule.times = rule.times.saturating_sub(u32::from(rule.times != u32::MAX));
            rule.fault.clone()
        });
        (book.forgotten + book.exchanges.len() - 1, fault)
    };
    match fault {
        Some(Fault::HangUp) => anyhow::bail!("hanging up, as asked"),
        Some(Fault::Silent) => std::future::pending::<()>().await,
        Some(Fault::Status(status, retry_after_s)) => {
            let mut response = Response::new(
                Full::from("misbehaving, as asked\n")
                    .map_err(never)
                    .boxed_unsync(),
            );
            *response.status_mut() = StatusCode::from_u16(status)?;
            if let Some(seconds) = retry_after_s {
                response.headers_mut().insert("retry-after", seconds.into());
            }
            return Ok(response);
        }
        Some(Fault::IgnoreRange) => {
            request.headers_mut().remove("range");
        }
        _ => {}
    }
    let mut forward = shared.client.request(
        request.method().clone(),
        format!("http://{}{path}", shared.upstream),
    );
    for (name, value) in request.headers() {
        if !matches!(name.as_str(), "connection" | "host") {
            forward = forward.header(name, value);
        }
    }
    let body = request.into_body().collect().await?.to_bytes();
    let upstream = forward.body(body).send().await?;
    let mut response = Response::builder().status(upstream.status());
    for (name, value) in upstream.headers() {
        if !matches!(name.as_str(), "connection" | "transfer-encoding") {
            response = response.header(name, value);
        }
    }
    let chunks = Box::pin(
        upstream
            .bytes_stream()
            .map(|chunk| chunk.map_err(std::io::Error::other)),
    );
    let body = CountedBody {
        chunks,
        shared,
        number,
        fault,
        sent: 0,
        pause: None,
    };
    Ok(response.body(StreamBody::new(body).boxed_unsync())?)
}

fn never(error: std::convert::Infallible) -> std::io::Error {
    match error {}
}

/// A body that is counted and spoiled on its way.
struct CountedBody {
    chunks: Pin<Box<dyn Stream<Item = std::io::Result<Bytes>> + Send>>,
    shared: Arc<Shared>,
    number: usize,
    fault: Option<Fault>,
    sent: u64,
    pause: Option<Pin<Box<tokio::time::Sleep>>>,
}

impl Stream for CountedBody {
    type Item = std::io::Result<Frame<Bytes>>;

    fn poll_next(
        mut self: Pin<&mut Self>,
        context: &mut TaskContext<'_>,
    ) -> Poll<Option<Self::Item>> {
        let this = &mut *self;
        if let Some(pause) = &mut this.pause {
            std::task::ready!(pause.as_mut().poll(context));
            this.pause = None;
        }
        let Some(chunk) = std::task::ready!(this.chunks.poll_next_unpin(context)) else {
            return Poll::Ready(None);
        };
        let mut chunk = chunk?;
        match this.fault {
            Some(Fault::CutAfter(limit)) => {
                if this.sent >= limit {
                    return Poll::Ready(Some(Err(std::io::Error::other("cutting, as asked"))));
                }
                chunk.truncate((limit - this.sent) as usize);
            }
            Some(Fault::StallAfter(limit)) => {
                if this.sent >= limit {
                    return Poll::Pending;
                }
                chunk.truncate((limit - this.sent) as usize);
            }
            Some(Fault::Corrupt) => {
                let mut spoiled = chunk.to_vec();
                if let Some(byte) = spoiled.last_mut() {
                    *byte ^= 0x55;
                }
                chunk = spoiled.into();
            }
            Some(Fault::Slow(bytes_per_s)) => {
                let pause = Duration::from_secs_f64(chunk.len() as f64 / bytes_per_s as f64);
                this.pause = Some(Box::pin(tokio::time::sleep(pause)));
            }
            _ => {}
        }
        this.sent += chunk.len() as u64;
        let mut book = this.shared.book();
        let index = this.number.checked_sub(book.forgotten);
        if let Some(exchange) = index.and_then(|index| book.exchanges.get_mut(index)) {
            exchange.body_bytes = this.sent;
        }
        drop(book);
        Poll::Ready(Some(Ok(Frame::data(chunk))))
    }
}

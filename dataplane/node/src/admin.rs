//! Health, metrics and status over HTTP, for operators and their tools.

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::Context;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

use crate::engine::{Shared, TaskSummary};
use crate::lazy::Lazy;
use crate::meter::MeterStatus;
use crate::metrics::Origin;
use crate::peer::PeerSummary;

/// Connections at once; a scraper and a person need two.
const CONNECTIONS_MAX: usize = 64;
/// How long a connection may take for the head of its next request.
const HEAD_TIMEOUT: Duration = Duration::from_secs(30);

/// What `/status` says.
#[derive(Debug, Serialize)]
pub struct Status {
    node: String,
    version: &'static str,
    uptime_s: u64,
    mirror: String,
    peer: String,
    control: ControlStatus,
    store: StoreStatus,
    meter: MeterStatus,
    peers: Vec<PeerSummary>,
    tasks: Vec<TaskSummary>,
    totals: Totals,
}

#[derive(Debug, Serialize)]
struct ControlStatus {
    connected: bool,
    address: String,
    embedded: bool,
}

#[derive(Debug, Serialize)]
struct StoreStatus {
    used_bytes: u64,
    limit_bytes: u64,
    blobs: usize,
}

#[derive(Debug, Serialize)]
struct Totals {
    from_registry_bytes: u64,
    from_peer_bytes: u64,
    passed_through_bytes: u64,
    by_peer: BTreeMap<String, u64>,
    served_to_peers_bytes: u64,
    served_to_clients_bytes: u64,
    registry_manifest_bytes: u64,
}

/// What the admin server knows besides the downloads.
pub struct About {
    /// When the node started.
    pub started: Instant,
    /// Where the mirror listens.
    pub mirror: SocketAddr,
    /// Where peers find this node.
    pub peer: SocketAddr,
    /// Which control is followed.
    pub control: String,
    /// Whether that runs inside this node.
    pub control_embedded: bool,
    /// Most bytes the store may take.
    pub store_limit_bytes: u64,
}

/// Health, metrics and status of one node.
pub struct Admin {
    listener: TcpListener,
    shared: Arc<Shared>,
    lazy: Arc<Lazy>,
    about: About,
}

impl Admin {
    /// Takes the address.
    ///
    /// # Errors
    /// Where it cannot be bound.
    pub async fn bind(
        listen: SocketAddr,
        shared: Arc<Shared>,
        lazy: Arc<Lazy>,
        about: About,
    ) -> anyhow::Result<Self> {
        let listener = TcpListener::bind(listen).await.with_context(|| {
            format!("cannot listen on {listen} for metrics and status (admin.listen): is another node running?")
        })?;
        Ok(Self {
            listener,
            shared,
            lazy,
            about,
        })
    }

    /// Where it listens.
    ///
    /// # Errors
    /// Where the socket does not say.
    pub fn local_addr(&self) -> std::io::Result<SocketAddr> {
        self.listener.local_addr()
    }

    /// Serves until dropped.
    pub async fn serve(self) -> Infallible {
        let this = Arc::new(self);
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return std::future::pending().await;
            };
            let stream = match this.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Out of descriptors, most likely: others will be closed in a moment.
                    tracing::warn!(%error, "admin connection not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let this = Arc::clone(&this);
            tokio::spawn(async move {
                let service = service_fn(|request| {
                    let this = Arc::clone(&this);
                    async move { Ok::<_, Infallible>(this.answer(&request).await) }
                });
                let served = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HEAD_TIMEOUT)
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
                if let Err(error) = served {
                    tracing::debug!(%error, "admin connection ended early");
                }
                drop(place);
            });
        }
    }

    async fn answer(&self, request: &Request<Incoming>) -> Response<Full<Bytes>> {
        if request.method() != Method::GET && request.method() != Method::HEAD {
            return text(
                StatusCode::METHOD_NOT_ALLOWED,
                "only GET and HEAD are served\n",
            );
        }
        match request.uri().path() {
            "/healthy" => text(StatusCode::OK, "healthy\n"),
            "/metrics" => text(StatusCode::OK, self.shared.metrics_text()),
            "/status" => match serde_json::to_vec_pretty(&self.status().await) {
                Ok(json) => respond(StatusCode::OK, "application/json", json),
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            },
            "/mounts" => match serde_json::to_vec_pretty(&self.lazy.list()) {
                Ok(json) => respond(StatusCode::OK, "application/json", json),
                Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
            },
            _ => text(
                StatusCode::NOT_FOUND,
                "there are /healthy, /metrics, /mounts and /status\n",
            ),
        }
    }

    async fn status(&self) -> Status {
        let store = self.shared.store.clone();
        let (used_bytes, blobs) =
            crate::engine::blocking(move || (store.usage_bytes(), store.list().len())).await;
        let metrics = &self.shared.metrics;
        let by_peer = self.shared.by_peer.snapshot();
        Status {
            node: self.shared.identity.node_id().to_string(),
            version: env!("CARGO_PKG_VERSION"),
            uptime_s: self.about.started.elapsed().as_secs(),
            mirror: self.about.mirror.to_string(),
            peer: self.about.peer.to_string(),
            control: ControlStatus {
                connected: self.shared.control.is_connected(),
                address: self.about.control.clone(),
                embedded: self.about.control_embedded,
            },
            store: StoreStatus {
                used_bytes,
                limit_bytes: self.about.store_limit_bytes,
                blobs,
            },
            meter: self.shared.peers.meter().status(),
            peers: self.shared.peers.summaries(),
            tasks: self.shared.summaries(),
            totals: Totals {
                from_registry_bytes: metrics.received_bytes(Origin::Source)
                    + metrics.received_bytes(Origin::Passthrough),
                from_peer_bytes: metrics.received_bytes(Origin::Peer),
                passed_through_bytes: metrics.received_bytes(Origin::Passthrough),
                by_peer: by_peer
                    .into_iter()
                    .map(|(k, v)| (k.to_string(), v))
                    .collect(),
                served_to_peers_bytes: metrics.peer_sent.get(),
                served_to_clients_bytes: metrics.client_sent.get(),
                registry_manifest_bytes: metrics.registry_other.get(),
            },
        }
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    // The version of Prometheus' text format is part of its media type.
    respond(status, "text/plain; version=0.0.4; charset=utf-8", body)
}

fn respond(
    status: StatusCode,
    media_type: &'static str,
    body: impl Into<Bytes>,
) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    let value = http::HeaderValue::from_static(media_type);
    response.headers_mut().insert(header::CONTENT_TYPE, value);
    response
}

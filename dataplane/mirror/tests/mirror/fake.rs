//! A backend that plays a script and writes down what it was asked.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::future::BoxFuture;
use futures_util::{FutureExt, StreamExt, stream};
use http::header::{HeaderMap, HeaderName, HeaderValue};
use http::{Method, StatusCode};
use pantala_mirror::manifest_cache::digest_of;
use pantala_mirror::{
    Backend, BackendError, BackendErrorKind, BlobOpen, BlobProbe, BlobVerdict, BodyStream, Mirror,
    MirrorConfig, MirrorEvent, Policy, UpstreamReply, UpstreamRequest,
};
use pantala_wire::BlobDigest;
use parking_lot::Mutex;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::wire::Wire;

type Script<A, R> =
    Mutex<Arc<dyn Fn(A) -> BoxFuture<'static, Result<R, BackendError>> + Send + Sync>>;

/// The backend. Until told otherwise it holds one blob, which anyone may read.
pub(crate) struct Fake {
    pub(crate) blob: Bytes,
    pub(crate) exchanges: Mutex<Vec<UpstreamRequest>>,
    pub(crate) probes: Mutex<Vec<BlobProbe>>,
    pub(crate) opens: Mutex<Vec<BlobOpen>>,
    pub(crate) events: Mutex<Vec<MirrorEvent>>,
    on_exchange: Script<UpstreamRequest, UpstreamReply>,
    on_probe: Script<BlobProbe, BlobVerdict>,
    on_open: Script<BlobOpen, BodyStream>,
}

impl Fake {
    pub(crate) fn new() -> Self {
        let blob: Bytes = (0..200_000_u32).map(|n| (n % 251) as u8).collect();
        let size_bytes = blob.len() as u64;
        let served = blob.clone();
        Self {
            blob,
            exchanges: Mutex::default(),
            probes: Mutex::default(),
            opens: Mutex::default(),
            events: Mutex::default(),
            on_exchange: Mutex::new(Arc::new(|_| {
                async { Ok(reply(404, &[], "{\"errors\":[]}")) }.boxed()
            })),
            on_probe: Mutex::new(Arc::new(move |_| {
                async move { Ok(BlobVerdict::Readable { size_bytes }) }.boxed()
            })),
            on_open: Mutex::new(Arc::new(move |open| {
                let body = chunks(&served, &open, 65_536);
                async move { Ok(body) }.boxed()
            })),
        }
    }

    pub(crate) fn digest(&self) -> BlobDigest {
        digest_of(&self.blob)
    }

    pub(crate) fn blob_path(&self) -> String {
        format!("/v2/team/app/blobs/{}", self.digest())
    }

    pub(crate) fn exchange_by<F, R>(&self, script: F)
    where
        F: Fn(UpstreamRequest) -> R + Send + Sync + 'static,
        R: Future<Output = Result<UpstreamReply, BackendError>> + Send + 'static,
    {
        *self.on_exchange.lock() = Arc::new(move |request| script(request).boxed());
    }

    pub(crate) fn probe_by<F, R>(&self, script: F)
    where
        F: Fn(BlobProbe) -> R + Send + Sync + 'static,
        R: Future<Output = Result<BlobVerdict, BackendError>> + Send + 'static,
    {
        *self.on_probe.lock() = Arc::new(move |probe| script(probe).boxed());
    }

    pub(crate) fn open_by<F, R>(&self, script: F)
    where
        F: Fn(BlobOpen) -> R + Send + Sync + 'static,
        R: Future<Output = Result<BodyStream, BackendError>> + Send + 'static,
    {
        *self.on_open.lock() = Arc::new(move |open| script(open).boxed());
    }

    /// The methods of the exchanges so far.
    pub(crate) fn exchanged(&self) -> Vec<Method> {
        self.exchanges
            .lock()
            .iter()
            .map(|r| r.method.clone())
            .collect()
    }
}

impl Backend for Fake {
    async fn exchange(&self, request: UpstreamRequest) -> Result<UpstreamReply, BackendError> {
        self.exchanges.lock().push(request.clone());
        let script = self.on_exchange.lock().clone();
        script(request).await
    }
    async fn probe_blob(&self, request: BlobProbe) -> Result<BlobVerdict, BackendError> {
        self.probes.lock().push(request.clone());
        let script = self.on_probe.lock().clone();
        script(request).await
    }
    async fn open_blob(&self, request: BlobOpen) -> Result<BodyStream, BackendError> {
        self.opens.lock().push(request.clone());
        let script = self.on_open.lock().clone();
        script(request).await
    }
    fn metrics_text(&self) -> String {
        "pantala_up 1\n".to_owned()
    }
    fn observe(&self, event: MirrorEvent) {
        self.events.lock().push(event);
    }
}

/// The bytes that `open` asks for, in chunks.
pub(crate) fn chunks(blob: &Bytes, open: &BlobOpen, chunk_bytes: usize) -> BodyStream {
    let wanted = blob.slice(open.range.start() as usize..open.range.end() as usize);
    let parts: Vec<_> = (0..wanted.len())
        .step_by(chunk_bytes)
        .map(|at| Ok(wanted.slice(at..(at + chunk_bytes).min(wanted.len()))))
        .collect();
    stream::iter(parts).boxed()
}

/// A registry's reply.
pub(crate) fn reply(
    status: u16,
    headers: &[(&str, &str)],
    body: impl Into<Bytes>,
) -> UpstreamReply {
    let body: Bytes = body.into();
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        map.append(
            HeaderName::from_bytes(name.as_bytes()).unwrap(),
            HeaderValue::from_str(value).unwrap(),
        );
    }
    UpstreamReply {
        status: StatusCode::from_u16(status).unwrap(),
        headers: map,
        body: stream::iter([Ok(body)]).boxed(),
    }
}

pub(crate) fn failure(kind: BackendErrorKind) -> BackendError {
    BackendError::new(kind, "scripted failure").with_hint("read the script")
}

/// Never.
pub(crate) async fn hang<T>() -> T {
    std::future::pending().await
}

/// A mirror that serves until dropped.
pub(crate) struct Serving {
    pub(crate) fake: Arc<Fake>,
    pub(crate) address: std::net::SocketAddr,
    pub(crate) stop: Option<oneshot::Sender<()>>,
    pub(crate) task: JoinHandle<()>,
}

impl Serving {
    pub(crate) async fn connect(&self) -> Wire {
        Wire::connect(self.address).await
    }
}

/// The policy of the tests: one registry under two names, nothing else.
pub(crate) fn policy(allow_any: bool) -> Policy {
    let table = [(
        "registry.test:5000".to_owned(),
        "http://127.0.0.1:25000".parse().unwrap(),
    )];
    Policy::new("registry.test:5000", table.into(), allow_any).unwrap()
}

pub(crate) fn config() -> MirrorConfig {
    let mut config = MirrorConfig::new("127.0.0.1:0".parse().unwrap(), policy(false));
    config.drain_timeout = Duration::from_secs(5);
    config
}

pub(crate) async fn serve(fake: Fake, config: MirrorConfig) -> Serving {
    let fake = Arc::new(fake);
    let mirror = Mirror::bind(config, fake.clone()).await.unwrap();
    let address = mirror.local_addr();
    let (stop, stopped) = oneshot::channel();
    let task = tokio::spawn(mirror.serve(async move {
        let _ = stopped.await;
    }));
    Serving {
        fake,
        address,
        stop: Some(stop),
        task,
    }
}

//! A registry that counts its bytes and fails on demand.

use std::collections::HashMap;
use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures_util::StreamExt;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, StreamBody, combinators::BoxBody};
use hyper::body::{Frame, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use parking_lot::Mutex;
use tokio::net::TcpListener;

type Body = BoxBody<Bytes, std::io::Error>;

/// Bytes sent at once; small, so that a cut or a count falls anywhere.
const CHUNK: usize = 32 * 1024;

#[derive(Default)]
pub(crate) struct State {
    blobs: Mutex<HashMap<String, Bytes>>,
    /// Blob body bytes handed to connections.
    pub(crate) sent_bytes: AtomicU64,
    pub(crate) gets: AtomicUsize,
    pub(crate) heads: AtomicUsize,
    /// Answer every request with this status; 0: none.
    pub(crate) status: AtomicUsize,
    /// The same for `HEAD` and for `GET` alone.
    pub(crate) head_status: AtomicUsize,
    pub(crate) get_status: AtomicUsize,
    /// State this size of every blob; 0: the right one.
    pub(crate) stated_size: AtomicU64,
    /// Answer 503 to ranges of exactly so many bytes.
    pub(crate) refused_len: AtomicU64,
    /// Cut each body after so many bytes; 0: never.
    pub(crate) cut_after: AtomicUsize,
    /// Flip a bit of every body.
    pub(crate) corrupt: AtomicBool,
    /// Answer ranges with the whole.
    pub(crate) ignore_range: AtomicBool,
    /// Accept and never answer.
    pub(crate) silent: AtomicBool,
    /// Pause between chunks.
    pub(crate) chunk_pause_us: AtomicU64,
    /// The `Authorization` that is let in; everybody where `None`.
    pub(crate) authorization: Mutex<Option<String>>,
}

#[derive(Clone)]
pub(crate) struct Registry {
    pub(crate) address: SocketAddr,
    pub(crate) state: Arc<State>,
}

impl Registry {
    pub(crate) async fn start() -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let state = Arc::new(State::default());
        let serving = Arc::clone(&state);
        tokio::spawn(async move {
            loop {
                let (stream, _) = listener.accept().await.unwrap();
                let state = Arc::clone(&serving);
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let state = Arc::clone(&state);
                        async move { Ok::<_, Infallible>(answer(&state, request).await) }
                    });
                    // A cut is an error here, and wanted.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Self { address, state }
    }

    pub(crate) fn add(&self, digest: &str, data: Bytes) {
        self.state.blobs.lock().insert(digest.to_owned(), data);
    }

    pub(crate) fn sent(&self) -> u64 {
        self.state.sent_bytes.load(Ordering::SeqCst)
    }
}

fn status(status: StatusCode) -> Response<Body> {
    let body = Full::new(Bytes::new()).map_err(|never| match never {});
    let mut response = Response::new(body.boxed());
    *response.status_mut() = status;
    response
}

fn parse_range(value: &str, size: u64) -> Option<(u64, u64)> {
    let last_byte = size.checked_sub(1)?;
    let (first, last) = value.strip_prefix("bytes=")?.split_once('-')?;
    let first = first.parse().ok()?;
    let last = if last.is_empty() {
        last_byte
    } else {
        last.parse().ok()?
    };
    Some((first, last.min(last_byte) + 1))
}

async fn answer(state: &Arc<State>, request: Request<Incoming>) -> Response<Body> {
    if state.silent.load(Ordering::SeqCst) {
        return std::future::pending().await;
    }
    let of_method = match *request.method() {
        Method::HEAD => &state.head_status,
        _ => &state.get_status,
    };
    let forced = state
        .status
        .load(Ordering::SeqCst)
        .max(of_method.load(Ordering::SeqCst));
    if forced != 0 {
        return status(StatusCode::from_u16(forced as u16).unwrap());
    }
    let allowed = state.authorization.lock().clone();
    let shown = request.headers().get(header::AUTHORIZATION);
    if let Some(allowed) = allowed
        && shown.is_none_or(|value| value.as_bytes() != allowed.as_bytes())
    {
        let mut response = status(StatusCode::UNAUTHORIZED);
        let challenge = http::HeaderValue::from_static("Basic realm=\"test\"");
        response
            .headers_mut()
            .insert(header::WWW_AUTHENTICATE, challenge);
        return response;
    }
    let digest = request
        .uri()
        .path()
        .rsplit('/')
        .next()
        .unwrap_or("")
        .to_owned();
    let Some(data) = state.blobs.lock().get(&digest).cloned() else {
        return status(StatusCode::NOT_FOUND);
    };
    let size = data.len() as u64;
    let range = request
        .headers()
        .get(header::RANGE)
        .filter(|_| !state.ignore_range.load(Ordering::SeqCst))
        .and_then(|value| parse_range(value.to_str().ok()?, size));
    let (start, end) = range.unwrap_or((0, size));
    let refused_len = state.refused_len.load(Ordering::SeqCst);
    if range.is_some() && refused_len > 0 && end - start == refused_len {
        return status(StatusCode::SERVICE_UNAVAILABLE);
    }
    let stated = match state.stated_size.load(Ordering::SeqCst) {
        0 => size,
        stated => stated,
    };
    let is_head = request.method() == Method::HEAD;
    let length = if is_head { stated } else { end - start };
    let mut response = Response::builder()
        .header(header::CONTENT_LENGTH, length)
        .header(header::ACCEPT_RANGES, "bytes")
        .header("Docker-Content-Digest", &digest);
    if range.is_some() {
        response = response.status(StatusCode::PARTIAL_CONTENT).header(
            header::CONTENT_RANGE,
            format!("bytes {start}-{}/{stated}", end - 1),
        );
    }
    if is_head {
        state.heads.fetch_add(1, Ordering::SeqCst);
        return response.body(status(StatusCode::OK).into_body()).unwrap();
    }
    state.gets.fetch_add(1, Ordering::SeqCst);
    response
        .body(body(state, data.slice(start as usize..end as usize)))
        .unwrap()
}

fn body(state: &Arc<State>, mut data: Bytes) -> Body {
    if state.corrupt.load(Ordering::SeqCst) {
        let mut bytes = data.to_vec();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        data = bytes.into();
    }
    let cut_after = match state.cut_after.load(Ordering::SeqCst) {
        0 => usize::MAX,
        bytes => bytes,
    };
    let state = Arc::clone(state);
    let chunks = futures_util::stream::unfold((data, 0usize), move |(mut rest, sent)| {
        let state = Arc::clone(&state);
        async move {
            if rest.is_empty() {
                return None;
            }
            if sent >= cut_after {
                return Some((
                    Err(std::io::Error::other("cut on demand")),
                    (Bytes::new(), sent),
                ));
            }
            let pause = state.chunk_pause_us.load(Ordering::SeqCst);
            if pause > 0 {
                tokio::time::sleep(Duration::from_micros(pause)).await;
            }
            let chunk = rest.split_to(rest.len().min(CHUNK));
            state
                .sent_bytes
                .fetch_add(chunk.len() as u64, Ordering::SeqCst);
            let sent = sent + chunk.len();
            Some((Ok(chunk), (rest, sent)))
        }
    });
    BodyExt::boxed(StreamBody::new(chunks.map(|chunk| chunk.map(Frame::data))))
}

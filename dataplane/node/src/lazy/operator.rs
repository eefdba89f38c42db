//! Mounts and unmounts asked for by the administrator of this machine: HTTP on a unix socket.
//!
//! The socket lies in a directory that is closed to other users, and only the node's own user is served:
//! whoever may mount here may hide any directory of the machine.

use std::convert::Infallible;
use std::os::fd::AsRawFd;
use std::path::Path;
use std::sync::Arc;

use anyhow::Context;
use bytes::Bytes;
use http::{Method, Request, Response, StatusCode, header};
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use pantala_source::Credential;
use serde::{Deserialize, Serialize};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::Semaphore;

use super::{Lazy, LazyError, MountRequest, adopt};

/// The socket's name in the directory of lazy mounts.
pub const SOCKET: &str = "operator.sock";
/// Requests under way; a mount takes as long as its metadata. Who comes then waits.
const CONNECTIONS_MAX: usize = 64;
/// An image's name and a path.
const BODY_BYTES_MAX: usize = 64 << 10;

/// The body of `POST /mounts`; a login comes as its `Authorization`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MountBody {
    /// The image.
    pub image: String,
    /// The directory.
    pub at: String,
}

/// The body of `POST /unmount`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct UnmountBody {
    /// The directory.
    pub at: String,
}

/// The path of the socket in `dir` that fits into an address: through a descriptor of the directory.
///
/// # Errors
/// Where the directory cannot be opened.
pub fn socket_in(dir: &Path) -> std::io::Result<(std::fs::File, String)> {
    let dir = std::fs::File::open(dir)?;
    let path = format!("/proc/self/fd/{}/{SOCKET}", dir.as_raw_fd());
    Ok((dir, path))
}

/// Serves the operator's socket until dropped.
pub struct Operator {
    listener: UnixListener,
    lazy: Arc<Lazy>,
}

impl Operator {
    /// Listens in the directory of lazy mounts, which it makes.
    ///
    /// # Errors
    /// Where it cannot.
    pub fn bind(lazy: Arc<Lazy>) -> anyhow::Result<Self> {
        use std::os::unix::fs::DirBuilderExt;
        let dir = &lazy.settings.dir;
        let what = || format!("cannot listen in {}", dir.display());
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700);
        builder.create(dir).with_context(what)?;
        match std::fs::remove_file(dir.join(SOCKET)) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                return Err(error).with_context(what);
            }
            _ => {}
        }
        let (_dir, path) = socket_in(dir).with_context(what)?;
        let listener = UnixListener::bind(path).with_context(what)?;
        Ok(Self { listener, lazy })
    }

    /// Serves until dropped.
    pub async fn serve(self) -> Infallible {
        let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return std::future::pending().await;
            };
            let stream = match self.listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "an operator's connection is not accepted");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            };
            if !is_own_user(&stream) {
                tracing::warn!("another user asked for a lazy mount, and is not served");
                continue;
            }
            let lazy = Arc::clone(&self.lazy);
            tokio::spawn(async move {
                let service = service_fn(|request| {
                    let lazy = Arc::clone(&lazy);
                    // What was begun is brought to its end, whoever goes away.
                    let answer = tokio::spawn(async move { answer(&lazy, request).await });
                    async move {
                        let failed = |e: tokio::task::JoinError| {
                            text(StatusCode::INTERNAL_SERVER_ERROR, e.to_string())
                        };
                        Ok::<_, Infallible>(answer.await.unwrap_or_else(failed))
                    }
                });
                let served = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service)
                    .await;
                if let Err(error) = served {
                    tracing::debug!(%error, "an operator's connection ended early");
                }
                drop(place);
            });
        }
    }
}

fn is_own_user(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    stream.peer_cred().is_ok_and(|peer| peer.uid() == own)
}

async fn answer(lazy: &Arc<Lazy>, request: Request<Incoming>) -> Response<Full<Bytes>> {
    let route = (request.method().clone(), request.uri().path().to_owned());
    let authorization = request.headers().get(header::AUTHORIZATION);
    let credential = authorization.map_or(Credential::ANONYMOUS, |value| {
        adopt::credential(value.as_bytes())
    });
    let body = match Limited::new(request.into_body(), BODY_BYTES_MAX)
        .collect()
        .await
    {
        Ok(body) => body.to_bytes(),
        Err(error) => return text(StatusCode::BAD_REQUEST, error.to_string()),
    };
    match (&route.0, route.1.as_str()) {
        (&Method::POST, "/mounts") => match serde_json::from_slice::<MountBody>(&body) {
            Ok(MountBody { image, at }) => {
                let request = MountRequest {
                    image,
                    at: at.into(),
                    credential,
                };
                match lazy.mount(request).await {
                    Ok(summary) => json(&summary),
                    Err(error) => refused(&error),
                }
            }
            Err(error) => text(StatusCode::BAD_REQUEST, error.to_string()),
        },
        (&Method::POST, "/unmount") => match serde_json::from_slice::<UnmountBody>(&body) {
            Ok(UnmountBody { at }) => match lazy.unmount(Path::new(&at)).await {
                Ok(()) => json(&serde_json::json!({})),
                Err(error) => refused(&error),
            },
            Err(error) => text(StatusCode::BAD_REQUEST, error.to_string()),
        },
        _ => text(
            StatusCode::NOT_FOUND,
            "there are POST /mounts and POST /unmount",
        ),
    }
}

fn refused(error: &LazyError) -> Response<Full<Bytes>> {
    tracing::warn!(%error, "a lazy mount was not changed");
    text(StatusCode::CONFLICT, error.to_string())
}

fn json(value: &impl Serialize) -> Response<Full<Bytes>> {
    match serde_json::to_vec(value) {
        Ok(body) => {
            let mut response = Response::new(Full::new(body.into()));
            let value = http::HeaderValue::from_static("application/json");
            response.headers_mut().insert(header::CONTENT_TYPE, value);
            response
        }
        Err(error) => text(StatusCode::INTERNAL_SERVER_ERROR, error.to_string()),
    }
}

fn text(status: StatusCode, body: impl Into<Bytes>) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response
}

//! `CONNECT host:port`: a bounded number of tunnels, to allowed hosts and addresses only.

use std::io;
use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use http::{Request, Response, StatusCode};
use hyper::body::Incoming;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite, copy_bidirectional};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_util::io::InspectReader;

use crate::backend::{Backend, MirrorEvent};
use crate::policy::Policy;
use crate::reply::{Payload, Reject};
use crate::service::Shared;
use crate::upstream::UpstreamUrl;

/// Addresses of one name that are tried: both families, and a spare of each.
const ADDRESSES_TRIED_MAX: usize = 4;

/// Connects, answers 200, and carries bytes until either side ends, nothing moves, or the mirror
/// stops.
pub(crate) async fn open<B: Backend>(
    shared: &Arc<Shared<B>>,
    request: Request<Incoming>,
) -> Result<Response<Payload>, Reject> {
    let Some(authority) = request.uri().authority() else {
        return Err(Reject::new(
            StatusCode::BAD_REQUEST,
            "UNSUPPORTED",
            "CONNECT without a target",
        )
        .with_hint("CONNECT takes host:port"));
    };
    let target = shared.config.policy.allows_tunnel(authority.as_str())?;
    tracing::Span::current().record("upstream", target.host_and_port());
    let permit = shared
        .tunnels
        .clone()
        .try_acquire_owned()
        .map_err(|_| Reject::overloaded("too many tunnels are open"))?;
    let limit = shared.config.tunnel_connect_timeout;
    let stream = timeout(limit, connect(&shared.config.policy, &target))
        .await
        .map_err(|_| Reject::late("the tunnel's target did not answer", limit))??;
    let upgrade = hyper::upgrade::on(request);
    let idle = shared.config.tunnel_idle_timeout;
    let stop = shared.stop.clone();
    let backend = shared.backend.clone();
    shared.tasks.spawn(async move {
        let _permit = permit;
        let carried = async {
            match upgrade.await {
                Ok(client) => carry(TokioIo::new(client), stream, idle).await,
                Err(error) => {
                    tracing::debug!(%error, "the client left before its tunnel was open");
                    (0, 0)
                }
            }
        };
        let (sent_bytes, received_bytes) = tokio::select! {
            carried = carried => carried,
            () = stop.cancelled() => (0, 0),
        };
        backend.observe(MirrorEvent::TunnelEnded {
            sent_bytes,
            received_bytes,
        });
    });
    Ok(Response::new(Payload::Empty))
}

async fn connect(policy: &Policy, target: &UpstreamUrl) -> Result<TcpStream, Reject> {
    let addresses = resolve(target)
        .await
        .map_err(|error| unreachable(target, &error))?;
    // Each address is checked, and the very address that was checked is connected to: a name
    // that changes its mind in between gains nothing.
    let allowed: Vec<SocketAddr> = addresses
        .into_iter()
        .filter(|address| policy.allows_address(address.ip()))
        .take(ADDRESSES_TRIED_MAX)
        .collect();
    if allowed.is_empty() {
        return Err(Reject::new(
            StatusCode::FORBIDDEN,
            "DENIED",
            format!(
                "{} has no address that may be connected to",
                target.host_and_port()
            ),
        )
        .with_hint("link-local, metadata, unspecified and multicast addresses are never served"));
    }
    let mut last = io::Error::from(io::ErrorKind::NotFound);
    for address in allowed {
        match TcpStream::connect(address).await {
            Ok(stream) => {
                // Latency over packet count: a tunnel carries handshakes and small requests too.
                if let Err(error) = stream.set_nodelay(true) {
                    tracing::debug!(%error, "a tunnel goes without TCP_NODELAY");
                }
                return Ok(stream);
            }
            Err(error) => last = error,
        }
    }
    Err(unreachable(target, &last))
}

async fn resolve(target: &UpstreamUrl) -> io::Result<Vec<SocketAddr>> {
    if let Some(address) = target.literal_address() {
        let address: IpAddr = address;
        return Ok(vec![SocketAddr::new(address, target.port())]);
    }
    Ok(tokio::net::lookup_host((target.host(), target.port()))
        .await?
        .collect())
}

fn unreachable(target: &UpstreamUrl, error: &io::Error) -> Reject {
    Reject::new(
        StatusCode::BAD_GATEWAY,
        "UNAVAILABLE",
        format!("cannot connect to {}: {error}", target.host_and_port()),
    )
    .with_hint("check that the host is up and the port is right")
}

/// Bytes both ways; gives how many went each way.
async fn carry<C>(client: C, target: TcpStream, idle: Duration) -> (u64, u64)
where
    C: AsyncRead + AsyncWrite + Unpin,
{
    let sent = AtomicU64::new(0);
    let received = AtomicU64::new(0);
    {
        let mut client = InspectReader::new(client, |chunk: &[u8]| {
            sent.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        });
        let mut target = InspectReader::new(target, |chunk: &[u8]| {
            received.fetch_add(chunk.len() as u64, Ordering::Relaxed);
        });
        let total = || sent.load(Ordering::Relaxed) + received.load(Ordering::Relaxed);
        let gone_idle = async {
            loop {
                let before = total();
                tokio::time::sleep(idle).await;
                if total() == before {
                    return;
                }
            }
        };
        tokio::select! {
            ended = copy_bidirectional(&mut client, &mut target) => {
                if let Err(error) = ended {
                    tracing::debug!(%error, "a tunnel broke");
                }
            }
            () = gone_idle => tracing::debug!("a tunnel carried nothing for too long"),
        }
    }
    (sent.into_inner(), received.into_inner())
}

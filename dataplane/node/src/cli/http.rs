//! One GET from the node's own HTTP servers, bounded in time and size.

use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty, Limited};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

use super::failure::Failure;

/// A node on the same machine answers at once or has a problem.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(5);
/// Status of a node with 100,000 tasks and 1,000 peers stays below this.
const BODY_MAX_BYTES: usize = 64 << 20;

/// The body at `path` of the server at `address`.
pub(super) async fn get(address: SocketAddr, path: &str) -> Result<Bytes, Failure> {
    let answer = tokio::time::timeout(ANSWER_TIMEOUT, try_get(address, path)).await;
    answer.map_err(|_| {
        Failure::new(format!(
            "{address} accepted the connection but does not answer"
        ))
        .hint("is that the admin address of a Pantala node? see `pantala status --admin`")
    })?
}

async fn try_get(address: SocketAddr, path: &str) -> Result<Bytes, Failure> {
    let stream = TcpStream::connect(address).await.map_err(|e| {
        Failure::new(format!("no node answers at {address}: {e}"))
            .hint("start one with `pantala node`, or give its admin address with --admin")
    })?;
    let strange = |e: &dyn std::fmt::Display| {
        Failure::new(format!("{address} does not answer like a node: {e}"))
            .hint("give the admin address (default 127.0.0.1:65002), not that of the mirror")
    };
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| strange(&e))?;
    let connection = tokio::spawn(connection);
    let request = http::Request::get(path)
        .header(http::header::HOST, address.to_string())
        .body(Empty::<Bytes>::new())
        .map_err(|e| strange(&e))?;
    let answer = sender
        .send_request(request)
        .await
        .map_err(|e| strange(&e))?;
    if answer.status() != http::StatusCode::OK {
        return Err(strange(&format!("{path} gives {}", answer.status())));
    }
    let body = Limited::new(answer.into_body(), BODY_MAX_BYTES)
        .collect()
        .await
        .map_err(|e| strange(&e))?;
    connection.abort();
    Ok(body.to_bytes())
}

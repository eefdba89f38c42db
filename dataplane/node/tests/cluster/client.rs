//! An HTTP client that tells a cut body from a whole one.

use std::net::SocketAddr;

use bytes::Bytes;
use http::Request;
use http_body_util::{BodyExt, Empty};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;

/// A request that brought no whole answer.
#[derive(Debug)]
#[expect(dead_code, reason = "shown by the assertion that fails")]
pub(crate) enum Failure {
    /// No answer at all.
    NoAnswer(String),
    /// A status, then a body that was cut after so many bytes.
    Cut(u16, usize),
}

/// Gets `path`; the whole body, or how it failed.
pub(crate) async fn get(
    address: SocketAddr,
    path: &str,
    headers: &[(&str, &str)],
) -> Result<(u16, Bytes), Failure> {
    let no_answer = |error: &dyn std::fmt::Display| Failure::NoAnswer(error.to_string());
    let stream = TcpStream::connect(address)
        .await
        .map_err(|e| no_answer(&e))?;
    let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
        .await
        .map_err(|e| no_answer(&e))?;
    let driver = tokio::spawn(connection);
    let mut request = Request::get(path).header("Host", address.to_string());
    for (name, value) in headers {
        request = request.header(*name, *value);
    }
    let response = sender
        .send_request(request.body(Empty::<Bytes>::new()).unwrap())
        .await
        .map_err(|e| no_answer(&e))?;
    let status = response.status().as_u16();
    let mut body = response.into_body();
    let mut data = Vec::new();
    while let Some(frame) = body.frame().await {
        match frame {
            Ok(frame) => data.extend_from_slice(frame.data_ref().unwrap_or(&Bytes::new())),
            Err(_) => return Err(Failure::Cut(status, data.len())),
        }
    }
    driver.abort();
    Ok((status, data.into()))
}

/// The path of a blob, by the mirror's `ns` convention.
pub(crate) fn blob_path(repository: &str, digest: &str) -> String {
    format!("/v2/{repository}/blobs/{digest}?ns=registry.test")
}

/// Pulls as containerd does: resumes with a range where the body is cut; the bytes, or the last
/// answer.
pub(crate) async fn pull(
    address: SocketAddr,
    repository: &str,
    digest: &str,
) -> Result<(u16, Bytes), Failure> {
    get(address, &blob_path(repository, digest), &[]).await
}

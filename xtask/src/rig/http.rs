//! A plain HTTP client for looking at the rig's programs, and for clients that tests play themselves.

use std::time::Duration;

use anyhow::{Context, Result};
use bytes::Bytes;
use sha2::{Digest, Sha256};

/// How long a request for a small document may take.
const SMALL_MAX: Duration = Duration::from_secs(5);

/// A client that uses no proxy, follows no redirect and keeps no idle connection.
pub(crate) fn client() -> Result<reqwest::Client> {
    reqwest::Client::builder()
        .no_proxy()
        .redirect(reqwest::redirect::Policy::none())
        .http1_only()
        .pool_max_idle_per_host(0)
        .build()
        .context("building the HTTP client")
}

/// Makes ring the TLS provider of this process. Harmless when repeated.
pub(crate) fn install_tls_provider() {
    let _ = rustls::crypto::ring::default_provider().install_default();
}

/// A small document.
pub(crate) async fn get_text(url: &str) -> Result<String> {
    let response = client()?.get(url).timeout(SMALL_MAX).send().await?;
    Ok(response.error_for_status()?.text().await?)
}

/// Whether `url` is answered with a success.
pub(crate) async fn answers(url: &str) -> bool {
    let Ok(client) = client() else { return false };
    client
        .get(url)
        .timeout(SMALL_MAX)
        .send()
        .await
        .is_ok_and(|response| response.status().is_success())
}

/// What came of a download: status, headers, the digest of the body, and how it ended.
#[derive(Debug)]
pub(crate) struct Download {
    pub(crate) status: u16,
    pub(crate) headers: reqwest::header::HeaderMap,
    pub(crate) bytes: u64,
    pub(crate) sha256: String,
    /// The first bytes of the body, for messages.
    pub(crate) head: Bytes,
    /// Why the body ended early, if it did.
    pub(crate) cut: Option<String>,
    pub(crate) first_byte: Duration,
    pub(crate) took: Duration,
}

impl Download {
    /// Whether exactly the blob `digest` (`sha256:...`) arrived with status 200.
    pub(crate) fn is(&self, digest: &str) -> bool {
        self.status == 200 && self.cut.is_none() && format!("sha256:{}", self.sha256) == digest
    }

    /// One line for messages.
    pub(crate) fn summary(&self) -> String {
        let text = String::from_utf8_lossy(&self.head[..self.head.len().min(200)]).into_owned();
        format!(
            "status {}, {} bytes, first after {:.2?}, end after {:.2?}{}{}",
            self.status,
            self.bytes,
            self.first_byte,
            self.took,
            self.cut
                .as_ref()
                .map(|cut| format!(", cut: {cut}"))
                .unwrap_or_default(),
            if self.status >= 400 {
                format!(", says: {}", text.trim())
            } else {
                String::new()
            },
        )
    }
}

/// Downloads `url` within `limit` and keeps the digest of the body only.
pub(crate) async fn download(
    url: &str,
    headers: &[(&str, &str)],
    limit: Duration,
) -> Result<Download> {
    // Making the client is no part of what is timed.
    let mut request = client()?.get(url);
    let start = std::time::Instant::now();
    let work = async {
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let mut response = request.send().await.with_context(|| format!("GET {url}"))?;
        let mut download = Download {
            status: response.status().as_u16(),
            headers: response.headers().clone(),
            bytes: 0,
            sha256: String::new(),
            head: Bytes::new(),
            cut: None,
            first_byte: start.elapsed(),
            took: Duration::ZERO,
        };
        let mut hash = Sha256::new();
        loop {
            match response.chunk().await {
                Ok(Some(chunk)) => {
                    if download.bytes == 0 {
                        download.first_byte = start.elapsed();
                        download.head = chunk.clone();
                    }
                    download.bytes += chunk.len() as u64;
                    hash.update(&chunk);
                }
                Ok(None) => break,
                Err(error) => {
                    download.cut = Some(format!("{:#}", anyhow::Error::from(error)));
                    break;
                }
            }
        }
        download.sha256 = hex::encode(hash.finalize());
        download.took = start.elapsed();
        Ok(download)
    };
    tokio::time::timeout(limit, work)
        .await
        .with_context(|| format!("GET {url} has not ended within {limit:?}"))?
}

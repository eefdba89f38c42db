//! An origin on loopback that does as its script says, lies included: raw bytes on a socket.
//!
//! Fault model: an origin may answer anything, at any length, at any speed, or not at all; it may
//! close at any byte; it may send elsewhere. It cannot break TLS.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

use pantala_source::{BlobInfo, Credential, Source, SourceConfig, SourceError, Upstream};
use pantala_wire::{BlobDigest, ByteRange};
use sha2::Digest as _;

/// One thing that an origin does on a connection.
pub(crate) enum Act {
    Send(Vec<u8>),
    Wait(Duration),
    /// Keeps the connection open and says nothing more.
    Hang,
    Close,
}

/// A request as it came.
#[derive(Debug, Clone)]
pub(crate) struct Seen {
    pub(crate) method: String,
    pub(crate) target: String,
    pub(crate) headers: Vec<(String, String)>,
}

impl Seen {
    pub(crate) fn header(&self, name: &str) -> Option<&str> {
        self.all(name).into_iter().next()
    }

    pub(crate) fn all(&self, name: &str) -> Vec<&str> {
        self.headers
            .iter()
            .filter(|(key, _)| key.eq_ignore_ascii_case(name))
            .map(|(_, value)| value.as_str())
            .collect()
    }

    /// The range asked for: first byte, and one past the last where it is named.
    pub(crate) fn range(&self) -> Option<(u64, u64)> {
        let (first, last) = self
            .header("range")?
            .strip_prefix("bytes=")?
            .split_once('-')?;
        Some((first.parse().unwrap(), last.parse::<u64>().unwrap() + 1))
    }

    fn parse(head: &str) -> Self {
        let mut lines = head.split("\r\n");
        let mut first = lines.next().unwrap().split(' ');
        Self {
            method: first.next().unwrap().to_owned(),
            target: first.next().unwrap().to_owned(),
            headers: lines
                .filter_map(|line| line.split_once(": "))
                .map(|(name, value)| (name.to_owned(), value.to_owned()))
                .collect(),
        }
    }
}

type Script = dyn Fn(usize, &Seen) -> Vec<Act> + Send + Sync;

pub(crate) struct Origin {
    pub(crate) address: SocketAddr,
    pub(crate) seen: Arc<Mutex<Vec<Seen>>>,
    task: JoinHandle<()>,
}

impl Drop for Origin {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Origin {
    /// Answers the n-th request (from 0) with what the script says.
    pub(crate) async fn start(
        script: impl Fn(usize, &Seen) -> Vec<Act> + Send + Sync + 'static,
    ) -> Self {
        Self::serve(None, script).await
    }

    pub(crate) async fn serve(
        tls: Option<TlsAcceptor>,
        script: impl Fn(usize, &Seen) -> Vec<Act> + Send + Sync + 'static,
    ) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen = Arc::new(Mutex::new(Vec::new()));
        let script: Arc<Script> = Arc::new(script);
        let count = Arc::new(AtomicUsize::new(0));
        let log = Arc::clone(&seen);
        let task = tokio::spawn(async move {
            loop {
                let (socket, _) = listener.accept().await.unwrap();
                socket.set_nodelay(true).unwrap();
                let (script, log, count) = (script.clone(), log.clone(), count.clone());
                let tls = tls.clone();
                tokio::spawn(async move {
                    match tls {
                        None => connection(socket, script, log, count).await,
                        Some(tls) => {
                            if let Ok(socket) = tls.accept(socket).await {
                                connection(socket, script, log, count).await;
                            }
                        }
                    }
                });
            }
        });
        Self {
            address,
            seen,
            task,
        }
    }

    pub(crate) fn upstream(&self) -> Upstream {
        self.url("").parse().unwrap()
    }

    pub(crate) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address)
    }

    pub(crate) fn requests(&self) -> Vec<Seen> {
        self.seen.lock().clone()
    }
}

async fn connection<S: AsyncRead + AsyncWrite + Unpin>(
    mut socket: S,
    script: Arc<Script>,
    log: Arc<Mutex<Vec<Seen>>>,
    count: Arc<AtomicUsize>,
) {
    let mut buffer = Vec::new();
    loop {
        let end = loop {
            if let Some(end) = buffer.windows(4).position(|w| w == b"\r\n\r\n") {
                break end;
            }
            match socket.read_buf(&mut buffer).await {
                Ok(0) | Err(_) => return,
                Ok(_) => {}
            }
        };
        let request = Seen::parse(std::str::from_utf8(&buffer[..end]).unwrap());
        buffer.drain(..end + 4);
        log.lock().push(request.clone());
        let number = count.fetch_add(1, Ordering::SeqCst);
        for act in script(number, &request) {
            match act {
                Act::Send(bytes) => {
                    if socket.write_all(&bytes).await.is_err() {
                        return;
                    }
                    let _ = socket.flush().await;
                }
                Act::Wait(time) => tokio::time::sleep(time).await,
                Act::Hang => std::future::pending().await,
                Act::Close => {
                    let _ = socket.shutdown().await;
                    return;
                }
            }
        }
    }
}

/// A head without `Content-Length`.
pub(crate) fn head(status: u16, headers: &[(&str, &str)]) -> Vec<u8> {
    let mut text = format!("HTTP/1.1 {status} Status\r\n");
    for (name, value) in headers {
        text += &format!("{name}: {value}\r\n");
    }
    (text + "\r\n").into_bytes()
}

/// An answer with a body of the right length.
pub(crate) fn reply(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Vec<Act> {
    let length = body.len().to_string();
    let mut headers = headers.to_vec();
    headers.push(("Content-Length", &length));
    vec![Act::Send([head(status, &headers), body.to_vec()].concat())]
}

/// What an honest registry answers for this blob.
pub(crate) fn honest(blob: &[u8], request: &Seen) -> Vec<Act> {
    honest_head(blob, request, |start, end| blob[start..end].to_vec())
}

/// The same head with another body.
pub(crate) fn honest_head(
    blob: &[u8],
    request: &Seen,
    body: impl Fn(usize, usize) -> Vec<u8>,
) -> Vec<Act> {
    let size = blob.len();
    if request.method == "HEAD" {
        return vec![Act::Send(head(
            200,
            &[
                ("Content-Length", &size.to_string()),
                ("Accept-Ranges", "bytes"),
            ],
        ))];
    }
    let (status, start, end) = match request.range() {
        Some((start, end)) => (206, start as usize, (end as usize).min(size)),
        None => (200, 0, size),
    };
    let content_range = format!("bytes {start}-{}/{size}", end - 1);
    let length = (end - start).to_string();
    let mut headers = vec![("Content-Length", length.as_str())];
    if status == 206 {
        headers.push(("Content-Range", &content_range));
    }
    vec![Act::Send(
        [head(status, &headers), body(start, end)].concat(),
    )]
}

/// Bytes that differ everywhere and are the same for the same seed.
pub(crate) fn blob(len: usize, seed: u64) -> Vec<u8> {
    let mut random = Random(seed);
    (0..len).map(|_| random.next() as u8).collect()
}

pub(crate) fn digest(blob: &[u8]) -> BlobDigest {
    BlobDigest::new(sha2::Sha256::digest(blob).into())
}

pub(crate) fn range(start: u64, end: u64) -> ByteRange {
    ByteRange::new(start, end).unwrap()
}

/// splitmix64.
pub(crate) struct Random(pub(crate) u64);

impl Random {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub(crate) fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }
}

/// Settings whose limits a test can wait for.
pub(crate) fn config() -> SourceConfig {
    SourceConfig {
        connect_timeout: Duration::from_secs(5),
        first_byte_timeout: Duration::from_secs(10),
        stall_timeout: Duration::from_secs(10),
        retries_max: 3,
        patience: Duration::from_secs(30),
        ..SourceConfig::default()
    }
}

pub(crate) fn source() -> Source {
    Source::new(config()).unwrap()
}

/// What a registry says of a blob of test/app to nobody in particular.
pub(crate) async fn probe(
    source: &Source,
    origin: &Origin,
    blob: &[u8],
) -> Result<BlobInfo, SourceError> {
    source
        .probe_blob(
            &origin.upstream(),
            &"test/app".parse().unwrap(),
            &digest(blob),
            &Credential::NONE,
        )
        .await
}

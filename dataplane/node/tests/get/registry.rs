//! A small registry of one image, with faults.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::{Arc, Mutex};

use sha2::{Digest, Sha256};

/// What goes wrong.
#[derive(Debug, Default, Clone)]
pub(crate) struct Faults {
    /// Each answer with a body ends after so many bytes of it.
    pub(crate) cut_after: Option<usize>,
    /// Blobs have one wrong byte.
    pub(crate) is_corrupt: bool,
    /// Ranges are answered with everything.
    pub(crate) ignores_range: bool,
    /// Requests need this user and password.
    pub(crate) login: Option<&'static str>,
}

/// A registry with one image, `team/app:v1`.
pub(crate) struct Registry {
    pub(crate) address: String,
    requests: Arc<Mutex<Vec<String>>>,
}

pub(crate) fn digest(bytes: &[u8]) -> String {
    format!("sha256:{}", hex(&Sha256::digest(bytes)))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// An image of a configuration and two layers, for this platform by way of an index.
pub(crate) fn image() -> BTreeMap<String, (String, Vec<u8>)> {
    let mut paths = BTreeMap::new();
    let mut blobs = Vec::new();
    for (i, size) in [300usize, 1_500_000, 70_001].into_iter().enumerate() {
        let bytes: Vec<u8> = (0..size)
            .map(|n| (n * 31 + i * 7 + n / 251) as u8)
            .collect();
        blobs.push(serde_json::json!({"digest": digest(&bytes), "size": size, "mediaType": "x/y"}));
        let path = format!("/v2/team/app/blobs/{}", digest(&bytes));
        paths.insert(path, ("application/octet-stream".into(), bytes));
    }
    let kind = "application/vnd.oci.image.manifest.v1+json";
    let manifest = serde_json::json!({
        "schemaVersion": 2, "mediaType": kind, "config": blobs[0], "layers": [blobs[1], blobs[2], blobs[1]],
    })
    .to_string()
    .into_bytes();
    let entry = |digest: String, architecture: &str| {
        serde_json::json!({
            "digest": digest, "size": manifest.len(), "mediaType": kind,
            "platform": {"os": "linux", "architecture": architecture},
        })
    };
    let index = serde_json::json!({
        "schemaVersion": 2,
        "manifests": [entry(format!("sha256:{}", "0".repeat(64)), "s390x"), entry(digest(&manifest), "amd64")],
    })
    .to_string()
    .into_bytes();
    let path = format!("/v2/team/app/manifests/{}", digest(&manifest));
    paths.insert(path, (kind.into(), manifest));
    let kind = "application/vnd.oci.image.index.v1+json";
    paths.insert("/v2/team/app/manifests/v1".into(), (kind.into(), index));
    paths.insert("/healthy".into(), ("text/plain".into(), b"ok".to_vec()));
    paths
}

impl Registry {
    pub(crate) fn start(faults: Faults) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap().to_string();
        let requests = Arc::new(Mutex::new(Vec::new()));
        let (log, paths) = (Arc::clone(&requests), Arc::new(image()));
        std::thread::spawn(move || {
            for stream in listener.incoming() {
                let (log, paths, faults) = (Arc::clone(&log), Arc::clone(&paths), faults.clone());
                std::thread::spawn(move || serve(stream.unwrap(), &paths, &faults, &log));
            }
        });
        Self { address, requests }
    }

    pub(crate) fn name(&self) -> String {
        format!("{}/team/app:v1", self.address)
    }

    pub(crate) fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }
}

/// One request of one connection: everything is closed after its answer.
fn serve(
    mut stream: TcpStream,
    paths: &BTreeMap<String, (String, Vec<u8>)>,
    faults: &Faults,
    log: &Mutex<Vec<String>>,
) {
    let mut lines = BufReader::new(stream.try_clone().unwrap()).lines();
    let Some(Ok(first)) = lines.next() else {
        return;
    };
    let mut headers = BTreeMap::new();
    for line in lines {
        let Ok(line) = line else { return };
        let Some((name, value)) = line.split_once(": ") else {
            break;
        };
        headers.insert(name.to_ascii_lowercase(), value.to_owned());
    }
    let range = headers.get("range").cloned();
    log.lock()
        .unwrap()
        .push(format!("{first} {}", range.clone().unwrap_or_default()));
    let path = first.split(' ').nth(1).unwrap_or_default().to_owned();
    let plain_path = path.split('?').next().unwrap_or_default();
    let is_head = first.starts_with("HEAD");
    let mut answer = |status: &str, more: &str, body: &[u8]| {
        let head = format!(
            "HTTP/1.1 {status}\r\nContent-Length: {}\r\nConnection: close\r\n{more}\r\n",
            body.len()
        );
        let sent = match faults.cut_after {
            Some(n) if plain_path.contains("/blobs/") => &body[..body.len().min(n)],
            _ => body,
        };
        let _ = stream.write_all(head.as_bytes());
        if !is_head {
            let _ = stream.write_all(sent);
        }
    };
    if let Some(login) = faults.login
        && plain_path != "/healthy"
        && headers.get("authorization").map(String::as_str) != Some(login)
    {
        let more = "WWW-Authenticate: Basic realm=\"r\"\r\n";
        return answer(
            "401 Unauthorized",
            more,
            b"{\"errors\":[{\"message\":\"who are you\"}]}",
        );
    }
    let Some((kind, body)) = paths.get(plain_path) else {
        return answer(
            "404 Not Found",
            "",
            b"{\"errors\":[{\"message\":\"unknown\"}]}",
        );
    };
    let mut body = body.clone();
    if faults.is_corrupt && plain_path.contains("/blobs/") {
        body[0] ^= 1;
    }
    let more = format!("Content-Type: {kind}\r\nAccept-Ranges: bytes\r\n");
    let wanted = range.filter(|_| !faults.ignores_range).and_then(|text| {
        let (start, end) = text.strip_prefix("bytes=")?.split_once('-')?;
        let end = end.parse().map_or(body.len(), |end: usize| end + 1);
        Some((start.parse::<usize>().ok()?, end.min(body.len())))
    });
    match wanted {
        Some((start, end)) => {
            let more = format!(
                "{more}Content-Range: bytes {start}-{}/{}\r\n",
                end - 1,
                body.len()
            );
            answer("206 Partial Content", &more, &body[start..end]);
        }
        None => answer("200 OK", &more, &body),
    }
}

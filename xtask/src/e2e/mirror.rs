//! The mirror as clients see it: ranges, headers, and input that no honest client sends.

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpStream, UdpSocket};
use std::os::unix::fs::FileExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::stage::{Cluster, PULL_MAX, REPOSITORY, get};
use super::{Outcome, Stage, Test, test};
use crate::rig::containerd::REGISTRY_NAME;
use crate::rig::http;
use crate::rig::image::Image;

const IMAGE_MB: u64 = 24;
/// A node that was sent garbage must not have grown past this.
const GARBAGE_MEMORY_MAX: u64 = 256 << 20;
/// How long the mirror may take to say no.
const REFUSAL_MAX: Duration = Duration::from_secs(20);

pub(super) fn tests() -> Vec<Test> {
    vec![
        test!("mirror: ranges are exact, cold and warm", ranges),
        test!(
            "mirror: many overlapping ranges of a cold blob read the registry once",
            overlapping
        ),
        test!("mirror: headers that clients rely on", headers),
        test!(
            "bad input: names, digests, ranges and upstreams that no client sends",
            requests
        ),
        test!("bad input: header bombs and broken HTTP", bombs),
        test!(
            "bad input: garbage on the ports for peers and control",
            garbage
        ),
    ]
}

fn digest_of_range(image: &Image, start: u64, length: u64) -> Result<String> {
    use sha2::Digest;
    let file = std::fs::File::open(image.path_of(image.largest()))?;
    let mut bytes = vec![0; length as usize];
    file.read_exact_at(&mut bytes, start)?;
    Ok(hex::encode(sha2::Sha256::digest(&bytes)))
}

async fn ranges(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let blob = image.largest();
    let size = blob.bytes;
    let cluster = stage.cluster(1, &image).await?;
    let node = &cluster.nodes[0];
    let cases: [(String, u64, u64); 8] = [
        (format!("bytes={}-", size - 4096), size - 4096, 4096),
        ("bytes=-100".into(), size - 100, 100),
        ("bytes=0-0".into(), 0, 1),
        ("bytes=65535-65536".into(), 65535, 2),
        ("bytes=1048575-3145729".into(), 1_048_575, 2_097_155),
        ("bytes=5000000-5999999".into(), 5_000_000, 1_000_000),
        (format!("bytes={}-999999999999", size - 7), size - 7, 7),
        (format!("bytes=-{}", size + 5), 0, size),
    ];
    for temperature in ["cold", "warm"] {
        for (range, start, length) in &cases {
            let download = get(
                node,
                REPOSITORY,
                &blob.digest,
                &[("range", range)],
                PULL_MAX,
            )
            .await?;
            let what = format!("{temperature}, {range}: {}", download.summary());
            ensure!(download.status == 206, "expected 206; {what}");
            ensure!(
                download.bytes == *length && download.cut.is_none(),
                "expected {length} bytes; {what}"
            );
            let said = download
                .headers
                .get("content-range")
                .and_then(|value| value.to_str().ok());
            let expected = format!("bytes {start}-{}/{size}", start + length - 1);
            ensure!(
                said == Some(&expected),
                "expected Content-Range {expected}, got {said:?}; {what}"
            );
            ensure!(
                download.sha256 == digest_of_range(&image, *start, *length)?,
                "wrong bytes; {what}"
            );
        }
        let beyond = format!("bytes={size}-");
        let download = get(
            node,
            REPOSITORY,
            &blob.digest,
            &[("range", &beyond)],
            PULL_MAX,
        )
        .await?;
        ensure!(
            download.status == 416,
            "expected 416: {}",
            download.summary()
        );
        cluster.get_right(0, blob).await?;
    }
    Ok(Outcome::Passed)
}

/// Eight readers as nydusd has them: pieces of the blob of all sizes, over and over.
async fn overlapping(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let blob = image.largest();
    let cluster = stage.cluster(1, &image).await?;
    let node = &cluster.nodes[0];
    let readers = (0..8_u64).map(|reader| {
        let image = &image;
        async move {
            for step in 0..12_u64 {
                let length = 57_000 + reader * 90_000;
                let start = (step * 700_000 + reader * 130_000) % (blob.bytes - length);
                let range = format!("bytes={start}-{}", start + length - 1);
                let download = get(
                    node,
                    REPOSITORY,
                    &blob.digest,
                    &[("range", &range)],
                    PULL_MAX,
                )
                .await?;
                ensure!(
                    download.status == 206
                        && download.sha256 == digest_of_range(image, start, length)?,
                    "{range}: {}",
                    download.summary()
                );
            }
            anyhow::Ok(())
        }
    });
    futures_util::future::try_join_all(readers).await?;
    cluster.get_right(0, blob).await?;
    let ratio = cluster.proxy.bytes(crate::rig::proxy::Target::Blob) as f64 / blob.bytes as f64;
    ensure!(ratio < 1.05, "the registry sent {ratio:.3} x the blob");
    Ok(Outcome::Passed)
}

async fn headers(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let blob = image.largest();
    let cluster = stage.cluster(1, &image).await?;
    let base = cluster.nodes[0].mirror_url();
    let client = http::client()?;
    let head = client
        .head(format!(
            "{base}/v2/{REPOSITORY}/blobs/{}?ns={REGISTRY_NAME}",
            blob.digest
        ))
        .send()
        .await?;
    ensure!(head.status() == 200, "HEAD of a blob: {}", head.status());
    let header = |name: &str| {
        head.headers()
            .get(name)
            .and_then(|value| value.to_str().ok())
    };
    ensure!(
        header("content-length") == Some(&blob.bytes.to_string()),
        "HEAD: {:?}",
        head.headers()
    );
    ensure!(
        header("docker-content-digest") == Some(&blob.digest),
        "HEAD: {:?}",
        head.headers()
    );
    ensure!(
        header("etag").is_some(),
        "HEAD has no ETag: {:?}",
        head.headers()
    );
    // The same upstream, named in Dragonfly's way.
    let url = format!("{base}/v2/{REPOSITORY}/blobs/{}", blob.digest);
    let named = [("x-dragonfly-registry", cluster.proxy.url())];
    let named: Vec<(&str, &str)> = named
        .iter()
        .map(|(name, value)| (*name, value.as_str()))
        .collect();
    let download = http::download(&url, &named, PULL_MAX).await?;
    ensure!(
        download.is(&blob.digest),
        "X-Dragonfly-Registry: {}",
        download.summary()
    );
    let manifest = format!("{base}/v2/{REPOSITORY}/manifests/v1?ns={REGISTRY_NAME}");
    let accept = [
        ("accept", "application/json"),
        ("accept", "application/vnd.oci.image.manifest.v1+json"),
    ];
    let download = http::download(&manifest, &accept, PULL_MAX).await?;
    ensure!(
        download.is(&image.manifest.digest),
        "two Accept lines: {}",
        download.summary()
    );
    for path in ["/healthy", "/server/ping", "/v2/"] {
        ensure!(
            http::answers(&format!("{base}{path}")).await,
            "{path} is not answered"
        );
    }
    Ok(Outcome::Passed)
}

async fn still_well(cluster: &mut Cluster, image: &Image) -> Result<()> {
    cluster
        .get_right(0, image.largest())
        .await
        .context("after the garbage")?;
    let process = cluster.nodes[0].process();
    ensure!(process.is_running(), "the node has ended");
    let held = process.memory()?.own_bytes();
    ensure!(
        held < GARBAGE_MEMORY_MAX,
        "the node holds {held} bytes of memory"
    );
    ensure!(
        !process.log().contains("panicked"),
        "the node panicked\n{}",
        process.log_tail()
    );
    Ok(())
}

/// Sends `request` as it stands and returns the status, or 0 where the connection was just closed.
fn raw(address: SocketAddr, request: &[u8]) -> Result<u16> {
    let mut stream = TcpStream::connect_timeout(&address, REFUSAL_MAX)?;
    stream.set_read_timeout(Some(REFUSAL_MAX))?;
    stream.set_write_timeout(Some(REFUSAL_MAX))?;
    // The other end may well close before it has read everything.
    let _ = stream.write_all(request);
    let mut answer = [0; 64];
    match stream.read(&mut answer) {
        Ok(length) => {
            let text = String::from_utf8_lossy(&answer[..length]).into_owned();
            Ok(text
                .split(' ')
                .nth(1)
                .and_then(|status| status.parse().ok())
                .unwrap_or(0))
        }
        Err(error)
            if matches!(
                error.kind(),
                std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut
            ) =>
        {
            anyhow::bail!("neither an answer nor an end within {REFUSAL_MAX:?}")
        }
        Err(_) => Ok(0),
    }
}

fn mirror_address(cluster: &Cluster) -> Result<SocketAddr> {
    Ok(cluster.nodes[0]
        .mirror_url()
        .trim_start_matches("http://")
        .parse()?)
}

async fn requests(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let mut cluster = stage.cluster(1, &image).await?;
    let address = mirror_address(&cluster)?;
    let right = &image.largest().digest;
    let hex = right.trim_start_matches("sha256:");
    let targets = [
        "/v2/../../etc/passwd/blobs/sha256:00".to_owned(),
        format!("/v2/a/../b/blobs/{right}"),
        format!("/v2/%2e%2e/x/blobs/{right}"),
        format!("/v2/test//image/blobs/{right}"),
        format!("/v2/TEST/image/blobs/{right}"),
        format!("/v2/{}/blobs/{right}", "a/".repeat(3000)),
        "/v2/test/image/blobs/sha256:".into(),
        "/v2/test/image/blobs/sha256:zz".into(),
        format!("/v2/test/image/blobs/sha256:{}", &hex[1..]),
        format!("/v2/test/image/blobs/sha256:{hex}0"),
        format!("/v2/test/image/blobs/md5:{}", &hex[..32]),
        format!("/v2/test/image/blobs/{}", "0".repeat(10_000)),
        "/v2/test/image/manifests/..".into(),
        "/v2/test/image/manifests/%00".into(),
        format!("/v2/test/image/blobs/{right}?ns=169.254.169.254"),
        format!("/v2/test/image/blobs/{right}?ns=127.0.0.1:22"),
        format!("/v2/test/image/blobs/{right}?ns=evil.example"),
        format!("/v2/test/image/blobs/{right}?ns={}", "x".repeat(9_000)),
    ];
    for target in &targets {
        let shown: String = target.chars().take(80).collect();
        let status = raw(
            address,
            format!("GET {target} HTTP/1.1\r\nHost: m\r\nConnection: close\r\n\r\n").as_bytes(),
        )?;
        ensure!(
            (400..500).contains(&status),
            "GET {shown}: status {status}, expected a 4xx"
        );
    }
    for upstream in [
        "http://169.254.169.254",
        "file:///etc/passwd",
        "http://[fe80::1]",
        "http://user:pass@x",
        "\u{1}",
    ] {
        let request = format!(
            "GET /v2/test/image/blobs/{right} HTTP/1.1\r\nHost: m\r\nX-Dragonfly-Registry: {upstream}\r\nConnection: close\r\n\r\n"
        );
        let status = raw(address, request.as_bytes())?;
        ensure!(
            (400..500).contains(&status),
            "upstream {upstream:?}: status {status}, expected a 4xx"
        );
    }
    for target in ["169.254.169.254:80", "127.0.0.1:22", "evil.example:443"] {
        let status = raw(
            address,
            format!("CONNECT {target} HTTP/1.1\r\nHost: {target}\r\n\r\n").as_bytes(),
        )?;
        ensure!(
            (400..500).contains(&status),
            "CONNECT {target}: status {status}, expected a 4xx"
        );
    }
    // RFC 9110 lets a server ignore a Range that it cannot make sense of; what it must not do is lie.
    for range in [
        "bytes=5-2",
        "bytes=-0",
        "bytes=a-b",
        "bytes=99999999999999999999-",
        "lines=1-2",
        "bytes=0-1,1-2,0-9",
    ] {
        let download = get(
            &cluster.nodes[0],
            REPOSITORY,
            right,
            &[("range", range)],
            PULL_MAX,
        )
        .await?;
        let fine = download.status == 416 || download.status == 400 || download.is(right);
        ensure!(fine, "Range {range}: {}", download.summary());
    }
    still_well(&mut cluster, &image).await?;
    Ok(Outcome::Passed)
}

async fn bombs(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let mut cluster = stage.cluster(1, &image).await?;
    let address = mirror_address(&cluster)?;
    let line = "GET /v2/ HTTP/1.1\r\nHost: m\r\n";
    let many = format!("{line}{}\r\n", "X-A: b\r\n".repeat(20_000));
    let long = format!("{line}X-A: {}\r\n\r\n", "b".repeat(4 << 20));
    let endless = format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(4 << 20));
    let body = format!(
        "GET /v2/ HTTP/1.1\r\nHost: m\r\nContent-Length: {}\r\n\r\n",
        u64::MAX
    );
    let smuggled = "GET /v2/ HTTP/1.1\r\nHost: m\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    for (what, request) in [
        ("many headers", many.as_bytes()),
        ("a long header", long.as_bytes()),
        ("a long path", endless.as_bytes()),
        ("no HTTP", b"\x16\x03\x01\x02\x00garbage\r\n\r\n".as_slice()),
    ] {
        let status = raw(address, request).with_context(|| what)?;
        ensure!(
            status == 0 || (400..500).contains(&status),
            "{what}: status {status}"
        );
    }
    for (what, request) in [
        ("an absurd length", body.as_str()),
        ("two lengths", smuggled),
    ] {
        // Whether it is refused or the body ignored: it has an end.
        raw(address, request.as_bytes()).with_context(|| what)?;
    }
    // Connections that say nothing do not keep others out.
    let silent: Vec<_> = (0..200)
        .map(|_| TcpStream::connect_timeout(&address, REFUSAL_MAX))
        .collect();
    still_well(&mut cluster, &image).await?;
    drop(silent);
    Ok(Outcome::Passed)
}

async fn garbage(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let mut cluster = stage.cluster(2, &image).await?;
    cluster.get_right(1, image.largest()).await?;
    let peer = SocketAddr::new(cluster.nodes[0].machine().address().into(), 65003);
    let socket = UdpSocket::bind((stage.rig.own_address(), 0))?;
    let mut noise = vec![0_u8; 1400];
    for round in 0..2000_u32 {
        for (index, byte) in noise.iter_mut().enumerate() {
            *byte = (round.wrapping_mul(2_654_435_761) >> (index % 24)) as u8 ^ index as u8;
        }
        // Every fourth looks like the first packet of a QUIC connection.
        if round % 4 == 0 {
            noise[..5].copy_from_slice(&[0xc3, 0, 0, 0, 1]);
        }
        socket.send_to(&noise, peer)?;
    }
    let control = cluster.control.address();
    for bytes in [
        b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".as_slice(),
        &noise,
        &[0xff; 70_000],
        b"GET / HTTP/1.1\r\n\r\n",
    ] {
        raw(control, bytes).context("garbage on control's port")?;
    }
    ensure!(cluster.control.process().is_running(), "control has ended");
    let held = cluster.control.process().memory()?.own_bytes();
    ensure!(
        held < GARBAGE_MEMORY_MAX,
        "control holds {held} bytes of memory"
    );
    still_well(&mut cluster, &image).await?;
    let status = cluster.nodes[0].status().await?;
    ensure!(
        status.totals.from_peer_bytes > 0,
        "the peer was not used after the garbage: {status:?}"
    );
    Ok(Outcome::Passed)
}

//! Bad input and too much of it; TLS; health; shutdown.

use std::sync::Arc;
use std::time::Duration;

use pantala_mirror::{Mirror, MirrorError, MirrorEvent, TlsFiles};
use rustls::pki_types::{CertificateDer, ServerName};
use tokio::net::TcpStream;

use crate::fake::{Fake, config, hang, serve};
use crate::wire::Wire;

#[tokio::test]
async fn its_own_pages_are_served() {
    let serving = serve(Fake::new(), config()).await;
    let mut wire = serving.connect().await;
    for page in ["/healthy", "/server/ping"] {
        let answer = wire.get(page, &[]).await;
        assert_eq!((answer.status, answer.text()), (200, "ok\n".to_owned()));
        assert_eq!(
            wire.ask("HEAD", page, &[]).await.header("content-length"),
            Some("3")
        );
    }
    assert_eq!(wire.get("/metrics", &[]).await.text(), "pantala_up 1\n");
}

#[tokio::test]
async fn malformed_paths_and_other_methods_are_told_what_is_wrong() {
    let serving = serve(Fake::new(), config()).await;
    let mut wire = serving.connect().await;
    let d = serving.fake.digest();
    for (target, status, code) in [
        (
            format!("/v2/../../etc/passwd/blobs/{d}"),
            400,
            "NAME_INVALID",
        ),
        (format!("/v2/a%2f..%2fb/blobs/{d}"), 400, "NAME_INVALID"),
        (format!("/v2/UPPER/blobs/{d}"), 400, "NAME_INVALID"),
        ("/v2/a/blobs/sha256:zz".to_owned(), 400, "DIGEST_INVALID"),
        ("/v2/a/blobs/md5:00".to_owned(), 400, "DIGEST_INVALID"),
        ("/v2/a/manifests/-x".to_owned(), 400, "TAG_INVALID"),
        (format!("/v2/{}", "a/".repeat(2000)), 414, "NAME_INVALID"),
        ("/favicon.ico".to_owned(), 404, "UNSUPPORTED"),
    ] {
        let answer = wire.get(&target, &[]).await;
        assert_eq!(answer.status, status, "{target}");
        let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(body["errors"][0]["code"], code, "{target}");
        assert!(!body["errors"][0]["message"].as_str().unwrap().is_empty());
    }
    for method in ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "BREW"] {
        let answer = wire
            .ask(method, "/v2/a/blobs/uploads/", &["Content-Length: 0"])
            .await;
        assert_eq!(
            (answer.status, answer.header("allow")),
            (405, Some("GET, HEAD")),
            "{method}"
        );
    }
    assert!(serving.fake.probes.lock().is_empty() && serving.fake.exchanges.lock().is_empty());
}

#[tokio::test]
async fn header_bombs_are_refused_in_bounded_memory() {
    let serving = serve(Fake::new(), config()).await;
    let long = format!("X-Bomb: {}", "a".repeat(40 << 10));
    let many: Vec<String> = (0..500).map(|n| format!("X-{n}: 1")).collect();
    let many: Vec<&str> = many.iter().map(String::as_str).collect();
    for lines in [&[&long[..]][..], &many] {
        let mut wire = serving.connect().await;
        assert_eq!(wire.get("/healthy", lines).await.status, 431);
        assert!(wire.is_closed().await);
    }
    // One that never ends is cut after the bound, not read for ever.
    let mut wire = serving.connect().await;
    wire.send("GET /healthy HTTP/1.1\r\n").await;
    let flood = format!("X-Flood: {}\r\n", "b".repeat(1000));
    let mut sent = 0;
    while tokio::io::AsyncWriteExt::write_all(&mut wire.stream, flood.as_bytes())
        .await
        .is_ok()
    {
        sent += flood.len();
        assert!(sent < 64 << 20, "the flood was swallowed");
    }
    assert_eq!(
        serving.connect().await.get("/healthy", &[]).await.status,
        200
    );
}

#[tokio::test]
async fn garbage_on_the_port_gets_400_and_the_door() {
    let serving = serve(Fake::new(), config()).await;
    for garbage in [
        "\u{0}\u{1}\u{2}\u{3} nonsense\r\n\r\n",
        "\u{16}\u{3}\u{1}\u{2}\u{0}\u{1}\u{0}\u{1}\u{fc}\r\n\r\n",
        "GET / HTTP/9.9\r\n\r\n",
        "GET /healthy HTTP/1.1\r\nno colon\r\n\r\n",
        "GET /healthy HTTP/1.1\r\nX-Control: \u{1}\r\n\r\n",
        "GET /healthy HTTP/1.1\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\n",
    ] {
        let mut wire = serving.connect().await;
        wire.send(garbage).await;
        assert_eq!(wire.answer(false).await.status, 400, "{garbage:?}");
        assert!(wire.is_closed().await, "{garbage:?}");
    }
}

#[tokio::test]
async fn silent_and_slow_connections_are_dropped() {
    let mut config = config();
    config.request_head_timeout = Duration::from_millis(200);
    let serving = serve(Fake::new(), config).await;
    let mut idle = serving.connect().await;
    assert_eq!(idle.get("/healthy", &[]).await.status, 200);
    let mut slow = serving.connect().await;
    slow.send("GET /healthy HTTP/1.1\r\nX-").await;
    assert!(idle.is_closed().await);
    assert!(slow.is_closed().await);
}

#[tokio::test]
async fn too_many_connections_are_turned_away_with_a_word() {
    let mut config = config();
    config.connections_max = 1;
    let serving = serve(Fake::new(), config).await;
    let mut first = serving.connect().await;
    assert_eq!(first.get("/healthy", &[]).await.status, 200);
    let mut second = serving.connect().await;
    let answer = second.answer(false).await;
    assert_eq!((answer.status, answer.is_whole), (503, true));
    serde_json::from_slice::<serde_json::Value>(&answer.body).unwrap();
    assert!(second.is_closed().await);
    assert!(
        serving
            .fake
            .events
            .lock()
            .contains(&MirrorEvent::ConnectionRefused)
    );
    drop(first);
    while !serving
        .fake
        .events
        .lock()
        .contains(&MirrorEvent::ConnectionClosed)
    {
        tokio::task::yield_now().await;
    }
    assert_eq!(
        serving.connect().await.get("/healthy", &[]).await.status,
        200
    );
}

#[tokio::test]
async fn too_many_requests_get_503_and_health_still_answers() {
    let mut config = config();
    config.requests_max = 1;
    let fake = Fake::new();
    fake.probe_by(|_| hang());
    let serving = serve(fake, config).await;
    let path = serving.fake.blob_path();
    let mut first = serving.connect().await;
    first
        .send(&format!("GET {path} HTTP/1.1\r\nHost: m\r\n\r\n"))
        .await;
    while serving.fake.probes.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    let mut second = serving.connect().await;
    let answer = second.get(&path, &[]).await;
    assert_eq!(
        (answer.status, answer.header("retry-after")),
        (503, Some("1"))
    );
    assert_eq!(second.get("/healthy", &[]).await.status, 200);
}

#[tokio::test]
async fn shutdown_lets_a_reply_in_flight_end_and_refuses_new_clients() {
    let fake = Fake::new();
    let size_bytes = fake.blob.len() as u64;
    let go = Arc::new(tokio::sync::Notify::new());
    let gate = go.clone();
    fake.probe_by(move |_| {
        let gate = gate.clone();
        async move {
            gate.notified().await;
            Ok(pantala_mirror::BlobVerdict::Readable { size_bytes })
        }
    });
    let mut serving = serve(fake, config()).await;
    let mut idle = serving.connect().await;
    assert_eq!(idle.get("/healthy", &[]).await.status, 200);
    let mut busy = serving.connect().await;
    busy.send(&format!(
        "GET {} HTTP/1.1\r\nHost: m\r\n\r\n",
        serving.fake.blob_path()
    ))
    .await;
    while serving.fake.probes.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    serving.stop.take().unwrap().send(()).unwrap();
    assert!(idle.is_closed().await, "idle connections end at once");
    assert!(TcpStream::connect(serving.address).await.is_err());
    go.notify_one();
    let answer = busy.answer(false).await;
    assert!(answer.is_whole && answer.body == serving.fake.blob);
    serving.task.await.unwrap();
}

#[tokio::test]
async fn shutdown_cuts_what_does_not_end_in_time() {
    let mut config = config();
    config.drain_timeout = Duration::from_millis(100);
    config.first_byte_timeout = Duration::from_secs(600);
    let fake = Fake::new();
    fake.probe_by(|_| hang());
    let mut serving = serve(fake, config).await;
    let mut busy = serving.connect().await;
    busy.send(&format!(
        "GET {} HTTP/1.1\r\nHost: m\r\n\r\n",
        serving.fake.blob_path()
    ))
    .await;
    while serving.fake.probes.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    serving.stop.take().unwrap().send(()).unwrap();
    serving.task.await.unwrap();
    assert!(busy.is_closed().await);
}

#[tokio::test]
async fn it_speaks_tls_where_files_are_given_and_says_which_is_wrong() {
    let signed = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let dir = tempfile::tempdir().unwrap();
    let files = TlsFiles {
        certificate: dir.path().join("cert.pem"),
        key: dir.path().join("key.pem"),
    };
    let mut config = config();
    config.tls = Some(files.clone());
    let missing = Mirror::bind(config.clone(), Arc::new(Fake::new())).await;
    assert!(
        matches!(missing.err(), Some(MirrorError::TlsFile { path, .. }) if path == files.certificate)
    );
    std::fs::write(&files.certificate, signed.cert.pem()).unwrap();
    std::fs::write(&files.key, signed.signing_key.serialize_pem()).unwrap();
    let serving = serve(Fake::new(), config).await;

    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from(signed.cert.der().to_vec()))
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let client = rustls::ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots)
        .with_no_client_auth();
    let connector = tokio_rustls::TlsConnector::from(Arc::new(client));
    let stream = TcpStream::connect(serving.address).await.unwrap();
    let name = ServerName::try_from("localhost").unwrap();
    let mut wire = Wire::over(connector.connect(name, stream).await.unwrap());
    for _ in 0..2 {
        let answer = wire.get(&serving.fake.blob_path(), &[]).await;
        assert!(answer.is_whole && answer.body == serving.fake.blob);
    }
    // Plain text on the TLS port ends the connection and nothing else.
    let mut plain = serving.connect().await;
    plain.send("GET /healthy HTTP/1.1\r\n\r\n").await;
    let mut buf = Vec::new();
    let _ = tokio::io::AsyncReadExt::read_to_end(&mut plain.stream, &mut buf).await;
    assert!(!buf.starts_with(b"HTTP"));
    assert_eq!(wire.get("/healthy", &[]).await.status, 200);
}

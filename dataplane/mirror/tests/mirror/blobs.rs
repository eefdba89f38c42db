//! Blobs: ranges, conditions, forms of replies, first byte, cut bodies.

use std::time::Duration;

use bytes::Bytes;
use futures_util::{FutureExt, StreamExt, stream};
use pantala_mirror::{BackendErrorKind, BlobVerdict, MirrorEvent, RequestKind};
use pantala_wire::{ByteRange, Priority};

use crate::fake::{Fake, chunks, config, failure, hang, serve};

#[tokio::test]
async fn a_blob_comes_whole_with_the_headers_of_a_registry() {
    let serving = serve(Fake::new(), config()).await;
    let (path, digest) = (serving.fake.blob_path(), serving.fake.digest());
    let mut wire = serving.connect().await;
    let answer = wire.get(&path, &[]).await;
    assert_eq!(answer.status, 200);
    assert_eq!(answer.body, serving.fake.blob);
    for (name, value) in [
        ("content-length", "200000"),
        ("content-type", "application/octet-stream"),
        ("accept-ranges", "bytes"),
        ("etag", &format!("\"{digest}\"")),
        ("docker-content-digest", &digest.to_string()),
        ("docker-distribution-api-version", "registry/2.0"),
    ] {
        assert_eq!(answer.header(name), Some(value), "{name}");
    }
    // HEAD says the same on the same connection, without bytes and without opening the blob.
    let head = wire.ask("HEAD", &path, &["Range: bytes=0-1"]).await;
    assert_eq!((head.status, head.body.len()), (200, 0));
    assert_eq!(head.header("content-length"), Some("200000"));
    assert_eq!(serving.fake.opens.lock().len(), 1);
}

#[tokio::test]
async fn ranges_are_answered_exactly_on_one_kept_connection() {
    let serving = serve(Fake::new(), config()).await;
    let path = serving.fake.blob_path();
    let blob = serving.fake.blob.clone();
    let mut wire = serving.connect().await;
    for (range, start, end) in [
        ("bytes=0-0", 0, 1),
        ("bytes=100-199999", 100, 200_000),
        ("bytes=199999-", 199_999, 200_000),
        ("bytes=-10", 199_990, 200_000),
        ("bytes=-99999999999999999999999999", 0, 200_000),
        ("bytes=65535-65536", 65_535, 65_537),
        ("bytes=7-99999999999999999999999999", 7, 200_000),
    ] {
        let answer = wire.get(&path, &[&format!("Range: {range}")]).await;
        assert_eq!(answer.status, 206, "{range}");
        assert_eq!(answer.body, blob[start..end], "{range}");
        let content_range = format!("bytes {start}-{}/200000", end - 1);
        assert_eq!(answer.header("content-range"), Some(&content_range[..]));
    }
    for range in [
        "bytes=200000-",
        "bytes=-0",
        "bytes=99999999999999999999999-",
    ] {
        let answer = wire.get(&path, &[&format!("Range: {range}")]).await;
        assert_eq!(answer.status, 416, "{range}");
        assert_eq!(answer.header("content-range"), Some("bytes */200000"));
        assert!(answer.text().contains("200000"), "{}", answer.text());
    }
    for range in ["bytes=0-1,3-4", "lines=1-2", "bytes=5-1", "bytes=x-"] {
        let answer = wire.get(&path, &[&format!("Range: {range}")]).await;
        assert_eq!(
            (answer.status, answer.body.len()),
            (200, 200_000),
            "{range}"
        );
    }
    let two = wire
        .get(&path, &["Range: bytes=0-1", "Range: bytes=2-3"])
        .await;
    assert_eq!(two.status, 200);
    assert_eq!(
        serving.fake.probes.lock().len(),
        1,
        "one verdict serves all"
    );
}

#[tokio::test]
async fn conditions_are_honoured() {
    let serving = serve(Fake::new(), config()).await;
    let path = serving.fake.blob_path();
    let etag = format!("\"{}\"", serving.fake.digest());
    let mut wire = serving.connect().await;
    for tags in [&etag[..], "*", &format!("\"x\", W/{etag}")] {
        let answer = wire.get(&path, &[&format!("If-None-Match: {tags}")]).await;
        assert_eq!(answer.status, 304, "{tags}");
        assert_eq!(answer.header("etag"), Some(&etag[..]));
    }
    let part = ["Range: bytes=0-9", &format!("If-Range: {etag}")];
    assert_eq!(wire.get(&path, &part).await.status, 206);
    for stale in [
        "\"other\"",
        &format!("W/{etag}"),
        "Wed, 21 Oct 2015 07:28:00 GMT",
    ] {
        let answer = wire
            .get(&path, &["Range: bytes=0-9", &format!("If-Range: {stale}")])
            .await;
        assert_eq!(answer.status, 200, "{stale}");
    }
}

#[tokio::test]
async fn an_empty_blob_is_served_without_opening_anything() {
    let fake = Fake::new();
    fake.probe_by(|_| async { Ok(BlobVerdict::Readable { size_bytes: 0 }) });
    let serving = serve(fake, config()).await;
    let mut wire = serving.connect().await;
    let answer = wire.get(&serving.fake.blob_path(), &[]).await;
    assert_eq!(
        (answer.status, answer.header("content-length")),
        (200, Some("0"))
    );
    let answer = wire
        .get(&serving.fake.blob_path(), &["Range: bytes=0-"])
        .await;
    assert_eq!(
        (answer.status, answer.header("content-range")),
        (416, Some("bytes */0"))
    );
    assert!(serving.fake.opens.lock().is_empty());
}

#[tokio::test]
async fn the_backend_is_told_how_urgent_and_whose_the_request_is() {
    let serving = serve(Fake::new(), config()).await;
    let mut wire = serving.connect().await;
    let lines = [
        "Authorization: Bearer secret",
        "Range: bytes=5-9",
        "x-dragonfly-priority: 6",
        "x-dragonfly-use-p2p: false",
        "x-dragonfly-prefetch: true",
        "X-Dragonfly-Filtered-Query-Params: \u{1}",
    ];
    // A control character in any header is refused by HTTP itself; without it, garbage passes.
    let answer = wire.get(&serving.fake.blob_path(), &lines[..5]).await;
    assert_eq!(answer.status, 206);
    let garbage = [
        "x-dragonfly-priority: \u{fc}",
        "x-dragonfly-use-p2p: maybe",
        "x-dragonfly-new: 1",
    ];
    assert_eq!(
        wire.get(&serving.fake.blob_path(), &garbage).await.status,
        200
    );
    let opens = serving.fake.opens.lock();
    assert_eq!(opens[0].range, ByteRange::new(5, 10).unwrap());
    assert_eq!(opens[0].priority, Priority::Fault);
    assert_eq!((opens[0].use_p2p, opens[0].prefetch), (false, Some(true)));
    assert_eq!(opens[0].authorization.as_ref().unwrap(), "Bearer secret");
    assert_eq!(opens[0].upstream.to_string(), "http://127.0.0.1:25000");
    assert!(!format!("{:?}", opens[0]).contains("secret"));
    assert_eq!(opens[1].priority, Priority::Client);
    assert!(opens[1].use_p2p);
}

#[tokio::test]
async fn bytes_reach_the_client_as_they_arrive() {
    let fake = Fake::new();
    let (more, coming) = tokio::sync::mpsc::unbounded_channel::<Bytes>();
    let coming = std::sync::Arc::new(parking_lot::Mutex::new(Some(coming)));
    fake.open_by(move |_| {
        let mut coming = coming.lock().take().unwrap();
        async move {
            Ok(stream::poll_fn(move |cx| coming.poll_recv(cx))
                .map(Ok)
                .boxed())
        }
    });
    let serving = serve(fake, config()).await;
    let mut wire = serving.connect().await;
    wire.send(&format!(
        "GET {} HTTP/1.1\r\nHost: m\r\nRange: bytes=0-2\r\n\r\n",
        serving.fake.blob_path()
    ))
    .await;
    let mut seen = Vec::new();
    for n in 0..3_u8 {
        more.send(Bytes::from(vec![b'a' + n])).unwrap();
        while !seen.ends_with(&[b'a' + n]) || !seen.windows(4).any(|w| w == b"\r\n\r\n") {
            let mut buf = [0; 4096];
            let len = tokio::io::AsyncReadExt::read(&mut wire.stream, &mut buf)
                .await
                .unwrap();
            assert!(len > 0);
            seen.extend_from_slice(&buf[..len]);
        }
    }
}

#[tokio::test(start_paused = true)]
async fn a_stall_before_the_first_byte_ends_in_a_504_within_the_bound() {
    for stage in ["probe", "open", "first chunk"] {
        let fake = Fake::new();
        match stage {
            "probe" => fake.probe_by(|_| hang()),
            "open" => fake.open_by(|_| hang()),
            _ => fake.open_by(|_| async { Ok(stream::pending().boxed()) }),
        }
        let serving = serve(fake, config()).await;
        let mut wire = serving.connect().await;
        let asked = tokio::time::Instant::now();
        let answer = wire.get(&serving.fake.blob_path(), &[]).await;
        assert_eq!(answer.status, 504, "{stage}");
        assert!(answer.header("retry-after").is_some(), "{stage}");
        assert!(
            answer.text().contains("first_byte_timeout_ms"),
            "{}",
            answer.text()
        );
        // Virtual time: the bound itself, and nydusd's 5 s above it.
        let waited = asked.elapsed();
        assert!(
            waited >= Duration::from_secs(4) && waited < Duration::from_secs(5),
            "{waited:?}"
        );
        assert_eq!(
            wire.get("/healthy", &[]).await.status,
            200,
            "the connection lives on"
        );
    }
}

#[tokio::test]
async fn failures_before_the_first_byte_have_a_status_and_say_what_to_do() {
    for (kind, status) in [
        (BackendErrorKind::Timeout, 504),
        (BackendErrorKind::Unavailable, 503),
        (BackendErrorKind::Overloaded, 503),
        (BackendErrorKind::Forbidden, 403),
        (BackendErrorKind::NotFound, 404),
        (BackendErrorKind::BadUpstream, 502),
        (BackendErrorKind::Internal, 500),
    ] {
        let fake = Fake::new();
        fake.open_by(move |_| async move { Err(failure(kind)) });
        let serving = serve(fake, config()).await;
        let answer = serving
            .connect()
            .await
            .get(&serving.fake.blob_path(), &[])
            .await;
        assert_eq!(answer.status, status, "{kind:?}");
        let body: serde_json::Value = serde_json::from_slice(&answer.body).unwrap();
        assert_eq!(body["errors"][0]["message"], "scripted failure");
        assert_eq!(body["errors"][0]["detail"]["hint"], "read the script");
        assert!(body["errors"][0]["code"].is_string());
        assert_eq!(
            answer.header("retry-after").is_some(),
            matches!(status, 503 | 504)
        );
    }
}

#[tokio::test]
async fn a_failure_after_the_first_byte_cuts_the_connection_and_a_resume_gets_the_rest() {
    for ending in ["error", "short", "long"] {
        let fake = Fake::new();
        let blob = fake.blob.clone();
        fake.open_by(move |open| {
            let whole = chunks(&blob, &open, 10_000);
            async move {
                Ok(match ending {
                    _ if open.range.start() > 0 => whole,
                    "error" => whole
                        .take(3)
                        .chain(stream::iter([Err(failure(BackendErrorKind::Timeout))]))
                        .boxed(),
                    "short" => whole.take(3).boxed(),
                    _ => whole
                        .chain(stream::iter([Ok(Bytes::from_static(b"more"))]))
                        .boxed(),
                })
            }
        });
        let serving = serve(fake, config()).await;
        let path = serving.fake.blob_path();
        let mut wire = serving.connect().await;
        let answer = wire.get(&path, &[]).await;
        assert_eq!(answer.status, 200);
        if ending == "long" {
            // Not a byte more than announced reaches the client.
            assert!(answer.is_whole && answer.body == serving.fake.blob);
            continue;
        }
        assert!(
            !answer.is_whole,
            "{ending}: an incomplete body must not look complete"
        );
        let got = answer.body.len();
        assert_eq!(answer.body, serving.fake.blob[..got]);
        let mut again = serving.connect().await;
        let rest = again.get(&path, &[&format!("Range: bytes={got}-")]).await;
        assert_eq!(rest.status, 206);
        assert_eq!(rest.body, serving.fake.blob[got..]);
        let cut = serving.fake.events.lock().iter().any(|event| {
            matches!(
                event,
                MirrorEvent::RequestEnded {
                    kind: RequestKind::Blob,
                    cut: true,
                    ..
                }
            )
        });
        assert!(cut, "{ending}");
    }
}

#[tokio::test]
async fn a_client_that_leaves_frees_the_backend() {
    let fake = Fake::new();
    let (gone, left) = tokio::sync::oneshot::channel::<()>();
    let gone = std::sync::Arc::new(parking_lot::Mutex::new(Some(gone)));
    fake.open_by(move |_| {
        let held = gone.lock().take();
        async move {
            let first = stream::iter([Ok(Bytes::from_static(b"x"))]);
            Ok(first
                .chain(
                    async move {
                        let _held = held;
                        hang().await
                    }
                    .into_stream(),
                )
                .boxed())
        }
    });
    let serving = serve(fake, config()).await;
    let mut wire = serving.connect().await;
    wire.send(&format!(
        "GET {} HTTP/1.1\r\nHost: m\r\n\r\n",
        serving.fake.blob_path()
    ))
    .await;
    let mut buf = [0; 4096];
    assert!(
        tokio::io::AsyncReadExt::read(&mut wire.stream, &mut buf)
            .await
            .unwrap()
            > 0
    );
    drop(wire);
    assert!(left.await.is_err(), "the stream was dropped");
}

//! What a registry may do wrong in a blob transfer, and what comes of it.

mod origin;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures_util::StreamExt as _;
use origin::{
    Act, Origin, Random, Seen, blob, config, digest, head, honest, honest_head, probe, range,
    reply, source,
};
use pantala_source::{
    BodyStream, Credential, Lie, Phase, Source, SourceConfig, SourceError, TransferFacts,
};
use pantala_wire::ByteRange;
use pantala_wire::name::RepositoryName;

fn repository() -> RepositoryName {
    "test/app".parse().unwrap()
}

async fn open(
    source: &Source,
    origin: &Origin,
    blob: &[u8],
    range: ByteRange,
) -> Result<BodyStream, SourceError> {
    source
        .fetch_blob(
            &origin.upstream(),
            &repository(),
            &digest(blob),
            blob.len() as u64,
            range,
            &Credential::NONE,
        )
        .await
}

async fn read(mut stream: BodyStream) -> Result<Vec<u8>, SourceError> {
    let mut all = Vec::new();
    while let Some(item) = stream.next().await {
        all.extend_from_slice(&item?);
    }
    Ok(all)
}

async fn fetch(
    source: &Source,
    origin: &Origin,
    blob: &[u8],
    range: ByteRange,
) -> Result<Vec<u8>, SourceError> {
    read(open(source, origin, blob, range).await?).await
}

fn lie(error: SourceError) -> Lie {
    match error {
        SourceError::Lied { lie, .. } => lie,
        other => panic!("{other:?}"),
    }
}

/// A fetch of bytes 1000..3000 of 10,000 from an origin with this script.
async fn scripted(
    script: impl Fn(usize, &Seen, &[u8]) -> Vec<Act> + Send + Sync + 'static,
) -> (Result<Vec<u8>, SourceError>, Vec<Seen>, Vec<u8>) {
    scripted_with(config(), script).await
}

async fn scripted_with(
    config: SourceConfig,
    script: impl Fn(usize, &Seen, &[u8]) -> Vec<Act> + Send + Sync + 'static,
) -> (Result<Vec<u8>, SourceError>, Vec<Seen>, Vec<u8>) {
    let data = blob(10_000, 1);
    let served = data.clone();
    let origin = Origin::start(move |n, request| script(n, request, &served)).await;
    let source = Source::new(config).unwrap();
    let result = fetch(&source, &origin, &data, range(1000, 3000)).await;
    (result, origin.requests(), data[1000..3000].to_vec())
}

#[tokio::test]
async fn an_honest_registry_is_read_exactly() {
    let data = blob(3_000_000, 2);
    let served = data.clone();
    let origin = Origin::start(move |_, request| honest(&served, request)).await;
    let source = source();
    let info = probe(&source, &origin, &data).await.unwrap();
    assert_eq!((info.size, info.accepts_ranges), (3_000_000, Some(true)));
    for (start, end) in [
        (0, 3_000_000),
        (0, 1),
        (2_999_999, 3_000_000),
        (1_000_000, 2_000_000),
    ] {
        let got = fetch(&source, &origin, &data, range(start, end)).await;
        assert!(got.unwrap() == data[start as usize..end as usize]);
    }
    let requests = origin.requests();
    assert_eq!(requests[0].method, "HEAD");
    assert_eq!(
        requests[1].header("range"),
        None,
        "the whole needs no range"
    );
    assert_eq!(requests[2].header("range"), Some("bytes=0-0"));
    for request in &requests {
        assert_eq!(request.header("accept-encoding"), Some("identity"));
        assert_eq!(request.header("authorization"), None);
        assert!(request.target.starts_with("/v2/test/app/blobs/sha256:"));
    }
    let totals = source.totals();
    assert_eq!((totals.requests, totals.retries), (5, 0));
    assert_eq!(totals.received_bytes, 4_000_002);
    assert_eq!(totals.discarded_bytes, 0);
}

#[tokio::test]
async fn a_range_outside_of_the_blob_is_not_asked_for() {
    let origin = Origin::start(|_, _| vec![Act::Close]).await;
    let error = fetch(&source(), &origin, &[0; 10], range(5, 11))
        .await
        .unwrap_err();
    assert!(matches!(error, SourceError::BadRange { size: 10, .. }));
    assert!(origin.requests().is_empty());
}

#[tokio::test]
async fn cuts_at_random_points_are_resumed_at_the_exact_byte() {
    let seed = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_nanos() as u64;
    println!("seed {seed}");
    let mut random = Random(seed);
    for round in 0..12 {
        let data = blob(200_000 + random.below(100_000) as usize, seed);
        let start = random.below(100_000);
        let end = data.len() as u64 - random.below(50_000);
        let cut_at: Vec<u64> = (0..3).map(|_| random.below(60_000)).collect();
        let served = data.clone();
        // Every second round without a Content-Length, where only the count shows a cut.
        let chunked = round % 2 == 1;
        let origin = Origin::start(move |n, request| match cut_at.get(n) {
            None => honest(&served, request),
            Some(&len) => {
                let (start, end) = request.range().unwrap();
                let len = len.min(end - start - 1) as usize;
                let start = start as usize;
                let content_range = format!("bytes {start}-{}/{}", end - 1, served.len());
                let length = (end as usize - start).to_string();
                let framing = if chunked {
                    ("Connection", "close")
                } else {
                    ("Content-Length", length.as_str())
                };
                let mut bytes = head(206, &[("Content-Range", &content_range), framing]);
                bytes.extend_from_slice(&served[start..start + len]);
                vec![Act::Send(bytes), Act::Close]
            }
        })
        .await;
        let source = source();
        let stream = open(&source, &origin, &data, range(start, end))
            .await
            .unwrap();
        let facts = stream.facts();
        let got = read(stream).await.unwrap();
        assert!(got == data[start as usize..end as usize], "seed {seed}");
        assert_eq!(facts.retries(), 3, "seed {seed}");
        assert_eq!(facts.discarded_bytes(), 0);
        assert_eq!(source.totals().received_bytes, end - start);
        for request in origin.requests() {
            assert_eq!(request.range().unwrap().1, end);
        }
    }
}

#[tokio::test]
async fn a_registry_that_always_cuts_is_given_up_after_bounded_retries() {
    let (result, requests, _) = scripted(|_, request, data| {
        let mut acts = honest_head(data, request, |start, _| vec![data[start]]);
        acts.push(Act::Close);
        acts
    })
    .await;
    assert!(matches!(
        result.unwrap_err(),
        SourceError::Cut {
            offset: 1004,
            end: 3000,
            ..
        }
    ));
    assert_eq!(requests.len(), 4);
}

#[tokio::test]
async fn a_shorter_range_than_asked_for_is_continued() {
    let (result, requests, expected) = scripted(|n, request, data| {
        let (start, end) = request.range().unwrap();
        let end = if n == 0 { start + 500 } else { end };
        let content_range = format!("bytes {start}-{}/{}", end - 1, data.len());
        let body = &data[start as usize..end as usize];
        reply(206, &[("Content-Range", &content_range)], body)
    })
    .await;
    assert!(result.unwrap() == expected);
    assert_eq!(requests[1].range(), Some((1500, 3000)));
}

#[tokio::test]
async fn an_origin_that_ignores_ranges_is_read_past_and_reported() {
    let data = blob(500_000, 3);
    let served = data.clone();
    let origin = Origin::start(move |n, request| {
        if request.method == "HEAD" {
            return honest(&served, request);
        }
        // The second request is cut in the middle of the wanted part.
        let len = if n == 1 { 250_000 } else { served.len() };
        let length = served.len().to_string();
        let bytes = [
            head(200, &[("Content-Length", &length)]),
            served[..len].to_vec(),
        ]
        .concat();
        let mut acts = vec![Act::Send(bytes)];
        if n == 1 {
            acts.push(Act::Close);
        }
        acts
    })
    .await;
    let source = source();
    probe(&source, &origin, &data).await.unwrap();
    let stream = open(&source, &origin, &data, range(200_000, 300_000))
        .await
        .unwrap();
    let facts: Arc<TransferFacts> = stream.facts();
    assert!(facts.range_ignored());
    assert!(read(stream).await.unwrap() == data[200_000..300_000]);
    assert!(facts.discarded_bytes() >= 200_000 + 250_000);
    assert_eq!(facts.retries(), 1);
    assert_eq!(source.totals().received_bytes, 100_000);
    let whole = open(&source, &origin, &data, range(0, 500_000))
        .await
        .unwrap();
    let facts = whole.facts();
    assert!(read(whole).await.unwrap() == data);
    assert!(!facts.range_ignored());
}

#[tokio::test]
async fn lies_about_lengths_and_ranges_are_found_and_not_retried() {
    type Answer = fn(&[u8]) -> Vec<Act>;
    let cases: [(&str, Answer); 9] = [
        ("total", |data| {
            reply(
                206,
                &[("Content-Range", "bytes 1000-2999/9999")],
                &data[1000..3000],
            )
        }),
        ("shifted", |data| {
            reply(
                206,
                &[("Content-Range", "bytes 1001-3000/10000")],
                &data[1001..3001],
            )
        }),
        ("more than asked", |data| {
            reply(
                206,
                &[("Content-Range", "bytes 1000-3999/10000")],
                &data[1000..4000],
            )
        }),
        ("length long", |data| {
            reply(
                206,
                &[("Content-Range", "bytes 1000-2999/10000")],
                &data[1000..4000],
            )
        }),
        ("length short", |data| {
            reply(
                206,
                &[("Content-Range", "bytes 1000-2999/10000")],
                &data[1000..2000],
            )
        }),
        ("no content-range", |data| {
            reply(206, &[], &data[1000..3000])
        }),
        ("whole of another size", |data| {
            reply(200, &[], &data[..9000])
        }),
        ("416", |_| {
            reply(416, &[("Content-Range", "bytes */100")], b"")
        }),
        ("gzip", |data| {
            let lines = [
                ("Content-Range", "bytes 1000-2999/10000"),
                ("Content-Encoding", "gzip"),
            ];
            reply(206, &lines, &data[1000..3000])
        }),
    ];
    for (name, answer) in cases {
        let (result, requests, _) = scripted(move |_, _, data| answer(data)).await;
        let error = result.unwrap_err();
        println!("{name}: {error}");
        lie(error);
        assert_eq!(requests.len(), 1, "{name}");
    }
}

#[tokio::test]
async fn a_body_that_goes_on_after_its_announced_end_is_a_lie() {
    for extra in ["right behind", "later"] {
        let (result, ..) = scripted(move |_, _, data| {
            let lines = [
                ("Content-Range", "bytes 1000-2999/10000"),
                ("Transfer-Encoding", "chunked"),
            ];
            let mut acts = vec![Act::Send(head(206, &lines))];
            if extra == "later" {
                let chunk = [b"7d0\r\n", &data[1000..3000], b"\r\n"].concat();
                acts.push(Act::Send(chunk));
                acts.push(Act::Send(b"5\r\nextra\r\n0\r\n\r\n".to_vec()));
            } else {
                let chunk = [b"7d5\r\n", &data[1000..3005], b"\r\n0\r\n\r\n"].concat();
                acts.push(Act::Send(chunk));
            }
            acts
        })
        .await;
        assert_eq!(lie(result.unwrap_err()), Lie::TooLong, "{extra}");
    }
}

#[tokio::test]
async fn refusals_come_back_with_their_challenge_at_once() {
    for status in [401, 403] {
        let (result, requests, _) = scripted(move |_, _, _| {
            reply(status, &[("WWW-Authenticate", "Basic realm=\"r\"")], b"no")
        })
        .await;
        match result.unwrap_err() {
            SourceError::Refused {
                status: got,
                headers,
                ..
            } => {
                assert_eq!(got.as_u16(), status);
                assert_eq!(headers["www-authenticate"], "Basic realm=\"r\"");
            }
            other => panic!("{other:?}"),
        }
        assert_eq!(requests.len(), 1);
    }
    let (result, requests, _) = scripted(|_, _, _| reply(404, &[], b"")).await;
    assert!(matches!(result.unwrap_err(), SourceError::NotFound { .. }));
    assert_eq!(requests.len(), 1);
}

#[tokio::test]
async fn passing_failures_are_tried_again() {
    for status in [429, 500, 502, 503, 504] {
        let (result, requests, expected) = scripted(move |n, request, data| {
            if n < 2 {
                reply(status, &[], b"")
            } else {
                honest(data, request)
            }
        })
        .await;
        assert!(result.unwrap() == expected);
        assert_eq!(requests.len(), 3, "{status}");
    }
}

#[tokio::test]
async fn lasting_failures_end_after_bounded_retries() {
    let (result, requests, _) = scripted(|_, _, _| reply(500, &[], b"")).await;
    let error = result.unwrap_err();
    assert!(matches!(error, SourceError::Unavailable { .. }));
    assert_eq!(error.status().unwrap().as_u16(), 500);
    assert!(error.is_retryable());
    assert_eq!(requests.len(), 4);
}

#[tokio::test]
async fn retry_after_is_obeyed_when_short_and_given_to_the_caller_when_long() {
    for status in [429, 503] {
        let started = std::time::Instant::now();
        let (result, ..) = scripted(move |n, request, data| {
            if n == 0 {
                reply(status, &[("Retry-After", "1")], b"")
            } else {
                honest(data, request)
            }
        })
        .await;
        result.unwrap();
        assert!(started.elapsed() >= Duration::from_secs(1));
        let (result, requests, _) =
            scripted(move |_, _, _| reply(status, &[("Retry-After", "3600")], b"")).await;
        let error = result.unwrap_err();
        assert_eq!(error.retry_after(), Some(Duration::from_secs(3600)));
        assert_eq!(requests.len(), 1);
    }
    let date = httpdate::fmt_http_date(SystemTime::now() + Duration::from_secs(7200));
    let (result, ..) = scripted(move |_, _, _| reply(503, &[("Retry-After", &date)], b"")).await;
    let wait = result.unwrap_err().retry_after().unwrap();
    assert!(wait > Duration::from_secs(6000) && wait <= Duration::from_secs(7200));
}

#[tokio::test]
async fn an_origin_that_never_answers_ends_in_bounded_time() {
    let config = SourceConfig {
        first_byte_timeout: Duration::from_millis(200),
        retries_max: 1,
        ..config()
    };
    let (result, requests, _) = scripted_with(config, |_, _, _| vec![Act::Hang]).await;
    assert!(matches!(
        result.unwrap_err(),
        SourceError::TimedOut {
            phase: Phase::FirstByte,
            ..
        }
    ));
    assert_eq!(requests.len(), 2);
}

#[tokio::test]
async fn a_head_that_drips_is_no_answer() {
    let config = SourceConfig {
        first_byte_timeout: Duration::from_millis(500),
        retries_max: 0,
        ..config()
    };
    let (result, ..) = scripted_with(config, |_, _, _| {
        let mut acts = vec![Act::Send(b"HTTP/1.1 200 OK\r\n".to_vec())];
        for _ in 0..1000 {
            acts.push(Act::Send(b"X: y\r\n".to_vec()));
            acts.push(Act::Wait(Duration::from_millis(50)));
        }
        acts
    })
    .await;
    assert!(matches!(result.unwrap_err(), SourceError::TimedOut { .. }));
}

#[tokio::test]
async fn a_body_that_stalls_is_resumed_elsewhere_in_it() {
    let config = SourceConfig {
        stall_timeout: Duration::from_millis(300),
        ..config()
    };
    let (result, requests, expected) = scripted_with(config, |n, request, data| {
        if n == 0 {
            let mut acts = honest_head(data, request, |start, _| data[start..start + 700].to_vec());
            acts.push(Act::Hang);
            acts
        } else {
            honest(data, request)
        }
    })
    .await;
    assert!(result.unwrap() == expected);
    assert_eq!(requests[1].range(), Some((1700, 3000)));
}

#[tokio::test]
async fn header_bombs_and_garbage_are_refused_in_bounded_memory() {
    type Bomb = fn() -> Vec<Act>;
    let bombs: [Bomb; 4] = [
        || {
            let lines: String = (0..5000).map(|i| format!("X-{i}: y\r\n")).collect();
            vec![Act::Send(
                format!("HTTP/1.1 200 OK\r\n{lines}\r\n").into_bytes(),
            )]
        },
        || {
            let line = format!("HTTP/1.1 200 OK\r\nX: {}", "y".repeat(1 << 20));
            let more = vec![b'y'; 1 << 20];
            let mut acts = vec![Act::Send(line.into_bytes())];
            acts.extend((0..64).map(|_| Act::Send(more.clone())));
            acts
        },
        || vec![Act::Send(b"SSH-2.0-OpenSSH_9.2p1\r\n".to_vec()), Act::Close],
        || vec![Act::Send(vec![0xff; 10_000]), Act::Close],
    ];
    for (i, bomb) in bombs.into_iter().enumerate() {
        let (result, requests, _) = scripted(move |_, _, _| bomb()).await;
        let lie = lie(result.unwrap_err());
        assert!(matches!(lie, Lie::Malformed(_)), "{i}: {lie:?}");
        assert_eq!(requests.len(), 1);
    }
}

#[tokio::test]
async fn one_host_gets_a_bounded_number_of_transfers_at_the_same_time() {
    let data = blob(100_000, 6);
    let served = data.clone();
    let origin = Origin::start(move |_, request| honest(&served, request)).await;
    let config = SourceConfig {
        transfers_per_host_max: 2,
        ..config()
    };
    let source = Source::new(config).unwrap();
    let running = Arc::new(AtomicUsize::new(0));
    let tasks = (0..20).map(|_| {
        let (source, data, running) = (source.clone(), data.clone(), running.clone());
        let origin = &origin;
        async move {
            let mut stream = open(&source, origin, &data, range(0, 100_000))
                .await
                .unwrap();
            let now = running.fetch_add(1, Ordering::SeqCst) + 1;
            assert!(now <= 2, "{now} at the same time");
            tokio::task::yield_now().await;
            let mut len = 0;
            while let Some(item) = stream.next().await {
                len += Bytes::len(&item.unwrap());
            }
            running.fetch_sub(1, Ordering::SeqCst);
            drop(stream);
            len
        }
    });
    let lens = futures_util::future::join_all(tasks).await;
    assert!(lens.iter().all(|&len| len == 100_000));
}

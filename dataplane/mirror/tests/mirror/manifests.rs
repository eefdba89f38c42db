//! Manifests: tags revalidated, digests from memory, nothing wrong kept, all Accept lines passed.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};

use bytes::Bytes;
use futures_util::{StreamExt, stream};
use http::Method;
use pantala_mirror::manifest_cache::digest_of;
use pantala_mirror::{BackendErrorKind, UpstreamReply, UpstreamRequest};

use crate::fake::{Fake, config, failure, reply, serve};

const OCI: &str = "application/vnd.oci.image.manifest.v1+json";
const BODY: &str = "{\"schemaVersion\":2}";

fn manifest_reply(request: &UpstreamRequest, body: &'static str) -> UpstreamReply {
    let digest = digest_of(body.as_bytes()).to_string();
    let len = body.len().to_string();
    let headers = [
        ("content-type", OCI),
        ("docker-content-digest", &digest),
        ("content-length", &len),
        ("x-registry", "kept"),
        ("transfer-encoding", "identity"),
    ];
    let body = if request.method == Method::HEAD {
        ""
    } else {
        body
    };
    reply(200, &headers, body)
}

/// A registry whose manifest anyone with a token may read.
fn registry() -> Fake {
    let fake = Fake::new();
    fake.exchange_by(|request| async move {
        if request
            .headers
            .get("authorization")
            .is_none_or(|a| a != "Bearer alice")
        {
            let challenge = [("www-authenticate", "Basic realm=\"r\"")];
            let body = if request.method == Method::HEAD {
                ""
            } else {
                "who are you?"
            };
            return Ok(reply(401, &challenge, body));
        }
        Ok(manifest_reply(&request, BODY))
    });
    fake
}

const ALICE: &str = "Authorization: Bearer alice";

fn by_digest() -> String {
    format!("/v2/team/app/manifests/{}", digest_of(BODY.as_bytes()))
}

#[tokio::test]
async fn a_digest_is_fetched_once_and_then_served_from_memory_to_those_who_may() {
    let serving = serve(registry(), config()).await;
    let mut wire = serving.connect().await;
    for _ in 0..3 {
        let answer = wire.get(&by_digest(), &[ALICE]).await;
        assert_eq!((answer.status, answer.text()), (200, BODY.to_owned()));
        assert_eq!(answer.header("content-type"), Some(OCI));
        let digest = digest_of(BODY.as_bytes()).to_string();
        assert_eq!(answer.header("docker-content-digest"), Some(&digest[..]));
    }
    assert_eq!(serving.fake.exchanged(), [Method::GET]);
    let head = wire.ask("HEAD", &by_digest(), &[ALICE]).await;
    assert_eq!(
        (head.status, head.header("content-length")),
        (200, Some("19"))
    );
    let etag = format!("If-None-Match: \"{}\"", digest_of(BODY.as_bytes()));
    assert_eq!(wire.get(&by_digest(), &[ALICE, &etag]).await.status, 304);
    assert_eq!(serving.fake.exchanged().len(), 1);
    // Another caller, and the same caller by way of another repository, are asked about.
    let answer = wire.get(&by_digest(), &[]).await;
    assert_eq!(
        (answer.status, answer.text()),
        (401, "who are you?".to_owned())
    );
    assert_eq!(answer.header("www-authenticate"), Some("Basic realm=\"r\""));
    let other = by_digest().replace("team/app", "other");
    let asked = serving.fake.exchanged().len();
    assert_eq!(wire.get(&other, &[ALICE]).await.status, 200);
    assert_eq!(serving.fake.exchanged()[asked..], [Method::HEAD]);
}

#[tokio::test]
async fn a_tag_is_always_revalidated_and_its_content_not_transferred_twice() {
    let serving = serve(registry(), config()).await;
    let mut wire = serving.connect().await;
    let path = "/v2/team/app/manifests/v1";
    for _ in 0..3 {
        let answer = wire.get(path, &[ALICE, &format!("Accept: {OCI}")]).await;
        assert_eq!((answer.status, answer.text()), (200, BODY.to_owned()));
    }
    assert_eq!(
        serving.fake.exchanged(),
        [Method::GET, Method::HEAD, Method::HEAD]
    );
    // The tag has named the content: by digest it is at hand.
    assert_eq!(wire.get(&by_digest(), &[ALICE]).await.status, 200);
    assert_eq!(serving.fake.exchanged().len(), 3);
    // A type that the client does not take is the registry's to negotiate.
    wire.get(path, &[ALICE, "Accept: text/plain"]).await;
    assert_eq!(serving.fake.exchanged()[3..], [Method::GET]);
    let head = wire.ask("HEAD", path, &[ALICE]).await;
    assert_eq!(
        (head.status, head.header("content-length")),
        (200, Some("19"))
    );
    assert_eq!(serving.fake.exchanged()[4..], [Method::HEAD]);
}

#[tokio::test]
async fn a_moved_tag_gives_the_new_content_and_a_dead_registry_gives_none() {
    let fake = Fake::new();
    let moved = Arc::new(AtomicBool::new(false));
    let status = Arc::new(AtomicU16::new(200));
    let (is_moved, says) = (moved.clone(), status.clone());
    fake.exchange_by(move |request| {
        let body = if is_moved.load(Ordering::SeqCst) {
            "{\"new\":1}"
        } else {
            BODY
        };
        let says = says.load(Ordering::SeqCst);
        async move {
            match says {
                200 => Ok(manifest_reply(&request, body)),
                0 => Err(failure(BackendErrorKind::Unavailable)),
                status => Ok(reply(status, &[], "")),
            }
        }
    });
    let serving = serve(fake, config()).await;
    let mut wire = serving.connect().await;
    let path = "/v2/team/app/manifests/v1";
    assert_eq!(wire.get(path, &[]).await.text(), BODY);
    moved.store(true, Ordering::SeqCst);
    assert_eq!(wire.get(path, &[]).await.text(), "{\"new\":1}");
    for (registry, told) in [(0, 503), (500, 502), (503, 503), (404, 404), (429, 429)] {
        status.store(registry, Ordering::SeqCst);
        assert_eq!(wire.get(path, &[]).await.status, told, "{registry}");
        assert_eq!(wire.ask("HEAD", path, &[]).await.status, told, "{registry}");
    }
}

#[tokio::test]
async fn garbled_cut_and_encoded_manifests_are_refused_and_never_kept() {
    let digest = digest_of(BODY.as_bytes()).to_string();
    for (what, reply_headers, body) in [
        (
            "garbled",
            vec![("docker-content-digest", &digest[..])],
            "{\"schemaVersion\":3}",
        ),
        ("cut", vec![("content-length", "19")], "{\"schema"),
        ("encoded", vec![("content-encoding", "gzip")], BODY),
    ] {
        let fake = Fake::new();
        let is_good = Arc::new(AtomicBool::new(false));
        let good = is_good.clone();
        let headers: Vec<(String, String)> = reply_headers
            .iter()
            .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
            .collect();
        fake.exchange_by(move |request| {
            let good = good.load(Ordering::SeqCst);
            let headers = headers.clone();
            async move {
                if good {
                    return Ok(manifest_reply(&request, BODY));
                }
                let headers: Vec<_> = headers.iter().map(|(n, v)| (&n[..], &v[..])).collect();
                Ok(reply(200, &headers, body))
            }
        });
        let serving = serve(fake, config()).await;
        let mut wire = serving.connect().await;
        for path in ["/v2/team/app/manifests/v1", &by_digest()] {
            let answer = wire.get(path, &[]).await;
            assert_eq!(answer.status, 502, "{what} {path}");
            assert!(answer.text().contains("hint"));
        }
        is_good.store(true, Ordering::SeqCst);
        assert_eq!(wire.get(&by_digest(), &[]).await.text(), BODY, "{what}");
    }
}

#[tokio::test]
async fn what_a_client_accepts_is_passed_on_line_by_line() {
    let serving = serve(registry(), config()).await;
    let mut wire = serving.connect().await;
    let lines: Vec<String> = (0..20)
        .map(|n| format!("Accept: application/type.{n}+json, text/x{n}"))
        .collect();
    let mut all: Vec<&str> = lines.iter().map(String::as_str).collect();
    all.extend([
        ALICE,
        "Accept-Encoding: gzip",
        "X-Dragonfly-Registry: registry.test:5000",
        "X-Dragonfly-Tag: t",
        "Connection: x-mine, keep-alive",
        "X-Mine: 1",
        "X-Kept: 2",
        "Proxy-Authorization: Basic c2VjcmV0",
    ]);
    wire.get(
        "/v2/team/app/manifests/v1?ns=registry.test%3A5000&x=1",
        &all,
    )
    .await;
    let exchanges = serving.fake.exchanges.lock();
    let sent = &exchanges[0];
    let accepts: Vec<_> = sent.headers.get_all("accept").iter().collect();
    assert_eq!(accepts.len(), 20);
    assert_eq!(accepts[7], "application/type.7+json, text/x7");
    assert_eq!(sent.path_and_query, "/v2/team/app/manifests/v1?x=1");
    assert_eq!(sent.headers.get("x-kept").unwrap(), "2");
    for gone in [
        "accept-encoding",
        "x-dragonfly-registry",
        "x-dragonfly-tag",
        "x-mine",
        "connection",
        "host",
        "proxy-authorization",
    ] {
        assert!(sent.headers.get(gone).is_none(), "{gone}");
    }
    assert!(!format!("{sent:?}").contains("alice"));
}

/// `len` bytes in chunks of 1 MiB.
fn huge(len: usize) -> Vec<Bytes> {
    let all: Bytes = (0..len).map(|n| (n % 253) as u8).collect();
    (0..len)
        .step_by(1 << 20)
        .map(|at| all.slice(at..(at + (1 << 20)).min(len)))
        .collect()
}

#[tokio::test]
async fn huge_manifests_pass_uncached_up_to_a_limit_and_wrong_ones_are_cut() {
    let chunks = huge(6 << 20);
    let digest = digest_of(&chunks.concat());
    for (what, with_len, flip) in [
        ("right", true, false),
        ("chunked", false, false),
        ("wrong", true, true),
        ("wrong chunked", false, true),
    ] {
        let fake = Fake::new();
        let mut sent = chunks.clone();
        if flip {
            sent[5] = Bytes::from(vec![0; 1 << 20]);
        }
        fake.exchange_by(move |_| {
            let body = stream::iter(sent.clone().into_iter().map(Ok)).boxed();
            let len = (6_u32 << 20).to_string();
            let headers = [("content-length", &len[..])];
            let headers = if with_len { &headers[..] } else { &[] };
            let mut reply = reply(200, headers, "");
            reply.body = body;
            async move { Ok(reply) }
        });
        let serving = serve(fake, config()).await;
        for _ in 0..2 {
            let mut wire = serving.connect().await;
            let answer = wire.get(&format!("/v2/a/manifests/{digest}"), &[]).await;
            assert_eq!((answer.status, answer.is_whole), (200, !flip), "{what}");
            assert_eq!(digest_of(&answer.body) == digest, !flip, "{what}");
        }
        assert_eq!(serving.fake.exchanged().len(), 2, "not kept");
    }
}

#[tokio::test]
async fn a_manifest_without_end_is_not_passed_on() {
    for with_len in [true, false] {
        let fake = Fake::new();
        fake.exchange_by(move |_| {
            let chunk = Bytes::from(vec![b' '; 1 << 20]);
            let headers = [("content-length", "9999999999")];
            let mut reply = reply(200, if with_len { &headers[..] } else { &[] }, "");
            reply.body = stream::repeat_with(move || Ok(chunk.clone())).boxed();
            async move { Ok(reply) }
        });
        let serving = serve(fake, config()).await;
        let mut wire = serving.connect().await;
        let answer = wire.get("/v2/a/manifests/v1", &[]).await;
        if with_len {
            assert_eq!(answer.status, 502);
        } else {
            assert!(!answer.is_whole && answer.body.len() <= 32 << 20);
        }
    }
}

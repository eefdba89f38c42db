//! Who may read what: verdicts, their lifetime, their sharing, and registries that are down.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use pantala_mirror::{
    BackendErrorKind, BlobProbe, BlobVerdict, MirrorEvent, UpstreamReply, VerdictOrigin,
};
use tokio::sync::Notify;

use crate::fake::{Fake, config, failure, hang, reply, serve};

const CHALLENGE: &str =
    "Bearer realm=\"http://127.0.0.1:1/token\",service=\"s\",scope=\"repository:team/app:pull\"";

fn unauthorized() -> UpstreamReply {
    let headers = [
        ("www-authenticate", CHALLENGE),
        ("content-type", "application/json"),
        ("connection", "x-hop"),
        ("x-hop", "1"),
    ];
    reply(401, &headers, "{\"errors\":[{\"code\":\"UNAUTHORIZED\"}]}")
}

fn is_alice(probe: &BlobProbe) -> bool {
    probe
        .authorization
        .as_ref()
        .is_some_and(|a| a == "Bearer alice")
}

/// A fake whose blob only Alice may read.
fn private() -> Fake {
    let fake = Fake::new();
    let size_bytes = fake.blob.len() as u64;
    fake.probe_by(move |probe| async move {
        Ok(if is_alice(&probe) {
            BlobVerdict::Readable { size_bytes }
        } else {
            BlobVerdict::Refused(unauthorized())
        })
    });
    fake
}

fn origins(fake: &Fake) -> Vec<VerdictOrigin> {
    let of = |event: &MirrorEvent| match event {
        MirrorEvent::Verdict { origin, .. } => Some(*origin),
        _ => None,
    };
    fake.events.lock().iter().filter_map(of).collect()
}

#[tokio::test]
async fn two_clients_with_different_rights_get_what_the_registry_gives_each() {
    let serving = serve(private(), config()).await;
    let path = serving.fake.blob_path();
    for _ in 0..3 {
        let mut alice = serving.connect().await;
        assert_eq!(
            alice
                .get(&path, &["Authorization: Bearer alice"])
                .await
                .status,
            200
        );
        for lines in [
            &[][..],
            &["Authorization: Bearer mallory"],
            &["Authorization: Bearer "],
        ] {
            let mut other = serving.connect().await;
            let answer = other.get(&path, lines).await;
            assert_eq!(answer.status, 401, "{lines:?}");
            assert_eq!(answer.header("www-authenticate"), Some(CHALLENGE));
            assert_eq!(answer.text(), "{\"errors\":[{\"code\":\"UNAUTHORIZED\"}]}");
            assert_eq!(answer.header("x-hop"), None);
            let head = other.ask("HEAD", &path, lines).await;
            assert_eq!(
                (head.status, head.header("www-authenticate")),
                (401, Some(CHALLENGE))
            );
        }
    }
    let opened = serving.fake.opens.lock().len();
    assert_eq!(opened, 3, "nothing was opened for anyone else");
}

#[tokio::test]
async fn a_right_to_one_repository_opens_no_other_and_no_other_blob() {
    let serving = serve(private(), config()).await;
    let path = serving.fake.blob_path();
    let mut wire = serving.connect().await;
    let lines = ["Authorization: Bearer alice"];
    for target in [
        path.clone(),
        path.replace("team/app", "team/other"),
        path.replace(&path[path.len() - 4..], "0000"),
        format!("{path}?ns=registry.test:5000"),
    ] {
        assert_eq!(wire.get(&target, &lines).await.status, 200);
    }
    let asked: Vec<_> = serving
        .fake
        .probes
        .lock()
        .iter()
        .map(|p| (p.repository.clone(), p.digest))
        .collect();
    assert_eq!(
        asked.len(),
        3,
        "each pair is asked for, a known one is not: {asked:?}"
    );
}

#[tokio::test]
async fn concurrent_identical_questions_are_asked_once_even_if_the_first_client_leaves() {
    let fake = Fake::new();
    let size_bytes = fake.blob.len() as u64;
    let go = Arc::new(Notify::new());
    let gate = go.clone();
    fake.probe_by(move |_| {
        let gate = gate.clone();
        async move {
            gate.notified().await;
            Ok(BlobVerdict::Readable { size_bytes })
        }
    });
    let serving = serve(fake, config()).await;
    let request = format!(
        "GET {} HTTP/1.1\r\nHost: m\r\n\r\n",
        serving.fake.blob_path()
    );
    let mut first = serving.connect().await;
    first.send(&request).await;
    while serving.fake.probes.lock().is_empty() {
        tokio::task::yield_now().await;
    }
    let mut others = Vec::new();
    for _ in 0..8 {
        let mut wire = serving.connect().await;
        wire.send(&request).await;
        others.push(wire);
    }
    drop(first);
    tokio::time::sleep(Duration::from_millis(100)).await;
    go.notify_waiters();
    go.notify_one();
    for mut wire in others {
        assert_eq!(wire.answer(false).await.status, 200);
    }
    assert_eq!(serving.fake.probes.lock().len(), 1);
    assert!(origins(&serving.fake).contains(&VerdictOrigin::Shared));
}

#[tokio::test]
async fn a_refusal_reaches_all_who_waited_and_is_not_remembered() {
    let fake = Fake::new();
    let size_bytes = fake.blob.len() as u64;
    let asked = Arc::new(AtomicUsize::new(0));
    let count = asked.clone();
    fake.probe_by(move |_| {
        let n = count.fetch_add(1, Ordering::SeqCst);
        async move {
            Ok(match n {
                0 => BlobVerdict::Refused(reply(403, &[], "{\"errors\":[]}")),
                1 => BlobVerdict::Refused(reply(404, &[], "{\"errors\":[]}")),
                2 => BlobVerdict::Refused(reply(429, &[("retry-after", "7")], "")),
                _ => BlobVerdict::Readable { size_bytes },
            })
        }
    });
    let serving = serve(fake, config()).await;
    let mut wire = serving.connect().await;
    for status in [403, 404, 429, 200, 200] {
        let answer = wire.get(&serving.fake.blob_path(), &[]).await;
        assert_eq!(answer.status, status);
        assert_eq!(answer.header("retry-after"), (status == 429).then_some("7"));
    }
    assert_eq!(asked.load(Ordering::SeqCst), 4);
}

#[tokio::test]
async fn a_failing_registry_is_a_gateway_error_and_nonsense_is_never_a_blob() {
    for (status, told) in [
        (500, 502),
        (501, 502),
        (502, 502),
        (503, 503),
        (504, 504),
        (200, 502),
        (302, 502),
    ] {
        let fake = Fake::new();
        fake.probe_by(move |_| async move {
            Ok(BlobVerdict::Refused(reply(status, &[], "secret page")))
        });
        let serving = serve(fake, config()).await;
        let answer = serving
            .connect()
            .await
            .get(&serving.fake.blob_path(), &[])
            .await;
        assert_eq!(answer.status, told, "registry said {status}");
        assert!(!answer.text().contains("secret page"));
    }
}

#[tokio::test(start_paused = true)]
async fn while_the_registry_is_down_known_callers_go_on_for_a_while_and_new_ones_do_not() {
    let fake = private();
    let down = Arc::new(AtomicBool::new(false));
    let is_down = down.clone();
    let size_bytes = fake.blob.len() as u64;
    fake.probe_by(move |probe| {
        let is_down = is_down.load(Ordering::SeqCst);
        async move {
            if is_down {
                return hang().await;
            }
            Ok(if is_alice(&probe) {
                BlobVerdict::Readable { size_bytes }
            } else {
                BlobVerdict::Refused(unauthorized())
            })
        }
    });
    let serving = serve(fake, config()).await;
    let path = serving.fake.blob_path();
    let status = async |lines: &[&str]| serving.connect().await.get(&path, lines).await.status;
    let alice = &["Authorization: Bearer alice"][..];
    assert_eq!(status(alice).await, 200);
    down.store(true, Ordering::SeqCst);
    // Still fresh: nobody is asked.
    assert_eq!(status(alice).await, 200);
    assert_eq!(serving.fake.probes.lock().len(), 1);
    tokio::time::advance(Duration::from_secs(61)).await;
    let before = tokio::time::Instant::now();
    assert_eq!(status(alice).await, 200);
    assert!(
        before.elapsed() <= Duration::from_millis(2100),
        "half of the bound is left for the bytes"
    );
    assert_eq!(origins(&serving.fake).last(), Some(&VerdictOrigin::Stale));
    assert_eq!(status(&[]).await, 504);
    assert_eq!(status(&["Authorization: Bearer bob"]).await, 504);
    tokio::time::advance(Duration::from_secs(3600)).await;
    assert_eq!(status(alice).await, 504, "not for ever");
}

#[tokio::test(start_paused = true)]
async fn a_right_that_is_taken_away_is_gone_after_the_ttl_even_if_the_registry_then_fails() {
    let fake = Fake::new();
    let size_bytes = fake.blob.len() as u64;
    let asked = Arc::new(AtomicUsize::new(0));
    fake.probe_by(move |_| {
        let n = asked.fetch_add(1, Ordering::SeqCst);
        async move {
            match n {
                0 => Ok(BlobVerdict::Readable { size_bytes }),
                1 => Ok(BlobVerdict::Refused(unauthorized())),
                _ => Err(failure(BackendErrorKind::Unavailable)),
            }
        }
    });
    let serving = serve(fake, config()).await;
    let mut wire = serving.connect().await;
    for status in [200, 401, 503] {
        assert_eq!(
            wire.get(&serving.fake.blob_path(), &[]).await.status,
            status
        );
        tokio::time::advance(Duration::from_secs(61)).await;
    }
}

#[tokio::test]
async fn ambiguous_credentials_are_refused() {
    let serving = serve(private(), config()).await;
    let lines = [
        "Authorization: Bearer alice",
        "Authorization: Bearer mallory",
    ];
    let answer = serving
        .connect()
        .await
        .get(&serving.fake.blob_path(), &lines)
        .await;
    assert_eq!(answer.status, 400);
    assert!(serving.fake.probes.lock().is_empty());
}

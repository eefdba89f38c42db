//! Who asks, in every way a registry may want to know.

mod origin;

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures_util::TryStreamExt as _;
use futures_util::future::join_all;
use http::{HeaderMap, HeaderValue, Method};
use origin::{Act, Origin, Seen, blob, config, digest, honest, range, reply, source};
use pantala_source::{Credential, Reply, Source, SourceConfig, SourceError, TokenFault};

const BASIC: &str = "Basic YWxpY2U6aHVudGVyMg==";

fn alice() -> Credential {
    Credential::login("alice", "hunter2")
}

async fn get(
    source: &Source,
    origin: &Origin,
    path: &str,
    credential: &Credential,
) -> Result<Reply, SourceError> {
    source
        .exchange(
            Method::GET,
            &origin.upstream(),
            path,
            HeaderMap::new(),
            credential,
        )
        .await
}

fn unauthorized(challenge: &str) -> Vec<Act> {
    reply(401, &[("WWW-Authenticate", challenge)], b"{}")
}

/// A token service that counts its tokens, and a registry that takes only the valid one.
struct Pair {
    service: Origin,
    registry: Origin,
    /// The number of the token that the registry takes.
    valid: Arc<AtomicUsize>,
}

async fn pair(answer: fn(usize, &Seen) -> Vec<Act>) -> Pair {
    let service = Origin::start(answer).await;
    let realm = service.url("/token");
    let valid = Arc::new(AtomicUsize::new(0));
    let accepted = Arc::clone(&valid);
    let registry = Origin::start(move |_, request| {
        let good = format!("Bearer token-{}", accepted.load(Ordering::SeqCst));
        if request.header("authorization") == Some(&good) {
            return reply(200, &[], b"ok");
        }
        unauthorized(&format!(
            r#"Bearer realm="{realm}",service="reg",scope="repository:a/b:pull""#
        ))
    })
    .await;
    Pair {
        service,
        registry,
        valid,
    }
}

fn numbered(n: usize, _: &Seen) -> Vec<Act> {
    reply(
        200,
        &[],
        format!(r#"{{"token":"token-{n}","expires_in":300}}"#).as_bytes(),
    )
}

const PATH: &str = "/v2/a/b/manifests/v1";

#[tokio::test]
async fn basic_is_answered_and_remembered() {
    let registry = Origin::start(|_, request| match request.header("authorization") {
        Some(BASIC) => reply(200, &[], b"ok"),
        _ => unauthorized(r#"Basic realm="r""#),
    })
    .await;
    let source = source();
    for _ in 0..3 {
        assert_eq!(
            get(&source, &registry, PATH, &alice())
                .await
                .unwrap()
                .status,
            200
        );
    }
    assert_eq!(registry.requests().len(), 4, "challenged once");
    let wrong = Credential::login("alice", "wrong");
    let refused = get(&source, &registry, PATH, &wrong).await.unwrap();
    assert_eq!(refused.status, 401);
    let nobody = get(&source, &registry, PATH, &Credential::ANONYMOUS)
        .await
        .unwrap();
    assert_eq!(nobody.status, 401);
    assert_eq!(
        registry.requests().last().unwrap().header("authorization"),
        None
    );
}

#[tokio::test]
async fn a_token_is_fetched_with_the_password_and_kept() {
    let pair = pair(numbered).await;
    let source = source();
    for _ in 0..3 {
        assert_eq!(
            get(&source, &pair.registry, PATH, &alice())
                .await
                .unwrap()
                .status,
            200
        );
    }
    let asked = pair.service.requests();
    assert_eq!(asked.len(), 1);
    assert_eq!(asked[0].header("authorization"), Some(BASIC));
    assert_eq!(
        asked[0].target,
        "/token?service=reg&scope=repository%3Aa%2Fb%3Apull&account=alice"
    );
    // Password to the service, token to the registry, and never the other way round.
    for request in pair.registry.requests() {
        assert!(
            request
                .header("authorization")
                .is_none_or(|v| v == "Bearer token-0")
        );
    }
    assert_eq!(source.totals().tokens, 1);
}

#[tokio::test]
async fn a_rejected_token_is_fetched_anew_once() {
    let pair = pair(numbered).await;
    let source = source();
    get(&source, &pair.registry, PATH, &alice()).await.unwrap();
    pair.valid.store(1, Ordering::SeqCst);
    assert_eq!(
        get(&source, &pair.registry, PATH, &alice())
            .await
            .unwrap()
            .status,
        200
    );
    assert_eq!(pair.service.requests().len(), 2);
    // A registry that takes no token at all is asked twice and no more.
    pair.valid.store(usize::MAX, Ordering::SeqCst);
    let before = pair.registry.requests().len();
    let refused = get(&source, &pair.registry, PATH, &alice()).await.unwrap();
    assert_eq!(refused.status, 401);
    assert!(refused.headers.contains_key("www-authenticate"));
    assert_eq!(pair.registry.requests().len(), before + 2);
    assert_eq!(pair.service.requests().len(), 3);
}

#[tokio::test]
async fn many_requests_at_the_same_time_fetch_one_token() {
    let pair = pair(numbered).await;
    let source = source();
    let alice = alice();
    let all = (0..20).map(|_| get(&source, &pair.registry, PATH, &alice));
    for result in join_all(all).await {
        assert_eq!(result.unwrap().status, 200);
    }
    assert_eq!(pair.service.requests().len(), 1);
}

#[tokio::test]
async fn nobody_gets_a_token_only_when_told_to_fetch_one() {
    let pair = pair(numbered).await;
    let source = source();
    let refused = get(&source, &pair.registry, PATH, &Credential::NONE)
        .await
        .unwrap();
    assert_eq!(refused.status, 401);
    assert!(pair.service.requests().is_empty());
    let served = get(&source, &pair.registry, PATH, &Credential::ANONYMOUS)
        .await
        .unwrap();
    assert_eq!(served.status, 200);
    assert_eq!(pair.service.requests()[0].header("authorization"), None);
    assert!(!pair.service.requests()[0].target.contains("account"));
    let refused = get(&source, &pair.registry, PATH, &Credential::NONE)
        .await
        .unwrap();
    assert_eq!(refused.status, 401, "nobody's token is not lent");
}

#[tokio::test]
async fn tokens_are_not_shared_between_users() {
    let pair = pair(|n, request| match request.header("authorization") {
        Some(BASIC) => numbered(n, request),
        _ => reply(401, &[], b"{}"),
    })
    .await;
    let source = source();
    get(&source, &pair.registry, PATH, &alice()).await.unwrap();
    for other in [
        Credential::login("alice", "wrong"),
        Credential::login("bob", "hunter2"),
        Credential::ANONYMOUS,
    ] {
        let error = get(&source, &pair.registry, PATH, &other)
            .await
            .unwrap_err();
        assert!(
            matches!(&error, SourceError::Token { reason: TokenFault::Refused(s), .. } if *s == 401),
            "{error:?}"
        );
    }
}

#[tokio::test]
async fn a_callers_own_header_goes_through_untouched() {
    let pair = pair(numbered).await;
    let source = source();
    let own = Credential::Header(HeaderValue::from_static("Bearer of-the-caller"));
    let refused = get(&source, &pair.registry, PATH, &own).await.unwrap();
    assert_eq!(refused.status, 401);
    assert!(refused.headers.contains_key("www-authenticate"));
    assert!(pair.service.requests().is_empty());
    let seen = pair.registry.requests();
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].all("authorization"), ["Bearer of-the-caller"]);
}

#[tokio::test]
async fn bad_token_services_are_errors_and_not_followed() {
    for (name, answer) in [
        (
            "no token",
            (|_, _| reply(200, &[], b"{}")) as fn(usize, &Seen) -> Vec<Act>,
        ),
        ("not json", |_, _| reply(200, &[], b"<html>")),
        ("huge", |_, _| reply(200, &[], &vec![b' '; 1 << 20])),
        ("refused", |_, _| reply(403, &[], b"{}")),
        ("injection", |_, _| {
            reply(200, &[], br#"{"token":"a\r\nX: y"}"#)
        }),
    ] {
        let pair = pair(answer).await;
        let result = get(&source(), &pair.registry, PATH, &alice()).await;
        match result {
            Err(SourceError::Token { .. } | SourceError::TooLarge { .. }) => {}
            // A token that fits in no header is as good as none.
            Ok(reply) if name == "injection" => assert_eq!(reply.status, 401),
            other => panic!("{name}: {other:?}"),
        }
    }
    for realm in [
        "http://169.254.169.254/latest/meta-data",
        "file:///etc/passwd",
        "http://user:pass@127.0.0.1/",
        "nonsense",
    ] {
        let registry =
            Origin::start(move |_, _| unauthorized(&format!("Bearer realm=\"{realm}\""))).await;
        let error = get(&source(), &registry, PATH, &alice()).await.unwrap_err();
        assert!(
            matches!(error, SourceError::Token { .. } | SourceError::Forbidden(_)),
            "{realm}: {error:?}"
        );
        assert!(!format!("{error:?} {error}").contains("hunter2"));
    }
}

#[tokio::test]
async fn a_challenge_of_another_origin_gets_no_password() {
    let service = Origin::start(numbered).await;
    let realm = service.url("/token");
    let evil =
        Origin::start(move |_, _| unauthorized(&format!("Basic, Bearer realm=\"{realm}\""))).await;
    let target = evil.url("/");
    let registry = Origin::start(move |_, _| reply(307, &[("Location", &target)], b"")).await;
    let refused = get(&source(), &registry, PATH, &alice()).await.unwrap();
    assert_eq!(refused.status, 401);
    assert!(service.requests().is_empty());
    for request in evil.requests() {
        assert_eq!(request.header("authorization"), None);
    }
}

#[tokio::test]
async fn a_token_that_ends_in_the_middle_of_a_blob_is_replaced() {
    let data = blob(50_000, 30);
    let service = Origin::start(numbered).await;
    let realm = service.url("/token");
    let served = data.clone();
    let registry = Origin::start(move |n, request| {
        // Request 0 is challenged, 1 is cut, and from then on the first token is no longer taken.
        let valid = if n <= 1 {
            "Bearer token-0"
        } else {
            "Bearer token-1"
        };
        if request.header("authorization") != Some(valid) {
            return unauthorized(&format!(r#"Bearer realm="{realm}""#));
        }
        let mut acts = honest(&served, request);
        if n == 1
            && let Act::Send(bytes) = &mut acts[0]
        {
            bytes.truncate(30_000);
            acts.push(Act::Close);
        }
        acts
    })
    .await;
    let stream = source()
        .fetch_blob(
            &registry.upstream(),
            &"a/b".parse().unwrap(),
            &digest(&data),
            50_000,
            range(0, 50_000),
            &alice(),
        )
        .await
        .unwrap();
    let got = stream.try_collect::<Vec<_>>().await.unwrap().concat();
    assert!(got == data);
    assert_eq!(service.requests().len(), 2);
    assert!(
        service.requests()[0]
            .target
            .contains("scope=repository%3Aa%2Fb%3Apull")
    );
}

#[tokio::test]
async fn a_token_service_that_never_answers_holds_nobody_for_long() {
    let service = Origin::start(|_, _| vec![Act::Hang]).await;
    let realm = service.url("/token");
    let registry =
        Origin::start(move |_, _| unauthorized(&format!(r#"Bearer realm="{realm}""#))).await;
    let source = Source::new(SourceConfig {
        first_byte_timeout: Duration::from_millis(300),
        retries_max: 0,
        ..config()
    })
    .unwrap();
    let alice = alice();
    let started = Instant::now();
    let all = (0..30).map(|_| get(&source, &registry, PATH, &alice));
    for result in join_all(all).await {
        assert!(matches!(result, Err(SourceError::TimedOut { .. })));
    }
    // One after the other they would need 9 s.
    assert!(started.elapsed() < Duration::from_secs(5));
}

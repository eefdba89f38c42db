//! Where an origin may send a request, and what travels there.

mod origin;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use http::{HeaderMap, HeaderValue, Method};
use origin::{Act, Origin, Seen, blob, config, digest, honest, range, reply, source};
use pantala_source::{Credential, RedirectFault, Resolution, ResolveNames, Source, SourceError};

async fn get(source: &Source, origin: &Origin, path: &str) -> Result<Vec<u8>, SourceError> {
    let mut headers = HeaderMap::new();
    headers.insert("cookie", HeaderValue::from_static("secret=1"));
    let credential = Credential::Header(HeaderValue::from_static("Bearer hunter2"));
    let reply = source
        .exchange(Method::GET, &origin.upstream(), path, headers, &credential)
        .await?;
    Ok(reply.bytes(1 << 20).await?.to_vec())
}

fn to(location: &str) -> Vec<Act> {
    reply(307, &[("Location", location)], b"elsewhere")
}

#[tokio::test]
async fn authorization_stays_with_its_origin() {
    let store = Origin::start(|_, _| reply(200, &[], b"from the store")).await;
    let target = store.url("/signed?sig=1");
    let registry = Origin::start(move |_, request| match request.target.as_str() {
        "/far" => to(&target),
        "/near" => to("/here"),
        _ => reply(200, &[], b"here"),
    })
    .await;
    let source = source();
    assert_eq!(
        get(&source, &registry, "/far").await.unwrap(),
        b"from the store"
    );
    assert_eq!(get(&source, &registry, "/near").await.unwrap(), b"here");
    for request in registry.requests() {
        assert_eq!(request.header("authorization"), Some("Bearer hunter2"));
        assert_eq!(request.header("cookie"), Some("secret=1"));
    }
    let request: &Seen = &store.requests()[0];
    assert_eq!(request.target, "/signed?sig=1");
    assert_eq!(request.header("authorization"), None);
    assert_eq!(request.header("cookie"), None);
    assert_eq!(
        request.header("host"),
        Some(store.address.to_string().as_str())
    );
}

#[tokio::test]
async fn authorization_does_not_come_back_after_a_detour() {
    let home = Arc::new(std::sync::Mutex::new(String::new()));
    let back = Arc::clone(&home);
    let other = Origin::start(move |_, _| to(&back.lock().unwrap())).await;
    let away = other.url("/");
    let registry = Origin::start(move |_, request| match request.target.as_str() {
        "/start" => to(&away),
        _ => reply(200, &[], b"back"),
    })
    .await;
    *home.lock().unwrap() = registry.url("/end");
    assert_eq!(get(&source(), &registry, "/start").await.unwrap(), b"back");
    assert_eq!(registry.requests()[1].target, "/end");
    assert_eq!(registry.requests()[1].header("authorization"), None);
}

#[tokio::test]
async fn a_blob_is_resumed_through_a_fresh_redirect() {
    let data = blob(50_000, 7);
    let served = data.clone();
    let store = Origin::start(move |n, request| {
        let mut acts = honest(&served, request);
        if n == 0
            && let Act::Send(bytes) = &mut acts[0]
        {
            bytes.truncate(20_000);
            acts.push(Act::Close);
        }
        acts
    })
    .await;
    let base = store.url("/signed");
    let registry = Origin::start(move |n, _| to(&format!("{base}?n={n}"))).await;
    let stream = source()
        .fetch_blob(
            &registry.upstream(),
            &"a/b".parse().unwrap(),
            &digest(&data),
            50_000,
            range(0, 50_000),
            &Credential::NONE,
        )
        .await
        .unwrap();
    let got: Vec<u8> = futures_util::TryStreamExt::try_collect::<Vec<_>>(stream)
        .await
        .unwrap()
        .concat();
    assert!(got == data);
    let targets: Vec<_> = store.requests().into_iter().map(|r| r.target).collect();
    assert_eq!(targets, ["/signed?n=0", "/signed?n=1"]);
}

#[tokio::test]
async fn endless_redirects_end() {
    let registry = Origin::start(|n, _| to(&format!("/{n}"))).await;
    let error = get(&source(), &registry, "/").await.unwrap_err();
    assert!(matches!(
        error,
        SourceError::Redirect {
            fault: RedirectFault::TooMany(5),
            ..
        }
    ));
    assert_eq!(registry.requests().len(), 6);
}

#[tokio::test]
async fn redirects_to_metadata_addresses_are_not_followed() {
    for location in [
        "http://169.254.169.254/latest/meta-data",
        "http://[::ffff:169.254.169.254]/",
        "http://2852039166/",
        "http://100.100.100.200/",
        "http://[fd00:ec2::254]/",
        "//0.0.0.0:1/",
    ] {
        let registry = Origin::start(move |_, _| to(location)).await;
        let error = get(&source(), &registry, "/").await.unwrap_err();
        assert!(
            matches!(error, SourceError::Forbidden(_)),
            "{location}: {error}"
        );
    }
}

/// Names that resolve as a test says.
struct Names(fn(&str) -> Vec<SocketAddr>);

impl ResolveNames for Names {
    fn resolve(&self, host: String) -> Resolution {
        let answer = (self.0)(&host);
        Box::pin(async move {
            if answer.is_empty() {
                return Err(io::Error::other("no such name"));
            }
            Ok(answer)
        })
    }
}

fn rebound(host: &str) -> Vec<SocketAddr> {
    match host {
        "metadata.test" => vec!["169.254.169.254:0".parse().unwrap()],
        "mapped.test" => vec!["[::ffff:169.254.169.254]:0".parse().unwrap()],
        "mixed.test" => ["169.254.169.254:0", "127.0.0.1:0"]
            .map(|text| text.parse().unwrap())
            .to_vec(),
        _ => vec![],
    }
}

#[tokio::test]
async fn names_that_resolve_to_metadata_addresses_are_not_connected_to() {
    let source = Source::with_names(config(), Arc::new(Names(rebound))).unwrap();
    for host in ["metadata.test", "mapped.test"] {
        let upstream = format!("http://{host}").parse().unwrap();
        let error = source
            .exchange(
                Method::GET,
                &upstream,
                "/v2/",
                HeaderMap::new(),
                &Credential::NONE,
            )
            .await
            .unwrap_err();
        assert!(
            matches!(&error, SourceError::Forbidden(f) if f.host == host),
            "{error:?}"
        );
        let location: &'static str = match host {
            "metadata.test" => "http://metadata.test/",
            _ => "http://mapped.test/",
        };
        let registry = Origin::start(move |_, _| to(location)).await;
        let error = get(&source, &registry, "/").await.unwrap_err();
        assert!(matches!(error, SourceError::Forbidden(_)), "{error:?}");
    }
}

#[tokio::test]
async fn the_good_addresses_of_a_name_are_used_and_a_missing_name_is_unavailable() {
    let source = Source::with_names(config(), Arc::new(Names(rebound))).unwrap();
    let registry = Origin::start(|_, _| reply(200, &[], b"ok")).await;
    let port = registry.address.port();
    let upstream = format!("http://mixed.test:{port}").parse().unwrap();
    let reply = source
        .exchange(
            Method::GET,
            &upstream,
            "/v2/",
            HeaderMap::new(),
            &Credential::NONE,
        )
        .await
        .unwrap();
    assert_eq!(reply.bytes(10).await.unwrap(), "ok");
    assert_eq!(
        registry.requests()[0].header("host"),
        Some(format!("mixed.test:{port}").as_str())
    );
    let upstream = "http://missing.test".parse().unwrap();
    let error = source
        .exchange(
            Method::GET,
            &upstream,
            "/v2/",
            HeaderMap::new(),
            &Credential::NONE,
        )
        .await
        .unwrap_err();
    assert!(
        matches!(error, SourceError::Unavailable { .. }),
        "{error:?}"
    );
}

#[tokio::test]
async fn a_redirected_upload_is_its_callers_business() {
    let registry = Origin::start(|_, _| to("/elsewhere")).await;
    let reply = source()
        .exchange(
            Method::POST,
            &registry.upstream(),
            "/v2/a/blobs/uploads/",
            HeaderMap::new(),
            &Credential::NONE,
        )
        .await
        .unwrap();
    assert_eq!(reply.status, 307);
    assert_eq!(registry.requests().len(), 1);
}

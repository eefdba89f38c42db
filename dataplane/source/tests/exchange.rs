//! Requests that are passed on, and plain URLs.

mod origin;

use futures_util::TryStreamExt as _;
use http::{HeaderMap, HeaderValue, Method};
use origin::{Act, Origin, blob, head, honest, honest_head, range, reply, source};
use pantala_source::{Credential, SourceError, UpstreamError, Validator};
use url::Url;

fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
    let mut map = HeaderMap::new();
    for (name, value) in lines {
        map.append(*name, HeaderValue::from_static(value));
    }
    map
}

#[tokio::test]
async fn every_accept_line_goes_on_and_the_connections_headers_do_not() {
    let registry = Origin::start(|_, _| {
        let lines = [
            ("Docker-Content-Digest", "sha256:00"),
            ("Connection", "keep-alive, X-Own"),
            ("X-Own", "1"),
            ("Set-Cookie", "a"),
            ("Set-Cookie", "b"),
        ];
        reply(200, &lines, b"manifest")
    })
    .await;
    let sent = headers(&[
        ("accept", "application/vnd.oci.image.index.v1+json"),
        ("accept", "application/vnd.oci.image.manifest.v1+json"),
        ("accept", "*/*"),
        ("user-agent", "containerd/1.6"),
        ("host", "evil.test"),
        ("authorization", "Bearer of-the-headers"),
        ("connection", "x-hop"),
        ("x-hop", "1"),
        ("transfer-encoding", "chunked"),
        ("content-length", "5"),
        ("if-none-match", "\"x\""),
    ]);
    let reply = source()
        .exchange(
            Method::GET,
            &registry.upstream(),
            "/v2/a/manifests/v1?ns=docker.io",
            sent,
            &Credential::NONE,
        )
        .await
        .unwrap();
    assert_eq!(reply.status, 200);
    assert_eq!(reply.headers["docker-content-digest"], "sha256:00");
    assert_eq!(reply.headers.get_all("set-cookie").iter().count(), 2);
    assert!(!reply.headers.contains_key("x-own") && !reply.headers.contains_key("connection"));
    assert_eq!(reply.bytes(8).await.unwrap(), "manifest");
    let seen = &registry.requests()[0];
    assert_eq!(seen.target, "/v2/a/manifests/v1?ns=docker.io");
    assert_eq!(seen.all("accept").len(), 3);
    assert_eq!(seen.header("user-agent"), Some("containerd/1.6"));
    assert_eq!(seen.header("if-none-match"), Some("\"x\""));
    assert_eq!(seen.all("host"), [registry.address.to_string()]);
    for gone in [
        "authorization",
        "x-hop",
        "transfer-encoding",
        "content-length",
    ] {
        assert_eq!(seen.header(gone), None, "{gone}");
    }
}

#[tokio::test]
async fn any_status_is_an_answer_and_failures_are_tried_again_first() {
    for (status, requests) in [(401, 1), (404, 1), (429, 1), (304, 1), (500, 4)] {
        let registry = Origin::start(move |_, _| {
            vec![Act::Send(head(
                status,
                &[("Content-Length", "0"), ("X-Kept", "1")],
            ))]
        })
        .await;
        let reply = source()
            .exchange(
                Method::GET,
                &registry.upstream(),
                "/v2/",
                HeaderMap::new(),
                &Credential::NONE,
            )
            .await
            .unwrap();
        assert_eq!(reply.status.as_u16(), status);
        assert_eq!(reply.headers["x-kept"], "1");
        assert_eq!(registry.requests().len(), requests, "{status}");
    }
    let registry = Origin::start(|n, _| match n {
        0 => vec![Act::Close],
        1 => reply(502, &[], b""),
        _ => reply(200, &[], b"ok"),
    })
    .await;
    let reply = source()
        .exchange(
            Method::GET,
            &registry.upstream(),
            "/v2/",
            HeaderMap::new(),
            &Credential::NONE,
        )
        .await
        .unwrap();
    assert_eq!(reply.status, 200);
}

#[tokio::test]
async fn what_may_change_something_is_sent_once() {
    let registry = Origin::start(|_, _| reply(500, &[], b"")).await;
    let reply = source()
        .exchange(
            Method::DELETE,
            &registry.upstream(),
            "/v2/",
            HeaderMap::new(),
            &Credential::NONE,
        )
        .await
        .unwrap();
    assert_eq!(reply.status, 500);
    assert_eq!(registry.requests().len(), 1);
}

#[tokio::test]
async fn a_huge_manifest_is_refused_whether_announced_or_not() {
    for announced in [true, false] {
        let registry = Origin::start(move |_, _| {
            let body = vec![b'x'; 100_000];
            if announced {
                return reply(200, &[], &body);
            }
            vec![
                Act::Send([head(200, &[("Connection", "close")]), body].concat()),
                Act::Close,
            ]
        })
        .await;
        let reply = source()
            .exchange(
                Method::GET,
                &registry.upstream(),
                "/",
                HeaderMap::new(),
                &Credential::NONE,
            )
            .await
            .unwrap();
        let error = reply.bytes(99_999).await.unwrap_err();
        assert!(matches!(
            error,
            SourceError::TooLarge {
                limit_bytes: 99_999,
                ..
            }
        ));
    }
}

#[tokio::test]
async fn a_head_that_announces_much_has_no_body() {
    let registry =
        Origin::start(|_, _| vec![Act::Send(head(200, &[("Content-Length", "999999")]))]).await;
    let reply = source()
        .exchange(
            Method::HEAD,
            &registry.upstream(),
            "/",
            HeaderMap::new(),
            &Credential::NONE,
        )
        .await
        .unwrap();
    assert_eq!(reply.headers["content-length"], "999999");
    assert_eq!(reply.bytes(10).await.unwrap(), "");
}

#[tokio::test]
async fn a_body_that_is_cut_is_an_error_and_no_short_success() {
    let registry = Origin::start(|_, _| {
        let bytes = [head(200, &[("Content-Length", "100")]), vec![b'x'; 50]].concat();
        vec![Act::Send(bytes), Act::Close]
    })
    .await;
    let upstream = registry.upstream();
    let reply = source()
        .exchange(
            Method::GET,
            &upstream,
            "/",
            HeaderMap::new(),
            &Credential::NONE,
        )
        .await
        .unwrap();
    let error = reply
        .into_stream()
        .try_collect::<Vec<_>>()
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            SourceError::Cut {
                offset: 50,
                end: 100,
                ..
            }
        ),
        "{error:?}"
    );
}

#[tokio::test]
async fn paths_that_leave_the_upstream_are_not_asked_for() {
    let upstream = "http://127.0.0.1:1".parse().unwrap();
    let result = source()
        .exchange(
            Method::GET,
            &upstream,
            "//evil.test/",
            HeaderMap::new(),
            &Credential::NONE,
        )
        .await;
    assert!(matches!(
        result.unwrap_err(),
        SourceError::BadRequest(UpstreamError::RequestPath)
    ));
}

fn url(origin: &Origin) -> Url {
    Url::parse(&origin.url("/file.tar?x=1#part")).unwrap()
}

#[tokio::test]
async fn a_plain_url_is_probed_and_fetched_in_ranges() {
    let data = blob(100_000, 8);
    let served = data.clone();
    let origin = Origin::start(move |_, request| {
        let mut acts = honest(&served, request);
        if let Act::Send(bytes) = &mut acts[0] {
            let line = b"ETag: \"v1\"\r\n";
            let at = bytes.windows(2).position(|w| w == b"\r\n").unwrap() + 2;
            bytes.splice(at..at, line.iter().copied());
        }
        acts
    })
    .await;
    let source = source();
    let info = source
        .probe_url(&url(&origin), &Credential::NONE)
        .await
        .unwrap();
    assert_eq!(
        (info.size, info.accepts_ranges),
        (Some(100_000), Some(true))
    );
    assert!(matches!(info.validator, Some(Validator::ETag(_))));
    let stream = source
        .fetch_url(&url(&origin), &info, range(10, 90_000), &Credential::NONE)
        .await
        .unwrap();
    let got: Vec<u8> = stream.try_collect::<Vec<_>>().await.unwrap().concat();
    assert!(got == data[10..90_000]);
    let seen = &origin.requests()[1];
    assert_eq!(seen.target, "/file.tar?x=1");
    assert_eq!(seen.header("if-range"), Some("\"v1\""));
}

#[tokio::test]
async fn content_that_changes_in_the_middle_is_found() {
    for changed in ["tag", "size", "shrunk"] {
        let data = blob(10_000, 9);
        let origin = Origin::start(move |n, request| match (request.method.as_str(), n) {
            ("HEAD", _) => {
                let lines = [("Content-Length", "10000"), ("ETag", "\"v1\"")];
                vec![Act::Send(head(200, &lines))]
            }
            (_, 1) => {
                let mut acts =
                    honest_head(&data, request, |start, _| data[start..start + 100].to_vec());
                acts.push(Act::Close);
                acts
            }
            // RFC 9110, section 13.1.5: If-Range fails, so that the whole new version comes.
            _ => match changed {
                "tag" => reply(200, &[("ETag", "\"v2\"")], &data),
                "size" => reply(200, &[], &data[..9000]),
                _ => reply(416, &[("Content-Range", "bytes */50")], b""),
            },
        })
        .await;
        let source = source();
        let info = source
            .probe_url(&url(&origin), &Credential::NONE)
            .await
            .unwrap();
        let stream = source
            .fetch_url(&url(&origin), &info, range(1000, 9000), &Credential::NONE)
            .await
            .unwrap();
        let error = stream.try_collect::<Vec<_>>().await.unwrap_err();
        assert!(
            matches!(error, SourceError::Changed { .. }),
            "{changed}: {error:?}"
        );
    }
}

#[tokio::test]
async fn a_url_without_a_known_size_is_read_in_one_go() {
    let origin = Origin::start(|_, _| {
        let bytes = [head(200, &[("Connection", "close")]), b"dynamic".to_vec()].concat();
        vec![Act::Send(bytes), Act::Close]
    })
    .await;
    let source = source();
    let info = source
        .probe_url(&url(&origin), &Credential::NONE)
        .await
        .unwrap();
    assert_eq!((info.size, info.accepts_ranges), (None, Some(false)));
    let reply = source
        .open_url(&url(&origin), HeaderMap::new(), &Credential::NONE)
        .await
        .unwrap();
    assert_eq!(reply.bytes(100).await.unwrap(), "dynamic");
}

#[tokio::test]
async fn urls_of_other_kinds_are_refused() {
    for (text, expected) in [
        ("ftp://h/x", UpstreamError::Scheme),
        ("file:///etc/passwd", UpstreamError::Scheme),
        ("http://user:pass@h/x", UpstreamError::UserInfo),
    ] {
        let result = source()
            .probe_url(&Url::parse(text).unwrap(), &Credential::NONE)
            .await;
        assert!(matches!(result.unwrap_err(), SourceError::BadRequest(e) if e == expected));
    }
    let url = Url::parse("http://169.254.169.254/latest").unwrap();
    let error = source()
        .probe_url(&url, &Credential::NONE)
        .await
        .unwrap_err();
    assert!(matches!(error, SourceError::Forbidden(_)));
}

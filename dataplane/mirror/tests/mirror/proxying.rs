//! Upstreams and the forward proxy: who is asked, who is never asked, tunnels.

use std::time::Duration;

use http::Method;
use pantala_mirror::MirrorEvent;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::fake::{Fake, config, policy, reply, serve};
use crate::wire::Wire;

fn echoing() -> Fake {
    let fake = Fake::new();
    fake.exchange_by(|request| async move {
        let seen = format!(
            "{} {} {}",
            request.method, request.upstream, request.path_and_query
        );
        Ok(reply(200, &[("location", "/v2/elsewhere?x=%2F")], seen))
    });
    fake
}

#[tokio::test]
async fn the_base_and_other_registry_paths_are_passed_through() {
    let fake = Fake::new();
    fake.exchange_by(|request| async move {
        let headers = [
            ("www-authenticate", "Bearer realm=\"x\""),
            ("location", "https://cdn.test/a?sig=1"),
        ];
        let status = if request.path_and_query == "/v2/" {
            401
        } else {
            307
        };
        Ok(reply(status, &headers, "{}"))
    });
    let serving = serve(fake, config()).await;
    let mut wire = serving.connect().await;
    let answer = wire.get("/v2/", &[]).await;
    assert_eq!(
        (answer.status, answer.header("www-authenticate")),
        (401, Some("Bearer realm=\"x\""))
    );
    let answer = wire.get("/v2/a/tags/list?n=5&last=x", &[]).await;
    assert_eq!(
        (answer.status, answer.header("location")),
        (307, Some("https://cdn.test/a?sig=1"))
    );
    assert_eq!(
        serving.fake.exchanges.lock()[1].path_and_query,
        "/v2/a/tags/list?n=5&last=x"
    );
    for status in [500, 502, 599] {
        serving
            .fake
            .exchange_by(move |_| async move { Ok(reply(status, &[], "oops")) });
        assert_eq!(wire.get("/v2/", &[]).await.status, 502);
    }
}

#[tokio::test]
async fn header_then_ns_then_default_choose_the_upstream_and_all_must_be_listed() {
    let serving = serve(echoing(), config()).await;
    let mut wire = serving.connect().await;
    for (target, lines) in [
        ("/v2/_catalog", &[][..]),
        ("/v2/_catalog?ns=registry.test%3A5000", &[]),
        (
            "/v2/_catalog?ns=evil.test",
            &["X-Dragonfly-Registry: http://127.0.0.1:25000"][..],
        ),
        (
            "http://registry.test:5000/v2/_catalog",
            &["X-Dragonfly-Registry: evil.test"],
        ),
        ("http://127.0.0.1:25000/v2/_catalog?ns=evil.test", &[]),
    ] {
        let answer = wire.get(target, lines).await;
        assert_eq!(
            answer.text(),
            "GET http://127.0.0.1:25000 /v2/_catalog",
            "{target}"
        );
    }
    for (target, lines, status) in [
        ("/v2/_catalog?ns=evil.test", &[][..], 403),
        (
            "/v2/_catalog",
            &["X-Dragonfly-Registry: https://evil.test"][..],
            403,
        ),
        (
            "/v2/_catalog",
            &["X-Dragonfly-Registry: http://169.254.169.254"],
            403,
        ),
        ("http://169.254.169.254/v2/", &[], 403),
        ("http://evil.test/latest/meta-data", &[], 403),
        (
            "/v2/_catalog",
            &["X-Dragonfly-Registry: a", "X-Dragonfly-Registry: b"],
            400,
        ),
        ("/v2/_catalog", &["X-Dragonfly-Registry: not a host"], 400),
        ("/v2/_catalog?ns=a.test&ns=b.test", &[], 400),
        ("http://user:pass@registry.test:5000/v2/", &[], 400),
        ("ftp://registry.test:5000/v2/", &[], 400),
    ] {
        let answer = wire.get(target, lines).await;
        assert_eq!(
            answer.status,
            status,
            "{target} {lines:?}: {}",
            answer.text()
        );
        assert!(
            answer.text().contains("hint") && !answer.text().contains("pass@"),
            "{}",
            answer.text()
        );
    }
    assert_eq!(serving.fake.exchanges.lock().len(), 5);
}

#[tokio::test]
async fn an_open_mirror_still_refuses_metadata_addresses() {
    let mut config = config();
    config.policy = policy(true);
    let serving = serve(echoing(), config).await;
    let mut wire = serving.connect().await;
    assert_eq!(
        wire.get("http://any.test:8080/x?y=1", &[]).await.text(),
        "GET http://any.test:8080 /x?y=1"
    );
    for target in [
        "http://169.254.169.254/latest",
        "http://[::ffff:169.254.169.254]/",
        "http://0.0.0.0:80/v2/",
    ] {
        assert_eq!(wire.get(target, &[]).await.status, 403, "{target}");
    }
    assert_eq!(
        wire.ask("CONNECT", "169.254.169.254:80", &[]).await.status,
        403
    );
}

#[tokio::test]
async fn absolute_form_blobs_are_served_like_any_other() {
    let serving = serve(Fake::new(), config()).await;
    let mut wire = serving.connect().await;
    let target = format!("http://registry.test:5000{}", serving.fake.blob_path());
    let answer = wire
        .get(&target, &["range: bytes=10-19", "x-dragonfly-priority: 6"])
        .await;
    assert_eq!(
        (answer.status, &answer.body[..]),
        (206, &serving.fake.blob[10..20])
    );
    // The server's own pages are its own only when asked for as such.
    wire.get("http://registry.test:5000/healthy", &[]).await;
    assert_eq!(serving.fake.exchanged(), [Method::GET]);
}

/// A server that sends back what it gets, and says goodbye.
async fn echo() -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut read, mut write) = stream.split();
                tokio::io::copy(&mut read, &mut write).await.unwrap();
                write.write_all(b"bye").await.unwrap();
            });
        }
    });
    address
}

fn tunnelling(target: std::net::SocketAddr) -> pantala_mirror::MirrorConfig {
    let table = [(
        "tunnel.test".to_owned(),
        format!("http://{target}").parse().unwrap(),
    )];
    let mut config = config();
    config.policy = pantala_mirror::Policy::new("tunnel.test", table.into(), false).unwrap();
    config
}

#[tokio::test]
async fn a_tunnel_carries_bytes_both_ways_and_half_closes() {
    let target = echo().await;
    let serving = serve(Fake::new(), tunnelling(target)).await;
    for name in [target.to_string(), "tunnel.test:443".to_owned()] {
        let mut wire = serving.connect().await;
        assert_eq!(wire.ask("CONNECT", &name, &[]).await.status, 200);
        wire.send("hello").await;
        wire.stream.shutdown().await.unwrap();
        let mut text = String::new();
        wire.stream.read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hellobye");
    }
    let ended = MirrorEvent::TunnelEnded {
        sent_bytes: 5,
        received_bytes: 8,
    };
    while !serving.fake.events.lock().contains(&ended) {
        tokio::task::yield_now().await;
    }
    let mut wire = serving.connect().await;
    for (target, status) in [("127.0.0.1:22", 403), ("other.test:443", 403)] {
        assert_eq!(
            wire.ask("CONNECT", target, &[]).await.status,
            status,
            "{target}"
        );
    }
}

#[tokio::test]
async fn tunnels_are_bounded_in_number_and_in_idleness() {
    let target = echo().await;
    let mut config = tunnelling(target);
    config.tunnels_max = 1;
    config.tunnel_idle_timeout = Duration::from_millis(200);
    let serving = serve(Fake::new(), config).await;
    let mut first = serving.connect().await;
    assert_eq!(
        first.ask("CONNECT", &target.to_string(), &[]).await.status,
        200
    );
    let mut second = serving.connect().await;
    assert_eq!(
        second.ask("CONNECT", &target.to_string(), &[]).await.status,
        503
    );
    assert!(first.is_closed().await, "an idle tunnel ends by itself");
    // Its place is free again.
    loop {
        let mut third = serving.connect().await;
        match third.ask("CONNECT", &target.to_string(), &[]).await.status {
            200 => break,
            status => assert_eq!(status, 503),
        }
        tokio::task::yield_now().await;
    }
}

#[tokio::test]
async fn a_tunnel_to_a_dead_port_fails_with_a_reason() {
    let dead = TcpListener::bind("127.0.0.1:0")
        .await
        .unwrap()
        .local_addr()
        .unwrap();
    let serving = serve(Fake::new(), tunnelling(dead)).await;
    let mut wire: Wire = serving.connect().await;
    let answer = wire.ask("CONNECT", &dead.to_string(), &[]).await;
    assert_eq!(answer.status, 502);
    assert!(answer.text().contains("cannot connect"));
}

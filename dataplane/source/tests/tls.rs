//! TLS: own CAs, both versions of HTTP, and certificates that nobody vouches for.

mod origin;

use std::convert::Infallible;
use std::path::PathBuf;
use std::sync::Arc;

use bytes::Bytes;
use futures_util::TryStreamExt as _;
use http::{HeaderMap, Method, Version};
use http_body_util::Full;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use origin::{Origin, blob, config, digest, honest, range, reply};
use pantala_source::{
    Credential, RedirectFault, Resolution, ResolveNames, Source, SourceConfig, SourceError,
    Upstream,
};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use rustls::ServerConfig;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use tempfile::TempDir;
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

/// A CA in a file, and a server that it vouches for.
struct Authority {
    _dir: TempDir,
    ca_file: PathBuf,
    acceptor: TlsAcceptor,
}

fn authority(alpn: &[&[u8]]) -> Authority {
    let ca_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&ca_key).unwrap();
    let issuer = Issuer::new(params, ca_key);
    let key = KeyPair::generate().unwrap();
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let certificate = CertificateParams::new(names)
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let dir = tempfile::tempdir().unwrap();
    let ca_file = dir.path().join("ca.pem");
    std::fs::write(&ca_file, ca.pem()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let mut server = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.der().clone()], key)
        .unwrap();
    server.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Authority {
        _dir: dir,
        ca_file,
        acceptor: TlsAcceptor::from(Arc::new(server)),
    }
}

fn trusting(authority: &Authority) -> Source {
    Source::new(SourceConfig {
        ca_files: vec![authority.ca_file.clone()],
        ..config()
    })
    .unwrap()
}

fn https(origin: &Origin) -> Upstream {
    format!("https://{}", origin.address).parse().unwrap()
}

async fn get(source: &Source, upstream: &Upstream) -> Result<Bytes, SourceError> {
    let reply = source
        .exchange(
            Method::GET,
            upstream,
            "/v2/",
            HeaderMap::new(),
            &Credential::NONE,
        )
        .await?;
    reply.bytes(1 << 20).await
}

#[tokio::test]
async fn a_registry_of_an_own_ca_is_read_over_http_1() {
    let authority = authority(&[b"http/1.1"]);
    let data = blob(300_000, 10);
    let served = data.clone();
    let tls = Some(authority.acceptor.clone());
    let origin = Origin::serve(tls, move |_, request| honest(&served, request)).await;
    let stream = trusting(&authority)
        .fetch_blob(
            &https(&origin),
            &"a".parse().unwrap(),
            &digest(&data),
            300_000,
            range(100_000, 300_000),
            &Credential::NONE,
        )
        .await
        .unwrap();
    let got: Vec<u8> = stream.try_collect::<Vec<_>>().await.unwrap().concat();
    assert!(got == data[100_000..]);
}

#[tokio::test]
async fn an_unknown_ca_is_refused_and_not_retried() {
    let (trusted, other) = (authority(&[]), authority(&[]));
    let origin = Origin::serve(Some(other.acceptor.clone()), |_, _| reply(200, &[], b"")).await;
    let source = trusting(&trusted);
    let error = get(&source, &https(&origin)).await.unwrap_err();
    assert!(matches!(error, SourceError::Untrusted { .. }), "{error:?}");
    assert_eq!(source.totals().retries, 0);
    assert!(error.to_string().contains("configure the CA"), "{error}");
}

/// Every name is this machine.
struct Loopback;

impl ResolveNames for Loopback {
    fn resolve(&self, _: String) -> Resolution {
        Box::pin(async { Ok(vec!["127.0.0.1:0".parse().unwrap()]) })
    }
}

#[tokio::test]
async fn a_certificate_for_another_name_is_refused() {
    let authority = authority(&[]);
    let tls = Some(authority.acceptor.clone());
    let origin = Origin::serve(tls, |_, _| reply(200, &[], b"ok")).await;
    let config = SourceConfig {
        ca_files: vec![authority.ca_file.clone()],
        ..config()
    };
    let source = Source::with_names(config, Arc::new(Loopback)).unwrap();
    let port = origin.address.port();
    let good = format!("https://localhost:{port}").parse().unwrap();
    assert_eq!(get(&source, &good).await.unwrap(), "ok");
    let bad = format!("https://registry.test:{port}").parse().unwrap();
    let error = get(&source, &bad).await.unwrap_err();
    assert!(matches!(error, SourceError::Untrusted { .. }), "{error:?}");
}

#[tokio::test]
async fn a_ca_of_one_host_counts_for_that_host_only() {
    let authority = authority(&[]);
    let tls = || Some(authority.acceptor.clone());
    let own = Origin::serve(tls(), |_, _| reply(200, &[], b"own")).await;
    let other = Origin::serve(tls(), |_, _| reply(200, &[], b"other")).await;
    let mut config = config();
    config
        .host_ca_files
        .insert(own.address.to_string(), vec![authority.ca_file.clone()]);
    let source = Source::new(config).unwrap();
    assert_eq!(get(&source, &https(&own)).await.unwrap(), "own");
    let error = get(&source, &https(&other)).await.unwrap_err();
    assert!(matches!(error, SourceError::Untrusted { .. }), "{error:?}");
}

#[tokio::test]
async fn a_redirect_out_of_tls_is_not_followed() {
    let authority = authority(&[]);
    let plain = Origin::start(|_, _| reply(200, &[], b"plain")).await;
    let target = plain.url("/");
    let origin = Origin::serve(Some(authority.acceptor.clone()), move |_, _| {
        reply(302, &[("Location", &target)], b"")
    })
    .await;
    let error = get(&trusting(&authority), &https(&origin))
        .await
        .unwrap_err();
    assert!(matches!(
        error,
        SourceError::Redirect {
            fault: RedirectFault::Downgrade,
            ..
        }
    ));
    assert!(plain.requests().is_empty());
}

#[tokio::test]
async fn a_plain_service_behind_an_https_url_is_unavailable() {
    let origin = Origin::start(|_, _| vec![origin::Act::Close]).await;
    let source = Source::new(SourceConfig {
        retries_max: 1,
        connect_timeout: std::time::Duration::from_millis(500),
        ..config()
    })
    .unwrap();
    let error = get(&source, &https(&origin)).await.unwrap_err();
    assert!(error.is_retryable(), "{error:?}");
}

/// An HTTP/2 server that serves one blob, in ranges, and cuts the first body short.
async fn http2_server(acceptor: TlsAcceptor, data: Vec<u8>) -> std::net::SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let data = Bytes::from(data);
    tokio::spawn(async move {
        loop {
            let (socket, _) = listener.accept().await.unwrap();
            let Ok(socket) = acceptor.accept(socket).await else {
                continue;
            };
            let data = data.clone();
            let serve = service_fn(move |request: http::Request<hyper::body::Incoming>| {
                assert_eq!(request.version(), Version::HTTP_2);
                let data = data.clone();
                async move { Ok::<_, Infallible>(ranged(&request, &data)) }
            });
            tokio::spawn(
                hyper::server::conn::http2::Builder::new(TokioExecutor::new())
                    .serve_connection(TokioIo::new(socket), serve),
            );
        }
    });
    address
}

fn ranged<B>(request: &http::Request<B>, data: &Bytes) -> http::Response<Full<Bytes>> {
    let size = data.len();
    let response = http::Response::builder();
    let Some(value) = request.headers().get("range") else {
        return response
            .header("content-length", size)
            .body(Full::new(match *request.method() {
                Method::HEAD => Bytes::new(),
                _ => data.clone(),
            }))
            .unwrap();
    };
    let (first, last) = value.to_str().unwrap()[6..].split_once('-').unwrap();
    let (start, end): (usize, usize) = (first.parse().unwrap(), last.parse::<usize>().unwrap() + 1);
    response
        .status(206)
        .header("content-range", format!("bytes {start}-{}/{size}", end - 1))
        .body(Full::new(data.slice(start..end)))
        .unwrap()
}

#[tokio::test]
async fn http_2_is_spoken_where_it_is_offered() {
    let authority = authority(&[b"h2", b"http/1.1"]);
    let data = blob(20 << 20, 11);
    let address = http2_server(authority.acceptor.clone(), data.clone()).await;
    let upstream: Upstream = format!("https://{address}").parse().unwrap();
    let source = trusting(&authority);
    let repository = "a/b".parse().unwrap();
    let size = data.len() as u64;
    let digest = digest(&data);
    let info = source
        .probe_blob(&upstream, &repository, &digest, &Credential::NONE)
        .await
        .unwrap();
    assert_eq!(info.size, size);
    let head = source
        .exchange(
            Method::HEAD,
            &upstream,
            "/v2/",
            HeaderMap::new(),
            &Credential::NONE,
        )
        .await
        .unwrap();
    assert_eq!(head.headers["content-length"], size.to_string().as_str());
    assert_eq!(head.bytes(10).await.unwrap(), "");
    let parts = (0..4).map(|i| {
        let (source, upstream, repository) = (&source, &upstream, &repository);
        let part = range(i * size / 4, (i + 1) * size / 4);
        async move {
            let stream = source
                .fetch_blob(upstream, repository, &digest, size, part, &Credential::NONE)
                .await
                .unwrap();
            stream.try_collect::<Vec<_>>().await.unwrap().concat()
        }
    });
    let got = futures_util::future::join_all(parts).await.concat();
    assert!(got == data);
}

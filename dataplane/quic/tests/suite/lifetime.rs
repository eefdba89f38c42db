//! Connections end for a reason that both sides are told, or that they find out in bounded time.

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use super::cluster::{Authority, connect, limits, soon};
use bytes::Bytes;
use pantala_quic::{ALPN, Blame, CloseReason, Error, Limits};
use pantala_wire::{NodeId, Priority};
use rustls_pki_types::PrivatePkcs8KeyDer;
use tokio::net::UdpSocket;

fn closed_by_peer(error: &Error) -> Option<CloseReason> {
    match error {
        Error::ClosedByPeer { reason, .. } => Some(*reason),
        _ => None,
    }
}

/// A path between a node and `target` that can be cut.
async fn path(target: SocketAddr) -> (SocketAddr, Arc<AtomicBool>) {
    let front = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let back = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let address = front.local_addr().unwrap();
    let cut = Arc::new(AtomicBool::new(false));
    let is_cut = cut.clone();
    tokio::spawn(async move {
        let (mut out, mut home) = (vec![0; 65536], vec![0; 65536]);
        let mut client = None;
        loop {
            tokio::select! {
                Ok((length, from)) = front.recv_from(&mut out) => {
                    client = Some(from);
                    if !is_cut.load(Ordering::Relaxed) {
                        let _ = back.send_to(&out[..length], target).await;
                    }
                }
                Ok((length, _)) = back.recv_from(&mut home) => {
                    if let Some(client) = client.filter(|_| !is_cut.load(Ordering::Relaxed)) {
                        let _ = front.send_to(&home[..length], client).await;
                    }
                }
            }
        }
    });
    (address, cut)
}

#[tokio::test]
async fn a_path_that_is_cut_fails_everything_that_waits_in_bounded_time() {
    let authority = Authority::new();
    let quick = Limits {
        idle_timeout: Duration::from_millis(900),
        keep_alive: Duration::from_millis(200),
        ..limits()
    };
    let (a, b) = (
        authority.node_with(quick.clone()),
        authority.node_with(quick),
    );
    let (address, cut) = path(b.local_addr()).await;
    let (here, there) = tokio::join!(a.connect(address, b.node()), b.accept());
    let (here, there) = (here.unwrap(), there.unwrap());
    // Silence is not death: signs of life keep it open for several idle timeouts.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    assert!(!here.is_closed() && !there.is_closed());

    let (mut send, mut recv) = here.open(Priority::Bulk).await.unwrap();
    send.write_bytes(Bytes::from_static(b"?")).await.unwrap();
    let _theirs = soon(there.accept()).await.unwrap();
    cut.store(true, Ordering::Relaxed);
    let block = Bytes::from(vec![0; 1 << 20]);
    let (read, written, accepted, closed) = soon(async {
        tokio::join!(
            recv.read_chunk(1),
            async {
                loop {
                    if let Err(error) = send.write_bytes(block.clone()).await {
                        break error;
                    }
                }
            },
            here.accept(),
            there.closed(),
        )
    })
    .await;
    assert_eq!(read.unwrap_err(), Error::TimedOut);
    assert_eq!(written, Error::TimedOut);
    assert_eq!(accepted.unwrap_err(), Error::TimedOut);
    assert_eq!(closed, Error::TimedOut);
    assert_eq!(Error::TimedOut.blame(), Blame::Path);
    assert_eq!(
        here.open(Priority::Fault).await.unwrap_err(),
        Error::TimedOut
    );
}

#[tokio::test]
async fn connecting_to_nobody_fails_in_bounded_time() {
    let authority = Authority::new();
    let node = authority.node_with(Limits {
        handshake_timeout: Duration::from_millis(300),
        ..limits()
    });
    let silent = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let error = soon(node.connect(silent.local_addr().unwrap(), super::cluster::stranger()))
        .await
        .unwrap_err();
    assert_eq!(error, Error::TimedOut);
    assert!(error.is_retryable());
    assert_eq!(node.connection_count(), 0);
}

/// A server of bare quinn that completes handshakes and then says nothing.
fn mute_server(authority: &Authority) -> (quinn::Endpoint, NodeId) {
    let identity = authority.issue();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut tls = rustls::ServerConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(
            vec![identity.certificate_chain_der[0].clone().into()],
            PrivatePkcs8KeyDer::from(identity.key_pkcs8_der.clone()).into(),
        )
        .unwrap();
    tls.alpn_protocols = vec![ALPN.to_vec()];
    let tls = quinn::crypto::rustls::QuicServerConfig::try_from(tls).unwrap();
    let server = quinn::Endpoint::server(
        quinn::ServerConfig::with_crypto(Arc::new(tls)),
        (Ipv4Addr::LOCALHOST, 0).into(),
    )
    .unwrap();
    (server, super::cluster::endpoint(identity, limits()).node())
}

#[tokio::test]
async fn a_peer_that_never_admits_fails_the_connection_in_bounded_time() {
    let authority = Authority::new();
    let node = authority.node_with(Limits {
        handshake_timeout: Duration::from_millis(500),
        ..limits()
    });
    let (server, id) = mute_server(&authority);
    let address = server.local_addr().unwrap();
    let (error, handshake) = soon(async {
        tokio::join!(node.connect(address, id), async {
            server.accept().await.unwrap().await
        })
    })
    .await;
    assert!(handshake.is_ok());
    assert_eq!(error.unwrap_err(), Error::TimedOut);
    soon(async {
        while node.connection_count() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn the_last_handle_or_stream_that_is_dropped_closes_the_connection() {
    let authority = Authority::new();
    let (a, b) = (authority.node(), authority.node());
    let (here, there) = soon(connect(&a, &b)).await;
    let stream = here.open(Priority::Bulk).await.unwrap();
    let clone = here.clone();
    drop(here);
    drop(clone);
    tokio::time::sleep(Duration::from_millis(50)).await;
    assert!(!there.is_closed(), "a stream is still in use");
    drop(stream);
    let error = soon(there.closed()).await;
    assert_eq!(closed_by_peer(&error), Some(CloseReason::Done), "{error}");
    drop(there);
    soon(async {
        while a.connection_count() + b.connection_count() > 0 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn an_endpoint_that_closes_tells_its_peers_and_ends_its_accepting() {
    let authority = Authority::new();
    let (a, b) = (authority.node(), authority.node());
    let (here, _there) = soon(connect(&a, &b)).await;
    soon(b.close()).await;
    let error = soon(here.closed()).await;
    assert_eq!(closed_by_peer(&error), Some(CloseReason::ShuttingDown));
    assert!(soon(b.accept()).await.is_none());
    assert_eq!(
        soon(b.connect(a.local_addr(), a.node())).await.unwrap_err(),
        Error::EndpointClosed
    );
}

#[tokio::test]
async fn an_endpoint_that_is_dropped_frees_its_port_and_its_connections() {
    let authority = Authority::new();
    let (a, b) = (authority.node(), authority.node());
    let (here, there) = soon(connect(&a, &b)).await;
    let address = b.local_addr();
    drop(there);
    drop(b);
    let error = soon(here.closed()).await;
    assert!(closed_by_peer(&error).is_some(), "{error}");
    soon(async {
        while std::net::UdpSocket::bind(address).is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
}

#[tokio::test]
async fn a_peer_that_was_killed_and_restarted_is_found_out_before_any_timeout() {
    let authority = Authority::new();
    let patient = Limits {
        idle_timeout: Duration::from_secs(600),
        ..limits()
    };
    let a = authority.node_with(patient.clone());
    let identity = authority.issue();
    let b = super::cluster::endpoint(identity.clone(), patient.clone());
    let address = b.local_addr();
    let (front, cut) = path(address).await;
    let (here, there) = tokio::join!(a.connect(front, b.node()), b.accept());
    let (here, there) = (here.unwrap(), there.unwrap());
    // As if killed: its last words are not heard.
    cut.store(true, Ordering::Relaxed);
    b.close().await;
    drop((there, b));
    let restarted = soon(async {
        loop {
            let config = pantala_quic::EndpointConfig {
                listen: address,
                identity: identity.clone(),
                limits: patient.clone(),
                driver: crate::DRIVER,
            };
            match pantala_quic::Endpoint::bind(config) {
                Ok(endpoint) => break endpoint,
                Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
            }
        }
    })
    .await;
    cut.store(false, Ordering::Relaxed);
    let (mut send, _recv) = here.open(Priority::Bulk).await.unwrap();
    let error = soon(async {
        loop {
            if let Err(error) = send.write_bytes(Bytes::from_static(&[0; 1000])).await {
                break error;
            }
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    })
    .await;
    assert_eq!(error, Error::Reset);
    assert!(error.is_retryable() && error.is_connection_lost());
    let (again, _there) = soon(connect(&a, &restarted)).await;
    assert_eq!(again.remote_node(), restarted.node());
}

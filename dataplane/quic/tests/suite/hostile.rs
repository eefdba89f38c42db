//! Garbage on the port, floods and limits: an endpoint goes on for those it should serve.

use std::net::{Ipv4Addr, SocketAddr, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use super::cluster::{Authority, Noise, connect, limits, soon};
use bytes::Bytes;
use pantala_quic::{CloseReason, Error, Limits};
use pantala_wire::Priority;

/// A datagram that a QUIC endpoint looks at twice: noise, with a header that may be right.
fn garbage(noise: &mut Noise, captured: &[Vec<u8>]) -> Vec<u8> {
    let length = noise.next() as usize % 1500;
    match noise.next() % 4 {
        0 => noise.bytes(length),
        1 => {
            // A long header of version 1, Initial or another type, large enough to be taken seriously.
            let mut bytes = noise.bytes(1200 + length % 200);
            bytes[0] = 0xc0 | (noise.next() as u8 & 0x3f);
            bytes[1..5].copy_from_slice(&[0, 0, 0, 1]);
            bytes[5] = 8;
            bytes[14] = 8;
            bytes
        }
        2 => {
            let mut bytes = noise.bytes(length.max(1));
            bytes[0] = 0x40 | (bytes[0] & 0x3f);
            bytes
        }
        _ => {
            let mut bytes = captured[noise.next() as usize % captured.len()].clone();
            for _ in 0..noise.next() % 8 {
                let at = noise.next() as usize % bytes.len();
                bytes[at] = noise.next() as u8;
            }
            bytes
        }
    }
}

/// First packets of real clients, taken on a socket that never answers.
async fn captured_initials(authority: &Authority) -> Vec<Vec<u8>> {
    let trap = tokio::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0))
        .await
        .unwrap();
    let address = trap.local_addr().unwrap();
    let mut captured = Vec::new();
    for _ in 0..4 {
        let client = authority.node();
        let attempt = tokio::spawn(async move {
            let _ = client.connect(address, super::cluster::stranger()).await;
        });
        let mut buffer = vec![0; 2048];
        let (length, _) = soon(trap.recv_from(&mut buffer)).await.unwrap();
        buffer.truncate(length);
        captured.push(buffer);
        attempt.abort();
    }
    captured
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn garbage_on_the_port_harms_neither_a_transfer_nor_new_connections() {
    let seed = 0x5eed_0001;
    eprintln!("seed {seed:#x}");
    let authority = Authority::new();
    let (a, b) = (authority.node(), authority.node());
    let captured = captured_initials(&authority).await;
    let (here, there) = soon(connect(&a, &b)).await;
    let done = Arc::new(AtomicBool::new(false));
    let (stop, targets) = (done.clone(), [a.local_addr(), b.local_addr()]);
    let flood = std::thread::spawn(move || {
        let mut noise = Noise(seed);
        let socket = UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let mut sent = 0u64;
        while sent < 20_000 || !stop.load(Ordering::Relaxed) {
            for target in targets {
                let _ = socket.send_to(&garbage(&mut noise, &captured), target);
                sent += 1;
            }
            if sent.is_multiple_of(64) {
                std::thread::yield_now();
            }
        }
        sent
    });
    let block = Bytes::from(Noise(seed).bytes(1 << 20));
    let sent = block.clone();
    let serving = there.clone();
    let server = tokio::spawn(async move {
        let (mut send, _recv) = serving.accept().await.unwrap();
        for _ in 0..32 {
            send.write_bytes(sent.clone()).await.unwrap();
        }
        send.finish().unwrap();
        send.delivered().await
    });
    let (mut send, mut recv) = here.open(Priority::Bulk).await.unwrap();
    send.write_bytes(Bytes::from_static(b"go")).await.unwrap();
    let mut got = vec![0; block.len()];
    for _ in 0..32 {
        soon(recv.read_exact_into(&mut got)).await.unwrap();
        assert!(got == block);
    }
    soon(server).await.unwrap().unwrap();

    // A flood of half-made handshakes takes places; who keeps trying gets in.
    let newcomer = authority.node();
    let connection = soon(async {
        loop {
            match newcomer.connect(b.local_addr(), b.node()).await {
                Ok(connection) => break connection,
                Err(error) => assert!(error.is_retryable(), "{error}"),
            }
        }
    })
    .await;
    done.store(true, Ordering::Relaxed);
    let garbage_sent = flood.join().unwrap();
    eprintln!("{garbage_sent} datagrams of garbage");
    assert!(!connection.is_closed() && !here.is_closed() && !there.is_closed());
    // Those who were admitted, and nobody of the flood: a to b, and the newcomer.
    assert_eq!(b.connection_count(), 2);
}

#[tokio::test]
async fn more_connections_than_allowed_are_refused_and_the_rest_goes_on() {
    let authority = Authority::new();
    let node = authority.node_with(Limits {
        connections_max: 3,
        ..limits()
    });
    let mut kept = Vec::new();
    for _ in 0..3 {
        let peer = authority.node();
        kept.push((soon(connect(&peer, &node)).await, peer));
    }
    let late = authority.node();
    let error = soon(late.connect(node.local_addr(), node.node()))
        .await
        .unwrap_err();
    assert_eq!(error, Error::Refused);
    assert!(error.is_retryable());
    assert_eq!(
        soon(node.connect(late.local_addr(), late.node()))
            .await
            .unwrap_err(),
        Error::TooManyConnections(3)
    );
    assert!(kept.iter().all(|((here, _), _)| !here.is_closed()));
    // A place that becomes free is given again.
    let ((here, there), _peer) = kept.pop().unwrap();
    drop(here);
    soon(there.closed()).await;
    soon(async { while late.connect(node.local_addr(), node.node()).await.is_err() {} }).await;
}

#[tokio::test]
async fn one_node_cannot_take_all_places() {
    let authority = Authority::new();
    let node = authority.node_with(Limits {
        connections_per_node_max: 2,
        ..limits()
    });
    let greedy = authority.node();
    let _kept = [
        soon(connect(&greedy, &node)).await,
        soon(connect(&greedy, &node)).await,
    ];
    let error = soon(greedy.connect(node.local_addr(), node.node()))
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::ClosedByPeer {
                reason: CloseReason::Busy,
                ..
            }
        ),
        "{error}"
    );
    assert!(error.is_retryable());
    soon(connect(&authority.node(), &node)).await;
}

#[tokio::test]
async fn addresses_that_cannot_be_reached_from_the_socket_are_named() {
    let authority = Authority::new();
    let node = authority.node();
    for address in ["[::1]:1", "127.0.0.1:0"] {
        let address: SocketAddr = address.parse().unwrap();
        let error = soon(node.connect(address, super::cluster::stranger()))
            .await
            .unwrap_err();
        assert_eq!(error, Error::Address(address));
        assert!(!error.is_retryable());
    }
}

//! Datagrams over loopback, through two rings on one thread.

use std::net::IpAddr;

use pantala_uring::SendHead;

use crate::rig::{Node, pattern, to};

const LOOPBACKS: [&str; 2] = ["127.0.0.1:0", "[::1]:0"];

#[test]
fn this_kernel_is_good_enough() {
    pantala_uring::probe().unwrap();
}

#[test]
fn a_datagram_arrives_with_its_sender_and_receiver() {
    for listen in LOOPBACKS {
        let (mut a, mut b) = (Node::new(listen), Node::new(listen));
        a.send(to(b.address), b"hello");
        assert_eq!(a.sent().unwrap(), 5);
        let received = b.received();
        assert_eq!(&received.payload[..], b"hello");
        assert_eq!(received.segment_bytes, 5);
        assert_eq!(received.source, a.address);
        assert_eq!(received.local_ip, Some(b.address.ip()));
        assert_eq!(received.ecn, 0);
        assert_eq!(received.socket, b.socket);
    }
}

#[test]
fn a_batch_is_cut_on_its_way_out_and_may_arrive_as_one() {
    for listen in LOOPBACKS {
        let (mut a, mut b) = (Node::new(listen), Node::new(listen));
        let bytes = pattern(7, 44 * 1452 + 100);
        let head = SendHead {
            segment_bytes: Some(1452),
            ..to(b.address)
        };
        a.send(head, &bytes);
        assert_eq!(a.sent().unwrap(), bytes.len());
        let mut arrived = Vec::new();
        while arrived.len() < bytes.len() {
            let received = b.received();
            assert!(received.segment_bytes == 1452 || received.payload.len() == 100);
            arrived.extend_from_slice(&received.payload);
        }
        assert_eq!(arrived, bytes);
        assert!(
            b.ring.counters().received_in_place > 0,
            "it came as a batch"
        );
    }
}

#[test]
fn ecn_bits_arrive_as_they_were_sent() {
    for (listen, by) in [
        ("127.0.0.1:0", "127.0.0.1:0"),
        ("[::1]:0", "[::1]:0"),
        ("127.0.0.1:0", "[::]:0"),
    ] {
        for ecn in 0..4 {
            let (mut a, mut b) = (Node::new(by), Node::new(listen));
            a.send(
                SendHead {
                    ecn,
                    ..to(b.address)
                },
                b"x",
            );
            assert_eq!(b.received().ecn, ecn, "{by} to {listen}");
            assert!(a.sent().is_ok());
        }
    }
}

#[test]
fn the_source_address_is_the_one_that_was_chosen() {
    let (mut a, mut b) = (Node::new("0.0.0.0:0"), Node::new("127.0.0.1:0"));
    let source_ip: IpAddr = "127.0.0.9".parse().unwrap();
    a.send(
        SendHead {
            source_ip: Some(source_ip),
            ..to(b.address)
        },
        b"x",
    );
    assert_eq!(b.received().source.ip(), source_ip);
}

#[test]
fn a_socket_on_the_ipv6_wildcard_talks_to_both_families() {
    let mut wild = Node::new("[::]:0");
    for listen in LOOPBACKS {
        let mut peer = Node::new(listen);
        let mut address = wild.address;
        address.set_ip(peer.address.ip());
        peer.send(to(address), b"ping");
        let received = wild.received();
        assert_eq!(received.source.ip().to_canonical(), peer.address.ip());
        assert_eq!(
            received.local_ip.map(|ip| ip.to_canonical()),
            Some(peer.address.ip())
        );
        wild.send(
            SendHead {
                destination: received.source,
                source_ip: received.local_ip,
                ecn: 2,
                segment_bytes: None,
            },
            b"pong",
        );
        let answer = peer.received();
        assert_eq!(&answer.payload[..], b"pong");
        assert_eq!(answer.ecn, 2);
        assert_eq!(answer.source, address);
    }
}

//! Sockets that share an address, and what the host knows about routes.

use std::net::SocketAddr;

use pantala_uring::Ring;
use pantala_uring::socket::{SocketOptions, bind_group, route_payload_bytes};

use crate::rig::{Node, small, to};

const SOCKETS: usize = 3;

#[test]
fn a_datagram_arrives_where_its_connection_id_says() {
    for listen in ["127.0.0.1:0", "[::1]:0", "[::]:0"] {
        let group =
            bind_group(listen.parse().unwrap(), SOCKETS, &SocketOptions::default()).unwrap();
        assert!(group.steered);
        let mut address = group.sockets[0].local_addr().unwrap();
        assert!(
            group
                .sockets
                .iter()
                .all(|socket| socket.local_addr().unwrap() == address)
        );
        if address.ip().is_unspecified() {
            address.set_ip("::1".parse().unwrap());
        }
        let mut ring = Ring::new(&small()).unwrap();
        for socket in group.sockets {
            ring.add_socket(socket).unwrap();
        }
        ring.submit().unwrap();
        let mut from = peer_of(address);
        let mut target = Node {
            ring,
            socket: from.socket,
            address,
        };
        // All first bytes of a connection ID, in packets with short and with long headers; and packets too short.
        for id in 0..=255u8 {
            let short = [0x40, id, 9, 9, 9, 9, 9, 9];
            let long = [0xc0, 0, 0, 0, 1, 8, id, 9, 9, 9, 9, 9, 9, 9];
            for packet in [&short[..], &long] {
                from.send(to(address), packet);
                from.sent().unwrap();
                let received = target.received();
                assert_eq!(received.payload, packet);
                assert_eq!(received.socket.index(), usize::from(id) % SOCKETS);
            }
        }
        for packet in [&[0x40][..], &[0xc0, 0, 0, 0, 1, 8]] {
            from.send(to(address), packet);
            from.sent().unwrap();
            assert_eq!(target.received().socket.index(), 0);
        }
    }
}

/// A node of the same family as `address`.
fn peer_of(address: SocketAddr) -> Node {
    Node::new(if address.is_ipv4() {
        "127.0.0.1:0"
    } else {
        "[::1]:0"
    })
}

#[test]
fn a_group_of_one_shares_its_address_with_nobody() {
    let options = SocketOptions::default();
    let group = bind_group("127.0.0.1:0".parse().unwrap(), 1, &options).unwrap();
    assert!(group.steered);
    let taken = group.sockets[0].local_addr().unwrap();
    assert!(bind_group(taken, 1, &options).is_err());
    assert!(bind_group(taken, 2, &options).is_err());
}

#[test]
fn the_loopback_takes_what_a_datagram_can_hold() {
    assert_eq!(
        route_payload_bytes("127.0.0.1:9".parse().unwrap()),
        Some(65_507)
    );
    assert_eq!(
        route_payload_bytes("[::ffff:127.0.0.1]:9".parse().unwrap()),
        Some(65_507)
    );
    let v6 = route_payload_bytes("[::1]:9".parse().unwrap()).unwrap();
    assert!((65_488..=65_507).contains(&v6), "{v6}");
}

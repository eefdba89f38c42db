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

/// Runs `test` on a thread with a network of its own, with an interface of this MTU that has the addresses 10.77.0.1/24 and
/// fd77::1/64. False where that takes more rights than we have.
fn with_interface(mtu: u32, test: impl FnOnce() + Send + 'static) -> bool {
    std::thread::spawn(move || {
        // SAFETY: no memory is involved; only this thread moves.
        if unsafe { libc::unshare(libc::CLONE_NEWNET) } != 0 {
            return false;
        }
        let mtu = mtu.to_string();
        for arguments in [
            &[
                "link", "add", "wire", "mtu", &mtu, "type", "veth", "peer", "name", "far",
            ][..],
            &["address", "add", "10.77.0.1/24", "dev", "wire"],
            &["-6", "address", "add", "fd77::1/64", "dev", "wire", "nodad"],
            &["link", "set", "wire", "up"],
            &["link", "set", "far", "up"],
        ] {
            match std::process::Command::new("ip").args(arguments).status() {
                Ok(status) if status.success() => {}
                _ => return false,
            }
        }
        test();
        true
    })
    .join()
    .unwrap()
}

#[test]
fn a_route_takes_what_its_interface_does() {
    for mtu in [1500, 9000] {
        let is_tested = with_interface(mtu, move || {
            let payload = |to: &str| route_payload_bytes(to.parse().unwrap());
            let mtu = mtu as u16;
            assert_eq!(payload("10.77.0.2:9"), Some(mtu - 28));
            assert_eq!(payload("[::ffff:10.77.0.2]:9"), Some(mtu - 28));
            assert_eq!(payload("[fd77::2]:9"), Some(mtu - 48));
            // No route leads there.
            assert_eq!(payload("192.0.2.1:9"), None);
            assert_eq!(payload("[2001:db8::1]:9"), None);
            // And nothing larger leaves: it is not cut into fragments.
            for (listen, to, bytes) in [
                ("10.77.0.1:0", "10.77.0.2:9", mtu - 28),
                ("[fd77::1]:0", "[fd77::2]:9", mtu - 48),
                ("[::]:0", "10.77.0.2:9", mtu - 28),
            ] {
                let (mut node, to) = (Node::new(listen), crate::rig::to(to.parse().unwrap()));
                node.send(to, &vec![0; usize::from(bytes)]);
                assert_eq!(node.sent().unwrap(), usize::from(bytes));
                node.send(to, &vec![0; usize::from(bytes) + 1]);
                let refused = node.sent().unwrap_err();
                assert_eq!(refused.raw_os_error(), Some(libc::EMSGSIZE), "{listen}");
            }
        });
        if !is_tested {
            println!("not tested here: making an interface takes root and iproute2");
        }
    }
}

//! The programs in this machine's kernel. They need root, or CAP_BPF and CAP_NET_ADMIN; a test that may not
//! load them says so and passes.

use std::net::{SocketAddr, UdpSocket};
use std::time::Duration;

use pantala_meter::kernel::{KernelConfig, KernelError, KernelMeter, count};
use pantala_uring::socket::{SocketOptions, bind_group};
use pantala_uring::{Event, Ring, RingConfig, SendHead};

const WAIT_MAX: Duration = Duration::from_secs(5);

/// The programs, where this process may load them.
fn load(config: &KernelConfig) -> Option<KernelMeter> {
    match KernelMeter::load(config) {
        Ok(meter) => Some(meter),
        Err(error @ (KernelError::NotPermitted { .. } | KernelError::NoCgroup2)) => {
            println!("NOT TESTED HERE: {error}");
            None
        }
        Err(error) => panic!("{error}"),
    }
}

fn bind(address: &str) -> UdpSocket {
    let socket = UdpSocket::bind(address).expect("a socket");
    socket.set_read_timeout(Some(WAIT_MAX)).expect("a timeout");
    socket
}

/// Counts by themselves that the other tests in this process do not touch: each has a port of its own.
fn metered(socket: &UdpSocket) -> Option<KernelMeter> {
    let mut meter = load(&KernelConfig::default())?;
    let own = [socket.try_clone().expect("a descriptor")];
    meter.count_sockets(&own).expect("the socket is counted");
    Some(meter)
}

#[test]
fn every_byte_and_datagram_of_a_peer_is_counted_in_both_families() {
    for loopback in ["127.0.0.1:0", "[::1]:0"] {
        let (node, peer) = (bind(loopback), bind(loopback));
        let Some(meter) = metered(&node) else { return };
        let stranger = bind(loopback);
        let peer_addr = peer.local_addr().expect("bound");
        let node_addr = node.local_addr().expect("bound");
        let mut buffer = [0; 65_536];
        let (mut sent, mut received) = (0, 0);
        for size in [0, 1, 17, 1200, 1452, 8000, 60_000] {
            node.send_to(&buffer[..size], peer_addr).expect("sent");
            sent += peer.recv(&mut buffer).expect("arrives") as u64;
            peer.send_to(&buffer[..size / 2], node_addr).expect("sent");
            received += node.recv(&mut buffer).expect("arrives") as u64;
            // Traffic between others is nobody's.
            stranger.send_to(&buffer[..5], peer_addr).expect("sent");
            peer.recv(&mut buffer).expect("arrives");
        }
        let traffic = meter.traffic(peer_addr).expect("read").expect("counted");
        assert_eq!(traffic.sent.payload_bytes, sent, "{loopback}");
        assert_eq!(traffic.sent.datagrams, 7, "{loopback}");
        assert_eq!(traffic.received.payload_bytes, received, "{loopback}");
        assert_eq!(traffic.received.datagrams, 7, "{loopback}");
        assert!(traffic.received.last_seen_ns > 0);
        let headers = if peer_addr.is_ipv4() { 28 } else { 48 };
        let wire = count(peer_addr, &traffic.sent).wire_bytes;
        assert_eq!(wire, sent + 7 * headers);
        let other = stranger.local_addr().expect("bound");
        assert_eq!(meter.traffic(other).expect("read"), None);
    }
}

/// Sends `batches` of `segments` datagrams through the ring, with segmentation by the kernel.
fn send_batches(from: UdpSocket, to: SocketAddr, batches: usize, segments: usize) -> Ring {
    let mut ring = Ring::new(&RingConfig::default()).expect("a ring");
    let socket = ring.add_socket(from).expect("added");
    for _ in 0..batches {
        let mut buffer = ring.take_send_buffer().expect("a buffer");
        buffer.resize(1200 * segments, 7);
        let head = SendHead {
            destination: to,
            source_ip: None,
            ecn: 0,
            segment_bytes: Some(1200),
        };
        ring.send(socket, buffer, head);
        let mut is_sent = false;
        while !is_sent {
            ring.wait(Some(WAIT_MAX)).expect("waits");
            while let Some(event) = ring.next_event() {
                if let Event::Sent { result, .. } = event {
                    result.expect("sent");
                    is_sent = true;
                }
            }
        }
    }
    ring
}

#[test]
fn a_batch_that_the_kernel_cuts_is_counted_as_the_datagrams_that_leave() {
    if pantala_uring::probe().is_err() {
        println!("NOT TESTED HERE: io_uring is forbidden");
        return;
    }
    for loopback in ["127.0.0.1:0", "[::1]:0"] {
        let (node, peer) = (bind(loopback), bind(loopback));
        let Some(meter) = metered(&node) else { return };
        let peer_addr = peer.local_addr().expect("bound");
        let _ring = send_batches(node, peer_addr, 5, 40);
        let sent = meter
            .traffic(peer_addr)
            .expect("read")
            .expect("counted")
            .sent;
        assert_eq!(sent.payload_bytes, 5 * 40 * 1200);
        assert_eq!(sent.datagrams, 5 * 40);
        assert_eq!(sent.batches, 5);
    }
}

#[test]
fn datagrams_arrive_at_the_thread_that_their_connection_id_names() {
    let options = SocketOptions::default();
    let listen = "127.0.0.1:0".parse().expect("an address");
    let group = bind_group(listen, 4, &options).expect("a group");
    let Some(mut meter) = load(&KernelConfig::default()) else {
        return;
    };
    meter.steer(&group.sockets).expect("steered");
    let to = group.sockets[0].local_addr().expect("bound");
    let from = bind("127.0.0.1:0");
    for id in 0..=255_u8 {
        let short = [0x40, id, 1, 2, 3, 4, 5, 6, 7, 9, 9];
        let handshake = [0xe0, 0, 0, 0, 1, 8, id, 1, 2, 3, 4, 5, 6, 7];
        for packet in [&short[..], &handshake] {
            from.send_to(packet, to).expect("sent");
            let socket = &group.sockets[usize::from(id) % 4];
            socket.set_read_timeout(Some(WAIT_MAX)).expect("a timeout");
            let mut buffer = [0; 64];
            let size = socket.recv(&mut buffer).expect("arrives at its thread");
            assert_eq!(&buffer[..size], packet);
        }
    }
    // An Initial, and what is too short to be anything, go to where the hash says, and are not lost.
    for packet in [
        &[0xc0, 0, 0, 0, 1, 8, 1, 1, 1, 1, 1, 1, 1, 1][..],
        &[0x40],
        &[],
    ] {
        from.send_to(packet, to).expect("sent");
        let mut buffer = [0; 64];
        let is_there = group.sockets.iter().any(|socket| {
            socket.set_nonblocking(true).expect("set");
            socket.recv(&mut buffer).is_ok()
        });
        assert!(is_there, "{packet:x?}");
    }
    let steered = meter.steered().expect("read");
    assert_eq!(
        (steered.by_id, steered.by_hash, steered.refused),
        (512, 3, 0)
    );
}

#[test]
fn a_map_that_is_full_makes_room_and_goes_on_counting() {
    let node = bind("127.0.0.1:0");
    let Some(mut meter) = load(&KernelConfig {
        peers_max: 16,
        ..KernelConfig::default()
    }) else {
        return;
    };
    let node_addr = node.local_addr().expect("bound");
    let own = [node.try_clone().expect("a descriptor")];
    meter.count_sockets(&own).expect("counted");
    let mut buffer = [0; 64];
    for _ in 0..2000 {
        let stranger = bind("127.0.0.1:0");
        stranger.send_to(&[1; 10], node_addr).expect("sent");
        node.recv(&mut buffer).expect("arrives");
    }
    let peer = bind("127.0.0.1:0");
    let peer_addr = peer.local_addr().expect("bound");
    for _ in 0..10 {
        peer.send_to(&[1; 10], node_addr).expect("sent");
        node.recv(&mut buffer).expect("arrives");
    }
    let traffic = meter.traffic(peer_addr).expect("read").expect("counted");
    assert_eq!(traffic.received.payload_bytes, 100);
}

#[test]
fn a_meter_that_is_dropped_leaves_no_program_and_a_second_one_stands_beside_the_first() {
    let node = bind("127.0.0.1:0");
    let Some(first) = metered(&node) else { return };
    let second = metered(&node).expect("as the first");
    let peer = bind("127.0.0.1:0");
    let peer_addr = peer.local_addr().expect("bound");
    node.send_to(&[1; 10], peer_addr).expect("sent");
    drop(first);
    node.send_to(&[1; 10], peer_addr).expect("sent");
    let traffic = second.traffic(peer_addr).expect("read").expect("counted");
    assert_eq!(traffic.sent.payload_bytes, 20);
}

#[test]
fn a_cgroup_that_is_not_there_is_named() {
    let error = KernelMeter::load(&KernelConfig {
        cgroup: Some("/nowhere".into()),
        ..KernelConfig::default()
    })
    .expect_err("nothing to attach to");
    assert!(error.to_string().contains("/nowhere"), "{error}");
}

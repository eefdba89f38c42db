//! Few buffers, many datagrams, and what the kernel refuses.

use std::time::Duration;

use bytes::Bytes;
use pantala_uring::{Event, RingConfig, SendHead};

use crate::rig::{Node, pattern, small, to};

#[test]
fn receiving_goes_on_when_the_buffers_ran_out() {
    let config = RingConfig {
        receive_buffers: 2,
        receive_buffers_lent_max: 2,
        ..small()
    };
    let (mut a, mut b) = (Node::new("127.0.0.1:0"), Node::with("127.0.0.1:0", &config));
    // They wait in the socket's buffer, and then arrive as fast as the ring can take them.
    for round in 0..60 {
        a.send(to(b.address), &pattern(round, 1000 + usize::from(round)));
        a.sent().unwrap();
    }
    for round in 0..60 {
        let received = b.received();
        assert_eq!(received.payload, pattern(round, 1000 + usize::from(round)));
    }
    assert!(b.ring.counters().rearmed > 0, "no buffer was free at times");
}

#[test]
fn readers_that_keep_all_they_got_stop_nothing() {
    let config = RingConfig {
        receive_buffers: 4,
        receive_buffers_lent_max: 3,
        ..small()
    };
    let (mut a, mut b) = (Node::new("[::1]:0"), Node::with("[::1]:0", &config));
    let mut kept: Vec<Bytes> = Vec::new();
    for round in 0..30 {
        let head = SendHead {
            segment_bytes: Some(1400),
            ..to(b.address)
        };
        a.send(head, &pattern(round, 1400 * 40));
        a.sent().unwrap();
        let mut bytes = 0;
        while bytes < 1400 * 40 {
            let received = b.received();
            bytes += received.payload.len();
            kept.push(received.payload.freeze());
        }
    }
    let counters = b.ring.counters();
    assert!(counters.lent <= 3);
    assert!(counters.received_copied > 0 && counters.received_in_place > 0);
    let expected: Vec<u8> = (0..30)
        .flat_map(|round| pattern(round, 1400 * 40))
        .collect();
    assert_eq!(kept.concat(), expected);
}

#[test]
fn what_is_too_large_is_refused_and_says_so() {
    let (mut a, b) = (Node::new("127.0.0.1:0"), Node::new("127.0.0.1:0"));
    a.send(to(b.address), &pattern(0, 65_508));
    let error = a.sent().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
    // And so is a batch that no call takes.
    let head = SendHead {
        segment_bytes: Some(9000),
        ..to(b.address)
    };
    a.send(head, &pattern(0, 9000 * 8));
    let error = a.sent().unwrap_err();
    assert_eq!(error.raw_os_error(), Some(libc::EMSGSIZE));
}

#[test]
fn a_destination_that_cannot_be_is_an_error_of_that_datagram_alone() {
    let (mut a, mut b) = (Node::new("127.0.0.1:0"), Node::new("127.0.0.1:0"));
    // No route leads there from a loopback address.
    let nowhere = "192.0.2.1:9".parse().unwrap();
    a.send(to(nowhere), b"lost");
    a.send(to(b.address), b"found");
    let mut results = Vec::new();
    while results.len() < 2 {
        if let Event::Sent {
            result,
            destination,
            ..
        } = a.event()
        {
            results.push((destination, result.is_ok()));
        }
    }
    results.sort_by_key(|(_, is_ok)| *is_ok);
    assert_eq!(results, [(nowhere, false), (b.address, true)]);
    assert_eq!(&b.received().payload[..], b"found");
}

#[test]
fn datagrams_that_bounce_do_not_end_receiving() {
    let mut a = Node::new("127.0.0.1:0");
    let closed = crate::rig::bind("127.0.0.1:0").local_addr().unwrap();
    for _ in 0..40 {
        a.send(to(closed), b"x");
        assert!(a.sent().is_ok());
    }
    a.ring.wait(Some(Duration::ZERO)).unwrap();
    let mut b = Node::new("127.0.0.1:0");
    b.send(to(a.address), b"still here");
    assert_eq!(&a.received().payload[..], b"still here");
}

#[test]
fn all_buffers_in_flight_are_back_after_their_datagrams_left() {
    let (mut a, mut b) = (Node::new("127.0.0.1:0"), Node::new("127.0.0.1:0"));
    for round in 0..50u8 {
        let mut buffers = Vec::new();
        while let Some(mut buffer) = a.ring.take_send_buffer() {
            buffer.push(round);
            buffers.push(buffer);
        }
        assert_eq!(buffers.len(), small().send_buffers);
        for buffer in buffers {
            a.ring.send(a.socket, buffer, to(b.address));
        }
        assert!(a.ring.take_send_buffer().is_none());
        for _ in 0..small().send_buffers {
            assert_eq!(a.sent().unwrap(), 1);
            assert_eq!(b.received().payload[..], [round]);
        }
    }
}

#[test]
fn datagrams_sent_without_a_copy_arrive_whole() {
    let (mut a, mut b) = (Node::new("127.0.0.1:0"), Node::new("127.0.0.1:0"));
    assert!(a.ring.set_zero_copy_sends(true));
    for round in 0..20 {
        let bytes = pattern(round, 20 * 1400);
        let head = SendHead {
            segment_bytes: Some(1400),
            ..to(b.address)
        };
        a.send(head, &bytes);
        let mut arrived = Vec::new();
        while arrived.len() < bytes.len() {
            arrived.extend_from_slice(&b.received().payload);
        }
        assert_eq!(arrived, bytes);
        assert_eq!(a.sent().unwrap(), bytes.len());
    }
}

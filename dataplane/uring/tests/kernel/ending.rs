//! Rings that are dropped while the kernel is at work.

use std::fs::File;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::BytesMut;

use crate::rig::{Node, pattern, to};

#[test]
fn a_ring_dropped_in_mid_flight_leaves_nothing_behind() {
    for round in 0..30u8 {
        let (mut a, mut b) = (Node::new("127.0.0.1:0"), Node::new("127.0.0.1:0"));
        let (reader, _writer) = std::io::pipe().unwrap();
        let reader = Arc::new(File::from(OwnedFd::from(reader)));
        a.ring
            .read(&reader, 0, BytesMut::with_capacity(4096), 1)
            .unwrap();
        b.send(to(a.address), &pattern(round, 40_000));
        let kept = a.received().payload.freeze();
        for _ in 0..5 {
            a.send(to(b.address), &pattern(round, 1000));
        }
        let address = a.address;
        drop(a.ring);
        assert_eq!(Arc::strong_count(&reader), 1, "the read has ended");
        assert_eq!(kept, pattern(round, 40_000));
        // The address is free again.
        drop(crate::rig::bind(&address.to_string()));
    }
}

#[test]
fn a_ring_dropped_by_a_panic_leaves_nothing_behind() {
    let (reader, _writer) = std::io::pipe().unwrap();
    let reader = Arc::new(File::from(OwnedFd::from(reader)));
    let lent = Arc::clone(&reader);
    let driver = std::thread::spawn(move || {
        let mut a = Node::new("127.0.0.1:0");
        a.ring
            .read(&lent, 0, BytesMut::with_capacity(4096), 1)
            .unwrap();
        a.ring.submit().unwrap();
        drop(lent);
        panic!("in the driver");
    });
    assert!(driver.join().is_err());
    assert_eq!(Arc::strong_count(&reader), 1);
}

#[test]
fn who_wakes_a_ring_that_is_gone_does_no_harm() {
    let a = Node::new("127.0.0.1:0");
    let waker = a.ring.waker();
    drop(a);
    waker.wake();
    waker.wake();
}

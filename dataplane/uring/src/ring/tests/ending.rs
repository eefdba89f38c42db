use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::*;
use crate::kernel::fake::{Arriving, OnCancelAll};

/// A ring with one of everything in flight, and what a reader has of it.
fn busy() -> (Core<Fake>, Fake, Received) {
    let (mut core, fake, socket) = rig();
    let file = Arc::new(tempfile::tempfile().unwrap());
    fake.deliver(fake.receives()[0], &Arriving::new(pattern(3, 1900)), true);
    let kept = received(&mut core).remove(0);
    for seed in 0..3 {
        send(&mut core, socket, &pattern(seed, 60));
    }
    core.read(&file, 0, BytesMut::with_capacity(300), 1)
        .unwrap();
    core.write_vectored(&file, 0, vec![Bytes::from(pattern(5, 200))], 2)
        .unwrap();
    core.submit().unwrap();
    (core, fake, kept)
}

#[test]
fn a_ring_that_is_dropped_waits_until_the_kernel_has_given_everything_back() {
    let (core, fake, kept) = busy();
    drop(core);
    assert!(fake.has_forgotten_buffers());
    assert_eq!(kept.payload, pattern(3, 1900));
}

#[test]
fn memory_that_the_kernel_keeps_is_leaked_and_not_freed() {
    let (core, fake, kept) = busy();
    fake.on_cancel_all(OnCancelAll::Ignore);
    drop(core);
    assert!(!fake.has_forgotten_buffers());
    assert_eq!(fake.sends().len(), 3);
    // The kernel is late, and still reads and writes.
    fake.scribble();
    assert_eq!(kept.payload, pattern(3, 1900));
    let others: Vec<Vec<u8>> = (0..64).map(|seed| pattern(seed, 1900)).collect();
    fake.scribble();
    for (seed, other) in others.iter().enumerate() {
        assert_eq!(*other, pattern(seed, 1900));
    }
}

#[test]
fn operations_that_end_by_themselves_meanwhile_are_no_harm() {
    let (core, fake, _kept) = busy();
    fake.on_cancel_all(OnCancelAll::Ignore);
    fake.when_asleep(|fake| {
        fake.deliver(fake.receives()[0], &Arriving::new(pattern(4, 1900)), true);
        // Cut short: it must not be gone on with.
        let files = fake.files();
        fake.complete(files[1], 50);
        fake.complete(files[0], 10);
    });
    fake.when_asleep(|fake| {
        for tag in fake.sends() {
            fake.complete(tag, 60);
        }
        fake.deliver(fake.receives()[0], &Arriving::new(pattern(4, 1900)), false);
    });
    fake.when_asleep(|fake| fake.complete(fake.bell(), 8));
    drop(core);
    assert!(fake.has_forgotten_buffers());
}

#[test]
fn what_was_never_handed_over_is_no_harm() {
    let (mut core, fake, socket) = rig();
    send(&mut core, socket, b"queued");
    fake.fail_next_call(libc::EBADF, false);
    drop(core);
    assert!(!fake.has_forgotten_buffers());
    fake.scribble();
}

#[test]
fn a_kernel_that_fails_every_call_does_not_hold_the_drop_up() {
    let (core, fake, _kept) = busy();
    for _ in 0..100 {
        fake.fail_next_call(libc::EBADF, false);
    }
    drop(core);
    fake.scribble();
}

#[test]
fn a_panic_in_mid_flight_frees_nothing_that_is_on_loan() {
    let (core, fake, kept) = busy();
    fake.on_cancel_all(OnCancelAll::Ignore);
    let panicked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
        let _core = core;
        panic!("in the driver");
    }));
    assert!(panicked.is_err());
    fake.scribble();
    assert_eq!(kept.payload, pattern(3, 1900));
}

#[test]
fn slices_outlive_the_ring() {
    let (core, fake, kept) = busy();
    let slice = kept.payload.freeze().slice(1000..1500);
    drop(core);
    fake.scribble();
    assert_eq!(slice, pattern(3, 1900)[1000..1500]);
}

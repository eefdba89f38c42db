//! Sleeping and waking up. Counted in system calls, not in time.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use pantala_uring::Event;

use crate::rig::{Node, PATIENCE, to};

#[test]
fn a_ring_that_waits_makes_one_call_and_comes_back_when_the_time_is_over() {
    let mut a = Node::new("127.0.0.1:0");
    let timeout = Duration::from_millis(30);
    for _ in 0..3 {
        let before = a.ring.counters();
        let start = Instant::now();
        a.ring.wait(Some(timeout)).unwrap();
        assert!(start.elapsed() >= timeout);
        assert!(a.ring.next_event().is_none());
        let after = a.ring.counters();
        assert_eq!(after.enters - before.enters, 1);
        assert_eq!(after.sleeps - before.sleeps, 1);
    }
}

#[test]
fn no_timeout_at_all_is_a_look() {
    let mut a = Node::new("127.0.0.1:0");
    a.ring.wait(Some(Duration::ZERO)).unwrap();
    assert!(a.ring.next_event().is_none());
    let mut b = Node::new("127.0.0.1:0");
    b.send(to(a.address), b"x");
    assert!(b.sent().is_ok());
    a.ring.wait(Some(Duration::ZERO)).unwrap();
    assert!(matches!(a.ring.next_event(), Some(Event::Received(_))));
}

#[test]
fn a_thread_wakes_a_ring_that_sleeps_for_ever() {
    let mut a = Node::new("127.0.0.1:0");
    for _ in 0..50 {
        let waker = a.ring.waker();
        let thread = std::thread::spawn(move || waker.wake());
        while !matches!(a.event(), Event::Woken) {}
        thread.join().unwrap();
    }
    // No more than the wake-up itself and the bell's late completion.
    let before = a.ring.counters();
    for _ in 0..3 {
        a.ring.wait(Some(Duration::from_millis(5))).unwrap();
        assert!(a.ring.next_event().is_none());
    }
    assert!(a.ring.counters().enters - before.enters <= 4);
}

#[test]
fn a_ring_that_was_woken_before_it_slept_does_not_sleep() {
    let mut a = Node::new("127.0.0.1:0");
    let waker = a.ring.waker();
    waker.wake();
    waker.wake();
    a.ring.wait(None).unwrap();
    assert!(matches!(a.ring.next_event(), Some(Event::Woken)));
    assert!(a.ring.next_event().is_none());
}

/// Two threads count up and wake; the ring, which sleeps without a timeout, must see the last count of each. A single lost
/// wake-up would leave it asleep for ever, and the watchdog would say so.
#[test]
fn no_wake_up_is_lost() {
    const ROUNDS: u64 = 20_000;
    let mut a = Node::new("127.0.0.1:0");
    let counts: Arc<[AtomicU64; 2]> = Arc::default();
    let seen: Arc<[AtomicU64; 2]> = Arc::default();
    let threads: Vec<_> = (0..2)
        .map(|which| {
            let (waker, counts, seen) = (a.ring.waker(), Arc::clone(&counts), Arc::clone(&seen));
            std::thread::spawn(move || {
                for round in 1..=ROUNDS {
                    counts[which].store(round, Ordering::Relaxed);
                    waker.wake();
                    // Now and then in step with the ring, so that it sleeps at all moments of this loop.
                    while round % 7 == 0 && seen[which].load(Ordering::Relaxed) < round {
                        std::hint::spin_loop();
                        std::thread::yield_now();
                    }
                }
            })
        })
        .collect();
    let is_over = Arc::new(AtomicBool::new(false));
    let watchdog = {
        let is_over = Arc::clone(&is_over);
        std::thread::spawn(move || {
            let deadline = Instant::now() + 3 * PATIENCE;
            while !is_over.load(Ordering::Relaxed) {
                if Instant::now() > deadline {
                    eprintln!("a wake-up was lost");
                    std::process::abort();
                }
                std::thread::sleep(Duration::from_millis(20));
            }
        })
    };
    while seen
        .iter()
        .any(|seen| seen.load(Ordering::Relaxed) < ROUNDS)
    {
        a.ring.wait(None).unwrap();
        while let Some(event) = a.ring.next_event() {
            assert!(matches!(event, Event::Woken));
            for which in 0..2 {
                seen[which].store(counts[which].load(Ordering::Relaxed), Ordering::Relaxed);
            }
        }
    }
    is_over.store(true, Ordering::Relaxed);
    watchdog.join().unwrap();
    for thread in threads {
        thread.join().unwrap();
    }
}

#[test]
fn a_datagram_wakes_a_ring_that_sleeps_for_ever() {
    let mut a = Node::new("127.0.0.1:0");
    let address = a.address;
    let thread = std::thread::spawn(move || {
        let mut b = Node::new("127.0.0.1:0");
        b.send(to(address), b"wake up");
        b.sent().unwrap();
    });
    assert_eq!(&a.received().payload[..], b"wake up");
    thread.join().unwrap();
}

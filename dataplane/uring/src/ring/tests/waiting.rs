use std::time::Duration;

use super::*;
use crate::error::RingError;
use crate::kernel::Stay;
use crate::kernel::fake::Arriving;

#[test]
fn a_ring_with_nothing_to_do_sleeps_once_a_call() {
    let (mut core, fake, _) = rig();
    let before = fake.stays().len();
    for _ in 0..5 {
        core.wait(None).unwrap();
        assert!(core.next_event().is_none());
    }
    let second = Some(Duration::from_secs(1));
    core.wait(second).unwrap();
    assert_eq!(fake.stays()[before..before + 5], [Stay::Until(None); 5]);
    assert_eq!(fake.stays()[before + 5..], [Stay::Until(second)]);
    assert_eq!(core.counters().sleeps, 6);
}

#[test]
fn a_ring_with_an_event_does_not_sleep() {
    let (mut core, fake, socket) = rig();
    let before = fake.stays().len();
    fake.deliver(fake.receives()[0], &Arriving::new(vec![1]), true);
    core.wait(None).unwrap();
    assert_eq!(fake.stays().len(), before, "no call at all");
    // With something to hand over, a call that does not wait.
    send(&mut core, socket, b"x");
    core.wait(None).unwrap();
    assert_eq!(fake.stays()[before..], [Stay::Reap]);
    assert_eq!(events(&mut core).len(), 1);
}

#[test]
fn no_time_at_all_is_a_look_and_no_sleep() {
    let (mut core, fake, _) = rig();
    core.wait(Some(Duration::ZERO)).unwrap();
    assert_eq!(fake.stays().last(), Some(&Stay::Reap));
}

#[test]
fn who_wakes_a_ring_that_is_awake_makes_it_not_sleep() {
    let (mut core, fake, _) = rig();
    let waker = core.waker();
    waker.wake();
    core.waker().wake();
    core.wait(None).unwrap();
    assert!(!fake.stays().contains(&Stay::Until(None)));
    assert!(matches!(events(&mut core)[..], [Event::Woken]));
    // The bell was not rung: nothing would wake it now.
    core.wait(None).unwrap();
    assert_eq!(fake.stays().last(), Some(&Stay::Until(None)));
    assert!(core.next_event().is_none());
}

#[test]
fn who_wakes_a_ring_that_sleeps_rings_the_bell_once() {
    let (mut core, fake, _) = rig();
    let waker = core.waker();
    fake.when_asleep(move |fake| {
        for _ in 0..10 {
            waker.wake();
        }
        fake.complete(fake.bell(), 8);
    });
    core.wait(None).unwrap();
    assert!(matches!(events(&mut core)[..], [Event::Woken]));
    core.submit().unwrap();
    fake.bell();
}

#[test]
fn the_bell_is_hung_again_before_the_ring_sleeps_again() {
    let (mut core, fake, _) = rig();
    for _ in 0..3 {
        let waker = core.waker();
        fake.when_asleep(move |fake| {
            waker.wake();
            fake.complete(fake.bell(), 8);
        });
        core.wait(None).unwrap();
        assert!(matches!(events(&mut core)[..], [Event::Woken]));
    }
}

#[test]
fn a_wake_up_whose_bell_comes_late_is_one_wake_up() {
    let (mut core, fake, _) = rig();
    let waker = core.waker();
    fake.when_asleep(move |_| waker.wake());
    core.wait(None).unwrap();
    assert!(matches!(events(&mut core)[..], [Event::Woken]));
    fake.complete(fake.bell(), 8);
    core.wait(None).unwrap();
    assert!(core.next_event().is_none());
}

#[test]
fn a_bell_that_breaks_ends_the_ring_with_an_error() {
    let (mut core, fake, _) = rig();
    fake.complete(fake.bell(), -libc::EIO);
    core.wait(None).unwrap();
    assert!(core.next_event().is_none());
    let error = core.wait(None).unwrap_err();
    assert!(matches!(error, RingError::Kernel { .. }), "{error}");
}

#[test]
fn a_kernel_that_refuses_the_call_is_an_error_and_one_that_is_short_of_memory_is_none() {
    let (mut core, fake, _) = rig();
    for errno in [libc::EAGAIN, libc::EBUSY, libc::ENOMEM] {
        fake.fail_next_call(errno, true);
        core.wait(None).unwrap();
    }
    fake.fail_next_call(libc::EBADF, true);
    let error = core.wait(None).unwrap_err();
    assert!(
        matches!(&error, RingError::Kernel { error, .. } if error.raw_os_error() == Some(libc::EBADF)),
        "{error}"
    );
}

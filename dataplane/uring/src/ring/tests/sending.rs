use super::*;
use crate::kernel::Operation;

#[test]
fn buffers_in_flight_are_not_handed_out_and_come_back_hottest_first() {
    let (mut core, fake, socket) = rig();
    for seed in 0..4 {
        send(&mut core, socket, &pattern(seed, 50));
    }
    assert!(core.take_send_buffer().is_none());
    core.submit().unwrap();
    let tags = fake.sends();
    assert_eq!(tags.len(), 4);
    for (seed, tag) in tags.iter().enumerate() {
        assert_eq!(fake.bytes(*tag)[..50], pattern(seed, 50));
    }
    // Out of order.
    fake.complete(tags[2], 50);
    fake.complete(tags[0], 50);
    assert_eq!(events(&mut core).len(), 2);
    let place = |core: &mut Core<Fake>| core.take_send_buffer().map(|buffer| buffer.as_ptr());
    let hottest = place(&mut core);
    assert!(hottest.is_some());
    assert_eq!(place(&mut core), hottest, "dropped, and the first again");
}

#[test]
fn what_came_of_a_datagram_is_told_with_its_destination() {
    let (mut core, fake, socket) = rig();
    send(&mut core, socket, b"one");
    send(&mut core, socket, b"two");
    core.submit().unwrap();
    let tags = fake.sends();
    fake.complete(tags[1], -libc::EMSGSIZE);
    fake.complete(tags[0], 3);
    let [first, second] = <[Event; 2]>::try_from(events(&mut core)).unwrap();
    assert!(
        matches!(&first, Event::Sent { socket: by, result: Err(error), destination: to }
            if *by == socket && *to == destination() && error.raw_os_error() == Some(libc::EMSGSIZE)),
        "{first:?}"
    );
    assert!(
        matches!(second, Event::Sent { result: Ok(3), .. }),
        "{second:?}"
    );
}

#[test]
fn a_queue_that_is_full_is_handed_over_and_nothing_is_lost_or_reordered() {
    let fake = Fake::new(2);
    let config = RingConfig {
        send_buffers: 9,
        ..small()
    };
    let mut core = Core::new(fake.clone(), &config).unwrap();
    let socket = core.add_socket(socket()).unwrap();
    for seed in 0..9 {
        send(&mut core, socket, &[seed]);
    }
    core.submit().unwrap();
    let sent: Vec<u8> = fake.sends().iter().map(|tag| fake.bytes(*tag)[0]).collect();
    assert_eq!(sent, (0..9).collect::<Vec<u8>>());
}

#[test]
fn a_kernel_that_takes_nothing_for_a_while_gets_everything_later() {
    let fake = Fake::new(1);
    let mut core = Core::new(fake.clone(), &small()).unwrap();
    let socket = core.add_socket(socket()).unwrap();
    for errno in [libc::EBUSY, libc::EAGAIN, libc::ENOMEM, libc::EBUSY] {
        fake.fail_next_call(errno, false);
    }
    for seed in 0..4 {
        send(&mut core, socket, &[seed]);
    }
    for _ in 0..4 {
        core.submit().unwrap();
    }
    let sent: Vec<u8> = fake.sends().iter().map(|tag| fake.bytes(*tag)[0]).collect();
    assert_eq!(sent, [0, 1, 2, 3]);
    assert_eq!(fake.receives().len(), 1);
}

#[test]
fn without_copying_the_buffer_comes_back_when_the_network_has_let_go() {
    let (mut core, fake, socket) = rig();
    core.set_zero_copy_sends(true);
    send(&mut core, socket, b"one");
    send(&mut core, socket, b"two");
    core.submit().unwrap();
    let tags = fake.sends();
    assert!(matches!(
        fake.operation(tags[0]),
        Operation::Send {
            zero_copy: true,
            ..
        }
    ));
    fake.sent_without_copy(tags[0], 3);
    // One that fails has no second completion.
    fake.complete(tags[1], -libc::ENETUNREACH);
    let event = events(&mut core).remove(0);
    assert!(
        matches!(event, Event::Sent { result: Err(_), .. }),
        "{event:?}"
    );
    let taken: Vec<_> = std::iter::from_fn(|| core.take_send_buffer()).collect();
    assert_eq!(taken.len(), 3, "one is still in use");
    fake.complete(tags[0], 0);
    let event = events(&mut core).remove(0);
    assert!(
        matches!(event, Event::Sent { result: Ok(3), .. }),
        "{event:?}"
    );
    assert!(core.take_send_buffer().is_some());
}

#[test]
fn a_buffer_that_grew_shrinks_again() {
    let (mut core, fake, socket) = rig();
    send(&mut core, socket, &[0; 10_000]);
    core.submit().unwrap();
    fake.complete(fake.sends()[0], 10_000);
    assert_eq!(events(&mut core).len(), 1);
    assert!(core.take_send_buffer().unwrap().capacity() < 200);
}

#[test]
#[should_panic(expected = "by the ring that it was taken from")]
fn a_buffer_of_another_ring_is_not_sent() {
    let (mut core, _fake, socket) = rig();
    let (mut other, _other_fake, _) = rig();
    let buffer = other.take_send_buffer().unwrap();
    core.send(socket, buffer, &head());
}

#[test]
fn a_buffer_outlives_its_ring() {
    let (mut core, _fake, _) = rig();
    let mut buffer = core.take_send_buffer().unwrap();
    drop(core);
    buffer.extend_from_slice(b"late");
    assert_eq!(&buffer[..], b"late");
}

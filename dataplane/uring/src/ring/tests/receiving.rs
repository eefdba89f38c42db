use super::*;
use crate::kernel::fake::Arriving;
use crate::socket::control::Control;

/// Always copied.
const SMALL_BYTES: usize = PAYLOAD_BYTES / 8 - 1;
/// Copied when many buffers are with readers.
const MIDDLING_BYTES: usize = PAYLOAD_BYTES / 2 - 1;

#[test]
fn a_datagram_comes_out_with_what_the_kernel_said_about_it() {
    let (mut core, fake, socket) = rig();
    let mut control = Control::default();
    control.set_ecn(true, 3);
    control.set_source_v4([127, 0, 0, 5].into());
    let arriving = Arriving {
        source: "10.1.2.3:4433".parse().unwrap(),
        control: control.as_mut_slice().to_vec(),
        payload: pattern(1, 1300),
        flags: 0,
    };
    fake.deliver(fake.receives()[0], &arriving, true);
    let received = received(&mut core).remove(0);
    assert_eq!(received.socket, socket);
    assert_eq!(received.payload, arriving.payload);
    assert_eq!(received.source, arriving.source);
    assert_eq!(received.local_ip, Some([127, 0, 0, 5].into()));
    assert_eq!(received.ecn, 3);
    assert_eq!(received.segment_bytes, 1300);
    assert_eq!(core.counters().received_in_place, 1);
}

#[test]
fn a_batch_has_a_segment_size_within_its_bounds() {
    for (said, is) in [
        (0i32, 1500),
        (-1, 1500),
        (600, 600),
        (1499, 1499),
        (1500, 1500),
        (9000, 1500),
    ] {
        let (mut core, fake, _) = rig();
        let mut control = 20usize.to_ne_bytes().to_vec();
        control.extend(libc::SOL_UDP.to_ne_bytes());
        control.extend(libc::UDP_GRO.to_ne_bytes());
        control.extend(said.to_ne_bytes());
        let arriving = Arriving {
            control,
            ..Arriving::new(pattern(2, 1500))
        };
        fake.deliver(fake.receives()[0], &arriving, true);
        assert_eq!(received(&mut core)[0].segment_bytes, is, "{said}");
    }
}

#[test]
fn small_payloads_are_copied_so_that_they_pin_no_buffer() {
    let (mut core, fake, _) = rig();
    let tag = fake.receives()[0];
    let mut kept = Vec::new();
    for round in 0..20 {
        fake.deliver(tag, &Arriving::new(pattern(round, SMALL_BYTES)), true);
        kept.extend(received(&mut core));
        assert_eq!(fake.provided(), 4);
    }
    for (round, received) in kept.iter().enumerate() {
        assert_eq!(received.payload, pattern(round, SMALL_BYTES));
        assert_eq!(received.payload.capacity(), SMALL_BYTES);
    }
    assert_eq!(core.counters().received_copied, 20);
    assert_eq!(core.counters().lent, 0);
}

#[test]
fn readers_that_keep_what_they_got_cost_copies_and_no_more_buffers() {
    let (mut core, fake, _) = rig();
    let tag = fake.receives()[0];
    let mut kept = Vec::new();
    for round in 0..10 {
        fake.deliver(tag, &Arriving::new(pattern(round, 1800)), true);
        kept.extend(received(&mut core));
    }
    let counters = core.counters();
    assert_eq!(
        (counters.received_in_place, counters.received_copied),
        (3, 7)
    );
    assert_eq!(counters.lent, 3);
    fake.scribble();
    for (round, received) in kept.iter().enumerate() {
        assert_eq!(received.payload, pattern(round, 1800));
    }
}

#[test]
fn middling_payloads_pin_no_more_than_half_of_the_buffers() {
    let (mut core, fake, _) = rig();
    let tag = fake.receives()[0];
    let mut kept = Vec::new();
    for round in 0..10 {
        fake.deliver(tag, &Arriving::new(pattern(round, MIDDLING_BYTES)), true);
        kept.extend(received(&mut core));
    }
    assert_eq!(core.counters().received_in_place, 1);
    for (round, received) in kept.iter().enumerate() {
        assert_eq!(received.payload, pattern(round, MIDDLING_BYTES));
    }
    // Let go of, the one goes round.
    kept.clear();
    for round in 0..10 {
        fake.deliver(tag, &Arriving::new(pattern(round, MIDDLING_BYTES)), true);
        assert_eq!(received(&mut core).len(), 1);
    }
    assert_eq!(core.counters().received_in_place, 11);
    assert_eq!(core.counters().lent, 1);
}

#[test]
fn buffers_that_readers_have_let_go_of_are_used_again() {
    let (mut core, fake, _) = rig();
    let tag = fake.receives()[0];
    let mut places = std::collections::BTreeSet::new();
    for round in 0..100 {
        fake.deliver(tag, &Arriving::new(pattern(round, 1800)), true);
        let payload = received(&mut core).remove(0).payload;
        places.insert(payload.as_ptr() as usize);
        // Read as a driver does: cut into datagrams, some of which live on a little.
        let whole = payload.freeze();
        let slice = whole.slice(100..200);
        drop(whole);
        assert_eq!(slice, pattern(round, 1800)[100..200]);
    }
    assert_eq!(core.counters().received_in_place, 100);
    // Four with the kernel, and the one that goes round.
    assert!(places.len() <= 5, "{places:?}");
}

#[test]
fn after_a_burst_few_buffers_go_round_and_not_all_that_it_took() {
    let (mut core, fake, _) = rig();
    let tag = fake.receives()[0];
    let next = |core: &mut _| {
        fake.deliver(tag, &Arriving::new(pattern(1, 1800)), true);
        received(core).remove(0).payload
    };
    let burst: Vec<_> = (0..6).map(|_| next(&mut core)).collect();
    drop(burst);
    // They come free while these are received.
    for _ in 0..10 {
        next(&mut core);
    }
    let places: std::collections::BTreeSet<usize> = (0..100)
        .map(|_| next(&mut core).as_ptr() as usize)
        .collect();
    // Four with the kernel, and the one that came free last.
    assert!(places.len() <= 5, "{places:?}");
}

#[test]
fn what_is_cut_off_empty_or_nobodys_is_thrown_away() {
    let (mut core, fake, _) = rig();
    let tag = fake.receives()[0];
    let cut = Arriving {
        flags: libc::MSG_TRUNC,
        ..Arriving::new(pattern(0, 100))
    };
    fake.deliver(tag, &cut, true);
    fake.deliver(tag, &Arriving::new(Vec::new()), true);
    // Longer than the buffer: the kernel says how long it was.
    fake.deliver(tag, &Arriving::new(pattern(0, PAYLOAD_BYTES + 1)), true);
    assert_eq!(received(&mut core).len(), 0);
    assert_eq!(core.counters().discarded, 3);
    assert_eq!(fake.provided(), 4, "the buffers went back");
    fake.deliver(tag, &Arriving::new(vec![1]), true);
    assert_eq!(received(&mut core).len(), 1);
}

#[test]
fn receiving_goes_on_after_the_buffers_ran_out() {
    let (mut core, fake, _) = rig();
    let tag = fake.receives()[0];
    for round in 0..4 {
        fake.deliver(tag, &Arriving::new(pattern(round, 1800)), true);
    }
    assert_eq!(fake.provided(), 0);
    fake.deliver(tag, &Arriving::new(vec![9]), true);
    assert_eq!(fake.receives().len(), 0, "it ended");
    assert_eq!(received(&mut core).len(), 4);
    core.wait(None).unwrap();
    assert_eq!(fake.receives().len(), 1);
    assert_eq!(core.counters().rearmed, 1);
    fake.deliver(fake.receives()[0], &Arriving::new(vec![9]), true);
    assert_eq!(received(&mut core).len(), 1);
}

#[test]
fn a_receive_that_ends_without_a_word_is_begun_again_and_keeps_its_last_datagram() {
    let (mut core, fake, _) = rig();
    for round in 0..50 {
        fake.deliver(fake.receives()[0], &Arriving::new(vec![round]), false);
        assert_eq!(received(&mut core)[0].payload[..], [round]);
        core.submit().unwrap();
    }
    assert_eq!(core.counters().rearmed, 50);
}

#[test]
fn datagrams_that_bounce_end_no_receiving() {
    let (mut core, fake, _) = rig();
    for round in 0..100 {
        fake.complete(fake.receives()[0], -libc::ECONNREFUSED);
        assert_eq!(received(&mut core).len(), 0);
        core.submit().unwrap();
        // Something arrives now and then.
        if round % 10 == 0 {
            fake.deliver(fake.receives()[0], &Arriving::new(vec![1]), true);
            assert_eq!(received(&mut core).len(), 1);
        }
    }
}

#[test]
fn a_socket_that_only_fails_is_given_up_and_the_others_go_on() {
    let (mut core, fake, first) = rig();
    let second = core.add_socket(socket()).unwrap();
    core.submit().unwrap();
    let other = fake.receives()[1];
    let mut rounds = 0;
    let failed = loop {
        rounds += 1;
        assert!(rounds < 100);
        let tag = fake.receives().into_iter().find(|tag| *tag != other);
        fake.complete(tag.unwrap(), -libc::EBADF);
        if let Some(event) = core.next_event() {
            break event;
        }
        core.submit().unwrap();
    };
    assert!(
        matches!(&failed, Event::SocketFailed { socket, error }
            if *socket == first && error.raw_os_error() == Some(libc::EBADF)),
        "{failed:?}"
    );
    core.submit().unwrap();
    assert_eq!(fake.receives(), [other]);
    fake.deliver(other, &Arriving::new(vec![1]), true);
    assert_eq!(received(&mut core)[0].socket, second);
}

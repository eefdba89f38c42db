//! The ring's logic over a kernel that does what it is told.

mod chaos;
mod ending;
mod files;
mod receiving;
mod sending;
mod set_ups;
mod waiting;

use std::net::{SocketAddr, UdpSocket};

use super::config::RingConfig;
use super::core::Core;
use crate::event::{Event, Received, SendHead, SocketId};
use crate::kernel::fake::Fake;

const PAYLOAD_BYTES: usize = 2000;

fn small() -> RingConfig {
    RingConfig {
        entries: 4,
        receive_buffers: 4,
        receive_buffer_bytes: PAYLOAD_BYTES,
        send_buffers: 4,
        send_buffer_bytes: 64,
        receive_buffers_lent_max: 3,
    }
}

/// A ring with one socket, whose receive is in flight.
fn rig() -> (Core<Fake>, Fake, SocketId) {
    let fake = Fake::new(4);
    let mut core = Core::new(fake.clone(), &small()).unwrap();
    let socket = core.add_socket(socket()).unwrap();
    core.submit().unwrap();
    (core, fake, socket)
}

fn socket() -> UdpSocket {
    UdpSocket::bind("127.0.0.1:0").unwrap()
}

fn destination() -> SocketAddr {
    "10.1.1.1:99".parse().unwrap()
}

fn head() -> SendHead {
    SendHead {
        destination: destination(),
        source_ip: None,
        ecn: 0,
        segment_bytes: None,
    }
}

fn send(core: &mut Core<Fake>, socket: SocketId, bytes: &[u8]) {
    let mut buffer = core.take_send_buffer().expect("a buffer is free");
    assert!(buffer.is_empty());
    buffer.extend_from_slice(bytes);
    core.send(socket, buffer, &head());
}

/// All events there are, without a system call.
fn events(core: &mut Core<Fake>) -> Vec<Event> {
    std::iter::from_fn(|| core.next_event()).collect()
}

/// What has arrived; fails if anything else has happened.
fn received(core: &mut Core<Fake>) -> Vec<Received> {
    let arrived = |event| match event {
        Event::Received(received) => received,
        other => panic!("{other:?}"),
    };
    events(core).into_iter().map(arrived).collect()
}

/// Bytes that differ by place and by `seed`.
fn pattern(seed: usize, bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|at| {
            ((at + seed) as u32)
                .wrapping_mul(2_654_435_761)
                .to_le_bytes()[3]
        })
        .collect()
}

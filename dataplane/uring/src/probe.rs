//! Whether this kernel lets us.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::{Duration, Instant};

use io_uring::{IoUring, Probe, opcode};

use crate::error::{RingError, Unsupported};
use crate::event::{Event, SendHead};
use crate::kernel::real::{RealKernel, SetUp};
use crate::ring::{Ring, RingConfig};

/// What the ring asks the kernel to do.
const OPERATIONS: &[(u8, &str)] = &[
    (opcode::RecvMsg::CODE, "recvmsg"),
    (opcode::SendMsg::CODE, "sendmsg"),
    (opcode::Read::CODE, "read"),
    (opcode::Writev::CODE, "writev"),
    (opcode::AsyncCancel::CODE, "cancellation"),
];
/// How long one datagram over loopback may take.
const TRIAL_WAIT_MAX: Duration = Duration::from_secs(2);

/// Whether this kernel lets us use a ring: it sets one up, asks for all operations, and sends one datagram over loopback
/// and receives it twice as a driver would. Takes about a millisecond. Where it fails, says what is missing.
pub fn probe() -> Result<(), Unsupported> {
    let config = RingConfig {
        entries: 8,
        receive_buffers: 4,
        receive_buffer_bytes: 2048,
        send_buffers: 2,
        send_buffer_bytes: 2048,
        receive_buffers_lent_max: 4,
    };
    operations(RealKernel::new(&SetUp::ALL, 8, 16, 1)?.ring())?;
    let ring = Ring::new(&config).map_err(|error| match error {
        RingError::Unsupported(unsupported) => unsupported,
        other => trial("setting a ring up", other),
    })?;
    exchange(ring)
}

fn operations(ring: &IoUring) -> Result<(), Unsupported> {
    let mut probe = Probe::new();
    ring.submitter()
        .register_probe(&mut probe)
        .map_err(|_| Unsupported::Lacks("the list of its operations"))?;
    match OPERATIONS
        .iter()
        .find(|(code, _)| !probe.is_supported(*code))
    {
        Some((_, name)) => Err(Unsupported::Lacks(name)),
        None => Ok(()),
    }
}

pub(crate) fn has_zero_copy_sends(ring: &IoUring) -> bool {
    let mut probe = Probe::new();
    ring.submitter().register_probe(&mut probe).is_ok()
        && probe.is_supported(opcode::SendMsgZc::CODE)
}

fn trial(step: &'static str, error: impl std::error::Error + Send + Sync + 'static) -> Unsupported {
    Unsupported::Trial {
        step,
        error: std::io::Error::other(error),
    }
}

/// Two datagrams to ourselves: the second shows that receiving goes on by itself.
fn exchange(mut ring: Ring) -> Result<(), Unsupported> {
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let socket = std::net::UdpSocket::bind(any).map_err(|error| trial("binding", error))?;
    let destination = socket
        .local_addr()
        .map_err(|error| trial("binding", error))?;
    let id = ring
        .add_socket(socket)
        .map_err(|error| trial("adding a socket", error))?;
    let deadline = Instant::now() + TRIAL_WAIT_MAX;
    for round in 0..2u8 {
        let Some(mut buffer) = ring.take_send_buffer() else {
            return Err(Unsupported::Lacks("a way to end what it has sent"));
        };
        buffer.push(round);
        let head = SendHead {
            destination,
            source_ip: None,
            ecn: 0,
            segment_bytes: None,
        };
        ring.send(id, buffer, head);
        let mut is_there = false;
        while !is_there {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(Unsupported::Lacks("receiving that goes on by itself"));
            }
            ring.wait(Some(left))
                .map_err(|error| trial("waiting", error))?;
            while let Some(event) = ring.next_event() {
                match event {
                    Event::Received(received) => is_there |= received.payload[..] == [round],
                    Event::SocketFailed { error, .. } => {
                        return Err(trial("receiving into provided buffers", error));
                    }
                    Event::Sent {
                        result: Err(error), ..
                    } => return Err(trial("sending", error)),
                    _ => {}
                }
            }
        }
    }
    Ok(())
}

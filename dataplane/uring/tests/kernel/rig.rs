//! Rings and sockets for the tests, and waiting for what must come.

use std::net::{SocketAddr, UdpSocket};
use std::time::{Duration, Instant};

use pantala_uring::socket::{SocketOptions, bind_group};
use pantala_uring::{Event, Received, Ring, RingConfig, SendHead, SocketId};

/// Nothing here takes long; what takes this long does not come.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);

pub(crate) fn small() -> RingConfig {
    RingConfig {
        entries: 32,
        receive_buffers: 16,
        receive_buffer_bytes: 65_535,
        send_buffers: 8,
        send_buffer_bytes: 65_535,
        receive_buffers_lent_max: 32,
    }
}

/// A ring with one socket on `listen`.
pub(crate) struct Node {
    pub(crate) ring: Ring,
    pub(crate) socket: SocketId,
    pub(crate) address: SocketAddr,
}

impl Node {
    pub(crate) fn new(listen: &str) -> Self {
        Self::with(listen, &small())
    }

    pub(crate) fn with(listen: &str, config: &RingConfig) -> Self {
        let mut ring = Ring::new(config).expect("this kernel has what the ring needs");
        let socket = bind(listen);
        let address = socket.local_addr().unwrap();
        let socket = ring.add_socket(socket).unwrap();
        ring.submit().unwrap();
        Self {
            ring,
            socket,
            address,
        }
    }

    pub(crate) fn send(&mut self, head: SendHead, bytes: &[u8]) {
        let mut buffer = self.ring.take_send_buffer().expect("a buffer is free");
        assert!(buffer.is_empty());
        buffer.extend_from_slice(bytes);
        self.ring.send(self.socket, buffer, head);
        self.ring.submit().unwrap();
    }

    /// The next event; fails if none comes.
    pub(crate) fn event(&mut self) -> Event {
        let deadline = Instant::now() + PATIENCE;
        loop {
            if let Some(event) = self.ring.next_event() {
                return event;
            }
            let left = deadline.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "nothing happened");
            self.ring.wait(Some(left)).unwrap();
        }
    }

    /// The next batch that arrives, whatever else happens.
    pub(crate) fn received(&mut self) -> Received {
        loop {
            match self.event() {
                Event::Received(received) => return received,
                Event::SocketFailed { error, .. } => panic!("receiving ended: {error}"),
                _ => {}
            }
        }
    }

    /// What comes of the next datagram that was sent.
    pub(crate) fn sent(&mut self) -> std::io::Result<usize> {
        loop {
            if let Event::Sent { result, .. } = self.event() {
                return result;
            }
        }
    }
}

pub(crate) fn bind(listen: &str) -> UdpSocket {
    let options = SocketOptions::default();
    let mut group = bind_group(listen.parse().unwrap(), 1, &options).unwrap();
    group.sockets.remove(0)
}

pub(crate) fn to(destination: SocketAddr) -> SendHead {
    SendHead {
        destination,
        source_ip: None,
        ecn: 0,
        segment_bytes: None,
    }
}

/// Bytes that differ by place and by `seed`.
pub(crate) fn pattern(seed: u8, bytes: usize) -> Vec<u8> {
    (0..bytes)
        .map(|at| (at as u32).wrapping_mul(2_654_435_761).to_le_bytes()[3] ^ seed)
        .collect()
}

//! Everything at once, by chance, against a model. A failure prints the seed that replays it.

use std::collections::VecDeque;
use std::fs::File;
use std::sync::Arc;
use std::time::Duration;

use bytes::{Bytes, BytesMut};

use super::*;
use crate::kernel::fake::{Arriving, OnCancelAll};

const RUNS: u64 = 60;
const STEPS: usize = 600;

/// xorshift64.
struct Chance(u64);

impl Chance {
    fn below(&mut self, bound: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % bound as u64) as usize
    }

    fn of<T: Copy>(&mut self, all: &[T]) -> Option<T> {
        if all.is_empty() {
            return None;
        }
        Some(all[self.below(all.len())])
    }
}

struct Run {
    core: Core<Fake>,
    fake: Fake,
    chance: Chance,
    sockets: Vec<SocketId>,
    file: Arc<File>,
    /// Payloads that must still come out, for each socket.
    expected: Vec<VecDeque<Vec<u8>>>,
    /// What readers keep, and what it must be.
    kept: Vec<(Bytes, Vec<u8>)>,
    sends_open: usize,
    files_open: usize,
    count: usize,
}

impl Run {
    fn new(seed: u64) -> Self {
        let fake = Fake::new(3);
        let mut core = Core::new(fake.clone(), &small()).unwrap();
        let sockets: Vec<SocketId> = (0..2).map(|_| core.add_socket(socket()).unwrap()).collect();
        Self {
            core,
            fake,
            chance: Chance(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1),
            expected: vec![VecDeque::new(); sockets.len()],
            sockets,
            file: Arc::new(tempfile::tempfile().unwrap()),
            kept: Vec::new(),
            sends_open: 0,
            files_open: 0,
            count: 0,
        }
    }

    fn step(&mut self) {
        self.count += 1;
        match self.chance.below(16) {
            0..=2 => self.arrive(),
            3 => {
                let errno = [libc::ENOBUFS, libc::ECONNREFUSED, libc::EAGAIN][self.chance.below(3)];
                if let Some(tag) = self.chance.of(&self.fake.receives()) {
                    self.fake.complete(tag, -errno);
                }
            }
            4 | 5 => {
                if let Some(mut buffer) = self.core.take_send_buffer() {
                    let bytes = self.chance.below(150);
                    buffer.extend_from_slice(&pattern(self.count, bytes));
                    let socket = self.sockets[self.chance.below(2)];
                    self.core.set_zero_copy_sends(self.chance.below(3) == 0);
                    self.core.send(socket, buffer, &head());
                    self.sends_open += 1;
                }
            }
            6 | 7 => self.end_send(),
            8 => self.begin_file(),
            9 => {
                if let Some(tag) = self.chance.of(&self.fake.files()) {
                    let bytes = self.fake.bytes(tag).len();
                    let result = match self.chance.below(4) {
                        0 => -libc::EIO,
                        1 if bytes > 0 => 1 + self.chance.below(bytes) as i32,
                        _ if bytes > 0 => bytes as i32,
                        _ => self.chance.below(64) as i32,
                    };
                    self.fake.complete(tag, result);
                }
            }
            10 => self.core.cancel(self.chance.below(4) as u64),
            11 => {
                let errno = [libc::EBUSY, libc::EAGAIN][self.chance.below(2)];
                self.fake.fail_next_call(errno, self.chance.below(2) == 0);
            }
            12 => self.core.waker().wake(),
            13 => {
                if !self.kept.is_empty() {
                    let at = self.chance.below(self.kept.len());
                    self.kept.swap_remove(at);
                }
            }
            14 => self.core.submit().unwrap(),
            _ => self.core.wait(Some(Duration::from_secs(5))).unwrap(),
        }
        let most = self.chance.below(4);
        for _ in 0..most {
            if let Some(event) = self.core.next_event() {
                self.take(event);
            }
        }
        self.fake.check();
        for (bytes, expected) in &self.kept {
            assert_eq!(bytes, expected);
        }
        assert!(self.core.counters().lent <= 3);
    }

    fn arrive(&mut self) {
        let receives = self.fake.receives();
        let Some(tag) = self.chance.of(&receives) else {
            return;
        };
        let bytes = [1, 30, 400, 1700, PAYLOAD_BYTES][self.chance.below(5)];
        let payload = pattern(self.count, bytes);
        if self.fake.provided() > 0 {
            let socket = (tag & 0xff) as usize;
            self.expected[socket].push_back(payload.clone());
        }
        let goes_on = self.chance.below(5) > 0;
        self.fake.deliver(tag, &Arriving::new(payload), goes_on);
    }

    fn end_send(&mut self) {
        let Some(tag) = self.chance.of(&self.fake.sends()) else {
            return;
        };
        let is_first_of_two = matches!(
            self.fake.operation(tag),
            crate::kernel::Operation::Send {
                zero_copy: true,
                ..
            }
        ) && !self.fake.is_sent_without_copy(tag);
        match self.chance.below(3) {
            0 if is_first_of_two => self.fake.sent_without_copy(tag, 1),
            1 => self.fake.complete(tag, -libc::EMSGSIZE),
            _ => self.fake.complete(tag, 1),
        }
    }

    fn begin_file(&mut self) {
        let token = self.chance.below(4) as u64;
        let parts = self.chance.below(4);
        let is_begun = if self.chance.below(2) == 0 {
            let slices = (0..parts)
                .map(|part| Bytes::from(pattern(part, self.chance.below(90))))
                .collect();
            self.core
                .write_vectored(&self.file, 0, slices, token)
                .is_ok()
        } else {
            let buffer = BytesMut::with_capacity(64);
            self.core.read(&self.file, 0, buffer, token).is_ok()
        };
        self.files_open += usize::from(is_begun);
    }

    fn take(&mut self, event: Event) {
        match event {
            Event::Received(received) => {
                let expected = self.expected[received.socket.index()].pop_front();
                let expected = expected.expect("something was delivered");
                assert_eq!(received.payload, expected);
                if self.chance.below(2) == 0 {
                    let from = self.chance.below(expected.len());
                    let slice = received.payload.freeze().slice(from..);
                    self.kept.push((slice, expected[from..].to_vec()));
                }
            }
            Event::Sent {
                destination: to, ..
            } => {
                assert_eq!(to, destination());
                self.sends_open -= 1;
            }
            Event::Read { buffer, result, .. } => {
                assert_eq!(buffer, vec![0x5a; result.unwrap_or(0)]);
                self.files_open -= 1;
            }
            Event::Wrote { .. } => self.files_open -= 1,
            Event::Woken => {}
            Event::SocketFailed { .. } => panic!("{event:?}"),
        }
    }

    /// The kernel ends all there is; all of it must come out.
    fn settle(&mut self) {
        for _ in 0..300 {
            for tag in self.fake.sends() {
                self.fake.complete(tag, 1);
            }
            for tag in self.fake.files() {
                let bytes = self.fake.bytes(tag).len() as i32;
                self.fake.complete(tag, bytes);
            }
            self.core.wait(Some(Duration::ZERO)).unwrap();
            while let Some(event) = self.core.next_event() {
                self.take(event);
            }
        }
        assert_eq!(self.sends_open, 0);
        assert_eq!(self.files_open, 0);
        assert!(self.expected.iter().all(VecDeque::is_empty));
        assert_eq!(self.fake.receives().len(), 2);
        assert_eq!(self.fake.provided(), 4);
        let buffers: Vec<_> = std::iter::from_fn(|| self.core.take_send_buffer()).collect();
        assert_eq!(buffers.len(), 4);
    }
}

#[test]
fn nothing_is_lost_changed_or_used_early_whatever_the_kernel_does() {
    let replay = std::env::var("PANTALA_SEED").ok();
    let seeds = match replay.and_then(|seed| seed.parse().ok()) {
        Some(seed) => seed..=seed,
        None => 1..=RUNS,
    };
    for seed in seeds {
        println!("PANTALA_SEED={seed}");
        let mut run = Run::new(seed);
        for _ in 0..STEPS {
            run.step();
        }
        // Half of the runs come to rest first; the others are dropped in mid-flight.
        if seed % 2 == 0 {
            run.settle();
        }
        let obeys = seed % 4 < 3;
        if !obeys {
            run.fake.on_cancel_all(OnCancelAll::Ignore);
            // The drop would wait for what never comes.
            for _ in 0..20 {
                run.fake.fail_next_call(libc::EBADF, true);
            }
        }
        let Run {
            core, fake, kept, ..
        } = run;
        drop(core);
        fake.scribble();
        for (bytes, expected) in &kept {
            assert_eq!(bytes, expected);
        }
    }
}

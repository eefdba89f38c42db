//! A kernel that does what a test tells it, and nothing by itself.
//!
//! What it may do to the ring, and what the ring must survive: take completions out of order and at any later time; end a
//! receive whenever it likes; run out of receive buffers; write less than asked for; fail the system call, with or
//! without having taken what was queued; ignore a cancellation; give memory back late or never, and write to it until
//! then, even after the ring is gone. It never invents completions, and never writes to what it has given back.
//!
//! It looks at all memory on loan whenever it is called, so that a sanitizer sees what was freed too early, and it
//! remembers what a datagram looked like when it was handed over, so that a change of it is seen without one.

use std::cell::RefCell;
use std::collections::VecDeque;
use std::io;
use std::net::SocketAddr;
use std::rc::Rc;

use super::{Completion, Kernel, Operation, Stay};
use crate::socket::address::{self, NAME_BYTES};
use crate::socket::control::RECEIVE_BYTES;

const FLAG_BUFFER: u32 = 1;
const FLAG_MORE: u32 = 2;
const FLAG_NOTIFICATION: u32 = 8;
const HEAD_BYTES: usize = 16 + NAME_BYTES + RECEIVE_BYTES;

/// A datagram that arrives.
#[derive(Debug, Clone)]
pub(crate) struct Arriving {
    pub(crate) source: SocketAddr,
    pub(crate) control: Vec<u8>,
    pub(crate) payload: Vec<u8>,
    pub(crate) flags: i32,
}

impl Arriving {
    pub(crate) fn new(payload: Vec<u8>) -> Self {
        Self {
            source: "10.9.8.7:654".parse().unwrap(),
            control: Vec::new(),
            payload,
            flags: 0,
        }
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum OnCancelAll {
    /// Everything ends with `ECANCELED`.
    Obey,
    /// As if it had not been asked.
    Ignore,
}

struct InFlight {
    operation: Operation,
    tag: u64,
    /// The bytes of a send or write when they were handed over.
    bytes: Vec<u8>,
    /// The bytes were sent, and are still on loan.
    is_zero_copy_rest: bool,
}

type Act = Box<dyn FnOnce(&Fake)>;

struct State {
    queue_entries_max: usize,
    queued: Vec<(Operation, u64)>,
    in_flight: Vec<InFlight>,
    completions: VecDeque<Completion>,
    provided: VecDeque<(u16, *mut u8, u32)>,
    stays: Vec<Stay>,
    /// For the next system calls: the errno, and whether what is queued is taken nevertheless.
    errors: VecDeque<(i32, bool)>,
    /// What happens while the ring sleeps, one for each time.
    asleep: VecDeque<Act>,
    on_cancel_all: OnCancelAll,
    cancelled: Vec<u64>,
    is_forgotten: bool,
}

/// The kernel, and the test's handle to it.
#[derive(Clone)]
pub(crate) struct Fake(Rc<RefCell<State>>);

impl Fake {
    pub(crate) fn new(queue_entries_max: usize) -> Self {
        Self(Rc::new(RefCell::new(State {
            queue_entries_max,
            queued: Vec::new(),
            in_flight: Vec::new(),
            completions: VecDeque::new(),
            provided: VecDeque::new(),
            stays: Vec::new(),
            errors: VecDeque::new(),
            asleep: VecDeque::new(),
            on_cancel_all: OnCancelAll::Obey,
            cancelled: Vec::new(),
            is_forgotten: false,
        })))
    }

    pub(crate) fn on_cancel_all(&self, on_cancel_all: OnCancelAll) {
        self.0.borrow_mut().on_cancel_all = on_cancel_all;
    }

    /// The next system call fails with `errno`; it takes what is queued if `takes`.
    pub(crate) fn fail_next_call(&self, errno: i32, takes: bool) {
        self.0.borrow_mut().errors.push_back((errno, takes));
    }

    /// The next time the ring sleeps, this happens. Then it wakes up.
    pub(crate) fn when_asleep(&self, act: impl FnOnce(&Fake) + 'static) {
        self.0.borrow_mut().asleep.push_back(Box::new(act));
    }

    /// The system calls so far.
    pub(crate) fn stays(&self) -> Vec<Stay> {
        self.0.borrow().stays.clone()
    }

    pub(crate) fn provided(&self) -> usize {
        self.0.borrow().provided.len()
    }

    pub(crate) fn has_forgotten_buffers(&self) -> bool {
        self.0.borrow().is_forgotten
    }

    /// Tags of the cancellations that were asked for one by one.
    pub(crate) fn cancelled(&self) -> Vec<u64> {
        self.0.borrow().cancelled.clone()
    }

    /// Tags of what is in flight and for which `is` holds, oldest first.
    pub(crate) fn tags(&self, is: impl Fn(&Operation) -> bool) -> Vec<u64> {
        let state = self.0.borrow();
        let wanted = state.in_flight.iter().filter(|one| is(&one.operation));
        wanted.map(|one| one.tag).collect()
    }

    pub(crate) fn receives(&self) -> Vec<u64> {
        self.tags(|operation| matches!(operation, Operation::Receive { .. }))
    }

    pub(crate) fn sends(&self) -> Vec<u64> {
        self.tags(|operation| matches!(operation, Operation::Send { .. }))
    }

    /// All but the bell, which is the one read of eight bytes.
    pub(crate) fn files(&self) -> Vec<u64> {
        self.tags(|operation| match operation {
            Operation::Read { bytes, .. } => *bytes != 8,
            other => matches!(other, Operation::Write { .. }),
        })
    }

    pub(crate) fn bell(&self) -> u64 {
        self.tags(|operation| matches!(operation, Operation::Read { bytes: 8, .. }))[0]
    }

    pub(crate) fn operation(&self, tag: u64) -> Operation {
        let state = self.0.borrow();
        let found = state.in_flight.iter().find(|one| one.tag == tag);
        found.expect("in flight").operation
    }

    /// What a send or write wants to get out.
    pub(crate) fn bytes(&self, tag: u64) -> Vec<u8> {
        let state = self.0.borrow();
        let found = state.in_flight.iter().find(|one| one.tag == tag);
        found.expect("in flight").bytes.clone()
    }

    /// A datagram arrives for the receive `tag`; if `goes_on` is false, that ends. Without a buffer it ends with
    /// `ENOBUFS`, and the datagram is lost.
    pub(crate) fn deliver(&self, tag: u64, arriving: &Arriving, goes_on: bool) {
        let mut state = self.0.borrow_mut();
        let Some((buffer, address, room)) = state.provided.pop_front() else {
            drop(state);
            return self.complete(tag, -libc::ENOBUFS);
        };
        let mut name = [0; NAME_BYTES];
        let name_bytes = address::encode(arriving.source, false, &mut name);
        let mut bytes = Vec::with_capacity(HEAD_BYTES + arriving.payload.len());
        for number in [
            name_bytes,
            arriving.control.len() as u32,
            arriving.payload.len() as u32,
            arriving.flags as u32,
        ] {
            bytes.extend_from_slice(&number.to_ne_bytes());
        }
        bytes.extend_from_slice(&name);
        bytes.extend_from_slice(&arriving.control);
        bytes.resize(HEAD_BYTES, 0);
        bytes.extend_from_slice(&arriving.payload);
        bytes.truncate(room as usize);
        // SAFETY: the ring has provided this room and not been told that it is used.
        unsafe { address.copy_from_nonoverlapping(bytes.as_ptr(), bytes.len()) };
        state.completions.push_back(Completion {
            tag,
            result: bytes.len() as i32,
            flags: FLAG_BUFFER | u32::from(buffer) << 16 | if goes_on { FLAG_MORE } else { 0 },
        });
        if !goes_on {
            state.in_flight.retain(|one| one.tag != tag);
        }
    }

    /// The operation `tag` ends. A read has read as many bytes of `0x5a` as the result says.
    pub(crate) fn complete(&self, tag: u64, result: i32) {
        self.check();
        let mut state = self.0.borrow_mut();
        let at = state.in_flight.iter().position(|one| one.tag == tag);
        let one = state.in_flight.remove(at.expect("in flight"));
        if let (Operation::Read { address, bytes, .. }, 1..) = (one.operation, result) {
            assert!(result as u32 <= bytes);
            // SAFETY: on loan until the completion below is taken.
            unsafe { address.write_bytes(0x5a, result as usize) };
        }
        state.completions.push_back(Completion {
            tag,
            result,
            flags: if one.is_zero_copy_rest {
                FLAG_NOTIFICATION
            } else {
                0
            },
        });
    }

    /// The datagram has been sent from where it lies: `complete` says when the network has let go of it.
    pub(crate) fn sent_without_copy(&self, tag: u64, result: i32) {
        let mut state = self.0.borrow_mut();
        let one = state.in_flight.iter_mut().find(|one| one.tag == tag);
        one.expect("in flight").is_zero_copy_rest = true;
        state.completions.push_back(Completion {
            tag,
            result,
            flags: FLAG_MORE,
        });
    }

    pub(crate) fn is_sent_without_copy(&self, tag: u64) -> bool {
        let state = self.0.borrow();
        let found = state.in_flight.iter().find(|one| one.tag == tag);
        found.expect("in flight").is_zero_copy_rest
    }

    /// Looks at everything on loan.
    pub(crate) fn check(&self) {
        for one in &self.0.borrow().in_flight {
            assert_eq!(
                look(&one.operation),
                one.bytes,
                "bytes changed while they were on loan"
            );
        }
    }

    /// Writes over everything that the kernel may write to.
    pub(crate) fn scribble(&self) {
        self.check();
        let state = self.0.borrow();
        for (_, address, room) in &state.provided {
            // SAFETY: provided, and not given back.
            unsafe { address.write_bytes(0xee, *room as usize) };
        }
        for one in &state.in_flight {
            if let Operation::Read { address, bytes, .. } = one.operation {
                // SAFETY: on loan.
                unsafe { address.write_bytes(0xee, bytes as usize) };
            }
        }
    }

    fn take_queued(&self) {
        let mut state = self.0.borrow_mut();
        for (operation, tag) in std::mem::take(&mut state.queued) {
            match operation {
                Operation::Cancel { tag: victim } => {
                    state.cancelled.push(victim);
                    state.completions.push_back(Completion {
                        tag,
                        result: 0,
                        flags: 0,
                    });
                }
                Operation::CancelAll => {
                    if state.on_cancel_all == OnCancelAll::Obey {
                        let ended = std::mem::take(&mut state.in_flight);
                        // The youngest first: the ring must not care.
                        for one in ended.into_iter().rev() {
                            state.completions.push_back(Completion {
                                tag: one.tag,
                                result: -libc::ECANCELED,
                                flags: 0,
                            });
                        }
                    }
                    state.completions.push_back(Completion {
                        tag,
                        result: 0,
                        flags: 0,
                    });
                }
                operation => {
                    assert!(
                        state.in_flight.iter().all(|one| one.tag != tag),
                        "two operations in flight have one tag"
                    );
                    state.in_flight.push(InFlight {
                        operation,
                        tag,
                        bytes: look(&operation),
                        is_zero_copy_rest: false,
                    });
                }
            }
        }
    }
}

/// The bytes that an operation wants to get out; for one that brings bytes in, none, but its memory is looked at.
fn look(operation: &Operation) -> Vec<u8> {
    let gather = |vectors: *const libc::iovec, count: usize| {
        let mut bytes = Vec::new();
        // SAFETY: on loan, with all that it points at.
        unsafe {
            for vector in std::slice::from_raw_parts(vectors, count) {
                let start = vector.iov_base.cast_const().cast::<u8>();
                bytes.extend_from_slice(std::slice::from_raw_parts(start, vector.iov_len));
            }
        }
        bytes
    };
    match *operation {
        Operation::Send { message, .. } => {
            // SAFETY: on loan, with all that it points at.
            let (header, name, control) = unsafe {
                let header = &*message;
                let part = |start: *mut libc::c_void, bytes: usize| {
                    std::slice::from_raw_parts(start.cast_const().cast::<u8>(), bytes).to_vec()
                };
                (
                    header,
                    part(header.msg_name, header.msg_namelen as usize),
                    part(header.msg_control, header.msg_controllen as _),
                )
            };
            let mut bytes = gather(header.msg_iov, header.msg_iovlen as _);
            bytes.extend(name);
            bytes.extend(control);
            bytes
        }
        Operation::Write { slices, count, .. } => gather(slices, count as usize),
        Operation::Receive { template, .. } => {
            // SAFETY: on loan.
            let template = unsafe { &*template };
            assert_eq!(template.msg_namelen as usize, NAME_BYTES);
            assert_eq!(template.msg_controllen, RECEIVE_BYTES as _);
            Vec::new()
        }
        Operation::Read { .. } | Operation::Cancel { .. } | Operation::CancelAll => Vec::new(),
    }
}

impl Kernel for Fake {
    unsafe fn push(&mut self, operation: &Operation, tag: u64) -> bool {
        let mut state = self.0.borrow_mut();
        let has_room = state.queued.len() < state.queue_entries_max;
        if has_room {
            state.queued.push((*operation, tag));
        }
        has_room
    }

    fn has_queued(&mut self) -> bool {
        !self.0.borrow().queued.is_empty()
    }

    fn enter(&mut self, stay: Stay) -> io::Result<()> {
        self.check();
        self.0.borrow_mut().stays.push(stay);
        let failure = self.0.borrow_mut().errors.pop_front();
        if failure.is_none_or(|(_, takes)| takes) {
            self.take_queued();
        }
        if let Some((errno, _)) = failure {
            return Err(io::Error::from_raw_os_error(errno));
        }
        if matches!(stay, Stay::Until(_)) && self.0.borrow().completions.is_empty() {
            let act = self.0.borrow_mut().asleep.pop_front();
            if let Some(act) = act {
                act(self);
            }
        }
        Ok(())
    }

    fn has_completion(&mut self) -> bool {
        !self.0.borrow().completions.is_empty()
    }

    fn next_completion(&mut self) -> Option<Completion> {
        self.0.borrow_mut().completions.pop_front()
    }

    unsafe fn provide(&mut self, buffer: u16, address: *mut u8, bytes: u32) {
        let mut state = self.0.borrow_mut();
        assert!(
            state
                .provided
                .iter()
                .all(|(other, start, _)| *other != buffer && *start != address),
            "a buffer is provided twice"
        );
        state.provided.push_back((buffer, address, bytes));
    }

    fn forget_buffers(&mut self) {
        let mut state = self.0.borrow_mut();
        assert!(state.in_flight.is_empty());
        state.provided.clear();
        state.is_forgotten = true;
    }
}

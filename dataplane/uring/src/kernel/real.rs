//! The real kernel: one io_uring with one ring of receive buffers.

#![allow(unsafe_code)]

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::io;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU16, Ordering};

use io_uring::types::{BufRingEntry, CancelBuilder, Fd, SubmitArgs, Timespec};
use io_uring::{IoUring, opcode, squeue};

use super::{BUFFER_GROUP, Completion, Kernel, Operation, Stay};
use crate::error::Unsupported;

/// The kernel wants buffer rings at a page's start. No page that we run on is larger.
const PAGE_BYTES: usize = 65536;
/// io_uring_enter: collect completions.
const ENTER_GETEVENTS: u32 = 1;
/// io_uring_enter: the argument is a timeout.
const ENTER_EXT_ARG: u32 = 1 << 3;

/// Closed before the buffers' entries are freed: `buffers` says whether that may happen at all.
pub(crate) struct RealKernel {
    ring: IoUring,
    buffers: BufferRing,
    /// Entries pushed and not yet handed over.
    queued: u32,
}

impl RealKernel {
    /// `completions`: the most that can be outstanding at a time.
    pub(crate) fn new(
        set_ups: &[SetUp],
        entries: u32,
        completions: u32,
        receive_buffers: u16,
    ) -> Result<Self, Unsupported> {
        let ring = open(set_ups, entries, completions)?;
        let params = ring.params();
        if !params.is_feature_nodrop() {
            return Err(Unsupported::Lacks("completions that are never dropped"));
        }
        if !params.is_feature_ext_arg() {
            return Err(Unsupported::Lacks("waiting with a timeout"));
        }
        let buffers = BufferRing::new(receive_buffers);
        // SAFETY: the entries live until `forget_buffers` has undone this, or for ever.
        unsafe {
            ring.submitter().register_buf_ring_with_flags(
                buffers.entries.as_ptr() as u64,
                buffers.count,
                BUFFER_GROUP,
                0,
            )
        }
        .map_err(|error| match error.raw_os_error() {
            Some(libc::ENOMEM) => Unsupported::Memory,
            _ => Unsupported::Lacks("rings of receive buffers"),
        })?;
        let mut kernel = Self {
            ring,
            buffers,
            queued: 0,
        };
        kernel.buffers.registered = true;
        Ok(kernel)
    }

    pub(crate) fn ring(&self) -> &IoUring {
        &self.ring
    }
}

/// How the kernel hands completions over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum SetUp {
    /// They are worked off in our own calls only, and never in the middle of other work.
    Deferred,
    /// When we come into the kernel anyway (before Linux 6.1).
    Cooperative,
    /// At any time, by interrupts: about a tenth more of the time (before 5.19).
    Plain,
}

impl SetUp {
    /// The best first.
    pub(crate) const ALL: [Self; 3] = [Self::Deferred, Self::Cooperative, Self::Plain];

    fn build(self, entries: u32, completions: u32) -> io::Result<IoUring> {
        let mut builder = IoUring::builder();
        builder
            .dontfork()
            .setup_clamp()
            .setup_cqsize(completions.next_power_of_two());
        match self {
            Self::Deferred => builder
                .setup_submit_all()
                .setup_single_issuer()
                .setup_defer_taskrun(),
            Self::Cooperative => builder.setup_coop_taskrun().setup_taskrun_flag(),
            Self::Plain => &mut builder,
        };
        builder.build(entries)
    }
}

/// A ring of the first set-up that this kernel knows.
fn open(set_ups: &[SetUp], entries: u32, completions: u32) -> Result<IoUring, Unsupported> {
    let mut refused = Unsupported::Absent;
    for set_up in set_ups {
        match set_up.build(entries, completions) {
            Ok(ring) => return Ok(ring),
            Err(error) => {
                refused = why_refused(&error);
                if error.raw_os_error() != Some(libc::EINVAL) {
                    break;
                }
            }
        }
    }
    Err(refused)
}

fn why_refused(error: &io::Error) -> Unsupported {
    match error.raw_os_error() {
        Some(libc::EPERM | libc::EACCES) => {
            let sysctl = std::fs::read_to_string("/proc/sys/kernel/io_uring_disabled")
                .ok()
                .and_then(|value| value.trim().parse().ok())
                .unwrap_or(0);
            if sysctl > 0 {
                Unsupported::Sysctl(sysctl)
            } else {
                Unsupported::Forbidden
            }
        }
        Some(libc::ENOSYS) => Unsupported::Absent,
        Some(libc::ENOMEM) => Unsupported::Memory,
        Some(libc::EINVAL) => Unsupported::Lacks("the set-up that a ring needs"),
        _ => Unsupported::Trial {
            step: "io_uring_setup",
            error: io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EIO)),
        },
    }
}

impl Kernel for RealKernel {
    unsafe fn push(&mut self, operation: &Operation, tag: u64) -> bool {
        let entry = entry(operation).user_data(tag);
        // SAFETY: the caller keeps what the entry points at.
        let pushed = unsafe { self.ring.submission().push(&entry) }.is_ok();
        self.queued += u32::from(pushed);
        pushed
    }

    fn has_queued(&mut self) -> bool {
        self.queued > 0
    }

    fn enter(&mut self, stay: Stay) -> io::Result<()> {
        let submitter = self.ring.submitter();
        let timespec;
        let mut arguments = SubmitArgs::new();
        let (wanted, flags) = match stay {
            Stay::No => (0, 0),
            Stay::Reap => (0, ENTER_GETEVENTS),
            Stay::Until(None) => (1, ENTER_GETEVENTS | ENTER_EXT_ARG),
            Stay::Until(Some(timeout)) => {
                timespec = Timespec::from(timeout);
                arguments = arguments.timespec(&timespec);
                (1, ENTER_GETEVENTS | ENTER_EXT_ARG)
            }
        };
        // SAFETY: the argument is what the flags say (without EXT_ARG there is none), and outlives the call.
        let entered = unsafe {
            if flags & ENTER_EXT_ARG == 0 {
                submitter.enter::<libc::sigset_t>(self.queued, 0, flags, None)
            } else {
                submitter.enter(self.queued, wanted, flags, Some(&arguments))
            }
        };
        // The kernel moves the queue's head as far as it came, whatever the call returns.
        self.queued = self.ring.submission().len() as u32;
        match entered {
            Ok(_) => Ok(()),
            Err(error) => match error.raw_os_error() {
                Some(libc::ETIME | libc::EINTR) => Ok(()),
                _ => Err(error),
            },
        }
    }

    fn has_completion(&mut self) -> bool {
        !self.ring.completion().is_empty()
    }

    fn next_completion(&mut self) -> Option<Completion> {
        let entry = self.ring.completion().next()?;
        Some(Completion {
            tag: entry.user_data(),
            result: entry.result(),
            flags: entry.flags(),
        })
    }

    unsafe fn provide(&mut self, buffer: u16, address: *mut u8, bytes: u32) {
        self.buffers.provide(buffer, address, bytes);
    }

    fn forget_buffers(&mut self) {
        match self.ring.submitter().unregister_buf_ring(BUFFER_GROUP) {
            Ok(()) => self.buffers.registered = false,
            Err(error) => tracing::warn!(%error, "the kernel keeps a ring of receive buffers"),
        }
    }
}

fn entry(operation: &Operation) -> squeue::Entry {
    match *operation {
        Operation::Receive { fd, template } => {
            opcode::RecvMsgMulti::new(Fd(fd), template, BUFFER_GROUP).build()
        }
        Operation::Send {
            fd,
            message,
            zero_copy: false,
        } => opcode::SendMsg::new(Fd(fd), message).build(),
        Operation::Send {
            fd,
            message,
            zero_copy: true,
        } => opcode::SendMsgZc::new(Fd(fd), message).build(),
        Operation::Read {
            fd,
            address,
            bytes,
            offset,
        } => opcode::Read::new(Fd(fd), address, bytes)
            .offset(offset)
            .build(),
        Operation::Write {
            fd,
            slices,
            count,
            offset,
        } => opcode::Writev::new(Fd(fd), slices, count)
            .offset(offset)
            .build(),
        Operation::Cancel { tag } => opcode::AsyncCancel::new(tag).build(),
        Operation::CancelAll => opcode::AsyncCancel2::new(CancelBuilder::any().all()).build(),
    }
}

/// The entries that tell the kernel where to receive into. We write entries and the tail; the kernel reads them.
struct BufferRing {
    entries: NonNull<BufRingEntry>,
    /// A power of two.
    count: u16,
    tail: u16,
    /// The kernel knows the entries.
    registered: bool,
}

impl BufferRing {
    fn new(buffers: u16) -> Self {
        let count = buffers.next_power_of_two();
        let layout = Self::layout(count);
        // SAFETY: the layout is not empty.
        let memory = unsafe { alloc_zeroed(layout) };
        let Some(entries) = NonNull::new(memory.cast::<BufRingEntry>()) else {
            handle_alloc_error(layout);
        };
        Self {
            entries,
            count,
            tail: 0,
            registered: false,
        }
    }

    fn layout(count: u16) -> Layout {
        Layout::from_size_align(usize::from(count) * size_of::<BufRingEntry>(), PAGE_BYTES)
            .expect("at most 32,768 entries of 16 bytes")
    }

    fn provide(&mut self, buffer: u16, address: *mut u8, bytes: u32) {
        let index = usize::from(self.tail & (self.count - 1));
        // SAFETY: `index` is below the number of entries. The kernel does not look at an entry beyond the tail, and
        // there are no more buffers than entries, so this one is not in use. The tail overlays a field of the first
        // entry that is not written here.
        unsafe {
            let entry = &mut *self.entries.as_ptr().add(index);
            entry.set_addr(address as u64);
            entry.set_len(bytes);
            entry.set_bid(buffer);
        }
        self.tail = self.tail.wrapping_add(1);
        // SAFETY: the address of the tail within the first entry, aligned to two bytes, shared with the kernel alone.
        // Released, so that the kernel sees the entry before it sees the tail.
        unsafe {
            let tail = BufRingEntry::tail(self.entries.as_ptr()).cast_mut();
            AtomicU16::from_ptr(tail).store(self.tail, Ordering::Release);
        }
    }
}

impl Drop for BufferRing {
    fn drop(&mut self) {
        if self.registered {
            return;
        }
        // SAFETY: allocated with this layout in `new`, and the kernel does not know it (any more).
        unsafe { dealloc(self.entries.as_ptr().cast(), Self::layout(self.count)) };
    }
}

//! Memory on loan to the kernel.
//!
//! An operation's memory moves into one of these types before the operation is handed over, and comes out by `take_back`,
//! for which its last completion must have been reaped. Neither type frees anything when it is dropped: whatever goes
//! wrong (a panic, a ring dropped in mid-flight, a forgotten completion), lent memory is leaked, not reused.

#![allow(unsafe_code)]

use std::mem::ManuallyDrop;
use std::ptr::NonNull;

use bytes::BytesMut;

/// A value at a fixed address that the kernel may read and write.
#[derive(Debug)]
pub(crate) struct Lent<T>(NonNull<T>);

impl<T> Lent<T> {
    /// Nobody but the kernel touches the value from here on.
    pub(crate) fn new(value: Box<T>) -> Self {
        Self(NonNull::from(Box::leak(value)))
    }

    /// For the operation. Must not be read or written by us while it is in flight.
    pub(crate) fn address(&self) -> *mut T {
        self.0.as_ptr()
    }

    /// The value, ours again.
    ///
    /// # Safety
    ///
    /// No operation that was given the address is in flight: each one's last completion was reaped, or it was never handed
    /// to the kernel.
    pub(crate) unsafe fn take_back(self) -> Box<T> {
        // SAFETY: the pointer comes from `Box::leak` in `new`, `self` is consumed so it is given back once, and the
        // caller promises that nobody else uses it.
        unsafe { Box::from_raw(self.0.as_ptr()) }
    }
}

/// The spare room of a buffer, which the kernel may write to.
#[derive(Debug)]
pub(crate) struct LentBuffer(ManuallyDrop<BytesMut>);

impl LentBuffer {
    pub(crate) fn new(buffer: BytesMut) -> Self {
        Self(ManuallyDrop::new(buffer))
    }

    /// Address and size of the spare room, for the operation.
    pub(crate) fn room(&mut self) -> (*mut u8, usize) {
        let room = self.0.spare_capacity_mut();
        (room.as_mut_ptr().cast(), room.len())
    }

    /// The buffer, ours again, with `written` bytes more.
    ///
    /// # Safety
    ///
    /// No operation that was given the room is in flight, and the kernel wrote the first `written` bytes of it.
    pub(crate) unsafe fn take_back(self, written: usize) -> BytesMut {
        let mut buffer = ManuallyDrop::into_inner(self.0);
        let len = buffer.len() + written;
        assert!(
            len <= buffer.capacity(),
            "more was written than there was room for"
        );
        // SAFETY: within the capacity, checked above; initialized by the kernel, as the caller promises.
        unsafe { buffer.set_len(len) };
        buffer
    }
}

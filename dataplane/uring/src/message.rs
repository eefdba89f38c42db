//! A datagram on its way out: its bytes and all that `sendmsg` wants to know, at one address.

use std::cell::RefCell;
use std::mem::ManuallyDrop;
use std::net::{IpAddr, Ipv6Addr, SocketAddr};
use std::ops::{Deref, DerefMut};
use std::rc::Rc;

use crate::event::{SendHead, SocketId};
use crate::socket::address::{self, NAME_BYTES};
use crate::socket::control::Control;

/// Everything that the kernel looks at when it sends.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) header: libc::msghdr,
    pub(crate) slice: libc::iovec,
    pub(crate) name: [u8; NAME_BYTES],
    pub(crate) control: Control,
    pub(crate) bytes: Vec<u8>,
    /// Which of the ring's messages this is.
    pub(crate) index: u32,
    pub(crate) socket: SocketId,
    pub(crate) destination: SocketAddr,
}

impl Message {
    fn new(index: u32, bytes: usize) -> Box<Self> {
        Box::new(Self {
            header: empty_header(),
            slice: libc::iovec {
                iov_base: std::ptr::null_mut(),
                iov_len: 0,
            },
            name: [0; NAME_BYTES],
            control: Control::default(),
            bytes: Vec::with_capacity(bytes),
            index,
            socket: SocketId(0),
            destination: SocketAddr::from(([0, 0, 0, 0], 0)),
        })
    }

    /// Makes the message say what `head` says.
    pub(crate) fn address(&mut self, socket: SocketId, socket_is_v6: bool, head: &SendHead) {
        self.socket = socket;
        self.destination = head.destination;
        let name_bytes = address::encode(head.destination, socket_is_v6, &mut self.name);
        self.control.clear();
        // A mapped address is an IPv4 route, with the options of IPv4, whatever the socket.
        let route_is_v4 = head.destination.ip().to_canonical().is_ipv4();
        if head.ecn != 0 {
            self.control.set_ecn(route_is_v4, head.ecn);
        }
        match head.source_ip.map(|ip| ip.to_canonical()) {
            Some(IpAddr::V4(ip)) if route_is_v4 && !ip.is_unspecified() => {
                self.control.set_source_v4(ip);
            }
            Some(IpAddr::V6(ip)) if !route_is_v4 && ip != Ipv6Addr::UNSPECIFIED => {
                self.control.set_source_v6(ip);
            }
            _ => {}
        }
        // One datagram needs no cutting, and some devices refuse to be asked.
        if let Some(segment_bytes) = head.segment_bytes
            && self.bytes.len() > usize::from(segment_bytes)
        {
            self.control.set_segment_bytes(segment_bytes);
        }
        self.slice.iov_len = self.bytes.len();
        self.header.msg_namelen = name_bytes;
        self.header.msg_controllen = self.control.as_mut_slice().len() as _;
    }

    /// Points the header at the message's own parts. Last of all: moving the message makes the pointers stale.
    ///
    /// # Safety
    ///
    /// `message` is valid, and nobody else uses it meanwhile.
    #[allow(unsafe_code)]
    pub(crate) unsafe fn link(message: *mut Self) -> *const libc::msghdr {
        // SAFETY: as the caller promises. No reference to the whole message is made, so that the pointers stay good.
        unsafe {
            (*message).slice.iov_base = (*message).bytes.as_mut_ptr().cast();
            (*message).header.msg_name = (&raw mut (*message).name).cast();
            (*message).header.msg_iov = &raw mut (*message).slice;
            (*message).header.msg_iovlen = 1;
            (*message).header.msg_control = (&raw mut (*message).control).cast();
            &raw const (*message).header
        }
    }
}

pub(crate) fn empty_header() -> libc::msghdr {
    libc::msghdr {
        msg_name: std::ptr::null_mut(),
        msg_namelen: 0,
        msg_iov: std::ptr::null_mut(),
        msg_iovlen: 0,
        msg_control: std::ptr::null_mut(),
        msg_controllen: 0,
        msg_flags: 0,
    }
}

/// The messages that are not in flight. Last in, first out: the one used last is the one in the cache.
#[derive(Debug)]
pub(crate) struct Pool {
    // Boxed: a message that is lent must not move.
    #[expect(clippy::vec_box)]
    free: RefCell<Vec<Box<Message>>>,
    buffer_bytes: usize,
}

impl Pool {
    pub(crate) fn new(messages: usize, buffer_bytes: usize) -> Rc<Self> {
        let free = (0..messages)
            .map(|index| Message::new(index as u32, buffer_bytes))
            .collect();
        Rc::new(Self {
            free: RefCell::new(free),
            buffer_bytes,
        })
    }

    pub(crate) fn take(self: &Rc<Self>) -> Option<SendBuffer> {
        let message = self.free.borrow_mut().pop()?;
        Some(SendBuffer {
            message: ManuallyDrop::new(message),
            pool: Rc::clone(self),
        })
    }

    pub(crate) fn put(&self, mut message: Box<Message>) {
        message.bytes.clear();
        // A caller may have made it larger: that is not for ever.
        if message.bytes.capacity() > 2 * self.buffer_bytes {
            message.bytes.shrink_to(self.buffer_bytes);
        }
        self.free.borrow_mut().push(message);
    }
}

/// A buffer to fill and send. Empty when it is taken. It goes back to its ring when it is dropped.
#[derive(Debug)]
pub struct SendBuffer {
    message: ManuallyDrop<Box<Message>>,
    pool: Rc<Pool>,
}

impl SendBuffer {
    pub(crate) fn is_of(&self, pool: &Rc<Pool>) -> bool {
        Rc::ptr_eq(&self.pool, pool)
    }

    #[allow(unsafe_code)]
    pub(crate) fn into_message(self) -> Box<Message> {
        let mut buffer = ManuallyDrop::new(self);
        // SAFETY: `buffer` is never dropped nor used again, so both fields are moved out of it exactly once.
        unsafe {
            std::ptr::drop_in_place(&raw mut buffer.pool);
            ManuallyDrop::take(&mut buffer.message)
        }
    }
}

impl Drop for SendBuffer {
    #[allow(unsafe_code)]
    fn drop(&mut self) {
        // SAFETY: the field is not used again: `drop` runs once, and not after `into_message`.
        let message = unsafe { ManuallyDrop::take(&mut self.message) };
        self.pool.put(message);
    }
}

impl Deref for SendBuffer {
    type Target = Vec<u8>;

    fn deref(&self) -> &Vec<u8> {
        &self.message.bytes
    }
}

impl DerefMut for SendBuffer {
    fn deref_mut(&mut self) -> &mut Vec<u8> {
        &mut self.message.bytes
    }
}

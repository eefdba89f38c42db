//! The kernel chooses the socket of a group by the connection ID.
//!
//! A program for the kernel's classic packet filter, which needs no privilege:
//!
//! ```text
//!     A = payload[0]
//!     if A & 0x80 goto long
//!     A = payload[1]        // short header: the connection ID follows the first byte
//!     goto choose
//! long:
//!     A = payload[6]        // first byte, version (4), length of the connection ID, connection ID
//! choose:
//!     return A % count
//! ```
//!
//! A datagram too short for that goes to socket 0.

use std::io;
use std::net::UdpSocket;

use super::option;

/// Which byte of a short header the connection ID begins at.
const SHORT_ID_AT: u32 = 1;
/// Which of a long one.
const LONG_ID_AT: u32 = 6;
const LONG_HEADER_BIT: u32 = 0x80;

const LOAD_BYTE: u32 = libc::BPF_LD | libc::BPF_B | libc::BPF_ABS;
const JUMP_IF_BITS: u32 = libc::BPF_JMP | libc::BPF_JSET | libc::BPF_K;
const JUMP: u32 = libc::BPF_JMP | libc::BPF_JA;
const MODULO: u32 = libc::BPF_ALU | libc::BPF_MOD | libc::BPF_K;
const RETURN_A: u32 = libc::BPF_RET | libc::BPF_A;

fn program(count: u32) -> [libc::sock_filter; 7] {
    let line = |code: u32, if_true: u8, if_false: u8, k: u32| libc::sock_filter {
        code: code as u16,
        jt: if_true,
        jf: if_false,
        k,
    };
    [
        line(LOAD_BYTE, 0, 0, 0),
        line(JUMP_IF_BITS, 2, 0, LONG_HEADER_BIT),
        line(LOAD_BYTE, 0, 0, SHORT_ID_AT),
        line(JUMP, 0, 0, 1),
        line(LOAD_BYTE, 0, 0, LONG_ID_AT),
        line(MODULO, 0, 0, count),
        line(RETURN_A, 0, 0, 0),
    ]
}

/// For the whole group that `socket`, the first of `count`, belongs to.
pub(super) fn by_connection_id(socket: &UdpSocket, count: usize) -> io::Result<()> {
    let count = u32::try_from(count).map_err(|_| io::ErrorKind::InvalidInput)?;
    let mut program = program(count);
    let program = libc::sock_fprog {
        len: program.len() as u16,
        filter: program.as_mut_ptr(),
    };
    option::set_value(
        socket,
        libc::SOL_SOCKET,
        libc::SO_ATTACH_REUSEPORT_CBPF,
        &program,
    )
}

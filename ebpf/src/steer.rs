//! Chooses the socket of a group by the connection ID of a QUIC packet.
//!
//! ```text
//! short header   0 . . . . . . .   connection ID of 8 bytes ...
//! long header    1 . type . . . .  version (4)  length (1)  connection ID ...
//! ```
//!
//! The first byte of an ID that the node gave out, modulo the number of threads, is the thread. Initial and
//! 0-RTT packets carry an ID of the client's: the kernel's hash of the addresses and ports spreads those.

use core::arch::asm;
use core::ptr::read_volatile;

use aya_ebpf::bindings::sk_action::SK_PASS;
use aya_ebpf::macros::{map, sk_reuseport};
use aya_ebpf::maps::{PerCpuArray, ReusePortSockArray};
use aya_ebpf::programs::SkReuseportContext;
use pantala_ebpf_common::{THREADS_MAX, setting, steered};

use crate::atomic::add;
use crate::count::SETTINGS;

/// The sockets of the group, by thread.
#[map]
static SOCKETS: ReusePortSockArray = ReusePortSockArray::with_max_entries(THREADS_MAX, 0);

/// How many batches were steered how, by [`steered`].
#[map]
static STEERED: PerCpuArray<u64> = PerCpuArray::with_max_entries(steered::COUNT, 0);

const UDP_HEADER_BYTES: usize = 8;
/// Bytes of a packet up to the first of the connection ID, that included; short and long headers.
const SHORT_BYTES: usize = 2;
const LONG_BYTES: usize = 7;
const LONG_HEADER: u8 = 0x80;
const TYPE: u8 = 0x30;
const INITIAL: u8 = 0x00;
const ZERO_RTT: u8 = 0x10;

/// Selects a socket, or leaves that to the kernel. Passes in any case.
#[sk_reuseport]
pub fn steer(ctx: SkReuseportContext) -> u32 {
    let how = match (id_byte(&ctx), SETTINGS.get(setting::THREADS)) {
        (Some(byte), Some(threads)) if *threads > 0 => {
            match SOCKETS.select_reuseport(&ctx, u32::from(byte) % *threads) {
                Ok(()) => steered::BY_ID,
                Err(_) => steered::REFUSED,
            }
        }
        _ => steered::BY_HASH,
    };
    if let Some(count) = STEERED.get_ptr_mut(how) {
        // SAFETY: the kernel says that the map has it, for as long as this program runs.
        add(unsafe { &mut *count }, 1);
    }
    SK_PASS
}

/// The byte that names the thread, where the packet has one that this node wrote.
#[inline(always)]
fn id_byte(ctx: &SkReuseportContext) -> Option<u8> {
    let (packet, end) = (ctx.data() + UDP_HEADER_BYTES, ctx.data_end());
    if packet + SHORT_BYTES > end {
        return None;
    }
    // SAFETY: the packet holds that many bytes, as just checked, also by the verifier.
    let first = unsafe { read_volatile(packet as *const u8) };
    if first & LONG_HEADER == 0 {
        let byte: u64;
        // SAFETY: reads the second byte of those. In assembly, as the compiler would make one load of this and the
        // last, at a place that it computes, which the verifier refuses to those who have no CAP_PERFMON.
        unsafe {
            asm!("{byte} = *(u8 *)({packet} + 1)", byte = out(reg) byte, packet = in(reg) packet)
        };
        return Some(byte as u8);
    }
    if packet + LONG_BYTES > end || matches!(first & TYPE, INITIAL | ZERO_RTT) {
        return None;
    }
    // SAFETY: just checked.
    let id_bytes = unsafe { read_volatile((packet + LONG_BYTES - 2) as *const u8) };
    let byte: u64;
    // SAFETY: the same: the last byte that was checked.
    unsafe {
        asm!("{byte} = *(u8 *)({packet} + 6)", byte = out(reg) byte, packet = in(reg) packet)
    };
    (id_bytes > 0).then_some(byte as u8)
}

//! Adds up what each peer sends and gets, for the sockets of one cgroup.

use core::ptr::read_volatile;

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, BPF_NOEXIST};
use aya_ebpf::helpers::{bpf_get_socket_cookie, bpf_ktime_get_coarse_ns};
use aya_ebpf::macros::{cgroup_skb, map};
use aya_ebpf::maps::{Array, HashMap, LruPerCpuHashMap};
use aya_ebpf::programs::SkBuffContext;
use pantala_ebpf_common::{
    PEERS_MAX, PeerKey, SOCKETS_MAX, Tally, Traffic, V4_HEADERS_BYTES, V4_MAPPED, V6_HEADERS_BYTES,
    setting,
};

use crate::atomic::add;

/// Each processor counts for itself, so that no line moves between caches.
#[map]
static TRAFFIC: LruPerCpuHashMap<PeerKey, Traffic> =
    LruPerCpuHashMap::with_max_entries(PEERS_MAX, 0);

/// What a new peer's count begins with: the compiler would zero one on the stack by a loop, which the verifier
/// refuses to those who have no CAP_PERFMON.
#[map]
static NOTHING: Array<Traffic> = Array::with_max_entries(1, 0);

/// The sockets that are counted, by the kernel's number for each. A port alone would not do: the nodes of a test on
/// one machine have the same in different network namespaces, and may share a cgroup.
#[map]
static OWN_SOCKETS: HashMap<u64, u8> = HashMap::with_max_entries(SOCKETS_MAX, 0);

/// What user space says, by [`setting`].
#[map]
pub(crate) static SETTINGS: Array<u32> = Array::with_max_entries(setting::COUNT, 0);

const UDP: u32 = 17;
/// Version 4 and a header of 20 bytes. Peers send no options, and what has them is left out.
const V4_WITHOUT_OPTIONS: u32 = 0x45;
const PORTS_BYTES: usize = 4;
const V4_HEADER_BYTES: usize = 20;
const V6_HEADER_BYTES: usize = 40;
/// The packet goes on.
const PASS: i32 = 1;

#[derive(Clone, Copy)]
enum Way {
    Received,
    Sent,
}

/// For what the sockets of the cgroup receive.
#[cgroup_skb(ingress)]
pub fn count_received(ctx: SkBuffContext) -> i32 {
    count(&ctx, Way::Received);
    PASS
}

/// For what they send.
#[cgroup_skb(egress)]
pub fn count_sent(ctx: SkBuffContext) -> i32 {
    count(&ctx, Way::Sent);
    PASS
}

#[inline(always)]
fn count(ctx: &SkBuffContext, way: Way) {
    let Some(own_port) = SETTINGS.get(setting::OWN_PORT) else {
        return;
    };
    let skb: *const __sk_buff = ctx.as_ptr().cast();
    let Some((key, headers_bytes)) = peer(skb, way, *own_port as u16) else {
        return;
    };
    // SAFETY: the context is valid; it reads the number of the socket that the packet is for, or of.
    let socket = unsafe { bpf_get_socket_cookie(ctx.as_ptr()) };
    if OWN_SOCKETS.get_ptr(socket).is_none() {
        return;
    }
    // SAFETY: the kernel gives a valid context, and checks each access to it at load.
    let (len, segments, segment_bytes) = unsafe { ((*skb).len, (*skb).gso_segs, (*skb).gso_size) };
    let payload_bytes = len.saturating_sub(headers_bytes);
    let datagrams = match (segments, segment_bytes) {
        // What a virtual machine's host merged comes without the number.
        (0, size) if size > 0 => payload_bytes.div_ceil(size),
        (0, _) => 1,
        (segments, _) => segments,
    };
    let traffic = match TRAFFIC.get_ptr_mut(key) {
        Some(traffic) => traffic,
        None => {
            // Another processor may be as fast; either way it is there afterwards, or the map is full of peers
            // that are all busy, and this one is not counted.
            let Some(nothing) = NOTHING.get(0) else {
                return;
            };
            let _ = TRAFFIC.insert(key, nothing, BPF_NOEXIST.into());
            match TRAFFIC.get_ptr_mut(key) {
                Some(traffic) => traffic,
                None => return,
            }
        }
    };
    // SAFETY: the map's value of this processor; what may be written twice at a time is written atomically.
    let tally: &mut Tally = unsafe {
        match way {
            Way::Received => &mut (*traffic).received,
            Way::Sent => &mut (*traffic).sent,
        }
    };
    add(&mut tally.payload_bytes, payload_bytes.into());
    add(&mut tally.batches, 1);
    add(&mut tally.datagrams, datagrams.into());
    // SAFETY: takes nothing and touches no memory.
    tally.last_seen_ns = unsafe { bpf_ktime_get_coarse_ns() };
}

/// Reads a word of a packet.
///
/// Volatile, so that the compiler keeps one load at one fixed place for each call: where it makes one of two, at a
/// place that it computes, the verifier refuses the program to those who have no CAP_PERFMON.
///
/// # Safety
/// The packet holds the word: the caller has checked, and so does the verifier. A packet's headers are aligned to 4.
#[inline(always)]
unsafe fn word(at: usize) -> u32 {
    // SAFETY: as the caller says.
    unsafe { read_volatile(at as *const u32) }
}

/// Who is at the other end of a datagram of `own_port`, and how long its headers are.
#[inline(always)]
fn peer(skb: *const __sk_buff, way: Way, own_port: u16) -> Option<(PeerKey, u32)> {
    // SAFETY: as above.
    let (data, end) = unsafe { ((*skb).data as usize, (*skb).data_end as usize) };
    // The whole header at once: the verifier does not follow a check of its first byte alone.
    if data + V4_HEADER_BYTES + PORTS_BYTES > end {
        return None;
    }
    // SAFETY: just checked.
    let first = u32::from_be(unsafe { word(data) });
    if first >> 24 == V4_WITHOUT_OPTIONS {
        // SAFETY: the same.
        let (fragment, protocol) = unsafe { (word(data + 4), word(data + 8)) };
        let is_later_fragment = u32::from_be(fragment) & 0x1fff != 0;
        if is_later_fragment || u32::from_be(protocol) >> 16 & 0xff != UDP {
            return None;
        }
        // SAFETY: the same.
        let (other, ports) = unsafe {
            let other = match way {
                Way::Received => word(data + 12),
                Way::Sent => word(data + 16),
            };
            (other, word(data + V4_HEADER_BYTES))
        };
        let port = other_port(ports, way, own_port)?;
        let key = PeerKey {
            address: [0, 0, V4_MAPPED, other],
            port,
        };
        return Some((key, V4_HEADERS_BYTES as u32));
    }
    if first >> 28 != 6 || data + V6_HEADER_BYTES + PORTS_BYTES > end {
        return None;
    }
    // SAFETY: just checked.
    unsafe {
        if u32::from_be(word(data + 4)) >> 8 & 0xff != UDP {
            return None;
        }
        let address = match way {
            Way::Received => [
                word(data + 8),
                word(data + 12),
                word(data + 16),
                word(data + 20),
            ],
            Way::Sent => [
                word(data + 24),
                word(data + 28),
                word(data + 32),
                word(data + 36),
            ],
        };
        let port = other_port(word(data + V6_HEADER_BYTES), way, own_port)?;
        Some((PeerKey { address, port }, V6_HEADERS_BYTES as u32))
    }
}

/// The peer's port, where the other one is `own_port`.
#[inline(always)]
fn other_port(ports: u32, way: Way, own_port: u16) -> Option<u32> {
    let ports = u32::from_be(ports);
    let (source, destination) = (ports >> 16, ports & 0xffff);
    let (own, other) = match way {
        Way::Received => (destination, source),
        Way::Sent => (source, destination),
    };
    (own == u32::from(own_port) && own != 0).then_some(other)
}

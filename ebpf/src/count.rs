//! Adds up what each peer sends and gets, for the sockets of one cgroup.

use aya_ebpf::EbpfContext as _;
use aya_ebpf::bindings::{__sk_buff, BPF_NOEXIST};
use aya_ebpf::helpers::bpf_ktime_get_coarse_ns;
use aya_ebpf::macros::{cgroup_skb, map};
use aya_ebpf::maps::{Array, LruPerCpuHashMap};
use aya_ebpf::programs::SkBuffContext;
use pantala_ebpf_common::{PEERS_MAX, PeerKey, Tally, Traffic, setting};

use crate::atomic::add;

/// Each processor counts for itself, so that no line moves between caches.
#[map]
static TRAFFIC: LruPerCpuHashMap<PeerKey, Traffic> =
    LruPerCpuHashMap::with_max_entries(PEERS_MAX, 0);

/// What user space says, by [`setting`].
#[map]
pub(crate) static SETTINGS: Array<u32> = Array::with_max_entries(setting::COUNT, 0);

const UDP: u8 = 17;
const UDP_HEADER_BYTES: u32 = 8;
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
            let _ = TRAFFIC.insert(key, Traffic::default(), BPF_NOEXIST.into());
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

/// Who is at the other end of a datagram of `own_port`, and how long its headers are.
#[inline(always)]
fn peer(skb: *const __sk_buff, way: Way, own_port: u16) -> Option<(PeerKey, u32)> {
    // SAFETY: as above.
    let (data, end) = unsafe { ((*skb).data as usize, (*skb).data_end as usize) };
    // The whole header at once: the verifier does not follow a check of its first byte alone.
    if data + V4_HEADER_BYTES > end {
        return None;
    }
    // SAFETY: the packet holds that many bytes, as just checked; this and what follows is checked by the
    // verifier as well.
    let header = unsafe { &*(data as *const [u8; V4_HEADER_BYTES]) };
    let mut address = [0; 16];
    let udp_at = match header[0] >> 4 {
        4 if header[9] == UDP => {
            let is_later_fragment = header[6] & 0x1f != 0 || header[7] != 0;
            if is_later_fragment {
                return None;
            }
            let from = match way {
                Way::Received => 12,
                Way::Sent => 16,
            };
            address[10] = 0xff;
            address[11] = 0xff;
            address[12..].copy_from_slice(&header[from..from + 4]);
            usize::from(header[0] & 0x0f) * 4
        }
        6 if header[6] == UDP => {
            if data + V6_HEADER_BYTES > end {
                return None;
            }
            // SAFETY: just checked.
            let header = unsafe { &*(data as *const [u8; V6_HEADER_BYTES]) };
            let from = match way {
                Way::Received => 8,
                Way::Sent => 24,
            };
            address.copy_from_slice(&header[from..from + 16]);
            V6_HEADER_BYTES
        }
        _ => return None,
    };
    let udp = data + udp_at;
    if udp + 4 > end {
        return None;
    }
    // SAFETY: just checked.
    let ports = unsafe { &*(udp as *const [u8; 4]) };
    let source = u16::from_be_bytes([ports[0], ports[1]]);
    let destination = u16::from_be_bytes([ports[2], ports[3]]);
    let (own, port) = match way {
        Way::Received => (destination, source),
        Way::Sent => (source, destination),
    };
    let key = PeerKey {
        address,
        port,
        padding: 0,
    };
    (own == own_port && own != 0).then_some((key, udp_at as u32 + UDP_HEADER_BYTES))
}

//! Several real nodes, each a process, around a registry that counts what it sends and fails on
//! demand.
//!
//! Faults covered here: simultaneous pulls, a late joiner, ranges, a parent killed in mid-transfer,
//! control killed and restarted, a node killed with SIGKILL in mid-write, a registry that cuts or
//! corrupts, callers with different rights. What only the real programs show (containerd, podman,
//! nydusd, docker-registry) is in `cargo xtask test`.

mod client;
mod faults;
mod healthy;
mod hits;
mod node;
mod openings;
mod registry;

/// A blob's worth of bytes that no compressor or chance can confuse, from a seed.
fn blob(seed: u64, len: usize) -> (bytes::Bytes, String) {
    use sha2::Digest;
    let mut state = seed | 1;
    let mut data = Vec::with_capacity(len + 8);
    while data.len() < len {
        // xorshift64*
        state ^= state >> 12;
        state ^= state << 25;
        state ^= state >> 27;
        data.extend_from_slice(&state.wrapping_mul(0x2545_F491_4F6C_DD1D).to_le_bytes());
    }
    data.truncate(len);
    let digest = format!("sha256:{:x}", sha2::Sha256::digest(&data));
    (data.into(), digest)
}

//! What one receive brought, whoever sent it: cut where the connection changes.

#![no_main]

use libfuzzer_sys::fuzz_target;

// By path, not by crate: only what is fuzzed is built and instrumented.
#[allow(unreachable_pub, reason = "a module of another crate")]
#[path = "../../dataplane/quic/src/driver/ring/batch.rs"]
mod batch;

use batch::{destination_id, next_connection};

fuzz_target!(|data: &[u8]| {
    let Some((&[low, high], payload)) = data.split_first_chunk() else {
        return;
    };
    let segment_bytes = usize::from(u16::from_le_bytes([low, high]));
    let id_of_first = |run: &[u8]| {
        let first = run.chunks(segment_bytes.max(1)).next();
        first.map(|datagram| {
            let (is_short, id) = destination_id(datagram);
            (is_short, id.map(<[u8]>::to_vec))
        })
    };
    let mut rest = payload;
    let mut seen = 0;
    while let Some(at) = next_connection(rest, segment_bytes) {
        assert!(at > 0 && at < rest.len() && at.is_multiple_of(segment_bytes.max(1)));
        let (one, others) = rest.split_at(at);
        for datagram in one.chunks(segment_bytes.max(1)) {
            assert_eq!(id_of_first(datagram), id_of_first(one));
        }
        assert_ne!(id_of_first(others), id_of_first(one));
        seen += one.len();
        rest = others;
    }
    assert_eq!(seen + rest.len(), payload.len());
});

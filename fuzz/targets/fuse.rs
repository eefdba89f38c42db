//! What the kernel asks of the FUSE file system beneath a lazy mount.

#![no_main]

use libfuzzer_sys::fuzz_target;

// By path, not by crate: only what is fuzzed is built and instrumented.
#[allow(dead_code, reason = "a module of another crate")]
#[path = "../../dataplane/lazy/src/backend/fuse/protocol.rs"]
mod protocol;

use protocol::{READ_BYTES_MAX, REPLY_HEAD_BYTES, Request, Step, decide};

const SIZES: [u64; 4] = [0, 1, 10_000, u64::MAX];

fuzz_target!(|data: &[u8]| {
    let Ok(request) = Request::parse(data) else {
        return;
    };
    match decide(&request, &SIZES, 64) {
        Step::Nothing => {}
        Step::Reply(bytes) => {
            let len = bytes.first_chunk().map(|len| u32::from_ne_bytes(*len));
            assert_eq!(len, Some(bytes.len() as u32));
            assert!(bytes.len() >= REPLY_HEAD_BYTES);
        }
        Step::Read {
            device,
            offset,
            size_bytes,
        } => {
            assert!(size_bytes > 0 && size_bytes <= READ_BYTES_MAX);
            let end = offset.checked_add(u64::from(size_bytes));
            assert!(end.is_some_and(|end| end <= SIZES[device]));
        }
    }
});

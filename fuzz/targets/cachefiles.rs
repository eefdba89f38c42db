//! What the kernel says on `/dev/cachefiles`.

#![no_main]

use libfuzzer_sys::fuzz_target;

// By path, not by crate: only what is fuzzed is built and instrumented.
#[allow(dead_code, reason = "a module of another crate")]
#[path = "../../dataplane/lazy/src/backend/cachefiles/protocol.rs"]
mod protocol;

use protocol::{Message, ProtocolError, Request, copen};

fuzz_target!(|data: &[u8]| {
    match Message::parse(data) {
        Ok(message) => {
            if let Request::Open { key: Some(key), .. } = &message.what {
                assert!(key.len() <= data.len(), "a name longer than the message");
            }
            if let Request::Read { size_bytes, .. } = message.what {
                let answer = copen(message.id, Ok(size_bytes));
                assert!(answer.len() < 64 && !answer.contains('\n'));
            }
        }
        // Nothing may be passed over that brings a descriptor, which would stay open: an OPEN with its head is read.
        Err(ProtocolError::Short { opcode: 0, .. }) => assert!(data.len() < 32),
        Err(_) => {}
    }
});

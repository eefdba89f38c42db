//! Messages of the kernel's fanotify queue: whatever they say, the parse ends and stays inside.

#![no_main]

use libfuzzer_sys::fuzz_target;

// By path, not by crate: only what is fuzzed is built and instrumented.
#[allow(dead_code, unreachable_pub, reason = "a module of another crate")]
#[path = "../../dataplane/supervisor/src/event.rs"]
mod event;

fuzz_target!(|data: &[u8]| {
    let events: Vec<_> = event::parse(data).collect();
    assert!(events.len() <= data.len() / event::METADATA_BYTES + 1);
    let (last, before) = match events.split_last() {
        Some((last, before)) => (Some(last), before),
        None => (None, &[][..]),
    };
    // After a malformed one there is nothing more, and what came before stays.
    assert!(before.iter().all(Result::is_ok));
    for event in events.iter().flatten() {
        assert!(event.descriptor >= 0);
    }
    if last.is_some_and(Result::is_ok) {
        let again: Vec<_> = event::parse(data).collect();
        assert_eq!(again, events);
    }
});

//! `Range` headers: what is served lies in the blob, and says so in a form that is a range again.

#![no_main]

use libfuzzer_sys::fuzz_target;

// By path, not by crate: only what is fuzzed is built and instrumented.
#[allow(dead_code, unreachable_pub, reason = "a module of another crate")]
#[path = "../../dataplane/mirror/src/range.rs"]
mod range;

use range::{RangeOutcome, content_range, parse_range, unsatisfied_range};

fuzz_target!(|data: (u64, &str)| {
    let (size_bytes, header) = data;
    match parse_range(header, size_bytes) {
        RangeOutcome::Whole => {}
        RangeOutcome::Unsatisfiable => {
            assert!(unsatisfied_range(size_bytes).ends_with(&format!("/{size_bytes}")));
        }
        RangeOutcome::Part(part) => {
            assert!(part.end() <= size_bytes && part.start() < part.end());
            let said = content_range(part, size_bytes);
            let last = part.end() - 1;
            assert_eq!(said, format!("bytes {}-{last}/{size_bytes}", part.start()));
            // The same bytes asked for plainly are the same bytes.
            let plain = format!("bytes={}-{last}", part.start());
            assert_eq!(parse_range(&plain, size_bytes), RangeOutcome::Part(part));
        }
    }
});

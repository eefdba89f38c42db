//! What a registry asks for in `WWW-Authenticate`.

#![no_main]

use http::header::{HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use libfuzzer_sys::fuzz_target;

// By path, not by crate: only what is fuzzed is built and instrumented.
#[allow(dead_code, unreachable_pub, reason = "a module of another crate")]
#[path = "../../dataplane/source/src/challenge.rs"]
mod challenge;

use challenge::{Challenge, challenges, parse};

/// The module's own bound of challenges.
const CHALLENGES_MAX: usize = 16;

fuzz_target!(|text: &str| {
    let found = parse(text);
    assert!(found.len() <= CHALLENGES_MAX);
    for challenge in &found {
        if let Challenge::Bearer {
            realm,
            service,
            scope,
        } = challenge
        {
            let longest = [Some(realm), service.as_ref(), scope.as_ref()]
                .into_iter()
                .flatten()
                .map(String::len)
                .max();
            assert!(longest <= Some(text.len()), "longer than what was read");
        }
    }
    // The same, as it comes: several lines, whatever bytes a header may have.
    let mut headers = HeaderMap::new();
    for line in text.split('\n').take(64) {
        if let Ok(value) = HeaderValue::from_str(line) {
            headers.append(WWW_AUTHENTICATE, value);
        }
    }
    assert!(challenges(&headers).len() <= CHALLENGES_MAX);
});

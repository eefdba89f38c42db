//! Request paths: what is taken for a blob or manifest is one, and only that one.

#![no_main]

use libfuzzer_sys::fuzz_target;

// By path, not by crate: only what is fuzzed is built and instrumented.
#[allow(dead_code, unreachable_pub, reason = "a module of another crate")]
#[path = "../../dataplane/mirror/src/route.rs"]
mod route;

use route::{PATH_LEN_MAX, Route, parse_path, parse_registry_path};

fuzz_target!(|path: &str| {
    let (Ok(route), proxied) = (parse_path(path), parse_registry_path(path)) else {
        return;
    };
    let canonical = match &route {
        Route::Blob { repository, digest } => format!("/v2/{repository}/blobs/{digest}"),
        Route::Manifest {
            repository,
            reference,
        } => format!("/v2/{repository}/manifests/{reference}"),
        Route::Base => "/v2/".to_owned(),
        Route::Registry => {
            assert!(path.starts_with("/v2/") && path.len() <= PATH_LEN_MAX);
            assert!(path.split('/').all(|segment| segment != ".."));
            return;
        }
        Route::Healthy | Route::Ping | Route::Metrics => return,
    };
    assert_eq!(proxied.as_ref(), Ok(&route));
    assert_eq!(parse_path(&canonical).as_ref(), Ok(&route), "{canonical}");
});

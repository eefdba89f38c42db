//! What the registry said about callers' rights, remembered for a short time.
//!
//! A pure cache: time comes in as a duration since an arbitrary epoch. A verdict is held per
//! credential, upstream, repository *and* content (see `docs/decisions/0005`): a caller who may
//! read one repository must not be able to name another's blob through it. Credentials are not
//! held at all, only a keyed hash whose key dies with the process.

use std::time::Duration;

use http::HeaderValue;
use lru::LruCache;
use pantala_wire::BlobDigest;
use pantala_wire::name::RepositoryName;
use ring::hmac;

use crate::upstream::UpstreamUrl;

/// How long a verdict that could not be renewed is used before the registry is asked again:
/// long enough that a registry that hangs does not slow every request down, short against its
/// return.
const RECHECK_AFTER: Duration = Duration::from_secs(5);

/// What is asked for; a right to a manifest says nothing about a blob of the same digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject {
    /// A blob.
    Blob,
    /// A manifest.
    Manifest,
}

/// Who asks for what: a keyed hash of it.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct VerdictKey([u8; 32]);

/// Makes [`VerdictKey`]s under one secret.
pub struct KeyMaker {
    key: hmac::Key,
}

impl KeyMaker {
    /// A maker with this secret: random, one per process, never stored.
    pub fn new(secret: &[u8; 32]) -> Self {
        Self {
            key: hmac::Key::new(hmac::HMAC_SHA256, secret),
        }
    }

    /// The key of a question.
    pub fn key(
        &self,
        authorization: Option<&HeaderValue>,
        upstream: &UpstreamUrl,
        repository: &RepositoryName,
        subject: Subject,
        digest: &BlobDigest,
    ) -> VerdictKey {
        let upstream = upstream.to_string();
        let (kind, credential) = match (subject, authorization) {
            (Subject::Blob, None) => (0_u8, &[][..]),
            (Subject::Blob, Some(value)) => (1, value.as_bytes()),
            (Subject::Manifest, None) => (2, &[][..]),
            (Subject::Manifest, Some(value)) => (3, value.as_bytes()),
        };
        let mut context = hmac::Context::with_key(&self.key);
        context.update(&[kind]);
        context.update(digest.as_bytes());
        // Lengths keep the fields apart: no two questions have the same bytes.
        for field in [
            upstream.as_bytes(),
            repository.as_str().as_bytes(),
            credential,
        ] {
            context.update(&(field.len() as u64).to_be_bytes());
            context.update(field);
        }
        let mut out = [0; 32];
        out.copy_from_slice(context.sign().as_ref());
        VerdictKey(out)
    }
}

/// What is known about a caller's right.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Known {
    /// The registry said yes a short time ago.
    Fresh {
        /// The content's size, 0 for manifests.
        size_bytes: u64,
    },
    /// The registry said yes once; ask again, and fall back to this only if it cannot be asked.
    Stale {
        /// The content's size, 0 for manifests.
        size_bytes: u64,
    },
    /// Nothing: ask.
    Unknown,
}

struct Entry {
    size_bytes: u64,
    asked_at: Duration,
    fresh_until: Duration,
}

/// Positive verdicts, the least recently used dropped first. Refusals are never kept: a right
/// that is granted counts at once.
pub struct VerdictCache {
    entries: LruCache<VerdictKey, Entry>,
    entries_max: usize,
    ttl: Duration,
    stale: Duration,
}

impl VerdictCache {
    /// A cache of at most `entries_max` verdicts, each good for `ttl`, and as a last resort for
    /// `stale`, from when the registry gave it.
    pub fn new(entries_max: usize, ttl: Duration, stale: Duration) -> Self {
        Self {
            entries: LruCache::unbounded(),
            entries_max,
            ttl,
            stale,
        }
    }

    /// What is known at `now`.
    pub fn look(&mut self, key: &VerdictKey, now: Duration) -> Known {
        let Some(entry) = self.entries.get(key) else {
            return Known::Unknown;
        };
        let size_bytes = entry.size_bytes;
        let age = now.saturating_sub(entry.asked_at);
        if now < entry.fresh_until {
            Known::Fresh { size_bytes }
        } else if age < self.stale {
            Known::Stale { size_bytes }
        } else {
            self.entries.pop(key);
            Known::Unknown
        }
    }

    /// The registry said yes.
    pub fn allow(&mut self, key: VerdictKey, size_bytes: u64, now: Duration) {
        let entry = Entry {
            size_bytes,
            asked_at: now,
            fresh_until: now.saturating_add(self.ttl),
        };
        self.entries.put(key, entry);
        while self.entries.len() > self.entries_max {
            self.entries.pop_lru();
        }
    }

    /// The registry said no: what it said before is void.
    pub fn refuse(&mut self, key: &VerdictKey) {
        self.entries.pop(key);
    }

    /// The registry could not be asked: use what it said before for a moment without asking
    /// again, but never beyond the stale limit.
    pub fn postpone(&mut self, key: &VerdictKey, now: Duration) {
        if let Some(entry) = self.entries.peek_mut(key) {
            let last = entry.asked_at.saturating_add(self.stale);
            entry.fresh_until = now.saturating_add(RECHECK_AFTER).min(last);
        }
    }

    /// How many verdicts are held.
    pub fn len(&self) -> usize {
        self.entries.len()
    }

    /// Whether none is held.
    pub fn is_empty(&self) -> bool {
        self.entries.is_empty()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TTL: Duration = Duration::from_secs(60);
    const STALE: Duration = Duration::from_secs(3600);

    fn at(seconds: u64) -> Duration {
        Duration::from_secs(1000 + seconds)
    }

    fn key(n: u8) -> VerdictKey {
        VerdictKey([n; 32])
    }

    #[test]
    fn a_verdict_is_fresh_then_stale_then_gone() {
        let mut cache = VerdictCache::new(10, TTL, STALE);
        assert_eq!(cache.look(&key(1), at(0)), Known::Unknown);
        cache.allow(key(1), 7, at(0));
        assert_eq!(cache.look(&key(1), at(59)), Known::Fresh { size_bytes: 7 });
        assert_eq!(cache.look(&key(1), at(60)), Known::Stale { size_bytes: 7 });
        assert_eq!(
            cache.look(&key(1), at(3599)),
            Known::Stale { size_bytes: 7 }
        );
        assert_eq!(cache.look(&key(1), at(3600)), Known::Unknown);
        assert_eq!(cache.look(&key(2), at(0)), Known::Unknown);
    }

    #[test]
    fn a_refusal_voids_what_was_allowed() {
        let mut cache = VerdictCache::new(10, TTL, STALE);
        cache.allow(key(1), 7, at(0));
        cache.refuse(&key(1));
        assert_eq!(cache.look(&key(1), at(0)), Known::Unknown);
    }

    #[test]
    fn a_registry_that_is_down_never_extends_a_verdict_beyond_the_stale_limit() {
        let mut cache = VerdictCache::new(10, TTL, STALE);
        cache.allow(key(1), 7, at(0));
        cache.postpone(&key(1), at(100));
        assert_eq!(cache.look(&key(1), at(104)), Known::Fresh { size_bytes: 7 });
        assert_eq!(cache.look(&key(1), at(105)), Known::Stale { size_bytes: 7 });
        cache.postpone(&key(1), at(3599));
        assert_eq!(cache.look(&key(1), at(3600)), Known::Unknown);
    }

    #[test]
    fn the_least_recently_used_goes_first_and_the_bound_holds() {
        let mut cache = VerdictCache::new(2, TTL, STALE);
        for n in 1..=2 {
            cache.allow(key(n), 0, at(0));
        }
        cache.look(&key(1), at(0));
        cache.allow(key(3), 0, at(0));
        assert_eq!(cache.len(), 2);
        assert_eq!(cache.look(&key(2), at(0)), Known::Unknown);
        assert_ne!(cache.look(&key(1), at(0)), Known::Unknown);
    }

    #[test]
    fn no_two_questions_share_a_key() {
        let maker = KeyMaker::new(&[7; 32]);
        let token = HeaderValue::from_static("Bearer x");
        let empty = HeaderValue::from_static("");
        let upstreams: [UpstreamUrl; 2] =
            ["https://a.test", "https://b.test"].map(|u| u.parse().unwrap());
        let repositories: [RepositoryName; 2] = ["x", "y"].map(|r| r.parse().unwrap());
        let mut seen = std::collections::HashSet::new();
        for credential in [None, Some(&token), Some(&empty)] {
            for upstream in &upstreams {
                for repository in &repositories {
                    for subject in [Subject::Blob, Subject::Manifest] {
                        for digest in [BlobDigest::new([1; 32]), BlobDigest::new([2; 32])] {
                            let key = maker.key(credential, upstream, repository, subject, &digest);
                            assert!(seen.insert(key));
                        }
                    }
                }
            }
        }
        let other = KeyMaker::new(&[8; 32]).key(
            None,
            &upstreams[0],
            &repositories[0],
            Subject::Blob,
            &BlobDigest::new([1; 32]),
        );
        assert!(seen.insert(other), "the hash is keyed");
    }
}

//! Manifests in memory, by digest: only ones whose bytes have that sha256.

use bytes::Bytes;
use http::HeaderValue;
use lru::LruCache;
use pantala_wire::BlobDigest;
use ring::digest::{Context, SHA256};

/// Largest manifest that is kept: what registries themselves accept.
pub const MANIFEST_CACHED_BYTES_MAX: usize = 4 << 20;

/// What an entry takes beside its bytes: keys, headers, list links.
const ENTRY_OVERHEAD_BYTES: usize = 512;

/// A manifest whose bytes were verified.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CachedManifest {
    /// Its media type, as the registry stated it.
    pub media_type: HeaderValue,
    /// Its bytes.
    pub bytes: Bytes,
}

/// A manifest's bytes do not have the digest that they came under.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the manifest came under {expected}, but its bytes have {actual}")]
pub struct WrongManifest {
    /// The digest asked for.
    pub expected: BlobDigest,
    /// The digest of the bytes.
    pub actual: BlobDigest,
}

/// The sha256 of some bytes.
pub fn digest_of(bytes: &[u8]) -> BlobDigest {
    let mut context = Context::new(&SHA256);
    context.update(bytes);
    finish(context)
}

/// The digest of what a context has seen.
pub(crate) fn finish(context: Context) -> BlobDigest {
    let mut out = [0; 32];
    out.copy_from_slice(context.finish().as_ref());
    BlobDigest::new(out)
}

/// The cache; the least recently used goes first when the bytes no longer fit.
pub struct ManifestCache {
    entries: LruCache<BlobDigest, CachedManifest>,
    used_bytes: usize,
    limit_bytes: usize,
}

impl ManifestCache {
    /// A cache of at most `limit_bytes`.
    pub fn new(limit_bytes: usize) -> Self {
        Self {
            entries: LruCache::unbounded(),
            used_bytes: 0,
            limit_bytes,
        }
    }

    /// The manifest of this digest, if it is here. The caller's right to it is another question.
    pub fn get(&mut self, digest: &BlobDigest) -> Option<CachedManifest> {
        self.entries.get(digest).cloned()
    }

    /// Keeps a manifest under `expected`, if its bytes have that digest and it is not too large.
    pub fn insert(
        &mut self,
        expected: BlobDigest,
        manifest: CachedManifest,
    ) -> Result<(), WrongManifest> {
        let actual = digest_of(&manifest.bytes);
        if actual != expected {
            return Err(WrongManifest { expected, actual });
        }
        let cost = manifest.bytes.len() + ENTRY_OVERHEAD_BYTES;
        if manifest.bytes.len() > MANIFEST_CACHED_BYTES_MAX || cost > self.limit_bytes {
            return Ok(());
        }
        self.used_bytes += cost;
        if let Some(old) = self.entries.put(expected, manifest) {
            self.used_bytes -= old.bytes.len() + ENTRY_OVERHEAD_BYTES;
        }
        while self.used_bytes > self.limit_bytes {
            let Some((_, old)) = self.entries.pop_lru() else {
                break;
            };
            self.used_bytes -= old.bytes.len() + ENTRY_OVERHEAD_BYTES;
        }
        Ok(())
    }

    /// Bytes held, overhead included.
    pub const fn used_bytes(&self) -> usize {
        self.used_bytes
    }
}

/// Whether a client that sent these `Accept` values takes this media type. No `Accept` at all
/// takes anything (RFC 9110, section 12.5.1).
pub fn accepts<'a>(accept: impl IntoIterator<Item = &'a str>, media_type: &str) -> bool {
    let essence = |text: &'a str| text.split(';').next().unwrap_or_default().trim();
    let wanted = media_type.split(';').next().unwrap_or_default().trim();
    let (main, _) = wanted.split_once('/').unwrap_or((wanted, ""));
    let mut any_line = false;
    for line in accept {
        for element in line.split(',') {
            any_line = true;
            // "not acceptable": a weight of zero.
            let refused = element.split(';').skip(1).any(|parameter| {
                parameter
                    .trim()
                    .strip_prefix("q=")
                    .is_some_and(|q| !q.is_empty() && q.bytes().all(|b| b == b'0' || b == b'.'))
            });
            let range = essence(element);
            let matches = range == "*/*"
                || range.eq_ignore_ascii_case(wanted)
                || range
                    .strip_suffix("/*")
                    .is_some_and(|r| r.eq_ignore_ascii_case(main));
            if matches && !refused {
                return true;
            }
        }
    }
    !any_line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn manifest(fill: u8, len: usize) -> (BlobDigest, CachedManifest) {
        let bytes = Bytes::from(vec![fill; len]);
        let media_type = HeaderValue::from_static("application/vnd.oci.image.manifest.v1+json");
        (digest_of(&bytes), CachedManifest { media_type, bytes })
    }

    #[test]
    fn bytes_that_are_not_what_they_are_called_are_not_kept() {
        let mut cache = ManifestCache::new(1 << 20);
        let (digest, good) = manifest(1, 100);
        let (_, mut cut) = manifest(1, 100);
        cut.bytes.truncate(99);
        assert!(cache.insert(digest, cut).is_err());
        assert_eq!(cache.get(&digest), None);
        cache.insert(digest, good.clone()).unwrap();
        assert_eq!(cache.get(&digest), Some(good));
    }

    #[test]
    fn the_bound_in_bytes_holds_and_the_oldest_goes_first() {
        let mut cache = ManifestCache::new(10_000);
        let all: Vec<_> = (0..20).map(|n| manifest(n, 1000)).collect();
        for (digest, manifest) in &all {
            cache.insert(*digest, manifest.clone()).unwrap();
            assert!(cache.used_bytes() <= 10_000);
        }
        assert!(cache.get(&all[0].0).is_none() && cache.get(&all[19].0).is_some());
        let used = cache.used_bytes();
        cache.insert(all[19].0, all[19].1.clone()).unwrap();
        assert_eq!(
            cache.used_bytes(),
            used,
            "the same manifest twice counts once"
        );
        let (digest, huge) = manifest(9, 20_000);
        cache.insert(digest, huge).unwrap();
        assert!(cache.get(&digest).is_none());
    }

    #[test]
    fn accept_lines_are_read_as_the_standard_says() {
        let oci = "application/vnd.oci.image.manifest.v1+json";
        let index = "application/vnd.oci.image.index.v1+json";
        assert!(accepts([], oci));
        assert!(accepts(["*/*"], oci));
        assert!(accepts([index, oci], oci));
        assert!(accepts(["application/*"], oci));
        assert!(accepts(
            ["text/html, APPLICATION/vnd.oci.image.manifest.v1+json;q=0.5"],
            oci
        ));
        assert!(!accepts([index], oci));
        assert!(!accepts(["text/*"], oci));
        assert!(!accepts([&format!("{oci};q=0.0")[..]], oci));
        assert!(accepts(["*/*"], "application/json; charset=utf-8"));
    }
}

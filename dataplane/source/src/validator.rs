//! How two answers for one URL are told to be of the same version (RFC 9110, section 8.8).

use http::header::{ETAG, LAST_MODIFIED};
use http::{HeaderMap, HeaderValue};

/// Names a version of what is at a URL.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Validator {
    /// A strong entity tag.
    ETag(HeaderValue),
    /// The time of the last change.
    LastModified(HeaderValue),
}

impl Validator {
    /// The best validator of an answer. Weak tags are none: they do not promise equal bytes.
    pub(crate) fn of(headers: &HeaderMap) -> Option<Self> {
        let is_strong = |tag: &&HeaderValue| tag.as_bytes().starts_with(b"\"");
        let tag = headers.get(ETAG).filter(is_strong);
        tag.cloned()
            .map(Self::ETag)
            .or_else(|| headers.get(LAST_MODIFIED).cloned().map(Self::LastModified))
    }

    /// What `If-Range` takes.
    pub(crate) fn value(&self) -> &HeaderValue {
        match self {
            Self::ETag(value) | Self::LastModified(value) => value,
        }
    }

    /// Whether an answer may be of this version: one that says nothing may.
    pub(crate) fn allows(&self, headers: &HeaderMap) -> bool {
        let named = match self {
            Self::ETag(_) => headers.get(ETAG),
            Self::LastModified(_) => headers.get(LAST_MODIFIED),
        };
        named.is_none_or(|named| named == self.value())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers(lines: &[(&'static str, &'static str)]) -> HeaderMap {
        lines
            .iter()
            .map(|(name, value)| (name.parse().unwrap(), HeaderValue::from_static(value)))
            .collect()
    }

    #[test]
    fn a_strong_tag_is_preferred_and_a_weak_one_is_none() {
        let both = headers(&[("etag", "\"a\""), ("last-modified", "then")]);
        let strong = Validator::of(&both).unwrap();
        assert_eq!(strong, Validator::ETag(HeaderValue::from_static("\"a\"")));
        let weak = headers(&[("etag", "W/\"a\""), ("last-modified", "then")]);
        assert!(matches!(
            Validator::of(&weak),
            Some(Validator::LastModified(_))
        ));
        assert_eq!(Validator::of(&headers(&[("etag", "W/\"a\"")])), None);
    }

    #[test]
    fn another_tag_is_another_version_and_silence_is_not() {
        let tag = Validator::of(&headers(&[("etag", "\"a\"")])).unwrap();
        assert!(tag.allows(&headers(&[("etag", "\"a\"")])));
        assert!(tag.allows(&headers(&[("last-modified", "then")])));
        assert!(!tag.allows(&headers(&[("etag", "\"b\"")])));
    }
}

//! Identifiers: which blob, which node, which piece, which bytes, how urgent.

use std::fmt;
use std::str::FromStr;

/// The text given is not the identifier it should be.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdError {
    /// A blob digest that is not `sha256:` and 64 lowercase hexadecimal digits.
    #[error("malformed digest {0:?}: expected \"sha256:\" and 64 lowercase hexadecimal digits")]
    Digest(String),
    /// A node ID that is not 64 lowercase hexadecimal digits.
    #[error("malformed node ID {0:?}: expected 64 lowercase hexadecimal digits")]
    Node(String),
    /// A byte string that is not 32 bytes long.
    #[error("expected 32 bytes, got {0}")]
    Length(usize),
}

/// How much of a rejected text an error repeats: it may be hostile and long.
const QUOTED_CHARS_MAX: usize = 100;

fn quote(text: &str) -> String {
    text.chars().take(QUOTED_CHARS_MAX).collect()
}

fn parse_hex32(text: &str) -> Option<[u8; 32]> {
    // `hex` takes upper case too; the OCI image specification allows lower case alone.
    if text.len() != 64 || text.bytes().any(|b| b.is_ascii_uppercase()) {
        return None;
    }
    let mut out = [0; 32];
    hex::decode_to_slice(text, &mut out).ok()?;
    Some(out)
}

/// The sha256 of a blob: its name in registries, and the identity of its task.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlobDigest([u8; 32]);

impl BlobDigest {
    /// The digest with these 32 bytes.
    pub const fn new(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }
    /// The 32 bytes of the sha256.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
    /// The 64 hexadecimal digits, without `sha256:`.
    pub fn to_hex(self) -> String {
        hex::encode(self.0)
    }
}

impl TryFrom<&[u8]> for BlobDigest {
    type Error = IdError;
    fn try_from(bytes: &[u8]) -> Result<Self, IdError> {
        bytes
            .try_into()
            .map(Self)
            .map_err(|_| IdError::Length(bytes.len()))
    }
}

impl FromStr for BlobDigest {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        text.strip_prefix("sha256:")
            .and_then(parse_hex32)
            .map(Self)
            .ok_or_else(|| IdError::Digest(quote(text)))
    }
}

impl fmt::Display for BlobDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", hex::encode(self.0))
    }
}

impl fmt::Debug for BlobDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// A node of the cluster: its Ed25519 public key.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct NodeId([u8; 32]);

impl NodeId {
    /// The node with this public key.
    pub const fn new(public_key: [u8; 32]) -> Self {
        Self(public_key)
    }
    /// The 32 bytes of the public key.
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
    /// The first eight hexadecimal digits, for people.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..4])
    }
}

impl TryFrom<&[u8]> for NodeId {
    type Error = IdError;
    fn try_from(bytes: &[u8]) -> Result<Self, IdError> {
        bytes
            .try_into()
            .map(Self)
            .map_err(|_| IdError::Length(bytes.len()))
    }
}

impl FromStr for NodeId {
    type Err = IdError;
    fn from_str(text: &str) -> Result<Self, IdError> {
        parse_hex32(text)
            .map(Self)
            .ok_or_else(|| IdError::Node(quote(text)))
    }
}

impl fmt::Display for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&hex::encode(self.0))
    }
}

impl fmt::Debug for NodeId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.short())
    }
}

/// The number of a piece in its blob, from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct PieceIndex(pub u32);

impl fmt::Display for PieceIndex {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(&self.0, f)
    }
}

/// Bytes `start..end` of a blob; never empty.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct ByteRange {
    start: u64,
    end: u64,
}

impl ByteRange {
    /// Bytes `start..end`, or `None` where that is empty or reversed.
    pub const fn new(start: u64, end: u64) -> Option<Self> {
        if start < end {
            Some(Self { start, end })
        } else {
            None
        }
    }
    /// The first byte.
    pub const fn start(&self) -> u64 {
        self.start
    }
    /// One past the last byte.
    pub const fn end(&self) -> u64 {
        self.end
    }
    /// How many bytes; at least 1.
    #[expect(clippy::len_without_is_empty, reason = "a range is never empty")]
    pub const fn len(&self) -> u64 {
        self.end - self.start
    }
    /// What both ranges cover.
    pub fn intersect(&self, other: &Self) -> Option<Self> {
        Self::new(self.start.max(other.start), self.end.min(other.end))
    }
}

impl fmt::Debug for ByteRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}..{}", self.start, self.end)
    }
}

/// How urgent bytes are; the smaller overtakes the larger.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Priority {
    /// A process waits in a page fault.
    Fault = 0,
    /// A client waits for the bytes.
    Client = 1,
    /// The rest of a blob that somebody asked for.
    Bulk = 2,
    /// Nobody has asked yet.
    Prefetch = 3,
}

impl Priority {
    /// The priority with this number on the wire; unknown numbers are the least urgent.
    pub const fn from_wire(number: u32) -> Self {
        match number {
            0 => Self::Fault,
            1 => Self::Client,
            2 => Self::Bulk,
            _ => Self::Prefetch,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_digest_survives_its_text_form_and_nothing_else_parses() {
        let text = format!("sha256:{}", "0123456789abcdef".repeat(4));
        assert_eq!(text.parse::<BlobDigest>().unwrap().to_string(), text);
        for bad in [
            "",
            "sha256:",
            "sha512:00",
            &text[..70],
            &format!("{text}0"),
            &text.to_uppercase(),
            &text.replace("ab", "AB"),
            "sha256:../../../../etc/passwd",
        ] {
            assert!(bad.parse::<BlobDigest>().is_err(), "{bad}");
        }
    }

    #[test]
    fn an_error_repeats_only_the_start_of_a_long_text() {
        let error = "x".repeat(1 << 20).parse::<BlobDigest>().unwrap_err();
        assert!(error.to_string().len() < 300);
    }

    #[test]
    fn ranges_are_never_empty() {
        assert!(ByteRange::new(5, 5).is_none());
        assert!(ByteRange::new(6, 5).is_none());
        let range = ByteRange::new(5, 8).unwrap();
        assert_eq!(range.len(), 3);
        assert!(range.intersect(&ByteRange::new(8, 9).unwrap()).is_none());
    }
}

//! What images look like: EROFS, nydus RAFS v6, and the manifests that name their parts.
//!
//! Everything below but [`rafs::device`] is a parser: bytes go in, values come out, nothing is read
//! from a disk or a network here. The bytes come from registries and from peers, so each count, size
//! and offset in them is checked against what is there before it is used; an image that lies gives a
//! [`FormatError`] and costs no more memory than its own length.

pub mod erofs;
mod field;
pub mod manifest;
pub mod rafs;

/// Why bytes are not an image that can be mounted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum FormatError {
    /// A structure reaches past the end of what holds it.
    #[error(
        "{what} at byte {start} needs {len} bytes, past the end at {end}: the image is cut or damaged"
    )]
    Truncated {
        /// The structure.
        what: &'static str,
        /// Where it should start.
        start: u64,
        /// How long it should be.
        len: u64,
        /// Where the bytes end.
        end: u64,
    },
    /// A field holds what no sound image holds.
    #[error("{what} {why}: the image is damaged, make it again")]
    Malformed {
        /// The structure.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
    /// A sound image of a kind that is not supported.
    #[error("{what} is not supported: {hint}")]
    Unsupported {
        /// The kind.
        what: String,
        /// What to do.
        hint: &'static str,
    },
}

impl FormatError {
    pub(crate) fn malformed(what: &'static str, why: impl Into<String>) -> Self {
        Self::Malformed {
            what,
            why: why.into(),
        }
    }
}

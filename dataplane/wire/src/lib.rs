//! What peers say to each other, and the identifiers that every other crate speaks in.
//!
//! Nothing here does I/O, reads a clock or draws random numbers: bytes go in, values come out.
//! [`id`] names blobs, nodes, pieces and ranges; [`layout`] cuts a blob into pieces and groups;
//! [`tree`] computes and merges their digests; [`claim`] is a node's signed word on a piece;
//! [`message`] and [`frame`] are the peer protocol; [`name`] is how registries name images, and [`address`] where they cannot be.

#![forbid(unsafe_code)]

pub mod address;
pub mod claim;
pub mod frame;
pub mod id;
pub mod layout;
pub mod message;
pub mod name;
pub mod pieces;
pub mod tree;

pub use claim::Claim;
pub use id::{BlobDigest, ByteRange, NodeId, PieceIndex, Priority};
pub use layout::{GROUP_SIZE, PieceLayout};
pub use pieces::{PieceRun, PieceSet};
pub use tree::{GroupDigest, PieceDigest};

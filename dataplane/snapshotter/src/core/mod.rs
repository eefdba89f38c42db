//! What decides, without I/O, clock or randomness: the tree of snapshots and its rules, what labels
//! say of a layer, which mounts make up a file system, which snapshots a filter means.

pub mod filter;
pub mod layer;
pub mod mounts;
pub mod snapshot;
pub mod tree;

pub use filter::{Filter, FilterError};
pub use layer::{Content, ImageSource, LayerError};
pub use mounts::{Mount, Overlay};
pub use snapshot::{Kind, Labels, Snapshot, Usage};
pub use tree::{Change, Tree, TreeError};

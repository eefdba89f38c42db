//! A containerd snapshotter, served to containerd as a proxy plugin.
//!
//! Ordinary layers are directories joined by overlayfs, exactly as containerd's own snapshotter does
//! it. Lazy layers are mounted by whoever implements [`LazyLayers`]; the download of their data is
//! skipped, because containerd is told that they are there already.
//!
//! [`core`] decides and does no I/O. [`Snapshotter`] performs: records and directories on disk, mounts.
//! [`Server`] speaks gRPC on a unix socket. A call that has begun is finished even when the client
//! goes away; what a crash leaves half done is removed at the next start and by `Cleanup`.

#![forbid(unsafe_code)]

pub mod core;
mod directories;
mod error;
mod images;
mod lazy;
mod proto;
mod records;
mod server;
mod service;
mod snapshotter;
mod usage;

pub use error::{DiskError, Error, StartError};
pub use images::ImageFinder;
pub use lazy::{LazyContent, LazyError, LazyLayer, LazyLayers};
pub use server::Server;
pub use snapshotter::{Call, Snapshotter};

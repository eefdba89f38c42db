//! containerd's messages, generated from `proto/`.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    reason = "the schemas document the generated types"
)]

/// containerd's common types.
pub mod types {
    tonic::include_proto!("containerd.types");
}

/// The service of a snapshotter.
pub mod services {
    /// Snapshots.
    pub mod snapshots {
        /// Version 1.
        pub mod v1 {
            tonic::include_proto!("containerd.services.snapshots.v1");
        }
    }
    /// Content.
    pub mod content {
        /// Version 1.
        pub mod v1 {
            tonic::include_proto!("containerd.services.content.v1");
        }
    }
}

pub(crate) use services::content::v1 as content;
pub(crate) use services::snapshots::v1 as snapshots;

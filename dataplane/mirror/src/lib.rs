//! The HTTP/1.1 side that containerd, nydusd, podman and skopeo pull through.
//!
//! Owns: the listening socket, the reading and refusing of requests, who may have which bytes
//! ([`verdict`]), the manifests kept in memory ([`manifest_cache`]), and the exact form of every
//! answer. Does not own: how a registry is spoken to, where the bytes of a blob come from; both
//! are behind [`Backend`], which the node implements.
//!
//! Called by the node only: [`Mirror::bind`], then [`Mirror::serve`], which returns after the
//! shutdown future has resolved and the requests in flight have ended or were cut. A request that
//! fails before its first byte gets a status and an OCI error body; one that fails later gets its
//! connection cut, never a clean end, so that no client takes a part for the whole.
//!
//! [`route`], [`range`], [`policy`], [`verdict`] and [`manifest_cache`] are pure: no clock, no
//! sockets.

#![forbid(unsafe_code)]

pub mod backend;
pub mod config;
pub mod manifest_cache;
pub mod policy;
pub mod range;
pub mod route;
pub mod upstream;
pub mod verdict;

mod authorize;
mod blob;
mod body;
mod feed;
mod manifest;
mod proxy;
mod reply;
mod request;
mod server;
mod service;
mod stall;
mod tls;
mod tunnel;
mod turns;

pub use backend::{
    Backend, BackendError, BackendErrorKind, BlobOpen, BlobProbe, BlobVerdict, BodyStream,
    MirrorEvent, RequestKind, UpstreamReply, UpstreamRequest, VerdictOrigin,
};
pub use config::{MirrorConfig, TlsFiles};
pub use policy::Policy;
pub use server::{Mirror, MirrorError};
pub use upstream::{Scheme, UpstreamUrl, UpstreamUrlError};

//! The rig: machines, networks and real programs for the demo, the end-to-end tests and the benchmarks.
//!
//! Where it is root, the rig lives inside private namespaces (see [`enclosure`]) and every machine has
//! a network namespace and an address of its own; elsewhere machines are 127.x addresses. Every
//! program is a typed handle that ends its process when dropped, and everything lies below one
//! directory that the outer process removes, however the run ended.

pub(crate) mod containerd;
pub(crate) mod control;
pub(crate) mod cri;
pub(crate) mod enclosure;
pub(crate) mod files;
pub(crate) mod http;
pub(crate) mod image;
pub(crate) mod lazy;
pub(crate) mod machine;
pub(crate) mod nginx;
pub(crate) mod node;
pub(crate) mod nydus;
pub(crate) mod podman;
pub(crate) mod process;
pub(crate) mod proxy;
pub(crate) mod registry;
pub(crate) mod serving;
pub(crate) mod skopeo;
pub(crate) mod status;
pub(crate) mod tls;
pub(crate) mod token_server;

pub(crate) use enclosure::Rig;
pub(crate) use machine::Machine;

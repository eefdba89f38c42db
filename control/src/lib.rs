//! Scheduling and cluster state: who holds what, who fetches what from the source, who may join.
//!
//! [`core`] decides: a state machine without I/O, clock or randomness. [`service`] is its gRPC shell,
//! embedded in a node or run by the `pantala-control` program; [`client`] is the node's end of a
//! session. [`authority`] is the cluster's CA, [`token`] what a node joins with, [`identity`] the key
//! and certificate that a node keeps.

#![forbid(unsafe_code)]

pub mod authority;
pub mod client;
mod convert;
pub mod core;
mod disk;
pub mod identity;
mod proto;
pub mod service;
pub mod token;
mod x509;

pub use client::{ClientConfig, Command, ControlClient, ControlHandle, Event};
pub use core::message::{Labels, PathReport, Peer, RefusedReason, TaskReport};
pub use identity::{Identity, IdentityError, JoinTarget};
pub use service::{Server, ServerConfig};
pub use token::JoinToken;

//! The `pantala` program: the node daemon and the command line around it.

#![forbid(unsafe_code)]

pub mod admin;
pub mod backend;
pub mod cli;
pub mod config;
pub mod control_link;
pub mod daemon;
pub mod engine;
pub mod lazy;
pub mod meter;
pub mod metrics;
pub mod peer;
mod snapshots;

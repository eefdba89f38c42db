//! The `pantala` program: the node daemon and the command line around it.

#![forbid(unsafe_code)]

pub mod config;

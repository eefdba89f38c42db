//! Scheduling judged in virtual time.
//!
//! [`network`] is a fluid model of links that flows share fairly. [`pantala`] drives the very cores of
//! production over it, `pantala_control::core::Core` and one `pantala_swarm::Download` for each node and
//! blob, with a shell that does what the node's does. [`baseline`] has the policies of others over the
//! same network, [`bound`] what no policy can beat, [`published`] what others have measured.
//!
//! Everything follows from a [`scenario`], which has one seed: the same scenario gives the same run.
//! [`check`] looks on, from the messages alone; [`shrink`] makes a scenario that fails small.

#![forbid(unsafe_code)]

pub mod baseline;
pub mod bound;
pub mod check;
pub mod cli;
pub mod network;
pub mod pantala;
pub mod published;
pub mod rng;
pub mod scenario;
pub mod shrink;

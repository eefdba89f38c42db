//! Decides.

pub mod message;

pub use message::{FromNode, ToNode};

//! What an endpoint promises, whatever moves its packets.

pub(crate) mod cluster;
mod hostile;
mod identity;
mod lifetime;
mod streams;

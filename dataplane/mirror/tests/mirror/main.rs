//! The mirror over real sockets, against a backend that does what each test says.
//!
//! Faults shown: registries that refuse, fail, hang, lie and cut; callers without rights; clients
//! that send garbage, too much, or two questions at once.

mod blobs;
mod fake;
mod limits;
mod manifests;
mod proxying;
mod rights;
mod wire;

//! The ring over the kernel that runs the tests.

mod datagrams;
mod rig;

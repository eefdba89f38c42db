//! The ring over the kernel that runs the tests.

mod datagrams;
mod ending;
mod files;
mod groups;
mod pressure;
mod refused;
mod rig;
mod sleeping;

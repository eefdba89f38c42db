//! What each peer's path really delivers.
//!
//! Two halves. [`core`] decides: counts and QUIC's view of a path go in, estimates with their error come out,
//! and so does how much this node may send beside the traffic of others. It has no clock and no I/O.
//! [`kernel`] counts: programs in the kernel that add up each peer's traffic and steer datagrams, and the
//! totals of the host's interfaces. Without the right to load programs a node does without that half; the
//! estimates are then made of QUIC's own counts, and [`kernel::KernelError`] says why.
//!
//! Nothing here lies on the way of a packet: the programs only count, and the counts are read in passing.
//! Everything is gone from the kernel when [`kernel::KernelMeter`] is dropped, or the process dies: nothing is
//! pinned, and attachments are held by descriptors of this process.

#![forbid(unsafe_code)]

pub mod core;
pub mod kernel;

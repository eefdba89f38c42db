//! What containerd demands of a snapshotter, on the real overlayfs of this kernel: the cases of its own
//! conformance suite, and crashes. Needs root; without it each test says so and proves nothing.

mod crash;
mod lazy;
mod rules;
mod stage;
mod trees;

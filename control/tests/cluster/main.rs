//! A real server and real clients over loopback.
//!
//! No test waits for a fixed time where an event tells the same: [`harness::WAIT`] only bounds a failure.

mod harness;
mod hostile;
mod joins;
mod sessions;

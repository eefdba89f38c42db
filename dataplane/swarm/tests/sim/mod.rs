//! A cluster in one thread and virtual time: nodes with real `Download` cores, a toy control, a
//! source, and the faults between them. The same seed gives the same run.
//!
//! Fault model. Anything below may happen in one scenario, at any time:
//! - the source is slow, cuts, answers 429, never answers, or is gone for good;
//! - a node crashes, with or without its peers noticing, and may come back with what it held;
//! - a parent stalls, is slow, is busy, sends wrong bytes, or no longer holds what it offered;
//! - a node signs wrong pieces that it says are the source's;
//! - a held piece rots;
//! - control is down, with or without its nodes noticing, and forgets everything;
//! - messages take different times; readers come, skip ahead and go.
//!
//! Not in the model: messages that are lost without their connection being lost, two control
//! servers, and a store that lies about what it holds.

mod nodes;
mod queue;
pub mod rng;
pub mod scenario;
pub mod world;

//! The download of one blob as a state machine: what is missing, whom to ask for it, when to go to
//! the source, when to give up.
//!
//! It does no I/O, reads no clock and draws no random numbers. The shell that drives a
//! [`Download`] reports what happened ([`Download::handle`]), then performs every
//! [`Action`] that [`Download::poll_action`] yields until there is none, then sleeps until
//! something happens or [`Download::next_timeout`] is due. The same seed and the same inputs at the
//! same times give the same actions.

#![forbid(unsafe_code)]

mod audit;
mod config;
mod demand;
mod download;
mod ending;
mod event;
mod expiry;
mod fallback;
mod lease;
mod origin;
mod parents;
mod plan;
mod requests;
mod spread;

pub use config::DownloadConfig;
pub use download::Download;
pub use event::{
    Action, Author, Blame, Candidate, FailReason, Failure, Gone, Input, ReaderId, Recheck,
    RequestId, State,
};

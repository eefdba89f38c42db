//! Registries and other origins: authentication, ranges, redirects, resumption.
//!
//! [`Source`] fetches ranges of blobs and passes on everything else. It owns its connections and
//! tokens, in memory only. What it decides (when to try again, what an answer means, where a
//! redirect may lead, what a challenge asks for, which addresses are off limits) is decided by pure
//! modules; what it does is done by thin ones around them. It fails with a [`SourceError`], which
//! says who is to blame and whether asking again can help.
//!
//! An origin is not trusted: every answer is checked against the question, every wait and every
//! buffer has a bound. What it sends is still not verified here: digests are the caller's business.

#![forbid(unsafe_code)]

mod address;
mod answer;
mod auth;
mod challenge;
mod client;
mod clock;
mod config;
mod counters;
mod credential;
mod error;
mod fetch;
mod gate;
mod opening;
mod probe;
mod push;
mod redirect;
mod reply;
mod retry;
mod source;
mod tls;
mod token;
mod upstream;
mod validator;

pub use address::{ForbiddenAddress, Resolution, ResolveNames, SystemNames};
pub use config::{ConfigError, SourceConfig};
pub use counters::SourceTotals;
pub use credential::{Credential, CredentialFingerprint, Secret};
pub use error::{Blame, Lie, Phase, RedirectFault, SourceError, TokenFault};
pub use fetch::{BodyStream, TransferFacts};
pub use opening::OpenedBlob;
pub use probe::{BlobInfo, UrlInfo};
pub use push::BlobPush;
pub use reply::Reply;
pub use source::Source;
pub use upstream::{Upstream, UpstreamError};
pub use validator::Validator;

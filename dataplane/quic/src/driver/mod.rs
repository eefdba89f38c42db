//! The seam between what the public types promise and how packets travel.
//!
//! A driver is four types, [`Endpoint`], [`Connection`], [`SendStream`] and [`RecvStream`], and the
//! `Incoming` handshake. It moves bytes and keeps QUIC's timers; it takes configuration of ours and
//! returns errors of ours; it knows nothing of frames, nodes, admission or budgets. With a second driver,
//! each name here becomes an enum with one variant a driver, chosen at `bind`.

mod quinn;

pub(crate) use self::quinn::{Connection, Endpoint, RecvStream, SendStream};

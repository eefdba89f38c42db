//! quinn-proto's errors in our words.

use quinn_proto::{ConnectError, ConnectionError, TransportErrorCode};

use crate::error::{CloseReason, Error};

/// Codes of TLS alerts inside QUIC (RFC 9001, section 4.8).
const TLS_ALERTS: std::ops::Range<u64> = 0x100..0x200;
/// How much of a peer's words is kept: they may be hostile and long.
const DETAIL_CHARS_MAX: usize = 200;

fn shorten(text: &str) -> String {
    text.chars()
        .filter(|c| !c.is_control())
        .take(DETAIL_CHARS_MAX)
        .collect()
}

pub(super) fn connection_error(error: ConnectionError) -> Error {
    match error {
        ConnectionError::TimedOut => Error::TimedOut,
        ConnectionError::Reset => Error::Reset,
        ConnectionError::LocallyClosed => Error::ClosedLocally,
        ConnectionError::ApplicationClosed(close) => Error::ClosedByPeer {
            reason: CloseReason::from_code(close.error_code.into_inner()),
            detail: shorten(&String::from_utf8_lossy(&close.reason)),
        },
        ConnectionError::ConnectionClosed(close) => {
            let code = u64::from(close.error_code);
            let detail = shorten(&close.to_string());
            if close.error_code == TransportErrorCode::CONNECTION_REFUSED {
                Error::Refused
            } else if TLS_ALERTS.contains(&code) {
                Error::IdentityRefused(detail)
            } else {
                let reason = match close.error_code {
                    TransportErrorCode::NO_ERROR => CloseReason::Done,
                    TransportErrorCode::INTERNAL_ERROR => CloseReason::Other,
                    _ => CloseReason::Protocol,
                };
                Error::ClosedByPeer { reason, detail }
            }
        }
        ConnectionError::TransportError(error) => {
            let detail = shorten(&error.to_string());
            if TLS_ALERTS.contains(&u64::from(error.code)) {
                Error::Identity(detail)
            } else {
                Error::Transport(detail)
            }
        }
        error @ (ConnectionError::VersionMismatch | ConnectionError::CidsExhausted) => {
            Error::Transport(error.to_string())
        }
    }
}

pub(super) fn connect_error(error: ConnectError) -> Error {
    match error {
        ConnectError::EndpointStopping => Error::EndpointClosed,
        ConnectError::InvalidRemoteAddress(address) => Error::Address(address),
        other => Error::Transport(other.to_string()),
    }
}

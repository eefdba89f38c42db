//! What can go wrong between two nodes, who is to blame for it, and whether trying again makes sense.

use std::io;
use std::net::SocketAddr;

use pantala_wire::NodeId;
use pantala_wire::frame::FrameError;

use crate::config::ConfigError;
use crate::identity::IdentityError;

/// Who is to blame for an [`Error`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Blame {
    /// The node at the other end: it broke the protocol, refused, or gave up.
    Peer,
    /// Whatever lies between the nodes, or the other node is gone; they cannot be told apart.
    Path,
    /// This node.
    Local,
}

/// Why a side closed a connection; the number is QUIC's application error code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum CloseReason {
    /// Not needed any more.
    Done = 0,
    /// The node stops.
    ShuttingDown = 1,
    /// The other node has too many connections, in all or with this one.
    Busy = 2,
    /// The node is shut out of the cluster.
    ShutOut = 3,
    /// The certificate is the cluster's but not the expected node's, or not a node's at all.
    WrongNode = 4,
    /// The other side broke the protocol.
    Protocol = 5,
    /// A code that this version does not know.
    Other = 0xff,
}

impl CloseReason {
    pub(crate) fn from_code(code: u64) -> Self {
        [
            Self::Done,
            Self::ShuttingDown,
            Self::Busy,
            Self::ShutOut,
            Self::WrongNode,
            Self::Protocol,
        ]
        .into_iter()
        .find(|reason| *reason as u64 == code)
        .unwrap_or(Self::Other)
    }
}

/// An endpoint that could not be made.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The limits do not fit together.
    #[error("limits of the peer plane: {0}")]
    Config(#[from] ConfigError),
    /// The node's own certificate or key is of no use.
    #[error("this node's identity: {0}")]
    Identity(#[from] IdentityError),
    /// The socket cannot be had.
    #[error("cannot listen for peers on UDP {address}: {source}")]
    Socket {
        /// The address.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
}

/// A connection or stream failed.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// This node has as many connections as it may have.
    #[error("this node has the {0} connections that it may have; raise connections_max")]
    TooManyConnections(usize),
    /// The endpoint is closed.
    #[error("the endpoint is closed")]
    EndpointClosed,
    /// No datagram can be sent there from this endpoint's socket.
    #[error("cannot send to {0} from this socket: wrong address family, or port 0")]
    Address(SocketAddr),
    /// The node is shut out.
    #[error("node {0} is shut out of the cluster")]
    ShutOut(NodeId),
    /// The peer's certificate does not pass.
    #[error("the peer's identity does not hold: {0}")]
    Identity(String),
    /// The peer did not take this node's certificate.
    #[error("the peer did not accept this node's identity: {0}")]
    IdentityRefused(String),
    /// Another node answered.
    #[error("node {got} answered where {expected} was expected")]
    WrongNode {
        /// Who was asked for.
        expected: NodeId,
        /// Who answered.
        got: NodeId,
    },
    /// The peer had no room for a handshake.
    #[error("the peer is busy and refused the connection")]
    Refused,
    /// The peer closed the connection.
    #[error("the peer closed the connection ({reason:?}): {detail}")]
    ClosedByPeer {
        /// Its reason.
        reason: CloseReason,
        /// Its words, shortened.
        detail: String,
    },
    /// This side closed the connection.
    #[error("the connection was closed on this side")]
    ClosedLocally,
    /// Nothing was heard from the peer for too long.
    #[error("the peer is silent: gone, or cut off")]
    TimedOut,
    /// The peer knows nothing of the connection: it was restarted.
    #[error("the peer has lost the connection's state; it was restarted")]
    Reset,
    /// The peer broke QUIC's own rules.
    #[error("the peer broke QUIC's rules: {0}")]
    Transport(String),
    /// The peer took a stream back before its end.
    #[error("the peer cut its answer short")]
    StreamReset,
    /// The peer wants no more of what this side sends on a stream.
    #[error("the peer stopped listening")]
    StreamStopped,
    /// A stream ended in the middle of a frame, or before all bytes that were due.
    #[error("the stream ended {0} bytes early")]
    Truncated(usize),
    /// A frame that is none.
    #[error("frame from the peer: {0}")]
    Frame(#[from] FrameError),
    /// A message too large to be sent.
    #[error("a message of {0} bytes does not fit a frame")]
    MessageTooLarge(usize),
    /// The stream was finished, reset or stopped on this side before.
    #[error("the stream is closed on this side")]
    StreamClosed,
}

impl Error {
    /// Who is to blame. [`Blame::Peer`] where trying again makes no sense means that the node itself
    /// broke the protocol, or is shut out; whoever only answered in its place, stopped, or is of another
    /// opinion about this node has not.
    pub fn blame(&self) -> Blame {
        match self {
            Self::TooManyConnections(_)
            | Self::EndpointClosed
            | Self::Address(_)
            | Self::IdentityRefused(_)
            | Self::ClosedLocally
            | Self::MessageTooLarge(_)
            | Self::StreamClosed
            | Self::ClosedByPeer {
                reason: CloseReason::ShutOut | CloseReason::WrongNode | CloseReason::Protocol,
                ..
            } => Blame::Local,
            Self::TimedOut | Self::Identity(_) | Self::WrongNode { .. } => Blame::Path,
            Self::ShutOut(_)
            | Self::Refused
            | Self::ClosedByPeer { .. }
            | Self::Reset
            | Self::Transport(_)
            | Self::StreamReset
            | Self::StreamStopped
            | Self::Truncated(_)
            | Self::Frame(_) => Blame::Peer,
        }
    }

    /// Whether the same node may well serve the same request a little later.
    pub fn is_retryable(&self) -> bool {
        match self {
            Self::TooManyConnections(_)
            | Self::Refused
            | Self::TimedOut
            | Self::Reset
            | Self::StreamReset
            | Self::StreamStopped
            | Self::Truncated(_) => true,
            Self::ClosedByPeer { reason, .. } => !matches!(
                reason,
                CloseReason::ShutOut | CloseReason::WrongNode | CloseReason::Protocol
            ),
            _ => false,
        }
    }

    /// Whether the connection itself is over, so that a new one is needed.
    pub fn is_connection_lost(&self) -> bool {
        !matches!(
            self,
            Self::StreamReset
                | Self::StreamStopped
                | Self::Truncated(_)
                | Self::Frame(_)
                | Self::MessageTooLarge(_)
                | Self::StreamClosed
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_close_reason_survives_its_code_and_unknown_ones_are_other() {
        for code in 0..=5 {
            let reason = CloseReason::from_code(code);
            assert_eq!(reason as u64, code);
        }
        assert_eq!(CloseReason::from_code(u64::MAX), CloseReason::Other);
    }

    #[test]
    fn a_liar_is_not_asked_again_and_a_silent_peer_is() {
        assert!(!Error::Frame(FrameError::TooLarge(1 << 30)).is_retryable());
        assert_eq!(
            Error::Frame(FrameError::TooLarge(1 << 30)).blame(),
            Blame::Peer
        );
        assert!(Error::TimedOut.is_retryable());
        assert_eq!(Error::TimedOut.blame(), Blame::Path);
        assert!(Error::TimedOut.is_connection_lost());
        assert!(!Error::StreamReset.is_connection_lost());
    }

    #[test]
    fn a_node_that_only_stops_or_has_another_in_its_place_is_no_liar() {
        let is_liar = |error: Error| error.blame() == Blame::Peer && !error.is_retryable();
        let closed = |reason| Error::ClosedByPeer {
            reason,
            detail: String::new(),
        };
        for code in 0..=6 {
            assert!(!is_liar(closed(CloseReason::from_code(code))), "{code}");
        }
        let (expected, got) = (NodeId::new([1; 32]), NodeId::new([2; 32]));
        for error in [
            Error::WrongNode { expected, got },
            Error::Identity("expired".into()),
            Error::IdentityRefused("unknown authority".into()),
            Error::Refused,
            Error::Reset,
            Error::StreamReset,
            Error::StreamStopped,
            Error::Truncated(1),
            Error::TimedOut,
        ] {
            assert!(!is_liar(error.clone()), "{error}");
        }
        assert!(is_liar(Error::Transport(
            "stream data after its end".into()
        )));
        assert!(is_liar(Error::ShutOut(got)));
    }
}

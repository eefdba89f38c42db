//! Between the messages on the wire and those of the core.
//!
//! What comes in was sent by a member, but may still be hostile: lengths are checked, lists are
//! bounded, and whatever does not fit ends the session.

use std::net::SocketAddr;
use std::time::Duration;

use pantala_wire::{BlobDigest, Claim, NodeId, PieceDigest, PieceIndex, PieceRun};

use crate::client::Event;
use crate::core::config::{HOST_NAME_LEN_MAX, PATHS_PER_REPORT_MAX};
use crate::core::message::{FromNode, Labels, PathReport, Peer, RefusedReason, TaskReport, ToNode};
use crate::proto;
use crate::proto::from_node::Kind as Up;
use crate::proto::to_node::Kind as Down;

/// Largest message read: the most fragmented blob's runs, held and being fetched, and room to spare.
pub(crate) const MESSAGE_SIZE_MAX: usize = 1024 * 1024;
/// Bytes of a stream that may be on the way to a side that does not read: over a thousand messages.
pub(crate) const STREAM_WINDOW_SIZE: u32 = 64 * 1024;
/// The same for a connection. It is never reached: h2 takes a connection for an attack, and cuts it,
/// when frames of less than 256 bytes, our usual ones, wait unread and the rest of their 256 bytes adds
/// up to half of this. A stream's window must be used up before, so that a slow side is waited for.
pub(crate) const CONNECTION_WINDOW_SIZE: u32 = 2 * 1024 * 1024;
/// Runs in one list: every second piece of the largest layout is half of this.
const RUNS_MAX: usize = 16 * 1024;
/// Blobs in one message of an announcement.
const TASKS_PER_MESSAGE_MAX: usize = 256;
/// Runs in one message of an announcement, about 200 KiB of them; a blob of its own may have more.
const RUNS_PER_MESSAGE: usize = 16 * 1024;
/// Longest label: these are names that people give to racks.
const LABEL_LEN_MAX: usize = 128;

/// A message that makes no sense.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("malformed message: {0}")]
pub(crate) struct Malformed(&'static str);

/// What a node says, sorted by who listens.
#[derive(Debug)]
pub(crate) enum Inbound {
    Hello(Hello),
    Heartbeat,
    Message(FromNode),
}

/// How a session starts.
#[derive(Debug, Clone)]
pub(crate) struct Hello {
    pub(crate) advertise: SocketAddr,
    pub(crate) labels: Labels,
    pub(crate) resumed: bool,
    pub(crate) uplink_bytes_per_s: Option<u64>,
    pub(crate) is_seed: bool,
}

fn digest(bytes: &[u8]) -> Result<BlobDigest, Malformed> {
    BlobDigest::try_from(bytes).map_err(|_| Malformed("a digest is not 32 bytes long"))
}
fn node(bytes: &[u8]) -> Result<NodeId, Malformed> {
    NodeId::try_from(bytes).map_err(|_| Malformed("a node ID is not 32 bytes long"))
}
fn piece_digest(bytes: &[u8]) -> Result<PieceDigest, Malformed> {
    PieceDigest::try_from(bytes).map_err(|_| Malformed("a piece digest is not 32 bytes long"))
}
fn runs(runs: &[proto::Run]) -> Result<Vec<PieceRun>, Malformed> {
    if runs.len() > RUNS_MAX {
        return Err(Malformed("too many runs"));
    }
    Ok(runs.iter().map(run).collect())
}
fn run(run: &proto::Run) -> PieceRun {
    PieceRun {
        first: run.first,
        count: run.count,
    }
}
fn label(text: String) -> Result<String, Malformed> {
    if text.len() > LABEL_LEN_MAX {
        return Err(Malformed("a label is too long"));
    }
    Ok(text)
}
fn task(task: &proto::Task) -> Result<TaskReport, Malformed> {
    Ok(TaskReport {
        digest: digest(&task.digest)?,
        size_bytes: task.size_bytes,
        has_source: task.has_source,
        wanted: task.wanted,
        complete: task.complete,
        held: runs(&task.held)?,
        fetching: runs(&task.fetching)?,
    })
}

fn host(name: String) -> Result<String, Malformed> {
    if name.len() > HOST_NAME_LEN_MAX {
        return Err(Malformed("the name of a host is too long"));
    }
    Ok(name)
}

fn path_reports(paths: &proto::Paths) -> Result<Vec<PathReport>, Malformed> {
    if paths.paths.len() > PATHS_PER_REPORT_MAX {
        return Err(Malformed("too many paths"));
    }
    let report = |path: &proto::Path| {
        Ok(PathReport {
            node: node(&path.node)?,
            bytes: path.bytes,
            busy: Duration::from_micros(path.busy_us),
            failures: path.failures,
        })
    };
    paths.paths.iter().map(report).collect()
}

impl TryFrom<proto::FromNode> for Inbound {
    type Error = Malformed;
    fn try_from(message: proto::FromNode) -> Result<Self, Malformed> {
        // A kind that this version does not know: the node lives, and goes on with what it has.
        let Some(kind) = message.kind else {
            return Ok(Self::Heartbeat);
        };
        Ok(Self::Message(match kind {
            Up::Hello(hello) => {
                return Ok(Self::Hello(Hello {
                    advertise: hello
                        .advertise
                        .parse()
                        .map_err(|_| Malformed("the address of the piece plane is no ip:port"))?,
                    labels: Labels {
                        host: label(hello.host)?,
                        rack: label(hello.rack)?,
                        zone: label(hello.zone)?,
                    },
                    resumed: hello.resumed,
                    uplink_bytes_per_s: Some(hello.uplink_bytes_per_s).filter(|&rate| rate > 0),
                    is_seed: hello.seed,
                }));
            }
            Up::Heartbeat(_) => return Ok(Self::Heartbeat),
            Up::Announce(announce) => {
                if announce.tasks.len() > TASKS_PER_MESSAGE_MAX {
                    return Err(Malformed("too many blobs in one announcement"));
                }
                FromNode::Announce {
                    holdings: announce.tasks.iter().map(task).collect::<Result<_, _>>()?,
                    last: announce.last,
                }
            }
            Up::Open(open) => {
                let report = task(&open)?;
                FromNode::OpenTask {
                    digest: report.digest,
                    size_bytes: report.size_bytes,
                    has_source: report.has_source,
                    held: report.held,
                    complete: report.complete,
                }
            }
            Up::AskOpening(blob) => FromNode::AskOpening {
                digest: digest(&blob.digest)?,
            },
            Up::ReturnOpening(blob) => FromNode::ReturnOpening {
                digest: digest(&blob.digest)?,
            },
            Up::Close(blob) => FromNode::CloseTask {
                digest: digest(&blob.digest)?,
            },
            Up::AskLease(ask) => FromNode::AskLease {
                digest: digest(&ask.digest)?,
                wanted: runs(&ask.wanted)?,
                urgent: ask.urgent.map(PieceIndex),
            },
            Up::ReturnLease(lease) => FromNode::ReturnLease {
                digest: digest(&lease.digest)?,
                pieces: runs(&lease.pieces)?,
            },
            Up::Fetched(lease) => FromNode::Fetched {
                digest: digest(&lease.digest)?,
                pieces: runs(&lease.pieces)?,
            },
            Up::Holding(holding) => FromNode::Holding {
                digest: digest(&holding.digest)?,
                runs: runs(&holding.runs)?,
                complete: holding.complete,
            },
            Up::SourceHost(source) => FromNode::SourceHost {
                digest: digest(&source.digest)?,
                host: host(source.host)?,
            },
            Up::SourceLimited(limited) => FromNode::SourceLimited {
                host: host(limited.host)?,
                retry_after: limited.retry_after_ms.map(Duration::from_millis),
            },
            Up::Paths(paths) => FromNode::Paths {
                reports: path_reports(&paths)?,
            },
            Up::Dropped(blob) => FromNode::Dropped {
                digest: digest(&blob.digest)?,
            },
            Up::ParentFailed(failed) => FromNode::ParentFailed {
                digest: digest(&failed.digest)?,
                node: node(&failed.node)?,
            },
            Up::FalseClaim(report) => FromNode::FalseClaim {
                digest: digest(&report.digest)?,
                piece: PieceIndex(report.piece),
                claim: Claim {
                    piece_digest: piece_digest(&report.claimed_digest)?,
                    author: node(&report.author)?,
                    signature: report
                        .signature
                        .as_slice()
                        .try_into()
                        .map_err(|_| Malformed("a signature is not 64 bytes long"))?,
                },
                true_digest: piece_digest(&report.true_digest)?,
                relayer: node(&report.relayer)?,
            },
        }))
    }
}

fn to_runs(runs: &[PieceRun]) -> Vec<proto::Run> {
    runs.iter()
        .map(|run| proto::Run {
            first: run.first,
            count: run.count,
        })
        .collect()
}
fn to_blob(digest: &BlobDigest) -> proto::Blob {
    proto::Blob {
        digest: digest.as_bytes().to_vec(),
    }
}
fn to_lease_pieces(digest: &BlobDigest, pieces: &[PieceRun]) -> proto::LeasePieces {
    proto::LeasePieces {
        digest: digest.as_bytes().to_vec(),
        pieces: to_runs(pieces),
    }
}
fn to_task(report: &TaskReport) -> proto::Task {
    proto::Task {
        digest: report.digest.as_bytes().to_vec(),
        size_bytes: report.size_bytes,
        has_source: report.has_source,
        wanted: report.wanted,
        complete: report.complete,
        held: to_runs(&report.held),
        fetching: to_runs(&report.fetching),
    }
}

pub(crate) fn from_node(kind: Up) -> proto::FromNode {
    proto::FromNode { kind: Some(kind) }
}
pub(crate) fn to_node(kind: Down) -> proto::ToNode {
    proto::ToNode { kind: Some(kind) }
}

/// A command as messages: one, but for an announcement, which is cut into as many as it takes.
pub(crate) fn commands(command: &FromNode) -> Vec<proto::FromNode> {
    let kind = match command {
        FromNode::Announce { holdings, last } => return announcement(holdings, *last),
        FromNode::OpenTask {
            digest,
            size_bytes,
            has_source,
            held,
            complete,
        } => Up::Open(proto::Task {
            digest: digest.as_bytes().to_vec(),
            size_bytes: *size_bytes,
            has_source: *has_source,
            wanted: !complete,
            complete: *complete,
            held: to_runs(held),
            fetching: Vec::new(),
        }),
        FromNode::AskOpening { digest } => Up::AskOpening(to_blob(digest)),
        FromNode::ReturnOpening { digest } => Up::ReturnOpening(to_blob(digest)),
        FromNode::CloseTask { digest } => Up::Close(to_blob(digest)),
        FromNode::AskLease {
            digest,
            wanted,
            urgent,
        } => Up::AskLease(proto::AskLease {
            digest: digest.as_bytes().to_vec(),
            wanted: to_runs(wanted),
            urgent: urgent.map(|piece| piece.0),
        }),
        FromNode::ReturnLease { digest, pieces } => {
            Up::ReturnLease(to_lease_pieces(digest, pieces))
        }
        FromNode::Fetched { digest, pieces } => Up::Fetched(to_lease_pieces(digest, pieces)),
        FromNode::Holding {
            digest,
            runs,
            complete,
        } => Up::Holding(proto::Holding {
            digest: digest.as_bytes().to_vec(),
            runs: to_runs(runs),
            complete: *complete,
        }),
        FromNode::SourceHost { digest, host } => Up::SourceHost(proto::SourceHost {
            digest: digest.as_bytes().to_vec(),
            host: host.clone(),
        }),
        FromNode::SourceLimited { host, retry_after } => Up::SourceLimited(proto::SourceLimited {
            host: host.clone(),
            retry_after_ms: retry_after.map(|wait| wait.as_millis() as u64),
        }),
        FromNode::Paths { reports } => Up::Paths(proto::Paths {
            paths: reports
                .iter()
                .map(|report| proto::Path {
                    node: report.node.as_bytes().to_vec(),
                    bytes: report.bytes,
                    busy_us: report.busy.as_micros() as u64,
                    failures: report.failures,
                })
                .collect(),
        }),
        FromNode::Dropped { digest } => Up::Dropped(to_blob(digest)),
        FromNode::ParentFailed { digest, node } => Up::ParentFailed(proto::ParentFailed {
            digest: digest.as_bytes().to_vec(),
            node: node.as_bytes().to_vec(),
        }),
        FromNode::FalseClaim {
            digest,
            piece,
            claim,
            true_digest,
            relayer,
        } => Up::FalseClaim(proto::FalseClaim {
            digest: digest.as_bytes().to_vec(),
            piece: piece.0,
            claimed_digest: claim.piece_digest.0.to_vec(),
            author: claim.author.as_bytes().to_vec(),
            signature: claim.signature.to_vec(),
            true_digest: true_digest.0.to_vec(),
            relayer: relayer.as_bytes().to_vec(),
        }),
    };
    vec![from_node(kind)]
}

fn announcement(holdings: &[TaskReport], last: bool) -> Vec<proto::FromNode> {
    let mut batches: Vec<Vec<proto::Task>> = vec![Vec::new()];
    let mut runs = 0;
    for report in holdings {
        let own = report.held.len() + report.fetching.len();
        let is_full = batches.last().is_some_and(|batch| {
            !batch.is_empty()
                && (batch.len() >= TASKS_PER_MESSAGE_MAX || runs + own > RUNS_PER_MESSAGE)
        });
        if is_full {
            batches.push(Vec::new());
            runs = 0;
        }
        runs += own;
        if let Some(batch) = batches.last_mut() {
            batch.push(to_task(report));
        }
    }
    let count = batches.len();
    let numbered = batches.into_iter().enumerate();
    numbered
        .map(|(index, tasks)| {
            let last = last && index + 1 == count;
            from_node(Up::Announce(proto::Announce { tasks, last }))
        })
        .collect()
}

impl From<&ToNode> for proto::ToNode {
    fn from(message: &ToNode) -> Self {
        to_node(match message {
            ToNode::Parents { digest, peers } => Down::Parents(proto::Parents {
                digest: digest.as_bytes().to_vec(),
                peers: peers
                    .iter()
                    .map(|peer| proto::Peer {
                        node: peer.node.as_bytes().to_vec(),
                        address: peer.address.to_string(),
                        near: peer.near,
                    })
                    .collect(),
            }),
            ToNode::Lease {
                digest,
                pieces,
                expires_in,
            } => Down::Lease(proto::Lease {
                digest: digest.as_bytes().to_vec(),
                pieces: to_runs(&[*pieces]).pop(),
                expires_in_ms: expires_in.as_millis() as u64,
            }),
            ToNode::LeaseCut { digest, pieces } => Down::LeaseCut(proto::LeaseCut {
                digest: digest.as_bytes().to_vec(),
                pieces: to_runs(&[*pieces]).pop(),
            }),
            ToNode::LeaseWait {
                digest,
                retry_after,
                sharing_count,
            } => Down::LeaseWait(proto::LeaseWait {
                digest: digest.as_bytes().to_vec(),
                // Rounded up: a fraction of a millisecond is not "at once".
                retry_after_ms: retry_after.as_nanos().div_ceil(1_000_000) as u64,
                sharing_count: *sharing_count,
            }),
            ToNode::Opening { digest, granted } => Down::Opening(proto::Opening {
                digest: digest.as_bytes().to_vec(),
                granted: *granted,
            }),
            ToNode::ShutOut(nodes) => Down::ShutOut(proto::ShutOut {
                nodes: nodes.iter().map(|node| node.as_bytes().to_vec()).collect(),
            }),
            ToNode::Refused { digest, reason } => Down::Refused(proto::Refused {
                digest: digest.as_bytes().to_vec(),
                reason: match reason {
                    RefusedReason::Full => proto::refused::Reason::Full,
                    RefusedReason::Size => proto::refused::Reason::Size,
                    RefusedReason::UnknownTask => proto::refused::Reason::UnknownTask,
                    RefusedReason::ShutOut => proto::refused::Reason::ShutOut,
                    RefusedReason::Impossible => proto::refused::Reason::Impossible,
                }
                .into(),
            }),
        })
    }
}

/// What control says, as an event for the node; `None` for a heartbeat.
pub(crate) fn event(message: proto::ToNode) -> Result<Option<Event>, Malformed> {
    // A kind that this version does not know is no reason to leave.
    let Some(kind) = message.kind else {
        return Ok(None);
    };
    Ok(Some(match kind {
        Down::Heartbeat(_) => return Ok(None),
        Down::Parents(parents) => Event::Parents {
            digest: digest(&parents.digest)?,
            peers: parents
                .peers
                .iter()
                .map(|peer| {
                    Ok(Peer {
                        node: node(&peer.node)?,
                        address: peer
                            .address
                            .parse()
                            .map_err(|_| Malformed("a parent's address is no ip:port"))?,
                        near: peer.near,
                    })
                })
                .collect::<Result<_, _>>()?,
        },
        Down::Lease(lease) => Event::Lease {
            digest: digest(&lease.digest)?,
            pieces: lease
                .pieces
                .as_ref()
                .map(run)
                .ok_or(Malformed("a lease without pieces"))?,
            expires_in: Duration::from_millis(lease.expires_in_ms),
        },
        Down::LeaseCut(cut) => Event::LeaseCut {
            digest: digest(&cut.digest)?,
            pieces: cut
                .pieces
                .as_ref()
                .map(run)
                .ok_or(Malformed("a cut without pieces"))?,
        },
        Down::LeaseWait(wait) => Event::LeaseWait {
            digest: digest(&wait.digest)?,
            retry_after: Duration::from_millis(wait.retry_after_ms),
            sharing_count: wait.sharing_count,
        },
        Down::Opening(opening) => Event::Opening {
            digest: digest(&opening.digest)?,
            granted: opening.granted,
        },
        Down::ShutOut(list) => Event::ShutOut(
            list.nodes
                .iter()
                .map(|bytes| node(bytes))
                .collect::<Result<_, _>>()?,
        ),
        Down::Refused(refused) => Event::Refused {
            digest: digest(&refused.digest)?,
            reason: match refused.reason() {
                proto::refused::Reason::Size => RefusedReason::Size,
                proto::refused::Reason::UnknownTask => RefusedReason::UnknownTask,
                proto::refused::Reason::ShutOut => RefusedReason::ShutOut,
                proto::refused::Reason::Impossible => RefusedReason::Impossible,
                // A reason that this version does not know: the node goes on alone.
                proto::refused::Reason::Full | proto::refused::Reason::Unspecified => {
                    RefusedReason::Full
                }
            },
        },
    }))
}

#[cfg(test)]
mod tests;

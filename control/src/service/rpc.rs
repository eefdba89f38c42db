//! The three calls of the service.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use futures_util::Stream;
use pantala_wire::NodeId;
use parking_lot::Mutex;
use ring::signature::{ED25519, UnparsedPublicKey};
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tonic::{Request, Response, Status, Streaming};

use super::ServerConfig;
use super::driver::{Input, Outlet, SessionId};
use super::joins::FailedJoins;
use super::listener::PeerInfo;
use crate::authority::{Authority, proof_form};
use crate::convert::{self, Hello, Inbound};
use crate::core::{HostStatus, NodeInfo, TaskEstimate, ToNode};
use crate::proto;
use crate::proto::control_server::Control;

pub(super) struct Service {
    authority: Arc<Authority>,
    inputs: mpsc::Sender<Input>,
    failed_joins: Mutex<FailedJoins>,
    started: Instant,
    next_session: AtomicU64,
    liveness_timeout: Duration,
    outbound_max: usize,
}

fn stopping<E>(_: E) -> Status {
    Status::unavailable("control is stopping")
}

fn peer<T>(request: &Request<T>) -> Result<PeerInfo, Status> {
    request
        .extensions()
        .get::<PeerInfo>()
        .copied()
        .ok_or_else(|| Status::internal("a connection without an origin"))
}

fn member<T>(request: &Request<T>) -> Result<(NodeId, PeerInfo), Status> {
    let peer = peer(request)?;
    let node = peer.node.ok_or_else(|| {
        Status::unauthenticated("a node's certificate is needed; join the cluster first")
    })?;
    Ok((node, peer))
}

impl Service {
    pub(super) fn new(
        authority: Arc<Authority>,
        inputs: mpsc::Sender<Input>,
        config: &ServerConfig,
    ) -> Self {
        Self {
            authority,
            inputs,
            failed_joins: Mutex::new(FailedJoins::default()),
            started: Instant::now(),
            next_session: AtomicU64::new(1),
            liveness_timeout: config.liveness_timeout,
            outbound_max: config.outbound_max,
        }
    }

    fn admit(&self, request: &proto::JoinRequest) -> Result<NodeId, Status> {
        // One answer for a wrong secret and a wrong proof: the first must not be told apart.
        let refused = || Status::permission_denied("the join token is not valid here");
        if !self.authority.admits(&request.secret) {
            return Err(refused());
        }
        let node = NodeId::try_from(request.public_key.as_slice()).map_err(|_| refused())?;
        UnparsedPublicKey::new(&ED25519, node.as_bytes())
            .verify(
                &proof_form(node, self.authority.ca_certificate_der()),
                &request.proof,
            )
            .map_err(|_| refused())?;
        Ok(node)
    }
}

#[tonic::async_trait]
impl Control for Service {
    async fn join(
        &self,
        request: Request<proto::JoinRequest>,
    ) -> Result<Response<proto::JoinReply>, Status> {
        let address = peer(&request)?.address;
        let now = self.started.elapsed();
        if !self.failed_joins.lock().may_try(address.ip(), now) {
            return Err(Status::resource_exhausted(
                "too many failed joins from this address; wait a minute",
            ));
        }
        let node = self.admit(request.get_ref()).inspect_err(|_| {
            let count = self.failed_joins.lock().failed(address.ip(), now);
            if count.is_power_of_two() {
                tracing::warn!(%address, count, "join refused: wrong token");
            }
        })?;
        let certificate = self.authority.issue_node(node).map_err(|error| {
            tracing::error!(%error, "cannot issue a certificate");
            Status::internal("control cannot issue a certificate; see its log")
        })?;
        tracing::info!(node = %node.short(), %address, "certificate issued");
        Ok(Response::new(proto::JoinReply {
            certificate: certificate.to_vec(),
        }))
    }

    type SessionStream = Outbound;

    async fn session(
        &self,
        request: Request<Streaming<proto::FromNode>>,
    ) -> Result<Response<Outbound>, Status> {
        let (node, peer) = member(&request)?;
        let (messages, receiver) = mpsc::channel(self.outbound_max.max(1));
        let (end, ended) = oneshot::channel();
        let (beats, heartbeats) = mpsc::channel(1);
        let session = Session {
            node,
            peer,
            id: self.next_session.fetch_add(1, Ordering::Relaxed),
            stream: request.into_inner(),
            inputs: self.inputs.clone(),
            beats,
            liveness_timeout: self.liveness_timeout,
        };
        tokio::spawn(session.run(Outlet { messages, end }));
        Ok(Response::new(Outbound {
            messages: receiver,
            heartbeats,
            ended: Some(ended),
        }))
    }

    async fn status(
        &self,
        request: Request<proto::StatusRequest>,
    ) -> Result<Response<proto::StatusReply>, Status> {
        member(&request)?;
        let (reply, answer) = oneshot::channel();
        self.inputs
            .send(Input::Status(reply))
            .await
            .map_err(stopping)?;
        let (status, uptime) = answer.await.map_err(stopping)?;
        Ok(Response::new(proto::StatusReply {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            uptime_ms: uptime.as_millis() as u64,
            nodes: status.nodes as u32,
            tasks: status.tasks as u32,
            memberships: status.memberships as u32,
            leases: status.leases as u32,
            leases_granted: status.leases_granted,
            leases_expired: status.leases_expired,
            shut_out: status
                .shut_out
                .iter()
                .map(|node| node.as_bytes().to_vec())
                .collect(),
            demotions: status.demotions,
            absurd_reports: status.absurd_reports,
            leases_cut: status.leases_cut,
            forged_fetches: status.forged_fetches,
            impossible_runs: status.impossible_runs,
            refused_floods: status.refused_floods,
            hosts: status.hosts.into_iter().map(host_status).collect(),
            estimates: status.estimates.iter().map(estimate).collect(),
        }))
    }
}

fn host_status(host: HostStatus) -> proto::status_reply::Host {
    proto::status_reply::Host {
        name: host.name,
        leases: host.leases as u32,
        leases_max: host.leases_max as u32,
        leases_per_s_max: host.leases_per_s_max.unwrap_or(0.0),
        paused_for_ms: host.paused_for.as_millis() as u64,
    }
}

fn estimate(task: &TaskEstimate) -> proto::status_reply::Estimate {
    proto::status_reply::Estimate {
        digest: task.digest.as_bytes().to_vec(),
        size_bytes: task.size_bytes,
        wanted: task.wanted as u32,
        complete: task.complete as u32,
        missing_bytes: task.missing_bytes,
        bytes_per_s: task.bytes_per_s,
        completes_in_ms: task.completes_in.map(|left| left.as_millis() as u64),
    }
}

/// The half of a session that listens to the node.
struct Session {
    node: NodeId,
    peer: PeerInfo,
    id: SessionId,
    stream: Streaming<proto::FromNode>,
    inputs: mpsc::Sender<Input>,
    /// One answer to a heartbeat may wait; more say nothing new.
    beats: mpsc::Sender<()>,
    liveness_timeout: Duration,
}

impl Session {
    async fn run(mut self, outlet: Outlet) {
        let hello = match self.next().await {
            Ok(Inbound::Hello(hello)) => hello,
            Ok(_) => {
                let status = Status::invalid_argument("a session starts with its hello");
                outlet.end.send(status).ok();
                return;
            }
            Err(status) => {
                outlet.end.send(status).ok();
                return;
            }
        };
        let joined = Input::Joined {
            node: self.node,
            session: self.id,
            info: self.info(hello),
            outlet,
        };
        if self.inputs.send(joined).await.is_err() {
            return;
        }
        let status = loop {
            let message = match self.next().await {
                Ok(Inbound::Message(message)) => message,
                Ok(Inbound::Heartbeat) => {
                    self.beats.try_send(()).ok();
                    if self.beats.is_closed() {
                        break Status::cancelled("the session has ended");
                    }
                    continue;
                }
                Ok(Inbound::Hello(_)) => break Status::invalid_argument("a second hello"),
                Err(status) => break status,
            };
            let input = Input::Message {
                node: self.node,
                session: self.id,
                message,
            };
            // When the session has ended at the core's wish, nobody reads the other half any more.
            if self.beats.is_closed() || self.inputs.send(input).await.is_err() {
                break Status::cancelled("the session has ended");
            }
        };
        let left = Input::Left {
            node: self.node,
            session: self.id,
            status,
        };
        // With the core's task gone, there is nobody left to tell.
        self.inputs.send(left).await.ok();
    }

    async fn next(&mut self) -> Result<Inbound, Status> {
        let message = tokio::select! {
            message = timeout(self.liveness_timeout, self.stream.message()) => message,
            () = self.beats.closed() => return Err(Status::cancelled("the session has ended")),
        };
        match message {
            Err(_) => Err(Status::deadline_exceeded(
                "the node has been silent too long",
            )),
            Ok(Err(status)) => Err(status),
            Ok(Ok(None)) => Err(Status::ok("the node has ended the session")),
            Ok(Ok(Some(message))) => Inbound::try_from(message)
                .map_err(|error| Status::invalid_argument(error.to_string())),
        }
    }

    fn info(&self, hello: Hello) -> NodeInfo {
        let mut address = hello.advertise;
        if address.ip().is_unspecified() {
            address.set_ip(self.peer.address.ip().to_canonical());
        }
        NodeInfo {
            address,
            labels: hello.labels,
            resumed: hello.resumed,
            uplink_bytes_per_s: hello.uplink_bytes_per_s,
            is_seed: hello.is_seed,
        }
    }
}

/// The half of a session that speaks to the node. When it is dropped, the other half ends too.
pub(super) struct Outbound {
    messages: mpsc::Receiver<ToNode>,
    heartbeats: mpsc::Receiver<()>,
    /// `None` once the stream has ended.
    ended: Option<oneshot::Receiver<Status>>,
}

impl Stream for Outbound {
    type Item = Result<proto::ToNode, Status>;

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        let Some(ended) = &mut self.ended else {
            return Poll::Ready(None);
        };
        // The end goes before what still waits: a node that reads too slowly shall not hold it up.
        if let Poll::Ready(status) = Pin::new(ended).poll(cx) {
            self.ended = None;
            self.heartbeats.close();
            let status = status.unwrap_or_else(stopping);
            return Poll::Ready(Some(Err(status)));
        }
        if let Poll::Ready(Some(())) = self.heartbeats.poll_recv(cx) {
            let beat = proto::to_node::Kind::Heartbeat(proto::Heartbeat {});
            return Poll::Ready(Some(Ok(convert::to_node(beat))));
        }
        match self.messages.poll_recv(cx) {
            Poll::Ready(Some(message)) => Poll::Ready(Some(Ok((&message).into()))),
            // Senders go only together with the end, which is polled first.
            Poll::Ready(None) | Poll::Pending => Poll::Pending,
        }
    }
}

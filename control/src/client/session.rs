//! Connects, runs one session after another, and waits between them.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use futures_util::FutureExt;
use pantala_wire::NodeId;
use tokio::sync::mpsc;
use tokio::time::{Instant, interval, sleep, sleep_until, timeout};
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use super::{ClientConfig, Command, Event, Shared, channel};
use crate::convert;
use crate::proto;
use crate::proto::control_client::ControlClient;
use crate::proto::from_node::Kind;

/// Messages handed to the connection that have not gone out; behind it, commands wait in their queue.
const OUTBOUND_MAX: usize = 32;
/// The wait after the first failed attempt; it doubles with each that follows.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// The longest wait: a cluster is back within seconds of its control.
const BACKOFF_MAX: Duration = Duration::from_secs(5);

/// How long a session that has ended is listened to for the reason.
const LAST_WORDS_TIMEOUT: Duration = Duration::from_secs(1);

/// Why a session ended.
enum End {
    /// The node has stopped.
    Node,
    /// Anything else, for people.
    Lost(String),
}

pub(super) async fn run(
    config: ClientConfig,
    mut commands: mpsc::Receiver<Command>,
    events: mpsc::Sender<Event>,
    shared: Arc<Shared>,
) {
    let mut failures = 0;
    let mut resumed = false;
    let mut has_told = false;
    loop {
        let started = tokio::select! {
            started = start(&config, resumed) => started,
            () = stopped(&mut commands, &events) => return,
        };
        let reason = match started {
            Err(reason) => {
                tracing::debug!(
                    address = config.address,
                    reason,
                    failures,
                    "no session with control"
                );
                reason
            }
            Ok((outbound, inbound)) => {
                // What was queued for the session before is in the announcement that comes now.
                while commands.try_recv().is_ok() {}
                shared.overflow.notified().now_or_never();
                shared.connected.store(true, Ordering::Release);
                tracing::info!(address = config.address, "session with control");
                let session = Session {
                    config: &config,
                    outbound,
                    inbound,
                    pending: VecDeque::new(),
                    events: VecDeque::from([Event::Connected]),
                };
                let end = session.run(&mut commands, &events, &shared).await;
                shared.connected.store(false, Ordering::Release);
                resumed = true;
                has_told = false;
                failures = 0;
                match end {
                    End::Node => return,
                    End::Lost(reason) => {
                        tracing::warn!(
                            address = config.address,
                            reason,
                            "session with control lost"
                        );
                        reason
                    }
                }
            }
        };
        if !std::mem::replace(&mut has_told, true)
            && events.send(Event::Disconnected { reason }).await.is_err()
        {
            return;
        }
        tokio::select! {
            () = sleep(backoff(config.identity.node_id(), failures)) => {}
            () = stopped(&mut commands, &events) => return,
        }
        failures = failures.saturating_add(1);
    }
}

/// Ends when the node has let go of the client. Commands that come meanwhile are too late or too
/// early, and dropped.
async fn stopped(commands: &mut mpsc::Receiver<Command>, events: &mpsc::Sender<Event>) {
    tokio::select! {
        () = async { while commands.recv().await.is_some() {} } => {}
        () = events.closed() => {}
    }
}

/// The wait after this many failures: doubling to its cap, and between half and all of it, so that
/// the nodes of a cluster do not come back all at once.
fn backoff(node: NodeId, failures: u32) -> Duration {
    let full = BACKOFF_MIN
        .saturating_mul(1 << failures.min(16))
        .min(BACKOFF_MAX);
    let mut bytes = [0; 8];
    bytes.copy_from_slice(&node.as_bytes()[..8]);
    let mixed =
        (u64::from_le_bytes(bytes) ^ u64::from(failures)).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    full / 2 + (full / 2).mul_f64(mixed as f64 / f64::from(u32::MAX))
}

type Streams = (mpsc::Sender<proto::FromNode>, Streaming<proto::ToNode>);

async fn start(config: &ClientConfig, resumed: bool) -> Result<Streams, String> {
    let identity = &config.identity;
    let ca = identity.ca_certificate_der();
    let channel = channel::connect(&config.address, ca, Some(identity))
        .await
        .map_err(|error| error.to_string())?;
    let (outbound, stream) = mpsc::channel(OUTBOUND_MAX);
    let hello = proto::Hello {
        advertise: config.advertise_addr.to_string(),
        host: config.labels.host.clone(),
        rack: config.labels.rack.clone(),
        zone: config.labels.zone.clone(),
        resumed,
        uplink_bytes_per_s: config.uplink_bytes_per_s.unwrap_or(0),
        seed: config.is_seed,
    };
    // There is room: nothing else is in the queue yet.
    outbound
        .try_send(convert::from_node(Kind::Hello(hello)))
        .ok();
    let inbound = timeout(
        config.liveness_timeout,
        ControlClient::new(channel)
            .max_decoding_message_size(convert::MESSAGE_SIZE_MAX)
            .max_encoding_message_size(convert::MESSAGE_SIZE_MAX)
            .session(ReceiverStream::new(stream)),
    )
    .await
    .map_err(|_| format!("control at {} does not answer", config.address))?
    .map_err(|status| said(&config.address, &status))?;
    Ok((outbound, inbound.into_inner()))
}

fn said(address: &str, status: &tonic::Status) -> String {
    format!("control at {address}: {}", status.message())
}

struct Session<'a> {
    config: &'a ClientConfig,
    outbound: mpsc::Sender<proto::FromNode>,
    inbound: Streaming<proto::ToNode>,
    /// Messages made from commands, that wait for the connection.
    pending: VecDeque<proto::FromNode>,
    /// Events that wait for the node; while there is one, nothing more is read.
    events: VecDeque<Event>,
}

impl Session<'_> {
    async fn run(
        mut self,
        commands: &mut mpsc::Receiver<Command>,
        events: &mpsc::Sender<Event>,
        shared: &Shared,
    ) -> End {
        let mut beat = interval(self.config.heartbeat_interval);
        let mut heard = Instant::now();
        loop {
            let silent_until = heard + self.config.liveness_timeout;
            tokio::select! {
                permit = events.reserve(), if !self.events.is_empty() => {
                    let (Ok(permit), Some(event)) = (permit, self.events.pop_front()) else {
                        return End::Node;
                    };
                    permit.send(event);
                    heard = Instant::now();
                }
                message = self.inbound.message(), if self.events.is_empty() => {
                    heard = Instant::now();
                    match message {
                        Ok(Some(message)) => match convert::event(message) {
                            Ok(event) => self.events.extend(event),
                            Err(error) => return End::Lost(error.to_string()),
                        },
                        Ok(None) => return End::Lost("control has ended the session".to_owned()),
                        Err(status) => return End::Lost(said(&self.config.address, &status)),
                    }
                }
                () = sleep_until(silent_until) => {
                    let silent = if self.events.is_empty() { "control says" } else { "the node takes" };
                    return End::Lost(format!("{silent} nothing for too long"));
                }
                permit = self.outbound.reserve(), if !self.pending.is_empty() => {
                    let Ok(permit) = permit else { break };
                    if let Some(message) = self.pending.pop_front() {
                        permit.send(message);
                    }
                }
                command = commands.recv(), if self.pending.is_empty() => match command {
                    Some(command) => self.pending.extend(convert::commands(&command)),
                    None => return End::Node,
                },
                _ = beat.tick(), if self.pending.is_empty() => {
                    let beat = Kind::Heartbeat(proto::Heartbeat {});
                    self.pending.push_back(convert::from_node(beat));
                }
                () = shared.overflow.notified() => {
                    return End::Lost("control takes commands too slowly".to_owned());
                }
                () = events.closed() => return End::Node,
            }
        }
        End::Lost(self.last_words().await)
    }

    /// What control says at the end of a session that it has ended; what else it sent is void now.
    async fn last_words(&mut self) -> String {
        let words = async {
            loop {
                match self.inbound.message().await {
                    Ok(Some(_)) => {}
                    Ok(None) => return "control has ended the session".to_owned(),
                    Err(status) => return said(&self.config.address, &status),
                }
            }
        };
        timeout(LAST_WORDS_TIMEOUT, words)
            .await
            .unwrap_or_else(|_| "the connection to control is gone".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_wait_grows_to_its_cap_and_differs_between_nodes() {
        let a = NodeId::new([1; 32]);
        let b = NodeId::new([2; 32]);
        assert!(backoff(a, 0) >= BACKOFF_MIN / 2);
        for failures in 0..100 {
            assert!(backoff(a, failures) <= BACKOFF_MAX);
            assert_eq!(backoff(a, failures), backoff(a, failures));
        }
        assert!(backoff(a, 50) >= BACKOFF_MAX / 2);
        assert_ne!(backoff(a, 50), backoff(b, 50));
    }
}

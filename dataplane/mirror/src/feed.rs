//! The sending side of a connection to a client on this machine.
//!
//! Between such a client and this process there is no network: what costs is the copying, twice a byte,
//! and it is cheap while the bytes stay in the cache between one copy and the other. So little is kept
//! in flight, none of it paced, and many clients are fed in turn ([`crate::turns`]).

use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::task::{Context, Poll, ready};

use parking_lot::Mutex;
use rustix::net::sockopt;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::TcpStream;
use tokio::time::{Instant, Sleep};

use crate::turns::{Answer, TurnTable, Who};

/// What a client is sent in one turn: enough that waking another client costs little beside it, and
/// 64 clients come round within a tenth of a second.
pub(crate) const TURN_BYTES: u64 = 4 << 20;
/// The start of a connection's every reply is sent without waiting for a turn, so that small reads never do.
const FREE_BYTES: u64 = 256 << 10;
/// What a client is sent without turns after it has lost one because it takes its bytes slowly: it
/// would only keep others waiting. Twice as much each time, up to the second number, so that a slow
/// client loses next to nothing by the turns it tries.
const SLOW_BYTES: u64 = 4 << 20;
const SLOW_BYTES_MAX: u64 = 1 << 30;
/// Buffers from this size on are sent one by one: they fill the socket, and tokio sees that from the
/// result of a plain write, where it would need another system call after a vectored one.
const ALONE_BYTES_MIN: usize = 2 * SEND_BUFFER_BYTES;
/// What the kernel may keep for a client on this machine (it doubles the number for its bookkeeping).
/// Two segments of 64 KiB: one that the client copies out while the next is copied in. Half of it
/// stops the flow altogether; more only leaves the cache.
const SEND_BUFFER_BYTES: usize = 128 << 10;
/// Congestion control where nothing can congest. The default may pace what it sends (BBR does), which
/// costs a timer for every few packets. This one is part of every kernel and free to be chosen.
const CONGESTION_CONTROL: &str = "reno";

/// The turns of all clients of one mirror.
#[derive(Clone)]
pub(crate) struct Turns {
    table: Arc<Mutex<TurnTable>>,
    next_who: Arc<AtomicU64>,
}

impl Turns {
    /// As many turns as threads that can send at once.
    pub(crate) fn new() -> Self {
        let turns_max = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        Self {
            table: Arc::new(Mutex::new(TurnTable::new(turns_max))),
            next_who: Arc::default(),
        }
    }
}

/// Whether the client of this connection runs on this machine.
pub(crate) fn is_local(client: SocketAddr, own: SocketAddr) -> bool {
    let client = client.ip().to_canonical();
    client.is_loopback() || client == own.ip().to_canonical()
}

/// Prepares the socket of a client on this machine. What the system refuses costs speed only.
pub(crate) fn tune(stream: &TcpStream) {
    if let Err(error) = sockopt::set_socket_send_buffer_size(stream, SEND_BUFFER_BYTES) {
        tracing::debug!(%error, "a local client's send buffer stays as it is");
    }
    if let Err(error) = sockopt::set_tcp_congestion(stream, CONGESTION_CONTROL) {
        tracing::debug!(%error, "a local client's congestion control stays as it is");
    }
}

/// A stream, with its turns where its client is on this machine.
pub(crate) struct Feed<S> {
    inner: S,
    line: Option<Line>,
}

/// One client's place among those that take turns.
struct Line {
    turns: Turns,
    who: Who,
    place: Option<u64>,
    /// Bytes that may be sent without a turn.
    free_bytes: u64,
    /// Bytes left of the turn, where it has one.
    turn_bytes: Option<u64>,
    /// What it is sent without turns when it loses one.
    slow_bytes: u64,
    timer: Option<Pin<Box<Sleep>>>,
}

impl Drop for Line {
    fn drop(&mut self) {
        self.turns.table.lock().leave(self.who, &mut self.place);
    }
}

impl Line {
    /// Ready when something may be sent.
    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if self.free_bytes > 0 || self.turn_bytes.is_some() {
            return Poll::Ready(());
        }
        loop {
            let now = Instant::now();
            let answer = self
                .turns
                .table
                .lock()
                .ask(self.who, &mut self.place, now, cx.waker());
            let until = match answer {
                Answer::Turn => {
                    self.turn_bytes = Some(TURN_BYTES);
                    return Poll::Ready(());
                }
                Answer::Late => {
                    self.free_bytes = FREE_BYTES;
                    return Poll::Ready(());
                }
                Answer::Wait(None) => return Poll::Pending,
                Answer::Wait(Some(until)) => until,
            };
            match &mut self.timer {
                Some(timer) => timer.as_mut().reset(until),
                None => self.timer = Some(Box::pin(tokio::time::sleep_until(until))),
            }
            if let Some(timer) = &mut self.timer {
                ready!(timer.as_mut().poll(cx));
            }
        }
    }

    fn sent(&mut self, bytes: u64) {
        self.free_bytes = self.free_bytes.saturating_sub(bytes);
        let Some(left) = self.turn_bytes else {
            return;
        };
        let mut table = self.turns.table.lock();
        if !table.fed(self.who, Instant::now()) {
            self.turn_bytes = None;
            self.free_bytes = self.slow_bytes;
            self.slow_bytes = (2 * self.slow_bytes).min(SLOW_BYTES_MAX);
            return;
        }
        self.turn_bytes = left.checked_sub(bytes).filter(|left| *left > 0);
        if self.turn_bytes.is_none() {
            self.slow_bytes = SLOW_BYTES;
            table.leave(self.who, &mut self.place);
        }
    }

    /// A request came: its reply starts at once.
    fn asked(&mut self) {
        self.free_bytes = self.free_bytes.max(FREE_BYTES);
    }
}

impl<S> Feed<S> {
    pub(crate) fn new(inner: S, turns: Option<&Turns>) -> Self {
        let line = turns.map(|turns| Line {
            who: turns.next_who.fetch_add(1, Ordering::Relaxed),
            turns: turns.clone(),
            place: None,
            free_bytes: FREE_BYTES,
            turn_bytes: None,
            slow_bytes: SLOW_BYTES,
            timer: None,
        });
        Self { inner, line }
    }

    fn poll_turn(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        match &mut self.line {
            Some(line) => line.poll_turn(cx),
            None => Poll::Ready(()),
        }
    }

    fn sent(&mut self, written: Poll<io::Result<usize>>) -> Poll<io::Result<usize>> {
        if let (Some(line), Poll::Ready(Ok(bytes))) = (&mut self.line, &written) {
            line.sent(*bytes as u64);
        }
        written
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Feed<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        let read = Pin::new(&mut self.inner).poll_read(cx, buf);
        if let (Some(line), true) = (&mut self.line, buf.filled().len() > before) {
            line.asked();
        }
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Feed<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &[u8],
    ) -> Poll<io::Result<usize>> {
        ready!(self.poll_turn(cx));
        let written = Pin::new(&mut self.inner).poll_write(cx, buf);
        self.sent(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        bufs: &[io::IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        if let [first, ..] = bufs
            && (bufs.len() == 1 || first.len() >= ALONE_BYTES_MIN)
        {
            return self.poll_write(cx, first);
        }
        ready!(self.poll_turn(cx));
        let written = Pin::new(&mut self.inner).poll_write_vectored(cx, bufs);
        self.sent(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.inner).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    use tokio::time::timeout;

    use super::*;
    use crate::turns::WAIT_MAX;

    fn turns(turns_max: usize) -> Turns {
        Turns {
            table: Arc::new(Mutex::new(TurnTable::new(turns_max))),
            next_who: Arc::default(),
        }
    }

    const PIPE_BYTES: usize = 64 << 10;
    const REPLY_BYTES: usize = 12 << 20;

    #[test]
    fn who_is_on_this_machine() {
        let is = |client: &str, own: &str| {
            is_local(
                SocketAddr::new(client.parse().unwrap(), 1),
                SocketAddr::new(own.parse().unwrap(), 2),
            )
        };
        assert!(is("127.0.0.1", "127.0.0.1"));
        assert!(is("::ffff:127.0.0.9", "::ffff:127.0.0.1"));
        assert!(is("::1", "::1"));
        assert!(is("10.1.2.3", "::ffff:10.1.2.3"));
        assert!(!is("10.1.2.4", "10.1.2.3"));
    }

    #[tokio::test(start_paused = true)]
    async fn many_clients_on_one_turn_all_get_everything() {
        let turns = turns(1);
        let mut clients = Vec::new();
        for number in 0..16_u8 {
            let (near, mut far) = tokio::io::duplex(PIPE_BYTES);
            let mut feed = Feed::new(near, Some(&turns));
            let sender = tokio::spawn(async move {
                feed.write_all(&vec![number; REPLY_BYTES]).await.unwrap();
            });
            clients.push(tokio::spawn(async move {
                let mut got = Vec::new();
                far.read_to_end(&mut got).await.unwrap();
                sender.await.unwrap();
                assert!(got == vec![number; REPLY_BYTES]);
            }));
        }
        for client in clients {
            client.await.unwrap();
        }
        assert!(!turns.table.lock().is_used());
    }

    #[tokio::test(start_paused = true)]
    async fn clients_that_do_not_read_or_are_gone_keep_nobody_from_being_fed() {
        let turns = turns(1);
        let mut stuck = Vec::new();
        for _ in 0..8 {
            let (near, far) = tokio::io::duplex(PIPE_BYTES + FREE_BYTES as usize);
            let mut feed = Feed::new(near, Some(&turns));
            stuck.push((
                far,
                tokio::spawn(async move {
                    let _cut = feed.write_all(&vec![0; REPLY_BYTES]).await;
                }),
            ));
        }
        tokio::task::yield_now().await;
        let gone = stuck.pop().unwrap();
        gone.1.abort();
        let (near, mut far) = tokio::io::duplex(PIPE_BYTES);
        let mut feed = Feed::new(near, Some(&turns));
        let sender = tokio::spawn(async move { feed.write_all(&vec![1; REPLY_BYTES]).await });
        let mut got = Vec::new();
        // Paused time goes on only when nobody has anything to do.
        let limit = WAIT_MAX * (1 + REPLY_BYTES as u32 / FREE_BYTES as u32);
        timeout(limit, far.read_to_end(&mut got))
            .await
            .unwrap()
            .unwrap();
        sender.await.unwrap().unwrap();
        assert_eq!(got.len(), REPLY_BYTES);
    }

    #[tokio::test(start_paused = true)]
    async fn the_start_of_every_reply_goes_out_at_once() {
        let turns = turns(1);
        let (near, _far) = tokio::io::duplex(PIPE_BYTES);
        let mut other = Feed::new(near, Some(&turns));
        let _stuck = tokio::spawn(async move { other.write_all(&vec![0; REPLY_BYTES]).await });
        let (near, mut far) = tokio::io::duplex(2 * FREE_BYTES as usize);
        let mut feed = Feed::new(near, Some(&turns));
        for _ in 0..3 {
            far.write_all(b"GET").await.unwrap();
            feed.read_exact(&mut [0; 3]).await.unwrap();
            let start = Instant::now();
            feed.write_all(&vec![1; FREE_BYTES as usize]).await.unwrap();
            assert_eq!(start.elapsed(), Duration::ZERO);
            far.read_exact(&mut vec![0; FREE_BYTES as usize])
                .await
                .unwrap();
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_client_elsewhere_takes_no_turns() {
        let (near, mut far) = tokio::io::duplex(PIPE_BYTES);
        let mut feed = Feed::new(near, None);
        let sender = tokio::spawn(async move { feed.write_all(&vec![7; REPLY_BYTES]).await });
        let mut got = Vec::new();
        far.read_to_end(&mut got).await.unwrap();
        sender.await.unwrap().unwrap();
        assert!(got == vec![7; REPLY_BYTES]);
    }
}

//! What is said on streams arrives whole, in order of urgency, or fails for what it is.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use super::cluster::{Authority, Noise, connect, limits, soon};
use bytes::Bytes;
use pantala_quic::{Blame, Connection, Error, Limits, RecvStream, SendStream};
use pantala_wire::Priority;
use pantala_wire::frame::{FRAME_SIZE_MAX, FrameError};
use pantala_wire::message::{Fetch, Have, Request, Response, request, response};

/// Endpoints are returned too: dropped, they would close the connection.
async fn pair(limits: Limits) -> (Connection, Connection, impl Drop) {
    let authority = Authority::new();
    let (a, b) = (
        authority.node_with(limits.clone()),
        authority.node_with(limits),
    );
    let (here, there) = soon(connect(&a, &b)).await;
    (here, there, Keep((a, b)))
}

struct Keep<T>(#[allow(dead_code, reason = "held, not read")] T);
impl<T> Drop for Keep<T> {
    fn drop(&mut self) {}
}

fn request(piece: u32) -> Request {
    Request {
        digest: Bytes::from_static(&[3; 32]),
        kind: Some(request::Kind::Fetch(Fetch {
            piece,
            ..Fetch::default()
        })),
    }
}

fn piece_of(request: &Request) -> u32 {
    match &request.kind {
        Some(request::Kind::Fetch(fetch)) => fetch.piece,
        other => panic!("{other:?}"),
    }
}

fn have(piece: u32) -> Response {
    Response {
        kind: Some(response::Kind::Have(Have {
            runs: vec![piece, 1],
            ..Have::default()
        })),
    }
}

/// A stream as both sides see it, after one byte of greeting, which is read.
async fn open_both(
    here: &Connection,
    there: &Connection,
) -> ((SendStream, RecvStream), (SendStream, RecvStream)) {
    let mut ours = here.open(Priority::Bulk).await.unwrap();
    ours.0.write_bytes(Bytes::from_static(b"!")).await.unwrap();
    let mut theirs = there.accept().await.unwrap();
    theirs.1.read_exact_into(&mut [0]).await.unwrap();
    (ours, theirs)
}

#[tokio::test]
async fn a_request_is_answered_with_a_frame_and_raw_bytes() {
    let (here, there, _keep) = pair(limits()).await;
    let body = Noise(5).bytes(1 << 20);
    let sent = body.clone();
    let server = tokio::spawn(async move {
        let (mut send, mut recv) = there.accept().await.unwrap();
        let request: Request = recv.read_frame().await.unwrap().unwrap();
        assert!(recv.read_frame::<Request>().await.unwrap().is_none());
        send.write_frame(&have(piece_of(&request))).await.unwrap();
        send.write_bytes(sent.into()).await.unwrap();
        send.finish().unwrap();
        send.delivered().await.unwrap();
    });
    let (mut send, mut recv) = here.open(Priority::Client).await.unwrap();
    send.write_frame(&request(9)).await.unwrap();
    send.finish().unwrap();
    assert_eq!(soon(recv.read_frame()).await, Ok(Some(have(9))));
    let mut start = vec![0; 1000];
    soon(recv.read_exact_into(&mut start)).await.unwrap();
    let mut got = start;
    while let Some(chunk) = soon(recv.read_chunk(70_000)).await.unwrap() {
        assert!(!chunk.is_empty() && chunk.len() <= 70_000);
        got.extend_from_slice(&chunk);
    }
    assert!(got == body);
    soon(server).await.unwrap();
}

#[tokio::test]
async fn a_frame_that_lies_about_its_length_is_refused_at_once() {
    let (here, there, _keep) = pair(limits()).await;
    let (mut ours, mut theirs) = soon(open_both(&here, &there)).await;
    // The sender keeps the stream open: the reader must not wait for bytes that never come.
    ours.0
        .write_bytes(Bytes::from_static(&[0xff, 0xff, 0xff, 0xff, 1, 2]))
        .await
        .unwrap();
    let error = soon(theirs.1.read_frame::<Request>()).await.unwrap_err();
    assert_eq!(error, Error::Frame(FrameError::TooLarge(u32::MAX as usize)));
    assert_eq!(error.blame(), Blame::Peer);
    assert!(!error.is_retryable() && !error.is_connection_lost());
}

#[tokio::test]
async fn a_frame_shorter_than_it_says_or_of_garbage_is_an_error() {
    let (here, there, _keep) = pair(limits()).await;
    for (bytes, expected) in [
        (&[0u8, 0, 0][..], Some(Error::Truncated(1))),
        (&[0, 0, 0, 9, 1, 2], Some(Error::Truncated(7))),
        (&[0, 0, 0, 3, 0xff, 0xff, 0xff], None),
    ] {
        let (mut ours, mut theirs) = soon(open_both(&here, &there)).await;
        ours.0.write_bytes(bytes.into()).await.unwrap();
        ours.0.finish().unwrap();
        let error = soon(theirs.1.read_frame::<Request>()).await.unwrap_err();
        match expected {
            Some(expected) => assert_eq!(error, expected),
            None => assert!(matches!(error, Error::Frame(FrameError::Malformed(_)))),
        }
    }
}

#[tokio::test]
async fn a_message_larger_than_a_frame_is_not_sent() {
    let (here, there, _keep) = pair(limits()).await;
    let (mut ours, _theirs) = soon(open_both(&here, &there)).await;
    let large = Have {
        runs: vec![u32::MAX; FRAME_SIZE_MAX],
        ..Have::default()
    };
    let error = ours.0.write_frame(&large).await.unwrap_err();
    assert!(matches!(error, Error::MessageTooLarge(_)));
    assert_eq!(error.blame(), Blame::Local);
}

#[tokio::test]
async fn reading_a_frame_may_be_abandoned_and_taken_up_again() {
    let (here, there, _keep) = pair(limits()).await;
    let (mut ours, mut theirs) = soon(open_both(&here, &there)).await;
    let frame = pantala_wire::frame::encode(&request(77));
    for byte in &frame[..frame.len() - 1] {
        ours.0
            .write_bytes(Bytes::copy_from_slice(&[*byte]))
            .await
            .unwrap();
        let wait = Duration::from_millis(2);
        let abandoned = tokio::time::timeout(wait, theirs.1.read_frame::<Request>()).await;
        assert!(abandoned.is_err());
    }
    ours.0
        .write_bytes(frame.slice(frame.len() - 1..))
        .await
        .unwrap();
    assert_eq!(soon(theirs.1.read_frame()).await, Ok(Some(request(77))));
}

#[tokio::test]
async fn an_answer_that_is_dropped_halfway_never_looks_complete() {
    let (here, there, _keep) = pair(limits()).await;
    let (mut ours, mut theirs) = soon(open_both(&here, &there)).await;
    theirs
        .0
        .write_bytes(Bytes::from_static(b"half"))
        .await
        .unwrap();
    drop(theirs.0);
    let error = loop {
        match soon(ours.1.read_chunk(100)).await {
            Ok(Some(_)) => {}
            Ok(None) => panic!("looks complete"),
            Err(error) => break error,
        }
    };
    assert_eq!(error, Error::StreamReset);
    assert!(error.is_retryable() && !error.is_connection_lost());
}

#[tokio::test]
async fn a_sender_learns_that_nobody_listens_any_more() {
    let (here, there, _keep) = pair(limits()).await;
    let (mut ours, theirs) = soon(open_both(&here, &there)).await;
    drop(theirs.1);
    let block = Bytes::from(vec![0; 64 << 10]);
    let error = soon(async {
        loop {
            if let Err(error) = ours.0.write_bytes(block.clone()).await {
                break error;
            }
        }
    })
    .await;
    assert_eq!(error, Error::StreamStopped);
    assert_eq!(ours.0.delivered().await, Err(Error::StreamStopped));
    // A stream that is over says so, and the connection goes on.
    ours.0.reset();
    assert_eq!(ours.0.finish(), Err(Error::StreamClosed));
    soon(open_both(&here, &there)).await;
}

#[tokio::test]
async fn nobody_reading_stops_the_sender_within_the_windows() {
    let limits = limits();
    let (here, there, _keep) = pair(limits.clone()).await;
    let (mut ours, theirs) = soon(open_both(&here, &there)).await;
    let block = Bytes::from(vec![0; 64 << 10]);
    let mut written = 0u64;
    while tokio::time::timeout(
        Duration::from_millis(500),
        ours.0.write_bytes(block.clone()),
    )
    .await
    .is_ok()
    {
        written += block.len() as u64;
        assert!(
            written
                <= u64::from(limits.stream_receive_window_bytes)
                    + limits.connection_send_window_bytes
        );
    }
    // The last block was cut short by the greeting.
    assert!(written + 2 * block.len() as u64 >= u64::from(limits.stream_receive_window_bytes));
    // Another stream is not held up by it.
    soon(open_both(&here, &there)).await;
    drop(theirs);
}

/// Answers every request with 64 KiB of the piece's number, at the request's own urgency.
async fn serve(connection: Connection) {
    while let Ok((mut send, mut recv)) = connection.accept().await {
        tokio::spawn(async move {
            let request: Request = recv.read_frame().await.unwrap().unwrap();
            let piece = piece_of(&request);
            send.write_frame(&have(piece)).await.unwrap();
            send.write_bytes(vec![piece as u8; 64 << 10].into())
                .await
                .unwrap();
            send.finish().unwrap();
        });
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_more_requests_than_streams_are_all_answered() {
    let limits = Limits {
        streams_per_connection_max: 16,
        ..limits()
    };
    let (here, there, _keep) = pair(limits).await;
    let server = tokio::spawn(serve(there));
    let mut clients = tokio::task::JoinSet::new();
    for number in 0..1000u32 {
        let here = here.clone();
        clients.spawn(async move {
            let (mut send, mut recv) = here.open(Priority::Bulk).await.unwrap();
            send.write_frame(&request(number)).await.unwrap();
            send.finish().unwrap();
            assert_eq!(recv.read_frame().await, Ok(Some(have(number))));
            let mut body = vec![0; 64 << 10];
            recv.read_exact_into(&mut body).await.unwrap();
            assert!(body.iter().all(|b| *b == number as u8));
            assert_eq!(recv.read_chunk(1).await, Ok(None));
        });
    }
    soon(clients.join_all()).await;
    let (ours, theirs) = (here.stats(), 64_000_000);
    assert!(ours.received_bytes > theirs, "{ours:?}");
    assert!(ours.sent_bytes > 0 && ours.sent_packets > 0 && ours.cwnd > 0);
    assert!(ours.rtt > Duration::ZERO);
    server.abort();
}

/// Bytes of bulk that arrive between the moment the answer to a page fault is at hand and its end, the
/// median of many: the scheduler of a busy machine may hold back a single one.
async fn bulk_bytes_ahead_of_a_fault(bulk_streams: u32) -> u64 {
    let (here, there, _keep) = pair(Limits {
        connection_send_window_bytes: IN_FLIGHT_MAX,
        ..limits()
    })
    .await;
    let arrived = Arc::new(AtomicU64::new(0));
    let at_answer = Arc::new(AtomicU64::new(0));
    let (counter, mark) = (arrived.clone(), at_answer.clone());
    let server = tokio::spawn(async move {
        while let Ok((mut send, mut recv)) = there.accept().await {
            let (counter, mark) = (counter.clone(), mark.clone());
            tokio::spawn(async move {
                let request: Request = recv.read_frame().await.unwrap().unwrap();
                let block = Bytes::from(vec![0; 64 << 10]);
                if piece_of(&request) == 0 {
                    send.set_priority(Priority::Fault);
                    mark.store(counter.load(Ordering::Relaxed), Ordering::Relaxed);
                    send.write_bytes(block).await.unwrap();
                    send.finish().unwrap();
                } else {
                    send.set_priority(Priority::Bulk);
                    // Without end: it stops with the reader.
                    while send.write_bytes(block.clone()).await.is_ok() {}
                }
            });
        }
    });
    let mut bulk = tokio::task::JoinSet::new();
    for number in 1..=bulk_streams {
        let (mut send, mut recv) = here.open(Priority::Bulk).await.unwrap();
        send.write_frame(&request(number)).await.unwrap();
        send.finish().unwrap();
        let arrived = arrived.clone();
        bulk.spawn(async move {
            while let Ok(Some(chunk)) = recv.read_chunk(64 << 10).await {
                arrived.fetch_add(chunk.len() as u64, Ordering::Relaxed);
            }
        });
    }
    soon(async {
        while arrived.load(Ordering::Relaxed) < 16 << 20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    })
    .await;
    let mut ahead = Vec::new();
    for _ in 0..31 {
        let (mut send, mut recv) = here.open(Priority::Fault).await.unwrap();
        send.write_frame(&request(0)).await.unwrap();
        send.finish().unwrap();
        soon(recv.read_exact_into(&mut vec![0; 64 << 10]))
            .await
            .unwrap();
        ahead.push(arrived.load(Ordering::Relaxed) - at_answer.load(Ordering::Relaxed));
    }
    server.abort();
    ahead.sort_unstable();
    eprintln!("bytes of {bulk_streams} bulk streams ahead of a fault: {ahead:?}");
    ahead[ahead.len() / 2]
}

/// What bulk may have on the way when a page fault is answered.
const IN_FLIGHT_MAX: u64 = 512 << 10;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_page_fault_overtakes_bulk_that_is_not_on_the_way_yet() {
    for bulk_streams in [1, 16, 64] {
        let ahead = bulk_bytes_ahead_of_a_fault(bulk_streams).await;
        // Without priority it would wait for ever: the bulk streams have no end.
        assert!(
            ahead <= 4 * IN_FLIGHT_MAX,
            "{ahead} bytes of {bulk_streams} bulk streams"
        );
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_large_transfer_finds_the_paths_large_packets_and_arrives_intact() {
    let (here, there, _keep) = pair(limits()).await;
    let seed = 0x9a17;
    eprintln!("seed {seed:#x}");
    let block = Bytes::from(Noise(seed).bytes(4 << 20));
    let sent = block.clone();
    let server = tokio::spawn(async move {
        let (mut send, _recv) = there.accept().await.unwrap();
        for _ in 0..32 {
            send.write_bytes(sent.clone()).await.unwrap();
        }
        send.finish().unwrap();
        send.delivered().await.unwrap();
        there.stats()
    });
    let (mut send, mut recv) = here.open(Priority::Bulk).await.unwrap();
    send.write_bytes(Bytes::from_static(b"go")).await.unwrap();
    let mut got = vec![0; block.len()];
    for _ in 0..32 {
        soon(recv.read_exact_into(&mut got)).await.unwrap();
        assert!(got == block);
    }
    assert_eq!(soon(recv.read_chunk(1)).await, Ok(None));
    let stats = soon(server).await.unwrap();
    eprintln!("{stats:?}");
    assert!(stats.udp_payload_bytes > 8000, "{stats:?}");
    assert!(stats.lost_packets * 20 < stats.sent_packets, "{stats:?}");
}

/// A stream counts as open until both ends of it are over, whoever lost interest first.
#[tokio::test]
async fn streams_that_are_stopped_before_their_end_do_not_use_the_limit_up() {
    let few = Limits {
        streams_per_connection_max: 8,
        ..limits()
    };
    let (here, there, _keep) = pair(few).await;
    for _ in 0..40 {
        let (mut ask, listen) = soon(here.open(Priority::Bulk)).await.unwrap();
        ask.write_bytes(Bytes::from_static(b"?")).await.unwrap();
        ask.finish().unwrap();
        let (mut answer, mut asked) = soon(there.accept()).await.unwrap();
        while soon(asked.read_chunk(10)).await.unwrap().is_some() {}
        drop(listen);
        assert_eq!(soon(answer.delivered()).await, Err(Error::StreamStopped));
        // An error here only says that the peer has stopped.
        let _ = answer.finish();
    }
}

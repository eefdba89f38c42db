//! One ring sends batches to another as fast as they go, over loopback, and says what that costs: the floor under any
//! protocol on top. `cargo run --release -p pantala-uring --example blast -- [MiB] [datagram bytes] [receive buffers]
//! [datagrams per batch] [zero-copy]`

use std::error::Error;
use std::net::SocketAddr;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

use pantala_uring::socket::{SocketOptions, bind_group};
use pantala_uring::{Counters, Event, Ring, RingConfig, SendHead, SocketId};

/// The most that one call takes.
const CALL_BYTES_MAX: usize = 65_000;
const SEGMENTS_MAX: usize = 64;
/// Sent and not acknowledged.
const WINDOW_BYTES: usize = 1 << 20;
/// The receiver acknowledges after this many bytes.
const ACK_EVERY_BYTES: usize = 128 << 10;
const SILENCE_MAX: Duration = Duration::from_secs(5);

struct Plan {
    bytes: usize,
    segment_bytes: u16,
    receive_buffers: u16,
    segments: usize,
    zero_copy: bool,
}

fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let number = |at: usize, default: usize| {
        arguments
            .get(at)
            .and_then(|argument| argument.parse().ok())
            .unwrap_or(default)
    };
    let plan = Plan {
        bytes: number(0, 4096) << 20,
        segment_bytes: u16::try_from(number(1, 1452))?,
        receive_buffers: u16::try_from(number(2, 32))?,
        segments: number(3, SEGMENTS_MAX),
        zero_copy: arguments
            .get(4)
            .is_some_and(|argument| argument == "zero-copy"),
    };
    let gib = plan.bytes as f64 / f64::from(1 << 30);
    let (tell, address) = channel();
    let start = Instant::now();
    let (received, sent) = std::thread::scope(|scope| {
        let plan = &plan;
        let receiver = scope.spawn(move || {
            receive(plan, |address| {
                tell.send(address).expect("the sender waits for it");
            })
        });
        let address = address.recv().expect("the receiver has a socket");
        let sender = scope.spawn(move || send(plan, address));
        (receiver.join(), sender.join())
    });
    let took = start.elapsed().as_secs_f64();
    let received = received
        .expect("no panic")
        .map_err(|error| error.to_string())?;
    let sent = sent.expect("no panic").map_err(|error| error.to_string())?;
    println!("{:.2} GiB/s", gib / took);
    for (side, (cpu_s, counters)) in [("sender", sent), ("receiver", received)] {
        println!(
            "{side:8} {:.3} CPU-s/GiB, {:.2} calls/MiB, {counters:?}",
            cpu_s / gib,
            counters.enters as f64 / (gib * 1024.0)
        );
    }
    Ok(())
}

type Outcome = Result<(f64, Counters), Box<dyn Error + Send + Sync>>;

/// Processor time of this thread so far.
fn cpu_s() -> f64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").unwrap_or_default();
    let ns = stat.split(' ').next().and_then(|ns| ns.parse::<f64>().ok());
    ns.unwrap_or(f64::NAN) / 1e9
}

fn open(plan: &Plan) -> Result<(Ring, SocketId, SocketAddr), Box<dyn Error + Send + Sync>> {
    let mut group = bind_group("127.0.0.1:0".parse()?, 1, &SocketOptions::default())?;
    let socket = group.sockets.remove(0);
    let address = socket.local_addr()?;
    let mut ring = Ring::new(&RingConfig {
        receive_buffers: plan.receive_buffers,
        send_buffers: 8,
        ..RingConfig::default()
    })?;
    ring.set_zero_copy_sends(plan.zero_copy);
    let id = ring.add_socket(socket)?;
    Ok((ring, id, address))
}

fn head(destination: SocketAddr, segment_bytes: Option<u16>) -> SendHead {
    SendHead {
        destination,
        source_ip: None,
        ecn: 2,
        segment_bytes,
    }
}

fn send(plan: &Plan, to: SocketAddr) -> Outcome {
    let (mut ring, socket, _) = open(plan)?;
    let segment_bytes = usize::from(plan.segment_bytes);
    let batch_bytes = (CALL_BYTES_MAX / segment_bytes).min(plan.segments) * segment_bytes;
    let (mut sent, mut acknowledged) = (0, 0);
    while acknowledged < plan.bytes {
        while sent < plan.bytes && sent - acknowledged < WINDOW_BYTES {
            let Some(mut buffer) = ring.take_send_buffer() else {
                break;
            };
            buffer.resize(batch_bytes, 7);
            sent += batch_bytes;
            ring.send(socket, buffer, head(to, Some(plan.segment_bytes)));
        }
        ring.wait(Some(SILENCE_MAX))?;
        let mut is_silent = true;
        while let Some(event) = ring.next_event() {
            is_silent = false;
            if let Event::Received(ack) = event {
                acknowledged = usize::from_ne_bytes(ack.payload[..8].try_into()?);
            }
        }
        if is_silent {
            return Err("datagrams were lost".into());
        }
    }
    Ok((cpu_s(), ring.counters()))
}

fn receive(plan: &Plan, tell: impl FnOnce(SocketAddr)) -> Outcome {
    let (mut ring, socket, address) = open(plan)?;
    ring.submit()?;
    tell(address);
    let (mut received, mut acknowledged) = (0, 0);
    while acknowledged < plan.bytes {
        ring.wait(Some(SILENCE_MAX))?;
        while let Some(event) = ring.next_event() {
            let Event::Received(batch) = event else {
                continue;
            };
            received += batch.payload.len();
            if (received - acknowledged >= ACK_EVERY_BYTES || received >= plan.bytes)
                && let Some(mut buffer) = ring.take_send_buffer()
            {
                acknowledged = received;
                buffer.extend_from_slice(&received.to_ne_bytes());
                ring.send(socket, buffer, head(batch.source, None));
            }
        }
    }
    ring.wait(Some(Duration::ZERO))?;
    Ok((cpu_s(), ring.counters()))
}

//! What hostile, broken and slow ones get, and that the others do not notice.

use std::time::Duration;

use pantala_control::{Command, Event, Server};
use pantala_wire::PieceRun;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::harness::{Node, WAIT, blob, config, server};

#[tokio::test]
async fn garbage_at_the_port_harms_nobody() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut held = Vec::new();
    for number in 0..100u32 {
        let mut stream = TcpStream::connect(server.local_addr()).await.unwrap();
        let garbage: Vec<u8> = (0..2000u32)
            .map(|i| (i.wrapping_mul(number + 7) >> 3) as u8)
            .collect();
        // The server may have hung up at the first bytes already.
        stream.write_all(&garbage).await.ok();
        held.push(stream);
    }
    // HTTP/2 without TLS, and a handshake that is announced and never comes.
    let mut plain = TcpStream::connect(server.local_addr()).await.unwrap();
    plain
        .write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        .await
        .unwrap();
    let mut answer = Vec::new();
    timeout(WAIT, plain.read_to_end(&mut answer))
        .await
        .expect("the server hangs up")
        .ok();
    let mut node = Node::new(&server).await;
    node.open(blob(1), 3);
    node.ask(blob(1), 0, 3);
    node.lease().await;
}

#[tokio::test]
async fn a_message_over_the_limit_ends_the_session_and_nothing_else() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let mut bystander = Node::new(&server).await;
    let mut node = Node::new(&server).await;
    node.handle
        .send(Command::AskLease {
            digest: blob(1),
            wanted: vec![PieceRun { first: 1, count: 1 }; 300_000],
            urgent: None,
        })
        .unwrap();
    node.until(|event| matches!(event, Event::Disconnected { .. }))
        .await;
    node.until(|event| matches!(event, Event::Connected)).await;
    bystander.open(blob(2), 1);
    bystander.ask(blob(2), 0, 1);
    bystander.lease().await;
}

#[tokio::test]
async fn a_node_that_does_not_read_is_disconnected_and_the_others_go_on() {
    let dir = tempfile::tempdir().unwrap();
    let mut config = config(dir.path());
    config.outbound_max = 8;
    let server = Server::start(config).await.unwrap();
    let mut slow = Node::new(&server).await;
    let mut quick = Node::new(&server).await;
    slow.open(blob(1), 1);
    // Each of these is answered, and nobody reads the answers. There are more of them than all queues
    // and windows on the way can hold.
    for number in 0..10_000 {
        let asked = slow.handle.send(Command::AskLease {
            digest: blob(1),
            wanted: vec![PieceRun { first: 0, count: 1 }],
            urgent: None,
        });
        if asked.is_err() {
            // Cut off already, and the client has noticed.
            break;
        }
        if number % 100 == 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
    tokio::spawn(async move {
        quick.open(blob(2), 1);
        quick.ask(blob(2), 0, 1);
        quick.lease().await;
    })
    .await
    .unwrap();
    let event = slow
        .until(|event| matches!(event, Event::Disconnected { .. }))
        .await;
    assert!(format!("{event:?}").contains("too slowly"), "{event:?}");
    slow.until(|event| matches!(event, Event::Connected)).await;
}

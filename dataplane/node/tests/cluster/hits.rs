//! Blobs that the node holds: many clients at once, clients that do not read, and what happens to the
//! bytes on disk while they are sent.

use std::time::Duration;

use sha2::Digest;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use super::client::{blob_path, get, pull};
use super::node::Node;
use super::registry::Registry;

/// No pull may take longer, on a machine that does other things too.
const PULL_MAX: Duration = Duration::from_secs(120);

fn request(node: &Node, digest: &str, lines: &str) -> String {
    let path = blob_path("team/app", digest);
    format!(
        "GET {path} HTTP/1.1\r\nHost: {}\r\n{lines}\r\n",
        node.mirror
    )
}

/// A connection on which a blob has been asked for.
async fn ask(node: &Node, digest: &str) -> TcpStream {
    let mut stream = TcpStream::connect(node.mirror).await.unwrap();
    let request = request(node, digest, "Connection: close\r\n");
    stream.write_all(request.as_bytes()).await.unwrap();
    stream
}

/// The rest of what a server sends, from `start` on, without the head.
async fn body(mut stream: TcpStream, mut start: Vec<u8>) -> Vec<u8> {
    let reading = tokio::time::timeout(PULL_MAX, stream.read_to_end(&mut start));
    reading.await.expect("no hang").unwrap();
    start.split_off(head_end(&start).expect("a head"))
}

fn head_end(bytes: &[u8]) -> Option<usize> {
    let end = bytes.windows(4).position(|window| window == b"\r\n\r\n");
    end.map(|at| at + 4)
}

async fn holding(
    root: &tempfile::TempDir,
    seed: u64,
    len: usize,
) -> (Registry, Node, bytes::Bytes, String) {
    let registry = Registry::start().await;
    let (data, digest) = super::blob(seed, len);
    registry.add(&digest, data.clone());
    let node = Node::start(root, "one", &registry, None).await;
    let (status, whole) = pull(node.mirror, "team/app", &digest).await.unwrap();
    assert_eq!(status, 200);
    assert!(whole == data);
    (registry, node, data, digest)
}

#[tokio::test(flavor = "multi_thread")]
async fn many_clients_at_once_get_the_blob_beside_some_that_never_read() {
    let root = tempfile::tempdir().unwrap();
    let (registry, node, data, digest) = holding(&root, 40, 12 << 20 | 321).await;
    let sent = registry.sent();
    let mut stuck = Vec::new();
    for _ in 0..8 {
        stuck.push(ask(&node, &digest).await);
    }
    let mut pulls = tokio::task::JoinSet::new();
    for _ in 0..64 {
        let stream = ask(&node, &digest).await;
        pulls.spawn(async move { sha2::Sha256::digest(body(stream, Vec::new()).await) });
    }
    while let Some(hash) = pulls.join_next().await {
        assert_eq!(format!("sha256:{:x}", hash.unwrap()), digest);
    }
    // They were only waiting for their own sake.
    for stream in stuck {
        assert!(body(stream, Vec::new()).await == data);
    }
    assert_eq!(registry.sent(), sent);
}

#[tokio::test(flavor = "multi_thread")]
async fn clients_that_never_read_cost_no_memory() {
    let root = tempfile::tempdir().unwrap();
    let (_registry, node, data, digest) = holding(&root, 41, 32 << 20).await;
    let before = node.own_memory_bytes();
    let mut stuck = Vec::new();
    for _ in 0..64 {
        let mut stream = ask(&node, &digest).await;
        // Its reply is under way when it has begun.
        stream.read_exact(&mut [0; 12]).await.unwrap();
        stuck.push(stream);
    }
    let (_, whole) = pull(node.mirror, "team/app", &digest).await.unwrap();
    assert!(whole == data);
    let grown = node.own_memory_bytes().saturating_sub(before);
    assert!(
        grown < 64 << 20,
        "64 clients that read nothing took {grown} bytes"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn what_rots_while_it_is_sent_is_replaced_and_what_is_deleted_is_sent_on() {
    use std::os::unix::fs::FileExt;
    let root = tempfile::tempdir().unwrap();
    let (_registry, mut node, data, digest) = holding(&root, 42, 48 << 20).await;
    // What it finds after a restart, it verifies when it is first read.
    node.kill();
    node.restart().await;
    let mut stream = ask(&node, &digest).await;
    let mut start = vec![0; 1 << 20];
    stream.read_exact(&mut start).await.unwrap();
    let blob_file = node.blob_file(&digest);
    let file = std::fs::OpenOptions::new()
        .write(true)
        .open(&blob_file)
        .unwrap();
    // Further on than anything that may have been made ready.
    for at in [30 << 20, (40 << 20) + 77, (48 << 20) - 1_u64] {
        file.write_all_at(&[data[at as usize] ^ 0x40], at).unwrap();
    }
    assert!(body(stream, start).await == data, "wrong bytes");

    let mut stream = ask(&node, &digest).await;
    let mut start = vec![0; 1 << 20];
    stream.read_exact(&mut start).await.unwrap();
    std::fs::remove_file(&blob_file).unwrap();
    assert!(body(stream, start).await == data, "wrong bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_one_behind_the_other_on_a_connection_are_answered_in_order() {
    let root = tempfile::tempdir().unwrap();
    let (_registry, node, data, digest) = holding(&root, 43, 9 << 20).await;
    let ranges = [(0, 5_000_000), (8_000_000, 8_000_000), (77, 9_000_000)];
    let mut requests = String::new();
    for (number, (first, last)) in ranges.iter().enumerate() {
        let end = if number + 1 == ranges.len() {
            "Connection: close\r\n"
        } else {
            ""
        };
        let lines = format!("Range: bytes={first}-{last}\r\n{end}");
        requests.push_str(&request(&node, &digest, &lines));
    }
    let mut stream = TcpStream::connect(node.mirror).await.unwrap();
    stream.write_all(requests.as_bytes()).await.unwrap();
    let mut answers = Vec::new();
    let reading = tokio::time::timeout(PULL_MAX, stream.read_to_end(&mut answers));
    reading.await.expect("no hang").unwrap();
    let mut rest = &answers[..];
    for (first, last) in ranges {
        assert!(rest.starts_with(b"HTTP/1.1 206"));
        let (_head, after) = rest.split_at(head_end(rest).expect("a head"));
        let (part, after) = after.split_at(last - first + 1);
        assert!(part == &data[first..=last], "wrong bytes");
        rest = after;
    }
    assert!(rest.is_empty());
    // And a whole one on a connection of its own, after that.
    let path = blob_path("team/app", &digest);
    let (_, whole) = get(node.mirror, &path, &[]).await.unwrap();
    assert!(whole == data);
}

//! What holds while nothing fails.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::client::{blob_path, get, pull};
use super::node::Node;
use super::registry::Registry;

#[tokio::test(flavor = "multi_thread")]
async fn three_nodes_pull_at_once_and_the_registry_sends_each_byte_once() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    // So slow that the pulls overlap on any machine.
    registry.state.chunk_pause_us.store(2000, Ordering::SeqCst);
    let (data, digest) = super::blob(1, 40 << 20 | 12345);
    registry.add(&digest, data.clone());
    let one = Node::start(&root, "one", &registry, None).await;
    let two = Node::start(&root, "two", &registry, Some(&one)).await;
    let three = Node::start(&root, "three", &registry, Some(&one)).await;

    let pulls = [&one, &two, &three].map(|node| pull(node.mirror, "team/app", &digest));
    for result in futures_util::future::join_all(pulls).await {
        let (status, body) = result.unwrap();
        assert_eq!(status, 200);
        assert!(body == data, "wrong bytes");
    }
    let ratio = registry.sent() as f64 / data.len() as f64;
    // Exactly 1 unless the machine stands still for seconds, when a waiting node reads a piece itself.
    assert!(ratio <= 1.10, "the registry sent {ratio} times the blob");
    let mut from_registry = 0;
    for node in [&one, &two, &three] {
        let (source, peers) = node.totals().await;
        // A piece that a reader waits for may be asked of a second parent: a few arrive twice.
        let arrived = (source + peers) as f64 / data.len() as f64;
        assert!(
            (1.0..1.25).contains(&arrived),
            "{arrived} times the blob arrived"
        );
        from_registry += source;
    }
    assert_eq!(
        from_registry,
        registry.sent(),
        "nodes and registry count alike"
    );

    // A node that comes late takes nothing from the registry, and a second pull nothing at all.
    let before = registry.sent();
    let late = Node::start(&root, "late", &registry, Some(&one)).await;
    let (_, body) = pull(late.mirror, "team/app", &digest).await.unwrap();
    assert!(body == data);
    let first = late.totals().await;
    assert_eq!(first.0, 0);
    let (_, body) = pull(late.mirror, "team/app", &digest).await.unwrap();
    assert!(body == data);
    assert_eq!(late.totals().await, first);
    assert_eq!(registry.sent(), before);
}

#[tokio::test(flavor = "multi_thread")]
async fn ranges_are_exact_whether_the_bytes_are_here_or_not() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    let (data, digest) = super::blob(2, 5 << 20 | 777);
    registry.add(&digest, data.clone());
    let node = Node::start(&root, "one", &registry, None).await;
    let path = blob_path("team/app", &digest);
    let size = data.len();
    for _ in 0..2 {
        for (range, from, to) in [
            ("bytes=3000000-3000099", 3_000_000, 3_000_100),
            ("bytes=-1000", size - 1000, size),
            ("bytes=0-0", 0, 1),
            ("bytes=1048575-1048576", 1_048_575, 1_048_577),
            ("bytes=5000000-", 5_000_000, size),
        ] {
            let (status, body) = get(node.mirror, &path, &[("Range", range)]).await.unwrap();
            assert_eq!(status, 206, "{range}");
            assert!(body[..] == data[from..to], "{range}");
        }
        let past = format!("bytes={size}-");
        let (status, _) = get(node.mirror, &path, &[("Range", &past)]).await.unwrap();
        assert_eq!(status, 416);
    }
    let (status, body) = get(node.mirror, &path, &[]).await.unwrap();
    assert_eq!(status, 200);
    assert!(body == data);
    assert!(registry.sent() <= data.len() as u64, "no byte twice");
}

#[tokio::test(flavor = "multi_thread")]
async fn overlapping_ranges_of_many_clients_are_read_once() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    registry.state.chunk_pause_us.store(1000, Ordering::SeqCst);
    let (data, digest) = super::blob(3, 4 << 20);
    registry.add(&digest, data.clone());
    let node = Node::start(&root, "one", &registry, None).await;
    let path = blob_path("team/app", &digest);
    let clients = (0..24usize).map(|client| {
        let (path, data) = (&path, &data);
        let start = client * 100_000;
        async move {
            let range = format!("bytes={start}-{}", start + 999_999);
            let (status, body) = get(node.mirror, path, &[("Range", &range)]).await.unwrap();
            assert_eq!(status, 206);
            assert!(body[..] == data[start..start + 1_000_000]);
        }
    });
    futures_util::future::join_all(clients).await;
    assert!(registry.sent() <= data.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_private_blob_is_served_only_to_whom_the_registry_serves() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    let (data, digest) = super::blob(4, 3 << 20);
    registry.add(&digest, data.clone());
    *registry.state.authorization.lock() = Some("Basic YWxpY2U6c2VjcmV0".to_owned());
    let node = Node::start(&root, "one", &registry, None).await;
    let path = blob_path("private/app", &digest);
    let alice = [("Authorization", "Basic YWxpY2U6c2VjcmV0")];
    let mallory = [("Authorization", "Basic bWFsbG9yeTp4")];

    let (status, _) = get(node.mirror, &path, &mallory).await.unwrap();
    assert_eq!(status, 401);
    let (status, body) = get(node.mirror, &path, &alice).await.unwrap();
    assert_eq!(status, 200);
    assert!(body == data);
    // Cached now; still nobody else's.
    for headers in [&mallory[..], &[]] {
        let (status, body) = get(node.mirror, &path, headers).await.unwrap();
        assert_eq!(status, 401);
        assert!(body.len() < 1000);
    }
    let sent = registry.sent();
    let (status, _) = get(node.mirror, &path, &alice).await.unwrap();
    assert_eq!(status, 200);
    assert_eq!(registry.sent(), sent, "the second read is local");
    assert!(
        !node.log().contains("YWxpY2U6c2VjcmV0"),
        "no credential in the log"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_any_configuration_but_addresses_serves_an_empty_blob() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    let (data, digest) = super::blob(5, 0);
    registry.add(&digest, data);
    let node = Node::start(&root, "one", &registry, None).await;
    let pulled = tokio::time::timeout(Duration::from_secs(30), pull(node.mirror, "a/b", &digest));
    let (status, body) = pulled.await.expect("no hang").unwrap();
    assert_eq!((status, body.len()), (200, 0));
}

//! The fault table: what fails, and what a client sees then.
//!
//! | Fault | Expected |
//! |---|---|
//! | registry answers 404, 429, 500 | that status, or a 5xx, in bounded time |
//! | registry never answers | 5xx in bounded time |
//! | registry cuts every body | right bytes: the transfer is resumed |
//! | registry ignores Range | right bytes |
//! | registry corrupts | no whole body; right bytes once it is well again |
//! | registry corrupts, and cannot be asked which piece is wrong | no whole body, from nowhere; right bytes once it is well again |
//! | a parent is killed or stalls in mid-transfer | right bytes |
//! | a parent's disk rots | right bytes |
//! | control is killed in mid-pull and comes back | right bytes; later pulls use peers again |
//! | a node is killed in mid-write and restarted, at many points | right bytes |

use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use super::client::{Failure, blob_path, get, pull};
use super::node::Node;
use super::registry::Registry;

/// No answer may take longer, whatever fails: nydusd gives up after 5 s. Twice that, for a machine
/// that does other things too.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// No pull may take longer.
const PULL_MAX: Duration = Duration::from_secs(90);

async fn pull_whole(node: &Node, digest: &str, data: &[u8]) {
    let pulled = tokio::time::timeout(PULL_MAX, pull(node.mirror, "team/app", digest));
    let (status, body) = pulled.await.expect("no hang").expect("a whole body");
    assert_eq!(status, 200);
    assert!(body[..] == *data, "wrong bytes");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_refuses_is_reported_in_bounded_time() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    let node = Node::start(&root, "one", &registry, None).await;
    let (_, digest) = super::blob(10, 1 << 20);
    let path = blob_path("team/app", &digest);
    for (status, expected) in [(404, 404..=404), (429, 429..=503), (500, 500..=504)] {
        registry.state.status.store(status, Ordering::SeqCst);
        let started = Instant::now();
        let (got, _) = get(node.mirror, &path, &[]).await.unwrap();
        assert!(expected.contains(&got), "{status} became {got}");
        assert!(started.elapsed() < ANSWER_MAX);
    }
    registry.state.status.store(0, Ordering::SeqCst);
    registry.state.silent.store(true, Ordering::SeqCst);
    let started = Instant::now();
    let (got, _) = get(node.mirror, &path, &[]).await.unwrap();
    assert!((500..=504).contains(&got), "{got}");
    assert!(started.elapsed() < ANSWER_MAX);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_cuts_or_ignores_ranges_still_gives_right_bytes() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    let node = Node::start(&root, "one", &registry, None).await;
    let (data, digest) = super::blob(11, 12 << 20);
    registry.add(&digest, data.clone());
    registry.state.cut_after.store(3_000_000, Ordering::SeqCst);
    pull_whole(&node, &digest, &data).await;
    registry.state.cut_after.store(0, Ordering::SeqCst);

    let (data, digest) = super::blob(12, 6 << 20);
    registry.add(&digest, data.clone());
    registry.state.ignore_range.store(true, Ordering::SeqCst);
    pull_whole(&node, &digest, &data).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_corrupting_registry_never_makes_a_whole_wrong_body() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    let node = Node::start(&root, "one", &registry, None).await;
    let (data, digest) = super::blob(13, 3 << 20);
    registry.add(&digest, data.clone());
    registry.state.corrupt.store(true, Ordering::SeqCst);
    let pulled = tokio::time::timeout(PULL_MAX, pull(node.mirror, "team/app", &digest));
    match pulled.await.expect("no hang") {
        Err(Failure::Cut(200, got)) => assert!(got < data.len()),
        Ok((status, _)) => assert!(status >= 500, "{status}"),
        Err(error) => panic!("{error:?}"),
    }
    registry.state.corrupt.store(false, Ordering::SeqCst);
    pull_whole(&node, &digest, &data).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_bytes_that_cannot_be_found_are_not_completed_from_the_registry() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    let node = Node::start(&root, "one", &registry, None).await;
    let (data, digest) = super::blob(18, 3 << 20);
    registry.add(&digest, data.clone());
    // It sends a wrong piece, and will not say again what the pieces are; of the end of the blob, which
    // a reader who was given the wrong piece still lacks, it gives the right bytes.
    registry.state.corrupt.store(true, Ordering::SeqCst);
    registry.state.refused_len.store(1 << 20, Ordering::SeqCst);
    let pulled = tokio::time::timeout(PULL_MAX, pull(node.mirror, "team/app", &digest));
    let well = async {
        while registry.sent() < data.len() as u64 {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        registry.state.corrupt.store(false, Ordering::SeqCst);
    };
    match tokio::join!(pulled, well).0.expect("no hang") {
        Err(Failure::Cut(200, got)) => assert!(got < data.len()),
        other => panic!("{other:?}"),
    }
    assert_eq!(
        registry.sent(),
        data.len() as u64,
        "nothing more was read for that client"
    );
    registry.state.refused_len.store(0, Ordering::SeqCst);
    pull_whole(&node, &digest, &data).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_killed_or_stalled_in_mid_transfer_is_replaced() {
    for stall in [false, true] {
        let root = tempfile::tempdir().unwrap();
        let registry = Registry::start().await;
        let one = Node::start(&root, "one", &registry, None).await;
        let mut parent = Node::start(&root, "parent", &registry, Some(&one)).await;
        let child = Node::start(&root, "child", &registry, Some(&one)).await;
        let (data, digest) = super::blob(14, 48 << 20);
        registry.add(&digest, data.clone());
        pull_whole(&parent, &digest, &data).await;
        let pulling = pull_whole(&child, &digest, &data);
        let failing = async {
            while child.totals().await.1 == 0 {
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            if stall { parent.stall() } else { parent.kill() }
        };
        tokio::join!(pulling, failing);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_parent_whose_disk_rots_passes_nothing_wrong_on() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    let one = Node::start(&root, "one", &registry, None).await;
    let parent = Node::start(&root, "parent", &registry, Some(&one)).await;
    let child = Node::start(&root, "child", &registry, Some(&one)).await;
    let (data, digest) = super::blob(15, 16 << 20);
    registry.add(&digest, data.clone());
    pull_whole(&parent, &digest, &data).await;
    {
        use std::os::unix::fs::FileExt;
        let file = std::fs::OpenOptions::new()
            .write(true)
            .open(parent.blob_file(&digest))
            .unwrap();
        for at in [0u64, 5_000_000, 9_999_999, (16 << 20) - 1] {
            file.write_all_at(&[data[at as usize] ^ 0x40], at).unwrap();
        }
    }
    pull_whole(&child, &digest, &data).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_go_on_while_control_is_dead_and_share_again_when_it_is_back() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    registry.state.chunk_pause_us.store(3000, Ordering::SeqCst);
    let mut control = Node::start(&root, "control", &registry, None).await;
    let one = Node::start(&root, "one", &registry, Some(&control)).await;
    let two = Node::start(&root, "two", &registry, Some(&control)).await;
    let (data, digest) = super::blob(16, 24 << 20);
    registry.add(&digest, data.clone());
    let pulling = async {
        tokio::join!(
            pull_whole(&one, &digest, &data),
            pull_whole(&two, &digest, &data)
        );
    };
    let killing = async {
        while registry.sent() < 4 << 20 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        control.kill();
    };
    tokio::join!(pulling, killing);
    // Alone, a node still gets what nobody has told it of.
    let (other, other_digest) = super::blob(17, 2 << 20);
    registry.add(&other_digest, other.clone());
    pull_whole(&one, &other_digest, &other).await;

    control.restart().await;
    let before = registry.sent();
    let deadline = Instant::now() + PULL_MAX;
    while one.status().await.unwrap()["control"]["connected"] != true {
        assert!(Instant::now() < deadline, "not reconnected");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    pull_whole(&control, &digest, &data).await;
    assert_eq!(
        registry.sent(),
        before,
        "control knows again who holds the blob"
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_killed_in_mid_write_serves_right_bytes_after_each_restart() {
    let seed: u64 = std::env::var("PANTALA_SEED")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(42);
    println!("PANTALA_SEED={seed}");
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    registry.state.chunk_pause_us.store(500, Ordering::SeqCst);
    let mut node = Node::start(&root, "one", &registry, None).await;
    let mut state = seed;
    for round in 0..12u64 {
        let (data, digest) = super::blob(100 + round, 8 << 20);
        registry.add(&digest, data.clone());
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        let kill_at = registry.sent() + (state >> 33) % data.len() as u64;
        let address = node.mirror;
        let pulling = tokio::spawn({
            let digest = digest.clone();
            async move { pull(address, "team/app", &digest).await }
        });
        while registry.sent() < kill_at && !pulling.is_finished() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        node.kill();
        if let Ok((status, body)) = pulling.await.unwrap() {
            assert!(status == 200 && body == data, "round {round}");
        }
        node.restart().await;
        pull_whole(&node, &digest, &data).await;
    }
}

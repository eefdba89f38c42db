//! The first request for a blob that nobody in the cluster has: it is the caller's question for the
//! right, and brings the first bytes.

use std::sync::atomic::Ordering;
use std::time::Duration;

use super::client::{Failure, blob_path, get, pull};
use super::node::Node;
use super::registry::Registry;

const ALICE: (&str, &str) = ("Authorization", "Basic YWxpY2U6c2VjcmV0");
const MALLORY: (&str, &str) = ("Authorization", "Basic bWFsbG9yeTp4");
const PULL_MAX: Duration = Duration::from_secs(60);

fn asked(registry: &Registry) -> (usize, usize) {
    let state = &registry.state;
    (
        state.heads.load(Ordering::SeqCst),
        state.gets.load(Ordering::SeqCst),
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cold_pull_is_one_request_to_the_registry() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    let node = Node::start(&root, "one", &registry, None).await;
    for (seed, len) in [(19, 1), (21, 70_000), (23, 3 << 20), (25, 8 << 20)] {
        let (data, digest) = super::blob(seed, len);
        registry.add(&digest, data.clone());
        let (heads, gets) = asked(&registry);
        let sent = registry.sent();
        let (status, body) = pull(node.mirror, "team/app", &digest).await.unwrap();
        assert!(status == 200 && body == data, "{len}");
        assert_eq!(asked(&registry), (heads, gets + 1), "{len}");
        assert_eq!(registry.sent() - sent, data.len() as u64, "{len}");
        let (_, body) = pull(node.mirror, "team/app", &digest).await.unwrap();
        assert!(body == data);
        assert_eq!(registry.sent() - sent, data.len() as u64, "{len}: a hit");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_nodes_that_pull_at_once_one_opens_and_the_registry_sends_each_byte_once() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    registry.state.chunk_pause_us.store(2000, Ordering::SeqCst);
    let one = Node::start(&root, "one", &registry, None).await;
    let two = Node::start(&root, "two", &registry, Some(&one)).await;
    let three = Node::start(&root, "three", &registry, Some(&one)).await;
    // Smaller than an opening: all of it belongs to whoever opens it.
    let (data, digest) = super::blob(33, 5 << 20 | 321);
    registry.add(&digest, data.clone());
    let pulls = [&one, &two, &three].map(|node| pull(node.mirror, "team/app", &digest));
    for result in futures_util::future::join_all(pulls).await {
        let (status, body) = result.unwrap();
        assert!(status == 200 && body == data);
    }
    assert_eq!(registry.sent(), data.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_caller_gets_no_byte_and_leaves_nothing_in_the_way() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    *registry.state.authorization.lock() = Some(ALICE.1.to_owned());
    let one = Node::start(&root, "one", &registry, None).await;
    let two = Node::start(&root, "two", &registry, Some(&one)).await;
    let (data, digest) = super::blob(35, 3 << 20);
    registry.add(&digest, data.clone());
    let path = blob_path("private/app", &digest);
    for headers in [&[][..], &[MALLORY]] {
        let (status, body) = get(one.mirror, &path, headers).await.unwrap();
        assert_eq!(status, 401);
        assert!(body.len() < 1024, "an error document at most");
    }
    assert_eq!(registry.sent(), 0);
    // The other node may open it at once: the refused one has returned its opening.
    let before = asked(&registry);
    let (status, body) = get(two.mirror, &path, &[ALICE]).await.unwrap();
    assert!(status == 200 && body == data);
    assert_eq!(asked(&registry), (before.0, before.1 + 1));
    // What is here now is still for those whom the registry serves.
    let (status, _) = get(two.mirror, &path, &[MALLORY]).await.unwrap();
    assert_eq!(status, 401);
    assert_eq!(registry.sent(), data.len() as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn callers_with_different_rights_at_once_get_each_their_own_answer() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    *registry.state.authorization.lock() = Some(ALICE.1.to_owned());
    registry.state.chunk_pause_us.store(1000, Ordering::SeqCst);
    let node = Node::start(&root, "one", &registry, None).await;
    for round in 0..4 {
        let (data, digest) = super::blob(201 + 2 * round, 2 << 20);
        registry.add(&digest, data.clone());
        let path = blob_path("private/app", &digest);
        let callers = (0..8).map(|number| {
            let who = if number % 2 == 0 { ALICE } else { MALLORY };
            let path = &path;
            async move { (who, get(node.mirror, path, &[who]).await.unwrap()) }
        });
        for (who, (status, body)) in futures_util::future::join_all(callers).await {
            if who == ALICE {
                assert!(status == 200 && body == data);
            } else {
                assert!(status == 401 && body.len() < 1024, "{status}");
            }
        }
    }
    assert_eq!(registry.sent(), 4 * (2 << 20));
}

#[tokio::test(flavor = "multi_thread")]
async fn the_answer_to_the_request_that_brings_the_bytes_is_what_counts() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    let node = Node::start(&root, "one", &registry, None).await;
    let (data, digest) = super::blob(37, 1 << 20);
    registry.add(&digest, data.clone());
    // "Yes" to the question, "no" to the request.
    registry.state.get_status.store(403, Ordering::SeqCst);
    let (status, _) = pull(node.mirror, "team/app", &digest).await.unwrap();
    assert_eq!(status, 403);
    assert_eq!(registry.sent(), 0);
    // The other way round: whom the registry sends the bytes may have them.
    registry.state.get_status.store(0, Ordering::SeqCst);
    registry.state.head_status.store(403, Ordering::SeqCst);
    let (status, body) = pull(node.mirror, "team/app", &digest).await.unwrap();
    assert!(status == 200 && body == data);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_that_states_a_wrong_size_never_makes_a_whole_body() {
    let root = tempfile::tempdir().unwrap();
    let registry = Registry::start().await;
    let node = Node::start(&root, "one", &registry, None).await;
    for (seed, stated) in [(27, (3 << 20) + 5), (29, (3 << 20) - 5), (31, 1 << 40)] {
        let (data, digest) = super::blob(seed, 3 << 20);
        registry.add(&digest, data.clone());
        registry.state.stated_size.store(stated, Ordering::SeqCst);
        let pulled = tokio::time::timeout(PULL_MAX, pull(node.mirror, "team/app", &digest));
        match pulled.await.expect("no hang") {
            Err(Failure::Cut(..) | Failure::NoAnswer(_)) => {}
            Ok((status, _)) => assert!(status >= 500, "{status}"),
        }
        // Nobody is bound by the lie once the registry tells the truth.
        registry.state.stated_size.store(0, Ordering::SeqCst);
        let pulled = tokio::time::timeout(PULL_MAX, pull(node.mirror, "other/app", &digest));
        let (status, body) = pulled.await.expect("no hang").unwrap();
        assert!(status == 200 && body == data);
    }
}

//! Who gets in, and what is kept of it on disk.

use pantala_control::{
    ClientConfig, ControlClient, Event, Identity, IdentityError, JoinTarget, JoinToken, Server,
};
use pantala_wire::{PieceDigest, PieceIndex};
use tokio::time::timeout;

use crate::harness::{WAIT, blob, config, loopback, server, target};

#[tokio::test]
async fn a_node_joins_with_the_token_and_keeps_its_name_over_restarts() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let node_dir = tempfile::tempdir().unwrap();
    let target = target(&server);
    let first = Identity::load_or_join(node_dir.path(), &target)
        .await
        .unwrap();
    server.shutdown().await;
    // The second start needs no control.
    let second = Identity::load_or_join(node_dir.path(), &target)
        .await
        .unwrap();
    assert_eq!(first.node_id(), second.node_id());
    let digest = PieceDigest([3; 32]);
    let claim = second.sign_claim(&blob(1), PieceIndex(4), &digest);
    assert_eq!(claim.author, first.node_id());
    assert!(claim.verify(&blob(1), PieceIndex(4)).is_ok());
}

#[tokio::test]
async fn secrets_are_readable_by_their_owner_alone() {
    use std::os::unix::fs::PermissionsExt;
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let node_dir = tempfile::tempdir().unwrap();
    Identity::load_or_join(node_dir.path(), &target(&server))
        .await
        .unwrap();
    for path in [
        dir.path().join("control/ca-key.pem"),
        dir.path().join("control/join-token"),
        node_dir.path().join("identity/key.pem"),
    ] {
        let mode = std::fs::metadata(&path).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600, "{}", path.display());
    }
    let text = format!("{:?} {:?}", server.join_token(), target(&server));
    let secret = server.join_token().reveal();
    assert!(!text.contains(&secret["pantala-join-1.".len()..][..20]));
}

#[tokio::test]
async fn a_wrong_secret_is_refused_and_a_foreign_token_does_not_trust_this_control() {
    let (dir, other_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = server(dir.path()).await;
    let other = Server::start(config(other_dir.path())).await.unwrap();
    let node_dir = tempfile::tempdir().unwrap();

    // Right CA, wrong secret: the text form begins with the 32 bytes of the secret.
    let mut text = server.join_token().reveal();
    let at = "pantala-join-1.".len();
    let flipped = if &text[at..=at] == "A" { "B" } else { "A" };
    text.replace_range(at..=at, flipped);
    let wrong: JoinToken = text.parse().unwrap();
    let address = server.local_addr().to_string();
    let error = Identity::load_or_join(
        node_dir.path(),
        &JoinTarget {
            address: address.clone(),
            token: wrong,
        },
    )
    .await
    .unwrap_err();
    assert!(matches!(error, IdentityError::Refused { .. }), "{error}");
    assert!(!error.is_retryable());

    let foreign = JoinTarget {
        address,
        token: other.join_token().clone(),
    };
    let error = Identity::load_or_join(node_dir.path(), &foreign)
        .await
        .unwrap_err();
    assert!(error.to_string().contains("join token"), "{error}");
    assert!(!error.is_retryable(), "{error}");

    // The same key may still join where it is let in; after that, not another cluster.
    Identity::load_or_join(node_dir.path(), &target(&server))
        .await
        .unwrap();
    let error = Identity::load_or_join(node_dir.path(), &target(&other))
        .await
        .unwrap_err();
    assert!(matches!(error, IdentityError::WrongCluster(_)), "{error}");
}

#[tokio::test]
async fn a_join_without_anybody_there_can_be_tried_again() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let target = target(&server);
    server.shutdown().await;
    let node_dir = tempfile::tempdir().unwrap();
    let error = Identity::load_or_join(node_dir.path(), &target)
        .await
        .unwrap_err();
    assert!(error.is_retryable(), "{error}");
}

#[tokio::test]
async fn damaged_identity_files_are_named_with_a_way_out() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path()).await;
    let other_dir = tempfile::tempdir().unwrap();
    Identity::load_or_join(other_dir.path(), &target(&server))
        .await
        .unwrap();
    for (file, content) in [
        ("key.pem", Some(&b"rubbish"[..])),
        ("key.pem", None),
        ("ca.pem", Some(b"")),
        (
            "certificate.pem",
            Some(b"-----BEGIN CERTIFICATE-----\nAAAA\n"),
        ),
    ] {
        let node_dir = tempfile::tempdir().unwrap();
        Identity::load_or_join(node_dir.path(), &target(&server))
            .await
            .unwrap();
        let path = node_dir.path().join("identity").join(file);
        match content {
            Some(content) => std::fs::write(&path, content).unwrap(),
            None => std::fs::remove_file(&path).unwrap(),
        }
        let error = Identity::load(node_dir.path()).unwrap_err();
        assert!(
            matches!(error, IdentityError::Corrupt { .. }),
            "{file}: {error}"
        );
        assert!(error.to_string().contains("restore"), "{error}");
    }
    // The certificate of another node.
    let node_dir = tempfile::tempdir().unwrap();
    Identity::load_or_join(node_dir.path(), &target(&server))
        .await
        .unwrap();
    std::fs::copy(
        other_dir.path().join("identity/certificate.pem"),
        node_dir.path().join("identity/certificate.pem"),
    )
    .unwrap();
    assert!(Identity::load(node_dir.path()).is_err());
}

#[tokio::test]
async fn a_certificate_of_another_cluster_opens_no_session() {
    let (dir, other_dir) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let server = server(dir.path()).await;
    let other = Server::start(config(other_dir.path())).await.unwrap();
    let node_dir = tempfile::tempdir().unwrap();
    let stranger = Identity::load_or_join(node_dir.path(), &target(&other))
        .await
        .unwrap();
    let (handle, mut events) = ControlClient::start(ClientConfig::new(
        server.local_addr().to_string(),
        stranger,
        loopback(1),
    ));
    let event = timeout(WAIT, events.recv()).await.unwrap().unwrap();
    assert!(matches!(event, Event::Disconnected { .. }), "{event:?}");
    assert!(!handle.is_connected());
}

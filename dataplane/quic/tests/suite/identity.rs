//! Only nodes of the cluster, proven and not shut out, get a connection.

use super::cluster::{Authority, connect, endpoint, limits, node_key, soon, stranger};
use pantala_quic::{
    ALPN, BindError, Blame, CloseReason, Endpoint, EndpointConfig, Error, IdentityError,
    NodeIdentity, SERVER_NAME,
};
use rustls::pki_types::CertificateDer;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::Arc;

#[tokio::test]
async fn two_nodes_of_a_cluster_meet_and_know_each_other() {
    let authority = Authority::new();
    let (a, b) = (authority.node(), authority.node());
    let (here, there) = soon(connect(&a, &b)).await;
    assert_eq!(here.remote_node(), b.node());
    assert_eq!(there.remote_node(), a.node());
    assert_eq!(here.remote_addr(), b.local_addr());
    assert_eq!(there.remote_addr(), a.local_addr());
    assert_eq!((a.connection_count(), b.connection_count()), (1, 1));
}

/// After whatever was refused, the endpoint still takes in a proper node, and only that.
async fn assert_admits_only_the_proper(target: &Endpoint, proper: &Endpoint) {
    let (_here, there) = soon(connect(proper, target)).await;
    assert_eq!(there.remote_node(), proper.node());
    assert_eq!(target.connection_count(), 1);
}

#[tokio::test]
async fn a_node_of_another_cluster_is_refused_by_both_sides() {
    let (ours, theirs) = (Authority::new(), Authority::new());
    let (node, foreign) = (ours.node(), theirs.node());
    let error = soon(node.connect(foreign.local_addr(), foreign.node()))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Identity(_)), "{error}");
    assert_eq!(error.blame(), Blame::Path);

    // It trusts our authority, but its certificate is of another.
    let intruder = endpoint(
        NodeIdentity {
            ca_certificate_der: ours.certificate_der.clone(),
            ..theirs.issue()
        },
        limits(),
    );
    let error = soon(intruder.connect(node.local_addr(), node.node()))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::IdentityRefused(_)), "{error}");
    assert_admits_only_the_proper(&node, &ours.node()).await;
}

#[tokio::test]
async fn an_expired_certificate_is_refused_by_both_sides() {
    let authority = Authority::new();
    let node = authority.node();
    let expired = endpoint(authority.issue_expired(), limits());
    let error = soon(expired.connect(node.local_addr(), node.node()))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::IdentityRefused(_)), "{error}");
    let error = soon(node.connect(expired.local_addr(), expired.node()))
        .await
        .unwrap_err();
    assert!(matches!(error, Error::Identity(_)), "{error}");
    assert_admits_only_the_proper(&node, &authority.node()).await;
}

/// A client of bare quinn, which does as it likes.
fn bare_client(
    authority: &Authority,
    identity: Option<NodeIdentity>,
    alpn: &[u8],
) -> quinn::Endpoint {
    let mut roots = rustls::RootCertStore::empty();
    roots
        .add(CertificateDer::from(authority.certificate_der.clone()))
        .unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = rustls::ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[&rustls::version::TLS13])
        .unwrap()
        .with_root_certificates(roots);
    let mut tls = match identity {
        None => builder.with_no_client_auth(),
        Some(identity) => builder
            .with_client_auth_cert(
                identity
                    .certificate_chain_der
                    .into_iter()
                    .map(CertificateDer::from)
                    .collect(),
                rustls::pki_types::PrivatePkcs8KeyDer::from(identity.key_pkcs8_der).into(),
            )
            .unwrap(),
    };
    tls.alpn_protocols = vec![alpn.to_vec()];
    let tls = quinn::crypto::rustls::QuicClientConfig::try_from(tls).unwrap();
    let mut client = quinn::Endpoint::client((Ipv4Addr::LOCALHOST, 0).into()).unwrap();
    client.set_default_client_config(quinn::ClientConfig::new(Arc::new(tls)));
    client
}

#[tokio::test]
async fn a_client_without_certificate_is_refused() {
    let authority = Authority::new();
    let node = authority.node();
    let client = bare_client(&authority, None, ALPN);
    // Its own half of the handshake may complete before the node has seen the missing certificate.
    if let Ok(connection) = client
        .connect(node.local_addr(), SERVER_NAME)
        .unwrap()
        .await
    {
        let error = soon(connection.closed()).await;
        assert!(
            matches!(error, quinn::ConnectionError::ConnectionClosed(_)),
            "{error}"
        );
    }
    assert_admits_only_the_proper(&node, &authority.node()).await;
}

#[tokio::test]
async fn another_protocol_is_refused() {
    let authority = Authority::new();
    let node = authority.node();
    let client = bare_client(&authority, Some(authority.issue()), b"pantala/999");
    let result = soon(client.connect(node.local_addr(), SERVER_NAME).unwrap()).await;
    assert!(result.is_err());
    assert_admits_only_the_proper(&node, &authority.node()).await;
}

#[tokio::test]
async fn another_certificate_of_the_authority_does_not_pass_for_a_nodes() {
    let authority = Authority::new();
    let node = authority.node();
    let control = authority.issue_with("control.pantala", &node_key(), |_| {});
    let refused = Endpoint::bind(EndpointConfig {
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        identity: control.clone(),
        limits: limits(),
        driver: crate::DRIVER,
    });
    assert!(matches!(
        refused,
        Err(BindError::Identity(IdentityError::NotANode))
    ));
    let client = bare_client(&authority, Some(control), ALPN);
    let connection = soon(client.connect(node.local_addr(), SERVER_NAME).unwrap())
        .await
        .unwrap();
    let quinn::ConnectionError::ApplicationClosed(close) = soon(connection.closed()).await else {
        panic!("not refused");
    };
    assert_eq!(close.error_code.into_inner(), CloseReason::WrongNode as u64);
    assert_admits_only_the_proper(&node, &authority.node()).await;
}

#[tokio::test]
async fn connecting_fails_where_another_node_answers() {
    let authority = Authority::new();
    let (a, b) = (authority.node(), authority.node());
    let error = soon(a.connect(b.local_addr(), stranger()))
        .await
        .unwrap_err();
    assert_eq!(
        error,
        Error::WrongNode {
            expected: stranger(),
            got: b.node()
        }
    );
    assert!(!error.is_retryable());
}

#[tokio::test]
async fn identities_that_are_of_no_use_are_found_at_the_start() {
    let authority = Authority::new();
    let bind = |identity| {
        Endpoint::bind(EndpointConfig {
            listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            identity,
            limits: limits(),
            driver: crate::DRIVER,
        })
        .map(|_| ())
        .unwrap_err()
    };
    let good = authority.issue();
    let ecdsa = rcgen::KeyPair::generate_for(&rcgen::PKCS_ECDSA_P256_SHA256).unwrap();
    for (identity, expected) in [
        (
            NodeIdentity {
                certificate_chain_der: vec![],
                ..good.clone()
            },
            IdentityError::Absent,
        ),
        (
            NodeIdentity {
                certificate_chain_der: vec![b"garbage".to_vec()],
                ..good.clone()
            },
            IdentityError::Malformed,
        ),
        (
            authority.issue_with(SERVER_NAME, &ecdsa, |_| {}),
            IdentityError::NotEd25519,
        ),
    ] {
        let BindError::Identity(error) = bind(identity) else {
            panic!("expected {expected}");
        };
        assert_eq!(error, expected);
    }
    // A key that is not the certificate's, and an authority that is none.
    for identity in [
        NodeIdentity {
            key_pkcs8_der: node_key().serialize_der(),
            ..good.clone()
        },
        NodeIdentity {
            ca_certificate_der: b"garbage".to_vec(),
            ..good
        },
    ] {
        assert!(matches!(
            bind(identity),
            BindError::Identity(IdentityError::Unusable(_))
        ));
    }
}

#[tokio::test]
async fn a_node_that_is_shut_out_loses_its_connection_and_gets_no_other() {
    let authority = Authority::new();
    let (node, liar, other) = (authority.node(), authority.node(), authority.node());
    let (here, there) = soon(connect(&node, &liar)).await;
    let (kept, _kept_there) = soon(connect(&node, &other)).await;
    node.shut_out(&[liar.node()]);
    assert_eq!(soon(here.closed()).await, Error::ClosedLocally);
    assert!(matches!(
        soon(there.closed()).await,
        Error::ClosedByPeer {
            reason: CloseReason::ShutOut,
            ..
        }
    ));
    assert!(!kept.is_closed());
    assert_eq!(
        soon(node.connect(liar.local_addr(), liar.node()))
            .await
            .unwrap_err(),
        Error::ShutOut(liar.node())
    );
    let error = soon(liar.connect(node.local_addr(), node.node()))
        .await
        .unwrap_err();
    assert!(
        matches!(
            error,
            Error::ClosedByPeer {
                reason: CloseReason::ShutOut,
                ..
            }
        ),
        "{error}"
    );
    assert!(!error.is_retryable());
    node.readmit(&[liar.node()]);
    soon(connect(&liar, &node)).await;
}

//! A cluster in miniature: an authority, nodes with certificates of it, endpoints on loopback.

use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use pantala_quic::{Connection, Endpoint, EndpointConfig, Limits, NodeIdentity, SERVER_NAME};
use pantala_wire::NodeId;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ED25519, date_time_ymd,
};

/// Longest that any step of a test may take before it counts as hung.
pub(crate) const HUNG: Duration = Duration::from_secs(60);

/// A certificate authority.
pub(crate) struct Authority {
    issuer: Issuer<'static, KeyPair>,
    pub(crate) certificate_der: Vec<u8>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let key = KeyPair::generate().unwrap();
        let mut params = CertificateParams::new(vec![]).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        let certificate_der = params.self_signed(&key).unwrap().der().to_vec();
        Self {
            issuer: Issuer::new(params, key),
            certificate_der,
        }
    }

    /// A node's identity, with a certificate changed by `change`.
    pub(crate) fn issue_with(
        &self,
        name: &str,
        key: &KeyPair,
        change: impl FnOnce(&mut CertificateParams),
    ) -> NodeIdentity {
        let mut params = CertificateParams::new(vec![name.to_owned()]).unwrap();
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        change(&mut params);
        NodeIdentity {
            certificate_chain_der: vec![
                params.signed_by(key, &self.issuer).unwrap().der().to_vec(),
            ],
            key_pkcs8_der: key.serialize_der(),
            ca_certificate_der: self.certificate_der.clone(),
        }
    }

    pub(crate) fn issue(&self) -> NodeIdentity {
        self.issue_with(SERVER_NAME, &node_key(), |_| {})
    }

    pub(crate) fn issue_expired(&self) -> NodeIdentity {
        self.issue_with(SERVER_NAME, &node_key(), |params| {
            params.not_before = date_time_ymd(2001, 1, 1);
            params.not_after = date_time_ymd(2002, 1, 1);
        })
    }

    /// An endpoint of a new node.
    pub(crate) fn node(&self) -> Endpoint {
        endpoint(self.issue(), limits())
    }

    pub(crate) fn node_with(&self, limits: Limits) -> Endpoint {
        endpoint(self.issue(), limits)
    }
}

pub(crate) fn node_key() -> KeyPair {
    KeyPair::generate_for(&PKCS_ED25519).unwrap()
}

/// The defaults, with a time for handshakes that a loaded machine keeps.
pub(crate) fn limits() -> Limits {
    Limits {
        handshake_timeout: Duration::from_secs(20),
        ..Limits::default()
    }
}

pub(crate) fn endpoint(identity: NodeIdentity, limits: Limits) -> Endpoint {
    Endpoint::bind(EndpointConfig {
        listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        identity,
        limits,
        driver: crate::DRIVER,
    })
    .unwrap()
}

/// A connection between two endpoints, as both see it.
pub(crate) async fn connect(from: &Endpoint, to: &Endpoint) -> (Connection, Connection) {
    let (here, there) = tokio::join!(from.connect(to.local_addr(), to.node()), to.accept());
    (here.unwrap(), there.unwrap())
}

/// `future`, unless it hangs.
pub(crate) async fn soon<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(HUNG, future)
        .await
        .expect("the test hangs")
}

/// Deterministic noise.
pub(crate) struct Noise(pub(crate) u64);

impl Noise {
    pub(crate) fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
    pub(crate) fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }
}

/// A node ID that no test node has.
pub(crate) fn stranger() -> NodeId {
    NodeId::new([7; 32])
}

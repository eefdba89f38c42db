//! Who speaks: TLS 1.3 with a certificate of the cluster's authority on both sides.
//!
//! Both sides verify, with webpki, the chain, the validity period, the key's use and the name
//! "node.pantala" of the other's certificate. The name keeps the cluster's other certificates (control's
//! own) from passing for a node's. The node's ID is the Ed25519 key of its certificate, which TLS makes the
//! peer sign with. There is no resumption, so that an expired certificate ends with its connections, and no
//! 0-RTT, whose bytes could be replayed.

use std::sync::Arc;

use pantala_wire::NodeId;
use ring::hmac;
use rustls::client::Resumption;
use rustls::client::WebPkiServerVerifier;
use rustls::crypto::CryptoProvider;
use rustls::server::{NoServerSessionStorage, ParsedCertificate, WebPkiClientVerifier};
use rustls::version::TLS13;
use rustls::{CipherSuite, ClientConfig, RootCertStore, ServerConfig};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer, ServerName};
use x509_parser::oid_registry::OID_SIG_ED25519;
use x509_parser::prelude::{FromDer, X509Certificate};

use crate::config::NodeIdentity;

/// The protocol's name in TLS.
pub const ALPN: &[u8] = b"pantala/1";
/// The name that every node's certificate carries.
pub const SERVER_NAME: &str = "node.pantala";

/// A certificate or key that is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IdentityError {
    /// No certificate at all.
    #[error("no certificate")]
    Absent,
    /// Bytes that are no X.509 certificate.
    #[error("malformed certificate")]
    Malformed,
    /// The certificate's key is no Ed25519 key.
    #[error("the certificate's key is not an Ed25519 key")]
    NotEd25519,
    /// The certificate is not for a node.
    #[error("the certificate does not name {SERVER_NAME:?}: it is not a node's")]
    NotANode,
    /// TLS does not take the certificate, the key, or the authority.
    #[error("unusable certificate, key or authority: {0}")]
    Unusable(String),
}

fn unusable(error: impl std::fmt::Display) -> IdentityError {
    IdentityError::Unusable(error.to_string())
}

/// The configurations of both roles.
pub(crate) struct Tls {
    pub(crate) node: NodeId,
    pub(crate) client: Arc<ClientConfig>,
    pub(crate) server: Arc<ServerConfig>,
    /// A secret that is the same after a restart, for telling old peers of it.
    pub(crate) reset_key: [u8; 32],
}

impl Tls {
    pub(crate) fn new(identity: &NodeIdentity) -> Result<Self, IdentityError> {
        let provider = Arc::new(provider());
        let chain: Vec<CertificateDer<'static>> = identity
            .certificate_chain_der
            .iter()
            .map(|der| CertificateDer::from(der.clone()))
            .collect();
        let node = node_of(&chain)?;
        let key = || -> PrivateKeyDer<'static> {
            PrivatePkcs8KeyDer::from(identity.key_pkcs8_der.clone()).into()
        };
        let mut roots = RootCertStore::empty();
        roots
            .add(CertificateDer::from(identity.ca_certificate_der.clone()))
            .map_err(unusable)?;
        let roots = Arc::new(roots);

        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(unusable)?;
        let mut server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .with_client_cert_verifier(verifier)
            .with_single_cert(chain.clone(), key())
            .map_err(unusable)?;
        server.alpn_protocols = vec![ALPN.to_vec()];
        server.session_storage = Arc::new(NoServerSessionStorage {});
        server.send_tls13_tickets = 0;
        server.max_early_data_size = 0;

        let verifier = WebPkiServerVerifier::builder_with_provider(roots, provider.clone())
            .build()
            .map_err(unusable)?;
        let mut client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&TLS13])
            .map_err(unusable)?
            .with_webpki_verifier(verifier)
            .with_client_auth_cert(chain, key())
            .map_err(unusable)?;
        client.alpn_protocols = vec![ALPN.to_vec()];
        client.resumption = Resumption::disabled();
        client.enable_early_data = false;
        Ok(Self {
            node,
            client: Arc::new(client),
            server: Arc::new(server),
            reset_key: reset_key(&identity.key_pkcs8_der),
        })
    }
}

/// Derived from the private key, one way, so that it needs no place of its own to be kept.
fn reset_key(private_key: &[u8]) -> [u8; 32] {
    let key = hmac::Key::new(hmac::HMAC_SHA256, private_key);
    let mut out = [0; 32];
    out.copy_from_slice(hmac::sign(&key, b"pantala stateless reset v1").as_ref());
    out
}

/// AWS-LC, the fastest at packets of any size, with AES-128-GCM in front: a third of ChaCha20's cost on
/// processors with AES instructions.
fn provider() -> CryptoProvider {
    let mut provider = rustls::crypto::aws_lc_rs::default_provider();
    provider
        .cipher_suites
        .sort_by_key(|suite| suite.suite() != CipherSuite::TLS13_AES_128_GCM_SHA256);
    provider
}

/// The node whose certificate, already verified against the authority, stands first in `chain`.
pub(crate) fn node_of(chain: &[CertificateDer<'_>]) -> Result<NodeId, IdentityError> {
    let leaf = chain.first().ok_or(IdentityError::Absent)?;
    let parsed = ParsedCertificate::try_from(leaf).map_err(|_| IdentityError::Malformed)?;
    let name = ServerName::try_from(SERVER_NAME).map_err(|_| IdentityError::NotANode)?;
    rustls::client::verify_server_name(&parsed, &name).map_err(|_| IdentityError::NotANode)?;
    let (_, certificate) = X509Certificate::from_der(leaf).map_err(|_| IdentityError::Malformed)?;
    let key = certificate.public_key();
    if key.algorithm.algorithm != OID_SIG_ED25519 {
        return Err(IdentityError::NotEd25519);
    }
    NodeId::try_from(key.subject_public_key.data.as_ref()).map_err(|_| IdentityError::NotEd25519)
}

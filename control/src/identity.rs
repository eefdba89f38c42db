//! Who a node is: its Ed25519 key and the certificate that makes it a member of the cluster.
//!
//! It owns `<dir>/identity/`: `key.pem`, made on the first start and never changed, `ca.pem` and
//! `certificate.pem`, got by joining. A crash between the writes is harmless: the certificate is
//! written last, and without it the node joins again with the same key.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pantala_wire::{BlobDigest, Claim, NodeId, PieceDigest, PieceIndex};
use ring::rand::SystemRandom;
use ring::signature::{Ed25519KeyPair, KeyPair};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::authority::proof_form;
use crate::client::channel::{self, ChannelError};
use crate::disk::{self, DiskError};
use crate::proto::JoinRequest;
use crate::proto::control_client::ControlClient;
use crate::token::JoinToken;
use crate::x509;

/// The node's identity cannot be loaded or got.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// Its files cannot be read or written.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A file is not what this program wrote.
    #[error("{path} is damaged ({what}); restore it from a backup, or remove its folder to join the cluster as a new node", path = path.display())]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// The node is a member of another cluster than the one it shall join.
    #[error("this node belongs to another cluster than the join token; give the token of its own cluster, or remove {path} to leave that cluster and join this one", path = .0.display())]
    WrongCluster(PathBuf),
    /// Control cannot be reached, or is not the one of the token.
    #[error("cannot join: {0}")]
    Channel(#[from] ChannelError),
    /// Control does not let the node in.
    #[error(
        "control at {address} refuses the join: {reason}; `pantala-control token` prints the token that is valid now"
    )]
    Refused {
        /// Control's address.
        address: String,
        /// What it says.
        reason: String,
    },
    /// What control answers is no certificate for this node.
    #[error("control at {0} answered the join with a certificate that is not this node's")]
    Reply(String),
    /// The system gives no random bytes for a key.
    #[error("cannot make a key: the system gives no random bytes")]
    Random,
}

impl IdentityError {
    /// Whether the same join may succeed later without anybody changing anything.
    pub fn is_retryable(&self) -> bool {
        matches!(self, Self::Channel(error) if error.is_retryable())
    }
}

/// Where and with what right a node joins. The embedded control is joined over loopback the same way.
#[derive(Debug, Clone)]
pub struct JoinTarget {
    /// Control's address, `host:port`.
    pub address: String,
    /// The right to join.
    pub token: JoinToken,
}

/// The key and certificate of a node. Clones share them.
#[derive(Clone)]
pub struct Identity(Arc<Inner>);

struct Inner {
    node: NodeId,
    signer: Ed25519KeyPair,
    key: PrivatePkcs8KeyDer<'static>,
    certificate: CertificateDer<'static>,
    ca_certificate: CertificateDer<'static>,
}

impl Identity {
    /// The identity under the data directory `dir`, or `None` where the node has not joined yet.
    ///
    /// # Errors
    /// [`IdentityError`] where its files cannot be read or do not fit together.
    pub fn load(dir: &Path) -> Result<Option<Self>, IdentityError> {
        let dir = dir.join("identity");
        let key_path = dir.join("key.pem");
        let certificate_path = dir.join("certificate.pem");
        let ca_path = dir.join("ca.pem");
        let Some(certificate) = disk::read(&certificate_path)? else {
            return Ok(None);
        };
        let corrupt = |path: &Path, what| IdentityError::Corrupt {
            path: path.to_owned(),
            what,
        };
        let key = disk::read(&key_path)?.ok_or_else(|| corrupt(&key_path, "it is missing"))?;
        let ca = disk::read(&ca_path)?.ok_or_else(|| corrupt(&ca_path, "it is missing"))?;
        let key = parse_key(&key_path, &key)?;
        let certificate = CertificateDer::from_pem_slice(&certificate)
            .map_err(|_| corrupt(&certificate_path, "no certificate in it"))?;
        let ca = CertificateDer::from_pem_slice(&ca)
            .map_err(|_| corrupt(&ca_path, "no certificate in it"))?;
        Self::assemble(key, certificate, ca)
            .map(Some)
            .map_err(|what| corrupt(&certificate_path, what))
    }

    /// The identity under the data directory `dir`; where there is none, makes a key and joins.
    ///
    /// # Errors
    /// [`IdentityError`]; [`IdentityError::is_retryable`] says whether trying again makes sense.
    pub async fn load_or_join(dir: &Path, target: &JoinTarget) -> Result<Self, IdentityError> {
        let identity_dir = dir.join("identity");
        if let Some(found) = Self::load(dir)? {
            if found.ca_certificate_der() != target.token.ca_certificate_der() {
                return Err(IdentityError::WrongCluster(identity_dir));
            }
            return Ok(found);
        }
        disk::make_private_dir(&identity_dir)?;
        let key = load_or_make_key(&identity_dir.join("key.pem"))?;
        let identity = join(key, target).await?;
        let write = |name: &str, der: &CertificateDer<'_>| {
            let text = x509::pem("CERTIFICATE", der);
            disk::write_private(&identity_dir.join(name), text.as_bytes())
        };
        write("ca.pem", &identity.0.ca_certificate)?;
        write("certificate.pem", &identity.0.certificate)?;
        Ok(identity)
    }

    fn assemble(
        key: PrivatePkcs8KeyDer<'static>,
        certificate: CertificateDer<'static>,
        ca_certificate: CertificateDer<'static>,
    ) -> Result<Self, &'static str> {
        let signer = signer(&key).ok_or("the key is no Ed25519 key")?;
        let node = node_of(&signer);
        if x509::node_of(&certificate) != Some(node) {
            return Err("it belongs to another key");
        }
        if !x509::is_signed_by(&certificate, &ca_certificate) {
            return Err("the cluster's CA did not sign it");
        }
        Ok(Self(Arc::new(Inner {
            node,
            signer,
            key,
            certificate,
            ca_certificate,
        })))
    }

    /// The node's name in the cluster.
    pub fn node_id(&self) -> NodeId {
        self.0.node
    }
    /// The node's certificate, as the chain to present in a handshake.
    pub fn certificate_chain_der(&self) -> Vec<CertificateDer<'static>> {
        vec![self.0.certificate.clone()]
    }
    /// The node's private key, PKCS#8.
    pub fn key_der(&self) -> PrivateKeyDer<'static> {
        PrivateKeyDer::Pkcs8(self.0.key.clone_key())
    }
    /// The certificate of the cluster's CA, by which other nodes and control are recognised.
    pub fn ca_certificate_der(&self) -> &CertificateDer<'static> {
        &self.0.ca_certificate
    }
    /// This node's word that it read `piece` of `blob` from the source and its digest is `digest`.
    pub fn sign_claim(&self, blob: &BlobDigest, piece: PieceIndex, digest: &PieceDigest) -> Claim {
        let signature = self.0.signer.sign(&Claim::signed_form(blob, piece, digest));
        Claim {
            piece_digest: *digest,
            author: self.0.node,
            signature: signature
                .as_ref()
                .try_into()
                .expect("an Ed25519 signature has 64 bytes"),
        }
    }
    pub(crate) fn certificate_pem(&self) -> String {
        x509::pem("CERTIFICATE", &self.0.certificate)
    }
    pub(crate) fn key_pem(&self) -> String {
        x509::pem("PRIVATE KEY", self.0.key.secret_pkcs8_der())
    }
}

impl std::fmt::Debug for Identity {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_tuple("Identity").field(&self.0.node).finish()
    }
}

fn signer(key: &PrivatePkcs8KeyDer<'_>) -> Option<Ed25519KeyPair> {
    Ed25519KeyPair::from_pkcs8(key.secret_pkcs8_der()).ok()
}

fn node_of(signer: &Ed25519KeyPair) -> NodeId {
    NodeId::try_from(signer.public_key().as_ref()).expect("an Ed25519 public key has 32 bytes")
}

fn parse_key(path: &Path, content: &[u8]) -> Result<PrivatePkcs8KeyDer<'static>, IdentityError> {
    PrivatePkcs8KeyDer::from_pem_slice(content)
        .ok()
        .filter(|key| signer(key).is_some())
        .ok_or_else(|| IdentityError::Corrupt {
            path: path.to_owned(),
            what: "no Ed25519 private key in it",
        })
}

fn load_or_make_key(path: &Path) -> Result<PrivatePkcs8KeyDer<'static>, IdentityError> {
    if let Some(content) = disk::read(path)? {
        return parse_key(path, &content);
    }
    let key =
        Ed25519KeyPair::generate_pkcs8(&SystemRandom::new()).map_err(|_| IdentityError::Random)?;
    disk::write_private(path, x509::pem("PRIVATE KEY", key.as_ref()).as_bytes())?;
    Ok(PrivatePkcs8KeyDer::from(key.as_ref().to_vec()))
}

async fn join(
    key: PrivatePkcs8KeyDer<'static>,
    target: &JoinTarget,
) -> Result<Identity, IdentityError> {
    let ca = target.token.ca_certificate_der();
    let signer = signer(&key).ok_or(IdentityError::Random)?;
    let node = node_of(&signer);
    let channel = channel::connect(&target.address, ca, None).await?;
    let request = JoinRequest {
        secret: target.token.secret().to_vec(),
        public_key: node.as_bytes().to_vec(),
        proof: signer.sign(&proof_form(node, ca)).as_ref().to_vec(),
    };
    let reply = ControlClient::new(channel)
        .join(request)
        .await
        .map_err(|status| match status.code() {
            tonic::Code::Unavailable | tonic::Code::DeadlineExceeded => {
                ChannelError::lost(&target.address, &status).into()
            }
            _ => IdentityError::Refused {
                address: target.address.clone(),
                reason: status.message().to_owned(),
            },
        })?
        .into_inner();
    Identity::assemble(key, CertificateDer::from(reply.certificate), ca.clone())
        .map_err(|_| IdentityError::Reply(target.address.clone()))
}

//! The cluster's CA: made on control's first start, loaded ever after.
//!
//! It owns `<dir>/control/`: `ca-key.pem` and `ca.pem`, the root of all trust in the cluster, and
//! `join-token`, which lets nodes in. All are readable by their owner alone. To change the token,
//! remove its file and start control again; nodes that have joined stay members.
//!
//! Certificates are valid from 1975 to 2125. A node whose clock is wrong must still reach its peers,
//! and a fleet must not stop on a day that nobody remembers, so nothing here relies on expiry: a node
//! is put out of the cluster by shutting it out, a stolen CA key by making a new CA.

use std::path::{Path, PathBuf};

use pantala_wire::NodeId;
use rcgen::{
    BasicConstraints, CertificateParams, DistinguishedName, DnType, ExtendedKeyUsagePurpose, IsCa,
    Issuer, KeyPair, KeyUsagePurpose, PKCS_ED25519, SubjectPublicKeyInfo, date_time_ymd,
};
use ring::rand::{SecureRandom, SystemRandom};
use ring::{digest, hmac};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::disk::{self, DiskError};
use crate::token::{JoinToken, TokenError};
use crate::x509;

/// The name in every node's certificate.
pub const NODE_NAME: &str = "node.pantala";
/// The name in control's own certificate.
pub const CONTROL_NAME: &str = "control.pantala";
/// What every Ed25519 SubjectPublicKeyInfo starts with (RFC 8410, section 4).
const ED25519_SPKI_PREFIX: [u8; 12] = [
    0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00,
];
/// Binds a join's signature to this use.
const PROOF_CONTEXT: &[u8] = b"pantala join v1";

/// The CA cannot be made, loaded or used.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// Its files cannot be read or written.
    #[error(transparent)]
    Disk(#[from] DiskError),
    /// A file is not what control wrote.
    #[error(
        "{path} is damaged ({what}); restore it from a backup, or move the folder away to make a new cluster, which every node must then join anew",
        path = path.display()
    )]
    Corrupt {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: &'static str,
    },
    /// One half of the CA is there, the other is not.
    #[error("{path} is missing beside the other half of the CA; restore it from a backup, or move the folder away to make a new cluster, which every node must then join anew", path = .0.display())]
    Half(PathBuf),
    /// The token's file holds something else.
    #[error("{path}: {cause}; remove the file and start control again to get a new token", path = path.display())]
    Token {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        cause: TokenError,
    },
    /// Key generation or signing failed.
    #[error("cannot make a key or certificate: {0}")]
    Crypto(#[from] rcgen::Error),
    /// The system gives no random bytes.
    #[error("the system gives no random bytes")]
    Random,
}

/// The CA of one cluster.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    ca_certificate: CertificateDer<'static>,
    token: JoinToken,
    is_new: bool,
}

impl Authority {
    /// The CA whose files are under `dir`; made there on the first start.
    ///
    /// # Errors
    /// [`AuthorityError`] where the files cannot be used. A damaged CA is never replaced silently:
    /// that would leave every node outside.
    pub fn open(dir: &Path) -> Result<Self, AuthorityError> {
        let dir = dir.join("control");
        disk::make_private_dir(&dir)?;
        let key_path = dir.join("ca-key.pem");
        let certificate_path = dir.join("ca.pem");
        let token_path = token_path(&dir);
        let found = (disk::read(&key_path)?, disk::read(&certificate_path)?);
        let is_new = found.0.is_none() && found.1.is_none();
        let (key, ca_certificate) = match found {
            (Some(key), Some(certificate)) => {
                load(&key_path, &key, &certificate_path, &certificate)?
            }
            (None, None) => {
                let (key, certificate) = create()?;
                // The key goes last: a certificate alone is a start that did not finish.
                disk::write_private(
                    &certificate_path,
                    x509::pem("CERTIFICATE", &certificate).as_bytes(),
                )?;
                disk::write_private(
                    &key_path,
                    x509::pem("PRIVATE KEY", key.serialized_der()).as_bytes(),
                )?;
                (key, certificate)
            }
            (None, Some(_)) => return Err(AuthorityError::Half(key_path)),
            (Some(_), None) => return Err(AuthorityError::Half(certificate_path)),
        };
        let token = match disk::read(&token_path)? {
            Some(_) => {
                let token =
                    JoinToken::from_file(&token_path).map_err(|cause| AuthorityError::Token {
                        path: token_path.clone(),
                        cause,
                    })?;
                if *token.ca_certificate_der() != ca_certificate {
                    return Err(AuthorityError::Corrupt {
                        path: token_path,
                        what: "it is the token of another cluster",
                    });
                }
                token
            }
            None => {
                let token = JoinToken::new(random()?, ca_certificate.clone());
                disk::write_private(&token_path, format!("{}\n", token.reveal()).as_bytes())?;
                token
            }
        };
        Ok(Self {
            issuer: Issuer::from_ca_cert_der(&ca_certificate, key)?,
            ca_certificate,
            token,
            is_new,
        })
    }

    /// The token that nodes join with.
    pub fn join_token(&self) -> &JoinToken {
        &self.token
    }
    /// The CA's certificate.
    pub fn ca_certificate_der(&self) -> &CertificateDer<'static> {
        &self.ca_certificate
    }
    /// Whether this start made the CA, so that no node can have known control before.
    pub fn is_new(&self) -> bool {
        self.is_new
    }

    /// A certificate for control itself, with a key that lives in memory only.
    pub(crate) fn issue_control(
        &self,
    ) -> Result<(CertificateDer<'static>, PrivateKeyDer<'static>), AuthorityError> {
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let mut params = leaf("pantala control", CONTROL_NAME)?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        let certificate = params.signed_by(&key, &self.issuer)?;
        let key = PrivatePkcs8KeyDer::from(key.serialized_der().to_vec());
        Ok((certificate.der().clone(), key.into()))
    }

    /// A certificate for `node`. The caller has seen that the applicant owns the key.
    pub(crate) fn issue_node(
        &self,
        node: NodeId,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        let spki = [&ED25519_SPKI_PREFIX[..], node.as_bytes()].concat();
        let spki = SubjectPublicKeyInfo::from_der(&spki)?;
        let mut params = leaf(&node.to_string(), NODE_NAME)?;
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        Ok(params.signed_by(&spki, &self.issuer)?.der().clone())
    }

    /// Whether `secret` is that of the token; the time it takes says nothing about the secret.
    pub(crate) fn admits(&self, secret: &[u8]) -> bool {
        // `hmac::verify` is ring's comparison in constant time, and hashing evens out the lengths.
        let key = hmac::Key::new(hmac::HMAC_SHA256, PROOF_CONTEXT);
        let right = hmac::sign(&key, self.token.secret());
        hmac::verify(&key, secret, right.as_ref()).is_ok()
    }
}

impl std::fmt::Debug for Authority {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Authority").finish_non_exhaustive()
    }
}

/// Where control keeps the token of the data directory `dir`.
pub fn join_token_path(dir: &Path) -> PathBuf {
    token_path(&dir.join("control"))
}

fn token_path(control_dir: &Path) -> PathBuf {
    control_dir.join("join-token")
}

/// What a joining node signs: it owns this key and wants it in this cluster.
pub(crate) fn proof_form(node: NodeId, ca_certificate: &[u8]) -> Vec<u8> {
    let ca = digest::digest(&digest::SHA256, ca_certificate);
    [PROOF_CONTEXT, node.as_bytes(), ca.as_ref()].concat()
}

fn random<const N: usize>() -> Result<[u8; N], AuthorityError> {
    let mut bytes = [0; N];
    SystemRandom::new()
        .fill(&mut bytes)
        .map_err(|_| AuthorityError::Random)?;
    Ok(bytes)
}

fn base(common_name: &str) -> CertificateParams {
    let mut params = CertificateParams::default();
    params.not_before = date_time_ymd(1975, 1, 1);
    params.not_after = date_time_ymd(2125, 1, 1);
    params.distinguished_name = DistinguishedName::new();
    params
        .distinguished_name
        .push(DnType::CommonName, common_name);
    params
}

fn leaf(common_name: &str, name: &str) -> Result<CertificateParams, AuthorityError> {
    let mut params = base(common_name);
    params.subject_alt_names = vec![rcgen::SanType::DnsName(name.try_into()?)];
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn create() -> Result<(KeyPair, CertificateDer<'static>), AuthorityError> {
    let key = KeyPair::generate_for(&PKCS_ED25519)?;
    // The random part tells clusters apart for people; the key does for machines.
    let mut params = base(&format!("pantala cluster {}", hex::encode(random::<4>()?)));
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    let certificate = params.self_signed(&key)?.der().clone();
    Ok((key, certificate))
}

fn load(
    key_path: &Path,
    key: &[u8],
    certificate_path: &Path,
    certificate: &[u8],
) -> Result<(KeyPair, CertificateDer<'static>), AuthorityError> {
    let corrupt = |path: &Path, what| AuthorityError::Corrupt {
        path: path.to_owned(),
        what,
    };
    let key = PrivatePkcs8KeyDer::from_pem_slice(key)
        .ok()
        .and_then(|der| KeyPair::from_pkcs8_der_and_sign_algo(&der, &PKCS_ED25519).ok())
        .ok_or_else(|| corrupt(key_path, "no Ed25519 private key in it"))?;
    let certificate = CertificateDer::from_pem_slice(certificate)
        .ok()
        .filter(|der| x509::is_signed_by(der, der))
        .ok_or_else(|| corrupt(certificate_path, "no CA certificate in it"))?;
    if x509::node_of(&certificate).map(|id| id.as_bytes().to_vec())
        != Some(key.public_key_raw().to_vec())
    {
        return Err(corrupt(certificate_path, "it belongs to another key"));
    }
    Ok((key, certificate))
}

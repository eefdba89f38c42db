//! The join token: the secret that lets a node in, and the CA certificate by which the node knows
//! that it talks to the right control from the first byte.
//!
//! As text: `pantala-join-1.` and the unpadded base64url of the 32-byte secret and the DER of the CA
//! certificate. Whoever has it can join, so it never shows in logs: `Debug` hides it and only
//! [`JoinToken::reveal`] gives the text.

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use rustls_pki_types::CertificateDer;

/// What every token starts with; the number is the version of its form.
const PREFIX: &str = "pantala-join-1.";
/// Bytes of the secret.
pub(crate) const SECRET_LEN: usize = 32;
/// Longest text taken for a token: a CA certificate is some hundreds of bytes.
const TEXT_LEN_MAX: usize = 16 * 1024;

/// A text that is no join token, or a file that holds none.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// Not in the form of a token. The text itself is not repeated: it may be a mistyped secret.
    #[error(
        "not a join token ({0}); `pantala-control token` prints the right one, a single line that starts with \"{PREFIX}\""
    )]
    Malformed(&'static str),
    /// The file cannot be read.
    #[error("cannot read the join token in {path}: {cause}; `pantala-control token` prints it where control runs", path = path.display())]
    File {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        cause: std::io::Error,
    },
}

/// The right to join a cluster, and the means to recognise it.
#[derive(Clone, PartialEq, Eq)]
pub struct JoinToken {
    secret: [u8; SECRET_LEN],
    ca_certificate: CertificateDer<'static>,
}

impl JoinToken {
    pub(crate) fn new(secret: [u8; SECRET_LEN], ca_certificate: CertificateDer<'static>) -> Self {
        Self {
            secret,
            ca_certificate,
        }
    }
    /// The token in the file at `path`; white space around it does not matter.
    ///
    /// # Errors
    /// [`TokenError`] where the file cannot be read or holds no token.
    pub fn from_file(path: &Path) -> Result<Self, TokenError> {
        std::fs::read_to_string(path)
            .map_err(|cause| TokenError::File {
                path: path.to_owned(),
                cause,
            })?
            .trim()
            .parse()
    }
    /// The secret text of the token, for a file or a person; never for a log.
    pub fn reveal(&self) -> String {
        let mut bytes = self.secret.to_vec();
        bytes.extend_from_slice(&self.ca_certificate);
        format!("{PREFIX}{}", URL_SAFE_NO_PAD.encode(bytes))
    }
    /// The CA of the cluster that the token is for.
    pub fn ca_certificate_der(&self) -> &CertificateDer<'static> {
        &self.ca_certificate
    }
    pub(crate) fn secret(&self) -> &[u8; SECRET_LEN] {
        &self.secret
    }
}

impl FromStr for JoinToken {
    type Err = TokenError;
    fn from_str(text: &str) -> Result<Self, TokenError> {
        if text.len() > TEXT_LEN_MAX {
            return Err(TokenError::Malformed("too long"));
        }
        let rest = text
            .strip_prefix(PREFIX)
            .ok_or(TokenError::Malformed("wrong start"))?;
        let bytes = URL_SAFE_NO_PAD
            .decode(rest)
            .map_err(|_| TokenError::Malformed("not base64url, perhaps cut off"))?;
        let (secret, certificate) = bytes
            .split_first_chunk::<SECRET_LEN>()
            .ok_or(TokenError::Malformed("too short"))?;
        // A token that lost its end in a copy would else show up only as a failed handshake.
        match x509_parser::parse_x509_certificate(certificate) {
            Ok(([], _)) => Ok(Self::new(
                *secret,
                CertificateDer::from(certificate.to_vec()),
            )),
            _ => Err(TokenError::Malformed(
                "its CA certificate cannot be read, perhaps it is cut off",
            )),
        }
    }
}

impl fmt::Debug for JoinToken {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("JoinToken(hidden)")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_token_survives_its_text_and_half_a_token_is_told_apart() {
        let key = rcgen::KeyPair::generate_for(&rcgen::PKCS_ED25519).unwrap();
        let ca = rcgen::CertificateParams::default()
            .self_signed(&key)
            .unwrap();
        let token = JoinToken::new([7; SECRET_LEN], ca.der().clone());
        let text = token.reveal();
        assert_eq!(text.parse::<JoinToken>().unwrap(), token);
        for end in 0..text.len() {
            let error = text[..end].parse::<JoinToken>().unwrap_err().to_string();
            assert!(error.contains("pantala-control token"), "{error}");
            assert!(
                end < 20 || !error.contains(&text[..end]),
                "the error shows the token"
            );
        }
        assert!("x".repeat(1 << 20).parse::<JoinToken>().is_err());
        assert!(!format!("{token:?}").contains(&text[20..30]));
    }
}

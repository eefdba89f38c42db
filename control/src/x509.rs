//! What is read from and checked about certificates outside of TLS handshakes, and their PEM form.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use pantala_wire::NodeId;
use ring::signature::{ED25519, UnparsedPublicKey};
use x509_parser::certificate::X509Certificate;
use x509_parser::oid_registry::OID_SIG_ED25519;

/// Columns of a PEM line (RFC 7468, section 2).
const PEM_LINE_LEN: usize = 64;

fn parse(certificate: &[u8]) -> Option<X509Certificate<'_>> {
    match x509_parser::parse_x509_certificate(certificate) {
        Ok(([], parsed)) => Some(parsed),
        _ => None,
    }
}

/// The node that a certificate is for: its Ed25519 public key. `None` where it is no such thing.
///
/// Only the TLS layer, or [`is_signed_by`], says whether the certificate is worth anything.
pub(crate) fn node_of(certificate: &[u8]) -> Option<NodeId> {
    let parsed = parse(certificate)?;
    let key = parsed.public_key();
    if key.algorithm.algorithm != OID_SIG_ED25519 {
        return None;
    }
    NodeId::try_from(key.subject_public_key.data.as_ref()).ok()
}

/// Whether `ca` signed `certificate`.
pub(crate) fn is_signed_by(certificate: &[u8], ca: &[u8]) -> bool {
    let (Some(parsed), Some(ca)) = (parse(certificate), parse(ca)) else {
        return false;
    };
    parsed.signature_algorithm.algorithm == OID_SIG_ED25519
        && UnparsedPublicKey::new(&ED25519, ca.public_key().subject_public_key.data.as_ref())
            .verify(
                parsed.tbs_certificate.as_ref(),
                parsed.signature_value.data.as_ref(),
            )
            .is_ok()
}

/// `der` as PEM under `label` (RFC 7468).
pub(crate) fn pem(label: &str, der: &[u8]) -> String {
    let text = STANDARD.encode(der);
    let mut out = format!("-----BEGIN {label}-----\n");
    let mut rest = text.as_str();
    while !rest.is_empty() {
        let (line, more) = rest.split_at(rest.len().min(PEM_LINE_LEN));
        out.push_str(line);
        out.push('\n');
        rest = more;
    }
    out.push_str(&format!("-----END {label}-----\n"));
    out
}

//! Whom to trust: the machine's own roots where it has any, and the CAs of the configuration.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject as _;

use crate::config::ConfigError;

/// Protocols offered, best first.
const ALPN: [&[u8]; 2] = [b"h2", b"http/1.1"];

/// The machine's roots. A machine without any is no error: it may speak plain HTTP only, or have
/// its CAs in the configuration.
pub(crate) fn platform_roots() -> RootCertStore {
    let found = rustls_native_certs::load_native_certs();
    for error in &found.errors {
        tracing::debug!(%error, "a source of root certificates is not used");
    }
    let mut roots = RootCertStore::empty();
    let (added, ignored) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        tracing::info!(
            "no root certificates on this machine: https works with configured CAs only"
        );
    } else {
        tracing::debug!(added, ignored, "root certificates of this machine");
    }
    roots
}

/// Adds every certificate of the PEM files; a file without one is an error.
pub(crate) fn add_ca_files(
    roots: &mut RootCertStore,
    files: &[PathBuf],
) -> Result<(), ConfigError> {
    for path in files {
        add_ca_file(roots, path)?;
    }
    Ok(())
}

fn add_ca_file(roots: &mut RootCertStore, path: &Path) -> Result<(), ConfigError> {
    let pem = std::fs::read(path).map_err(|error| ConfigError::CaUnreadable {
        path: path.to_owned(),
        reason: error.to_string(),
    })?;
    let useless = |hint: String| ConfigError::CaUseless {
        path: path.to_owned(),
        hint,
    };
    let mut added_count = 0;
    for certificate in CertificateDer::pem_slice_iter(&pem) {
        let certificate = certificate.map_err(|error| useless(format!(" ({error})")))?;
        roots
            .add(certificate)
            .map_err(|error| useless(format!(" ({error})")))?;
        added_count += 1;
    }
    if added_count == 0 {
        return Err(useless(String::new()));
    }
    Ok(())
}

/// A client's TLS with these roots.
pub(crate) fn client_config(roots: RootCertStore) -> Result<ClientConfig, ConfigError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| ConfigError::Client(error.to_string()))?
        .with_root_certificates(roots)
        .with_no_client_auth();
    config.alpn_protocols = ALPN.iter().map(|name| name.to_vec()).collect();
    Ok(config)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_machine_without_any_root_gets_a_working_configuration() {
        let config = client_config(RootCertStore::empty()).unwrap();
        assert_eq!(config.alpn_protocols[0], b"h2");
    }

    #[test]
    fn a_ca_file_that_cannot_be_used_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("ca.pem");
        let mut roots = RootCertStore::empty();
        let files = [path.clone()];
        let error = add_ca_files(&mut roots, &files).unwrap_err();
        assert!(error.to_string().contains("ca.pem"), "{error}");
        for text in [
            "",
            "no certificate",
            "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n",
        ] {
            std::fs::write(&path, text).unwrap();
            let error = add_ca_files(&mut roots, &files).unwrap_err();
            assert!(matches!(error, ConfigError::CaUseless { .. }), "{error}");
        }
    }
}

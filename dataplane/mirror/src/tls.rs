//! The optional TLS side: certificate and key from PEM files.

use std::path::Path;
use std::sync::Arc;

use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio_rustls::TlsAcceptor;

use crate::config::TlsFiles;
use crate::server::MirrorError;

pub(crate) fn acceptor(files: &TlsFiles) -> Result<TlsAcceptor, MirrorError> {
    let unreadable = |path: &Path, source| MirrorError::TlsFile {
        path: path.to_owned(),
        source,
    };
    let chain: Vec<CertificateDer<'static>> = CertificateDer::pem_file_iter(&files.certificate)
        .and_then(Iterator::collect)
        .map_err(|source| unreadable(&files.certificate, source))?;
    let key = PrivateKeyDer::from_pem_file(&files.key)
        .map_err(|source| unreadable(&files.key, source))?;
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(MirrorError::Tls)?
        .with_no_client_auth()
        .with_single_cert(chain, key)
        .map_err(MirrorError::Tls)?;
    config.alpn_protocols = vec![b"http/1.1".to_vec()];
    Ok(TlsAcceptor::from(Arc::new(config)))
}

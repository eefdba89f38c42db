//! A cluster's certificates: an authority, and nodes with Ed25519 keys.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use pantala_quic::{NodeIdentity, SERVER_NAME};
use pantala_wire::NodeId;
use rcgen::{
    BasicConstraints, CertificateParams, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair,
    KeyUsagePurpose, PKCS_ED25519,
};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;

const AUTHORITY: &str = "authority.der";

/// Writes a new authority's certificate, `count` nodes' certificates and keys, and nginx's, to `dir`.
pub(crate) fn write(dir: &Path, count: usize) -> Result<()> {
    fs::create_dir_all(dir)?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![])?;
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    fs::write(dir.join(AUTHORITY), params.self_signed(&key)?.der())?;
    let issuer = Issuer::new(params, key);
    write_nodes(&issuer, dir, count)?;
    // nginx reads PEM only, and OpenSSL not the form in which Ed25519 keys are written here.
    let key = KeyPair::generate()?;
    let certificate =
        CertificateParams::new(vec![SERVER_NAME.to_owned()])?.signed_by(&key, &issuer)?;
    fs::write(dir.join("nginx.crt.pem"), certificate.pem())?;
    fs::write(dir.join("nginx.key.pem"), key.serialize_pem())?;
    Ok(())
}

/// Writes certificates and keys of `count` more nodes of the cluster of `control`'s data directory.
pub(crate) fn issue(control: &Path, dir: &Path, count: usize) -> Result<()> {
    fs::create_dir_all(dir)?;
    let read = |name: &str| {
        let path = control.join("control").join(name);
        fs::read_to_string(&path).with_context(|| format!("reading {}", path.display()))
    };
    let certificate = read("ca.pem")?;
    let issuer = Issuer::from_ca_cert_pem(&certificate, KeyPair::from_pem(&read("ca-key.pem")?)?)?;
    let der = CertificateDer::from_pem_slice(certificate.as_bytes())
        .context("the authority's certificate is no PEM")?;
    fs::write(dir.join(AUTHORITY), der)?;
    write_nodes(&issuer, dir, count)
}

fn write_nodes(issuer: &Issuer<'_, KeyPair>, dir: &Path, count: usize) -> Result<()> {
    for number in 0..count {
        let key = KeyPair::generate_for(&PKCS_ED25519)?;
        let mut params = CertificateParams::new(vec![SERVER_NAME.to_owned()])?;
        params.extended_key_usages = vec![
            ExtendedKeyUsagePurpose::ServerAuth,
            ExtendedKeyUsagePurpose::ClientAuth,
        ];
        let certificate = params.signed_by(&key, issuer)?;
        let file = |ending: &str| dir.join(format!("{number}.{ending}"));
        fs::write(file("crt"), certificate.der())?;
        fs::write(file("key"), key.serialize_der())?;
        fs::write(file("id"), key.public_key_raw())?;
    }
    Ok(())
}

/// Identity `number` of those in `dir`.
pub(crate) fn read(dir: &Path, number: usize) -> Result<NodeIdentity> {
    let file = |name: String| {
        fs::read(dir.join(&name)).with_context(|| format!("reading {}", dir.join(name).display()))
    };
    Ok(NodeIdentity {
        certificate_chain_der: vec![file(format!("{number}.crt"))?],
        key_pkcs8_der: file(format!("{number}.key"))?,
        ca_certificate_der: file(AUTHORITY.to_owned())?,
    })
}

/// The node ID of identity `number`.
pub(crate) fn node_id(dir: &Path, number: usize) -> Result<NodeId> {
    let raw = fs::read(dir.join(format!("{number}.id")))?;
    NodeId::try_from(raw.as_slice()).context("a node's key is no node ID")
}

//! The token server that docker-registry sends clients to: users, passwords, rights, signed tokens.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::Result;
use base64::Engine;
use base64::prelude::{BASE64_STANDARD, BASE64_URL_SAFE_NO_PAD};
use bytes::Bytes;
use http_body_util::Full;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use rcgen::{CertificateParams, DnType, KeyPair};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::json;

use super::machine::Machine;

/// The `service` of docker-registry's configuration.
pub(crate) const SERVICE: &str = "rig-registry";
/// The `issuer` of docker-registry's configuration.
pub(crate) const ISSUER: &str = "rig-tokens";
const PORT: u16 = 5002;
/// Short, so that a long test sees tokens expire; docker-registry allows a minute of leeway.
const TOKEN_TTL_S: u64 = 60;

/// One user: the password and the repositories that may be read. Pushing needs `push`.
#[derive(Debug, Clone)]
pub(crate) struct User {
    pub(crate) password: &'static str,
    /// A prefix of repository names; empty for all.
    pub(crate) repositories: &'static str,
    pub(crate) push: bool,
}

/// A running token server; ends when dropped.
#[derive(Debug)]
pub(crate) struct TokenServer {
    address: SocketAddr,
    /// PEM file of the certificate that tokens are signed with.
    pub(crate) bundle: PathBuf,
    issued: Arc<AtomicU64>,
    task: tokio::task::JoinHandle<()>,
}

struct Signer {
    key: EcdsaKeyPair,
    certificate: String,
    users: HashMap<&'static str, User>,
    issued: Arc<AtomicU64>,
}

impl TokenServer {
    /// Serves tokens on `machine`; `dir` takes the certificate.
    pub(crate) fn start(
        machine: &Machine,
        dir: &Path,
        users: HashMap<&'static str, User>,
    ) -> Result<Self> {
        let pair = KeyPair::generate()?;
        let mut params = CertificateParams::new(Vec::new())?;
        params.distinguished_name.push(DnType::CommonName, ISSUER);
        let certificate = params.self_signed(&pair)?;
        let bundle = dir.join("tokens.crt");
        std::fs::write(&bundle, certificate.pem())?;
        let key = EcdsaKeyPair::from_pkcs8(
            &ECDSA_P256_SHA256_FIXED_SIGNING,
            pair.serialized_der(),
            &SystemRandom::new(),
        )
        .map_err(|error| anyhow::anyhow!("reading the key just made: {error}"))?;
        let issued = Arc::new(AtomicU64::new(0));
        let signer = Arc::new(Signer {
            key,
            certificate: BASE64_STANDARD.encode(certificate.der()),
            users,
            issued: issued.clone(),
        });
        let listener = machine.listen(PORT)?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let listener = tokio::net::TcpListener::from_std(listener)?;
        let task = tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                let signer = signer.clone();
                tokio::spawn(async move {
                    let service = service_fn(move |request| {
                        let signer = signer.clone();
                        async move { anyhow::Ok(signer.answer(&request)) }
                    });
                    // A client that goes away in the middle is its own business.
                    let _ = hyper::server::conn::http1::Builder::new()
                        .serve_connection(TokioIo::new(stream), service)
                        .await;
                });
            }
        });
        Ok(Self {
            address,
            bundle,
            issued,
            task,
        })
    }

    /// The `realm` of docker-registry's configuration.
    pub(crate) fn realm(&self) -> String {
        format!("{}/token", self.url())
    }

    /// `http://IP:PORT`.
    pub(crate) fn url(&self) -> String {
        format!("http://{}", self.address)
    }

    /// Tokens given out so far.
    pub(crate) fn issued(&self) -> u64 {
        self.issued.load(Ordering::Relaxed)
    }
}

impl Drop for TokenServer {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Signer {
    fn answer(&self, request: &Request<hyper::body::Incoming>) -> Response<Full<Bytes>> {
        if request.method() != hyper::Method::GET {
            // containerd asks with POST (OAuth) first, and with GET when that is not allowed.
            let mut response = Response::new(Full::default());
            *response.status_mut() = StatusCode::METHOD_NOT_ALLOWED;
            return response;
        }
        match self.token(request) {
            Some(token) => Response::new(Full::from(
                json!({"token": token, "expires_in": TOKEN_TTL_S}).to_string(),
            )),
            None => {
                let mut response = Response::new(Full::from("{}"));
                *response.status_mut() = StatusCode::UNAUTHORIZED;
                response
            }
        }
    }

    /// A token for what the caller asks and may have; none for a wrong password. Anonymous callers
    /// get a token that allows nothing, as real token servers do.
    fn token(&self, request: &Request<hyper::body::Incoming>) -> Option<String> {
        let login = request
            .headers()
            .get("authorization")
            .and_then(|value| value.to_str().ok()?.strip_prefix("Basic "))
            .and_then(|encoded| BASE64_STANDARD.decode(encoded).ok())
            .and_then(|bytes| String::from_utf8(bytes).ok());
        let user = match &login {
            Some(login) => {
                let (name, password) = login.split_once(':')?;
                Some(
                    self.users
                        .get(name)
                        .filter(|user| user.password == password)?,
                )
            }
            None => None,
        };
        let query = request.uri().query().unwrap_or_default();
        let access: Vec<_> = query
            .split('&')
            .filter_map(|pair| pair.strip_prefix("scope="))
            .map(|scope| {
                scope
                    .replace("%3A", ":")
                    .replace("%2F", "/")
                    .replace("%2C", ",")
            })
            .filter_map(|scope| {
                let mut parts = scope.splitn(3, ':');
                let (kind, name, actions) = (parts.next()?, parts.next()?, parts.next()?);
                let user = user.filter(|user| name.starts_with(user.repositories))?;
                let actions: Vec<&str> = actions
                    .split(',')
                    .filter(|action| *action == "pull" || user.push)
                    .collect();
                Some(json!({"type": kind, "name": name, "actions": actions}))
            })
            .collect();
        let now_s = SystemTime::now().duration_since(UNIX_EPOCH).ok()?.as_secs();
        let number = self.issued.fetch_add(1, Ordering::Relaxed);
        let header = json!({"typ": "JWT", "alg": "ES256", "x5c": [self.certificate]});
        let claims = json!({
            "iss": ISSUER, "sub": "rig", "aud": SERVICE, "access": access, "jti": number.to_string(),
            "iat": now_s, "nbf": now_s.saturating_sub(10), "exp": now_s + TOKEN_TTL_S,
        });
        let signed = format!(
            "{}.{}",
            BASE64_URL_SAFE_NO_PAD.encode(header.to_string()),
            BASE64_URL_SAFE_NO_PAD.encode(claims.to_string())
        );
        let signature = self
            .key
            .sign(&SystemRandom::new(), signed.as_bytes())
            .ok()?;
        Some(format!(
            "{signed}.{}",
            BASE64_URL_SAFE_NO_PAD.encode(signature)
        ))
    }
}

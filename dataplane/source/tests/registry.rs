//! A real registry, in each of the ways it may guard itself, with a real image in it.

mod origin;

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use futures_util::TryStreamExt as _;
use http::{HeaderMap, HeaderValue, Method};
use origin::{Origin, Seen, blob, config, digest, range, reply};
use pantala_source::{Credential, Source, SourceConfig, SourceError, Upstream};
use pantala_wire::BlobDigest;
use pantala_wire::name::RepositoryName;
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use ring::rand::SystemRandom;
use ring::signature::{ECDSA_P256_SHA256_FIXED_SIGNING, EcdsaKeyPair};
use serde_json::{Value, json};
use tempfile::TempDir;
use url::Url;

/// How long a program that was just started may take to listen, on a busy machine.
const START_TIMEOUT: Duration = Duration::from_secs(60);
/// Basic authorization of alice, whose password is "hunter2".
const ALICE: &str = "Basic YWxpY2U6aHVudGVyMg==";
/// The same for the registry: user and bcrypt hash, as `htpasswd -B` writes it.
const HTPASSWD: &str = "alice:$2y$05$akxUiZsat59Ee53ec/DweeSc/MS2f2j1G618f31BmcPBJDDNbEXGe\n";

fn alice() -> Credential {
    Credential::login("alice", "hunter2")
}

/// Runs a program of a Debian package to its end.
fn run(package: &str, program: &str, arguments: &[&str]) {
    let output = Command::new(program)
        .args(arguments)
        .output()
        .unwrap_or_else(|error| missing(package, program, &error));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
}

fn missing(package: &str, program: &str, error: &std::io::Error) -> ! {
    panic!("cannot run {program} ({error}): install it with \"apt-get install {package}\"")
}

/// A registry that ends with the test.
struct Registry {
    dir: TempDir,
    process: Child,
    port: u16,
    ca_file: Option<PathBuf>,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

impl Registry {
    fn start(dir: TempDir, ca_file: Option<PathBuf>, http: Value, auth: Option<Value>) -> Self {
        // Free now; the registry cannot be told to choose one and say which.
        let port = TcpListener::bind("127.0.0.1:0")
            .unwrap()
            .local_addr()
            .unwrap()
            .port();
        let mut http = http;
        http["addr"] = json!(format!("127.0.0.1:{port}"));
        let mut settings = json!({
            "version": 0.1,
            "storage": {"filesystem": {"rootdirectory": dir.path().join("data")}},
            "http": http,
        });
        if let Some(auth) = auth {
            settings["auth"] = auth;
        }
        // JSON is YAML.
        let file = dir.path().join("registry.yml");
        std::fs::write(&file, settings.to_string()).unwrap();
        let log = std::fs::File::create(dir.path().join("log")).unwrap();
        let process = Command::new("docker-registry")
            .arg("serve")
            .arg(&file)
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| missing("docker-registry", "docker-registry", &error));
        let mut registry = Self {
            dir,
            process,
            port,
            ca_file,
        };
        registry.wait();
        registry
    }

    fn wait(&mut self) {
        let started = std::time::Instant::now();
        while std::net::TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            let log = || std::fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            if let Some(status) = self.process.try_wait().unwrap() {
                panic!("docker-registry ended with {status}: {}", log());
            }
            assert!(
                started.elapsed() < START_TIMEOUT,
                "never listens: {}",
                log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn upstream(&self) -> Upstream {
        let scheme = if self.ca_file.is_some() {
            "https"
        } else {
            "http"
        };
        format!("{scheme}://127.0.0.1:{}", self.port)
            .parse()
            .unwrap()
    }

    fn source(&self) -> Source {
        Source::new(SourceConfig {
            ca_files: self.ca_file.iter().cloned().collect(),
            ..config()
        })
        .unwrap()
    }

    /// Makes an image of one file and pushes it as test/app:v1.
    fn push(&self, file: &[u8], credentials: Option<&str>) {
        let at = |name: &str| self.dir.path().join(name).display().to_string();
        std::fs::write(at("file"), file).unwrap();
        let image = format!("{}:v1", at("image"));
        run("umoci", "umoci", &["init", "--layout", &at("image")]);
        run("umoci", "umoci", &["new", "--image", &image]);
        run(
            "umoci",
            "umoci",
            &[
                "insert",
                "--rootless",
                "--image",
                &image,
                &at("file"),
                "/file",
            ],
        );
        let to = format!("docker://127.0.0.1:{}/test/app:v1", self.port);
        let from = format!("oci:{image}");
        let mut arguments = vec!["--insecure-policy", "copy", "--dest-tls-verify=false"];
        if let Some(credentials) = credentials {
            arguments.extend(["--dest-creds", credentials]);
        }
        arguments.extend([from.as_str(), to.as_str()]);
        run("skopeo", "skopeo", &arguments);
    }
}

fn repository() -> RepositoryName {
    "test/app".parse().unwrap()
}

/// Reads test/app:v1 as a node does: manifest, sizes, layers in ranges; digests verified.
async fn pull(registry: &Registry, source: &Source, credential: &Credential) -> u64 {
    let upstream = registry.upstream();
    let mut headers = HeaderMap::new();
    for kind in [
        "application/vnd.oci.image.manifest.v1+json",
        "application/vnd.docker.distribution.manifest.v2+json",
    ] {
        headers.append("accept", HeaderValue::from_static(kind));
    }
    let path = "/v2/test/app/manifests/v1";
    let reply = source
        .exchange(Method::GET, &upstream, path, headers, credential)
        .await
        .unwrap();
    assert_eq!(reply.status, 200);
    let named: BlobDigest = reply.headers["docker-content-digest"]
        .to_str()
        .unwrap()
        .parse()
        .unwrap();
    let manifest = reply.bytes(1 << 20).await.unwrap();
    assert_eq!(digest(&manifest), named);
    let manifest: Value = serde_json::from_slice(&manifest).unwrap();
    let mut blobs = manifest["layers"].as_array().unwrap().clone();
    blobs.push(manifest["config"].clone());
    let mut total = 0;
    for entry in blobs {
        let name: BlobDigest = entry["digest"].as_str().unwrap().parse().unwrap();
        let info = source
            .probe_blob(&upstream, &repository(), &name, credential)
            .await
            .unwrap();
        assert_eq!(info.size, entry["size"].as_u64().unwrap());
        total += info.size;
        let mut content = Vec::new();
        let step = info.size.div_ceil(3);
        for start in (0..info.size).step_by(usize::try_from(step).unwrap()) {
            let part = range(start, (start + step).min(info.size));
            let stream = source
                .fetch_blob(&upstream, &repository(), &name, info.size, part, credential)
                .await
                .unwrap();
            let facts = stream.facts();
            for bytes in stream.try_collect::<Vec<_>>().await.unwrap() {
                content.extend_from_slice(&bytes);
            }
            assert!(!facts.range_ignored());
            assert_eq!((facts.retries(), facts.discarded_bytes()), (0, 0));
        }
        assert_eq!(digest(&content), name);
    }
    assert_eq!(source.totals().retries, 0);
    total
}

async fn refused(registry: &Registry, credential: &Credential) -> SourceError {
    registry
        .source()
        .probe_blob(
            &registry.upstream(),
            &repository(),
            &digest(b"x"),
            credential,
        )
        .await
        .unwrap_err()
}

/// A CA, and a key with a certificate of it for 127.0.0.1, in PEM files.
fn certificates(dir: &Path) -> (PathBuf, PathBuf, KeyPair, rcgen::Certificate) {
    let ca_key = KeyPair::generate().unwrap();
    let mut params = CertificateParams::new(vec![]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca = params.self_signed(&ca_key).unwrap();
    let issuer = Issuer::new(params, ca_key);
    let key = KeyPair::generate().unwrap();
    let leaf = CertificateParams::new(vec!["127.0.0.1".to_owned()])
        .unwrap()
        .signed_by(&key, &issuer)
        .unwrap();
    let (ca_file, leaf_file) = (dir.join("ca.pem"), dir.join("leaf.pem"));
    std::fs::write(&ca_file, ca.pem()).unwrap();
    std::fs::write(&leaf_file, leaf.pem()).unwrap();
    std::fs::write(dir.join("key.pem"), key.serialize_pem()).unwrap();
    (ca_file, leaf_file, key, leaf)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_open_registry_is_pulled_from() {
    let registry = Registry::start(tempfile::tempdir().unwrap(), None, json!({}), None);
    registry.push(&blob(5_000_000, 20), None);
    let total = pull(&registry, &registry.source(), &Credential::NONE).await;
    assert!(total > 4_000_000);
    let error = refused(&registry, &Credential::NONE).await;
    assert!(matches!(error, SourceError::NotFound { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_with_tls_of_an_own_ca_is_pulled_from() {
    let dir = tempfile::tempdir().unwrap();
    let (ca_file, leaf_file, ..) = certificates(dir.path());
    let tls = json!({"tls": {"certificate": leaf_file, "key": dir.path().join("key.pem")}});
    let registry = Registry::start(dir, Some(ca_file), tls, None);
    registry.push(&blob(3_000_000, 21), None);
    pull(&registry, &registry.source(), &Credential::NONE).await;
    let stranger = Source::new(config()).unwrap();
    let error = stranger
        .probe_blob(
            &registry.upstream(),
            &repository(),
            &digest(b"x"),
            &Credential::NONE,
        )
        .await
        .unwrap_err();
    assert!(matches!(error, SourceError::Untrusted { .. }), "{error:?}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_with_basic_authentication_is_pulled_from() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("htpasswd");
    std::fs::write(&file, HTPASSWD).unwrap();
    let auth = json!({"htpasswd": {"realm": "r", "path": file}});
    let registry = Registry::start(dir, None, json!({}), Some(auth));
    registry.push(&blob(1_000_000, 22), Some("alice:hunter2"));
    pull(&registry, &registry.source(), &alice()).await;
    let own = Credential::Header(HeaderValue::from_static(ALICE));
    pull(&registry, &registry.source(), &own).await;
    for credential in [
        Credential::NONE,
        Credential::ANONYMOUS,
        Credential::login("alice", "wrong"),
    ] {
        match refused(&registry, &credential).await {
            SourceError::Refused {
                status, headers, ..
            } => {
                assert_eq!(status, 401);
                assert_eq!(headers["www-authenticate"], "Basic realm=\"r\"");
            }
            other => panic!("{other:?}"),
        }
    }
}

/// A token service: alice gets what she asks for, nobody gets a token for nothing.
async fn token_service(key: &KeyPair, certificate: &rcgen::Certificate) -> Origin {
    let pkcs8 = key.serialize_der();
    let chain = vec![STANDARD.encode(certificate.der())];
    Origin::start(move |n, request: &Seen| {
        let url = Url::parse(&format!("http://service{}", request.target)).unwrap();
        let is_alice = request.header("authorization") == Some(ALICE);
        let access: Vec<Value> = url
            .query_pairs()
            .filter(|(key, _)| key == "scope" && is_alice)
            .filter_map(|(_, scope)| {
                let mut parts = scope.split(':');
                let (kind, name) = (parts.next()?.to_owned(), parts.next()?.to_owned());
                let actions: Vec<_> = parts.next()?.split(',').collect();
                Some(json!({"type": kind, "name": name, "actions": actions}))
            })
            .collect();
        let now_s = SystemTime::UNIX_EPOCH.elapsed().unwrap().as_secs();
        let part = |value: Value| URL_SAFE_NO_PAD.encode(value.to_string());
        let header = part(json!({"typ": "JWT", "alg": "ES256", "x5c": chain}));
        let claims = part(json!({
            "iss": "issuer", "sub": "alice", "aud": "registry", "jti": n.to_string(),
            "exp": now_s + 300, "nbf": now_s - 10, "iat": now_s, "access": access,
        }));
        let signed = format!("{header}.{claims}");
        let random = SystemRandom::new();
        let signer =
            EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_FIXED_SIGNING, &pkcs8, &random).unwrap();
        let signature = signer.sign(&random, signed.as_bytes()).unwrap();
        let token = format!("{signed}.{}", URL_SAFE_NO_PAD.encode(signature));
        reply(
            200,
            &[],
            json!({"token": token, "expires_in": 300})
                .to_string()
                .as_bytes(),
        )
    })
    .await
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_registry_with_token_authentication_is_pulled_from() {
    let dir = tempfile::tempdir().unwrap();
    let (ca_file, _, key, certificate) = certificates(dir.path());
    let service = token_service(&key, &certificate).await;
    let auth = json!({"token": {
        "realm": service.url("/token"), "service": "registry", "issuer": "issuer",
        "rootcertbundle": ca_file,
    }});
    let registry = Registry::start(dir, None, json!({}), Some(auth));
    registry.push(&blob(1_000_000, 23), Some("alice:hunter2"));
    let source = registry.source();
    pull(&registry, &source, &alice()).await;
    assert_eq!(source.totals().tokens, 1, "one token for one repository");
    // Nobody gets a token, too, but one that allows nothing; a passed-on request gets none.
    for credential in [Credential::ANONYMOUS, Credential::NONE] {
        match refused(&registry, &credential).await {
            SourceError::Refused {
                status, headers, ..
            } => {
                assert_eq!(status, 401);
                let challenge = headers["www-authenticate"].to_str().unwrap();
                assert!(challenge.starts_with("Bearer realm="), "{challenge}");
            }
            other => panic!("{other:?}"),
        }
    }
}

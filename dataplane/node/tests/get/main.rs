//! `pantala get` against a registry that is slow-witted, cuts and lies, straight and as a mirror.

mod registry;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use registry::{Faults, Registry, digest, image};
use tempfile::TempDir;

struct Run {
    dir: TempDir,
}

impl Run {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("pantala.toml"), "").unwrap();
        Self { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn get(&self, what: &str, output: &str, more: &[&str]) -> Output {
        self.get_with(what, output, more, "")
    }

    fn get_with(&self, what: &str, output: &str, more: &[&str], stdin: &str) -> Output {
        let mut child = Command::new(env!("CARGO_BIN_EXE_pantala"))
            .args(["get", what, "--config"])
            .arg(self.path("pantala.toml"))
            .arg("-o")
            .arg(self.path(output))
            .args(more)
            .env("HOME", self.dir.path())
            .env_remove("XDG_RUNTIME_DIR")
            .env_remove("DOCKER_CONFIG")
            .env_remove("REGISTRY_AUTH_FILE")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        child
            .stdin
            .take()
            .unwrap()
            .write_all(stdin.as_bytes())
            .unwrap();
        child.wait_with_output().unwrap()
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

const AMD64: [&str; 2] = ["--platform", "linux/amd64"];

/// That a directory is a complete image layout of the test's image.
fn verify(dir: &Path) {
    let read = |name: &str| std::fs::read(dir.join(name)).unwrap();
    let json = |bytes: &[u8]| serde_json::from_slice::<serde_json::Value>(bytes).unwrap();
    assert_eq!(json(&read("oci-layout"))["imageLayoutVersion"], "1.0.0");
    let index = json(&read("index.json"));
    let first = &index["manifests"][0];
    assert_eq!(
        first["annotations"]["org.opencontainers.image.ref.name"],
        "v1"
    );
    let blob = |digest: &serde_json::Value| {
        let name = digest.as_str().unwrap().to_owned();
        let bytes = read(&format!("blobs/sha256/{}", &name[7..]));
        assert_eq!(registry::digest(&bytes), name);
        bytes
    };
    let manifest = json(&blob(&first["digest"]));
    blob(&manifest["config"]["digest"]);
    for layer in manifest["layers"].as_array().unwrap() {
        assert_eq!(
            blob(&layer["digest"]).len() as u64,
            layer["size"].as_u64().unwrap()
        );
    }
    assert_eq!(
        std::fs::read_dir(dir.join("blobs/sha256")).unwrap().count(),
        4
    );
}

#[test]
fn an_image_comes_straight_from_the_registry_and_says_so() {
    let (registry, run) = (Registry::start(Faults::default()), Run::new());
    let output = run.get(
        &registry.name(),
        "app",
        &[&AMD64[..], &["--plain-http"]].concat(),
    );
    assert!(output.status.success(), "{}", text(&output));
    assert!(
        text(&output).contains("directly from the source"),
        "{}",
        text(&output)
    );
    verify(&run.path("app"));
    assert!(!run.path("app.partial").exists());
    let again = run.get(&registry.name(), "app", &["--plain-http"]);
    assert_eq!(again.status.code(), Some(2));
    assert!(text(&again).contains("exists already"));
}

#[test]
fn an_image_comes_through_the_node_with_the_registrys_name() {
    let (mirror, run) = (Registry::start(Faults::default()), Run::new());
    let more = [&AMD64[..], &["--json", "--node", &mirror.address]].concat();
    let output = run.get("registry.test:5000/team/app:v1", "app.tar", &more);
    assert!(output.status.success(), "{}", text(&output));
    let result: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(result["node"], mirror.address.as_str());
    assert!(
        result["origins"].is_null(),
        "its status cannot be read: {result:#}"
    );
    let of_registry: Vec<String> = mirror
        .requests()
        .into_iter()
        .filter(|r| r.contains("/v2/"))
        .collect();
    assert_eq!(
        of_registry.len(),
        5,
        "index, manifest, 3 blobs: {of_registry:?}"
    );
    assert!(
        of_registry
            .iter()
            .all(|r| r.contains("?ns=registry.test%3A5000 ")),
        "{of_registry:?}"
    );

    let unpacked = run.path("unpacked");
    tar::Archive::new(std::fs::File::open(run.path("app.tar")).unwrap())
        .unpack(&unpacked)
        .unwrap();
    verify(&unpacked);
    assert!(!run.path("app.tar.partial").exists());
}

#[test]
fn a_transfer_that_is_cut_goes_on_where_it_stopped() {
    for ignores_range in [false, true] {
        let faults = Faults {
            cut_after: Some(if ignores_range { 1_600_000 } else { 400_000 }),
            ignores_range,
            ..Faults::default()
        };
        let (mirror, run) = (Registry::start(faults), Run::new());
        let more = [&AMD64[..], &["--node", &mirror.address]].concat();
        let output = run.get("r.test/team/app:v1", "app", &more);
        assert!(output.status.success(), "{}", text(&output));
        verify(&run.path("app"));
        let resumed = mirror
            .requests()
            .iter()
            .any(|r| r.contains("bytes=400000-"));
        assert_eq!(resumed, !ignores_range, "{:?}", mirror.requests());
    }
}

#[test]
fn what_an_interrupted_run_left_is_taken_up_if_it_is_right() {
    for is_right in [true, false] {
        let (mirror, run) = (Registry::start(Faults::default()), Run::new());
        let (path, (_, bytes)) = image()
            .into_iter()
            .find(|(_, (_, b))| b.len() == 1_500_000)
            .unwrap();
        let name = path.rsplit(':').next().unwrap().to_owned();
        let blobs = run.path("app.partial/blobs/sha256");
        std::fs::create_dir_all(&blobs).unwrap();
        let mut part = bytes[..1_000_000].to_vec();
        part[5] ^= u8::from(!is_right);
        std::fs::write(blobs.join(name), part).unwrap();
        std::fs::write(blobs.join("of-another-image"), "x").unwrap();
        let more = [&AMD64[..], &["--node", &mirror.address]].concat();
        let output = run.get("r.test/team/app:v1", "app", &more);
        assert!(output.status.success(), "{}", text(&output));
        verify(&run.path("app"));
        assert!(
            mirror
                .requests()
                .iter()
                .any(|r| r.contains("bytes=1000000-"))
        );
    }
}

#[test]
fn wrong_bytes_are_never_published() {
    let faults = Faults {
        is_corrupt: true,
        ..Faults::default()
    };
    let (registry, run) = (Registry::start(faults), Run::new());
    for way in [
        &["--node", registry.address.as_str()][..],
        &["--plain-http"],
    ] {
        let output = run.get(&registry.name(), "app", &[&AMD64[..], way].concat());
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        assert!(
            text(&output).contains("bytes are wrong"),
            "{}",
            text(&output)
        );
        assert!(!run.path("app").exists());
    }
}

#[test]
fn logins_come_from_stdin_or_from_the_files_of_the_container_tools() {
    // me:secret
    let faults = Faults {
        login: Some("Basic bWU6c2VjcmV0"),
        ..Faults::default()
    };
    let (registry, run) = (Registry::start(faults), Run::new());
    let more = [&AMD64[..], &["--node", &registry.address]].concat();
    let output = run.get(&registry.name(), "a", &more);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        text(&output).contains("hint: give --user"),
        "{}",
        text(&output)
    );

    let output = run.get_with(
        &registry.name(),
        "a",
        &[&more[..], &["--user", "me", "--password-stdin"]].concat(),
        "secret\n",
    );
    assert!(output.status.success(), "{}", text(&output));
    let output = run.get_with(
        &registry.name(),
        "b",
        &[&more[..], &["--user", "me", "--password-stdin"]].concat(),
        "wrong\n",
    );
    assert_eq!(output.status.code(), Some(1));
    assert!(!text(&output).contains("wrong\n"), "{}", text(&output));

    let logins = format!(
        "{{\"auths\":{{\"{}\":{{\"auth\":\"bWU6c2VjcmV0\"}}}}}}",
        registry.address
    );
    std::fs::create_dir(run.path(".docker")).unwrap();
    std::fs::write(run.path(".docker/config.json"), &logins).unwrap();
    let output = run.get(&registry.name(), "c", &more);
    assert!(output.status.success(), "{}", text(&output));
    verify(&run.path("c"));
}

#[test]
fn what_does_not_exist_is_said_plainly() {
    let (registry, run) = (Registry::start(Faults::default()), Run::new());
    let cases: [(String, &[&str], &str); 4] = [
        (
            format!("{}/team/none:v1", registry.address),
            &["--plain-http"],
            "404",
        ),
        (
            registry.name(),
            &["--plain-http", "--platform", "plan9/mips"],
            "it exists for linux/s390x, linux/amd64",
        ),
        (
            registry.name(),
            &[
                "--plain-http",
                "--digest",
                "sha256:1111111111111111111111111111111111111111111111111111111111111111",
            ],
            "not the one asked for",
        ),
        (
            registry.name(),
            &["--node", "127.0.0.1:9"],
            "no node answers at 127.0.0.1:9",
        ),
    ];
    for (what, more, part) in cases {
        let output = run.get(&what, "x", more);
        assert_eq!(output.status.code(), Some(1), "{}", text(&output));
        assert!(
            text(&output).contains(part) && text(&output).contains("error: "),
            "{}",
            text(&output)
        );
        assert!(!run.path("x").exists());
    }
    for (what, part) in [
        ("UPPER/case", "not an image reference"),
        ("ftp://x/y", "not supported"),
        ("http://u:p@127.0.0.1/", "--password-stdin"),
    ] {
        let output = run.get(what, "x", &[]);
        assert_eq!(output.status.code(), Some(2), "{}", text(&output));
        assert!(text(&output).contains(part), "{}", text(&output));
    }
}

#[test]
fn a_file_is_verified_and_taken_up() {
    let (server, run) = (
        Registry::start(Faults {
            cut_after: Some(600_000),
            ..Faults::default()
        }),
        Run::new(),
    );
    let (path, (_, bytes)) = image()
        .into_iter()
        .find(|(_, (_, b))| b.len() == 1_500_000)
        .unwrap();
    let url = format!("http://{}{path}?signature=hidden", server.address);
    std::fs::write(run.path("f.partial"), &bytes[..100_000]).unwrap();
    let wanted = digest(&bytes);
    let output = run.get(&url, "f", &["--digest", &wanted]);
    assert!(output.status.success(), "{}", text(&output));
    assert!(
        text(&output).contains("directly from the source") && !text(&output).contains("hidden")
    );
    let mut got = Vec::new();
    std::fs::File::open(run.path("f"))
        .unwrap()
        .read_to_end(&mut got)
        .unwrap();
    assert_eq!(digest(&got), wanted);
    assert!(
        server
            .requests()
            .iter()
            .any(|r| r.contains("bytes=100000-")),
        "{:?}",
        server.requests()
    );

    let other = format!("sha256:{}", "1".repeat(64));
    let output = run.get(&url, "g", &["--digest", &other]);
    assert_eq!(output.status.code(), Some(1));
    assert!(!run.path("g").exists() && !run.path("g.partial").exists());
}

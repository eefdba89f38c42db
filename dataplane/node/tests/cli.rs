//! The program as its users run it: arguments in, text and exit codes out.

use std::io::Write;
use std::path::Path;
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

fn pantala(args: &[&str]) -> Output {
    Command::new(env!("CARGO_BIN_EXE_pantala"))
        .args(args)
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

fn stdout(output: &Output) -> String {
    String::from_utf8(output.stdout.clone()).unwrap()
}

fn stderr(output: &Output) -> String {
    String::from_utf8(output.stderr.clone()).unwrap()
}

/// Paths as texts, under a directory of the test.
struct Dir(TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
    fn path(&self, name: &str) -> String {
        self.0.path().join(name).to_str().unwrap().to_owned()
    }
    fn write(&self, name: &str, text: &str) -> String {
        let path = self.path(name);
        std::fs::create_dir_all(Path::new(&path).parent().unwrap()).unwrap();
        std::fs::write(&path, text).unwrap();
        path
    }
    fn read(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }
    /// `setup containerd` in this directory.
    fn setup(&self, more: &[&str]) -> Output {
        let (certs, config) = (self.path("certs.d"), self.path("config.toml"));
        let node = self.path("pantala.toml");
        let mut args = vec!["setup", "containerd", "--certs-dir", &certs];
        args.extend(["--containerd-config", &config, "--config", &node]);
        args.extend(more);
        pantala(&args)
    }
}

#[test]
fn help_teaches_with_examples() {
    for command in [
        &["--help"][..],
        &["node", "--help"],
        &["get", "--help"],
        &["status", "--help"],
        &["setup", "containerd", "--help"],
        &["doctor", "--help"],
    ] {
        let output = pantala(command);
        assert!(output.status.success());
        let text = stdout(&output);
        assert!(
            text.contains("Examples:\n  pantala "),
            "{command:?}: {text}"
        );
    }
    assert!(stdout(&pantala(&["--help"])).contains("Exit codes:"));
    assert!(stdout(&pantala(&["--version"])).starts_with("pantala "));
}

#[test]
fn a_wrong_command_line_is_exit_code_2() {
    for command in [
        &["nod"][..],
        &[],
        &["status", "--admin", "nowhere"],
        &["setup", "containerd"],
        &[
            "setup",
            "containerd",
            "--registry",
            "https://a.test",
            "--yes",
        ],
        &[
            "setup",
            "containerd",
            "--all",
            "--mirror",
            "ftp://x",
            "--dry-run",
        ],
    ] {
        let output = pantala(command);
        assert_eq!(output.status.code(), Some(2), "{command:?}");
        assert!(stderr(&output).len() > 20, "{command:?}");
    }
}

#[test]
fn a_wrong_configuration_is_named_with_a_hint() {
    let dir = Dir::new();
    let file = dir.write("p.toml", "[mirror]\nlisten_adress = \"x\"\nlisen = 1\n");
    for command in ["node", "status"] {
        let output = pantala(&[command, "--config", &file]);
        assert_eq!(output.status.code(), Some(2), "{command}");
        let text = stderr(&output);
        assert!(
            text.starts_with(&format!(
                "error: {file}:2: unknown key `mirror.listen_adress`\n hint: "
            )),
            "{text}"
        );
    }
    let output = pantala(&["node", "--config", &dir.path("absent.toml")]);
    assert_eq!(output.status.code(), Some(2));
    assert!(stderr(&output).contains("absent.toml"));
}

#[test]
fn status_without_a_node_says_how_to_start_one() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = free.local_addr().unwrap().to_string();
    drop(free);
    let output = pantala(&["status", "--admin", &address]);
    assert_eq!(output.status.code(), Some(1));
    let text = stderr(&output);
    assert!(
        text.contains(&format!("no node answers at {address}")),
        "{text}"
    );
    assert!(
        text.contains("\n hint: start one with `pantala node`"),
        "{text}"
    );
}

/// Answers each connection with `answer`, then closes it.
fn serve(answer: &'static str) -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { return };
            let mut request = [0; 4096];
            let _ = std::io::Read::read(&mut stream, &mut request);
            let _ = stream.write_all(answer.as_bytes());
        }
    });
    address
}

#[test]
fn status_shows_a_table_or_the_nodes_json() {
    let address = serve(
        "HTTP/1.1 200 OK\r\nContent-Length: 72\r\nConnection: close\r\n\r\n{\"node\":\"00ff\",\"uptime_s\":5,\"totals\":{\"from_peer_bytes\":1048576},\"x\":1 }",
    );
    let output = pantala(&["status", "--admin", &address]);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(
        text.contains("node     00ff") && text.contains("1.0 MiB from peers (100 %)"),
        "{text}"
    );
    let output = pantala(&["status", "--json", "--admin", &address]);
    assert!(stdout(&output).contains("\"x\": 1"), "{}", stdout(&output));
}

#[test]
fn status_of_what_is_no_node_is_an_error() {
    for answer in [
        "SSH-2.0-OpenSSH\r\n",
        "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n",
        "HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nhtml",
        "HTTP/1.1 200 OK\r\nContent-Length: 9999999999999\r\n\r\n{",
    ] {
        let output = pantala(&["status", "--admin", &serve(answer)]);
        assert_eq!(output.status.code(), Some(1), "{answer:?}");
        assert!(
            stderr(&output).contains("does not answer like a node"),
            "{answer:?}"
        );
    }
}

#[test]
fn setup_shows_the_change_and_asks_before_it_writes() {
    let dir = Dir::new();
    dir.write("pantala.toml", "");
    let output = dir.setup(&["--registry", "docker.io"]);
    assert_eq!(output.status.code(), Some(2));
    let text = stdout(&output);
    assert!(
        text.contains("--- /dev/null\n+++ ")
            && text.contains("+server = \"https://registry-1.docker.io\""),
        "{text}"
    );
    assert!(stderr(&output).contains("--yes"), "{}", stderr(&output));
    let output = dir.setup(&["--registry", "docker.io", "--dry-run"]);
    assert!(output.status.success());
    assert!(!Path::new(&dir.path("certs.d")).exists());
}

#[test]
fn setup_is_idempotent_and_undo_restores() {
    let dir = Dir::new();
    dir.write(
        "pantala.toml",
        "[registries.\"r.test:5000\"]\nurl = \"http://127.0.0.1:9\"\n",
    );
    let original = "server = 'https://r.test:5000'\r\n[host.\"https://other.test\"]";
    dir.write("certs.d/q.test/hosts.toml", original);
    dir.write(
        "certs.d/foreign.test/hosts.toml",
        "server = \"https://foreign.test\"\n",
    );
    let args = [
        "--yes",
        "--all",
        "--registry",
        "r.test:5000",
        "--registry",
        "q.test",
        "--registry",
        "s.test=http://10.0.0.1:5000",
    ];
    let output = dir.setup(&args);
    assert!(output.status.success(), "{}", stderr(&output));
    let text = stdout(&output);
    assert!(text.contains("Done: 4 file(s)."), "{text}");
    assert!(
        text.contains("[registries.\"s.test\"]\nurl = \"http://10.0.0.1:5000\""),
        "{text}"
    );
    assert!(!text.contains("[registries.\"r.test"), "{text}");
    assert!(text.contains("config_path ="), "{text}");

    let server = |name: &str| {
        let table: toml::Table = dir
            .read(&format!("certs.d/{name}/hosts.toml"))
            .parse()
            .unwrap();
        assert!(table["host"]["http://127.0.0.1:65001"].is_table());
        table
            .get("server")
            .and_then(|s| s.as_str().map(str::to_owned))
    };
    assert_eq!(server("r.test:5000").as_deref(), Some("http://127.0.0.1:9"));
    assert_eq!(server("s.test").as_deref(), Some("http://10.0.0.1:5000"));
    assert_eq!(server("q.test").as_deref(), Some("https://r.test:5000"));
    assert_eq!(server("_default"), None);

    let again = dir.setup(&args);
    assert!(stdout(&again).starts_with("Already set up: nothing to change."));

    let undone = dir.setup(&["--undo", "--yes"]);
    assert!(undone.status.success(), "{}", stderr(&undone));
    assert_eq!(dir.read("certs.d/q.test/hosts.toml"), original);
    let mut left: Vec<_> = std::fs::read_dir(dir.path("certs.d"))
        .unwrap()
        .map(|e| e.unwrap().file_name().into_string().unwrap())
        .collect();
    left.sort();
    assert_eq!(left, ["foreign.test", "q.test"]);
    assert_eq!(
        stdout(&dir.setup(&["--undo", "--yes"])),
        "Nothing to undo.\n"
    );
}

#[test]
fn setup_refuses_a_file_that_it_cannot_edit_and_leaves_all_as_it_was() {
    let dir = Dir::new();
    dir.write("pantala.toml", "");
    dir.write("certs.d/b.test/hosts.toml", "host = {}\n");
    let output = dir.setup(&["--yes", "--registry", "a.test", "--registry", "b.test"]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stderr(&output).contains("[host.\"http://127.0.0.1:65001\"]"),
        "{}",
        stderr(&output)
    );
    assert!(!Path::new(&dir.path("certs.d/a.test")).exists());
}

#[test]
fn doctor_reports_for_people_and_for_programs() {
    let dir = Dir::new();
    let ports: Vec<_> = (0..3)
        .map(|_| std::net::TcpListener::bind("127.0.0.1:0").unwrap())
        .collect();
    let address = |i: usize| ports[i].local_addr().unwrap().to_string();
    let config = dir.write(
        "p.toml",
        &format!(
            "data_dir = \"{}\"\n[mirror]\nlisten = \"{}\"\n[admin]\nlisten = \"{}\"\n[control]\nlisten = \"{}\"\n[peer]\nlisten = \"127.0.0.1:0\"\n",
            dir.path("data"), address(0), address(1), address(2)
        ),
    );
    // All three ports are taken by this test, which is no node.
    let output = pantala(&["doctor", "--config", &config]);
    assert_eq!(output.status.code(), Some(1));
    assert!(
        stdout(&output).contains(&format!(
            "PROBLEM  mirror port    {} is in use by another program",
            address(0)
        )),
        "{}",
        stdout(&output)
    );
    assert!(stderr(&output).is_empty(), "{}", stderr(&output));
    drop(ports);
    let output = pantala(&["doctor", "--json", "--config", &config]);
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let checks = report["checks"].as_array().unwrap();
    for name in [
        "configuration",
        "kernel",
        "io_uring",
        "rights",
        "udp buffers",
        "data",
        "open files",
        "clock",
        "mirror port",
        "peer port",
        "containerd",
    ] {
        assert!(
            checks
                .iter()
                .any(|c| c["name"] == name && c["level"].is_string()),
            "{name}"
        );
    }
    let problems = checks.iter().filter(|c| c["level"] == "problem").count();
    assert_eq!(report["ok"], problems == 0);
    assert_eq!(output.status.success(), problems == 0, "{report:#}");
    assert!(
        !Path::new(&dir.path("data")).exists(),
        "doctor changes nothing"
    );
}

#[test]
fn doctor_goes_on_with_a_broken_configuration() {
    let dir = Dir::new();
    let config = dir.write("p.toml", "[mirror]\nlisten = 5\n");
    let output = pantala(&["doctor", "--config", &config]);
    assert_eq!(output.status.code(), Some(1));
    assert!(stdout(&output).contains("PROBLEM  configuration"));
    assert!(stdout(&output).contains("kernel"));
}

//! The `pantala-control` program as a process.

use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};

use pantala_control::{Identity, JoinTarget};

const PROGRAM: &str = env!("CARGO_BIN_EXE_pantala-control");

/// Ends the process, however the test ends.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended already.
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[tokio::test]
async fn it_serves_prints_its_token_and_ends_cleanly_on_sigterm() {
    let dir = tempfile::tempdir().unwrap();
    let config = dir.path().join("control.toml");
    let text = format!("data_dir = {:?}\nlisten = \"127.0.0.1:0\"\n", dir.path());
    std::fs::write(&config, text).unwrap();
    let child = Command::new(PROGRAM)
        .args(["serve", "--config"])
        .arg(&config)
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut running = Running(child);
    let mut log = BufReader::new(running.0.stderr.take().unwrap()).lines();
    let address = log
        .by_ref()
        .map(Result::unwrap)
        .find_map(|line| {
            let at = line.find("127.0.0.1:")?;
            let end = line[at..].find(|c: char| !(c.is_ascii_digit() || ".:".contains(c)));
            Some(line[at..end.map_or(line.len(), |end| at + end)].to_owned())
        })
        .expect("it says where it listens");

    let printed = Command::new(PROGRAM)
        .arg("token")
        .arg("--data-dir")
        .arg(dir.path())
        .output()
        .unwrap();
    assert!(printed.status.success());
    let token = String::from_utf8(printed.stdout).unwrap();
    let target = JoinTarget {
        address,
        token: token.trim().parse().unwrap(),
    };
    let node_dir = tempfile::tempdir().unwrap();
    Identity::load_or_join(node_dir.path(), &target)
        .await
        .unwrap();

    let pid = running.0.id().to_string();
    assert!(
        Command::new("kill")
            .args(["-TERM", &pid])
            .status()
            .unwrap()
            .success()
    );
    let rest: Vec<String> = log.map(Result::unwrap).collect();
    assert!(running.0.wait().unwrap().success(), "{rest:?}");
    let secret = &token.trim()[20..40];
    assert!(rest.iter().all(|line| !line.contains(secret)));
}

#[test]
fn a_mistake_is_an_error_with_a_hint() {
    let dir = tempfile::tempdir().unwrap();
    let run = |args: &[&str]| {
        let output = Command::new(PROGRAM)
            .args(args)
            .arg("--data-dir")
            .arg(dir.path())
            .output()
            .unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(run(&["token"]).contains("once control has run"));
    assert!(run(&["serve", "--config", "/nonexistent"]).contains("/nonexistent"));
    // An address that nobody has here (TEST-NET-1).
    assert!(run(&["serve", "--listen", "192.0.2.1:1"]).contains("cannot listen"));
}

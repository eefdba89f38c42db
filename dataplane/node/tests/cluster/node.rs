//! A `pantala node` process with a configuration and a directory of its own.

use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use super::client;
use super::registry::Registry;

/// How long a node may take to start, on a machine that builds something else meanwhile.
const START_PATIENCE: Duration = Duration::from_secs(60);

fn free_tcp() -> SocketAddr {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap()
}

fn free_udp() -> SocketAddr {
    let socket = UdpSocket::bind("127.0.0.1:0").unwrap();
    socket.local_addr().unwrap()
}

/// A separate control, so that it can be killed without a node.
pub(crate) struct Node {
    pub(crate) mirror: SocketAddr,
    pub(crate) admin: SocketAddr,
    pub(crate) control: SocketAddr,
    dir: PathBuf,
    log: PathBuf,
    child: Option<Child>,
}

impl Node {
    /// Starts a node; one that joins `control`'s embedded control where given.
    pub(crate) async fn start(
        root: &tempfile::TempDir,
        name: &str,
        registry: &Registry,
        control: Option<&Self>,
    ) -> Self {
        let dir = root.path().join(name);
        std::fs::create_dir_all(&dir).unwrap();
        let (mirror, admin, peer) = (free_tcp(), free_tcp(), free_udp());
        let listen = free_tcp();
        let data = dir.join("data");
        let control_table = match control {
            None => format!("listen = \"{listen}\""),
            Some(first) => format!(
                "join = \"{}\"\ntoken_file = {:?}",
                first.control,
                first.dir.join("data/control/join-token")
            ),
        };
        let config = format!(
            "data_dir = {data:?}\n[mirror]\nlisten = \"{mirror}\"\nauthorization_ttl_s = 60\n\
             [registries.\"registry.test\"]\nurl = \"http://{}\"\n[admin]\nlisten = \"{admin}\"\n\
             [peer]\nlisten = \"{peer}\"\n[control]\n{control_table}\n[store]\nlimit = \"8GiB\"\n\
             [source]\nconnect_timeout_ms = 1000\nfirst_byte_timeout_ms = 2000\nstall_timeout_ms = 2000\n\
             [log]\nfilter = \"info,pantala_node=debug\"\n",
            registry.address
        );
        std::fs::write(dir.join("pantala.toml"), config).unwrap();
        let mut node = Self {
            mirror,
            admin,
            control: control.map_or(listen, |c| c.control),
            log: dir.join("log"),
            dir,
            child: None,
        };
        node.restart().await;
        node
    }

    /// Starts the process (again), over the same directory, and waits until it serves.
    pub(crate) async fn restart(&mut self) {
        self.spawn();
        let deadline = tokio::time::Instant::now() + START_PATIENCE;
        loop {
            if let Some(status) = self.status().await
                && status["control"]["connected"] == true
            {
                return;
            }
            let exited = self.child.as_mut().unwrap().try_wait().unwrap();
            assert!(exited.is_none(), "node ended: {exited:?}\n{}", self.log());
            assert!(
                tokio::time::Instant::now() < deadline,
                "node does not serve\n{}",
                self.log()
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// Starts the process without waiting for it.
    pub(crate) fn spawn(&mut self) {
        let log = std::fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(&self.log)
            .unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_pantala"))
            .arg("node")
            .arg("--config")
            .arg(self.dir.join("pantala.toml"))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.child = Some(child);
    }

    /// SIGKILL.
    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(self.child.as_ref().unwrap());
        rustix::process::kill_process(pid, signal).unwrap();
    }

    /// SIGSTOP: the node stalls without closing anything.
    pub(crate) fn stall(&self) {
        self.signal(rustix::process::Signal::STOP);
    }

    pub(crate) async fn status(&self) -> Option<serde_json::Value> {
        let (status, body) = client::get(self.admin, "/status", &[]).await.ok()?;
        (status == 200).then(|| serde_json::from_slice(&body).unwrap())
    }

    /// Bytes that this node took from the registry and from peers.
    pub(crate) async fn totals(&self) -> (u64, u64) {
        let status = self.status().await.expect("the node answers");
        let of = |key: &str| status["totals"][key].as_u64().unwrap();
        (of("from_registry_bytes"), of("from_peer_bytes"))
    }

    /// Memory of the process itself, without what it has mapped of files.
    pub(crate) fn own_memory_bytes(&self) -> u64 {
        let pid = self.child.as_ref().unwrap().id();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix("RssAnon:"));
        let kib = line.unwrap().trim().trim_end_matches(" kB");
        kib.parse::<u64>().unwrap() * 1024
    }

    /// Where the node keeps a blob's bytes.
    pub(crate) fn blob_file(&self, digest: &str) -> PathBuf {
        let hex = digest.strip_prefix("sha256:").unwrap();
        self.dir
            .join("data/store/blobs/sha256")
            .join(&hex[..2])
            .join(hex)
            .join("data")
    }

    /// The last lines of the node's log, for a failing test.
    pub(crate) fn log(&self) -> String {
        let text = std::fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<_> = text.lines().collect();
        lines[lines.len().saturating_sub(60)..].join("\n")
    }
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("--- log of {}\n{}", self.dir.display(), self.log());
        }
        self.kill();
    }
}

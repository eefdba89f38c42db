//! `pantala status`: what a running node does, for people and for programs.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use serde::Deserialize;

use super::args::StatusArgs;
use super::failure::Failure;
use super::http;
use super::output::{duration, percent, plain, say, table};
use crate::config::{ByteSize, Config};

/// The node's `/status`. Fields of newer nodes are passed over, missing ones are empty.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Status {
    pub(super) node: String,
    pub(super) version: String,
    pub(super) uptime_s: u64,
    pub(super) mirror: String,
    pub(super) control: Control,
    pub(super) store: Store,
    pub(super) meter: Meter,
    pub(super) peers: Vec<Peer>,
    pub(super) tasks: Vec<Task>,
    pub(super) totals: Totals,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Control {
    pub(super) connected: bool,
    pub(super) address: String,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Store {
    pub(super) used_bytes: u64,
    pub(super) limit_bytes: u64,
    pub(super) blobs: u64,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Peer {
    pub(super) node: String,
    pub(super) address: String,
    pub(super) rtt_ms: Option<f64>,
    pub(super) sent_bytes: u64,
    pub(super) received_bytes: u64,
    pub(super) inbound_bytes_per_s: u64,
    pub(super) outbound_bytes_per_s: u64,
    pub(super) deliverable_in_bytes_per_s: Option<u64>,
    pub(super) deliverable_in_error_ratio: f64,
    pub(super) deliverable_out_bytes_per_s: Option<u64>,
    pub(super) deliverable_out_error_ratio: f64,
    pub(super) loss_ratio: f64,
    pub(super) silent: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Meter {
    pub(super) counts: String,
    pub(super) why: Option<String>,
    pub(super) own_sent_bytes_per_s: u64,
    pub(super) others_sent_bytes_per_s: u64,
    pub(super) send_limit_bytes_per_s: Option<u64>,
    pub(super) yielding: bool,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Task {
    pub(super) digest: String,
    pub(super) size_bytes: u64,
    pub(super) state: String,
    pub(super) held_bytes: u64,
    pub(super) from_registry_bytes: u64,
    pub(super) from_peer_bytes: u64,
    pub(super) peers: BTreeMap<String, u64>,
    pub(super) error: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(super) struct Totals {
    pub(super) from_registry_bytes: u64,
    pub(super) from_peer_bytes: u64,
    pub(super) served_to_peers_bytes: u64,
    pub(super) served_to_clients_bytes: u64,
    pub(super) registry_manifest_bytes: u64,
}

/// Tasks shown to people: the newest or busiest fit a screen; `--json` has all.
const TASKS_SHOWN_MAX: usize = 40;

pub(super) fn run(args: &StatusArgs) -> Result<(), Failure> {
    let admin = admin(args.admin, args.config.as_deref())?;
    let body = super::runtime()?.block_on(http::get(admin, "/status"))?;
    let status = read(admin, &body)?;
    if args.json {
        let value: serde_json::Value = serde_json::from_slice(&body).unwrap_or_default();
        return say(&format!("{value:#}\n"));
    }
    if args.peers {
        return say(&paths(&status));
    }
    say(&render(&status))
}

/// The admin address that was given, or that of the configuration.
pub(super) fn admin(
    given: Option<SocketAddr>,
    config: Option<&Path>,
) -> Result<SocketAddr, Failure> {
    match given {
        Some(admin) => Ok(admin),
        None => Ok(Config::load(config)?.admin.listen),
    }
}

/// What the node at `admin` answered.
pub(super) fn read(admin: SocketAddr, body: &[u8]) -> Result<Status, Failure> {
    parse(body).map_err(|e| {
        Failure::new(format!("{admin} does not answer like a node: {e}"))
            .hint("give the admin address (default 127.0.0.1:65002), not that of the mirror")
    })
}

pub(super) fn parse(body: &[u8]) -> Result<Status, serde_json::Error> {
    serde_json::from_slice(body)
}

/// The first digits of a digest or node ID: enough to tell them apart on one screen.
pub(super) fn short(id: &str) -> String {
    let hex = id.strip_prefix("sha256:").unwrap_or(id);
    plain(&hex.chars().take(12).collect::<String>())
}

fn size(bytes: u64) -> String {
    ByteSize(bytes).to_string()
}

fn render(status: &Status) -> String {
    let mut out = String::new();
    let mut line = |text: String| {
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{text}");
    };
    line(format!(
        "node     {} (version {}), up {}",
        short(&status.node),
        plain(&status.version),
        duration(Duration::from_secs(status.uptime_s))
    ));
    line(format!("mirror   {}", plain(&status.mirror)));
    line(format!(
        "control  {} {}",
        plain(&status.control.address),
        match status.control.connected {
            true => "(connected)",
            false => "(NOT connected: going on with known peers, then the registry)",
        }
    ));
    line(format!(
        "store    {} of {} ({} %), {} blobs",
        size(status.store.used_bytes),
        size(status.store.limit_bytes),
        percent(status.store.used_bytes, status.store.limit_bytes),
        status.store.blobs
    ));
    let totals = &status.totals;
    let fetched = totals
        .from_registry_bytes
        .saturating_add(totals.from_peer_bytes);
    line(format!(
        "\nreceived {} from the registry ({} %), {} from peers ({} %), {} of manifests",
        size(totals.from_registry_bytes),
        percent(totals.from_registry_bytes, fetched),
        size(totals.from_peer_bytes),
        percent(totals.from_peer_bytes, fetched),
        size(totals.registry_manifest_bytes)
    ));
    line(format!(
        "served   {} to clients, {} to peers",
        size(totals.served_to_clients_bytes),
        size(totals.served_to_peers_bytes)
    ));
    line(String::new());
    out += &tasks(&status.tasks);
    out += "\n";
    out += &peers(&status.peers);
    out
}

fn tasks(tasks: &[Task]) -> String {
    if tasks.is_empty() {
        return "no tasks\n".to_owned();
    }
    // What is under way or went wrong matters more than what is done.
    let mut sorted: Vec<&Task> = tasks.iter().collect();
    sorted.sort_by_key(|task| task.state == "complete");
    let rows: Vec<Vec<String>> = sorted
        .iter()
        .take(TASKS_SHOWN_MAX)
        .map(|task| {
            vec![
                short(&task.digest),
                size(task.size_bytes),
                format!("{} %", percent(task.held_bytes, task.size_bytes)),
                plain(&task.state),
                size(task.from_registry_bytes),
                size(task.from_peer_bytes),
                task.peers.len().to_string(),
            ]
        })
        .collect();
    let head = [
        "task", "size", "held", "state", "registry", "peers", "parents",
    ];
    let mut out = table(&head, &rows);
    if sorted.len() > rows.len() {
        let _ = writeln!(out, "... and {} more (--json)", sorted.len() - rows.len());
    }
    for task in sorted.iter().take(TASKS_SHOWN_MAX) {
        if let Some(error) = &task.error {
            let _ = writeln!(out, "{}: {}", short(&task.digest), plain(error));
        }
    }
    out
}

fn peers(peers: &[Peer]) -> String {
    if peers.is_empty() {
        return "no peers\n".to_owned();
    }
    let rows: Vec<Vec<String>> = peers
        .iter()
        .map(|peer| {
            vec![
                short(&peer.node),
                plain(&peer.address),
                peer.rtt_ms
                    .map_or_else(|| "-".to_owned(), |ms| format!("{ms:.1} ms")),
                size(peer.received_bytes),
                size(peer.sent_bytes),
            ]
        })
        .collect();
    table(&["peer", "address", "rtt", "received", "sent"], &rows)
}

/// A rate in bits, as links are named.
pub(super) fn rate(bytes_per_s: u64) -> String {
    let mbit = bytes_per_s as f64 * 8.0 / 1e6;
    match mbit {
        0.0..1.0 => format!("{:.0} kbit/s", mbit * 1000.0),
        1.0..1000.0 => format!("{mbit:.1} Mbit/s"),
        _ => format!("{:.2} Gbit/s", mbit / 1000.0),
    }
}

fn estimate(bytes_per_s: Option<u64>, error_ratio: f64) -> String {
    bytes_per_s.map_or_else(
        || "-".to_owned(),
        |it| format!("{} ±{:.0} %", rate(it), error_ratio * 100.0),
    )
}

/// How paths are measured and what is sent beside others.
pub(super) fn meter_line(meter: &Meter) -> String {
    let counts = match (meter.counts.as_str(), &meter.why) {
        ("kernel", _) => "counted by the kernel".to_owned(),
        (_, Some(why)) => format!("counted by QUIC ({})", plain(why)),
        (_, None) => "counted by QUIC".to_owned(),
    };
    let limit = match meter.send_limit_bytes_per_s {
        None => "no limit".to_owned(),
        Some(limit) if meter.yielding => format!("limit {}, giving way", rate(limit)),
        Some(limit) => format!("limit {}", rate(limit)),
    };
    format!(
        "sent     {} to peers, {} by others; {limit}; {counts}",
        rate(meter.own_sent_bytes_per_s),
        rate(meter.others_sent_bytes_per_s)
    )
}

/// The columns of a table of paths.
pub(super) const PATH_HEAD: [&str; 8] = [
    "peer",
    "address",
    "rtt",
    "in",
    "out",
    "delivers in",
    "delivers out",
    "loss",
];

/// One row of such a table.
pub(super) fn path_row(peer: &Peer) -> Vec<String> {
    vec![
        short(&peer.node),
        plain(&peer.address),
        match (peer.silent, peer.rtt_ms) {
            (true, _) => "silent".to_owned(),
            (false, Some(ms)) => format!("{ms:.1} ms"),
            (false, None) => "-".to_owned(),
        },
        rate(peer.inbound_bytes_per_s),
        rate(peer.outbound_bytes_per_s),
        estimate(
            peer.deliverable_in_bytes_per_s,
            peer.deliverable_in_error_ratio,
        ),
        estimate(
            peer.deliverable_out_bytes_per_s,
            peer.deliverable_out_error_ratio,
        ),
        format!("{:.1} %", peer.loss_ratio * 100.0),
    ]
}

fn paths(status: &Status) -> String {
    let meter = meter_line(&status.meter);
    if status.peers.is_empty() {
        return format!("{meter}\n\nno peers\n");
    }
    let rows: Vec<Vec<String>> = status.peers.iter().map(path_row).collect();
    format!("{meter}\n\n{}", table(&PATH_HEAD, &rows))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tasks_peers_and_origins_are_shown_in_human_units() {
        let status = parse(
            br#"{"node":"abcdef0123456789","version":"0.1.0","uptime_s":3700,"mirror":"127.0.0.1:65001",
              "control":{"connected":true,"address":"127.0.0.1:65004"},
              "store":{"used_bytes":1073741824,"limit_bytes":4294967296,"blobs":2},
              "peers":[{"node":"beef","address":"10.0.0.2:65003","rtt_ms":0.25,"sent_bytes":5,"received_bytes":2097152}],
              "tasks":[{"digest":"sha256:1111","size_bytes":100,"state":"complete","held_bytes":100},
                       {"digest":"sha256:2222","size_bytes":100,"state":"failed","held_bytes":50,"error":"no\u001b source"}],
              "totals":{"from_registry_bytes":1048576,"from_peer_bytes":3145728}, "newer":"field"}"#,
        )
        .unwrap();
        let text = render(&status);
        for part in [
            "node     abcdef012345 (version 0.1.0), up 1 h 1 min",
            "1.0 GiB of 4.0 GiB (25 %), 2 blobs",
            "1.0 MiB from the registry (25 %), 3.0 MiB from peers (75 %)",
            "10.0.0.2:65003",
            "0.2 ms",
            "2222: no  source",
        ] {
            assert!(text.contains(part), "{part:?} in:\n{text}");
        }
        assert!(
            text.find("2222 ").unwrap() < text.find("1111 ").unwrap(),
            "{text}"
        );
    }

    #[test]
    fn an_idle_node_without_control_is_shown() {
        let text = render(&parse(b"{}").unwrap());
        assert!(
            text.contains("NOT connected") && text.contains("no tasks"),
            "{text}"
        );
        assert!(text.contains("no peers"));
    }

    #[test]
    fn paths_are_shown_with_what_they_deliver_and_how_sure_that_is() {
        let status = parse(
            br#"{"meter":{"counts":"quic","why":"no CAP_BPF","own_sent_bytes_per_s":125000,
            "others_sent_bytes_per_s":250000000,"send_limit_bytes_per_s":1000000,"yielding":true},
            "peers":[{"node":"aa","address":"10.0.0.2:65003","rtt_ms":0.21,"inbound_bytes_per_s":12500000,
            "deliverable_in_bytes_per_s":125000000,"deliverable_in_error_ratio":0.04,"loss_ratio":0.012},
            {"node":"bb","address":"10.0.0.3:65003","silent":true}]}"#,
        )
        .unwrap();
        let text = paths(&status);
        for part in [
            "1.0 Mbit/s to peers, 2.00 Gbit/s by others; limit 8.0 Mbit/s, giving way; counted by QUIC (no CAP_BPF)",
            "100.0 Mbit/s",
            "1.00 Gbit/s \u{b1}4 %",
            "1.2 %",
            "silent",
        ] {
            assert!(text.contains(part), "{part} in\n{text}");
        }
    }
}

//! Whether the node's addresses are free, or taken by the node itself; and whether control answers.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::time::Duration;

use tokio::net::{TcpListener, TcpStream, UdpSocket};

use super::super::{http, status};
use super::Check;
use crate::config::Config;

/// Control on the same network answers within this, or something is wrong.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);

pub(super) async fn check(config: &Config) -> Vec<Check> {
    let is_running = runs(config.admin.listen).await;
    let mut checks = Vec::new();
    let mut tcp = vec![
        ("mirror port", config.mirror.listen, "mirror.listen"),
        ("admin port", config.admin.listen, "admin.listen"),
    ];
    if config.control.join.is_none() {
        tcp.push(("control port", config.control.listen, "control.listen"));
    }
    for (name, address, key) in tcp {
        let bound = TcpListener::bind(address).await.map(drop);
        checks.push(judge(name, address, key, bound, is_running));
    }
    let peer = config.peer.listen;
    let bound = UdpSocket::bind(peer).await.map(drop);
    checks.push(judge("peer port", peer, "peer.listen", bound, is_running));
    if let Some(address) = &config.control.join {
        checks.push(reach(address).await);
    }
    checks
}

/// Whether a node answers there.
async fn runs(admin: SocketAddr) -> bool {
    match http::get(admin, "/status").await {
        Ok(body) => status::parse(&body).is_ok_and(|status| !status.node.is_empty()),
        Err(_) => false,
    }
}

fn judge(
    name: &'static str,
    address: SocketAddr,
    key: &str,
    bound: std::io::Result<()>,
    is_running: bool,
) -> Check {
    match bound {
        Ok(()) => Check::ok(name, format!("{address} is free")),
        Err(e) if e.kind() == ErrorKind::AddrInUse && is_running => {
            Check::ok(name, format!("{address} is in use by the running node"))
        }
        Err(e) if e.kind() == ErrorKind::AddrInUse => Check::problem(
            name,
            format!("{address} is in use by another program"),
            format!("end that program (`ss -lnp` names it), or set {key}"),
        ),
        Err(e) if e.kind() == ErrorKind::AddrNotAvailable => Check::problem(
            name,
            format!("{address} is not an address of this machine"),
            format!("set {key} to one that `ip address` lists, or to 0.0.0.0"),
        ),
        Err(e) => Check::problem(
            name,
            format!("{address}: {e}"),
            format!("correct {key}, or run the node with the right to use it"),
        ),
    }
}

async fn reach(address: &str) -> Check {
    let name = "control";
    let advice = "check control.join, the firewall, and that control listens on an address that \
                  other machines reach; until then the node goes on with the peers it knows";
    match tokio::time::timeout(CONNECT_TIMEOUT, TcpStream::connect(address)).await {
        Ok(Ok(_)) => Check::ok(name, format!("{address} accepts connections")),
        Ok(Err(e)) => Check::warning(name, format!("{address}: {e}"), advice),
        Err(_) => Check::warning(name, format!("{address} does not answer"), advice),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    fn runtime() -> tokio::runtime::Runtime {
        super::super::super::runtime().unwrap()
    }

    #[test]
    fn a_port_of_another_program_is_a_problem() {
        runtime().block_on(async {
            let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = taken.local_addr().unwrap();
            let bound = TcpListener::bind(address).await.map(drop);
            let check = judge("mirror port", address, "mirror.listen", bound, false);
            assert_eq!(check.level, Level::Problem);
            assert!(check.advice.unwrap().contains("mirror.listen"));
            let bound = TcpListener::bind(address).await.map(drop);
            let check = judge("mirror port", address, "mirror.listen", bound, true);
            assert_eq!(check.level, Level::Ok);
        });
    }

    #[test]
    fn a_control_that_cannot_be_reached_is_a_warning() {
        runtime().block_on(async {
            let free = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = free.local_addr().unwrap().to_string();
            assert_eq!(reach(&address).await.level, Level::Ok);
            drop(free);
            assert_eq!(reach(&address).await.level, Level::Warning);
        });
    }
}

//! The UDP socket below quinn.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use quinn::{AsyncUdpSocket, Runtime, TokioRuntime};

use crate::config::Limits;

pub(super) fn bind(listen: SocketAddr, limits: &Limits) -> io::Result<Arc<dyn AsyncUdpSocket>> {
    let socket = std::net::UdpSocket::bind(listen)?;
    let _ = limits;
    TokioRuntime.wrap_udp_socket(socket)
}

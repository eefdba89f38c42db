//! `docs/wire.md` names what this crate does on connections.

use pantala_quic::{ALPN, CloseReason, Limits, SERVER_NAME};

const DOCUMENT: &str = include_str!("../../../docs/wire.md");

#[track_caller]
fn assert_said(text: &str) {
    assert!(DOCUMENT.contains(text), "{text:?} is not in docs/wire.md");
}

#[test]
fn the_names_and_limits_of_the_document_are_the_codes() {
    assert_said(&format!("`{}`", str::from_utf8(ALPN).unwrap()));
    assert_said(&format!("`{SERVER_NAME}`"));
    let limits = Limits::default();
    assert_said(&format!(
        "at most {} at once",
        limits.streams_per_connection_max
    ));
    assert_said(&format!(
        "| {}, {} |",
        limits.connections_max, limits.connections_per_node_max
    ));
    assert_said(&format!("{} MiB", limits.receive_budget_bytes >> 20));
    assert_said(&format!(
        "| {} MiB |",
        limits.stream_receive_window_bytes >> 20
    ));
    assert_said(&format!(
        "| {} MiB, less",
        limits.connection_receive_window_bytes >> 20
    ));
    assert_said(&format!("1200 to {} bytes", limits.udp_payload_max_bytes));
    assert_said(&format!(
        "given up; a PING is sent after {} s",
        limits.keep_alive.as_secs()
    ));
    assert_said(&format!("silent for {} s", limits.idle_timeout.as_secs()));
    assert_said(&format!("| {} s |", limits.handshake_timeout.as_secs()));
}

#[test]
fn every_close_code_has_its_row() {
    for reason in [
        CloseReason::Done,
        CloseReason::ShuttingDown,
        CloseReason::Busy,
        CloseReason::ShutOut,
        CloseReason::WrongNode,
        CloseReason::Protocol,
    ] {
        assert_said(&format!("\n| {} | ", reason as u64));
    }
}

//! `pantala top`: peers, paths and tasks of a running node, as they change.

use std::net::SocketAddr;
use std::time::Duration;

use ratatui::Frame;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEventKind, KeyModifiers};
use ratatui::layout::{Constraint, Layout};
use ratatui::style::Style;
use ratatui::widgets::{Block, Paragraph, Row, Table};

use super::args::TopArgs;
use super::failure::Failure;
use super::http;
use super::output::percent;
use super::status::{self, PATH_HEAD, Status, meter_line, path_row, short};
use crate::config::ByteSize;

/// How often the node is asked: it looks at its paths ten times as often.
const REFRESH: Duration = Duration::from_secs(1);
/// Widths of the paths' columns: as wide as what stands in them at most.
const PATH_WIDTHS: [u16; 8] = [12, 21, 9, 13, 13, 19, 19, 7];

pub(super) fn run(args: &TopArgs) -> Result<(), Failure> {
    let admin = status::admin(args.admin, args.config.as_deref())?;
    let runtime = super::runtime()?;
    let ask = || -> Result<Status, Failure> {
        let body = runtime.block_on(http::get(admin, "/status"))?;
        status::read(admin, &body)
    };
    // A first answer before the screen is taken: an error is said where it can be read.
    let mut shown = ask()?;
    let mut terminal = ratatui::try_init().map_err(|e| {
        Failure::new(format!("this is no terminal to draw on: {e}"))
            .hint("pantala status --peers shows the same once")
    })?;
    let ended = loop {
        if let Err(e) = terminal.draw(|frame| draw(frame, admin, &shown)) {
            break Err(Failure::new(format!("cannot draw: {e}")));
        }
        match wait_for_end() {
            Ok(true) => break Ok(()),
            Ok(false) => {}
            Err(e) => break Err(Failure::new(format!("cannot read the keyboard: {e}"))),
        }
        match ask() {
            Ok(status) => shown = status,
            Err(failure) => break Err(failure),
        }
    };
    ratatui::restore();
    ended
}

/// Waits until it is time to ask again; true if the person wants to leave.
fn wait_for_end() -> std::io::Result<bool> {
    if !event::poll(REFRESH)? {
        return Ok(false);
    }
    let Event::Key(key) = event::read()? else {
        return Ok(false);
    };
    let is_interrupt =
        key.code == KeyCode::Char('c') && key.modifiers.contains(KeyModifiers::CONTROL);
    let leaves = matches!(key.code, KeyCode::Char('q') | KeyCode::Esc) || is_interrupt;
    Ok(leaves && key.kind == KeyEventKind::Press)
}

fn draw(frame: &mut Frame<'_>, admin: SocketAddr, status: &Status) {
    let [head, peers, tasks] = Layout::vertical([
        Constraint::Length(3),
        Constraint::Fill(2),
        Constraint::Fill(1),
    ])
    .areas(frame.area());
    let control = match status.control.connected {
        true => "control connected",
        false => "control NOT connected",
    };
    let title = format!("node     {} at {admin}, {control}", short(&status.node));
    frame.render_widget(
        Paragraph::new(format!("{title}\n{}", meter_line(&status.meter))),
        head,
    );
    let bold = Style::new().bold();
    let rows = status.peers.iter().map(|peer| Row::new(path_row(peer)));
    let table = Table::new(rows, PATH_WIDTHS.map(Constraint::Length))
        .header(Row::new(PATH_HEAD).style(bold))
        .block(Block::bordered().title(format!("peers ({})", status.peers.len())));
    frame.render_widget(table, peers);
    let rows = status.tasks.iter().map(|task| {
        Row::new([
            short(&task.digest),
            ByteSize(task.size_bytes).to_string(),
            format!("{} %", percent(task.held_bytes, task.size_bytes)),
            super::output::plain(&task.state),
            task.peers.len().to_string(),
        ])
    });
    let table = Table::new(rows, [12, 12, 6, 12, 8].map(Constraint::Length))
        .header(Row::new(["task", "size", "held", "state", "parents"]).style(bold))
        .block(Block::bordered().title(format!("tasks ({}), q: leave", status.tasks.len())));
    frame.render_widget(table, tasks);
}

#[cfg(test)]
mod tests {
    use ratatui::Terminal;
    use ratatui::backend::TestBackend;

    use super::*;

    #[test]
    fn peers_tasks_and_the_traffic_of_others_are_on_one_screen() {
        let status = status::parse(
            br#"{"node":"abcdef","control":{"connected":true},"meter":{"counts":"kernel",
            "others_sent_bytes_per_s":125000000},"peers":[{"node":"0123456789abcdef","address":"10.0.0.2:65003",
            "rtt_ms":0.5,"inbound_bytes_per_s":1250000,"deliverable_in_bytes_per_s":125000000}],
            "tasks":[{"digest":"sha256:ffee","size_bytes":200,"held_bytes":100,"state":"active"}]}"#,
        )
        .expect("a status");
        let mut terminal = Terminal::new(TestBackend::new(120, 20)).expect("a screen");
        let admin = "127.0.0.1:65002".parse().expect("an address");
        terminal
            .draw(|frame| draw(frame, admin, &status))
            .expect("drawn");
        let screen = terminal.backend().to_string();
        for part in [
            "1.00 Gbit/s by others",
            "counted by the kernel",
            "0123456789ab",
            "10.0 Mbit/s",
            "1.00 Gbit/s \u{b1}0 %",
            "ffee",
            "50 %",
        ] {
            assert!(screen.contains(part), "{part} in\n{screen}");
        }
    }
}

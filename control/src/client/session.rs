//! Connects, runs one session after another, and waits between them.

use super::{ClientConfig, Command, Event, Shared};
use std::sync::Arc;
use tokio::sync::mpsc;

pub(super) async fn run(
    _config: ClientConfig,
    _commands: mpsc::Receiver<Command>,
    _events: mpsc::Sender<Event>,
    _shared: Arc<Shared>,
) {
}

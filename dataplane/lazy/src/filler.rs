//! Devices filled as [`Faults`] decides: the loop for backends whose readers wait in tasks of ours.
//!
//! It performs and decides nothing. It lives as long as the [`Filler`]; whoever still waits then is refused.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::time::Duration;

use pantala_wire::ByteRange;
use tokio::sync::{mpsc, oneshot};
use tokio::task::{Id, JoinError, JoinSet};
use tokio::time::MissedTickBehavior;

use crate::device::Device;
use crate::faults::{Action, DeviceId, Faults, FillId, Limits};

/// How often failed background fills are tried again.
const TICK: Duration = Duration::from_secs(1);
/// Commands on their way to the loop, which takes them at once; more senders wait.
const COMMANDS_MAX: usize = 256;

type Reader = oneshot::Sender<bool>;

enum Command {
    Add {
        device: Arc<dyn Device>,
        reply: oneshot::Sender<DeviceId>,
    },
    Remove(DeviceId),
    Fault {
        device: DeviceId,
        range: ByteRange,
        reader: Reader,
    },
}

/// Fills devices; cheap to clone.
#[derive(Clone)]
pub(crate) struct Filler {
    commands: mpsc::Sender<Command>,
}

impl Filler {
    /// Must be called in a runtime.
    pub(crate) fn start(limits: Limits) -> Self {
        let (commands, receiver) = mpsc::channel(COMMANDS_MAX);
        let driver = Driver {
            faults: Faults::new(limits),
            devices: HashMap::new(),
            next_id: 0,
            fills: JoinSet::new(),
            fills_by_task: HashMap::new(),
        };
        tokio::spawn(driver.run(receiver));
        Self { commands }
    }

    /// From now on the device can be filled, and is filled in the background. Fails only when the runtime ends.
    pub(crate) async fn add(&self, device: Arc<dyn Device>) -> io::Result<DeviceId> {
        let (reply, id) = oneshot::channel();
        let sent = self.commands.send(Command::Add { device, reply }).await;
        sent.map_err(|_| io::Error::other("nobody fills devices any more"))?;
        id.await.map_err(io::Error::other)
    }

    /// Whoever waits for the device is refused, and nothing more is fetched of it.
    pub(crate) async fn remove(&self, device: DeviceId) {
        // A loop that is gone has no devices.
        let _ = self.commands.send(Command::Remove(device)).await;
    }

    /// Waits until `range` is present; false if it cannot be had.
    pub(crate) async fn fill(&self, device: DeviceId, range: ByteRange) -> bool {
        let (reader, answer) = oneshot::channel();
        let fault = Command::Fault {
            device,
            range,
            reader,
        };
        self.commands.send(fault).await.is_ok() && answer.await == Ok(true)
    }
}

struct Driver {
    faults: Faults<Reader>,
    devices: HashMap<DeviceId, Arc<dyn Device>>,
    next_id: u64,
    fills: JoinSet<(FillId, bool)>,
    fills_by_task: HashMap<Id, FillId>,
}

impl Driver {
    async fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        let mut ticks = tokio::time::interval(TICK);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            self.perform();
            tokio::select! {
                command = commands.recv() => match command {
                    Some(command) => self.command(command),
                    None => return,
                },
                Some(ended) = self.fills.join_next_with_id(), if !self.fills.is_empty() => {
                    self.filled(ended);
                }
                _ = ticks.tick() => self.faults.tick(),
            }
        }
    }

    fn command(&mut self, command: Command) {
        match command {
            Command::Add { device, reply } => {
                let id = DeviceId(self.next_id);
                self.next_id += 1;
                let background = !device.is_complete();
                self.faults.add(id, device.size_bytes(), background);
                self.devices.insert(id, device);
                if reply.send(id).is_err() {
                    self.remove(id);
                }
            }
            Command::Remove(device) => self.remove(device),
            Command::Fault {
                device,
                range,
                reader,
            } => self
                .faults
                .fault(reader, device, range.start(), range.len()),
        }
    }

    fn remove(&mut self, device: DeviceId) {
        self.faults.remove(device);
        self.devices.remove(&device);
    }

    fn perform(&mut self) {
        while let Some(action) = self.faults.poll() {
            match action {
                // A reader that has gone away needs no answer.
                Action::Answer { event, ok } => drop(event.send(ok)),
                Action::Fill {
                    fill,
                    device,
                    range,
                    urgency,
                } => {
                    let Some(device) = self.devices.get(&device).cloned() else {
                        self.faults.filled(fill, false);
                        continue;
                    };
                    let task = self.fills.spawn(async move {
                        let done = device.fill(range, urgency).await;
                        if let Err(error) = &done {
                            let path = device.path().display();
                            tracing::warn!(%error, device = %path, ?range, ?urgency, "bytes of a lazy mount are missing");
                        }
                        (fill, done.is_ok())
                    });
                    self.fills_by_task.insert(task.id(), fill);
                }
            }
        }
    }

    fn filled(&mut self, ended: Result<(Id, (FillId, bool)), JoinError>) {
        match ended {
            Ok((task, (fill, ok))) => {
                self.fills_by_task.remove(&task);
                self.faults.filled(fill, ok);
            }
            Err(error) => {
                tracing::error!(%error, "a fill has panicked");
                if let Some(fill) = self.fills_by_task.remove(&error.id()) {
                    self.faults.filled(fill, false);
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::path::Path;
    use std::sync::Mutex;

    use futures_util::future::{BoxFuture, FutureExt};
    use pantala_wire::Priority;

    use super::*;
    use crate::device::FillError;

    /// Notes its fills; those that begin at `panics_at` panic.
    struct Noting {
        file: File,
        fills: Mutex<Vec<(ByteRange, Priority)>>,
        panics_at: u64,
    }

    impl Device for Noting {
        fn size_bytes(&self) -> u64 {
            1 << 30
        }
        fn path(&self) -> &Path {
            Path::new("noting")
        }
        fn file(&self) -> &File {
            &self.file
        }
        fn is_complete(&self) -> bool {
            false
        }
        fn fill(
            &self,
            range: ByteRange,
            urgency: Priority,
        ) -> BoxFuture<'_, Result<(), FillError>> {
            async move {
                assert_ne!(range.start(), self.panics_at, "as the test wants");
                self.fills.lock().unwrap().push((range, urgency));
                Ok(())
            }
            .boxed()
        }
    }

    fn device(panics_at: u64) -> Arc<Noting> {
        Arc::new(Noting {
            file: File::open("/dev/null").unwrap(),
            fills: Mutex::default(),
            panics_at,
        })
    }

    fn limits() -> Limits {
        Limits {
            background_bytes: 0,
            ..Limits::default()
        }
    }

    fn range(start: u64, end: u64) -> ByteRange {
        ByteRange::new(start, end).unwrap()
    }

    #[tokio::test]
    async fn a_fault_is_answered_when_its_bytes_are_there() {
        let (filler, device) = (Filler::start(limits()), device(u64::MAX));
        let id = filler.add(device.clone()).await.unwrap();
        assert!(filler.fill(id, range(70_000, 70_001)).await);
        let fills = device.fills.lock().unwrap();
        assert_eq!(*fills, [(range(65_536, 131_072), Priority::Fault)]);
    }

    #[tokio::test]
    async fn a_fill_that_panics_refuses_its_readers_and_no_others() {
        let (filler, device) = (Filler::start(limits()), device(0));
        let id = filler.add(device).await.unwrap();
        assert!(!filler.fill(id, range(0, 1)).await);
        assert!(filler.fill(id, range(1 << 20, (1 << 20) + 1)).await);
    }

    #[tokio::test]
    async fn readers_of_a_removed_device_are_refused() {
        let filler = Filler::start(limits());
        let id = filler.add(device(u64::MAX)).await.unwrap();
        filler.remove(id).await;
        assert!(!filler.fill(id, range(0, 1)).await);
    }
}

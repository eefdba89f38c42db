//! A driver's connection and the send window that its streams share, with room kept for the urgent.

use std::sync::Arc;

use pantala_wire::Priority;
use parking_lot::Mutex;

use crate::admission::Windows;
use crate::driver;

/// The part of a send window, one in so many, that only urgent writes may use.
///
/// A stream's priority orders what waits to be sent; it does not help a write that waits for room in a
/// window that bulk has filled, and many bulk writers wake with it for every bit of room.
const URGENT_PART: u64 = 8;

/// What an endpoint keeps of a connection, and all its streams share.
#[derive(Debug)]
pub(crate) struct Link {
    pub(crate) driver: driver::Connection,
    room: Mutex<Room>,
}

#[derive(Debug)]
struct Room {
    send_window: u64,
    urgent_writes: usize,
}

impl Room {
    fn window(&self) -> u64 {
        if self.urgent_writes > 0 {
            self.send_window
        } else {
            self.send_window - self.send_window / URGENT_PART
        }
    }
}

impl Link {
    pub(crate) fn new(driver: driver::Connection, windows: Windows) -> Arc<Self> {
        let link = Arc::new(Self {
            driver,
            room: Mutex::new(Room {
                send_window: 0,
                urgent_writes: 0,
            }),
        });
        link.set_windows(windows);
        link
    }

    pub(crate) fn set_windows(&self, windows: Windows) {
        let mut room = self.room.lock();
        room.send_window = windows.send;
        self.driver.set_send_window(room.window());
        self.driver.set_receive_window(windows.receive);
    }

    /// Opens the urgent part of the window for as long as the guard lives, if `priority` is urgent.
    pub(crate) fn make_room(&self, priority: Priority) -> Option<UrgentRoom<'_>> {
        if priority > Priority::Client {
            return None;
        }
        self.count_urgent(1);
        Some(UrgentRoom(self))
    }

    fn count_urgent(&self, change: isize) {
        let mut room = self.room.lock();
        room.urgent_writes = room.urgent_writes.saturating_add_signed(change);
        self.driver.set_send_window(room.window());
    }
}

/// While it lives, the whole send window is open.
#[derive(Debug)]
pub(crate) struct UrgentRoom<'a>(&'a Link);

impl Drop for UrgentRoom<'_> {
    fn drop(&mut self) {
        self.0.count_urgent(-1);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_urgent_part_opens_and_closes_with_urgent_writes() {
        let mut room = Room {
            send_window: 800,
            urgent_writes: 0,
        };
        assert_eq!(room.window(), 700);
        room.urgent_writes = 2;
        assert_eq!(room.window(), 800);
    }
}

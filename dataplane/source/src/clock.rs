//! The one place where time is read; the logic gets it passed in.

use std::time::{Duration, Instant, SystemTime};

/// Time since this clock was made.
#[derive(Debug)]
pub(crate) struct Clock(Instant);

impl Clock {
    pub(crate) fn new() -> Self {
        Self(Instant::now())
    }

    pub(crate) fn now(&self) -> Duration {
        self.0.elapsed()
    }

    /// The calendar's time, for dates that origins send.
    pub(crate) fn date(&self) -> SystemTime {
        SystemTime::now()
    }
}

//! What this process has used.

use std::time::Duration;

use anyhow::{Context, Result};
use rustix::time::{ClockId, clock_gettime};
use serde::Serialize;

/// Processor time of this process since it started, all of its threads together.
#[derive(Debug, Clone, Copy, Serialize)]
pub(crate) struct Used {
    /// Seconds, exact.
    pub(crate) cpu_s: f64,
    /// Of that about this much in user mode: the kernel tells the two apart in ticks.
    pub(crate) user_s: f64,
}

impl Used {
    /// Until now.
    pub(crate) fn now() -> Result<Self> {
        let clock = clock_gettime(ClockId::ProcessCPUTime);
        let cpu = Duration::new(clock.tv_sec as u64, clock.tv_nsec as u32);
        let stat = std::fs::read_to_string("/proc/self/stat")?;
        let (_, fields) = stat
            .rsplit_once(") ")
            .context("no name in /proc/self/stat")?;
        let field = |index: usize| -> Result<f64> {
            let ticks: u64 = fields
                .split(' ')
                .nth(index)
                .context("a short /proc/self/stat")?
                .parse()?;
            Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
        };
        Ok(Self {
            cpu_s: cpu.as_secs_f64(),
            user_s: field(11)?,
        })
    }

    /// What was used since `earlier`.
    pub(crate) fn since(self, earlier: Self) -> Self {
        Self {
            cpu_s: self.cpu_s - earlier.cpu_s,
            user_s: self.user_s - earlier.user_s,
        }
    }
}

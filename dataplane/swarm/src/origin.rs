//! What is known of the source: whether it may be asked, when next, and why not.

use std::time::Duration;

use crate::{DownloadConfig, FailReason, Failure};

#[derive(Debug)]
pub(crate) struct Origin {
    /// The node has a credential for it.
    available: bool,
    /// It will not give the blob, for this reason.
    dead: Option<FailReason>,
    failures_in_row: u32,
    failed_at: Option<Duration>,
    paused_until: Duration,
}

impl Origin {
    pub(crate) fn new() -> Self {
        Self {
            available: false,
            dead: None,
            failures_in_row: 0,
            failed_at: None,
            paused_until: Duration::ZERO,
        }
    }

    pub(crate) fn set_available(&mut self, available: bool) {
        let revived = available && (!self.available || self.dead.is_some());
        self.available = available;
        if revived {
            self.dead = None;
            self.failures_in_row = 0;
            self.paused_until = Duration::ZERO;
        }
    }

    /// Whether asking it makes sense, now or after a pause.
    pub(crate) fn is_usable(&self) -> bool {
        self.available && self.dead.is_none()
    }
    pub(crate) fn paused_until(&self) -> Duration {
        self.paused_until
    }
    pub(crate) fn dead_reason(&self) -> Option<&FailReason> {
        self.dead.as_ref()
    }

    pub(crate) fn succeeded(&mut self) {
        self.failures_in_row = 0;
    }

    /// Takes in the failure of a request that was started at `started`.
    pub(crate) fn failed(
        &mut self,
        config: &DownloadConfig,
        failure: &Failure,
        started: Duration,
        now: Duration,
    ) {
        let (after, detail) = match failure {
            Failure::Retry { after, detail } => (*after, detail.clone()),
            Failure::Fatal(detail) => {
                self.dead = Some(FailReason::Source(detail.clone()));
                return;
            }
            Failure::Unauthorised => {
                self.dead = Some(FailReason::Unauthorised);
                return;
            }
            other => (None, format!("{other:?}")),
        };
        // Fetches that ran side by side fail together: that is one failure of the source.
        if self.failed_at.is_none_or(|at| started > at) {
            self.failures_in_row += 1;
            self.failed_at = Some(now);
        }
        if self.failures_in_row > config.source_retries_max {
            self.dead = Some(FailReason::Source(detail));
            return;
        }
        let doublings = self.failures_in_row.saturating_sub(1).min(16);
        let backoff = config.source_retry * (1 << doublings);
        let pause = after
            .unwrap_or(Duration::ZERO)
            .max(backoff)
            .min(config.source_retry_max);
        self.paused_until = self.paused_until.max(now + pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn retry(after: Option<Duration>) -> Failure {
        Failure::Retry {
            after,
            detail: "cut".into(),
        }
    }

    #[test]
    fn fetches_that_fail_together_count_once_and_a_new_credential_revives() {
        let config = DownloadConfig::default();
        let mut origin = Origin::new();
        assert!(!origin.is_usable());
        origin.set_available(true);
        let mut now = Duration::ZERO;
        for round in 0..=config.source_retries_max {
            let started = now;
            now += Duration::from_millis(1);
            for _ in 0..4 {
                assert!(origin.is_usable(), "round {round}");
                origin.failed(&config, &retry(None), started, now);
                if round == config.source_retries_max {
                    break;
                }
            }
            now = now.max(origin.paused_until());
        }
        assert!(!origin.is_usable());
        assert_eq!(
            origin.dead_reason(),
            Some(&FailReason::Source("cut".into()))
        );
        origin.set_available(true);
        assert!(origin.is_usable());
    }

    #[test]
    fn an_absurd_retry_after_is_clipped() {
        let config = DownloadConfig::default();
        let mut origin = Origin::new();
        origin.set_available(true);
        let hour = Some(Duration::from_secs(3600));
        origin.failed(&config, &retry(hour), Duration::ZERO, Duration::ZERO);
        assert_eq!(origin.paused_until(), config.source_retry_max);
    }
}

//! The bar on stderr; nothing where that is no terminal.

use std::time::Duration;

use indicatif::{ProgressBar, ProgressStyle};

const TEMPLATE: &str =
    "{msg} [{bar:30}] {binary_bytes}/{binary_total_bytes}  {binary_bytes_per_sec}  {eta}";
const TEMPLATE_UNKNOWN: &str = "{msg} {spinner} {binary_bytes}  {binary_bytes_per_sec}";
/// Smooth to the eye, and no load on a slow terminal.
const TICK: Duration = Duration::from_millis(100);

/// How far a transfer is.
#[derive(Clone)]
pub(in crate::cli) struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// Of `total_bytes`, where they are known.
    pub(in crate::cli) fn new(what: &str, total_bytes: Option<u64>, is_wanted: bool) -> Self {
        let bar = match (is_wanted, total_bytes) {
            (false, _) => ProgressBar::hidden(),
            (true, Some(total)) => ProgressBar::new(total),
            (true, None) => ProgressBar::new_spinner(),
        };
        let template = match total_bytes {
            Some(_) => TEMPLATE,
            None => TEMPLATE_UNKNOWN,
        };
        // A broken template would show the library's own bar: a test keeps them whole.
        if let Ok(style) = ProgressStyle::with_template(template) {
            bar.set_style(style.progress_chars("=> "));
        }
        bar.set_message(what.to_owned());
        bar.enable_steady_tick(TICK);
        Self { bar }
    }

    pub(in crate::cli) fn add(&self, bytes: u64) {
        self.bar.inc(bytes);
    }

    /// Bytes that turned out to be none.
    pub(in crate::cli) fn take_back(&self, bytes: u64) {
        self.bar.dec(bytes);
    }

    pub(in crate::cli) fn finish(&self) {
        self.bar.finish_and_clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_templates_are_whole() {
        assert!(ProgressStyle::with_template(TEMPLATE).is_ok());
        assert!(ProgressStyle::with_template(TEMPLATE_UNKNOWN).is_ok());
    }
}

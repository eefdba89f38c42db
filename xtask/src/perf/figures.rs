//! Figures by name, and where they are kept.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result};
use serde_json::json;

use super::plot::Chart;
use crate::cargo::workspace_root;

/// More ranges than this are recorded but not printed.
const RANGES_SHOWN_MAX: usize = 24;

/// What a benchmark found. Names end in the unit, or in `ratio`.
#[derive(Debug, Default)]
pub(super) struct Figures {
    metrics: BTreeMap<String, f64>,
    notes: Vec<String>,
    ranges: Vec<String>,
    failures: Vec<String>,
    charts: Vec<(String, Chart)>,
}

impl Figures {
    pub(super) fn set(&mut self, name: &str, value: f64) {
        self.metrics.insert(name.to_owned(), value);
    }

    /// The median of `samples`; and the lowest and highest of them.
    pub(super) fn set_median(&mut self, name: &str, samples: &[f64]) -> f64 {
        let mut sorted = samples.to_vec();
        sorted.sort_by(f64::total_cmp);
        let median = median_of_sorted(&sorted);
        self.set(name, median);
        if let (Some(low), Some(high)) = (sorted.first(), sorted.last()) {
            self.ranges.push(format!(
                "{name}: {low:.3} to {high:.3} in {} rounds",
                sorted.len()
            ));
        }
        median
    }

    /// Says how it was measured.
    pub(super) fn note(&mut self, note: impl Into<String>) {
        self.notes.push(note.into());
    }

    /// A part that could not be measured: the command fails in the end.
    pub(super) fn fail(&mut self, what: impl Into<String>) {
        self.failures.push(what.into());
    }

    /// A plot that is kept with the figures; `what` tells it from the benchmark's others.
    pub(super) fn chart(&mut self, what: &str, chart: Chart) {
        self.charts.push((what.to_owned(), chart));
    }

    /// Failure where a part could not be measured.
    pub(super) fn exit_code(&self) -> ExitCode {
        if self.failures.is_empty() {
            ExitCode::SUCCESS
        } else {
            ExitCode::FAILURE
        }
    }

    pub(super) fn print(&self) {
        println!();
        for (name, value) in &self.metrics {
            println!("{name:<44}{value:>14.3}");
        }
        println!();
        // Of many figures the table and the record say enough.
        let ranges = self
            .ranges
            .iter()
            .filter(|_| self.ranges.len() <= RANGES_SHOWN_MAX);
        for note in ranges.chain(&self.notes) {
            println!("  {note}");
        }
        for failure in &self.failures {
            println!("\nNOT MEASURED: {failure}");
        }
    }

    pub(super) fn to_json(&self) -> String {
        format!("{:#}\n", json!({"metrics": self.metrics}))
    }

    /// Keeps the figures and plots with date, commit, kernel and processor; returns their files.
    pub(super) fn record(&self, name: &str) -> Result<Vec<PathBuf>> {
        let place = Place::here();
        let record = json!({
            "benchmark": name,
            "date": place.date,
            "commit": place.commit,
            "kernel": place.kernel,
            "processor": place.processor,
            "notes": self.notes,
            "ranges": self.ranges,
            "not_measured": self.failures,
            "metrics": self.metrics,
        });
        let path = place.file(&format!("{name}.json"))?;
        std::fs::write(&path, format!("{record:#}\n"))
            .with_context(|| format!("writing {}", path.display()))?;
        let mut paths = vec![path];
        for (what, chart) in &self.charts {
            let path = place.file(&format!("{name}-{what}.svg"))?;
            std::fs::write(&path, chart.to_svg(&place.line()))
                .with_context(|| format!("writing {}", path.display()))?;
            paths.push(path);
        }
        Ok(paths)
    }
}

/// When and where something is measured.
#[derive(Debug)]
pub(super) struct Place {
    date: String,
    commit: String,
    kernel: String,
    processor: String,
}

impl Place {
    pub(super) fn here() -> Self {
        let said = |program: &str, arguments: &[&str]| -> String {
            Command::new(program)
                .args(arguments)
                .current_dir(workspace_root())
                .output()
                .map(|output| String::from_utf8_lossy(&output.stdout).trim().to_owned())
                .unwrap_or_default()
        };
        let cpu = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        let model = cpu
            .lines()
            .find_map(|line| line.strip_prefix("model name")?.split_once(": "))
            .map_or("unknown", |(_, model)| model);
        let cores = cpu
            .lines()
            .filter(|line| line.starts_with("processor"))
            .count();
        Self {
            date: said("date", &["-u", "+%Y-%m-%d"]),
            commit: said("git", &["rev-parse", "--short", "HEAD"]),
            kernel: said("uname", &["-sr"]),
            processor: format!("{cores} x {model}"),
        }
    }

    /// All of it in a line.
    pub(super) fn line(&self) -> String {
        format!(
            "{}, {}, {}, commit {}",
            self.date, self.kernel, self.processor, self.commit
        )
    }

    /// Where a result of this day called `name` is kept.
    pub(super) fn file(&self, name: &str) -> Result<PathBuf> {
        let dir = workspace_root().join("perf/results");
        std::fs::create_dir_all(&dir)?;
        Ok(dir.join(format!("{}-{name}", self.date)))
    }
}

/// The middle of `samples`; not a number where there are none.
pub(super) fn median(samples: &[f64]) -> f64 {
    let mut sorted = samples.to_vec();
    sorted.sort_by(f64::total_cmp);
    median_of_sorted(&sorted)
}

fn median_of_sorted(sorted: &[f64]) -> f64 {
    let middle = sorted.len() / 2;
    match sorted.len() {
        0 => f64::NAN,
        length if length % 2 == 1 => sorted[middle],
        _ => f64::midpoint(sorted[middle - 1], sorted[middle]),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_median_is_the_middle_whatever_the_order() {
        let mut figures = Figures::default();
        assert_eq!(figures.set_median("odd", &[9.0, 1.0, 5.0]), 5.0);
        assert_eq!(figures.set_median("even", &[4.0, 1.0, 2.0, 9.0]), 3.0);
    }
}

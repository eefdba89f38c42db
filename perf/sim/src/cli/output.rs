//! Figures by name, charts, and how a run is shown.

use std::collections::BTreeMap;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, Result};
use serde::Serialize;

use crate::pantala::Report;

/// What a command found.
#[derive(Debug, Default, Serialize)]
pub struct Figures {
    metrics: BTreeMap<String, f64>,
    charts: Vec<Chart>,
}

/// Bars in groups, which `cargo xtask sim` draws.
#[derive(Debug, Clone, Serialize)]
pub(super) struct Chart {
    pub(super) file: String,
    pub(super) title: String,
    pub(super) unit: String,
    pub(super) groups: Vec<(String, Vec<(String, f64)>)>,
}

impl Figures {
    pub(super) fn set(&mut self, name: impl Into<String>, value: f64) {
        self.metrics.insert(name.into(), value);
    }
    /// Keeps the largest.
    pub(super) fn set_max(&mut self, name: &str, value: f64) {
        let before = self.metrics.get(name).copied().unwrap_or(f64::MIN);
        self.set(name, before.max(value));
    }
    pub(super) fn chart(&mut self, chart: Chart) {
        self.charts.push(chart);
    }

    pub(super) fn print(&self) {
        println!();
        for (name, value) in &self.metrics {
            println!("{name:<44}{value:>14.4}");
        }
    }

    pub(super) fn write(&self, path: &Path) -> Result<()> {
        let text = serde_json::to_string_pretty(self)?;
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))
    }
}

/// A run in a few lines.
pub(super) fn show(report: &Report) -> ExitCode {
    println!(
        "makespan {:.3} s, p50 {:.3} s, p99 {:.3} s, copies {:.4}, registry peak {:.2} Gbit/s",
        report.makespan_s,
        report.quantile_s(0.5),
        report.quantile_s(0.99),
        report.copies,
        report.registry_peak_bytes_per_s * 8e-9,
    );
    println!(
        "pieces from peers {}, from the source {}, alone {}, hedges {}, refusals {}, leases {}, waits {}, wasted {} MiB",
        report.pieces.0,
        report.pieces.1,
        report.alone_fetches,
        report.hedges,
        report.refusals,
        report.leases.0,
        report.leases.1,
        report.wasted_bytes >> 20,
    );
    println!(
        "{} steps, {} inputs, {} messages to control, {:.2} s",
        report.steps,
        report.inputs,
        report.control_messages,
        report.took.as_secs_f64()
    );
    match &report.violation {
        Some(violation) => {
            println!("BROKEN {violation}");
            ExitCode::FAILURE
        }
        None => ExitCode::SUCCESS,
    }
}

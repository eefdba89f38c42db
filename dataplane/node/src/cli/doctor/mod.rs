//! `pantala doctor`: what this machine allows, which way the node goes because of it, and what to do
//! about the rest.
//!
//! [`facts`] looks at the machine and holds no opinion; [`checks`] judges what was found and touches
//! nothing, so that every verdict is tested without a machine that deserves it.

mod checks;
mod facts;
mod ports;
mod snapshotter;

use std::fmt::Write as _;

use serde::Serialize;

use super::args::DoctorArgs;
use super::failure::Failure;
use super::output::{plain, say};
use crate::config::Config;

/// How bad a finding is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    /// As it should be.
    Ok,
    /// The node works, but not as well as it could.
    Warning,
    /// The node does not work, or not for long.
    Problem,
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
struct Check {
    name: &'static str,
    level: Level,
    /// What was found, and which way the node goes because of it.
    finding: String,
    /// What to do about it.
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Check {
    fn ok(name: &'static str, finding: impl Into<String>) -> Self {
        Self {
            name,
            level: Level::Ok,
            finding: finding.into(),
            advice: None,
        }
    }

    fn warning(name: &'static str, finding: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            level: Level::Warning,
            advice: Some(advice.into()),
            ..Self::ok(name, finding)
        }
    }

    fn problem(name: &'static str, finding: impl Into<String>, advice: impl Into<String>) -> Self {
        Self {
            level: Level::Problem,
            ..Self::warning(name, finding, advice)
        }
    }
}

pub(super) fn run(args: &DoctorArgs) -> Result<(), Failure> {
    let mut report = Vec::new();
    let config = match Config::load(args.config.as_deref()) {
        Ok(config) => {
            report.push(checks::configuration(args.config.as_deref()));
            config
        }
        Err(e) => {
            let advice = format!("{}. The checks below take the defaults", e.hint());
            report.push(Check::problem("configuration", e.to_string(), advice));
            // The empty text is a test case: it always parses.
            Config::parse("", "the defaults")?
        }
    };
    let facts = facts::Facts::collect(&config, &args.containerd_config);
    report.extend(checks::all(&facts, &config));
    report.extend(super::runtime()?.block_on(ports::check(&config)));
    report.push(checks::containerd(&facts, &args.containerd_config));
    report.extend(snapshotter::check(&config, &args.containerd_config));
    if args.json {
        say(&json(&report)?)?;
    } else {
        say(&render(&report))?;
    }
    match report.iter().any(|c| c.level == Level::Problem) {
        true => Err(Failure::silent()),
        false => Ok(()),
    }
}

fn json(report: &[Check]) -> Result<String, Failure> {
    let ok = report.iter().all(|c| c.level != Level::Problem);
    let value = serde_json::json!({ "ok": ok, "checks": report });
    serde_json::to_string_pretty(&value)
        .map(|text| text + "\n")
        .map_err(|e| Failure::new(format!("cannot write the result: {e}")))
}

fn render(report: &[Check]) -> String {
    let mut out = String::new();
    for check in report {
        let mark = match check.level {
            Level::Ok => "ok     ",
            Level::Warning => "warning",
            Level::Problem => "PROBLEM",
        };
        // Writing to a String cannot fail.
        let _ = writeln!(out, "{mark}  {:<13}  {}", check.name, plain(&check.finding));
        for line in check.advice.iter().flat_map(|advice| advice.lines()) {
            let _ = writeln!(out, "{:24}{}", "", plain(line));
        }
    }
    let count = |level| report.iter().filter(|c| c.level == level).count();
    let _ = writeln!(
        out,
        "\n{} ok, {} warning(s), {} problem(s)",
        count(Level::Ok),
        count(Level::Warning),
        count(Level::Problem)
    );
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn advice_stands_under_its_finding() {
        let text = render(&[
            Check::ok("kernel", "6.1"),
            Check::problem("clock", "1970", "set it\nnow"),
        ]);
        assert!(text.contains("ok       kernel         6.1\n"), "{text}");
        assert!(text.contains("PROBLEM  clock          1970\n"), "{text}");
        assert!(text.contains("\n                        now\n"), "{text}");
        assert!(
            text.ends_with("1 ok, 0 warning(s), 1 problem(s)\n"),
            "{text}"
        );
    }
}

//! A process of `pantala-perf`, led by lines: one word in, one line of JSON out.

use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::rig::process::log_tail;

/// Longest that an answer may take, unless it is known to take longer.
const ANSWER_MAX: Duration = Duration::from_secs(300);

/// The process; it ends when this is dropped.
#[derive(Debug)]
pub(super) struct Led {
    name: String,
    log: PathBuf,
    child: Child,
    input: ChildStdin,
    output: Lines<BufReader<ChildStdout>>,
}

impl Led {
    /// Starts `command`, which messages call `name`, with its words to people in `log`.
    pub(super) fn start(command: std::process::Command, name: &str, log: &Path) -> Result<Self> {
        let mut child = Command::from(command)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(std::fs::File::create(log)?)
            .kill_on_drop(true)
            .spawn()
            .with_context(|| format!("starting the {name}"))?;
        let input = child.stdin.take().context("no standard input")?;
        let output = child.stdout.take().context("no standard output")?;
        Ok(Self {
            name: name.to_owned(),
            log: log.to_owned(),
            child,
            input,
            output: BufReader::new(output).lines(),
        })
    }

    pub(super) fn pid(&self) -> Result<u32> {
        self.child
            .id()
            .with_context(|| format!("the {} has ended", self.name))
    }

    pub(super) fn log_tail(&self) -> String {
        log_tail(&self.name, &self.log)
    }

    /// Says `what` and waits for the answer.
    pub(super) async fn ask<A: DeserializeOwned>(&mut self, what: &str) -> Result<A> {
        self.input
            .write_all(format!("{what}\n").as_bytes())
            .await
            .with_context(|| format!("the {} has ended\n{}", self.name, self.log_tail()))?;
        self.answer()
            .await
            .with_context(|| format!("asking the {} to {what}", self.name))
    }

    /// The next answer.
    pub(super) async fn answer<A: DeserializeOwned>(&mut self) -> Result<A> {
        self.answer_within(ANSWER_MAX).await
    }

    /// The next answer, which may take `limit`.
    pub(super) async fn answer_within<A: DeserializeOwned>(
        &mut self,
        limit: Duration,
    ) -> Result<A> {
        let line = tokio::time::timeout(limit, self.output.next_line())
            .await
            .with_context(|| format!("no answer within {limit:?}\n{}", self.log_tail()))??;
        let Some(line) = line else {
            bail!("the {} has ended\n{}", self.name, self.log_tail());
        };
        serde_json::from_str(&line).with_context(|| format!("the {} says {line:?}", self.name))
    }
}

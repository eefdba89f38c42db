//! A running program: its log, its memory and time, and how it is paused, stopped and killed.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::process::Signal;

use super::enclosure::signal_process;

/// How long a program may take to end by itself after SIGTERM.
const STOP_MAX: Duration = Duration::from_secs(10);
/// Pause between two looks at something that is awaited.
const POLL: Duration = Duration::from_millis(20);
/// Lines of a log that are shown with an error.
const LOG_TAIL_LINES: usize = 25;

/// A program that runs until this value is dropped.
#[derive(Debug)]
pub(crate) struct Process {
    name: String,
    child: Child,
    log: PathBuf,
}

/// Resident memory of a process, bytes.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Memory {
    /// Everything resident.
    pub(crate) resident_bytes: u64,
    /// Of that, pages of mapped files: the page cache, which the kernel can take back.
    pub(crate) file_bytes: u64,
}

impl Memory {
    /// What the process itself holds.
    pub(crate) fn own_bytes(&self) -> u64 {
        self.resident_bytes.saturating_sub(self.file_bytes)
    }
}

impl Process {
    /// Starts `command` with its output appended to `log`.
    pub(crate) fn start(name: &str, mut command: Command, log: &Path) -> Result<Self> {
        let file = fs::OpenOptions::new()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("opening the log {}", log.display()))?;
        let child = command
            .stdin(Stdio::null())
            .stdout(file.try_clone()?)
            .stderr(file)
            .spawn()
            .with_context(|| format!("starting {name} ({command:?})"))?;
        Ok(Self {
            name: name.to_owned(),
            child,
            log: log.to_owned(),
        })
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Waits until `ready` says so; fails with the log's tail when the program ends or `limit` passes.
    pub(crate) async fn wait_until(
        &mut self,
        what: &str,
        limit: Duration,
        mut ready: impl AsyncFnMut() -> bool,
    ) -> Result<()> {
        let start = Instant::now();
        while !ready().await {
            if let Some(status) = self.child.try_wait()? {
                bail!(
                    "{} ended ({status}) before it {what}\n{}",
                    self.name,
                    self.log_tail()
                );
            }
            if start.elapsed() > limit {
                bail!(
                    "{} has not {what} within {limit:?}\n{}",
                    self.name,
                    self.log_tail()
                );
            }
            tokio::time::sleep(POLL).await;
        }
        Ok(())
    }

    /// Whether it still runs.
    pub(crate) fn is_running(&mut self) -> bool {
        matches!(self.child.try_wait(), Ok(None))
    }

    /// SIGTERM, and SIGKILL where that does not help. Fails where it had to be killed or crashed.
    pub(crate) fn stop(&mut self) -> Result<()> {
        if !self.is_running() {
            bail!("{} had ended already\n{}", self.name, self.log_tail());
        }
        signal_process(self.pid(), Signal::TERM)?;
        let start = Instant::now();
        while start.elapsed() < STOP_MAX {
            if let Some(status) = self.child.try_wait()? {
                if status.success() || status.signal() == Some(Signal::TERM.as_raw()) {
                    return Ok(());
                }
                bail!("{} ended badly: {status}\n{}", self.name, self.log_tail());
            }
            std::thread::sleep(POLL);
        }
        self.kill();
        bail!(
            "{} did not stop within {STOP_MAX:?} of SIGTERM\n{}",
            self.name,
            self.log_tail()
        );
    }

    /// SIGKILL, and waits for the end.
    pub(crate) fn kill(&mut self) {
        if self.is_running() {
            // Both fail only where the process has ended in the meantime.
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }

    /// SIGSTOP.
    pub(crate) fn pause(&self) -> Result<()> {
        signal_process(self.pid(), Signal::STOP)
    }

    /// SIGCONT.
    pub(crate) fn resume(&self) -> Result<()> {
        signal_process(self.pid(), Signal::CONT)
    }

    /// The last lines of the log, under a heading.
    pub(crate) fn log_tail(&self) -> String {
        log_tail(&self.name, &self.log)
    }

    /// Everything it has logged.
    pub(crate) fn log(&self) -> String {
        fs::read(&self.log)
            .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
            .unwrap_or_default()
    }

    /// Resident memory now.
    pub(crate) fn memory(&self) -> Result<Memory> {
        memory(self.pid())
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Resident memory of the process `pid` now.
pub(crate) fn memory(pid: u32) -> Result<Memory> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let field = |name: &str| -> Result<u64> {
        let line = status
            .lines()
            .find_map(|line| line.strip_prefix(name))
            .with_context(|| format!("/proc/PID/status has no {name}"))?;
        let kib: u64 = line.trim().trim_end_matches(" kB").parse()?;
        Ok(kib * 1024)
    };
    Ok(Memory {
        resident_bytes: field("VmRSS:")?,
        file_bytes: field("RssFile:")?,
    })
}

/// Seconds of processor time of the process `pid` and of the threads it has now, to the nanosecond.
pub(crate) fn exact_cpu_seconds(pid: u32) -> Result<f64> {
    let mut nanoseconds = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(thread?.path().join("schedstat"))?;
        let first = text.split(' ').next().unwrap_or_default();
        nanoseconds += first.parse::<u64>().context("reading a schedstat")?;
    }
    Ok(nanoseconds as f64 / 1e9)
}

/// Seconds of processor time of the process `pid`, in user and kernel mode, with its ended threads.
pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    stat_seconds(&format!("/proc/{pid}/stat"), 11)
}

/// The processes that `parent` has started and that run.
pub(crate) fn children(parent: u32) -> Result<Vec<u32>> {
    let mut children = Vec::new();
    for entry in fs::read_dir("/proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<u32>() else {
            continue;
        };
        // One that has ended meanwhile is none.
        let Ok(stat) = fs::read_to_string(format!("/proc/{pid}/stat")) else {
            continue;
        };
        let after_name = stat.rsplit_once(") ").map(|(_, rest)| rest);
        let its_parent = after_name.and_then(|rest| rest.split(' ').nth(1));
        if its_parent.and_then(|id| id.parse().ok()) == Some(parent) {
            children.push(pid);
        }
    }
    Ok(children)
}

/// Seconds of processor time of all programs that this process has started and seen end.
pub(crate) fn children_cpu_seconds() -> Result<f64> {
    stat_seconds("/proc/self/stat", 13)
}

/// The sum of the field `first` after the name, and the next.
fn stat_seconds(file: &str, first: usize) -> Result<f64> {
    let stat = fs::read_to_string(file)?;
    let after_name = stat
        .rsplit_once(") ")
        .context("a stat file has a name in it")?
        .1;
    let fields: Vec<&str> = after_name.split(' ').collect();
    let ticks = fields[first].parse::<u64>()? + fields[first + 1].parse::<u64>()?;
    Ok(ticks as f64 / rustix::param::clock_ticks_per_second() as f64)
}

/// The last lines of the file `log`, under a heading.
pub(crate) fn log_tail(name: &str, log: &Path) -> String {
    let text = fs::read(log)
        .map(|bytes| String::from_utf8_lossy(&bytes).into_owned())
        .unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(LOG_TAIL_LINES);
    let shown: Vec<String> = lines[from..]
        .iter()
        .map(|line| format!("  | {}", line.chars().take(400).collect::<String>()))
        .collect();
    format!(
        "--- log of {name}, last {} lines ---\n{}",
        shown.len(),
        shown.join("\n")
    )
}

/// What a client program did.
#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) success: bool,
    /// Standard output and error.
    pub(crate) output: String,
    pub(crate) took: Duration,
}

/// Runs a client program to its end, or kills it after `limit`, which is an error.
pub(crate) async fn run_to_end(command: Command, limit: Duration) -> Result<Finished> {
    let described = format!("{command:?}");
    let start = Instant::now();
    let mut command = tokio::process::Command::from(command);
    command
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    let Ok(output) = tokio::time::timeout(limit, command.output()).await else {
        bail!("no end within {limit:?}: {described}");
    };
    let output = output.with_context(|| format!("starting {described}"))?;
    let mut text = String::from_utf8_lossy(&output.stdout).into_owned();
    text.push_str(&String::from_utf8_lossy(&output.stderr));
    Ok(Finished {
        success: output.status.success(),
        output: text,
        took: start.elapsed(),
    })
}

impl Finished {
    /// An error with the output's tail, where the program failed.
    pub(crate) fn ok(self, what: &str) -> Result<Self> {
        if self.success {
            return Ok(self);
        }
        let lines: Vec<&str> = self
            .output
            .lines()
            .filter(|line| !line.trim().is_empty())
            .collect();
        let from = lines.len().saturating_sub(15);
        bail!(
            "{what} failed after {:.1?}:\n{}",
            self.took,
            lines[from..].join("\n")
        )
    }
}

//! The emulated machine: started, listened to, and ended whatever happens.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::check::Outcome;

/// The whole run. Emulation is some twenty times slower than the machine, and the machine may be busy.
const RUN_MAX: Duration = Duration::from_secs(1500);
/// The last lines of the console that are shown when a run breaks off.
const LINES_SHOWN_MAX: usize = 40;
/// What the lines of the guest's init begin with.
const MARK: &str = "guest: ";

/// A child process that does not outlive this.
struct Machine(Child);

impl Drop for Machine {
    fn drop(&mut self) {
        // By its own id, and waited for: nothing is left behind.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Runs the guest and says what came of its tests.
pub(super) fn run(
    kernel: &Path,
    initramfs: &Path,
    disks: &[PathBuf],
    filter: Option<&str>,
) -> Result<Outcome> {
    // The kernel ends the machine with us, however we end.
    let mut command = Command::new("setpriv");
    command
        .args(["--pdeathsig", "KILL", "qemu-system-x86_64"])
        .arg("-M")
        .arg("microvm,acpi=off,pic=on,pit=on,isa-serial=on,rtc=on,auto-kernel-cmdline=on")
        .args(["-accel", "tcg,thread=multi", "-smp", "2", "-m", "1024"])
        .args([
            "-nographic",
            "-nodefaults",
            "-serial",
            "stdio",
            "-no-reboot",
        ])
        .arg("-kernel")
        .arg(kernel)
        .arg("-initrd")
        .arg(initramfs)
        .args(["-append", &command_line(filter)]);
    for (number, disk) in disks.iter().enumerate() {
        command
            .arg("-drive")
            .arg(format!(
                "id=disk{number},file={},if=none,format=raw,cache=unsafe",
                disk.display()
            ))
            .arg("-device")
            .arg(format!("virtio-blk-device,drive=disk{number}"));
    }
    command.stdin(Stdio::null()).stdout(Stdio::piped());
    let mut machine = Machine(command.spawn().context("starting qemu-system-x86_64")?);
    let console = machine
        .0
        .stdout
        .take()
        .context("the machine has no console")?;
    listen(console, RUN_MAX)
}

/// Seed and filter travel on the kernel's command line, from which init has them as variables.
fn command_line(filter: Option<&str>) -> String {
    let mut line = "console=ttyS0 quiet panic=-1 reboot=t".to_owned();
    let seed = std::env::var("PANTALA_SEED").ok();
    for (name, value) in [("SEED", seed.as_deref()), ("TEST_FILTER", filter)] {
        if let Some(value) = value {
            line.push_str(&format!(" PANTALA_{name}={value}"));
        }
    }
    line
}

/// Reads the console until the guest has summed up, or stops, or takes too long.
fn listen(console: impl std::io::Read + Send + 'static, max: Duration) -> Result<Outcome> {
    let (send, lines) = mpsc::sync_channel(1024);
    std::thread::spawn(move || {
        for line in BufReader::new(console).split(b'\n') {
            let Ok(line) = line else { return };
            let line = String::from_utf8_lossy(&line).trim_end().to_owned();
            if send.send(line).is_err() {
                return;
            }
        }
    });
    let deadline = Instant::now() + max;
    let mut seen = Vec::new();
    let why = loop {
        let left = deadline.saturating_duration_since(Instant::now());
        match lines.recv_timeout(left) {
            Ok(line) => {
                // The firmware's and the kernel's first line share a row with escape sequences.
                if let Some(at) = line.find(MARK) {
                    let text = &line[at + MARK.len()..];
                    println!("{text}");
                    if let Some(outcome) = summary(text) {
                        if matches!(outcome, Outcome::Failed(_)) {
                            show(&seen);
                        }
                        return Ok(outcome);
                    }
                }
                seen.push(line);
            }
            Err(RecvTimeoutError::Timeout) => {
                break format!("the guest did not end in {} s", max.as_secs());
            }
            Err(RecvTimeoutError::Disconnected) => {
                break "the guest stopped before it had summed up".to_owned();
            }
        }
    };
    show(&seen);
    Ok(Outcome::Failed(why))
}

fn show(seen: &[String]) {
    println!("the guest's console, its last lines:");
    for line in &seen[seen.len().saturating_sub(LINES_SHOWN_MAX)..] {
        println!("  | {line}");
    }
}

/// `N passed, M failed` is the last line of a guest that did its work.
fn summary(text: &str) -> Option<Outcome> {
    let (passed, failed) = text.strip_suffix(" failed")?.split_once(" passed, ")?;
    let (passed, failed): (u32, u32) = (passed.parse().ok()?, failed.parse().ok()?);
    Some(match (passed, failed) {
        (0, 0) => Outcome::Failed("the guest ran no test".into()),
        (_, 0) => Outcome::Passed,
        _ => Outcome::Failed(format!("{failed} tests failed in the guest")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn heard(console: &'static str) -> Outcome {
        listen(console.as_bytes(), Duration::from_secs(60)).unwrap()
    }

    #[test]
    fn a_guest_that_stops_early_or_fails_a_test_has_failed() {
        assert!(matches!(
            heard("\x1bcguest: test a ... ok\r\nguest: 3 passed, 0 failed\r\n"),
            Outcome::Passed
        ));
        for console in [
            "",
            "guest: test a ... ok\nKernel panic",
            "guest: 3 passed, 1 failed\n",
            "guest: 0 passed, 0 failed\n",
        ] {
            assert!(matches!(heard(console), Outcome::Failed(_)), "{console}");
        }
    }
}

//! Process 1 of the machine: mounts what is needed, runs each test in a process of its own, stops the machine.

use std::ffi::CStr;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::process::{Command, ExitCode};
use std::time::{Duration, Instant};

use rustix::mount::{MountFlags, mount};
use rustix::system::{RebootCommand, reboot};

use crate::tests::TESTS;

/// The disk that the tests write to, and its label.
pub(crate) const SCRATCH: &str = "/scratch";
/// The disk with the image, and its label.
pub(crate) const IMAGE: &str = "/image";
/// Emulation is slow; a test that takes longer than this hangs.
const TEST_MAX: Duration = Duration::from_secs(300);

pub(crate) fn run() -> ExitCode {
    if let Err(error) = set_up() {
        println!("guest: cannot set the machine up: {error}");
        stop();
    }
    let version = fs::read_to_string("/proc/sys/kernel/osrelease").unwrap_or_default();
    println!("guest: kernel {}", version.trim());
    let (mut passed, mut failed) = (0, 0);
    let filter = std::env::var("PANTALA_TEST_FILTER").unwrap_or_default();
    for (name, _) in TESTS.iter().filter(|(name, _)| name.contains(&filter)) {
        let start = Instant::now();
        let outcome = in_bounded_time(name);
        let took = start.elapsed().as_secs_f64();
        match outcome {
            Ok(()) => {
                passed += 1;
                println!("guest: test {name} ... ok ({took:.0} s)");
            }
            Err(why) => {
                failed += 1;
                println!("guest: test {name} ... FAILED ({took:.0} s): {why}");
            }
        }
    }
    println!("guest: {passed} passed, {failed} failed");
    stop();
}

fn set_up() -> io::Result<()> {
    let mounts: &[(&str, &str, &CStr)] = &[
        ("proc", "/proc", c"proc"),
        ("sysfs", "/sys", c"sysfs"),
        ("devtmpfs", "/dev", c"devtmpfs"),
    ];
    for (source, at, fs_type) in mounts {
        mount_on(source, at, fs_type)?;
    }
    // Which disk comes first is the emulator's choice: their labels say where they go.
    for disk in ["/dev/vda", "/dev/vdb"] {
        let at = format!("/{}", label(disk)?);
        mount_on(disk, &at, c"ext4")?;
    }
    fs::create_dir_all("/run")?;
    fs::create_dir_all("/tmp")
}

fn mount_on(source: &str, at: &str, fs_type: &CStr) -> io::Result<()> {
    fs::create_dir_all(at)?;
    mount(source, at, fs_type, MountFlags::empty(), None)
        .map_err(|errno| io::Error::other(format!("mount {source} on {at}: {errno}")))
}

/// The label of an ext4 file system: 16 bytes of its superblock, which begins at 1024.
fn label(disk: &str) -> io::Result<String> {
    let mut label = [0; 16];
    File::open(disk)?.read_exact_at(&mut label, 1024 + 120)?;
    let text = String::from_utf8_lossy(&label);
    Ok(text.trim_end_matches('\0').to_owned())
}

/// Runs one test; its output goes to the console.
fn in_bounded_time(name: &str) -> Result<(), String> {
    let own = std::env::current_exe().map_err(|error| error.to_string())?;
    let mut child = Command::new(own)
        .args(["test", name])
        .spawn()
        .map_err(|error| error.to_string())?;
    let deadline = Instant::now() + TEST_MAX;
    loop {
        match child.try_wait() {
            Ok(Some(status)) if status.success() => return Ok(()),
            Ok(Some(status)) => return Err(status.to_string()),
            Ok(None) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(50));
            }
            Ok(None) => {
                let killed = child.kill();
                return Err(format!("it hangs (killed: {killed:?})"));
            }
            Err(error) => return Err(error.to_string()),
        }
    }
}

/// The emulator ends when the machine restarts.
fn stop() -> ! {
    rustix::fs::sync();
    if let Err(errno) = reboot(RebootCommand::Restart) {
        println!("guest: cannot restart: {errno}");
    }
    loop {
        std::thread::park();
    }
}

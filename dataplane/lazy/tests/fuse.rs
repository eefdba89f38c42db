//! The FUSE backend on the real kernel: root, file-backed EROFS and mkfs.erofs are needed. Without them the tests say what
//! they did not test; with `PANTALA_REQUIRE_MOUNTS` set that is a failure.

mod mounts;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use mounts::device::LateDevice;
use mounts::image::Image;
use mounts::{By, Dice, Fixture, digest, seed};
use pantala_lazy::backend::fuse::{FuseBackend, probe};
use pantala_lazy::faults::Limits;
use pantala_lazy::{Backend, Device, MountSpec};

/// Tens of megabytes, as a small image has.
const IMAGE_BYTES: u64 = 24 << 20;

/// What is missing here, if anything.
fn missing() -> Option<&'static str> {
    let has = |program: &str| {
        let path = std::env::var("PATH").unwrap_or_default();
        path.split(':')
            .any(|dir| Path::new(dir).join(program).exists())
    };
    if !rustix_is_root() {
        Some("root")
    } else if !has("mkfs.erofs") {
        Some("mkfs.erofs (package erofs-utils)")
    } else if !Path::new("/dev/fuse").exists() {
        Some("/dev/fuse")
    } else {
        None
    }
}

fn rustix_is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Runs `test` over a backend of its own.
fn with_backend<F: Future<Output = ()>>(test: impl FnOnce(Fixture<FuseBackend>) -> F) {
    if let Some(what) = missing() {
        assert!(
            std::env::var_os("PANTALA_REQUIRE_MOUNTS").is_none(),
            "the mount tests need {what}"
        );
        println!("NOT TESTED: the mount tests need {what}");
        return;
    }
    let scratch = tempfile::tempdir().expect("a folder");
    probe(scratch.path()).expect("the machine can do it");
    let image = Image::make(scratch.path(), IMAGE_BYTES, None).expect("an image");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .expect("a runtime");
    runtime.block_on(async {
        let root = scratch.path().join("run");
        let (backend, stale) = FuseBackend::open(&root, Limits::default()).expect("a backend");
        assert_eq!(stale, Vec::<PathBuf>::new());
        test(Fixture {
            backend: Arc::new(backend),
            image,
            scratch: scratch.path().to_owned(),
        })
        .await;
        let left: Vec<_> = fs::read_dir(&root)
            .expect("its records")
            .flatten()
            .map(|entry| entry.file_name())
            .collect();
        assert_eq!(left, ["lock"], "records are left behind");
    });
}

#[test]
fn every_file_reads_as_its_source() {
    with_backend(async |fixture| fixture.every_file_reads_as_its_source(seed()).await);
}

#[test]
fn reads_fail_while_fills_fail_and_succeed_after() {
    with_backend(async |fixture| {
        fixture
            .reads_fail_while_fills_fail_and_succeed_after(seed())
            .await;
    });
}

#[test]
fn unmounting_under_load_ends_the_readers() {
    with_backend(async |fixture| fixture.unmounting_under_load_ends_the_readers(seed()).await);
}

#[test]
fn what_cannot_be_mounted_leaves_nothing_behind() {
    with_backend(async |fixture| fixture.what_cannot_be_mounted_leaves_nothing_behind().await);
}

/// Not a test: the daemon that [`a_killed_daemon_fails_reads_and_the_next_takes_its_mounts_down`] kills.
#[test]
#[ignore = "runs as the daemon of another test"]
fn daemon() {
    let Some(scratch) = std::env::var_os("PANTALA_TEST_SCRATCH").map(PathBuf::from) else {
        return;
    };
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(async {
        let (backend, _) =
            FuseBackend::open(&scratch.join("run"), Limits::default()).expect("a backend");
        let path = scratch.join("device");
        let device = LateDevice::new(&path, &scratch.join("blob"), Duration::from_millis(5));
        let spec = MountSpec {
            metadata: scratch.join("metadata"),
            devices: vec![Arc::new(device.expect("a device")) as Arc<dyn Device>],
            at: scratch.join("mount"),
        };
        backend.mount(spec).await.expect("mounts");
        println!("\nmounted");
        std::future::pending::<()>().await;
    });
}

#[test]
fn a_killed_daemon_fails_reads_and_the_next_takes_its_mounts_down() {
    with_backend(async |fixture| {
        let seed = seed();
        for round in 0..3 {
            let image = fixture.image.clone();
            let scratch = fixture.scratch.join(format!("killed{round}"));
            let next = tokio::task::spawn_blocking(move || {
                killed_under_load(&image, &scratch, seed + round);
            });
            next.await.expect("no wrong bytes");
            let root = fixture.scratch.join(format!("killed{round}/run"));
            let next = FuseBackend::open(&root, Limits::default());
            let (_, taken_down) = next.expect("takes over");
            let at = fixture.scratch.join(format!("killed{round}/mount"));
            assert_eq!(taken_down, std::slice::from_ref(&at));
            assert!(!at.join("odd").exists(), "still mounted");
        }
    });
}

/// Another process that mounts and serves, killed at the latest when it is dropped.
struct Daemon(Child);

impl Daemon {
    /// Returns when it has mounted.
    fn start(scratch: &Path) -> Self {
        let child = Command::new(std::env::current_exe().expect("this program"))
            .args(["daemon", "--exact", "--ignored", "--nocapture"])
            .env("PANTALA_TEST_SCRATCH", scratch)
            .stdout(Stdio::piped())
            .spawn();
        let mut daemon = Self(child.expect("a daemon"));
        let output = BufReader::new(daemon.0.stdout.take().expect("its output"));
        let mut said = output.lines().map_while(Result::ok);
        assert!(said.any(|line| line == "mounted"), "no mount");
        daemon
    }

    fn kill(&mut self) {
        self.0.kill().expect("kills");
        self.0.wait().expect("ends");
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Mounts in another process, kills it while files are read, and looks at what readers see.
fn killed_under_load(image: &Image, scratch: &Path, seed: u64) {
    let at = scratch.join("mount");
    fs::create_dir_all(&at).expect("a folder");
    for (name, target) in [("blob", &image.blob), ("metadata", &image.metadata)] {
        std::os::unix::fs::symlink(target, scratch.join(name)).expect("a link");
    }
    let mut daemon = Daemon::start(scratch);

    let mut dice = Dice(seed);
    let (mut good, mut failed) = (Vec::new(), 0);
    let kill_after = 1 + dice.below(60);
    let mut order: Vec<_> = image.entries.iter().collect();
    dice.shuffle(&mut order);
    for (count, entry) in order.into_iter().enumerate() {
        if count as u64 == kill_after {
            daemon.kill();
        }
        match digest(image, &at, entry, By::Read, &mut dice) {
            Ok(got) => {
                assert_eq!(got, entry.digest, "wrong bytes of {entry:?}");
                good.push(entry);
            }
            Err(error) => {
                assert!(
                    count as u64 >= kill_after,
                    "failed before the kill: {error}"
                );
                failed += 1;
            }
        }
    }
    assert!(failed > 0, "everything was read, though nobody served");
    println!(
        "killed after {kill_after} files: {} read, {failed} failed",
        good.len()
    );
}

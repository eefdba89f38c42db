//! The tests in the machine. Each runs in a process of its own and fails by panicking.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pantala_lazy::Backend;
use pantala_lazy::backend::cachefiles::{CachefilesBackend, bind};
use pantala_lazy::backend::fuse::FuseBackend;
use pantala_lazy::faults::Limits;

use rustix::process::{Pid, Signal};

use crate::init::{IMAGE, SCRATCH};
use crate::mounts::image::Image;
use crate::mounts::{ALL_WAYS, By, Dice, Fixture, digest, read_all, seed};

/// All tests by their names.
pub(crate) const TESTS: &[(&str, fn())] = &[
    ("cachefiles_every_file_reads_as_its_source", || {
        with_cachefiles(async |fixture| fixture.every_file_reads_as_its_source(seed()).await);
    }),
    (
        "cachefiles_reads_fail_while_fills_fail_and_succeed_after",
        || {
            with_cachefiles(async |fixture| {
                fixture
                    .reads_fail_while_fills_fail_and_succeed_after(seed())
                    .await;
            });
        },
    ),
    ("cachefiles_unmounting_under_load_ends_the_readers", || {
        with_cachefiles(async |fixture| {
            fixture.unmounting_under_load_ends_the_readers(seed()).await;
        });
    }),
    (
        "cachefiles_what_cannot_be_mounted_leaves_nothing_behind",
        || {
            with_cachefiles(async |fixture| {
                fixture.what_cannot_be_mounted_leaves_nothing_behind().await;
            });
        },
    ),
    (
        "cachefiles_the_cache_of_a_mount_is_removed_after_it",
        the_cache_is_removed,
    ),
    (
        "cachefiles_a_killed_daemon_is_waited_for_and_the_next_goes_on",
        killed_and_resumed,
    ),
    ("cachefiles_without_anyone_reads_fail", without_anyone),
    (
        "cachefiles_readers_of_a_stopped_daemon_wait_and_can_be_killed",
        stopped_daemon,
    ),
    ("fuse_every_file_reads_as_its_source", || {
        with_fuse(async |fixture| fixture.every_file_reads_as_its_source(seed()).await);
    }),
    ("fuse_reads_fail_while_fills_fail_and_succeed_after", || {
        with_fuse(async |fixture| {
            fixture
                .reads_fail_while_fills_fail_and_succeed_after(seed())
                .await;
        });
    }),
];

pub(crate) fn run(name: &str) -> ExitCode {
    match TESTS.iter().find(|(known, _)| *known == name) {
        Some((_, test)) => {
            test();
            ExitCode::SUCCESS
        }
        None => ExitCode::FAILURE,
    }
}

fn image() -> Image {
    let dir = Path::new(IMAGE);
    Image {
        metadata: dir.join("metadata.erofs"),
        blob: dir.join("blob"),
        entries: Image::read_list(&dir.join("list")).expect("the image's list"),
        digester: vec!["digester".into(), "digest".into()],
    }
}

fn cache_dir() -> PathBuf {
    Path::new(SCRATCH).join("cache")
}

fn block_on<F: Future>(future: F) -> F::Output {
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    runtime.block_on(future)
}

fn with_cachefiles<F: Future<Output = ()>>(test: impl FnOnce(Fixture<CachefilesBackend>) -> F) {
    block_on(async {
        let control = bind(&cache_dir()).expect("binds");
        let backend = CachefilesBackend::new(control, &cache_dir(), Limits::default()).await;
        test(Fixture {
            backend: Arc::new(backend.expect("serves")),
            image: image(),
            scratch: SCRATCH.into(),
        })
        .await;
    });
}

fn with_fuse<F: Future<Output = ()>>(test: impl FnOnce(Fixture<FuseBackend>) -> F) {
    block_on(async {
        let (backend, _) =
            FuseBackend::open(Path::new("/run/fuse"), Limits::default()).expect("a backend");
        test(Fixture {
            backend: Arc::new(backend),
            image: image(),
            scratch: SCRATCH.into(),
        })
        .await;
    });
}

/// Cache files below the cache's folder.
fn cache_files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).into_iter().flatten().flatten() {
        let path = entry.path();
        if path.is_dir() {
            found.extend(cache_files(&path));
        } else {
            found.push(path);
        }
    }
    found
}

fn the_cache_is_removed() {
    with_cachefiles(async |fixture| {
        let (at, device) = fixture.prepare("kept", Duration::ZERO);
        let spec = pantala_lazy::MountSpec {
            metadata: fixture.image.metadata.clone(),
            devices: vec![device],
            at: at.clone(),
        };
        fixture.backend.mount(spec).await.expect("mounts");
        let wrong = read_all(&fixture.image, &at, seed(), ALL_WAYS);
        assert!(wrong.is_empty(), "{wrong:#?}");
        fixture.backend.unmount(&at).await.expect("unmounts");
        let start = Instant::now();
        loop {
            tokio::time::sleep(Duration::from_millis(200)).await;
            let left = cache_files(&cache_dir());
            if left.is_empty() && start.elapsed() > Duration::from_secs(3) {
                return;
            }
            assert!(start.elapsed() < Duration::from_secs(60), "left: {left:?}");
        }
    });
}

/// A daemon in a process of its own. The descriptor stays with the test, as it would with a supervisor.
struct Worker(Child);

impl Worker {
    fn start(control: &OwnedFd, life: &str, at: &Path) -> Self {
        let own = std::env::current_exe().expect("this program");
        let control = control.as_fd().try_clone_to_owned().expect("a duplicate");
        let child = Command::new(own)
            .args(["worker", life])
            .arg(at)
            .stdin(Stdio::from(control))
            .stdout(if life == "new" {
                Stdio::piped()
            } else {
                Stdio::inherit()
            })
            .spawn()
            .expect("a worker");
        Self(child)
    }

    fn mount_name(&mut self) -> String {
        let output = self.0.stdout.take().expect("its output");
        let mut line = String::new();
        BufReader::new(output).read_line(&mut line).expect("a line");
        line.trim().to_owned()
    }

    fn signal(&self, signal: Signal) {
        let process = Pid::from_child(&self.0);
        rustix::process::kill_process(process, signal).expect("signals");
    }

    fn kill(&mut self) {
        self.0.kill().expect("kills");
        self.0.wait().expect("ends");
    }
}

/// Then the readers may finish: in an emulated machine on a busy one they would hardly get on.
const KILLS_MAX: u32 = 20;

/// SIGKILL at seeded moments under load, with the descriptor kept: no read fails and none is wrong.
fn killed_and_resumed() {
    let seed = seed();
    for round in 0..2 {
        let control = bind(&cache_dir()).expect("binds");
        let at = Path::new(SCRATCH).join("killed.mount");
        fs::create_dir_all(&at).expect("a folder");
        let mut worker = Worker::start(&control, "new", &at);
        let name = worker.mount_name();
        assert_eq!(name.len(), 32, "no mount: {name}");
        let image = image();
        let mut dice = Dice(seed + round);
        let mut kills = 0;
        let wrong = std::thread::scope(|scope| {
            let reader = scope.spawn(|| read_all(&image, &at, seed ^ round, ALL_WAYS));
            while !reader.is_finished() && kills < KILLS_MAX {
                std::thread::sleep(Duration::from_millis(50 + dice.below(700)));
                worker.kill();
                std::thread::sleep(Duration::from_millis(dice.below(200)));
                worker = Worker::start(&control, &name, &at);
                kills += 1;
            }
            reader.join().expect("the readers do not panic")
        });
        println!("killed {kills} times while files were read");
        assert!(wrong.is_empty(), "{wrong:#?}");
        assert!(kills > 1, "the daemon was hardly killed");
        rustix::mount::unmount(&at, rustix::mount::UnmountFlags::DETACH).expect("unmounts");
        worker.kill();
    }
}

/// The daemon dies and nobody keeps the descriptor: what is not cached fails at once, what is cached stays right.
fn without_anyone() {
    let control = bind(&cache_dir()).expect("binds");
    let at = Path::new(SCRATCH).join("orphan.mount");
    fs::create_dir_all(&at).expect("a folder");
    let mut worker = Worker::start(&control, "new", &at);
    let name = worker.mount_name();
    assert_eq!(name.len(), 32, "no mount: {name}");
    drop(control);
    let image = image();
    let mut dice = Dice(seed());
    let mut order: Vec<_> = image.entries.iter().collect();
    dice.shuffle(&mut order);
    let (before, after) = order.split_at(order.len() / 4);
    for entry in before {
        let got = digest(&image, &at, entry, By::Read, &mut dice).expect("it is served");
        assert_eq!(got, entry.digest);
    }
    worker.kill();
    let (mut right, mut failed) = (0, 0);
    let start = Instant::now();
    for entry in after {
        match digest(&image, &at, entry, By::Read, &mut dice) {
            Ok(got) => {
                assert_eq!(got, entry.digest, "wrong bytes of {entry:?}");
                right += 1;
            }
            Err(_) => failed += 1,
        }
    }
    println!(
        "without a daemon: {right} right, {failed} failed in {:.1?}",
        start.elapsed()
    );
    assert!(failed > 0, "everything was read, though nobody served");
    rustix::mount::unmount(&at, rustix::mount::UnmountFlags::DETACH).expect("unmounts");
}

/// The daemon stands still: a reader waits, can be killed, and another gets the bytes when it goes on.
fn stopped_daemon() {
    let control = bind(&cache_dir()).expect("binds");
    let at = Path::new(SCRATCH).join("stopped.mount");
    fs::create_dir_all(&at).expect("a folder");
    let mut worker = Worker::start(&control, "new", &at);
    assert_eq!(worker.mount_name().len(), 32, "no mount");
    let image = image();
    let entry = image.entries.iter().max_by_key(|entry| entry.size_bytes);
    let entry = entry.expect("an image has files");
    worker.signal(Signal::STOP);
    let own = std::env::current_exe().expect("this program");
    let mut readers: Vec<Child> = (0..2)
        .map(|_| {
            Command::new(&own)
                .arg("digest")
                .arg(at.join(&entry.path))
                .stdout(Stdio::piped())
                .spawn()
                .expect("a reader")
        })
        .collect();
    std::thread::sleep(Duration::from_secs(2));
    for reader in &mut readers {
        assert!(
            reader.try_wait().expect("its state").is_none(),
            "it did not wait"
        );
    }
    let mut killed = readers.remove(0);
    killed.kill().expect("kills");
    let status = killed.wait().expect("ends");
    assert!(!status.success(), "{status}");
    worker.signal(Signal::CONT);
    let output = readers.remove(0).wait_with_output().expect("ends");
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.starts_with(&entry.digest),
        "{text} instead of {entry:?}"
    );
    rustix::mount::unmount(&at, rustix::mount::UnmountFlags::DETACH).expect("unmounts");
    worker.kill();
}

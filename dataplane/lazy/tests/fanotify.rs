//! Real mounts over fanotify: needs root, a kernel that has it, and mkfs.erofs. Elsewhere the tests say
//! that they have tested nothing.

use std::fs::{self, File};
use std::io::Read;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

use futures_util::future::BoxFuture;
use pantala_lazy::backend::fanotify::{FanotifyBackend, FanotifyConfig, kept_files, probe};
use pantala_lazy::faults::Limits;
use pantala_lazy::{Backend, Device, FillError, MountSpec};
use pantala_wire::{ByteRange, Priority};

/// Bytes that are copied from a whole file when they are asked for, after a while.
struct Copying {
    path: PathBuf,
    file: File,
    whole: File,
    size_bytes: u64,
    failing: AtomicBool,
    complete: AtomicBool,
    urgent_fills: AtomicU64,
}

impl Copying {
    fn new(path: &Path, whole: &Path, file: File) -> Arc<Self> {
        let size_bytes = fs::metadata(whole).unwrap().len();
        // Not again after a restart: setting a marked file's length raises an event on any descriptor.
        if file.metadata().unwrap().len() != size_bytes {
            file.set_len(size_bytes).unwrap();
        }
        Arc::new(Self {
            path: path.to_owned(),
            file,
            whole: File::open(whole).unwrap(),
            size_bytes,
            failing: AtomicBool::new(false),
            complete: AtomicBool::new(false),
            urgent_fills: AtomicU64::new(0),
        })
    }
}

impl Device for Copying {
    fn size_bytes(&self) -> u64 {
        self.size_bytes
    }
    fn path(&self) -> &Path {
        &self.path
    }
    fn file(&self) -> &File {
        &self.file
    }
    fn is_complete(&self) -> bool {
        self.complete.load(Ordering::SeqCst)
    }
    fn fill(&self, range: ByteRange, urgency: Priority) -> BoxFuture<'_, Result<(), FillError>> {
        Box::pin(async move {
            tokio::time::sleep(Duration::from_millis(1)).await;
            if self.failing.load(Ordering::SeqCst) {
                return Err(FillError::Unavailable {
                    what: format!("{range:?}"),
                    why: "the test says so".into(),
                });
            }
            if urgency == Priority::Fault {
                self.urgent_fills.fetch_add(1, Ordering::SeqCst);
            }
            let mut bytes = vec![0; range.len() as usize];
            self.whole.read_exact_at(&mut bytes, range.start()).unwrap();
            self.file.write_all_at(&bytes, range.start()).unwrap();
            Ok(())
        })
    }
}

/// A directory of real files as an image, and a place to mount it.
struct Scene {
    dir: tempfile::TempDir,
    tree: PathBuf,
}

impl Scene {
    /// `None` where the machine cannot do it.
    fn new() -> Option<Self> {
        let dir = tempfile::Builder::new()
            .prefix("pantala-lazy-")
            .tempdir_in("/var/tmp")
            .unwrap();
        if let Err(unable) = probe::probe(dir.path()) {
            eprintln!("NOT TESTED HERE: {unable}");
            return None;
        }
        let tree = dir.path().join("tree");
        fs::create_dir_all(&tree).unwrap();
        for (number, file) in real_files().into_iter().enumerate() {
            fs::copy(file, tree.join(format!("{number:03}"))).unwrap();
        }
        let mkfs = Command::new("mkfs.erofs")
            .arg(format!("--blobdev={}", dir.path().join("whole").display()))
            .arg("--chunksize=4096")
            .arg("--quiet")
            .arg(dir.path().join("meta"))
            .arg(&tree)
            .output();
        match mkfs {
            Ok(output) if output.status.success() => {}
            other => {
                eprintln!("NOT TESTED HERE: mkfs.erofs: {other:?}");
                return None;
            }
        }
        fs::create_dir_all(dir.path().join("at")).unwrap();
        Some(Self { dir, tree })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn device(&self) -> Arc<Copying> {
        let path = self.path("data");
        let file = File::options()
            .read(true)
            .write(true)
            .create_new(true)
            .open(&path)
            .unwrap();
        Copying::new(&path, &self.path("whole"), file)
    }

    fn spec(&self, device: &Arc<Copying>) -> MountSpec {
        MountSpec {
            metadata: self.path("meta"),
            devices: vec![Arc::clone(device) as Arc<dyn Device>],
            at: self.path("at"),
        }
    }

    fn config(&self) -> FanotifyConfig {
        FanotifyConfig {
            dir: self.path("supervisor"),
            supervisor: "/nonexistent".into(),
            limits: Limits {
                background_bytes: 0,
                ..Limits::default()
            },
        }
    }

    /// A supervisor in a thread of this process, which is as good as one of its own until it is killed.
    async fn supervise(&self) {
        let dir = self.path("supervisor");
        fs::create_dir_all(&dir).unwrap();
        let serving = dir.clone();
        std::thread::spawn(move || pantala_supervisor::serve::serve(&serving).unwrap());
        while !dir.join("supervisor.sock").exists() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    }

    fn files(&self) -> Vec<(PathBuf, PathBuf)> {
        let names = fs::read_dir(&self.tree).unwrap();
        names
            .map(|entry| {
                let name = entry.unwrap().file_name();
                (self.tree.join(&name), self.path("at").join(&name))
            })
            .collect()
    }
}

/// A few megabytes of this machine's programs.
fn real_files() -> Vec<PathBuf> {
    let mut bytes = 0;
    let mut files: Vec<_> = fs::read_dir("/usr/bin")
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|path| fs::symlink_metadata(path).is_ok_and(|m| m.is_file() && m.len() < 2 << 20))
        .collect();
    files.sort();
    files.retain(|path| {
        bytes += fs::metadata(path).map_or(0, |m| m.len());
        bytes < 24 << 20
    });
    files
}

async fn reading<T: Send + 'static>(read: impl FnOnce() -> T + Send + 'static) -> T {
    let limit = Duration::from_secs(60);
    let read = tokio::task::spawn_blocking(read);
    tokio::time::timeout(limit, read).await.unwrap().unwrap()
}

/// Reads every file in several threads; all must be what they were in the tree.
async fn all_equal(files: Vec<(PathBuf, PathBuf)>) {
    reading(move || {
        std::thread::scope(|scope| {
            for part in files.chunks(files.len().div_ceil(6)) {
                scope.spawn(move || {
                    for (source, mounted) in part {
                        let same = fs::read(source).unwrap() == fs::read(mounted).unwrap();
                        assert!(same, "{}", mounted.display());
                    }
                });
            }
        });
    })
    .await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn files_of_a_mount_are_those_of_the_tree_and_the_mount_goes_away() {
    let Some(scene) = Scene::new() else { return };
    scene.supervise().await;
    let (backend, _) = FanotifyBackend::open(scene.config()).await.unwrap();
    backend.start().await.unwrap();
    let device = scene.device();
    backend.mount(scene.spec(&device)).await.unwrap();
    all_equal(scene.files()).await;
    assert!(device.urgent_fills.load(Ordering::SeqCst) > 0);
    backend.unmount(&scene.path("at")).await.unwrap();
    assert!(!scene.path("at").join("000").exists());
    assert!(backend.unmount(&scene.path("at")).await.is_err());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_filled_fails_the_read_and_is_read_right_later() {
    let Some(scene) = Scene::new() else { return };
    scene.supervise().await;
    let (backend, _) = FanotifyBackend::open(scene.config()).await.unwrap();
    backend.start().await.unwrap();
    let device = scene.device();
    device.failing.store(true, Ordering::SeqCst);
    backend.mount(scene.spec(&device)).await.unwrap();
    let (_, mounted) = scene.files().swap_remove(0);
    let error = reading(move || fs::read(mounted)).await.unwrap_err();
    assert_eq!(error.raw_os_error(), Some(5));
    device.failing.store(false, Ordering::SeqCst);
    all_equal(scene.files()).await;
    backend.unmount(&scene.path("at")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_complete_device_is_watched_no_longer_and_needs_no_daemon() {
    let Some(scene) = Scene::new() else { return };
    scene.supervise().await;
    let (backend, _) = FanotifyBackend::open(scene.config()).await.unwrap();
    backend.start().await.unwrap();
    let device = scene.device();
    backend.mount(scene.spec(&device)).await.unwrap();
    let whole = ByteRange::new(0, device.size_bytes()).unwrap();
    device.fill(whole, Priority::Bulk).await.unwrap();
    device.complete.store(true, Ordering::SeqCst);
    // The next look at the devices takes the mark away.
    tokio::time::sleep(Duration::from_millis(2500)).await;
    let before = device.urgent_fills.load(Ordering::SeqCst);
    all_equal(scene.files()).await;
    assert_eq!(device.urgent_fills.load(Ordering::SeqCst), before);
    backend.unmount(&scene.path("at")).await.unwrap();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_reader_waits_while_no_daemon_is_there_and_the_next_one_answers() {
    let Some(scene) = Scene::new() else { return };
    scene.supervise().await;
    let (backend, _) = FanotifyBackend::open(scene.config()).await.unwrap();
    backend.start().await.unwrap();
    let instance = backend.instance();
    let device = scene.device();
    backend.mount(scene.spec(&device)).await.unwrap();
    backend.keep_note("note", b"kept").unwrap();
    drop((backend, device));
    let (source, mounted) = scene.files().swap_remove(0);
    let reader = std::thread::spawn(move || {
        let mut bytes = Vec::new();
        File::open(mounted)
            .unwrap()
            .read_to_end(&mut bytes)
            .unwrap();
        bytes
    });
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(!reader.is_finished(), "it got bytes from nowhere");

    let (backend, kept) = FanotifyBackend::open(scene.config()).await.unwrap();
    assert_eq!(backend.instance(), instance);
    assert!(
        kept.iter()
            .any(|kept| kept.name == "note" && kept.note == b"kept")
    );
    let mut files = kept_files(kept);
    let file = File::from(files.remove(&scene.path("data")).unwrap());
    let device = Copying::new(&scene.path("data"), &scene.path("whole"), file);
    backend.adopt(scene.spec(&device)).await.unwrap();
    backend.start().await.unwrap();
    let bytes = reading(move || reader.join().unwrap()).await;
    assert!(bytes == fs::read(source).unwrap());
    all_equal(scene.files()).await;
    backend.forget("note").unwrap();
    backend.unmount(&scene.path("at")).await.unwrap();
}

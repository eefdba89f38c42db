//! Lazy layers, with a stand-in for the node that mounts plain EROFS images from local files. All of
//! the snapshotter's and the kernel's side is real; only the bytes do not come late.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::{Arc, Mutex};

use futures_util::future::BoxFuture;
use pantala_snapshotter::core::layer::{
    CRI_IMAGE, EROFS_DATA, EROFS_DEVICES, EROFS_METADATA, NYDUS_BLOB, NYDUS_BOOTSTRAP, REF,
};
use pantala_snapshotter::core::{Filter, Kind, Labels, TreeError};
use pantala_snapshotter::{Error, LazyContent, LazyError, LazyLayer, LazyLayers};
use pantala_wire::BlobDigest;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

use crate::stage::{Stage, as_root, show, write};

/// Mounts local images by the digest that stands for them; a nydus bootstrap is taken for an image.
#[derive(Default)]
struct Local {
    images: BTreeMap<BlobDigest, PathBuf>,
    mounted: Mutex<Vec<LazyLayer>>,
    broken: Mutex<bool>,
}

impl Local {
    fn mounted(&self) -> Vec<LazyLayer> {
        self.mounted.lock().unwrap().clone()
    }
}

impl LazyLayers for Local {
    fn mount(&self, layer: LazyLayer) -> BoxFuture<'_, Result<(), LazyError>> {
        Box::pin(async move {
            if *self.broken.lock().unwrap() {
                return Err(LazyError::Unavailable("the registry is gone".into()));
            }
            let image = match &layer.content {
                LazyContent::Erofs { metadata, .. } => self.images[metadata].clone(),
                LazyContent::Nydus { bootstrap } => bootstrap.clone(),
            };
            let mut mounted = self.mounted.lock().unwrap();
            if mounted.iter().any(|other| other.at == layer.at) {
                return Ok(());
            }
            rustix::mount::mount(&image, &layer.at, "erofs", MountFlags::RDONLY, c"")
                .map_err(|error| LazyError::Impossible(error.to_string()))?;
            mounted.push(layer);
            Ok(())
        })
    }

    fn unmount<'a>(&'a self, at: &'a Path) -> BoxFuture<'a, Result<(), LazyError>> {
        Box::pin(async move {
            self.mounted.lock().unwrap().retain(|layer| layer.at != at);
            match rustix::mount::unmount(at, UnmountFlags::empty()) {
                Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
                Err(error) => Err(LazyError::Impossible(error.to_string())),
            }
        })
    }
}

fn digest(fill: u8) -> BlobDigest {
    BlobDigest::new([fill; 32])
}

fn labels(target: u8, pairs: &[(&str, String)]) -> Labels {
    let own = pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), value.clone()));
    own.chain([(REF.to_owned(), digest(target).to_string())])
        .collect()
}

/// An EROFS image with one file in it.
fn image(dir: &Path, name: &str, text: &str) -> PathBuf {
    let source = dir.join(format!("{name}-source"));
    fs::create_dir(&source).unwrap();
    write(&source, name, text);
    let image = dir.join(format!("{name}.erofs"));
    let made = Command::new("mkfs.erofs").arg(&image).arg(&source).output();
    assert!(
        made.expect("mkfs.erofs (package erofs-utils)")
            .status
            .success()
    );
    image
}

fn has_mkfs() -> bool {
    let found = Command::new("mkfs.erofs").arg("-V").output().is_ok();
    if !found {
        eprintln!("NOT TESTED HERE: needs mkfs.erofs (package erofs-utils)");
    }
    found
}

/// The pull of an image of one data layer and one metadata layer, as containerd does it.
async fn pull(stage: &Stage) -> String {
    let data = labels(1, &[(EROFS_DATA, digest(11).to_string())]);
    let metadata = labels(
        2,
        &[
            (EROFS_METADATA, digest(12).to_string()),
            (EROFS_DEVICES, digest(11).to_string()),
            (CRI_IMAGE, "r.test:5000/team/app:v1".into()),
        ],
    );
    let mut parent = String::new();
    for (target, labels) in [(1, data), (2, metadata)] {
        let key = format!("ns/{target}/extract");
        let told = stage.create(Kind::Active, &key, &parent, labels).await;
        assert!(
            matches!(told, Err(Error::Tree(TreeError::AlreadyExists(_)))),
            "{told:?}"
        );
        // How containerd then finds what it may take for the layer.
        let filter = format!(
            "labels.\"containerd.io/snapshot.ref\"=={},parent==\"{parent}\"",
            digest(target)
        );
        let found = stage.snapshotter.list(&Filter::parse(&[filter]).unwrap());
        assert_eq!(found.len(), 1);
        assert_eq!(found[0].kind, Kind::Committed);
        parent = found[0].name.clone();
    }
    parent
}

fn local(dir: &Path) -> Arc<Local> {
    Arc::new(Local {
        images: [(digest(12), image(dir, "lazy", "from afar"))].into(),
        ..Local::default()
    })
}

#[test]
fn a_lazy_image_is_pulled_without_a_download_and_mounted_under_its_container() {
    as_root(async || {
        if !has_mkfs() {
            return;
        }
        let images = tempfile::tempdir_in("/var/tmp").unwrap();
        let local = local(images.path());
        let stage = Stage::with(Some(local.clone())).await;
        let top = pull(&stage).await;
        let mounted = local.mounted();
        assert_eq!(mounted.len(), 1);
        let source = mounted[0].image.as_ref().unwrap();
        assert_eq!(
            (source.registry.as_str(), source.repository.as_str()),
            ("r.test:5000", "team/app")
        );

        let mounts = stage.prepare("container", &top).await.unwrap();
        {
            let root = stage.mount(&mounts);
            assert_eq!(
                fs::read_to_string(root.path().join("lazy")).unwrap(),
                "from afar"
            );
            write(root.path(), "own", "written");
            fs::remove_file(root.path().join("lazy")).unwrap();
            assert_eq!(show(root.path()).len(), 1);
        }
        assert_eq!(stage.seen(&top).await.len(), 1);
        // A second pull, by another namespace for one, takes what is there.
        assert_eq!(pull(&stage).await, top);
        assert_eq!(local.mounted().len(), 1);

        stage.snapshotter.remove("container").await.unwrap();
        for snapshot in [
            top.as_str(),
            &stage.snapshotter.stat(&top).unwrap().parent.unwrap(),
        ] {
            stage.snapshotter.remove(snapshot).await.unwrap();
        }
        assert_eq!((local.mounted().len(), stage.directories()), (0, 0));
    });
}

#[test]
fn a_lazy_layer_that_cannot_be_mounted_fails_the_pull_and_leaves_nothing() {
    as_root(async || {
        let local = Arc::new(Local {
            broken: Mutex::new(true),
            ..Local::default()
        });
        let stage = Stage::with(Some(local)).await;
        let metadata = labels(2, &[(EROFS_METADATA, digest(12).to_string())]);
        let failed = stage.create(Kind::Active, "k", "", metadata).await;
        assert!(
            failed
                .unwrap_err()
                .to_string()
                .contains("the registry is gone")
        );
        assert_eq!(stage.directories(), 0);
        assert!(stage.snapshotter.list(&Filter::default()).is_empty());
    });
}

#[test]
fn a_nydus_bootstrap_is_unpacked_and_then_mounted_for_a_container() {
    as_root(async || {
        if !has_mkfs() {
            return;
        }
        let images = tempfile::tempdir_in("/var/tmp").unwrap();
        let boot = image(images.path(), "rafs", "chunk");
        let local = Arc::new(Local::default());
        let stage = Stage::with(Some(local.clone())).await;
        let blob = labels(1, &[(NYDUS_BLOB, "true".into())]);
        let skipped = stage.create(Kind::Active, "k1", "", blob).await;
        assert!(matches!(
            skipped,
            Err(Error::Tree(TreeError::AlreadyExists(_)))
        ));
        let parent = stage.snapshotter.list(&Filter::default())[0].name.clone();

        let bootstrap = labels(2, &[(NYDUS_BOOTSTRAP, "true".into())]);
        let mounts = stage
            .create(Kind::Active, "k2", &parent, bootstrap.clone())
            .await
            .unwrap();
        {
            // What containerd unpacks.
            let root = stage.mount(&mounts);
            fs::create_dir(root.path().join("image")).unwrap();
            fs::copy(&boot, root.path().join("image/image.boot")).unwrap();
        }
        stage
            .snapshotter
            .commit("boot", "k2", bootstrap)
            .await
            .unwrap();
        assert!(local.mounted().is_empty());

        let mounts = stage.prepare("container", "boot").await.unwrap();
        let root = stage.mount(&mounts);
        assert_eq!(
            fs::read_to_string(root.path().join("rafs")).unwrap(),
            "chunk"
        );
        assert!(!root.path().join("image").exists());
        drop(root);
        for name in ["container", "boot"] {
            stage.snapshotter.remove(name).await.unwrap();
        }
        assert!(local.mounted().is_empty());
    });
}

#[test]
fn a_bootstrap_that_is_a_link_is_not_followed() {
    as_root(async || {
        let stage = Stage::with(Some(Arc::new(Local::default()))).await;
        for (name, target) in [("one", "image/image.boot"), ("two", "image")] {
            let bootstrap = labels(2, &[(NYDUS_BOOTSTRAP, "true".into())]);
            let mounts = stage
                .create(Kind::Active, "k", "", bootstrap.clone())
                .await
                .unwrap();
            {
                let root = stage.mount(&mounts);
                let link = root.path().join(target);
                fs::create_dir_all(link.parent().unwrap()).unwrap();
                std::os::unix::fs::symlink("/etc/hostname", link).unwrap();
            }
            stage
                .snapshotter
                .commit(name, "k", bootstrap)
                .await
                .unwrap();
            let refused = stage.prepare("container", name).await;
            assert!(matches!(refused, Err(Error::Disk(_))), "{refused:?}");
            assert!(stage.snapshotter.stat("container").is_err());
        }
    });
}

#[test]
fn without_lazy_mounts_a_lazy_image_is_refused_with_the_reason() {
    as_root(async || {
        let stage = Stage::new().await;
        for pair in [
            (EROFS_METADATA, digest(1).to_string()),
            (NYDUS_BOOTSTRAP, "true".into()),
        ] {
            let refused = stage
                .create(Kind::Active, "k", "", labels(2, &[pair]))
                .await;
            assert!(refused.unwrap_err().to_string().contains("no lazy mounts"));
        }
        assert_eq!(stage.directories(), 0);
    });
}

#[test]
fn a_mount_that_outlived_its_record_is_taken_down_by_cleanup() {
    as_root(async || {
        if !has_mkfs() {
            return;
        }
        let images = tempfile::tempdir_in("/var/tmp").unwrap();
        let local = local(images.path());
        let stage = Stage::with(Some(local.clone())).await;
        // A pull that got as far as the mount.
        let at = stage.root().join("snapshots/9/lazy");
        fs::create_dir_all(&at).unwrap();
        let layer = LazyLayer {
            content: LazyContent::Erofs {
                metadata: digest(12),
                devices: Vec::new(),
            },
            image: None,
            at,
        };
        local.mount(layer).await.unwrap();
        stage.snapshotter.cleanup().await.unwrap();
        assert_eq!((local.mounted().len(), stage.directories()), (0, 0));
    });
}

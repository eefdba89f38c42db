//! A snapshotter whose lazy layers are EROFS images in local files, for tests of containerd's side:
//! `local_erofs SOCKET ROOT CONTAINERD_SOCKET BLOBS`. A blob is the file named by its digest in BLOBS; a
//! nydus bootstrap is taken for an EROFS image without devices. Each mount is logged with its image.

#![forbid(unsafe_code)]

use std::ffi::CString;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use futures_util::future::BoxFuture;
use pantala_snapshotter::{
    ImageFinder, LazyContent, LazyError, LazyLayer, LazyLayers, Server, Snapshotter,
};
use pantala_wire::BlobDigest;
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};

struct Local {
    blobs: PathBuf,
}

impl Local {
    fn blob(&self, digest: &BlobDigest) -> PathBuf {
        self.blobs.join(digest.to_hex())
    }

    fn mount_now(&self, layer: &LazyLayer) -> Result<(), LazyError> {
        let (image, devices) = match &layer.content {
            LazyContent::Erofs { metadata, devices } => {
                let options = devices
                    .iter()
                    .map(|device| format!("device={}", self.blob(device).display()));
                (self.blob(metadata), options.collect::<Vec<_>>().join(","))
            }
            LazyContent::Nydus { bootstrap } => (bootstrap.clone(), String::new()),
        };
        if is_mounted(&layer.at) {
            return Ok(());
        }
        let impossible = |why: &dyn std::fmt::Display| LazyError::Impossible(why.to_string());
        let devices = CString::new(devices).map_err(|error| impossible(&error))?;
        let read_only = MountFlags::RDONLY;
        rustix::mount::mount(&image, &layer.at, "erofs", read_only, devices.as_c_str())
            .map_err(|error| impossible(&error))?;
        let of = layer.image.as_ref().map_or_else(
            || "nobody knows which image".to_owned(),
            |image| format!("{}/{}", image.registry, image.repository),
        );
        println!("mounted a layer of {of}");
        Ok(())
    }
}

fn is_mounted(at: &Path) -> bool {
    std::fs::read_to_string("/proc/self/mounts").is_ok_and(|mounts| {
        mounts
            .lines()
            .any(|line| line.split(' ').nth(1) == at.to_str())
    })
}

impl LazyLayers for Local {
    fn mount(&self, layer: LazyLayer) -> BoxFuture<'_, Result<(), LazyError>> {
        Box::pin(async move { self.mount_now(&layer) })
    }

    fn unmount<'a>(&'a self, at: &'a Path) -> BoxFuture<'a, Result<(), LazyError>> {
        Box::pin(async move {
            match rustix::mount::unmount(at, UnmountFlags::empty()) {
                Ok(()) | Err(Errno::INVAL | Errno::NOENT) => Ok(()),
                Err(error) => Err(LazyError::Impossible(error.to_string())),
            }
        })
    }
}

#[tokio::main]
async fn main() -> Result<(), Box<dyn std::error::Error>> {
    let arguments: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [socket, root, containerd, blobs] = arguments.as_slice() else {
        return Err("usage: local_erofs SOCKET ROOT CONTAINERD_SOCKET BLOBS".into());
    };
    let lazy = Arc::new(Local {
        blobs: blobs.clone(),
    });
    let images = ImageFinder::new(containerd.clone());
    let snapshotter = Snapshotter::open(root.clone(), Some(lazy), Some(images)).await?;
    let server = Server::bind(socket.clone(), snapshotter).await?;
    server.serve(std::future::pending()).await?;
    Ok(())
}

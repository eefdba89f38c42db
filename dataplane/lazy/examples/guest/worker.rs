//! A daemon that can be killed: serves one mount with the descriptor that its standard input is.

use std::io;
use std::os::fd::AsFd;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use pantala_lazy::backend::cachefiles::{CachefilesBackend, NamedMount};
use pantala_lazy::faults::Limits;
use pantala_lazy::{Backend, Device, MountSpec};

use crate::init::{IMAGE, SCRATCH};
use crate::mounts::device::LateDevice;

/// Serves until it is killed. `life` is `new`, and then the mount's name is printed, or that name.
pub(crate) fn run(life: &str, at: &Path) -> ExitCode {
    match serve(life, at) {
        Ok(never) => match never {},
        Err(error) => {
            println!("the worker fails: {error}");
            ExitCode::FAILURE
        }
    }
}

fn serve(life: &str, at: &Path) -> io::Result<std::convert::Infallible> {
    let control = io::stdin().as_fd().try_clone_to_owned()?;
    let runtime = tokio::runtime::Runtime::new()?;
    runtime.block_on(async {
        let (path, blob) = (at.with_extension("device"), Path::new(IMAGE).join("blob"));
        let device = LateDevice::new(&path, &blob, Duration::from_millis(10))?;
        let spec = MountSpec {
            metadata: Path::new(IMAGE).join("metadata.erofs"),
            devices: vec![Arc::new(device) as Arc<dyn Device>],
            at: at.to_owned(),
        };
        let cache = Path::new(SCRATCH).join("cache");
        let limits = Limits::default();
        let _backend = if life == "new" {
            let backend = CachefilesBackend::new(control, &cache, limits)
                .await
                .map_err(io::Error::other)?;
            backend.mount(spec).await.map_err(io::Error::other)?;
            for mount in backend.mounts() {
                println!("{}", mount.name);
            }
            backend
        } else {
            let name = life.to_owned();
            let mounts = vec![NamedMount { name, spec }];
            CachefilesBackend::resume(control, &cache, limits, mounts)
                .await
                .map_err(io::Error::other)?
        };
        std::future::pending().await
    })
}

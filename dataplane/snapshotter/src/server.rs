//! The socket that containerd calls.
//!
//! Whoever may open it may mount anything as root by way of containerd, so only this user may.

use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::net::{UnixListener, UnixStream};
use tokio_stream::wrappers::UnixListenerStream;

use crate::error::{StartError, about};
use crate::proto::snapshots::snapshots_server::SnapshotsServer;
use crate::service::Service;
use crate::snapshotter::Snapshotter;

const SOCKET_MODE: u32 = 0o600;
/// The longest that a call may take: a commit writes a whole layer to the disk, and a slow disk takes
/// minutes for a large one. The client gets an error then; what was begun is finished all the same.
const CALL_MAX: Duration = Duration::from_secs(600);
/// Calls at a time on a connection; containerd unpacks a few layers at once.
const CALLS_MAX: usize = 64;
/// Bytes of a request: a name and labels at their largest are about half of this.
const REQUEST_MAX_BYTES: usize = 1 << 20;

/// The snapshotter on its socket.
pub struct Server {
    listener: UnixListener,
    path: PathBuf,
    snapshotter: Snapshotter,
}

impl Server {
    /// Listens on `path`; a socket that nobody answers on any more is replaced.
    ///
    /// # Errors
    /// Where somebody listens there, or the socket cannot be made.
    pub async fn bind(path: PathBuf, snapshotter: Snapshotter) -> Result<Self, StartError> {
        if UnixStream::connect(&path).await.is_ok() {
            return Err(StartError::SocketInUse(path));
        }
        if let Some(dir) = path.parent() {
            fs::create_dir_all(dir).map_err(about("create", dir))?;
        }
        // Made under another name and renamed, so that it is never there with other rights.
        let unfinished = path.with_extension("new");
        remove(&unfinished)?;
        let listener = UnixListener::bind(&unfinished).map_err(about("listen on", &path))?;
        fs::set_permissions(&unfinished, PermissionsExt::from_mode(SOCKET_MODE))
            .and_then(|()| fs::rename(&unfinished, &path))
            .map_err(about("listen on", &path))?;
        Ok(Self {
            listener,
            path,
            snapshotter,
        })
    }

    /// Where it listens.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Serves until `stop`; calls under way are answered.
    ///
    /// # Errors
    /// Where the socket breaks.
    pub async fn serve(
        self,
        stop: impl Future<Output = ()>,
    ) -> Result<(), tonic::transport::Error> {
        let service = SnapshotsServer::new(Service::new(self.snapshotter))
            .max_decoding_message_size(REQUEST_MAX_BYTES);
        let served = tonic::transport::Server::builder()
            .timeout(CALL_MAX)
            .concurrency_limit_per_connection(CALLS_MAX)
            .add_service(service)
            .serve_with_incoming_shutdown(UnixListenerStream::new(self.listener), stop)
            .await;
        if let Err(error) = remove(&self.path) {
            tracing::warn!(%error, "the socket stays");
        }
        served
    }
}

fn remove(path: &Path) -> Result<(), StartError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(about("remove", path)(error).into())
        }
        _ => Ok(()),
    }
}

//! The snapshotter of this node: started, stopped, and told what can be mounted lazily.

use std::sync::Arc;

use anyhow::Context;
use pantala_snapshotter::{ImageFinder, LazyLayers, Server, Snapshotter};
use tokio::sync::oneshot;
use tokio::task::JoinHandle;

use crate::config;
use crate::engine::SHUTDOWN_GRACE;
use crate::lazy::{Lazy, SnapshotLayers};

/// A snapshotter that serves containerd.
pub(crate) struct Snapshots {
    stopping: oneshot::Sender<()>,
    serving: JoinHandle<()>,
}

impl Snapshots {
    /// Starts it, where the configuration asks for it.
    pub(crate) async fn start(
        config: Option<&config::Snapshotter>,
        lazy: &Arc<Lazy>,
    ) -> anyhow::Result<Option<Self>> {
        let Some(config) = config else {
            return Ok(None);
        };
        let images = config.containerd.clone().map(ImageFinder::new);
        let layers: Arc<dyn LazyLayers> = Arc::new(SnapshotLayers::new(Arc::clone(lazy)));
        let snapshotter = Snapshotter::open(config.root.clone(), Some(layers), images)
            .await
            .context("cannot open the snapshots (snapshotter.root)")?;
        let server = Server::bind(config.listen.clone(), snapshotter)
            .await
            .context("cannot start the snapshotter (snapshotter.listen)")?;
        tracing::info!(listen = %config.listen.display(), "snapshotter ready");
        let (stopping, stopped) = oneshot::channel();
        let serving = tokio::spawn(async move {
            // Gone without a word means gone.
            let stop = async { stopped.await.unwrap_or_default() };
            if let Err(error) = server.serve(stop).await {
                tracing::error!(%error, "the snapshotter ended: containerd starts no containers with it until the node is restarted");
            }
        });
        Ok(Some(Self { stopping, serving }))
    }

    /// Lets calls under way end, for a moment. Mounts stay: containers run on them.
    pub(crate) async fn stop(self) {
        drop(self.stopping);
        let mut serving = self.serving;
        if tokio::time::timeout(SHUTDOWN_GRACE, &mut serving)
            .await
            .is_err()
        {
            tracing::info!("calls to the snapshotter are cut");
            serving.abort();
        }
    }
}

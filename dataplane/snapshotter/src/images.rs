//! Which image a lazy layer belongs to, asked of containerd itself.
//!
//! CRI says it in the layer's labels; `ctr` and others do not. But containerd's content store has the
//! image's manifest by then, and its labels name the repository that it came from
//! (`containerd.io/distribution.source.HOST`) and the blobs that it refers to (`containerd.io/gc.ref.*`).

use std::path::PathBuf;
use std::time::Duration;

use hyper_util::rt::TokioIo;
use pantala_wire::BlobDigest;
use pantala_wire::name::{RepositoryName, is_host};
use tokio::net::UnixStream;
use tonic::transport::{Endpoint, Uri};
use tonic::{Request, Status};

use crate::core::{ImageSource, Labels};
use crate::proto::content::content_client::ContentClient;
use crate::proto::content::{Info, ListContentRequest};
use crate::snapshotter::Call;

/// The answer comes from a database on the same machine; a container's start waits for it.
const ASK_MAX: Duration = Duration::from_secs(5);
/// Layers of a manifest that are looked at: as many as an image may have devices and layers.
const LAYERS_MAX: usize = 128;
/// Entries of an answer that are read: a blob is in few manifests.
const INFOS_MAX: usize = 1_000;
const SOURCE: &str = "containerd.io/distribution.source.";

/// Asks a containerd.
#[derive(Debug, Clone)]
pub struct ImageFinder {
    socket: PathBuf,
}

impl ImageFinder {
    /// Asks the containerd that listens on `socket`.
    pub const fn new(socket: PathBuf) -> Self {
        Self { socket }
    }

    /// The repository of an image that has the layer `digest`.
    pub(crate) async fn of_layer(&self, call: &Call, digest: BlobDigest) -> Option<ImageSource> {
        // The label's name ends in the layer's place in the manifest.
        let filters = (0..LAYERS_MAX)
            .map(|place| format!("labels.\"containerd.io/gc.ref.content.l.{place}\"=={digest}"))
            .collect();
        source(&self.list(call, filters).await)
    }

    /// The repository of an image whose last layer has the chain ID `target`.
    pub(crate) async fn of_chain(&self, call: &Call, target: &str) -> Option<ImageSource> {
        let target: BlobDigest = target.parse().ok()?;
        let snapshotter = &call.snapshotter;
        let of_config = format!("labels.\"containerd.io/gc.ref.snapshot.{snapshotter}\"=={target}");
        let configs = self.list(call, vec![of_config]).await;
        let of_manifests = configs
            .iter()
            .filter_map(|config| config.digest.parse::<BlobDigest>().ok())
            .map(|config| format!("labels.\"containerd.io/gc.ref.content.config\"=={config}"))
            .collect::<Vec<_>>();
        if of_manifests.is_empty() {
            return None;
        }
        source(&self.list(call, of_manifests).await)
    }

    async fn list(&self, call: &Call, filters: Vec<String>) -> Vec<Info> {
        let answer = tokio::time::timeout(ASK_MAX, self.try_list(call, filters)).await;
        let why = match answer {
            Ok(Ok(infos)) => return infos,
            Ok(Err(status)) => status.message().to_owned(),
            Err(_) => format!("no answer within {ASK_MAX:?}"),
        };
        tracing::warn!(
            socket = %self.socket.display(), why,
            "containerd does not say which image a lazy layer belongs to"
        );
        Vec::new()
    }

    async fn try_list(&self, call: &Call, filters: Vec<String>) -> Result<Vec<Info>, Status> {
        let unavailable = |error: &dyn std::fmt::Display| Status::unavailable(error.to_string());
        let socket = self.socket.clone();
        let connect = move |_: Uri| {
            let socket = socket.clone();
            async move { UnixStream::connect(socket).await.map(TokioIo::new) }
        };
        // The address is a formality: the connector knows the way.
        let channel = Endpoint::from_static("http://containerd")
            .connect_with_connector(tower::service_fn(connect))
            .await
            .map_err(|error| unavailable(&error))?;
        let mut request = Request::new(ListContentRequest { filters });
        let namespace = call
            .namespace
            .parse()
            .map_err(|error| unavailable(&error))?;
        request
            .metadata_mut()
            .insert("containerd-namespace", namespace);
        let mut answers = ContentClient::new(channel)
            .list(request)
            .await?
            .into_inner();
        let mut infos = Vec::new();
        while let Some(answer) = answers.message().await? {
            infos.extend(answer.info);
            if infos.len() >= INFOS_MAX {
                break;
            }
        }
        Ok(infos)
    }
}

/// The first repository that one of these came from.
fn source(infos: &[Info]) -> Option<ImageSource> {
    infos.iter().find_map(|info| {
        let labels: Labels = info.labels.clone().into_iter().collect();
        labels.iter().find_map(|(label, repositories)| {
            let registry = label.strip_prefix(SOURCE).filter(|host| is_host(host))?;
            let repository: RepositoryName = repositories.split(',').next()?.parse().ok()?;
            Some(ImageSource {
                registry: registry.to_owned(),
                repository: repository.as_str().to_owned(),
            })
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn info(labels: &[(&str, &str)]) -> Info {
        Info {
            labels: labels
                .iter()
                .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
                .collect(),
            ..Info::default()
        }
    }

    #[test]
    fn the_repository_stands_in_the_label_that_containerd_sets() {
        let infos = [
            info(&[("containerd.io/gc.ref.content.l.0", "sha256:x")]),
            info(&[(
                "containerd.io/distribution.source.r.test:5000",
                "team/app,team/copy",
            )]),
        ];
        let image = source(&infos).unwrap();
        assert_eq!(
            (image.registry.as_str(), image.repository.as_str()),
            ("r.test:5000", "team/app")
        );
    }

    #[test]
    fn what_is_no_repository_is_not_taken_for_one() {
        for (label, value) in [
            ("containerd.io/distribution.source.", "team/app"),
            ("containerd.io/distribution.source.r.test", "../etc"),
            ("containerd.io/distribution.source.a b", "team/app"),
        ] {
            assert_eq!(source(&[info(&[(label, value)])]), None, "{label}");
        }
    }
}

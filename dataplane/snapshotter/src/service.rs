//! The gRPC service: containerd's messages in, the snapshotter's answers out.

use std::collections::HashMap;
use std::pin::Pin;

use futures_util::{Stream, stream};
use prost_types::Timestamp;
use tonic::{Code, Request, Response, Status};

use crate::core::{Filter, Kind, Labels, Mount, Snapshot, TreeError};
use crate::error::Error;
use crate::lazy::LazyError;
use crate::proto::snapshots as wire;
use crate::proto::types;
use crate::snapshotter::{Call, Snapshotter};

/// Snapshots of one message of a list: with labels at their largest, such a message is far below the
/// 16 MiB that containerd takes, and as many are what containerd itself sends.
const LIST_BATCH: usize = 30;

pub(crate) struct Service {
    snapshotter: Snapshotter,
}

impl Service {
    pub(crate) const fn new(snapshotter: Snapshotter) -> Self {
        Self { snapshotter }
    }

    async fn create(
        &self,
        call: Call,
        kind: Kind,
        key: String,
        parent: String,
        labels: HashMap<String, String>,
    ) -> Result<Vec<types::Mount>, Status> {
        let snapshotter = self.snapshotter.clone();
        let labels = labels.into_iter().collect();
        let mounts = finished(async move {
            let parent = (!parent.is_empty()).then_some(parent.as_str());
            snapshotter.create(&call, kind, &key, parent, labels).await
        });
        Ok(mounts.await?.into_iter().map(mount).collect())
    }
}

/// Runs `work` to its end even where the client goes away: a call that is dropped in the middle would
/// leave the disk and the tree apart.
async fn finished<T: Send + 'static>(
    work: impl Future<Output = Result<T, Error>> + Send + 'static,
) -> Result<T, Status> {
    match tokio::spawn(work).await {
        Ok(result) => result.map_err(|error| status(&error)),
        Err(error) => Err(status(&Error::Unfinished(error.to_string()))),
    }
}

type Infos = Pin<Box<dyn Stream<Item = Result<wire::ListSnapshotsResponse, Status>> + Send>>;

#[tonic::async_trait]
impl wire::snapshots_server::Snapshots for Service {
    async fn prepare(
        &self,
        request: Request<wire::PrepareSnapshotRequest>,
    ) -> Result<Response<wire::PrepareSnapshotResponse>, Status> {
        let header = namespace_header(&request);
        let message = request.into_inner();
        let call = Call {
            namespace: header.unwrap_or_else(|| namespace_of(&message.key)),
            snapshotter: message.snapshotter,
        };
        let (key, parent) = (message.key, message.parent);
        let mounts = self.create(call, Kind::Active, key, parent, message.labels);
        let mounts = mounts.await?;
        Ok(Response::new(wire::PrepareSnapshotResponse { mounts }))
    }

    async fn view(
        &self,
        request: Request<wire::ViewSnapshotRequest>,
    ) -> Result<Response<wire::ViewSnapshotResponse>, Status> {
        let header = namespace_header(&request);
        let message = request.into_inner();
        let call = Call {
            namespace: header.unwrap_or_else(|| namespace_of(&message.key)),
            snapshotter: message.snapshotter,
        };
        let (key, parent) = (message.key, message.parent);
        let mounts = self.create(call, Kind::View, key, parent, message.labels);
        let mounts = mounts.await?;
        Ok(Response::new(wire::ViewSnapshotResponse { mounts }))
    }

    async fn mounts(
        &self,
        request: Request<wire::MountsRequest>,
    ) -> Result<Response<wire::MountsResponse>, Status> {
        let header = namespace_header(&request);
        let message = request.into_inner();
        let call = Call {
            namespace: header.unwrap_or_else(|| namespace_of(&message.key)),
            snapshotter: message.snapshotter,
        };
        let snapshotter = self.snapshotter.clone();
        let mounts = finished(async move { snapshotter.mounts(&call, &message.key).await }).await?;
        let mounts = mounts.into_iter().map(mount).collect();
        Ok(Response::new(wire::MountsResponse { mounts }))
    }

    async fn commit(
        &self,
        request: Request<wire::CommitSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let message = request.into_inner();
        let snapshotter = self.snapshotter.clone();
        let labels = message.labels.into_iter().collect();
        finished(async move {
            snapshotter
                .commit(&message.name, &message.key, labels)
                .await
        })
        .await?;
        Ok(Response::new(()))
    }

    async fn remove(
        &self,
        request: Request<wire::RemoveSnapshotRequest>,
    ) -> Result<Response<()>, Status> {
        let message = request.into_inner();
        let snapshotter = self.snapshotter.clone();
        finished(async move { snapshotter.remove(&message.key).await }).await?;
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<wire::StatSnapshotRequest>,
    ) -> Result<Response<wire::StatSnapshotResponse>, Status> {
        let message = request.into_inner();
        let snapshot = self.snapshotter.stat(&message.key);
        let snapshot = snapshot.map_err(|error| status(&error))?;
        Ok(Response::new(wire::StatSnapshotResponse {
            info: Some(info(snapshot)),
        }))
    }

    async fn update(
        &self,
        request: Request<wire::UpdateSnapshotRequest>,
    ) -> Result<Response<wire::UpdateSnapshotResponse>, Status> {
        let message = request.into_inner();
        let wanted = message
            .info
            .ok_or_else(|| Status::invalid_argument("an update without the snapshot's name"))?;
        let paths = message
            .update_mask
            .map(|mask| mask.paths)
            .unwrap_or_default();
        let labels: Labels = wanted.labels.into_iter().collect();
        let snapshotter = self.snapshotter.clone();
        let updated =
            finished(async move { snapshotter.update(&wanted.name, labels, &paths).await }).await?;
        Ok(Response::new(wire::UpdateSnapshotResponse {
            info: Some(info(updated)),
        }))
    }

    type ListStream = Infos;

    async fn list(
        &self,
        request: Request<wire::ListSnapshotsRequest>,
    ) -> Result<Response<Infos>, Status> {
        let filters = request.into_inner().filters;
        let filter = Filter::parse(&filters).map_err(|error| status(&Error::Filter(error)))?;
        let snapshots = self.snapshotter.list(&filter);
        let mut infos = snapshots.into_iter().map(info);
        let batches = std::iter::from_fn(move || {
            let info: Vec<_> = infos.by_ref().take(LIST_BATCH).collect();
            (!info.is_empty()).then_some(Ok(wire::ListSnapshotsResponse { info }))
        });
        Ok(Response::new(Box::pin(stream::iter(batches))))
    }

    async fn usage(
        &self,
        request: Request<wire::UsageRequest>,
    ) -> Result<Response<wire::UsageResponse>, Status> {
        let message = request.into_inner();
        let usage = self.snapshotter.usage(&message.key).await;
        let usage = usage.map_err(|error| status(&error))?;
        Ok(Response::new(wire::UsageResponse {
            size: i64::try_from(usage.size_bytes).unwrap_or(i64::MAX),
            inodes: i64::try_from(usage.inodes).unwrap_or(i64::MAX),
        }))
    }

    async fn cleanup(
        &self,
        _request: Request<wire::CleanupRequest>,
    ) -> Result<Response<()>, Status> {
        let snapshotter = self.snapshotter.clone();
        finished(async move { snapshotter.cleanup().await }).await?;
        Ok(Response::new(()))
    }
}

/// The namespace of containerd's caller, which containerd sends on for CRI only.
fn namespace_header<T>(request: &Request<T>) -> Option<String> {
    let value = request.metadata().get("containerd-namespace")?;
    Some(value.to_str().ok()?.to_owned())
}

/// The same from a key: containerd makes them of the namespace, a number and its caller's key.
fn namespace_of(key: &str) -> String {
    key.split('/').next().unwrap_or_default().to_owned()
}

/// containerd acts on the code: `AlreadyExists` ends the download of a layer.
fn status(error: &Error) -> Status {
    let code = match error {
        Error::Tree(error) => match error {
            TreeError::NotFound(_) => Code::NotFound,
            TreeError::AlreadyExists(_) => Code::AlreadyExists,
            TreeError::FailedPrecondition { .. } => Code::FailedPrecondition,
            TreeError::InvalidArgument(_) => Code::InvalidArgument,
            TreeError::Full => Code::ResourceExhausted,
        },
        Error::Filter(_) | Error::Layer(_) => Code::InvalidArgument,
        Error::NoLazyMounts(_) => Code::FailedPrecondition,
        Error::Lazy {
            source: LazyError::Unavailable(_),
            ..
        } => Code::Unavailable,
        Error::Lazy { .. } => Code::FailedPrecondition,
        Error::Disk(_) | Error::Unfinished(_) => {
            tracing::error!(%error, "a call failed");
            Code::Internal
        }
    };
    Status::new(code, error.to_string())
}

fn mount(mount: Mount) -> types::Mount {
    types::Mount {
        r#type: mount.kind.to_owned(),
        source: mount.source,
        target: String::new(),
        options: mount.options,
    }
}

fn info(snapshot: Snapshot) -> wire::Info {
    let kind = match snapshot.kind {
        Kind::View => wire::Kind::View,
        Kind::Active => wire::Kind::Active,
        Kind::Committed => wire::Kind::Committed,
    };
    wire::Info {
        name: snapshot.name,
        parent: snapshot.parent.unwrap_or_default(),
        kind: kind.into(),
        created_at: Some(timestamp(snapshot.created_unix_ns)),
        updated_at: Some(timestamp(snapshot.updated_unix_ns)),
        labels: snapshot.labels.into_iter().collect(),
    }
}

fn timestamp(unix_ns: u64) -> Timestamp {
    const SECOND_NS: u64 = 1_000_000_000;
    Timestamp {
        seconds: i64::try_from(unix_ns / SECOND_NS).unwrap_or(i64::MAX),
        nanos: i32::try_from(unix_ns % SECOND_NS).unwrap_or(0),
    }
}

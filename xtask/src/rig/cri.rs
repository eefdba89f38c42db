//! Kubernetes' side of containerd: the one call of CRI that pulls an image.

use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::codegen::http::uri::PathAndQuery;
use tonic::transport::{Endpoint, Uri};

/// containerd's namespace for what comes through CRI.
pub(crate) const NAMESPACE: &str = "k8s.io";

/// `runtime.v1.ImageSpec`, as far as it is needed.
#[derive(Clone, PartialEq, prost::Message)]
struct ImageSpec {
    #[prost(string, tag = "1")]
    image: String,
}

/// `runtime.v1.PullImageRequest`, as far as it is needed.
#[derive(Clone, PartialEq, prost::Message)]
struct PullImageRequest {
    #[prost(message, optional, tag = "1")]
    image: Option<ImageSpec>,
}

/// `runtime.v1.PullImageResponse`.
#[derive(Clone, PartialEq, prost::Message)]
struct PullImageResponse {
    #[prost(string, tag = "1")]
    image_ref: String,
}

/// Has the containerd on `socket` pull `image`.
pub(crate) async fn pull(socket: &Path, image: &str, limit: Duration) -> Result<()> {
    let work = async {
        let to = socket.to_owned();
        let connect = tower::service_fn(move |_: Uri| {
            let to = to.clone();
            async move { UnixStream::connect(to).await.map(TokioIo::new) }
        });
        // The address is a formality: the connector knows the way.
        let channel = Endpoint::from_static("http://containerd")
            .connect_with_connector(connect)
            .await?;
        let mut client = tonic::client::Grpc::new(channel);
        client.ready().await?;
        let request = PullImageRequest {
            image: Some(ImageSpec {
                image: image.to_owned(),
            }),
        };
        let path = PathAndQuery::from_static("/runtime.v1.ImageService/PullImage");
        let codec = tonic_prost::ProstCodec::<_, PullImageResponse>::default();
        client
            .unary(tonic::Request::new(request), path, codec)
            .await?;
        anyhow::Ok(())
    };
    tokio::time::timeout(limit, work)
        .await
        .with_context(|| format!("no end of the pull within {limit:?}"))?
        .with_context(|| format!("pulling {image} through CRI"))
}

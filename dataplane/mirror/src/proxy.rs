//! What is passed to the registry and back as it is.

use std::sync::Arc;

use http::{HeaderMap, Method, Response};
use tokio::time::{Instant, timeout_at};

use crate::backend::{Backend, UpstreamReply, UpstreamRequest};
use crate::reply::{Payload, Reject, pass_on};
use crate::request::Ask;
use crate::service::Shared;

/// The request as it is, and the reply as it is, but for what ends at this hop.
pub(crate) async fn pass<B: Backend>(
    shared: &Arc<Shared<B>>,
    ask: &Ask,
) -> Result<Response<Payload>, Reject> {
    let headers = ask.headers.clone();
    let reply = exchange(shared, ask, ask.method(), headers, ask.deadline).await?;
    pass_on(reply, ask.is_head)
}

/// One request to the registry, its reply's head due by `deadline`.
pub(crate) async fn exchange<B: Backend>(
    shared: &Arc<Shared<B>>,
    ask: &Ask,
    method: Method,
    headers: HeaderMap,
    deadline: Instant,
) -> Result<UpstreamReply, Reject> {
    let request = UpstreamRequest {
        upstream: ask.upstream.clone(),
        method,
        path_and_query: ask.path_and_query.clone(),
        headers,
    };
    match timeout_at(deadline, shared.backend.exchange(request)).await {
        Ok(Ok(reply)) => Ok(reply),
        Ok(Err(error)) => Err(error.into()),
        Err(_) => Err(Reject::late(
            "the registry did not answer",
            shared.config.first_byte_timeout,
        )),
    }
}

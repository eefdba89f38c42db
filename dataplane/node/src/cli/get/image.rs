//! An image: its manifest, its blobs, and the layout that they make.

use std::net::SocketAddr;
use std::sync::Arc;

use pantala_source::{Credential, Source, Upstream};
use pantala_wire::BlobDigest;
use pantala_wire::name::{ImageReference, ManifestReference};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use super::super::args::GetArgs;
use super::super::failure::Failure;
use super::super::http;
use super::layout::Layout;
use super::manifest::{self, BlobName, Manifest, ManifestError, Platform};
use super::origins::Snapshot;
use super::progress::Progress;
use super::way::Way;
use super::{Done, auth, blob, partial_path};
use crate::config::Config;

pub(super) async fn get(
    args: &GetArgs,
    config: &Config,
    source: &Source,
    login: Option<Credential>,
) -> Result<Done, Failure> {
    let image: ImageReference = args.what.parse().map_err(|e| {
        Failure::usage(format!("{:?} is not an image reference: {e}", args.what))
            .hint("write HOST/REPOSITORY:TAG, or an address with http:// or https://")
    })?;
    let platform = match &args.platform {
        Some(text) => text.parse().map_err(|e: String| {
            Failure::usage(e).hint("write it as linux/amd64 or linux/arm/v7")
        })?,
        None => Platform::own(),
    };
    let credential = match login {
        Some(login) => login,
        None => auth::stored(
            args.auth_file.as_deref(),
            &image.registry,
            image.repository.as_str(),
        )?,
    };
    let (node, direct_because) = find_node(args, config).await?;
    let way = Way {
        source: source.clone(),
        upstream: match node {
            Some(node) => Way::mirror(node)?,
            None => upstream(args, config, &image)?,
        },
        ns: node.map(|_| image.registry.clone()),
        repository: image.repository.clone(),
        credential,
    };
    let before = snapshot(config, node).await;
    let (body, kind, blobs) = resolve(&way, &image.reference, args.digest, &platform).await?;
    let bytes: u64 = blobs
        .iter()
        .try_fold(body.len() as u64, |sum, blob| sum.checked_add(blob.size))
        .ok_or_else(|| Failure::new("the manifest names impossible sizes"))?;
    let layout = Layout::open(partial_path(&args.output))?;
    fetch_all(&way, &blobs, &layout, args).await?;
    let digest = layout.complete(&body, &kind, &image.reference, &blobs)?;
    layout.publish(&args.output)?;
    let after = snapshot(config, node).await;
    Ok(Done {
        what: image.to_string(),
        digest: digest.to_string(),
        platform: Some(platform.to_string()),
        path: args.output.clone(),
        bytes,
        node: node.map(|node| node.to_string()),
        origins: before
            .zip(after)
            .map(|(before, after)| after.since(&before, &blobs)),
        direct_because,
    })
}

async fn snapshot(config: &Config, node: Option<SocketAddr>) -> Option<Snapshot> {
    Snapshot::take(config.admin.listen, node?).await
}

/// The node to ask, or why none is asked.
async fn find_node(
    args: &GetArgs,
    config: &Config,
) -> Result<(Option<SocketAddr>, Option<String>), Failure> {
    if args.no_node {
        return Ok((None, Some("--no-node was given".into())));
    }
    if args.plain_http {
        return Ok((None, Some("--plain-http was given".into())));
    }
    let node = args.node.unwrap_or(config.mirror.listen);
    if config.mirror.tls.is_some() && args.node.is_none() {
        return Ok((None, Some("the node's mirror speaks TLS only".into())));
    }
    match (http::get(node, "/healthy").await, args.node) {
        (Ok(_), _) => Ok((Some(node), None)),
        (Err(_), None) => Ok((None, Some(format!("no node answers at {node}")))),
        (Err(_), Some(_)) => Err(Failure::new(format!("no node answers at {node}"))
            .hint("give the address of its mirror, or leave --node out to go to the registry")),
    }
}

fn upstream(args: &GetArgs, config: &Config, image: &ImageReference) -> Result<Upstream, Failure> {
    let host = &image.registry;
    let text = match (args.plain_http, config.registry_url(host)) {
        (true, _) => format!("http://{host}"),
        (false, Some(url)) => url.to_string(),
        (false, None) => host.clone(),
    };
    text.parse()
        .map_err(|e| Failure::usage(format!("{host} cannot be asked: {e}")))
}

/// The image's manifest with its kind and blobs, by way of an index where there is one.
async fn resolve(
    way: &Way,
    reference: &ManifestReference,
    pinned: Option<BlobDigest>,
    platform: &Platform,
) -> Result<(bytes::Bytes, String, Vec<BlobName>), Failure> {
    let unusable = |e: ManifestError| match e {
        ManifestError::Platform { .. } => {
            Failure::new(e.to_string()).hint("choose one of them with --platform")
        }
        _ => Failure::new(e.to_string()),
    };
    let raw = way.manifest(reference).await?;
    let wanted = match reference {
        ManifestReference::Digest(digest) => Some(*digest),
        // The registry's own word, if it gives one: it finds a broken transfer.
        ManifestReference::Tag(_) => pinned.or(raw.announced),
    };
    let digest = manifest::digest_of(&raw.body, wanted).map_err(unusable)?;
    if pinned.is_some_and(|pinned| pinned != digest) {
        return Err(Failure::usage(
            "--digest is another than that of the reference",
        ));
    }
    match manifest::parse(&raw.body, &raw.content_type, platform).map_err(unusable)? {
        Manifest::Image { kind, blobs } => Ok((raw.body, kind, blobs)),
        Manifest::Index(chosen) => {
            let raw = way.manifest(&ManifestReference::Digest(chosen)).await?;
            manifest::digest_of(&raw.body, Some(chosen)).map_err(unusable)?;
            match manifest::parse(&raw.body, &raw.content_type, platform).map_err(unusable)? {
                Manifest::Image { kind, blobs } => Ok((raw.body, kind, blobs)),
                Manifest::Index(_) => Err(Failure::new(
                    "the index names another index, which is not supported",
                )
                .hint("give the digest of the inner index")),
            }
        }
    }
}

/// Fetches the blobs, a few at a time; the first failure ends all.
async fn fetch_all(
    way: &Way,
    blobs: &[BlobName],
    layout: &Layout,
    args: &GetArgs,
) -> Result<(), Failure> {
    let total = blobs.iter().map(|blob| blob.size).sum();
    let progress = Progress::new(&args.what, Some(total), !args.json);
    let turns = Arc::new(Semaphore::new(blob::TRANSFERS_MAX));
    let mut running = JoinSet::new();
    for blob in blobs {
        let (way, blob, progress) = (way.clone(), blob.clone(), progress.clone());
        let (path, turns) = (layout.blob(&blob.digest), Arc::clone(&turns));
        running.spawn(async move {
            // The semaphore is never closed, so a turn always comes.
            let _turn = turns.acquire().await;
            blob::fetch(&way, &blob, &path, &progress).await
        });
    }
    while let Some(result) = running.join_next().await {
        // Dropping the rest of the set cancels it.
        result.map_err(|e| Failure::new(format!("a transfer ended unexpectedly: {e}")))??;
    }
    progress.finish();
    Ok(())
}

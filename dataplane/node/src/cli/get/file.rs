//! A plain file at an http(s) address, straight from its source.

use std::path::Path;

use futures_util::StreamExt;
use futures_util::stream::BoxStream;
use http::HeaderMap;
use pantala_source::{Credential, Source, SourceError};
use pantala_wire::{BlobDigest, ByteRange};
use url::Url;

use super::super::args::GetArgs;
use super::super::failure::{Failure, about_file};
use super::blob::Growing;
use super::progress::Progress;
use super::{Done, about_source, partial_path};

pub(super) async fn get(
    args: &GetArgs,
    source: &Source,
    login: Option<Credential>,
) -> Result<Done, Failure> {
    let url = Url::parse(&args.what)
        .map_err(|e| Failure::usage(format!("this is not an address: {e}")))?;
    if !matches!(url.scheme(), "http" | "https") {
        return Err(
            Failure::usage(format!("{}:// is not supported", url.scheme()))
                .hint("give an http or https address, or an image reference"),
        );
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err(Failure::usage("the address holds a user or password")
            .hint("give --user and --password-stdin: addresses show in logs"));
    }
    let credential = login.unwrap_or(Credential::ANONYMOUS);
    let partial = partial_path(&args.output);
    let result = fetch(args, source, &url, &credential, &partial).await;
    let (digest, bytes) = match result {
        Ok(done) => done,
        Err(failure) => {
            // Without a digest nobody could tell later whether the rest belongs to this part.
            if args.digest.is_none() {
                let _ = std::fs::remove_file(&partial);
            }
            return Err(failure);
        }
    };
    std::fs::rename(&partial, &args.output).map_err(|e| about_file("create", &args.output, &e))?;
    Ok(Done {
        what: shown(&url),
        digest: digest.to_string(),
        platform: None,
        path: args.output.clone(),
        bytes,
        node: None,
        origins: None,
        direct_because: Some("plain addresses are not mirrored".into()),
    })
}

/// The address without its query: signed addresses carry secrets there.
fn shown(url: &Url) -> String {
    let mut url = url.clone();
    url.set_query(None);
    url.set_fragment(None);
    url.to_string()
}

async fn fetch(
    args: &GetArgs,
    source: &Source,
    url: &Url,
    credential: &Credential,
    partial: &Path,
) -> Result<(BlobDigest, u64), Failure> {
    let doing = format!("read {}", shown(url));
    let fail = |e: SourceError| about_source(&doing, &e, credential);
    let info = source.probe_url(url, credential).await.map_err(fail)?;
    let mut file = Growing::open(partial, info.size.unwrap_or(0))?;
    if args.digest.is_none() {
        file.restart()?;
    }
    let resumed = file.len;
    let progress = Progress::new(&shown(url), info.size, !args.json);
    progress.add(file.len);
    let stream: BoxStream<'_, Result<bytes::Bytes, SourceError>> = match info.size {
        Some(size) => match ByteRange::new(file.len, size) {
            Some(range) => source
                .fetch_url(url, &info, range, credential)
                .await
                .map_err(fail)?
                .boxed(),
            None => futures_util::stream::empty().boxed(),
        },
        None => {
            let reply = source
                .open_url(url, HeaderMap::new(), credential)
                .await
                .map_err(fail)?;
            if !reply.status.is_success() {
                return Err(Failure::new(format!(
                    "cannot {doing}: status {}",
                    reply.status
                )));
            }
            reply.into_stream().boxed()
        }
    };
    futures_util::pin_mut!(stream);
    while let Some(item) = stream.next().await {
        let bytes = item.map_err(fail)?;
        file.write(&bytes)?;
        progress.add(bytes.len() as u64);
    }
    progress.finish();
    let bytes = file.len;
    let digest = file.finish()?;
    match args.digest {
        Some(wanted) if wanted != digest => {
            std::fs::remove_file(partial).map_err(|e| about_file("remove", partial, &e))?;
            let failure = Failure::new(format!(
                "{} has the digest {digest}, not {wanted}",
                shown(url)
            ));
            Err(match resumed {
                0 => failure.hint("the file is not the one expected; nothing was kept"),
                _ => failure.hint("run the command again: a part of an earlier run was dropped"),
            })
        }
        _ => Ok((digest, bytes)),
    }
}

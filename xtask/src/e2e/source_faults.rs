//! The fault table, origin's side: what a registry can do wrong, and what clients then see.
//!
//! Each row says for how many requests the registry misbehaves, and what a client must get: the
//! right bytes where the registry recovers, else an error in bounded time; never wrong bytes.

use std::time::Duration;

use anyhow::{Result, ensure};

use super::stage::{Cluster, PULL_MAX, REPOSITORY};
use super::{Outcome, Stage, Test, test};
use crate::rig::containerd::REGISTRY_NAME;
use crate::rig::http::{self, Download};
use crate::rig::proxy::{Fault, Rule, Target};

/// Size of the image: its largest layer has a dozen of pieces.
const IMAGE_MB: u64 = 24;
/// nydusd gives up after 5 s; answers must come before.
const ANSWER_MAX: Duration = Duration::from_secs(5);
/// Once there is no good source, a client must not wait longer than this for the end.
const GIVE_UP_MAX: Duration = Duration::from_secs(60);

/// What the client must see.
#[derive(Clone, Copy)]
enum Expected {
    /// The blob.
    Right,
    /// The blob, or a body that is cut and the blob when it is asked for again: what comes from a
    /// registry streams on before the sha256 of the whole can be known.
    RightOnRetry,
    /// An error status within [`ANSWER_MAX`].
    Refused(&'static [u16]),
    /// An error status, or a body that is cut; either within [`GIVE_UP_MAX`].
    NoSuccess,
}

struct Row {
    rule: Rule,
    expected: Expected,
}

fn row(fault: Fault, times: u32, expected: Expected) -> Row {
    Row {
        rule: Rule {
            target: Target::Blob,
            fault,
            times,
        },
        expected,
    }
}

/// A test of one row, whose fault is an expression without captures.
macro_rules! row_test {
    ($name:literal, $fault:expr, $times:expr, $expected:expr) => {
        test!(concat!("registry faults: ", $name), |stage| play(
            stage,
            row($fault, $times, $expected)
        ))
    };
}

/// For good.
const ALWAYS: u32 = u32::MAX;

pub(super) fn tests() -> Vec<Test> {
    use Expected::{NoSuccess, Refused, Right, RightOnRetry};
    vec![
        test!(
            "registry faults: refuses connections, then accepts them",
            refuses
        ),
        row_test!("hangs up twice", Fault::HangUp, 2, Right),
        row_test!(
            "hangs up always",
            Fault::HangUp,
            ALWAYS,
            Refused(&[500, 502, 503, 504])
        ),
        row_test!("404", Fault::Status(404, None), ALWAYS, Refused(&[404])),
        row_test!(
            "429 twice with Retry-After",
            Fault::Status(429, Some(1)),
            2,
            Right
        ),
        row_test!(
            "429 always",
            Fault::Status(429, Some(1)),
            ALWAYS,
            Refused(&[429, 502, 503, 504])
        ),
        row_test!(
            "503 twice with Retry-After",
            Fault::Status(503, Some(1)),
            2,
            Right
        ),
        row_test!("500 twice", Fault::Status(500, None), 2, Right),
        row_test!(
            "500 always",
            Fault::Status(500, None),
            ALWAYS,
            Refused(&[500, 502, 503, 504])
        ),
        row_test!(
            "never answers",
            Fault::Silent,
            ALWAYS,
            Refused(&[500, 502, 503, 504])
        ),
        row_test!(
            "cuts every body after 1.5 MB",
            Fault::CutAfter(1_500_000),
            ALWAYS,
            Right
        ),
        row_test!(
            "cuts every body at once",
            Fault::CutAfter(0),
            ALWAYS,
            NoSuccess
        ),
        row_test!(
            "stalls twice in the middle",
            Fault::StallAfter(700_000),
            2,
            Right
        ),
        row_test!("corrupts some answers", Fault::Corrupt, 3, RightOnRetry),
        row_test!("corrupts every answer", Fault::Corrupt, ALWAYS, NoSuccess),
        row_test!("ignores Range", Fault::IgnoreRange, ALWAYS, Right),
        test!(
            "registry faults: two nodes pull while it fails one request in three",
            two_nodes
        ),
        test!(
            "registry faults: manifests: 404 and 500 reach the client, recovery too",
            manifests
        ),
    ]
}

async fn play(stage: &Stage, row: Row) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let blob = image.largest();
    let mut cluster = stage
        .cluster_with(1, &image, |spec| {
            spec.with("source", "stall_timeout_ms = 2000")
        })
        .await?;
    cluster.proxy.set_rules(vec![row.rule.clone()]);
    let download = cluster.get(0, blob).await?;
    check(&row, &download, &blob.digest)?;
    if !matches!(row.expected, Expected::Right) {
        // Nothing may be poisoned: once the registry is well again, the blob arrives.
        cluster.proxy.set_rules(Vec::new());
        recovers(&cluster, blob).await?;
    }
    ensure!(
        cluster.nodes[0].process().is_running(),
        "the node has ended"
    );
    Ok(Outcome::Passed)
}

fn check(row: &Row, download: &Download, digest: &str) -> Result<()> {
    let what = download.summary();
    match row.expected {
        Expected::Right => ensure!(
            download.is(digest),
            "the right bytes did not arrive: {what}"
        ),
        Expected::RightOnRetry => ensure!(
            download.is(digest) || download.cut.is_some() || download.status >= 500,
            "neither the blob nor a visible failure: {what}"
        ),
        Expected::Refused(statuses) => {
            ensure!(
                statuses.contains(&download.status),
                "expected one of {statuses:?}: {what}"
            );
            ensure!(
                download.first_byte < ANSWER_MAX,
                "the answer came too late: {what}"
            );
        }
        Expected::NoSuccess => {
            ensure!(
                download.status >= 400 || download.cut.is_some(),
                "this looks like a success to a client: {what}"
            );
            ensure!(download.took < GIVE_UP_MAX, "it took too long: {what}");
        }
    }
    Ok(())
}

/// The registry is well again: the blob arrives, at once or after a short back-off.
async fn recovers(cluster: &Cluster, blob: &crate::rig::image::BlobFile) -> Result<()> {
    let start = std::time::Instant::now();
    loop {
        let download = cluster.get(0, blob).await?;
        if download.is(&blob.digest) {
            return Ok(());
        }
        ensure!(
            start.elapsed() < GIVE_UP_MAX,
            "the registry is well again, and the node does not notice: {}",
            download.summary()
        );
        tokio::time::sleep(Duration::from_millis(500)).await;
    }
}

async fn refuses(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let blob = image.largest();
    let mut cluster = stage.cluster(1, &image).await?;
    cluster.proxy.refuse(true)?;
    let download = cluster.get(0, blob).await?;
    let what = download.summary();
    ensure!(
        (500..600).contains(&download.status),
        "expected a 5xx: {what}"
    );
    ensure!(
        download.first_byte < ANSWER_MAX,
        "the answer came too late: {what}"
    );
    cluster.proxy.refuse(false)?;
    recovers(&cluster, blob).await?;
    Ok(Outcome::Passed)
}

async fn two_nodes(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let cluster = stage.cluster(2, &image).await?;
    cluster.proxy.set_rules(vec![Rule {
        target: Target::Blob,
        fault: Fault::Status(500, None),
        times: 4,
    }]);
    for layer in &image.layers {
        let (first, second) =
            tokio::join!(cluster.get_right(0, layer), cluster.get_right(1, layer));
        first?;
        second?;
    }
    Ok(Outcome::Passed)
}

async fn manifests(stage: &Stage) -> Result<Outcome> {
    let image = stage.image(IMAGE_MB)?;
    let cluster = stage.cluster(1, &image).await?;
    let url = format!(
        "{}/v2/{REPOSITORY}/manifests/v1?ns={REGISTRY_NAME}",
        cluster.nodes[0].mirror_url()
    );
    let accept = [("accept", "application/vnd.oci.image.manifest.v1+json")];
    for status in [404_u16, 500] {
        cluster.proxy.set_rules(vec![Rule::always(
            Target::Manifest,
            Fault::Status(status, None),
        )]);
        let download = http::download(&url, &accept, PULL_MAX).await?;
        let what = download.summary();
        let expected = if status == 404 { 404..405 } else { 500..600 };
        ensure!(
            expected.contains(&download.status),
            "the registry said {status}: {what}"
        );
        ensure!(
            download.first_byte < ANSWER_MAX,
            "the answer came too late: {what}"
        );
    }
    cluster.proxy.set_rules(Vec::new());
    let download = http::download(&url, &accept, PULL_MAX).await?;
    ensure!(
        download.is(&image.manifest.digest),
        "not the manifest: {}",
        download.summary()
    );
    Ok(Outcome::Passed)
}

//! The figures of a demo: as a table, and as JSON.

use std::collections::BTreeMap;

use serde::Serialize;

/// One pull on one node.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct PullFigures {
    pub(crate) name: String,
    pub(crate) seconds: f64,
    pub(crate) from_registry_bytes: u64,
    pub(crate) from_peer_bytes: u64,
    /// Bytes by the name of the peer they came from.
    pub(crate) by_peer: BTreeMap<String, u64>,
}

/// A pull that should cost the registry no blob at all.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct FreePull {
    #[serde(flatten)]
    pub(crate) pull: PullFigures,
    /// Blob bytes that the registry sent meanwhile.
    pub(crate) registry_blob_bytes: u64,
    /// Manifest bytes that the registry sent meanwhile.
    pub(crate) registry_manifest_bytes: u64,
}

/// Everything that the demo measured.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Figures {
    /// Blob bytes that the registry sent for the simultaneous pulls / bytes of the image's blobs.
    pub(crate) registry_ratio: f64,
    pub(crate) image_bytes: u64,
    pub(crate) registry_blob_bytes: u64,
    pub(crate) registry_manifest_bytes: u64,
    /// Which program pulled.
    pub(crate) client: &'static str,
    pub(crate) nodes: Vec<PullFigures>,
    pub(crate) local_hit: FreePull,
    pub(crate) late: FreePull,
}

fn megabytes(bytes: u64) -> String {
    format!("{:.1}", bytes as f64 / 1e6)
}

/// Prints the table.
pub(crate) fn print(figures: &Figures) {
    let mut names: Vec<&str> = figures
        .nodes
        .iter()
        .map(|node| node.name.as_str())
        .collect();
    names.push(&figures.late.pull.name);
    let wide = names.len() > 8;
    println!();
    print!(
        "{:<24}{:>9}{:>15}{:>12}",
        "node", "seconds", "registry, MB", "peers, MB"
    );
    if wide {
        println!();
    } else {
        for name in &names {
            print!("{:>12}", format!("<- {name}"));
        }
        println!();
    }
    let row = |label: String, pull: &PullFigures| {
        print!(
            "{label:<24}{:>9.2}{:>15}{:>12}",
            pull.seconds,
            megabytes(pull.from_registry_bytes),
            megabytes(pull.from_peer_bytes)
        );
        if !wide {
            for name in &names {
                let bytes = pull.by_peer.get(*name);
                print!(
                    "{:>12}",
                    bytes.map_or_else(|| "-".to_owned(), |bytes| megabytes(*bytes))
                );
            }
        }
        println!();
    };
    for node in &figures.nodes {
        row(node.name.clone(), node);
    }
    row(
        format!("{}, again", figures.local_hit.pull.name),
        &figures.local_hit.pull,
    );
    row(
        format!("{}, late", figures.late.pull.name),
        &figures.late.pull,
    );
    println!();
    println!(
        "image                {} MB in blobs; pulled with {}",
        megabytes(figures.image_bytes),
        figures.client
    );
    println!(
        "registry sent        {} MB of blobs and {:.1} kB of manifests, counted as HTTP bodies at the registry",
        megabytes(figures.registry_blob_bytes),
        figures.registry_manifest_bytes as f64 / 1e3
    );
    println!("registry / image     {:.4}", figures.registry_ratio);
    for (what, pull) in [
        ("the pull again", &figures.local_hit),
        ("the late node", &figures.late),
    ] {
        println!(
            "{:<21}took {} bytes of blobs and {} of manifests from the registry",
            what, pull.registry_blob_bytes, pull.registry_manifest_bytes
        );
    }
    println!(
        "every pull was verified: manifest, configuration and layers have the sha256 that was pushed"
    );
}

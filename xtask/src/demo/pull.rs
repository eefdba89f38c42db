//! One pull on one node: by containerd as root, by skopeo elsewhere.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result};

use super::report::PullFigures;
use crate::rig::containerd::{Containerd, Route};
use crate::rig::image::Image;
use crate::rig::node::Node;
use crate::rig::skopeo;
use crate::rig::status::NodeStatus;

/// A pull on a slow machine may take long; a hang must still end.
const PULL_MAX: Duration = Duration::from_secs(1800);

/// Names of nodes by their identity.
pub(crate) type Names = BTreeMap<String, String>;

/// A node with the client that pulls through it.
pub(crate) struct Station {
    pub(crate) node: Node,
    /// None where it is not root: skopeo pulls.
    containerd: Option<Containerd>,
    copies: u32,
}

impl Station {
    pub(crate) async fn set_up(node: Node, with_containerd: bool) -> Result<Self> {
        let containerd = if with_containerd {
            Some(Containerd::start(node.machine()).await?)
        } else {
            None
        };
        Ok(Self {
            node,
            containerd,
            copies: 0,
        })
    }

    /// Pulls `name` through the node and verifies what arrived; the figures are the client's time and
    /// what the node's account grew by.
    pub(crate) async fn pull(
        &mut self,
        registry: &str,
        name: &str,
        image: &Image,
        names: &Names,
    ) -> Result<PullFigures> {
        let outcome = self.pull_and_verify(registry, name, image, names).await;
        outcome.with_context(|| {
            let client = self
                .containerd
                .as_mut()
                .map(|daemon| daemon.process().log_tail());
            format!(
                "pulling on {}\n{}\n{}\n",
                self.node.name(),
                self.node.log_tail(),
                client.unwrap_or_default()
            )
        })
    }

    async fn pull_and_verify(
        &mut self,
        registry: &str,
        name: &str,
        image: &Image,
        names: &Names,
    ) -> Result<PullFigures> {
        let before = self.node.status().await?;
        let mirror = self.node.mirror_url();
        let took = if let Some(containerd) = &self.containerd {
            let route = Route {
                registry: registry.to_owned(),
                ca_file: None,
                mirror: Some(mirror),
                login: None,
            };
            containerd
                .pull(name, &route, PULL_MAX)
                .await?
                .ok("ctr images pull")?
                .took
        } else {
            self.copies += 1;
            let target = self.copy_dir();
            let machine = self.node.machine();
            let finished = skopeo::copy(
                machine,
                registry,
                Some(&mirror),
                name,
                None,
                &target,
                PULL_MAX,
            );
            finished.await?.ok("skopeo copy")?.took
        };
        self.verify(image)?;
        let after = self.node.status().await?;
        Ok(figures(self.node.name(), took, &before, &after, names))
    }

    fn copy_dir(&self) -> PathBuf {
        self.node
            .machine()
            .dir()
            .join(format!("copy-{}", self.copies))
    }

    /// Checks what the client has stored against what was pushed, byte by byte.
    fn verify(&self, image: &Image) -> Result<()> {
        match &self.containerd {
            Some(containerd) => containerd.verify(image),
            None => skopeo::verify(image, &self.copy_dir()),
        }
    }

    /// Makes the client forget the image, so that it has to ask the node again.
    pub(crate) async fn forget(&mut self, name: &str) -> Result<()> {
        match &self.containerd {
            Some(containerd) => containerd.remove(name).await,
            None => Ok(std::fs::remove_dir_all(self.copy_dir())?),
        }
    }
}

fn figures(
    name: &str,
    took: Duration,
    before: &NodeStatus,
    after: &NodeStatus,
    names: &Names,
) -> PullFigures {
    let by_peer = after.totals.by_peer.iter().map(|(peer, bytes)| {
        let earlier = before.totals.by_peer.get(peer).copied().unwrap_or_default();
        let name = names.get(peer).cloned();
        let name = name.unwrap_or_else(|| peer.chars().take(8).collect());
        (name, bytes.saturating_sub(earlier))
    });
    PullFigures {
        name: name.to_owned(),
        seconds: took.as_secs_f64(),
        from_registry_bytes: after.totals.from_registry_bytes - before.totals.from_registry_bytes,
        from_peer_bytes: after.totals.from_peer_bytes - before.totals.from_peer_bytes,
        by_peer: by_peer.filter(|(_, bytes)| *bytes > 0).collect(),
    }
}

//! What the tests share: the rig, the programs under test, images made once.

use std::cell::RefCell;
use std::collections::HashMap;
use std::path::PathBuf;
use std::rc::Rc;
use std::time::Duration;

use anyhow::{Result, ensure};

use crate::cargo::Programs;
use crate::rig::Rig;
use crate::rig::control::Control;
use crate::rig::http::Download;
use crate::rig::image::{BlobFile, Image, ImageSpec};
use crate::rig::node::{Node, NodeSpec};
use crate::rig::proxy::RegistryProxy;
use crate::rig::registry::{Access, Registry};
pub(crate) use crate::rig::serving::get;
use crate::rig::token_server::{TokenServer, User};

/// The name under which most tests push and pull.
pub(crate) const NAME: &str = "test/image:v1";
/// The repository of [`NAME`].
pub(crate) const REPOSITORY: &str = "test/image";
/// How long any pull of a small image may take, on a slow machine and with faults on the way.
pub(crate) const PULL_MAX: Duration = Duration::from_secs(120);
/// Layers of the images.
const LAYERS: usize = 3;

/// What a test is given.
pub(crate) struct Stage {
    pub(crate) rig: Rig,
    pub(crate) programs: Programs,
    /// Seed of this run.
    pub(crate) seed: u64,
    images: RefCell<HashMap<u64, Rc<Image>>>,
    images_dir: PathBuf,
}

impl Stage {
    pub(crate) fn new(rig: Rig, programs: Programs, seed: u64) -> Result<Self> {
        let images_dir = rig.scratch("images")?;
        Ok(Self {
            rig,
            programs,
            seed,
            images: RefCell::default(),
            images_dir,
        })
    }

    /// An image of `megabytes`; the same for all tests.
    pub(crate) fn image(&self, megabytes: u64) -> Result<Rc<Image>> {
        if let Some(image) = self.images.borrow().get(&megabytes) {
            return Ok(image.clone());
        }
        let spec = ImageSpec {
            bytes: megabytes * 1_000_000,
            layers: LAYERS,
            label: format!("{megabytes} MB"),
        };
        let image = Rc::new(Image::build(
            &self.images_dir.join(megabytes.to_string()),
            &spec,
        )?);
        self.images.borrow_mut().insert(megabytes, image.clone());
        Ok(image)
    }
}

/// A registry guarded in one of the four ways, with what guards it.
pub(crate) struct GuardedRegistry {
    pub(crate) registry: Registry,
    pub(crate) tokens: Option<TokenServer>,
    /// `user:password` that may do everything.
    pub(crate) login: Option<String>,
}

/// The ways in which registries are guarded in the matrix of clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Guard {
    Plain,
    Tls,
    Basic,
    Token,
}

/// Everybody's rights where tokens guard: alice may do all, bob may read `public/` only.
pub(crate) fn users() -> HashMap<&'static str, User> {
    use crate::rig::registry::{PASSWORD, USER};
    HashMap::from([
        (
            USER,
            User {
                password: PASSWORD,
                repositories: "",
                push: true,
            },
        ),
        (
            BOB,
            User {
                password: BOB_PASSWORD,
                repositories: "public/",
                push: false,
            },
        ),
    ])
}

/// The user with few rights.
pub(crate) const BOB: &str = "bob";
/// That user's password.
pub(crate) const BOB_PASSWORD: &str = "builder-9Zt1";

impl Stage {
    /// Starts a registry.
    pub(crate) async fn registry(&self, guard: Guard) -> Result<GuardedRegistry> {
        use crate::rig::registry::{PASSWORD, USER};
        let machine = self.rig.machine("registry")?;
        let mut tokens = None;
        let access = match guard {
            Guard::Plain => Access::Plain,
            Guard::Tls => Access::Tls,
            Guard::Basic => Access::Basic,
            Guard::Token => {
                let server = TokenServer::start(&machine, machine.dir(), users())?;
                let access = Access::Token {
                    realm: server.realm(),
                    bundle: server.bundle.clone(),
                };
                tokens = Some(server);
                access
            }
        };
        let login =
            matches!(guard, Guard::Basic | Guard::Token).then(|| format!("{USER}:{PASSWORD}"));
        Ok(GuardedRegistry {
            registry: Registry::start(&machine, access).await?,
            tokens,
            login,
        })
    }
}

/// Port of docker-registry behind the proxy of a [`Cluster`].
const BEHIND_PORT: u16 = 5001;
/// Port of the proxy.
const FRONT_PORT: u16 = 5000;

/// A plain registry behind a proxy that counts and misbehaves, control, and nodes.
pub(crate) struct Cluster {
    pub(crate) nodes: Vec<Node>,
    pub(crate) control: Control,
    pub(crate) proxy: RegistryProxy,
    _registry: Registry,
    spec: NodeSpec,
    program: PathBuf,
}

impl Stage {
    /// A cluster of `nodes` nodes; `image` is pushed as [`NAME`], and the counts begin after that.
    pub(crate) async fn cluster(&self, nodes: u32, image: &Image) -> Result<Cluster> {
        self.cluster_with(nodes, image, |spec| spec).await
    }

    /// The same with nodes that are told something else.
    pub(crate) async fn cluster_with(
        &self,
        nodes: u32,
        image: &Image,
        tell: impl FnOnce(NodeSpec) -> NodeSpec,
    ) -> Result<Cluster> {
        let machine = self.rig.machine("registry")?;
        let registry = Registry::start_at(&machine, Access::Plain, BEHIND_PORT).await?;
        registry.push(image, NAME).await?;
        let proxy = RegistryProxy::start(&machine, FRONT_PORT, registry.address())?;
        let control = Control::start(&self.rig.machine("control")?, &self.programs.control).await?;
        let spec = tell(NodeSpec::joining(&proxy.url(), &control));
        let mut cluster = Cluster {
            nodes: Vec::new(),
            control,
            proxy,
            _registry: registry,
            spec,
            program: self.programs.node.clone(),
        };
        for _ in 0..nodes {
            cluster.add_node(&self.rig).await?;
        }
        Ok(cluster)
    }
}

impl Cluster {
    /// One more node.
    pub(crate) async fn add_node(&mut self, rig: &Rig) -> Result<usize> {
        let number = self.nodes.len();
        let machine = rig.machine(&format!("node-{number}"))?;
        self.nodes
            .push(Node::start(&machine, &self.program, &self.spec).await?);
        Ok(number)
    }

    /// Downloads `blob` through node number `node`, as a client without credentials.
    pub(crate) async fn get(&self, node: usize, blob: &BlobFile) -> Result<Download> {
        get(&self.nodes[node], REPOSITORY, &blob.digest, &[], PULL_MAX).await
    }

    /// The same, and it must be the blob.
    pub(crate) async fn get_right(&self, node: usize, blob: &BlobFile) -> Result<Download> {
        let download = self.get(node, blob).await?;
        ensure!(
            download.is(&blob.digest),
            "node-{node} did not deliver {} of {} bytes: {}",
            blob.digest,
            blob.bytes,
            download.summary()
        );
        Ok(download)
    }
}

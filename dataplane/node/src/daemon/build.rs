//! The parts of a node, put together.

use std::collections::BTreeMap;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use pantala_control::{
    ClientConfig, ControlClient, Identity, JoinTarget, JoinToken, Labels, Server as ControlServer,
    ServerConfig,
};
use pantala_mirror::{Mirror, MirrorConfig, Policy, TlsFiles, UpstreamUrl};
use pantala_quic::{Endpoint, EndpointConfig, Limits, NodeIdentity};
use pantala_source::{Source, SourceConfig};
use pantala_store::{Store, StoreConfig};

use crate::admin::{About, Admin};
use crate::backend::NodeBackend;
use crate::config::Config;
use crate::control_link::ControlLink;
use crate::engine::{Board, SHUTDOWN_GRACE, Shared};
use crate::lazy::Settings;
use crate::lazy::adopt::{Before, default_supervisor};
use crate::lazy::operator::Operator;
use crate::meter::{Meter, Programs};
use crate::metrics::Metrics;
use crate::peer::{Peers, Server};
use crate::snapshots::Snapshots;

/// The pause between two attempts to join a control that does not answer yet.
const JOIN_RETRY: Duration = Duration::from_secs(2);

/// A node whose parts are all there.
pub(super) struct Node {
    shared: Arc<Shared>,
    mirror: Mirror<NodeBackend>,
    admin: Admin,
    operator: Operator,
    control: Option<ControlServer>,
    snapshots: Option<Snapshots>,
}

impl Node {
    pub(super) async fn start(
        config: &Config,
        programs: Programs,
        started: Instant,
    ) -> anyhow::Result<Self> {
        std::fs::create_dir_all(&config.data_dir).with_context(|| {
            format!(
                "cannot create the data directory {} (data_dir): choose one that this user may write",
                config.data_dir.display()
            )
        })?;
        // First, because it takes the lock that tells a second node to go away.
        let before = Before::look(lazy_settings(config)?)
            .await
            .context("cannot look after lazy mounts")?;
        let (store, store_limit_bytes) = open_store(config, &before)?;
        let control = start_control(config).await?;
        let target = join_target(config, control.as_ref())?;
        let identity = Arc::new(join(config, &target).await?);
        tracing::info!(node = %identity.node_id(), control = %target.address, "identity");

        let metrics = Arc::new(Metrics::new());
        metrics.store_limit.set(store_limit_bytes as f64);
        let board = Board::default();
        let meter = Meter::new(programs, config);
        let server = Server::new(
            store.clone(),
            board.clone(),
            Arc::clone(&metrics),
            Arc::clone(&meter),
        );
        let endpoint = bind_peers(config, &identity, &meter)?;
        let peer_addr = endpoint.local_addr();
        let peers = Peers::start(endpoint, server, Arc::clone(&metrics), Arc::clone(&meter));
        meter
            .start(&peers, Arc::clone(&metrics))
            .context("cannot start the meter's thread")?;

        let advertise = advertised(config, peer_addr, &target.address);
        let mut client = ClientConfig::new(target.address.clone(), (*identity).clone(), advertise);
        client.labels = Labels {
            host: config.labels.host.clone(),
            rack: config.labels.rack.clone(),
            zone: config.labels.zone.clone(),
        };
        client.uplink_bytes_per_s = config.peer.uplink_bytes_per_s;
        client.is_seed = config.peer.seed;
        let (handle, events) = ControlClient::start(client);
        let shared = Shared::new(
            store,
            open_source(config)?,
            peers,
            ControlLink::new(handle),
            identity,
            metrics,
            board,
        );
        // Before anybody else opens a blob: those that are mounted are taken up first.
        let lazy = before
            .adopt(Arc::clone(&shared))
            .await
            .context("cannot take up lazy mounts")?;
        tokio::spawn(ControlLink::run(events, Arc::clone(&shared)));
        tokio::spawn(ControlLink::report_paths(Arc::downgrade(&shared)));

        let backend = Arc::new(NodeBackend::new(Arc::clone(&shared)));
        let mirror = Mirror::bind(mirror_config(config)?, backend)
            .await
            .context("cannot start the mirror (mirror.listen)")?;
        let about = About {
            started,
            mirror: mirror.local_addr(),
            peer: advertise,
            control: target.address,
            control_embedded: control.is_some(),
            store_limit_bytes,
        };
        let snapshots = Snapshots::start(config.snapshotter.as_ref(), &lazy).await?;
        let operator = Operator::bind(Arc::clone(&lazy))?;
        let admin = Admin::bind(config.admin.listen, Arc::clone(&shared), lazy, about).await?;
        tracing::info!(
            mirror = %mirror.local_addr(),
            admin = %admin.local_addr()?,
            peers = %peer_addr,
            %advertise,
            "ready"
        );
        Ok(Self {
            shared,
            mirror,
            admin,
            operator,
            control,
            snapshots,
        })
    }

    /// Serves until `stop`, then lets what is under way end for a moment.
    pub(super) async fn run(self, stop: impl Future<Output = ()>) -> anyhow::Result<()> {
        let (stopping, stopped) = tokio::sync::oneshot::channel::<()>();
        let admin = tokio::spawn(self.admin.serve());
        let operator = tokio::spawn(self.operator.serve());
        let mut mirror = tokio::spawn(self.mirror.serve(async {
            // Gone without a word means gone.
            stopped.await.unwrap_or_default();
        }));
        tokio::select! {
            () = stop => {}
            ended = &mut mirror => bail!("the mirror ended by itself: {ended:?}"),
        }
        drop(stopping);
        if let Some(snapshots) = self.snapshots {
            snapshots.stop().await;
        }
        if tokio::time::timeout(SHUTDOWN_GRACE, mirror).await.is_err() {
            tracing::info!("requests under way are cut");
        }
        self.shared.shutdown().await;
        self.shared.peers.close().await;
        if let Some(control) = self.control {
            control.shutdown().await;
        }
        admin.abort();
        operator.abort();
        tracing::info!("stopped");
        Ok(())
    }
}

fn lazy_settings(config: &Config) -> anyhow::Result<Settings> {
    let supervisor = match &config.lazy.supervisor {
        Some(supervisor) => supervisor.clone(),
        None => {
            let own = std::env::current_exe().context("where this program is cannot be found")?;
            default_supervisor(&own)
        }
    };
    let registries = config.registries.iter();
    Ok(Settings {
        dir: config.data_dir.join("lazy"),
        supervisor,
        background_fill: config.lazy.background_fill,
        fill_timeout: config.lazy.fill_timeout,
        registries: registries
            .map(|(host, registry)| (host.clone(), registry.url.to_string()))
            .collect(),
    })
}

fn open_store(config: &Config, before: &Before) -> anyhow::Result<(Store, u64)> {
    let dir = config.data_dir.join("store");
    let disk = rustix::fs::statvfs(&config.data_dir).with_context(|| {
        format!(
            "cannot look at the disk under {}",
            config.data_dir.display()
        )
    })?;
    let limit_bytes = config
        .store
        .limit
        .bytes_of(disk.f_blocks.saturating_mul(disk.f_frsize));
    let store_config = StoreConfig {
        dir,
        limit_bytes,
        low_watermark_percent: config.store.low_watermark_percent,
    };
    let files = Arc::new(before.file_system()?);
    let store = Store::open_keeping(store_config, files, &before.keep())
        .context("cannot open the store")?;
    Ok((store, limit_bytes))
}

fn open_source(config: &Config) -> anyhow::Result<Source> {
    let from = &config.source;
    let mut source = SourceConfig {
        connect_timeout: from.connect_timeout,
        first_byte_timeout: from.first_byte_timeout,
        stall_timeout: from.stall_timeout,
        retries_max: from.retries_max,
        transfers_per_host_max: from.connections_per_host_max,
        ..SourceConfig::default()
    };
    for registry in config.registries.values() {
        if let (Some(ca_file), Some(host)) = (&registry.ca_file, registry.url.host_str()) {
            let port = registry.url.port_or_known_default().unwrap_or(443);
            source
                .host_ca_files
                .entry(format!("{host}:{port}"))
                .or_default()
                .push(ca_file.clone());
        }
    }
    Source::new(source).context("cannot set up the registry client")
}

async fn start_control(config: &Config) -> anyhow::Result<Option<ControlServer>> {
    if config.control.join.is_some() {
        return Ok(None);
    }
    let server = ServerConfig::new(config.data_dir.clone(), config.control.listen);
    let server = ControlServer::start(server)
        .await
        .context("cannot start the embedded control (control.listen)")?;
    tracing::info!(listen = %server.local_addr(), "embedded control");
    Ok(Some(server))
}

fn join_target(config: &Config, control: Option<&ControlServer>) -> anyhow::Result<JoinTarget> {
    if let Some(control) = control {
        let mut address = control.local_addr();
        if address.ip().is_unspecified() {
            address.set_ip(IpAddr::V4(Ipv4Addr::LOCALHOST));
        }
        return Ok(JoinTarget {
            address: address.to_string(),
            token: control.join_token().clone(),
        });
    }
    let (Some(address), Some(file)) = (&config.control.join, &config.control.token_file) else {
        bail!(
            "control.join needs control.token_file: the file with the token that `pantala-control token` prints"
        );
    };
    Ok(JoinTarget {
        address: address.clone(),
        token: JoinToken::from_file(file)
            .with_context(|| format!("cannot read control.token_file {}", file.display()))?,
    })
}

/// The identity on disk, or a new one; waits for a control that cannot be reached yet.
async fn join(config: &Config, target: &JoinTarget) -> anyhow::Result<Identity> {
    loop {
        match Identity::load_or_join(&config.data_dir, target).await {
            Ok(identity) => return Ok(identity),
            Err(error) if error.is_retryable() => {
                tracing::warn!(%error, "not joined yet: trying again");
                tokio::time::sleep(JOIN_RETRY).await;
            }
            Err(error) => return Err(error).context("cannot join the cluster"),
        }
    }
}

fn bind_peers(config: &Config, identity: &Identity, meter: &Meter) -> anyhow::Result<Endpoint> {
    let chain = identity.certificate_chain_der();
    let see = |sockets: &[std::net::UdpSocket]| {
        meter.see_sockets(sockets);
        Ok(())
    };
    let config = EndpointConfig {
        listen: config.peer.listen,
        identity: NodeIdentity {
            certificate_chain_der: chain.iter().map(|c| c.to_vec()).collect(),
            key_pkcs8_der: identity.key_der().secret_der().to_vec(),
            ca_certificate_der: identity.ca_certificate_der().to_vec(),
        },
        limits: Limits {
            threads: config.peer.threads,
            ..Limits::default()
        },
        driver: config.peer.driver,
    };
    Endpoint::bind_seen(config, Some(&see))
        .context("cannot listen for peers (peer.listen, peer.driver)")
}

/// The address that other nodes are told: the configured one; else the one from which control is
/// reached, found by asking the kernel for a route (nothing is sent).
fn advertised(config: &Config, bound: SocketAddr, control: &str) -> SocketAddr {
    if let Some(advertise) = config.peer.advertise {
        return advertise;
    }
    if !bound.ip().is_unspecified() {
        return bound;
    }
    let route = || -> std::io::Result<IpAddr> {
        let socket = std::net::UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.connect(control)?;
        Ok(socket.local_addr()?.ip())
    };
    let ip = route().unwrap_or_else(|error| {
        tracing::warn!(%error, "no route to control: advertising loopback (set peer.advertise)");
        IpAddr::V4(Ipv4Addr::LOCALHOST)
    });
    SocketAddr::new(ip, bound.port())
}

fn mirror_config(config: &Config) -> anyhow::Result<MirrorConfig> {
    let url = |host: &str, url: &url::Url| {
        url.as_str()
            .trim_end_matches('/')
            .parse::<UpstreamUrl>()
            .with_context(|| format!("registries.{host:?}.url"))
    };
    let mut registries = BTreeMap::new();
    for (host, registry) in &config.registries {
        registries.insert(host.clone(), url(host, &registry.url)?);
    }
    let default = &config.mirror.default_registry;
    let policy = Policy::new(default, registries, config.mirror.allow_any_upstream)
        .with_context(|| format!("mirror.default_registry = {default:?}"))?;
    let mut mirror = MirrorConfig::new(config.mirror.listen, policy);
    mirror.first_byte_timeout = config.mirror.first_byte_timeout;
    mirror.authorization_ttl = config.mirror.authorization_ttl;
    mirror.authorization_stale = config.mirror.authorization_stale;
    mirror.connections_max = config.mirror.connections_max;
    mirror.tls = config.mirror.tls.as_ref().map(|tls| TlsFiles {
        certificate: tls.certificate.clone(),
        key: tls.key.clone(),
    });
    Ok(mirror)
}

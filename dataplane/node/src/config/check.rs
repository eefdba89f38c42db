//! The one place where a configuration is checked: raw texts and numbers in, typed values out.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use pantala_quic::DriverChoice;
use pantala_wire::name::is_host;
use url::Url;

use super::document::Document;
use super::error::ConfigError;
use super::rate::bytes_per_s;
use super::raw::{
    Raw, RawControl, RawLabels, RawLazy, RawLog, RawMeter, RawMirror, RawPeer, RawRegistry,
    RawSource, RawStore,
};
use super::{
    Admin, Config, Control, Labels, Lazy, Log, LogFormat, Meter, MeterKernel, Mirror, Peer,
    Registry, Source, Store, TlsFiles,
};

/// As many as the driver makes use of.
const PEER_THREADS_MAX: u64 = 8;
/// As slow as control believes an uplink to be: 8 Mbit/s.
const UPLINK_MIN_BYTES_PER_S: u64 = 1_000_000;
const DAY_MS: u64 = 24 * 3_600 * 1_000;
const ADDRESS_HINT: &str = "write an IP address and a port, such as \"127.0.0.1:65001\"";

impl Raw {
    pub(super) fn check(self, file: &Document<'_>) -> Result<Config, ConfigError> {
        let data_dir =
            absolute(file, &["data_dir"], &self.data_dir)?.unwrap_or_else(super::default_data_dir);
        Ok(Config {
            snapshotter: self.snapshotter.check(file, &data_dir)?,
            data_dir,
            mirror: self.mirror.check(file)?,
            registries: self
                .registries
                .iter()
                .map(|(host, raw)| Ok((host.clone(), raw.check(file, host)?)))
                .collect::<Result<_, _>>()?,
            admin: Admin {
                listen: address(file, &["admin", "listen"], &self.admin.listen)?,
            },
            peer: self.peer.check(file)?,
            meter: self.meter.check(file)?,
            control: self.control.check(file)?,
            store: self.store.check(file)?,
            source: self.source.check(file)?,
            lazy: self.lazy.check(file)?,
            labels: self.labels.check(file)?,
            log: self.log.check(file)?,
        })
    }
}

impl RawControl {
    fn check(&self, file: &Document<'_>) -> Result<Control, ConfigError> {
        Ok(Control {
            listen: address(file, &["control", "listen"], &self.listen)?,
            join: join_address(file, &self.join)?,
            token_file: absolute(file, &["control", "token_file"], &self.token_file)?,
        })
    }
}

impl RawSource {
    fn check(&self, file: &Document<'_>) -> Result<Source, ConfigError> {
        let range = |key, value, min, max| in_range(file, &["source", key], value, min, max);
        let ms = |key, value| range(key, value, 1, DAY_MS).map(Duration::from_millis);
        let per_host = self.connections_per_host_max;
        Ok(Source {
            connect_timeout: ms("connect_timeout_ms", self.connect_timeout_ms)?,
            first_byte_timeout: ms("first_byte_timeout_ms", self.first_byte_timeout_ms)?,
            stall_timeout: ms("stall_timeout_ms", self.stall_timeout_ms)?,
            retries_max: as_u32(range("retries_max", self.retries_max, 0, 100)?),
            connections_per_host_max: as_usize(range(
                "connections_per_host_max",
                per_host,
                1,
                1_024,
            )?),
        })
    }
}

impl RawLazy {
    fn check(&self, file: &Document<'_>) -> Result<Lazy, ConfigError> {
        let timeout = ["lazy", "fill_timeout_ms"];
        let timeout_ms = in_range(file, &timeout, self.fill_timeout_ms, 1, DAY_MS)?;
        Ok(Lazy {
            background_fill: self.background_fill,
            fill_timeout: Duration::from_millis(timeout_ms),
            supervisor: absolute(file, &["lazy", "supervisor"], &self.supervisor)?,
        })
    }
}

impl RawMirror {
    fn check(&self, file: &Document<'_>) -> Result<Mirror, ConfigError> {
        let range = |key, value, min, max| in_range(file, &["mirror", key], value, min, max);
        if !is_host(&self.default_registry) {
            return Err(file.invalid(
                &["mirror", "default_registry"],
                format!("{:?} is not a registry host", self.default_registry),
                "write the host as in image names, such as \"docker.io\" or \"registry.example:5000\"",
            ));
        }
        let file_of = |key, value| absolute(file, &["mirror", key], value);
        let tls = match (
            file_of("tls_certificate", &self.tls_certificate)?,
            file_of("tls_key", &self.tls_key)?,
        ) {
            (Some(certificate), Some(key)) => Some(TlsFiles { certificate, key }),
            (None, None) => None,
            (given, _) => {
                let (key, other) = match given {
                    Some(_) => ("tls_certificate", "tls_key"),
                    None => ("tls_key", "tls_certificate"),
                };
                return Err(file.invalid(
                    &["mirror", key],
                    format!("given without `mirror.{other}`"),
                    "give both for TLS, or neither for plain HTTP",
                ));
            }
        };
        Ok(Mirror {
            listen: address(file, &["mirror", "listen"], &self.listen)?,
            default_registry: self.default_registry.clone(),
            allow_any_upstream: self.allow_any_upstream,
            first_byte_timeout: Duration::from_millis(range(
                "first_byte_timeout_ms",
                self.first_byte_timeout_ms,
                1,
                DAY_MS,
            )?),
            authorization_ttl: Duration::from_secs(range(
                "authorization_ttl_s",
                self.authorization_ttl_s,
                0,
                DAY_MS / 1_000,
            )?),
            authorization_stale: Duration::from_secs(range(
                "authorization_stale_s",
                self.authorization_stale_s,
                0,
                DAY_MS / 1_000,
            )?),
            connections_max: as_usize(range(
                "connections_max",
                self.connections_max,
                1,
                1_000_000,
            )?),
            tls,
        })
    }
}

impl RawRegistry {
    fn check(&self, file: &Document<'_>, host: &str) -> Result<Registry, ConfigError> {
        if !is_host(host) {
            return Err(file.invalid(
                &["registries", host],
                "not a registry host".into(),
                "write the host as in image names: [registries.\"registry.example:5000\"]",
            ));
        }
        let path = ["registries", host, "url"];
        let problem = |problem: String| {
            file.invalid(
                &path,
                problem,
                "write scheme, host and port, such as \"http://127.0.0.1:5000\" or \"https://registry.example\"",
            )
        };
        let url = match self.url.as_str() {
            "" => super::public_url(host).ok_or_else(|| problem("no address".into()))?,
            text => Url::parse(text).map_err(|e| problem(format!("{text:?}: {e}")))?,
        };
        if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none() {
            return Err(problem(format!("{:?} is not an http(s) address", self.url)));
        }
        if !url.username().is_empty() || url.password().is_some() {
            return Err(problem(
                "credentials do not belong here: callers bring their own".into(),
            ));
        }
        if url.path() != "/" || url.query().is_some() || url.fragment().is_some() {
            return Err(problem(format!(
                "{:?} holds more than an address",
                self.url
            )));
        }
        Ok(Registry {
            url,
            ca_file: absolute(file, &["registries", host, "ca_file"], &self.ca_file)?,
        })
    }
}

impl RawPeer {
    fn check(&self, file: &Document<'_>) -> Result<Peer, ConfigError> {
        let advertise = match self.advertise.as_str() {
            "" => None,
            text => Some(address(file, &["peer", "advertise"], text)?),
        };
        if advertise.is_some_and(|a| a.ip().is_unspecified() || a.port() == 0) {
            return Err(file.invalid(
                &["peer", "advertise"],
                format!("{:?} cannot be reached by anyone", self.advertise),
                "write the address and port that other nodes reach this node at",
            ));
        }
        let driver = match self.driver.as_str() {
            "auto" => DriverChoice::Auto,
            "io_uring" => DriverChoice::Ring,
            "tokio" => DriverChoice::Tokio,
            other => {
                return Err(file.invalid(
                    &["peer", "driver"],
                    format!("{other:?} is no driver"),
                    "write \"auto\", \"io_uring\" or \"tokio\"",
                ));
            }
        };
        let threads = in_range(
            file,
            &["peer", "threads"],
            self.threads,
            0,
            PEER_THREADS_MAX,
        )?;
        let uplink_bytes_per_s = speed(file, &["peer", "uplink"], &self.uplink)?;
        Ok(Peer {
            listen: address(file, &["peer", "listen"], &self.listen)?,
            advertise,
            driver,
            threads: usize::try_from(threads).unwrap_or(0),
            uplink_bytes_per_s,
            seed: self.seed,
        })
    }
}

impl RawMeter {
    fn check(&self, file: &Document<'_>) -> Result<Meter, ConfigError> {
        let kernel = match self.kernel.as_str() {
            "auto" => MeterKernel::Auto,
            "off" => MeterKernel::Off,
            "required" => MeterKernel::Required,
            other => {
                return Err(file.invalid(
                    &["meter", "kernel"],
                    format!("{other:?} is not known"),
                    "write \"auto\", \"off\" or \"required\"",
                ));
            }
        };
        let speed = |key, text| speed(file, &["meter", key], text);
        let floor_bytes_per_s = speed("floor", &self.floor)?.unwrap_or(UPLINK_MIN_BYTES_PER_S);
        let ceiling_bytes_per_s = speed("ceiling", &self.ceiling)?;
        if ceiling_bytes_per_s.is_some_and(|ceiling| ceiling < floor_bytes_per_s) {
            return Err(file.invalid(
                &["meter", "ceiling"],
                format!("{:?} is below the floor", self.ceiling),
                "lower meter.floor, or raise meter.ceiling",
            ));
        }
        Ok(Meter {
            kernel,
            interfaces: self.interfaces.clone(),
            yields: self.yields,
            floor_bytes_per_s,
            ceiling_bytes_per_s,
            peer_ceiling_bytes_per_s: speed("peer_ceiling", &self.peer_ceiling)?,
        })
    }
}

impl RawStore {
    fn check(&self, file: &Document<'_>) -> Result<Store, ConfigError> {
        let low = in_range(
            file,
            &["store", "low_watermark_percent"],
            self.low_watermark_percent,
            1,
            100,
        )?;
        Ok(Store {
            limit: self.limit.parse().map_err(|e: super::size::SizeError| {
                file.invalid(
                    &["store", "limit"],
                    e.to_string(),
                    "write bytes such as \"100GiB\", or a part of the disk such as \"80%\"",
                )
            })?,
            low_watermark_percent: u8::try_from(low).unwrap_or(100),
        })
    }
}

impl RawLabels {
    fn check(&self, file: &Document<'_>) -> Result<Labels, ConfigError> {
        let label = |key, value: &str| {
            // Labels travel to control with every registration.
            let fits = value.len() <= 253 && value.chars().all(|c| !c.is_control());
            fits.then(|| value.to_owned()).ok_or_else(|| {
                file.invalid(
                    &["labels", key],
                    "too long, or not printable".into(),
                    "at most 253 bytes of plain text",
                )
            })
        };
        let host = match self.host.as_str() {
            "" => rustix::system::uname()
                .nodename()
                .to_string_lossy()
                .into_owned(),
            _ => label("host", &self.host)?,
        };
        Ok(Labels {
            host,
            rack: label("rack", &self.rack)?,
            zone: label("zone", &self.zone)?,
        })
    }
}

impl RawLog {
    fn check(&self, file: &Document<'_>) -> Result<Log, ConfigError> {
        let hint = "such as \"info\" or \"info,pantala_source=debug\"";
        if let Err(e) = tracing_subscriber::EnvFilter::try_new(&self.filter) {
            return Err(file.invalid(&["log", "filter"], format!("{:?}: {e}", self.filter), hint));
        }
        let format = match self.format.as_str() {
            "text" => LogFormat::Text,
            "json" => LogFormat::Json,
            other => {
                return Err(file.invalid(
                    &["log", "format"],
                    format!("{other:?} is not a format"),
                    "write \"text\" or \"json\"",
                ));
            }
        };
        Ok(Log {
            filter: self.filter.clone(),
            format,
        })
    }
}

fn speed(file: &Document<'_>, path: &[&str], text: &str) -> Result<Option<u64>, ConfigError> {
    if text.is_empty() {
        return Ok(None);
    }
    let rate = bytes_per_s(text)
        .ok()
        .filter(|&rate| rate >= UPLINK_MIN_BYTES_PER_S);
    rate.map(Some).ok_or_else(|| {
        file.invalid(
            path,
            format!("{text:?} is not the speed of a link of at least 8 Mbit/s"),
            "write a speed such as \"10 Gbit/s\" or \"800 Mbit/s\"",
        )
    })
}

fn address(file: &Document<'_>, path: &[&str], text: &str) -> Result<SocketAddr, ConfigError> {
    text.parse()
        .map_err(|_| file.invalid(path, format!("{text:?} is not an address"), ADDRESS_HINT))
}

fn join_address(file: &Document<'_>, text: &str) -> Result<Option<String>, ConfigError> {
    if text.is_empty() {
        return Ok(None);
    }
    let has_port = text
        .rsplit_once(':')
        .is_some_and(|(_, port)| !port.ends_with(']') && port.parse::<u16>().is_ok());
    if is_host(text) && has_port {
        return Ok(Some(text.to_owned()));
    }
    Err(file.invalid(
        &["control", "join"],
        format!("{text:?} is not a host and a port"),
        "write the control's address, such as \"control.example:65004\"",
    ))
}

/// Paths must not depend on where the daemon happens to be started.
pub(super) fn absolute(
    file: &Document<'_>,
    path: &[&str],
    text: &str,
) -> Result<Option<PathBuf>, ConfigError> {
    if text.is_empty() {
        return Ok(None);
    }
    if Path::new(text).is_absolute() {
        return Ok(Some(PathBuf::from(text)));
    }
    Err(file.invalid(
        path,
        format!("{text:?} is not an absolute path"),
        "write the path from /",
    ))
}

fn in_range(
    file: &Document<'_>,
    path: &[&str],
    value: u64,
    min: u64,
    max: u64,
) -> Result<u64, ConfigError> {
    if (min..=max).contains(&value) {
        return Ok(value);
    }
    Err(file.invalid(
        path,
        format!("{value} is out of range"),
        &format!("write a number from {min} to {max}"),
    ))
}

// The callers' ranges end below both limits.
fn as_u32(value: u64) -> u32 {
    u32::try_from(value).unwrap_or(u32::MAX)
}

fn as_usize(value: u64) -> usize {
    usize::try_from(value).unwrap_or(usize::MAX)
}

//! The programs, loaded and attached for as long as this lives.

use std::fmt;
use std::fs::File;
use std::net::{SocketAddr, UdpSocket};
use std::os::fd::AsRawFd;

use aya::maps::{
    Array, HashMap, MapData, MapError, PerCpuArray, PerCpuHashMap, ReusePortSockArray,
};
use aya::programs::{CgroupAttachMode, CgroupSkb, CgroupSkbAttachType, ProgramError, SkReuseport};
use aya::{Ebpf, EbpfLoader};
use pantala_ebpf_common::{
    KEY_WORDS, THREADS_MAX, TRAFFIC_WORDS, Tally, Traffic, setting, steered,
};

use rustix::net::sockopt;

use super::{KernelError, cgroup, key, object};

/// How the counting is set up.
#[derive(Debug, Clone)]
pub struct KernelConfig {
    /// Peers told apart at a time.
    pub peers_max: u32,
    /// Where to attach; nothing for the process's own cgroup.
    pub cgroup: Option<std::path::PathBuf>,
}

impl Default for KernelConfig {
    fn default() -> Self {
        Self {
            peers_max: super::PEERS_MAX,
            cgroup: None,
        }
    }
}

/// How many batches of datagrams came to their thread how.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Steered {
    /// By the connection ID.
    pub by_id: u64,
    /// By the kernel's hash: those that open connections.
    pub by_hash: u64,
    /// By the kernel's hash, as the thread's socket was not to be had.
    pub refused: u64,
}

/// Counters and steering in the kernel. Dropping it takes all of it away.
pub struct KernelMeter {
    traffic: PerCpuHashMap<MapData, [u32; KEY_WORDS], [u64; TRAFFIC_WORDS]>,
    settings: Array<MapData, u32>,
    own_sockets: HashMap<MapData, u64, u8>,
    sockets: ReusePortSockArray<MapData>,
    steered: PerCpuArray<MapData, u64>,
    /// Holds the programs and their attachments.
    programs: Ebpf,
}

impl fmt::Debug for KernelMeter {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KernelMeter").finish_non_exhaustive()
    }
}

fn is_not_permitted(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::PermissionDenied
}

/// The innermost cause decides whether it is rights that are missing.
fn refused(what: &'static str, error: &(dyn std::error::Error + 'static)) -> KernelError {
    let mut problem = error.to_string();
    let mut not_permitted = false;
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(io) = error.downcast_ref::<std::io::Error>() {
            not_permitted |= is_not_permitted(io);
        }
        cause = error.source();
        if let Some(cause) = cause {
            problem = format!("{problem}: {cause}");
        }
    }
    match not_permitted {
        true => KernelError::NotPermitted { problem },
        false => KernelError::Refused { what, problem },
    }
}

fn map_error(what: &'static str) -> impl Fn(MapError) -> KernelError {
    move |error| KernelError::Map {
        what,
        problem: format!("{error:?}"),
    }
}

impl KernelMeter {
    /// Loads all programs and attaches the counters. Nothing is counted before [`Self::count_sockets`].
    ///
    /// # Errors
    /// [`KernelError`]: the rights are missing, the kernel is too old, or there is no cgroup v2.
    pub fn load(config: &KernelConfig) -> Result<Self, KernelError> {
        let path = match &config.cgroup {
            Some(path) => path.clone(),
            None => cgroup::own_cgroup()?,
        };
        let group = File::open(&path).map_err(|source| KernelError::Cgroup { path, source })?;
        let mut programs = EbpfLoader::new()
            .map_max_entries("TRAFFIC", config.peers_max.max(1))
            .load(object::bytes())
            .map_err(|error| refused("the maps", &error))?;
        for (name, kind) in [
            ("count_received", CgroupSkbAttachType::Ingress),
            ("count_sent", CgroupSkbAttachType::Egress),
        ] {
            let attach = |program: &mut CgroupSkb| -> Result<(), ProgramError> {
                program.load()?;
                // An attachment of this kind stands beside those of others, whatever the mode's name says.
                program.attach(&group, kind, CgroupAttachMode::Single)?;
                Ok(())
            };
            let program = find::<CgroupSkb>(&mut programs, name)?;
            attach(program).map_err(|error| refused("the counters", &error))?;
        }
        find::<SkReuseport>(&mut programs, "steer")?
            .load()
            .map_err(|error| refused("the steering", &error))?;
        Ok(Self {
            traffic: take(&mut programs, "TRAFFIC")?,
            settings: take(&mut programs, "SETTINGS")?,
            own_sockets: take(&mut programs, "OWN_SOCKETS")?,
            sockets: take(&mut programs, "SOCKETS")?,
            steered: take(&mut programs, "STEERED")?,
            programs,
        })
    }

    /// Counts what goes through these sockets, which share a port, and nothing else.
    ///
    /// # Errors
    /// [`KernelError`]: they are no bound sockets, or too many.
    pub fn count_sockets(&mut self, sockets: &[UdpSocket]) -> Result<(), KernelError> {
        let refused = |problem: String| KernelError::Refused {
            what: "to count the sockets",
            problem,
        };
        let Some(first) = sockets.first() else {
            return Err(refused("there are none".into()));
        };
        let address = first.local_addr();
        let port = address.map_err(|error| refused(error.to_string()))?.port();
        for socket in sockets {
            let cookie = sockopt::socket_cookie(socket);
            let cookie = cookie.map_err(|error| refused(error.to_string()))?;
            self.own_sockets
                .insert(cookie, 1, 0)
                .map_err(map_error("name a socket to count"))?;
        }
        self.settings
            .set(setting::OWN_PORT, u32::from(port), 0)
            .map_err(map_error("set the port"))
    }

    /// What went between this node and `peer`; nothing where nothing did, or where so many others did since
    /// that it made room for them.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn traffic(&self, peer: SocketAddr) -> Result<Option<Traffic>, KernelError> {
        let values = match self.traffic.get(&key(peer).to_words(), 0) {
            Ok(values) => values,
            Err(MapError::KeyNotFound) => return Ok(None),
            Err(error) => return Err(map_error("read the counters")(error)),
        };
        let mut sum = Traffic::default();
        for words in values.iter() {
            let one = Traffic::from_words(*words);
            add(&mut sum.received, &one.received);
            add(&mut sum.sent, &one.sent);
        }
        Ok(Some(sum))
    }

    /// Sends datagrams to the socket of the thread that their connection ID names. `sockets` share an address
    /// and are in the order of their threads; the group must have been bound by now.
    ///
    /// # Errors
    /// [`KernelError`]: too many sockets, or they are no group. What steered them before goes on.
    pub fn steer(&mut self, sockets: &[UdpSocket]) -> Result<(), KernelError> {
        let threads = u32::try_from(sockets.len()).unwrap_or(u32::MAX);
        let Some(first) = sockets.first().filter(|_| threads <= THREADS_MAX) else {
            return Err(KernelError::Refused {
                what: "the steering",
                problem: format!("{threads} sockets, of 1 to {THREADS_MAX}"),
            });
        };
        for (thread, socket) in (0..).zip(sockets) {
            self.sockets
                .set(thread, &socket.as_raw_fd(), 0)
                .map_err(map_error("name the sockets to steer to"))?;
        }
        self.settings
            .set(setting::THREADS, threads, 0)
            .map_err(map_error("set the number of threads"))?;
        find::<SkReuseport>(&mut self.programs, "steer")?
            .attach(first)
            .map_err(|error| refused("to attach the steering", &error))
    }

    /// How datagrams were steered so far.
    ///
    /// # Errors
    /// [`KernelError::Map`].
    pub fn steered(&self) -> Result<Steered, KernelError> {
        let sum = |index: u32| -> Result<u64, KernelError> {
            let values = self.steered.get(&index, 0);
            let values = values.map_err(map_error("read the counts of the steering"))?;
            Ok(values.iter().sum())
        };
        Ok(Steered {
            by_id: sum(steered::BY_ID)?,
            by_hash: sum(steered::BY_HASH)?,
            refused: sum(steered::REFUSED)?,
        })
    }
}

fn add(sum: &mut Tally, one: &Tally) {
    sum.payload_bytes += one.payload_bytes;
    sum.batches += one.batches;
    sum.datagrams += one.datagrams;
    sum.last_seen_ns = sum.last_seen_ns.max(one.last_seen_ns);
}

fn find<'a, P>(programs: &'a mut Ebpf, name: &'static str) -> Result<&'a mut P, KernelError>
where
    &'a mut P: TryFrom<&'a mut aya::programs::Program, Error = ProgramError>,
{
    let program = programs.program_mut(name).ok_or(KernelError::Refused {
        what: name,
        problem: "it is not in the object that was built in".into(),
    })?;
    program.try_into().map_err(|error| refused(name, &error))
}

fn take<M>(programs: &mut Ebpf, name: &'static str) -> Result<M, KernelError>
where
    M: TryFrom<aya::maps::Map, Error = MapError>,
{
    let map = programs.take_map(name).ok_or(KernelError::Refused {
        what: name,
        problem: "it is not in the object that was built in".into(),
    })?;
    map.try_into().map_err(map_error("use a map"))
}

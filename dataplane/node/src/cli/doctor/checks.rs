//! Judgements on what was found. Pure: facts in, findings and advice out.

use std::path::Path;

use super::super::setup::containerd::CertsDir;
use super::Check;
use super::facts::{CERTS_DIR, Disk, Facts};
use crate::config::{ByteSize, Config, DEFAULT_PATH};

/// UDP segmentation and coalescing offloads, which make QUIC cheap, are complete from here on.
const KERNEL_MIN: (u32, u32) = (5, 0);
/// A burst of a 10 Gbit/s path over 3 ms of a busy thread.
const SOCKET_BUFFER_MIN_BYTES: u64 = 4 << 20;
/// Files open beside client connections: blobs with their metadata, peers, the registry.
const OPEN_FILES_RESERVE: u64 = 1_024;
/// Below that, a single image fills the disk.
const FREE_MIN_BYTES: u64 = 10 << 30;
/// 1 January 2026: no certificate of this program is older.
const CLOCK_MIN_S: u64 = 1_767_225_600;
/// 1 January 2100.
const CLOCK_MAX_S: u64 = 4_102_444_800;

/// Capabilities by number, with what would use them.
const CAPABILITIES: [(u32, &str); 3] = [
    (12, "CAP_NET_ADMIN"),
    (21, "CAP_SYS_ADMIN"),
    (39, "CAP_BPF"),
];

/// File systems by magic number.
const FILE_SYSTEMS: [(u64, &str); 9] = [
    (0xEF53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683E, "btrfs"),
    (0xF2F5_2010, "f2fs"),
    (0x2FC1_2FC1, "zfs"),
    (0x0102_1994, "tmpfs"),
    (0x794C_7630, "overlayfs"),
    (0x6969, "nfs"),
    (0x6573_5546, "fuse"),
];

pub(super) fn configuration(file: Option<&Path>) -> Check {
    let default = Path::new(DEFAULT_PATH);
    let finding = match file {
        Some(path) => format!("{} is valid", path.display()),
        None if default.exists() => format!("{DEFAULT_PATH} is valid"),
        None => format!("no file: the defaults are used ({DEFAULT_PATH} would be read)"),
    };
    Check::ok("configuration", finding)
}

pub(super) fn all(facts: &Facts, config: &Config) -> Vec<Check> {
    vec![
        kernel(&facts.kernel),
        io_uring(facts),
        lazy(facts),
        meter(facts),
        rights(facts),
        udp_buffers(facts),
        data(&facts.disk, config),
        open_files(facts.open_files_max, config),
        named_files(&facts.unreadable_files),
        clock(facts.since_1970.as_secs()),
    ]
}

fn version(kernel: &str) -> Option<(u32, u32)> {
    let mut parts = kernel.split(|c: char| !c.is_ascii_digit());
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

fn kernel(release: &str) -> Check {
    match version(release) {
        Some(version) if version >= KERNEL_MIN => Check::ok(
            "kernel",
            format!("{release}: UDP segmentation and coalescing offloads are used"),
        ),
        _ => Check::warning(
            "kernel",
            format!("{release}: UDP offloads are absent; each packet costs a system call"),
            "use Linux 5.0 or later",
        ),
    }
}

fn io_uring(facts: &Facts) -> Check {
    match &facts.io_uring {
        Ok(()) => Check::ok("io_uring", "allowed; it moves the packets between nodes"),
        Err(why) => Check::warning(
            "io_uring",
            format!(
                "{why}; tokio moves the packets between nodes, at about twice the processor time"
            ),
            "allow it (sysctl kernel.io_uring_disabled=0, a seccomp profile with io_uring), or set peer.driver = \"tokio\" to be content",
        ),
    }
}

fn lazy(facts: &Facts) -> Check {
    let name = "lazy mounts";
    if !facts.poisoned.is_empty() {
        return Check::problem(
            name,
            format!(
                "taken down, since reads may have given zeros: {}",
                facts.poisoned.join(", ")
            ),
            "end what used them, run `pantala umount` on each, and mount them again; keep pantala-supervisor alive when the node is stopped (KillMode=process)",
        );
    }
    match &facts.lazy {
        Some(Ok(())) => Check::ok(name, "fanotify and file-backed EROFS work here"),
        Some(Err(why)) => Check::warning(
            name,
            why.as_str(),
            "`pantala mount` does not work here; everything else does",
        ),
        None => Check::ok(name, "not tried: only root can mount"),
    }
}

fn meter(facts: &Facts) -> Check {
    match &facts.meter {
        Ok(()) => Check::ok(
            "meter",
            "programs in the kernel count the traffic of peers and steer it to its thread",
        ),
        Err(why) => Check::warning(
            "meter",
            format!("{why}; paths are measured by QUIC's own counts"),
            "give the service AmbientCapabilities=CAP_BPF CAP_NET_ADMIN, which it gives up after loading, or be content: set meter.kernel = \"off\"",
        ),
    }
}

fn rights(facts: &Facts) -> Check {
    let held: Vec<&str> = CAPABILITIES
        .iter()
        .filter(|(bit, _)| facts.capabilities >> bit & 1 == 1)
        .map(|(_, name)| *name)
        .collect();
    let user = match facts.is_root {
        true => "root",
        false => "not root",
    };
    let with = match held.is_empty() {
        true => "none of CAP_BPF, CAP_NET_ADMIN, CAP_SYS_ADMIN".to_owned(),
        false => held.join(", "),
    };
    Check::ok(
        "rights",
        format!(
            "{user}, with {with}; the meter uses CAP_BPF and CAP_NET_ADMIN, `pantala mount` CAP_SYS_ADMIN"
        ),
    )
}

fn udp_buffers(facts: &Facts) -> Check {
    let show = |bytes: Option<u64>| {
        bytes.map_or_else(|| "unknown".to_owned(), |b| ByteSize(b).to_string())
    };
    let finding = format!(
        "receive at most {}, send at most {}",
        show(facts.rmem_max_bytes),
        show(facts.wmem_max_bytes)
    );
    let is_small = |bytes: Option<u64>| bytes.is_some_and(|b| b < SOCKET_BUFFER_MIN_BYTES);
    if !is_small(facts.rmem_max_bytes) && !is_small(facts.wmem_max_bytes) {
        return Check::ok("udp buffers", finding);
    }
    Check::warning(
        "udp buffers",
        format!("{finding}: fast peers lose packets here"),
        format!(
            "sysctl -w net.core.rmem_max={SOCKET_BUFFER_MIN_BYTES} \
             net.core.wmem_max={SOCKET_BUFFER_MIN_BYTES}\n\
             and put both in /etc/sysctl.d/pantala.conf"
        ),
    )
}

fn data(disk: &Result<Disk, String>, config: &Config) -> Check {
    let name = "data";
    let disk = match disk {
        Ok(disk) => disk,
        Err(why) => {
            return Check::problem(
                name,
                format!("{}: {why}", config.data_dir.display()),
                "run the node as a user who may write there, or set data_dir",
            );
        }
    };
    let kind = FILE_SYSTEMS
        .iter()
        .find(|(magic, _)| *magic == disk.file_system)
        .map_or("unknown file system", |(_, name)| *name);
    let limit = config.store.limit.bytes_of(disk.total_bytes);
    let place = match disk.path == config.data_dir {
        true => config.data_dir.display().to_string(),
        false => format!("{} (will be created)", config.data_dir.display()),
    };
    let finding = format!(
        "{place} on {kind}, {} free of {}; blobs may take {}",
        ByteSize(disk.free_bytes),
        ByteSize(disk.total_bytes),
        ByteSize(limit)
    );
    match kind {
        "nfs" | "fuse" => {
            return Check::warning(
                name,
                format!("{finding}: a network file system loses what peers gain"),
                "set data_dir to a local disk",
            );
        }
        "tmpfs" => {
            return Check::warning(
                name,
                format!("{finding}: blobs take memory and are gone after a restart"),
                "set data_dir to a local disk",
            );
        }
        _ => {}
    }
    if limit > disk.total_bytes {
        return Check::warning(
            name,
            format!("{finding}: more than there is"),
            "set store.limit below the size of the file system",
        );
    }
    if disk.free_bytes < FREE_MIN_BYTES {
        return Check::warning(
            name,
            format!("{finding}: little is free"),
            "free some space, or set data_dir to a larger disk",
        );
    }
    Check::ok(name, finding)
}

fn open_files(limit: Option<u64>, config: &Config) -> Check {
    let needed = OPEN_FILES_RESERVE + u64::try_from(config.mirror.connections_max).unwrap_or(0);
    match limit {
        Some(limit) if limit < needed => Check::warning(
            "open files",
            format!("at most {limit}; {needed} may be needed"),
            format!(
                "set LimitNOFILE={needed} in the service (or `ulimit -n`), or lower \
                 mirror.connections_max"
            ),
        ),
        Some(limit) => Check::ok("open files", format!("at most {limit}")),
        None => Check::ok("open files", "no limit"),
    }
}

fn named_files(unreadable: &[String]) -> Check {
    match unreadable {
        [] => Check::ok("files", "all that the configuration names can be read"),
        some => Check::problem(
            "files",
            format!("cannot read {}", some.join("; ")),
            "correct the path in the configuration, or the rights of the file",
        ),
    }
}

fn clock(since_1970_s: u64) -> Check {
    match since_1970_s {
        CLOCK_MIN_S..CLOCK_MAX_S => Check::ok("clock", "plausible"),
        _ => Check::problem(
            "clock",
            "the date is wrong: no certificate is valid then",
            "set the time, and keep it with an NTP service",
        ),
    }
}

pub(super) fn containerd(facts: &Facts, config: &Path) -> Check {
    let name = "containerd";
    let Some(version) = &facts.containerd else {
        return Check::ok(name, "not found; nothing to set up");
    };
    if facts.mirrored.is_empty() {
        return Check::warning(
            name,
            format!("{version}, does not pull through the node"),
            "pantala setup containerd --all",
        );
    }
    let finding = format!(
        "{version}, pulls {} through the node",
        facts.mirrored.join(", ")
    );
    match facts.certs_dir.advice(config, Path::new(CERTS_DIR)) {
        None => Check::ok(name, finding),
        Some(advice) => {
            let but = match facts.certs_dir {
                CertsDir::Conflict { .. } => "its CRI does not start",
                _ => "but not for Kubernetes",
            };
            Check::warning(name, format!("{finding}, {but}"), advice)
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;
    use std::time::Duration;

    use super::super::Level;
    use super::*;

    fn good() -> Facts {
        Facts {
            kernel: "6.1.0-13-amd64".into(),
            io_uring: Ok(()),
            lazy: Some(Ok(())),
            poisoned: Vec::new(),
            meter: Ok(()),
            is_root: true,
            capabilities: u64::MAX,
            rmem_max_bytes: Some(8 << 20),
            wmem_max_bytes: Some(8 << 20),
            disk: Ok(Disk {
                path: PathBuf::from("/var/lib"),
                file_system: 0xEF53,
                total_bytes: 1 << 40,
                free_bytes: 1 << 39,
            }),
            open_files_max: Some(1 << 20),
            since_1970: Duration::from_secs(CLOCK_MIN_S + 1),
            unreadable_files: Vec::new(),
            containerd: Some("1.6.20".into()),
            certs_dir: CertsDir::Read,
            mirrored: vec!["_default".into()],
        }
    }

    fn config() -> Config {
        Config::parse("data_dir = \"/var/lib/pantala\"", "test").unwrap()
    }

    fn judged(facts: &Facts) -> Vec<(&'static str, Level)> {
        let mut checks = all(facts, &config());
        checks.push(containerd(facts, Path::new("/etc/containerd/config.toml")));
        for check in &checks {
            assert_eq!(
                check.advice.is_none(),
                check.level == Level::Ok,
                "{check:?}"
            );
        }
        checks
            .into_iter()
            .filter(|c| c.level != Level::Ok)
            .map(|c| (c.name, c.level))
            .collect()
    }

    #[test]
    fn a_good_machine_has_nothing_to_report() {
        assert_eq!(judged(&good()), []);
    }

    #[test]
    fn each_weakness_is_found_alone() {
        type Spoil = fn(&mut Facts);
        let disk = |facts: &mut Facts, change: fn(&mut Disk)| {
            if let Ok(disk) = &mut facts.disk {
                change(disk);
            }
        };
        let cases: [(Spoil, &str, Level); 9] = [
            (|f| f.meter = Err("no".into()), "meter", Level::Warning),
            (
                |f| f.kernel = "4.18.0-553.el8".into(),
                "kernel",
                Level::Warning,
            ),
            (|f| f.kernel = "strange".into(), "kernel", Level::Warning),
            (
                |f| f.rmem_max_bytes = Some(212_992),
                "udp buffers",
                Level::Warning,
            ),
            (|f| f.disk = Err("read-only".into()), "data", Level::Problem),
            (
                |f| f.open_files_max = Some(1_024),
                "open files",
                Level::Warning,
            ),
            (|f| f.since_1970 = Duration::ZERO, "clock", Level::Problem),
            (
                |f| f.unreadable_files = vec!["/k: no".into()],
                "files",
                Level::Problem,
            ),
            (|f| f.mirrored.clear(), "containerd", Level::Warning),
        ];
        for (spoil, name, level) in cases {
            let mut facts = good();
            spoil(&mut facts);
            assert_eq!(judged(&facts), [(name, level)]);
        }
        let disks: [fn(&mut Disk); 3] = [
            |d| d.file_system = 0x6969,
            |d| d.file_system = 0x0102_1994,
            |d| d.free_bytes = 1 << 20,
        ];
        for change in disks {
            let mut facts = good();
            disk(&mut facts, change);
            assert_eq!(judged(&facts), [("data", Level::Warning)]);
        }
    }

    #[test]
    fn lazy_mounts_that_cannot_be_made_are_a_warning_and_poisoned_ones_a_problem() {
        assert_eq!(lazy(&good()).level, Level::Ok);
        let unable = Facts {
            lazy: Some(Err("no such events".into())),
            ..good()
        };
        assert_eq!(lazy(&unable).level, Level::Warning);
        let poisoned = Facts {
            poisoned: vec!["/mnt/x".into()],
            ..good()
        };
        let check = lazy(&poisoned);
        assert!(check.level == Level::Problem && check.finding.contains("/mnt/x"));
    }

    #[test]
    fn where_io_uring_is_forbidden_the_reason_is_given() {
        assert_eq!(io_uring(&good()).level, Level::Ok);
        let forbidden = Facts {
            io_uring: Err("the sysctl says no".into()),
            ..good()
        };
        let check = io_uring(&forbidden);
        assert_eq!(check.level, Level::Warning);
        assert!(check.finding.contains("the sysctl says no; tokio"));
    }
}

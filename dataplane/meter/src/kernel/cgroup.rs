//! Where the counters are attached: the process's own cgroup, so that the packets of the rest of the machine
//! cost nothing more than before.

use std::fs;
use std::path::{Path, PathBuf};

use super::KernelError;

const MOUNTS: &str = "/proc/self/mountinfo";
const CGROUPS: &str = "/proc/self/cgroup";

/// The directory of this process's cgroup of version 2.
///
/// # Errors
/// [`KernelError::NoCgroup2`] where only version 1 is mounted; otherwise what cannot be read.
pub fn own_cgroup() -> Result<PathBuf, KernelError> {
    let read = |path: &str| {
        fs::read_to_string(path).map_err(|source| KernelError::Cgroup {
            path: path.into(),
            source,
        })
    };
    find(&read(MOUNTS)?, &read(CGROUPS)?, Path::exists).ok_or(KernelError::NoCgroup2)
}

/// `exists` tells which of the mounts shows the cgroup: a container may see only a part of the hierarchy.
fn find(mounts: &str, cgroups: &str, exists: impl Fn(&Path) -> bool) -> Option<PathBuf> {
    let own = cgroups.lines().find_map(|line| line.strip_prefix("0::"))?;
    mounts
        .lines()
        .filter_map(mount_of_version_2)
        .filter_map(|(root, point)| {
            let below = Path::new(own).strip_prefix(root).ok()?;
            Some(Path::new(point).join(below))
        })
        .find(|path| exists(path))
}

/// The root within the hierarchy, and the mount point, where the line is of a cgroup2 file system.
fn mount_of_version_2(line: &str) -> Option<(&str, &str)> {
    let (before, after) = line.split_once(" - ")?;
    if after.split(' ').next()? != "cgroup2" {
        return None;
    }
    let mut fields = before.split(' ').skip(3);
    Some((fields.next()?, fields.next()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
29 28 0:26 / /sys/fs/cgroup/cpu rw,relatime shared:6 - cgroup cgroup rw,cpu
40 28 0:36 / /sys/fs/cgroup/unified rw,relatime shared:17 - cgroup2 cgroup2 rw";

    #[test]
    fn the_own_cgroup_is_found_below_the_mount_of_version_2() {
        let cgroups = "5:cpu:/\n0::/system.slice/pantala.service\n";
        assert_eq!(
            find(HYBRID, cgroups, |_| true),
            Some("/sys/fs/cgroup/unified/system.slice/pantala.service".into())
        );
        let unified = "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw";
        assert_eq!(
            find(unified, "0::/\n", |_| true),
            Some("/sys/fs/cgroup/".into())
        );
    }

    #[test]
    fn a_host_with_version_1_alone_has_none() {
        let v1 = HYBRID.lines().next().expect("a line");
        assert_eq!(find(v1, "5:cpu:/\n0::/\n", |_| true), None);
        assert_eq!(find(HYBRID, "5:cpu:/\n", |_| true), None);
        assert_eq!(find(HYBRID, "0::/gone\n", |_| false), None);
    }

    #[test]
    fn a_mount_of_a_part_of_the_hierarchy_is_looked_through() {
        let part = "40 28 0:36 /pod/7 /sys/fs/cgroup rw - cgroup2 cgroup2 rw";
        assert_eq!(
            find(part, "0::/pod/7/main\n", |_| true),
            Some("/sys/fs/cgroup/main".into())
        );
        assert_eq!(find(part, "0::/elsewhere\n", |_| true), None);
    }
}

//! Whether the snapshotter can work, where the configuration asks for one.

use std::os::unix::net::UnixStream;
use std::path::Path;

use super::super::setup::snapshotter::{NAME, Plugin, plugin_in};
use super::Check;
use crate::config::{Config, Snapshotter};

/// What the machine says.
#[derive(Debug)]
struct Facts {
    is_root: bool,
    has_overlayfs: bool,
    answers: bool,
    plugin: Plugin,
}

/// Nothing where no snapshotter is asked for.
pub(super) fn check(config: &Config, containerd_config: &Path) -> Option<Check> {
    let snapshotter = config.snapshotter.as_ref()?;
    let facts = Facts {
        is_root: rustix::process::geteuid().is_root(),
        has_overlayfs: std::fs::read_to_string("/proc/filesystems")
            .is_ok_and(|text| text.lines().any(|line| line.ends_with("\toverlay"))),
        answers: UnixStream::connect(&snapshotter.listen).is_ok(),
        plugin: plugin_in(containerd_config),
    };
    Some(judge(&facts, snapshotter))
}

fn judge(facts: &Facts, config: &Snapshotter) -> Check {
    let name = "snapshotter";
    let socket = config.listen.display();
    if !facts.is_root {
        return Check::problem(
            name,
            "layers belong to many users, and this is not root",
            "run the node as root, or remove snapshotter.listen",
        );
    }
    if !facts.has_overlayfs {
        return Check::problem(name, "this kernel has no overlayfs", "modprobe overlay");
    }
    match &facts.plugin {
        Plugin::Unreadable(why) => Check::warning(
            name,
            format!("cannot tell whether containerd uses it: {why}"),
            "repair containerd's configuration",
        ),
        Plugin::Absent => Check::warning(
            name,
            "containerd is not told of it",
            "pantala setup containerd --snapshotter",
        ),
        Plugin::Known(other) if *other != config.listen => Check::warning(
            name,
            format!(
                "containerd calls {}, the node listens on {socket}",
                other.display()
            ),
            "pantala setup containerd --snapshotter, and restart containerd",
        ),
        Plugin::Known(_) if !facts.answers => Check::warning(
            name,
            format!("nobody answers on {socket}: containerd starts no container with it"),
            "start the node",
        ),
        Plugin::Known(_) => Check::ok(name, format!("containerd's {NAME}, on {socket}")),
    }
}

#[cfg(test)]
mod tests {
    use super::super::Level;
    use super::*;

    fn config() -> Snapshotter {
        Snapshotter {
            listen: "/run/s.sock".into(),
            root: "/r".into(),
            containerd: None,
        }
    }

    fn good() -> Facts {
        Facts {
            is_root: true,
            has_overlayfs: true,
            answers: true,
            plugin: Plugin::Known("/run/s.sock".into()),
        }
    }

    #[test]
    fn each_obstacle_is_named() {
        assert_eq!(judge(&good(), &config()).level, Level::Ok);
        type Spoil = fn(&mut Facts);
        let cases: [(Spoil, Level, &str); 6] = [
            (|f| f.is_root = false, Level::Problem, "root"),
            (|f| f.has_overlayfs = false, Level::Problem, "overlayfs"),
            (|f| f.answers = false, Level::Warning, "nobody answers"),
            (|f| f.plugin = Plugin::Absent, Level::Warning, "not told"),
            (
                |f| f.plugin = Plugin::Known("/x".into()),
                Level::Warning,
                "/x",
            ),
            (
                |f| f.plugin = Plugin::Unreadable("bad".into()),
                Level::Warning,
                "bad",
            ),
        ];
        for (spoil, level, word) in cases {
            let mut facts = good();
            spoil(&mut facts);
            let check = judge(&facts, &config());
            assert_eq!(check.level, level);
            assert!(check.finding.contains(word), "{check:?}");
        }
    }

    #[test]
    fn without_a_snapshotter_there_is_nothing_to_check() {
        let config = Config::parse("", "test").unwrap();
        assert_eq!(check(&config, Path::new("/nonexistent")), None);
    }
}

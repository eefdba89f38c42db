//! `pantala setup`: makes a container runtime pull through the node.
//!
//! Nothing is written before the changes were shown and agreed to.

pub(super) mod containerd;
mod files;
mod hosts;
pub(super) mod snapshotter;

use std::io::{BufRead, IsTerminal, Write};
use std::path::{Path, PathBuf};

use pantala_wire::name::is_host;
use url::Url;

use super::args::{ContainerdArgs, Runtime, SetupArgs};
use super::failure::{Failure, about_file};
use super::output::say;
use crate::config::Config;
use files::Change;
use hosts::Origin;

/// containerd's name for "every registry without a directory of its own".
const DEFAULT_DIR: &str = "_default";

pub(super) fn run(args: &SetupArgs) -> Result<(), Failure> {
    match &args.runtime {
        Runtime::Containerd(args) if args.snapshotter => containerd_snapshotter(args),
        Runtime::Containerd(args) => containerd_hosts(args),
    }
}

/// Where the snapshotter listens if the node's configuration does not say.
const SNAPSHOTTER_SOCKET: &str = "/run/pantala/snapshotter.sock";

fn containerd_snapshotter(args: &ContainerdArgs) -> Result<(), Failure> {
    let config = Config::load(args.config.as_deref())?;
    let socket = match &config.snapshotter {
        Some(snapshotter) => snapshotter.listen.clone(),
        None => PathBuf::from(SNAPSHOTTER_SOCKET),
    };
    let change = match args.undo {
        true => snapshotter::Change::undo(&args.containerd_config)?,
        false => snapshotter::Change::setup(&args.containerd_config, &socket)?,
    };
    if change.is_nothing() {
        say(nothing_to_do(args.undo))?;
    } else {
        say(&change.diff())?;
        if args.dry_run {
            return say(NOTHING_WRITTEN);
        }
        if !agreed(args.yes)? {
            return say("Nothing written.\n");
        }
        change.apply()?;
        say("\nDone.\n")?;
    }
    if args.undo {
        return Ok(());
    }
    if config.snapshotter.is_none() {
        say(&format!(
            "\nnote: the node has no snapshotter yet. Add to pantala.toml and restart the node:\n\n\
             [snapshotter]\nlisten = \"{SNAPSHOTTER_SOCKET}\"\n"
        ))?;
    }
    say(&format!(
        "\nnote: {}",
        snapshotter::advice(&args.containerd_config)
    ))
}

const NOTHING_WRITTEN: &str = "\nNothing written (--dry-run).\n";

const fn nothing_to_do(undo: bool) -> &'static str {
    match undo {
        true => "Nothing to undo.\n",
        false => "Already set up: nothing to change.\n",
    }
}

fn containerd_hosts(args: &ContainerdArgs) -> Result<(), Failure> {
    let targets = targets(args)?;
    let changes = match args.undo {
        true => undo_changes(args, &targets)?,
        false => setup_changes(args, &targets)?,
    };
    let changes: Vec<Change> = changes.into_iter().filter(|c| !c.is_nothing()).collect();
    if changes.is_empty() {
        say(nothing_to_do(args.undo))?;
    } else {
        for change in &changes {
            say(&change.diff())?;
        }
        if args.dry_run {
            return say(NOTHING_WRITTEN);
        }
        if !agreed(args.yes)? {
            return say("Nothing written.\n");
        }
        for change in &changes {
            change.apply()?;
        }
        say(&format!("\nDone: {} file(s).\n", changes.len()))?;
    }
    if args.undo {
        return Ok(());
    }
    let read = containerd::check(&args.containerd_config, &args.certs_dir);
    if let Some(advice) = read.advice(&args.containerd_config, &args.certs_dir) {
        say(&format!("\nnote: {advice}\n"))?;
    }
    match unserved(args, &targets) {
        Some(advice) => say(&format!("\nnote: {advice}\n")),
        None => Ok(()),
    }
}

/// Whether a `hosts.toml` was set up by this program.
pub(super) fn is_set_up(text: &str) -> bool {
    hosts::has_block(text)
}

/// A registry as typed.
#[derive(Debug, PartialEq, Eq)]
struct Target {
    /// The directory's name: the host of image names, or [`DEFAULT_DIR`].
    host: String,
    url: Option<String>,
}

fn targets(args: &ContainerdArgs) -> Result<Vec<Target>, Failure> {
    let mut targets = Vec::new();
    for typed in &args.registry {
        let (host, url) = match typed.split_once('=') {
            Some((host, url)) => (host, Some(base_url(url)?)),
            None => (typed.as_str(), None),
        };
        if !is_host(host) {
            return Err(
                Failure::usage(format!("{host:?} is not the host of a registry"))
                    .hint("write it as in image names: docker.io, quay.io, registry.example:5000"),
            );
        }
        targets.push(Target {
            host: host.to_owned(),
            url,
        });
    }
    if args.all {
        targets.push(Target {
            host: DEFAULT_DIR.to_owned(),
            url: None,
        });
    }
    Ok(targets)
}

/// An address of scheme, host and port, without the slash that `Url` puts at its end.
fn base_url(text: &str) -> Result<String, Failure> {
    let bad = || {
        Failure::usage(format!("{text:?} is not the address of a server"))
            .hint("write scheme, host and port, such as http://127.0.0.1:65001")
    };
    let url = Url::parse(text).map_err(|_| bad())?;
    let plain = matches!(url.scheme(), "http" | "https")
        && url.host_str().is_some_and(|host| !host.is_empty())
        && url.username().is_empty()
        && url.password().is_none()
        && url.path() == "/"
        && url.query().is_none()
        && url.fragment().is_none();
    match plain {
        true => Ok(url.as_str().trim_end_matches('/').to_owned()),
        false => Err(bad()),
    }
}

fn setup_changes(args: &ContainerdArgs, targets: &[Target]) -> Result<Vec<Change>, Failure> {
    let mirror = base_url(&args.mirror)?;
    let config = Config::load(args.config.as_deref());
    // The node's own configuration knows best where a registry is; an unreadable one is reported
    // where it was named, and does not matter where it was not.
    let config = match (config, &args.config) {
        (Ok(config), _) => Some(config),
        (Err(e), Some(_)) => return Err(e.into()),
        (Err(_), None) => None,
    };
    targets
        .iter()
        .map(|target| {
            let known = || {
                let url = config.as_ref()?.registry_url(&target.host)?;
                Some(url.as_str().trim_end_matches('/').to_owned())
            };
            let server = match target.host.as_str() {
                DEFAULT_DIR => None,
                host => (target.url.clone().or_else(known)).or_else(|| public_url(host)),
            };
            let origin = Origin {
                server,
                ..Origin::default()
            };
            Change::setup(&args.certs_dir.join(&target.host), &mirror, origin)
        })
        .collect()
}

fn public_url(host: &str) -> Option<String> {
    let url = crate::config::public_url(host)?;
    Some(url.as_str().trim_end_matches('/').to_owned())
}

fn undo_changes(args: &ContainerdArgs, targets: &[Target]) -> Result<Vec<Change>, Failure> {
    let dirs: Vec<PathBuf> = match targets {
        [] => directories(&args.certs_dir)?,
        _ => targets
            .iter()
            .map(|target| args.certs_dir.join(&target.host))
            .collect(),
    };
    let changes = dirs.iter().map(|dir| Change::undo(dir));
    Ok(changes
        .collect::<Result<Vec<_>, _>>()?
        .into_iter()
        .flatten()
        .collect())
}

fn directories(certs_dir: &Path) -> Result<Vec<PathBuf>, Failure> {
    let entries = match std::fs::read_dir(certs_dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(about_file("read", certs_dir, &e)),
    };
    let mut dirs = Vec::new();
    for entry in entries {
        let path = entry.map_err(|e| about_file("read", certs_dir, &e))?.path();
        if path.is_dir() {
            dirs.push(path);
        }
    }
    dirs.sort();
    Ok(dirs)
}

fn agreed(yes: bool) -> Result<bool, Failure> {
    if yes {
        return Ok(true);
    }
    if !std::io::stdin().is_terminal() {
        return Err(
            Failure::usage("cannot ask whether to make these changes: no terminal")
                .hint("give --yes to make them, or --dry-run to only show them"),
        );
    }
    let mut out = std::io::stdout().lock();
    let asked = write!(out, "\nMake these changes? [y/N] ").and_then(|()| out.flush());
    let mut answer = String::new();
    asked
        .and_then(|()| std::io::stdin().lock().read_line(&mut answer))
        .map_err(|e| Failure::new(format!("cannot ask: {e}")))?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

/// The registries that containerd would ask the node for in vain.
fn unserved(args: &ContainerdArgs, targets: &[Target]) -> Option<String> {
    let config = Config::load(args.config.as_deref()).ok()?;
    if config.mirror.allow_any_upstream {
        return None;
    }
    let mut text = String::new();
    for target in targets {
        if target.host == DEFAULT_DIR {
            text += "the node serves only the registries of its configuration; containerd fetches \
                     from all others directly. To serve all, set `allow_any_upstream = true` in \
                     [mirror] of pantala.toml.\n";
        } else if config.registry_url(&target.host).is_none() {
            let url = (target.url.clone()).or_else(|| public_url(&target.host))?;
            text += &format!(
                "the node does not serve {host} yet. Add to pantala.toml and restart the node:\n\n\
                 [registries.\"{host}\"]\nurl = \"{url}\"\n",
                host = target.host
            );
        }
    }
    (!text.is_empty()).then(|| text.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_taken_without_path_or_credentials() {
        assert_eq!(
            base_url("http://127.0.0.1:65001/").unwrap(),
            "http://127.0.0.1:65001"
        );
        assert_eq!(base_url("https://R.test").unwrap(), "https://r.test");
        for bad in [
            "",
            "127.0.0.1:65001",
            "ftp://x",
            "http://u:p@x",
            "http://x/v2",
            "http://x?y",
        ] {
            assert!(base_url(bad).is_err(), "{bad}");
        }
    }
}

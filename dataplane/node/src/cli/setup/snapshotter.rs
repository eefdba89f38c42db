//! containerd's own configuration, for the snapshotter: a block that names its socket.
//!
//! `proxy_plugins` is a table of its own in every version of the file, so a block at the end suffices;
//! nothing that a person wrote is touched. How Kubernetes is told to use it differs from version to
//! version and belongs into a table that exists already: that is only said.

use std::path::{Path, PathBuf};

use toml::{Table, Value};

use super::super::failure::Failure;
use super::files::{read, remove, write};

const BEGIN: &str = "# pantala setup: begin";
const END: &str = "# pantala setup: end";
/// The name of the snapshotter in containerd.
pub(crate) const NAME: &str = "pantala";
/// Beside the configuration: the file as it was before.
const BACKUP: &str = "before-pantala";

/// What containerd's configuration says of the snapshotter.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Plugin {
    /// It is told of a snapshotter on this socket.
    Known(PathBuf),
    /// It is not told.
    Absent,
    /// The file cannot be read.
    Unreadable(String),
}

/// What the text of a configuration says.
pub(crate) fn plugin(text: &str) -> Plugin {
    let table: Table = match text.parse() {
        Ok(table) => table,
        Err(error) => return Plugin::Unreadable(first_line(&error)),
    };
    let address = table
        .get("proxy_plugins")
        .and_then(|plugins| plugins.get(NAME))
        .map(|plugin| plugin.get("address").and_then(Value::as_str));
    match address {
        Some(address) => Plugin::Known(address.unwrap_or_default().into()),
        None => Plugin::Absent,
    }
}

/// The same of a file; one that does not exist is empty.
pub(crate) fn plugin_in(config: &Path) -> Plugin {
    match read(config) {
        Ok(text) => plugin(text.as_deref().unwrap_or_default()),
        Err(failure) => Plugin::Unreadable(failure.to_string()),
    }
}

fn first_line(error: &toml::de::Error) -> String {
    let line = error.message().lines().next().unwrap_or_default();
    line.to_owned()
}

/// The configuration with the snapshotter on `socket` in it.
fn with_block(text: &str, socket: &Path) -> Result<String, Failure> {
    let rest = without_block(text);
    let head = if rest.trim().is_empty() {
        // Understood by containerd 1.3 and every later one.
        "version = 2\n"
    } else {
        ""
    };
    let plugin = format!(
        "[proxy_plugins.{NAME}]\n  type = \"snapshot\"\n  address = {:?}\n",
        socket.display().to_string()
    );
    let gap = if rest.is_empty() || rest.ends_with('\n') {
        ""
    } else {
        "\n"
    };
    let result = format!("{rest}{gap}{BEGIN}\n{head}{plugin}{END}\n");
    match self::plugin(&rest) {
        Plugin::Absent => {}
        Plugin::Known(other) => {
            return Err(Failure::new(format!(
                "a proxy plugin called {NAME} is there already, on {}",
                other.display()
            ))
            .hint("remove it by hand, or leave it as it is"));
        }
        Plugin::Unreadable(why) => {
            return Err(Failure::new(format!("not valid TOML: {why}"))
                .hint("repair the file first; containerd cannot read it either"));
        }
    }
    match self::plugin(&result) {
        Plugin::Known(_) => Ok(result),
        _ => Err(Failure::new(
            "its proxy_plugins are written in one line, which a block cannot add to",
        )
        .hint(format!("add these lines by hand:\n\n{plugin}"))),
    }
}

/// The configuration without the block.
fn without_block(text: &str) -> String {
    let Some((before, rest)) = text.split_once(&format!("{BEGIN}\n")) else {
        return text.to_owned();
    };
    match rest.split_once(&format!("{END}\n")) {
        Some((_, after)) => format!("{before}{after}"),
        // A mark is lost: not ours any more.
        None => text.to_owned(),
    }
}

/// What is to be written.
#[derive(Debug)]
pub(super) struct Change {
    path: PathBuf,
    before: Option<String>,
    after: Option<String>,
    undo: bool,
}

impl Change {
    pub(super) fn setup(path: &Path, socket: &Path) -> Result<Self, Failure> {
        let before = read(path)?;
        let text = before.as_deref().unwrap_or_default();
        let is_set_up = plugin(text) == Plugin::Known(socket.to_owned());
        let after = match is_set_up {
            true => text.to_owned(),
            false => with_block(text, socket)
                .map_err(|failure| failure.prefixed(&format!("cannot edit {}", path.display())))?,
        };
        Ok(Self {
            path: path.to_owned(),
            before,
            after: Some(after),
            undo: false,
        })
    }

    pub(super) fn undo(path: &Path) -> Result<Self, Failure> {
        let before = read(path)?;
        let text = before.as_deref().unwrap_or_default();
        let stripped = without_block(text);
        let original = read(&path.with_extension(BACKUP))?;
        let after = match original {
            // Nobody touched the rest since: it comes back to the byte.
            Some(original) if original.trim_end() == stripped.trim_end() => Some(original),
            None if stripped.is_empty() && stripped != text => None,
            _ => before.is_some().then_some(stripped),
        };
        Ok(Self {
            path: path.to_owned(),
            before,
            after,
            undo: true,
        })
    }

    pub(super) fn is_nothing(&self) -> bool {
        self.before == self.after
    }

    pub(super) fn diff(&self) -> String {
        let name = |text: &Option<String>| match text {
            Some(_) => self.path.display().to_string(),
            None => "/dev/null".to_owned(),
        };
        similar::TextDiff::from_lines(
            self.before.as_deref().unwrap_or_default(),
            self.after.as_deref().unwrap_or_default(),
        )
        .unified_diff()
        .header(&name(&self.before), &name(&self.after))
        .to_string()
    }

    /// Makes the change. The file is the old one or the new one at every moment.
    pub(super) fn apply(&self) -> Result<(), Failure> {
        let backup = self.path.with_extension(BACKUP);
        if let Some(dir) = self.path.parent() {
            std::fs::create_dir_all(dir)
                .map_err(|error| super::super::failure::about_file("create", dir, &error))?;
        }
        if !self.undo
            && let Some(before) = &self.before
            && !before.contains(BEGIN)
        {
            write(&backup, before)?;
        }
        match &self.after {
            Some(text) => write(&self.path, text)?,
            None => remove(&self.path)?,
        }
        if self.undo {
            remove(&backup)?;
        }
        Ok(())
    }
}

/// How Kubernetes is told to use it: for the version of the file, or for both where it has none.
pub(super) fn advice(config: &Path) -> String {
    let text = std::fs::read_to_string(config).unwrap_or_default();
    let version = text
        .parse::<Table>()
        .ok()
        .and_then(|table| table.get("version")?.as_integer());
    let settings = format!("  snapshotter = \"{NAME}\"\n  disable_snapshot_annotations = false\n");
    let section = match version {
        Some(3..) => "[plugins.\"io.containerd.cri.v1.images\"]",
        _ => "[plugins.\"io.containerd.grpc.v1.cri\".containerd]",
    };
    format!(
        "Restart containerd. Clients name the snapshotter: `--snapshotter {NAME}`. For Kubernetes put \
         into {}, where the table is:\n\n{section}\n{settings}",
        config.display()
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    const SOCKET: &str = "/run/pantala/snapshotter.sock";

    fn set_up(path: &Path) {
        Change::setup(path, Path::new(SOCKET))
            .unwrap()
            .apply()
            .unwrap();
    }

    #[test]
    fn every_original_comes_back_to_the_byte() {
        for original in [
            "",
            "version = 2",
            "version = 3\n[plugins]\n\n",
            "# only this\n",
        ] {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("config.toml");
            std::fs::write(&path, original).unwrap();
            set_up(&path);
            let text = std::fs::read_to_string(&path).unwrap();
            assert_eq!(plugin(&text), Plugin::Known(SOCKET.into()), "{text}");
            assert!(
                Change::setup(&path, Path::new(SOCKET))
                    .unwrap()
                    .is_nothing()
            );
            Change::undo(&path).unwrap().apply().unwrap();
            assert_eq!(std::fs::read_to_string(&path).unwrap(), original);
            assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1);
            assert!(Change::undo(&path).unwrap().is_nothing());
        }
    }

    #[test]
    fn a_file_that_was_not_there_is_gone_again() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("containerd/config.toml");
        set_up(&path);
        let table: Table = std::fs::read_to_string(&path).unwrap().parse().unwrap();
        assert_eq!(table["version"].as_integer(), Some(2));
        Change::undo(&path).unwrap().apply().unwrap();
        assert!(!path.exists());
    }

    #[test]
    fn another_socket_takes_the_place_of_ours() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        set_up(&path);
        Change::setup(&path, Path::new("/run/other.sock"))
            .unwrap()
            .apply()
            .unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(plugin(&text), Plugin::Known("/run/other.sock".into()));
        assert_eq!(text.matches("proxy_plugins").count(), 1);
    }

    #[test]
    fn what_a_person_changed_since_is_kept() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        std::fs::write(&path, "version = 2\n").unwrap();
        set_up(&path);
        let text = std::fs::read_to_string(&path).unwrap() + "[debug]\nlevel = \"debug\"\n";
        std::fs::write(&path, text).unwrap();
        Change::undo(&path).unwrap().apply().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        assert_eq!(text, "version = 2\n[debug]\nlevel = \"debug\"\n");
    }

    #[test]
    fn what_cannot_be_edited_safely_is_refused() {
        for text in [
            "version =",
            "proxy_plugins = {}\n",
            "[proxy_plugins.pantala]\naddress = \"/elsewhere\"\n",
        ] {
            assert!(with_block(text, Path::new(SOCKET)).is_err(), "{text}");
        }
    }

    #[test]
    fn the_advice_is_for_the_generation_of_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("config.toml");
        assert!(advice(&path).contains("io.containerd.grpc.v1.cri\".containerd]"));
        std::fs::write(&path, "version = 3\n").unwrap();
        assert!(advice(&path).contains("io.containerd.cri.v1.images\"]"));
    }
}

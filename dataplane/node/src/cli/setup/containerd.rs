//! containerd's own configuration: whether it reads `certs.d` at all.

use std::path::Path;

use toml::{Table, Value};

/// Where the images plugin keeps its settings: the section of containerd 1.x (configuration
/// version 2) and that of containerd 2.x (version 3).
const SECTION_V2: &str = "io.containerd.grpc.v1.cri";
const SECTION_V3: &str = "io.containerd.cri.v1.images";

/// What containerd's configuration says about a `certs.d` directory.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum CertsDir {
    /// It is read.
    Read,
    /// It is not read; these lines in the configuration make it so.
    NotRead {
        /// What is set instead, if anything.
        instead: Option<String>,
        /// What to add.
        add: String,
    },
    /// It is set, together with the older way, which containerd refuses to start with.
    Conflict {
        /// The section with the older way.
        section: String,
    },
    /// The configuration cannot be read.
    Unknown(String),
}

/// Checks `config` (containerd's `config.toml`) for `certs_dir`.
pub(crate) fn check(config: &Path, certs_dir: &Path) -> CertsDir {
    match std::fs::read_to_string(config) {
        Ok(text) => check_text(&text, certs_dir),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => check_text("", certs_dir),
        Err(e) => CertsDir::Unknown(format!("cannot read {}: {e}", config.display())),
    }
}

fn check_text(text: &str, certs_dir: &Path) -> CertsDir {
    let table: Table = match text.parse() {
        Ok(table) => table,
        Err(e) => return CertsDir::Unknown(format!("not valid TOML: {}", first_line(&e))),
    };
    let version = table.get("version").and_then(Value::as_integer);
    let section = match version {
        Some(3..) => SECTION_V3,
        _ => SECTION_V2,
    };
    let registry = table
        .get("plugins")
        .and_then(|plugins| plugins.get(section))
        .and_then(|plugin| plugin.get("registry"));
    let path = registry
        .and_then(|registry| registry.get("config_path"))
        .and_then(Value::as_str)
        .filter(|path| !path.is_empty());
    // The list is separated as in $PATH.
    let is_read = path.is_some_and(|path| path.split(':').any(|dir| Path::new(dir) == certs_dir));
    let is_set = |key| {
        registry
            .and_then(|registry| registry.get(key))
            .and_then(Value::as_table)
            .is_some_and(|table| !table.is_empty())
    };
    if is_read {
        return match is_set("mirrors") {
            true => CertsDir::Conflict {
                section: format!("plugins.\"{section}\".registry.mirrors"),
            },
            false => CertsDir::Read,
        };
    }
    let section_text = format!(
        "[plugins.\"{section}\".registry]\n  config_path = \"{}\"\n",
        certs_dir.display()
    );
    CertsDir::NotRead {
        instead: path.map(str::to_owned),
        add: match (text.trim().is_empty(), version) {
            (true, _) => format!(
                "version = 2\n{section_text}\nor, for containerd 2:\n\nversion = 3\n{}",
                section_text.replace(SECTION_V2, SECTION_V3)
            ),
            (false, None | Some(1)) => format!("version = 2\n{section_text}"),
            _ => section_text,
        },
    }
}

fn first_line(error: &toml::de::Error) -> String {
    error
        .message()
        .lines()
        .next()
        .unwrap_or_default()
        .to_owned()
}

impl CertsDir {
    /// For a person; nothing where all is well.
    pub(crate) fn advice(&self, config: &Path, certs_dir: &Path) -> Option<String> {
        let (config, certs_dir) = (config.display(), certs_dir.display());
        match self {
            Self::Read => None,
            Self::NotRead { instead, add } => {
                let but = match instead {
                    Some(path) => format!(" (it reads {path:?})"),
                    None => String::new(),
                };
                Some(format!(
                    "Kubernetes' pulls (CRI) do not read {certs_dir}{but}. In {config} put:\n\n{add}\n\
                     and restart containerd. If an imported file sets it, all is well. `ctr` needs \
                     `--hosts-dir {certs_dir}` in any case."
                ))
            }
            Self::Conflict { section } => Some(format!(
                "{config} sets both config_path and {section}; containerd's CRI does not start with \
                 both. Move the mirrors to {certs_dir} and remove that section."
            )),
            Self::Unknown(why) => Some(format!(
                "cannot tell whether containerd reads {certs_dir}: {config}: {why}"
            )),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> CertsDir {
        check_text(text, Path::new("/etc/containerd/certs.d"))
    }

    #[test]
    fn both_generations_of_containerd_are_understood() {
        for text in [
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/etc/containerd/certs.d\"",
            "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = '/etc/containerd/certs.d:/etc/docker/certs.d'",
            "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/etc/containerd/certs.d/\"",
        ] {
            assert_eq!(of(text), CertsDir::Read, "{text}");
        }
    }

    #[test]
    fn what_to_add_is_valid_for_the_generation() {
        for (text, section) in [
            ("version = 2\n[plugins]", SECTION_V2),
            ("version = 3\n", SECTION_V3),
            ("root = \"/x\"\n", SECTION_V2),
        ] {
            let CertsDir::NotRead { instead: None, add } = of(text) else {
                panic!("{text}: {:?}", of(text));
            };
            let added: Table = add.parse().unwrap();
            let path = &added["plugins"][section]["registry"]["config_path"];
            assert_eq!(path.as_str(), Some("/etc/containerd/certs.d"));
        }
        let CertsDir::NotRead { add, .. } = of("") else {
            panic!("{:?}", of(""));
        };
        assert!(add.contains(SECTION_V2) && add.contains(SECTION_V3));
    }

    #[test]
    fn another_directory_and_old_mirrors_are_reported() {
        let elsewhere = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/other\"";
        assert!(
            matches!(of(elsewhere), CertsDir::NotRead { instead: Some(path), .. } if path == "/other")
        );
        let both = "version = 2\n[plugins.\"io.containerd.grpc.v1.cri\".registry]\nconfig_path = \"/etc/containerd/certs.d\"\n[plugins.\"io.containerd.grpc.v1.cri\".registry.mirrors.\"a.test\"]\nendpoint = []";
        assert!(matches!(of(both), CertsDir::Conflict { .. }));
        assert!(matches!(of("a ="), CertsDir::Unknown(_)));
    }
}

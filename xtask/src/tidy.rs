//! The rules of the house that no compiler knows, as ordinary tests.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

use crate::cargo::workspace_root;

/// Past this, a file is two things.
const FILE_LINES_MAX: usize = 600;
/// Crates that may hold `unsafe`, each in one module: they are the boundary to the kernel.
const UNSAFE_ALLOWED: &[&str] = &["pantala-store", "pantala-supervisor", "pantala-uring"];
/// Who may use whom. A crate that is not listed may use none of the others.
const ARROWS: &[(&str, &[&str])] = &[
    ("pantala-wire", &[]),
    ("pantala-uring", &[]),
    ("pantala-swarm", &["pantala-wire"]),
    (
        "pantala-store",
        &["pantala-wire", "pantala-swarm", "pantala-uring"],
    ),
    ("pantala-source", &["pantala-wire", "pantala-swarm"]),
    ("pantala-mirror", &["pantala-wire", "pantala-swarm"]),
    ("pantala-supervisor", &[]),
    (
        "pantala-lazy",
        &[
            "pantala-wire",
            "pantala-supervisor",
            "pantala-swarm",
            "pantala-uring",
        ],
    ),
    (
        "pantala-quic",
        &["pantala-wire", "pantala-swarm", "pantala-uring"],
    ),
    ("pantala-control", &["pantala-wire"]),
    ("pantala-snapshotter", &["pantala-lazy", "pantala-wire"]),
    (
        "pantala-node",
        &[
            "pantala-control",
            "pantala-lazy",
            "pantala-mirror",
            "pantala-quic",
            "pantala-snapshotter",
            "pantala-source",
            "pantala-store",
            "pantala-swarm",
            "pantala-uring",
            "pantala-wire",
        ],
    ),
    (
        "pantala-perf",
        &[
            "pantala-control",
            "pantala-quic",
            "pantala-store",
            "pantala-wire",
        ],
    ),
    (
        "pantala-sim",
        &["pantala-control", "pantala-swarm", "pantala-wire"],
    ),
    ("xtask", &[]),
];
/// Crates that decide: no runtime, no sockets, no clocks.
const CORES: &[&str] = &["pantala-wire", "pantala-swarm"];
/// What a core must not depend on.
const SHELL_CRATES: &[&str] = &[
    "tokio",
    "tokio-util",
    "tokio-stream",
    "hyper",
    "hyper-util",
    "reqwest",
    "quinn",
    "tonic",
    "rustix",
    "mio",
    "async-std",
    "smol",
    "rand",
    "fastrand",
    "getrandom",
    "tracing-subscriber",
];
/// What a core must not call.
const SHELL_CALLS: &[&str] = &[
    "TcpStream",
    "TcpListener",
    "UdpSocket",
    "std::fs",
    "std::thread",
    "Instant::now",
    "SystemTime::now",
    "tokio::",
    "SystemRandom",
];

/// One member of the workspace.
struct Member {
    name: String,
    dir: PathBuf,
    manifest: toml::Table,
}

fn members() -> Vec<Member> {
    let root = workspace_root();
    let manifest: toml::Table = read(&root.join("Cargo.toml"))
        .parse()
        .expect("the workspace's manifest parses");
    let patterns = manifest["workspace"]["members"]
        .as_array()
        .expect("members is a list");
    let mut members = Vec::new();
    for pattern in patterns {
        let pattern = pattern.as_str().expect("a member is a string");
        let dirs = match pattern.strip_suffix("/*") {
            Some(parent) => entries(&root.join(parent))
                .into_iter()
                .filter(|dir| dir.is_dir())
                .collect(),
            None => vec![root.join(pattern)],
        };
        for dir in dirs {
            let manifest: toml::Table = read(&dir.join("Cargo.toml"))
                .parse()
                .expect("a manifest parses");
            let name = manifest["package"]["name"]
                .as_str()
                .expect("a package has a name")
                .to_owned();
            members.push(Member {
                name,
                dir,
                manifest,
            });
        }
    }
    members
}

fn read(path: &Path) -> String {
    fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

fn entries(dir: &Path) -> Vec<PathBuf> {
    let mut entries: Vec<_> = fs::read_dir(dir)
        .map(|entries| entries.flatten().map(|entry| entry.path()).collect())
        .unwrap_or_default();
    entries.sort();
    entries
}

/// All files below `dir` but for what is built or downloaded.
fn files_below(dir: &Path, found: &mut Vec<PathBuf>) {
    for path in entries(dir) {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if matches!(
            name.as_ref(),
            "target" | ".git" | "corpus" | "artifacts" | "shared"
        ) {
            continue;
        }
        if path.is_dir() {
            files_below(&path, found);
        } else {
            found.push(path);
        }
    }
}

fn all_files(extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    files_below(workspace_root(), &mut found);
    found.retain(|path| {
        let extension = path.extension().unwrap_or_default().to_string_lossy();
        extensions.is_empty() || extensions.contains(&extension.as_ref())
    });
    found
}

fn shown(path: &Path) -> String {
    path.strip_prefix(workspace_root())
        .unwrap_or(path)
        .display()
        .to_string()
}

fn dependencies(member: &Member, table: &str) -> BTreeSet<String> {
    member
        .manifest
        .get(table)
        .and_then(toml::Value::as_table)
        .map(|table| table.keys().cloned().collect())
        .unwrap_or_default()
}

fn assert_none(violations: &[String], rule: &str) {
    assert!(
        violations.is_empty(),
        "{rule}\n  {}",
        violations.join("\n  ")
    );
}

#[test]
fn arrows_between_crates_point_down_only() {
    let members = members();
    let allowed: BTreeMap<_, _> = ARROWS.iter().copied().collect();
    let own: BTreeSet<&str> = members.iter().map(|member| member.name.as_str()).collect();
    let mut violations = Vec::new();
    for member in &members {
        let Some(allowed) = allowed.get(member.name.as_str()) else {
            violations.push(format!("{} has no place in ARROWS", member.name));
            continue;
        };
        for table in ["dependencies", "dev-dependencies", "build-dependencies"] {
            for dependency in dependencies(member, table) {
                if own.contains(dependency.as_str()) && !allowed.contains(&dependency.as_str()) {
                    violations.push(format!("{} must not depend on {dependency}", member.name));
                }
            }
        }
    }
    assert_none(
        &violations,
        "node -> {mirror, source, quic, store, control} -> {swarm, wire, uring}",
    );
}

#[test]
fn cores_depend_on_no_runtime_and_read_no_clock() {
    let mut violations = Vec::new();
    for member in members() {
        let is_core = CORES.contains(&member.name.as_str());
        if is_core {
            for dependency in dependencies(&member, "dependencies") {
                if SHELL_CRATES.contains(&dependency.as_str()) {
                    violations.push(format!("{} depends on {dependency}", member.name));
                }
            }
        }
        // These cores are modules, not crates.
        let source = match member.name.as_str() {
            "pantala-control" | "pantala-snapshotter" => member.dir.join("src/core"),
            _ if is_core => member.dir.join("src"),
            _ => continue,
        };
        let mut files = Vec::new();
        files_below(&source, &mut files);
        for file in files {
            for (number, line) in read(&file).lines().enumerate() {
                let code = line.trim_start();
                if !code.starts_with("//") && SHELL_CALLS.iter().any(|call| code.contains(call)) {
                    violations.push(format!("{}:{}: {code}", shown(&file), number + 1));
                }
            }
        }
    }
    assert_none(
        &violations,
        "what decides takes time, randomness and bytes as arguments",
    );
}

#[test]
fn unsafe_code_is_forbidden_where_it_is_not_the_job() {
    let mut violations = Vec::new();
    for member in members() {
        for file in ["src/lib.rs", "src/main.rs"].map(|file| member.dir.join(file)) {
            if !file.exists() {
                continue;
            }
            let text = read(&file);
            let forbidden = text.contains("#![forbid(unsafe_code)]");
            let denied = text.contains("#![deny(unsafe_code)]");
            let allowed = UNSAFE_ALLOWED.contains(&member.name.as_str());
            if !(forbidden || allowed && denied) {
                violations.push(shown(&file));
            }
        }
    }
    assert_none(&violations, "these crates lack #![forbid(unsafe_code)]");
}

#[test]
fn files_are_one_thing() {
    let violations: Vec<String> = all_files(&["rs"])
        .iter()
        .map(|file| (shown(file), read(file).lines().count()))
        .filter(|(_, lines)| *lines > FILE_LINES_MAX)
        .map(|(file, lines)| format!("{file}: {lines} lines"))
        .collect();
    assert_none(
        &violations,
        &format!("past {FILE_LINES_MAX} lines a file is two things"),
    );
}

#[test]
fn modules_are_named_after_what_they_are() {
    let vague = [
        "util", "utils", "common", "helper", "helpers", "manager", "misc",
    ];
    let violations: Vec<String> = all_files(&["rs"])
        .iter()
        .filter(|file| {
            let own = file.file_stem().unwrap_or_default().to_string_lossy();
            let folder = file
                .parent()
                .and_then(Path::file_name)
                .unwrap_or_default()
                .to_string_lossy();
            vague.contains(&own.as_ref()) || own == "mod" && vague.contains(&folder.as_ref())
        })
        .map(|file| shown(file))
        .collect();
    assert_none(&violations, "a name must say what is inside");
}

#[test]
fn every_crate_says_what_it_is() {
    let mut violations = Vec::new();
    for member in members() {
        for file in ["src/lib.rs", "src/main.rs"].map(|file| member.dir.join(file)) {
            if file.exists() && !read(&file).starts_with("//!") {
                violations.push(shown(&file));
            }
        }
        let package = &member.manifest["package"];
        if package.get("description").is_none() {
            violations.push(format!("{} has no description", member.name));
        }
        if member.manifest.get("lints").is_none() {
            violations.push(format!(
                "{} does not take the workspace's lints",
                member.name
            ));
        }
    }
    assert_none(&violations, "these lack a head or a line of the manifest");
}

#[test]
fn the_architecture_page_maps_every_crate() {
    let page = read(&workspace_root().join("docs/architecture.md"));
    let violations: Vec<String> = members()
        .iter()
        .map(|member| shown(&member.dir))
        .filter(|dir| !page.contains(&format!("`{dir}`")))
        .collect();
    assert_none(&violations, "docs/architecture.md does not name these");
}

#[test]
fn decisions_are_numbered_without_gaps() {
    let mut expected = 1;
    for path in entries(&workspace_root().join("docs/decisions")) {
        let name = path
            .file_name()
            .unwrap_or_default()
            .to_string_lossy()
            .into_owned();
        if name == "README.md" {
            continue;
        }
        let number = name
            .split('-')
            .next()
            .and_then(|number| number.parse::<u32>().ok());
        assert_eq!(
            number,
            Some(expected),
            "docs/decisions/{name} should begin with {expected:04}-"
        );
        assert!(
            read(&path).starts_with("# "),
            "docs/decisions/{name} has no title"
        );
        expected += 1;
    }
}

#[test]
fn links_between_pages_lead_somewhere() {
    let mut violations = Vec::new();
    for page in all_files(&["md"]) {
        let text = read(&page);
        for link in text
            .split("](")
            .skip(1)
            .filter_map(|rest| rest.split(')').next())
        {
            let target = link.split('#').next().unwrap_or_default();
            if target.is_empty() || target.contains("://") || target.contains(' ') {
                continue;
            }
            if !page.parent().is_some_and(|dir| dir.join(target).exists()) {
                violations.push(format!("{}: {link}", shown(&page)));
            }
        }
    }
    assert_none(&violations, "these links are broken");
}

#[test]
fn nothing_names_the_machine_it_was_made_on() {
    // Put together here, so that this file does not hold what it looks for.
    let forbidden = [
        ["/wo", "rk/"].concat(),
        [".lib", "rary"].concat(),
        ["/ro", "ot/"].concat(),
        ["cargo-", "proxy"].concat(),
        ["artifact", "ory"].concat(),
    ];
    let mut violations = Vec::new();
    for file in all_files(&[]) {
        let Ok(text) = fs::read_to_string(&file) else {
            continue;
        };
        for (number, line) in text.lines().enumerate() {
            if forbidden.iter().any(|word| line.contains(word.as_str())) {
                violations.push(format!("{}:{}", shown(&file), number + 1));
            }
        }
    }
    assert_none(
        &violations,
        "these lines name paths or hosts of one machine",
    );
}

#[test]
fn metrics_are_documented_and_documented_metrics_exist() {
    let root = workspace_root();
    let is_name = |word: &str| {
        word.strip_prefix("pantala_").is_some_and(|rest| {
            !rest.is_empty()
                && rest
                    .bytes()
                    .all(|byte| byte.is_ascii_lowercase() || byte == b'_')
        })
    };
    let source = read(&root.join("dataplane/node/src/metrics.rs"));
    let registered = source.split("#[cfg(test)]").next().unwrap_or_default();
    let in_code: BTreeSet<&str> = registered
        .split('"')
        .skip(1)
        .step_by(2)
        .filter(|word| is_name(word))
        .collect();
    let page = read(&root.join("docs/metrics.md"));
    let in_docs: BTreeSet<&str> = page
        .split('`')
        .skip(1)
        .step_by(2)
        .filter(|word| is_name(word))
        .collect();
    assert!(
        !in_code.is_empty(),
        "no metric found in dataplane/node/src/metrics.rs"
    );
    let undocumented: Vec<_> = in_code.difference(&in_docs).collect();
    let invented: Vec<_> = in_docs.difference(&in_code).collect();
    assert!(
        undocumented.is_empty(),
        "not in docs/metrics.md: {undocumented:?}"
    );
    assert!(
        invented.is_empty(),
        "in docs/metrics.md but not in the program: {invented:?}"
    );
}

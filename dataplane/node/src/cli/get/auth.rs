//! Whose name the registry is asked in: the command line's, or that of a login of the container tools.

use std::collections::BTreeMap;
use std::io::{ErrorKind, Read};
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use pantala_source::Credential;
use serde::Deserialize;

use super::super::args::GetArgs;
use super::super::failure::{Failure, about_file};

/// No password is longer.
const PASSWORD_MAX_BYTES: u64 = 64 << 10;
/// No login file is longer.
const FILE_MAX_BYTES: u64 = 4 << 20;
/// What docker calls Docker Hub in its logins.
const DOCKER_HUB_KEY: &str = "https://index.docker.io/v1/";

/// The login of `--user` and `--password-stdin`, if given.
pub(super) fn login_of_arguments(args: &GetArgs) -> Result<Option<Credential>, Failure> {
    login(args.user.as_deref())
}

/// The login of this user, if one is named, with the password from stdin.
pub(in crate::cli) fn login(user: Option<&str>) -> Result<Option<Credential>, Failure> {
    let Some(user) = user else {
        return Ok(None);
    };
    let mut password = String::new();
    std::io::stdin()
        .lock()
        .take(PASSWORD_MAX_BYTES)
        .read_to_string(&mut password)
        .map_err(|e| Failure::new(format!("cannot read the password from stdin: {e}")))?;
    // `echo` ends its line, and no password ends in one.
    let password = password.trim_end_matches(['\r', '\n']);
    if password.is_empty() {
        return Err(Failure::usage("the password on stdin is empty")
            .hint("write it there: `pantala get|mount ... --password-stdin < FILE`"));
    }
    Ok(Some(Credential::login(user, password)))
}

/// The stored login for `repository` of `registry`, or nobody's name.
pub(in crate::cli) fn stored(
    file: Option<&Path>,
    registry: &str,
    repository: &str,
) -> Result<Credential, Failure> {
    if let Some(file) = file {
        let logins = Logins::read(file)?.ok_or_else(|| {
            Failure::usage(format!("{} does not exist", file.display()))
                .hint("log in first, or leave --auth-file out")
        })?;
        return logins.credential(file, registry, repository);
    }
    for file in default_files() {
        if let Some(logins) = Logins::read(&file)?
            && let found = logins.credential(&file, registry, repository)?
            && !found.is_anonymous()
        {
            return Ok(found);
        }
    }
    Ok(Credential::ANONYMOUS)
}

/// Where podman, skopeo and docker keep logins, in the order in which they are looked at.
fn default_files() -> Vec<PathBuf> {
    let var = |name| std::env::var_os(name).map(PathBuf::from);
    let home = var("HOME");
    let below_home = |path: &str| home.as_ref().map(|home| home.join(path));
    [
        var("REGISTRY_AUTH_FILE"),
        var("XDG_RUNTIME_DIR").map(|dir| dir.join("containers/auth.json")),
        below_home(".config/containers/auth.json"),
        var("DOCKER_CONFIG")
            .map(|dir| dir.join("config.json"))
            .or_else(|| below_home(".docker/config.json")),
    ]
    .into_iter()
    .flatten()
    .collect()
}

/// A login file: docker's `config.json` and podman's `auth.json` have the same shape. It has no
/// `Debug`: it holds passwords.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Logins {
    auths: BTreeMap<String, Login>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct Login {
    auth: String,
    identitytoken: String,
}

impl Logins {
    fn read(file: &Path) -> Result<Option<Self>, Failure> {
        let handle = match std::fs::File::open(file) {
            Ok(handle) => handle,
            Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(about_file("read the logins in", file, &e)),
        };
        let mut text = String::new();
        handle
            .take(FILE_MAX_BYTES)
            .read_to_string(&mut text)
            .map_err(|e| about_file("read the logins in", file, &e))?;
        // The parser's own words could repeat a secret.
        serde_json::from_str(&text).map(Some).map_err(|e| {
            Failure::new(format!(
                "{} is not a login file (line {})",
                file.display(),
                e.line()
            ))
            .hint("log in again, or name another file with --auth-file")
        })
    }

    fn credential(
        &self,
        file: &Path,
        registry: &str,
        repository: &str,
    ) -> Result<Credential, Failure> {
        let Some(login) = self.find(registry, repository) else {
            return Ok(Credential::ANONYMOUS);
        };
        if login.auth.is_empty() {
            return match login.identitytoken.is_empty() {
                // The password is with a credential helper.
                true => Ok(Credential::ANONYMOUS),
                false => Err(Failure::new(format!(
                    "{} holds an identity token for {registry}, which is not supported",
                    file.display()
                ))
                .hint("give --user and --password-stdin")),
            };
        }
        STANDARD
            .decode(login.auth.trim())
            .ok()
            .and_then(|bytes| String::from_utf8(bytes).ok())
            .and_then(|text| {
                let (user, password) = text.split_once(':')?;
                Some(Credential::login(user, password.trim_end_matches('\0')))
            })
            .ok_or_else(|| {
                Failure::new(format!(
                    "{} holds a malformed login for {registry}",
                    file.display()
                ))
                .hint("log in again, or give --user and --password-stdin")
            })
    }

    /// The most special login: podman's may be for a part of a registry.
    fn find(&self, registry: &str, repository: &str) -> Option<&Login> {
        let mut path = format!("{registry}/{repository}");
        loop {
            if let Some(login) = self.auths.get(&path) {
                return Some(login);
            }
            match path.rfind('/') {
                Some(at) => path.truncate(at),
                None => break,
            }
        }
        let is_same = |key: &str| {
            let key = key
                .trim_start_matches("https://")
                .trim_start_matches("http://");
            key.split('/').next() == Some(registry)
        };
        let of_url = || {
            let mut urls = self.auths.iter().filter(|(key, _)| key.contains("://"));
            urls.find(|(key, _)| is_same(key)).map(|(_, login)| login)
        };
        match registry {
            "docker.io" => self.auths.get(DOCKER_HUB_KEY).or_else(of_url),
            _ => of_url(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn user(json: &str, registry: &str, repository: &str) -> Option<String> {
        let logins: Logins = serde_json::from_str(json).unwrap();
        match logins.credential(Path::new("f"), registry, repository) {
            Ok(Credential::Login { user, .. }) => Some(user),
            Ok(_) => None,
            Err(failure) => Some(failure.to_string()),
        }
    }

    fn entry(key: &str, user: &str) -> String {
        format!(
            "\"{key}\":{{\"auth\":\"{}\"}}",
            STANDARD.encode(format!("{user}:pw:x"))
        )
    }

    #[test]
    fn the_most_special_login_is_taken() {
        let json = format!(
            "{{\"auths\":{{{},{},{},{}}}}}",
            entry("r.test:5000", "wide"),
            entry("r.test:5000/team", "narrow"),
            entry("https://old.test/v2/", "url"),
            entry(DOCKER_HUB_KEY, "hub"),
        );
        let of = |registry, repository| user(&json, registry, repository);
        assert_eq!(of("r.test:5000", "other/app").as_deref(), Some("wide"));
        assert_eq!(of("r.test:5000", "team/app").as_deref(), Some("narrow"));
        assert_eq!(of("old.test", "x").as_deref(), Some("url"));
        assert_eq!(of("docker.io", "library/x").as_deref(), Some("hub"));
        assert_eq!(of("r.test", "team/app"), None);
        assert_eq!(of("none.test", "x"), None);
    }

    #[test]
    fn logins_that_cannot_be_used_are_errors_without_secrets() {
        let bad = r#"{"auths":{"a":{"auth":"c2VjcmV0"},"b":{"identitytoken":"secret"},"c":{}}}"#;
        for registry in ["a", "b"] {
            let text = user(bad, registry, "x").unwrap();
            assert!(
                text.contains("--password-stdin") && !text.contains("secret"),
                "{text}"
            );
        }
        assert_eq!(user(bad, "c", "x"), None);
    }
}

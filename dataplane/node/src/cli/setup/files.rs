//! The files of `certs.d`: what would change, how it is shown, made and taken back.

use std::io::{ErrorKind, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use super::super::failure::{Failure, about_file};
use super::hosts::{self, MergeError, Origin};

/// Beside `hosts.toml`: the file as it was before the setup. containerd does not look at it.
const BACKUP: &str = "hosts.toml.before-pantala";
/// No honest `hosts.toml` is larger.
const FILE_MAX_BYTES: u64 = 1 << 20;
/// New files are readable by all, as containerd may run with a user namespace: they hold no secret.
const MODE: u32 = 0o644;

/// CA files, and pairs of client certificate and key.
type Certificates = (Vec<String>, Vec<[String; 2]>);

/// One file with what it holds and what it shall hold.
#[derive(Debug)]
pub(super) struct Change {
    path: PathBuf,
    before: Option<String>,
    after: Option<String>,
    undo: bool,
}

impl Change {
    /// What the setup of the registry directory `dir` changes.
    pub(super) fn setup(dir: &Path, mirror: &str, mut origin: Origin) -> Result<Self, Failure> {
        let path = dir.join("hosts.toml");
        let before = read(&path)?;
        if before.as_deref().is_none_or(hosts::is_wholly_ours) {
            (origin.ca, origin.client) = certificates(dir)?;
        }
        let after = hosts::with_mirror(before.as_deref(), mirror, &origin)
            .map_err(|e| refused(&path, mirror, &e))?;
        Ok(Self {
            path,
            before,
            after: Some(after),
            undo: false,
        })
    }

    /// What taking the setup back changes; nothing where there was none.
    pub(super) fn undo(dir: &Path) -> Result<Option<Self>, Failure> {
        let path = dir.join("hosts.toml");
        let Some(before) = read(&path)? else {
            return Ok(None);
        };
        if !hosts::has_block(&before) {
            return Ok(None);
        }
        let stripped = hosts::without_block(&before);
        let after = match read(&dir.join(BACKUP))? {
            // Nobody touched the rest since: the file comes back to the byte.
            Some(original) if is_untouched(&original, &stripped) => Some(original),
            None if hosts::is_wholly_ours(&before) => None,
            _ => Some(stripped),
        };
        Ok(Some(Self {
            path,
            before: Some(before),
            after,
            undo: true,
        }))
    }

    pub(super) fn is_nothing(&self) -> bool {
        self.before == self.after
    }

    /// The change as a unified diff.
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
        let dir = self.path.parent().unwrap_or(Path::new("/"));
        let backup = dir.join(BACKUP);
        match &self.after {
            Some(text) if self.undo => {
                write(&self.path, text)?;
                remove(&backup)
            }
            Some(text) => {
                std::fs::create_dir_all(dir).map_err(|e| about_file("create", dir, &e))?;
                // The backup is the file without our block: a second setup must not replace it.
                if let Some(before) = &self.before
                    && !hosts::has_block(before)
                {
                    write(&backup, before)?;
                }
                write(&self.path, text)
            }
            None => {
                remove(&self.path)?;
                remove(&backup)?;
                // Gone only if nothing else is in it, such as certificates.
                let _ = std::fs::remove_dir(dir);
                Ok(())
            }
        }
    }
}

/// Whether `stripped` is `original`; the setup ends a last line that has no end.
fn is_untouched(original: &str, stripped: &str) -> bool {
    stripped == original || stripped.strip_suffix('\n') == Some(original)
}

fn refused(path: &Path, mirror: &str, error: &MergeError) -> Failure {
    let failure = Failure::new(format!("cannot edit {}: {error}", path.display()));
    match error {
        MergeError::Syntax(_) => {
            failure.hint("repair the file first; containerd cannot read it either")
        }
        MergeError::NotFirst(_) => failure
            .hint("containerd asks the hosts in their order: move that one to the front by hand"),
        MergeError::Form => failure.hint(format!(
            "add these lines in front of its other hosts by hand:\n{}",
            hosts::host_block(mirror)
        )),
    }
}

pub(super) fn read(path: &Path) -> Result<Option<String>, Failure> {
    match std::fs::metadata(path) {
        Ok(meta) if meta.len() > FILE_MAX_BYTES => {
            return Err(Failure::new(format!(
                "{} is larger than {FILE_MAX_BYTES} bytes",
                path.display()
            ))
            .hint("that is not a hosts.toml; move it away"));
        }
        _ => {}
    }
    match std::fs::read_to_string(path) {
        Ok(text) => Ok(Some(text)),
        Err(e) if e.kind() == ErrorKind::NotFound => Ok(None),
        Err(e) => Err(about_file("read", path, &e)),
    }
}

pub(super) fn write(path: &Path, text: &str) -> Result<(), Failure> {
    let fail = |e: std::io::Error| about_file("write", path, &e);
    // A link stays a link: what it points to is replaced.
    let target = std::fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let mode = std::fs::metadata(&target).map_or(MODE, |meta| meta.permissions().mode());
    let dir = target.parent().unwrap_or(Path::new("/"));
    let mut file = tempfile::NamedTempFile::new_in(dir).map_err(fail)?;
    file.write_all(text.as_bytes()).map_err(fail)?;
    file.as_file()
        .set_permissions(std::fs::Permissions::from_mode(mode))
        .map_err(fail)?;
    file.as_file().sync_all().map_err(fail)?;
    file.persist(&target).map_err(|e| fail(e.error))?;
    Ok(())
}

pub(super) fn remove(path: &Path) -> Result<(), Failure> {
    match std::fs::remove_file(path) {
        Err(e) if e.kind() != ErrorKind::NotFound => Err(about_file("remove", path, &e)),
        _ => Ok(()),
    }
}

/// The certificates that containerd takes from a directory without `hosts.toml`: each `*.crt` is a
/// CA, each `*.cert` with a `*.key` a client certificate.
fn certificates(dir: &Path) -> Result<Certificates, Failure> {
    let entries = match std::fs::read_dir(dir) {
        Ok(entries) => entries,
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok((Vec::new(), Vec::new())),
        Err(e) => return Err(about_file("read", dir, &e)),
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.map_err(|e| about_file("read", dir, &e))?;
        names.extend(entry.file_name().into_string());
    }
    names.sort();
    let ca = names.iter().filter(|n| n.ends_with(".crt")).cloned();
    let client = names.iter().filter_map(|name| {
        let key = format!("{}.key", name.strip_suffix(".cert")?);
        names.contains(&key).then(|| [name.clone(), key])
    });
    Ok((ca.collect(), client.collect()))
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIRROR: &str = "http://127.0.0.1:65001";

    fn origin() -> Origin {
        Origin {
            server: Some("https://r.test".into()),
            ..Origin::default()
        }
    }

    fn set_up(dir: &Path) {
        Change::setup(dir, MIRROR, origin())
            .unwrap()
            .apply()
            .unwrap();
    }

    fn take_back(dir: &Path) {
        Change::undo(dir).unwrap().unwrap().apply().unwrap();
    }

    #[test]
    fn undo_restores_every_original_to_the_byte() {
        for original in [
            "",
            "\n\n\n",
            "server = \"x\"",
            "server = \"x\"\r\n\r\n[host.\"https://a.test\"]\r\n",
            "\n\n[host.\"https://a.test\"]\n\n\n",
            "# pure comment\n\n",
        ] {
            let root = tempfile::tempdir().unwrap();
            let dir = root.path().join("r.test");
            std::fs::create_dir(&dir).unwrap();
            let file = dir.join("hosts.toml");
            std::fs::write(&file, original).unwrap();
            set_up(&dir);
            set_up(&dir);
            assert!(Change::setup(&dir, MIRROR, origin()).unwrap().is_nothing());
            assert_ne!(std::fs::read_to_string(&file).unwrap(), original);
            take_back(&dir);
            assert_eq!(
                std::fs::read_to_string(&file).unwrap(),
                original,
                "{original:?}"
            );
            assert!(!dir.join(BACKUP).exists());
            assert!(Change::undo(&dir).unwrap().is_none());
        }
    }

    #[test]
    fn undo_removes_what_was_made_and_nothing_else() {
        let root = tempfile::tempdir().unwrap();
        let made = root.path().join("made.test");
        set_up(&made);
        take_back(&made);
        assert!(!made.exists());

        let kept = root.path().join("kept.test");
        std::fs::create_dir(&kept).unwrap();
        std::fs::write(kept.join("ca.crt"), "pem").unwrap();
        set_up(&kept);
        let text = std::fs::read_to_string(kept.join("hosts.toml")).unwrap();
        assert!(text.contains("ca = [\"ca.crt\"]"), "{text}");
        take_back(&kept);
        assert!(kept.join("ca.crt").exists() && !kept.join("hosts.toml").exists());
    }

    #[test]
    fn undo_keeps_what_was_edited_after_the_setup() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("hosts.toml");
        std::fs::write(&file, "server = \"x\"\n").unwrap();
        set_up(root.path());
        let edited = std::fs::read_to_string(&file).unwrap() + "\n[host.\"https://mine.test\"]\n";
        std::fs::write(&file, edited).unwrap();
        take_back(root.path());
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(
            text.contains("mine.test") && !text.contains(MIRROR),
            "{text}"
        );
        assert!(text.contains("server = \"x\""));
    }

    #[test]
    fn links_and_modes_are_kept() {
        let root = tempfile::tempdir().unwrap();
        let real = root.path().join("real.toml");
        std::fs::write(&real, "server = \"x\"\n").unwrap();
        std::fs::set_permissions(&real, std::fs::Permissions::from_mode(0o600)).unwrap();
        let dir = root.path().join("r.test");
        std::fs::create_dir(&dir).unwrap();
        std::os::unix::fs::symlink("../real.toml", dir.join("hosts.toml")).unwrap();
        set_up(&dir);
        assert!(dir.join("hosts.toml").is_symlink());
        assert!(std::fs::read_to_string(&real).unwrap().contains(MIRROR));
        let mode = std::fs::metadata(&real).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn odd_files_are_errors_with_a_way_out() {
        let root = tempfile::tempdir().unwrap();
        let file = root.path().join("hosts.toml");
        for odd in [
            &b"\xff\xfe"[..],
            b"server =",
            b"host = {}",
            &vec![b'#'; 2 << 20][..],
        ] {
            std::fs::write(&file, odd).unwrap();
            let failure = Change::setup(root.path(), MIRROR, origin()).unwrap_err();
            assert!(failure.to_string().contains("hosts.toml"), "{failure}");
            assert_eq!(std::fs::read(&file).unwrap(), odd);
        }
    }
}

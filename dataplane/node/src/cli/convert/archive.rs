//! What an entry of a layer's archive means, and where it may go. Pure.

use std::path::{Component, Path, PathBuf};

/// Names that say what is not there any more: the image specification's "Whiteouts".
const WHITEOUT: &str = ".wh.";
const OPAQUE: &str = ".wh..wh..opq";
/// Longest path that the kernel takes.
const PATH_LEN_MAX: usize = 4096;
/// How archives name an extended attribute.
const XATTR_KEY: &str = "SCHILY.xattr.";
/// overlayfs' own attributes send a reader to other files: only we may set them.
const OVERLAY_XATTRS: [&str; 2] = ["trusted.overlay.", "user.overlay."];

/// An entry that is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum EntryError {
    #[error("the layer has the entry {0:?}, which leads out of the image")]
    Escapes(String),
    #[error("the layer has an entry with a path of {0} bytes; the kernel takes {PATH_LEN_MAX}")]
    TooLong(usize),
    #[error("the layer sets the attribute {0}, which belongs to overlayfs")]
    OverlayXattr(String),
}

/// What an entry does to its path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Meaning {
    /// It is there, with what the archive says.
    Present(PathBuf),
    /// It is gone from the layers below.
    Gone(PathBuf),
    /// Nothing of it in the layers below is there.
    Opaque(PathBuf),
    /// Something of the tools that made the layer.
    Nothing,
}

/// A path of the archive as one below the root; the root itself is empty.
pub(super) fn below_root(path: &Path) -> Result<PathBuf, EntryError> {
    let len = path.as_os_str().len();
    if len >= PATH_LEN_MAX {
        return Err(EntryError::TooLong(len));
    }
    let mut out = PathBuf::new();
    for component in path.components() {
        match component {
            Component::Normal(name) => out.push(name),
            // A leading slash means the image's root, as for tar itself.
            Component::RootDir | Component::CurDir => {}
            Component::ParentDir | Component::Prefix(_) => {
                return Err(EntryError::Escapes(path.display().to_string()));
            }
        }
    }
    Ok(out)
}

/// What the entry at `path` means.
pub(super) fn meaning(path: &Path) -> Result<Meaning, EntryError> {
    let path = below_root(path)?;
    let name = path
        .file_name()
        .and_then(|name| name.to_str())
        .unwrap_or("");
    let parent = path.parent().map(Path::to_owned).unwrap_or_default();
    if name == OPAQUE {
        return Ok(Meaning::Opaque(parent));
    }
    Ok(match name.strip_prefix(WHITEOUT) {
        None => Meaning::Present(path),
        // AUFS kept its own files below such names.
        Some(rest) if rest.starts_with(WHITEOUT) => Meaning::Nothing,
        Some("" | "." | "..") => return Err(EntryError::Escapes(path.display().to_string())),
        Some(gone) => Meaning::Gone(parent.join(gone)),
    })
}

/// The extended attribute that a PAX key names, if it names one.
pub(super) fn xattr_name(key: &str) -> Result<Option<&str>, EntryError> {
    let Some(name) = key.strip_prefix(XATTR_KEY) else {
        return Ok(None);
    };
    match OVERLAY_XATTRS.iter().any(|prefix| name.starts_with(prefix)) {
        true => Err(EntryError::OverlayXattr(name.to_owned())),
        false => Ok(Some(name)),
    }
}

/// A PAX time, `seconds[.fraction]`, as seconds and nanoseconds.
pub(super) fn pax_time(text: &str) -> Option<(i64, i64)> {
    let (seconds, fraction) = text.split_once('.').unwrap_or((text, ""));
    if !fraction.bytes().all(|byte| byte.is_ascii_digit()) {
        return None;
    }
    let seconds: i64 = seconds.parse().ok()?;
    let digits: String = fraction
        .chars()
        .chain("000000000".chars())
        .take(9)
        .collect();
    let nanoseconds: i64 = digits.parse().ok()?;
    match (seconds < 0, nanoseconds) {
        (_, 0) | (false, _) => Some((seconds, nanoseconds)),
        (true, _) => Some((seconds.checked_sub(1)?, 1_000_000_000 - nanoseconds)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_stay_below_the_root() {
        let below = |path: &str| below_root(Path::new(path)).map(|path| path.display().to_string());
        assert_eq!(below("./a//b/."), Ok("a/b".into()));
        assert_eq!(below("/etc/passwd"), Ok("etc/passwd".into()));
        assert_eq!(below("./"), Ok(String::new()));
        for bad in ["../a", "a/../../b", "a/..", "/.."] {
            assert!(matches!(below(bad), Err(EntryError::Escapes(_))), "{bad}");
        }
        assert!(matches!(
            below(&"a/".repeat(3000)),
            Err(EntryError::TooLong(_))
        ));
    }

    #[test]
    fn whiteouts_mean_what_the_specification_says() {
        let of = |path: &str| meaning(Path::new(path));
        assert_eq!(of("a/.wh.b"), Ok(Meaning::Gone("a/b".into())));
        assert_eq!(of(".wh.b"), Ok(Meaning::Gone("b".into())));
        assert_eq!(of("a/.wh..wh..opq"), Ok(Meaning::Opaque("a".into())));
        assert_eq!(of("a/.wh..wh.plnk"), Ok(Meaning::Nothing));
        assert_eq!(of("a/b.wh.c"), Ok(Meaning::Present("a/b.wh.c".into())));
        for bad in ["a/.wh.", "a/.wh...", "a/.wh..", ".wh.../x/.."] {
            assert!(of(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_foreign_attributes_may_be_set() {
        assert_eq!(
            xattr_name("SCHILY.xattr.security.capability"),
            Ok(Some("security.capability"))
        );
        assert_eq!(xattr_name("mtime"), Ok(None));
        assert!(xattr_name("SCHILY.xattr.trusted.overlay.redirect").is_err());
    }

    #[test]
    fn times_have_nanoseconds() {
        assert_eq!(pax_time("12"), Some((12, 0)));
        assert_eq!(pax_time("12.5"), Some((12, 500_000_000)));
        assert_eq!(pax_time("-1.25"), Some((-2, 750_000_000)));
        assert_eq!(pax_time("1.0000000019"), Some((1, 1)));
        for bad in ["", "x", "1.x", "1.-5"] {
            assert_eq!(pax_time(bad), None, "{bad}");
        }
    }
}

//! Which mounts make up a snapshot's file system: what containerd's overlay snapshotter would answer.

use std::path::{Path, PathBuf};

use super::snapshot::Kind;

/// One mount, in containerd's words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mount {
    /// `bind` or `overlay`.
    pub kind: &'static str,
    /// A directory for a bind mount.
    pub source: String,
    /// Options, one each.
    pub options: Vec<String>,
}

/// What this kernel's overlayfs must be told.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Overlay {
    /// It knows `index`, which must be off: layers are used by many mounts.
    pub index_off: bool,
    /// This process is root in a user namespace only, where overlayfs keeps its marks in `user.*`.
    pub userxattr: bool,
}

/// The mounts of a snapshot whose own directories are `fs` and `work`, over `lowers`, the nearest
/// first.
pub fn mounts(
    kind: Kind,
    fs: &Path,
    work: &Path,
    lowers: &[PathBuf],
    overlay: Overlay,
) -> Vec<Mount> {
    let writable = kind == Kind::Active;
    // overlayfs takes neither no lower directory nor, without an upper one, a single lower one.
    let plain = match (lowers, writable) {
        ([], _) => Some(fs),
        ([only], false) => Some(only.as_path()),
        _ => None,
    };
    if let Some(source) = plain {
        return vec![Mount {
            kind: "bind",
            source: source.display().to_string(),
            options: vec![if writable { "rw" } else { "ro" }.into(), "rbind".into()],
        }];
    }
    let mut options = Vec::new();
    if overlay.index_off {
        options.push("index=off".to_owned());
    }
    if overlay.userxattr {
        options.push("userxattr".to_owned());
    }
    if writable {
        options.push(format!("workdir={}", work.display()));
        options.push(format!("upperdir={}", fs.display()));
    }
    let lowers: Vec<String> = lowers.iter().map(|dir| dir.display().to_string()).collect();
    options.push(format!("lowerdir={}", lowers.join(":")));
    vec![Mount {
        kind: "overlay",
        source: "overlay".to_owned(),
        options,
    }]
}

/// Whether overlayfs can be told of directories below `root`: these characters part its options.
pub fn is_mountable(root: &Path) -> bool {
    root.to_str()
        .is_some_and(|text| !text.contains([',', ':', '\\', '"']))
}

#[cfg(test)]
mod tests {
    use super::*;

    const INDEX_OFF: Overlay = Overlay {
        index_off: true,
        userxattr: false,
    };

    fn of(kind: Kind, lowers: &[&str], overlay: Overlay) -> Mount {
        let lowers: Vec<PathBuf> = lowers.iter().map(PathBuf::from).collect();
        let mut mounts = mounts(
            kind,
            Path::new("/s/3/fs"),
            Path::new("/s/3/work"),
            &lowers,
            overlay,
        );
        assert_eq!(mounts.len(), 1);
        mounts.remove(0)
    }

    #[test]
    fn without_layers_below_it_is_the_directory_itself() {
        let active = of(Kind::Active, &[], INDEX_OFF);
        assert_eq!((active.kind, active.source.as_str()), ("bind", "/s/3/fs"));
        assert_eq!(active.options, ["rw", "rbind"]);
        assert_eq!(of(Kind::View, &[], INDEX_OFF).options, ["ro", "rbind"]);
    }

    #[test]
    fn a_view_of_one_layer_is_that_layer_read_only() {
        let view = of(Kind::View, &["/s/2/fs"], INDEX_OFF);
        assert_eq!((view.kind, view.source.as_str()), ("bind", "/s/2/fs"));
        assert_eq!(view.options, ["ro", "rbind"]);
    }

    #[test]
    fn an_active_snapshot_writes_over_its_layers() {
        let active = of(Kind::Active, &["/s/2/fs", "/s/1/fs"], INDEX_OFF);
        assert_eq!(
            (active.kind, active.source.as_str()),
            ("overlay", "overlay")
        );
        assert_eq!(
            active.options,
            [
                "index=off",
                "workdir=/s/3/work",
                "upperdir=/s/3/fs",
                "lowerdir=/s/2/fs:/s/1/fs"
            ]
        );
    }

    #[test]
    fn a_view_of_several_layers_has_no_upper_directory() {
        let userxattr = Overlay {
            index_off: false,
            userxattr: true,
        };
        let view = of(Kind::View, &["/s/2/fs", "/s/1/fs"], userxattr);
        assert_eq!(view.options, ["userxattr", "lowerdir=/s/2/fs:/s/1/fs"]);
    }

    #[test]
    fn a_root_that_would_tear_the_options_apart_is_known() {
        assert!(is_mountable(Path::new("/var/lib/pantala/snapshotter")));
        for root in ["/a:b", "/a,b", "/a\\b"] {
            assert!(!is_mountable(Path::new(root)), "{root}");
        }
    }
}

//! Files seen through layers: what the mounts of this kernel make of them.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::path::Path;

use rustix::io::Errno;

use crate::stage::{Stage, as_root, show, write};

#[test]
fn files_change_vanish_and_move_between_layers() {
    as_root(async || {
        let stage = Stage::new().await;
        stage
            .layer("one", "", |root| {
                for (name, text) in [("foo", "foo"), ("changed", "old"), ("moved", "m")] {
                    write(root, name, text);
                }
                fs::create_dir_all(root.join("a/b/c")).unwrap();
                write(root, "a/b/c/deep", "deep");
                symlink("foo", root.join("link")).unwrap();
            })
            .await;
        stage
            .layer("two", "one", |root| {
                fs::remove_file(root.join("foo")).unwrap();
                write(root, "changed", "new");
                fs::rename(root.join("moved"), root.join("elsewhere")).unwrap();
                fs::remove_dir_all(root.join("a/b")).unwrap();
            })
            .await;
        stage
            .layer("three", "two", |root| {
                fs::create_dir(root.join("a/b")).unwrap();
                write(root, "a/b/fresh", "f");
            })
            .await;
        let names = async |layer: &str| -> Vec<String> {
            let shown = stage.seen(layer).await;
            shown
                .keys()
                .map(|path| path.display().to_string())
                .collect()
        };
        let all = [
            "a",
            "a/b",
            "a/b/c",
            "a/b/c/deep",
            "changed",
            "foo",
            "link",
            "moved",
        ];
        assert_eq!(names("one").await, all);
        assert_eq!(names("two").await, ["a", "changed", "elsewhere", "link"]);
        // The directory that came back is opaque: nothing of the first layer shines through.
        assert_eq!(
            names("three").await,
            ["a", "a/b", "a/b/fresh", "changed", "elsewhere", "link"]
        );
        assert!(
            stage.seen("three").await[Path::new("changed")].ends_with(&format!("{:?}", b"new"))
        );
    });
}

#[test]
fn owners_modes_and_links_pass_through() {
    as_root(async || {
        let stage = Stage::new().await;
        stage
            .layer("one", "", |root| {
                write(root, "file", "x");
                fs::hard_link(root.join("file"), root.join("same")).unwrap();
                fs::create_dir(root.join("dir")).unwrap();
            })
            .await;
        stage
            .layer("two", "one", |root| {
                chown(root.join("file"), Some(1), Some(2)).unwrap();
                chown(root.join("dir"), Some(3), Some(4)).unwrap();
                fs::set_permissions(root.join("dir"), PermissionsExt::from_mode(0o1777)).unwrap();
            })
            .await;
        let shown = stage.seen("two").await;
        assert!(
            shown[Path::new("file")].starts_with("100644 1:2 "),
            "{shown:?}"
        );
        assert!(
            shown[Path::new("dir")].starts_with("41777 3:4 "),
            "{shown:?}"
        );
        assert!(stage.seen("one").await[Path::new("same")].contains("2 links"));
    });
}

#[test]
fn the_root_directory_keeps_the_owner_that_the_layer_below_gave_it() {
    as_root(async || {
        let stage = Stage::new().await;
        stage
            .layer("one", "", |root| chown(root, Some(7), Some(8)).unwrap())
            .await;
        let mounts = stage.prepare("a", "one").await.unwrap();
        let mounted = stage.mount(&mounts);
        let root = fs::metadata(mounted.path()).unwrap();
        assert_eq!(
            (root.uid(), root.gid(), root.mode() & 0o7777),
            (7, 8, 0o755)
        );
    });
}

#[test]
fn a_view_cannot_be_written() {
    as_root(async || {
        let stage = Stage::new().await;
        stage.layer("one", "", |root| write(root, "f", "x")).await;
        stage
            .layer("two", "one", |root| write(root, "g", "x"))
            .await;
        for (key, layer) in [("v1", "one"), ("v2", "two")] {
            let mounts = stage.view(key, layer).await.unwrap();
            let mounted = stage.mount(&mounts);
            let refused = fs::write(mounted.path().join("new"), "x").unwrap_err();
            assert_eq!(
                refused.raw_os_error(),
                Some(Errno::ROFS.raw_os_error()),
                "{layer}"
            );
        }
    });
}

#[test]
fn a_directory_can_be_renamed_within_a_new_layer() {
    as_root(async || {
        let stage = Stage::new().await;
        stage
            .layer("one", "", |root| {
                fs::create_dir(root.join("old")).unwrap();
                write(root, "old/f", "x");
            })
            .await;
        stage
            .layer("two", "one", |root| {
                fs::create_dir(root.join("fresh")).unwrap();
                write(root, "fresh/g", "y");
                fs::rename(root.join("fresh"), root.join("renamed")).unwrap();
                fs::remove_dir_all(root.join("old")).unwrap();
            })
            .await;
        let shown = stage.seen("two").await;
        let names: Vec<_> = shown.keys().map(|path| path.to_str().unwrap()).collect();
        assert_eq!(names, ["renamed", "renamed/g"]);
    });
}

#[test]
fn many_layers_are_joined_in_their_order() {
    as_root(async || {
        let stage = Stage::new().await;
        let mut parent = String::new();
        for number in 0..20 {
            let name = format!("layer-{number}");
            let change = |root: &Path| {
                write(root, "last", &number.to_string());
                write(root, &format!("file-{number}"), "x");
            };
            stage.layer(&name, &parent, change).await;
            parent = name;
        }
        let mounts = stage.prepare("top", &parent).await.unwrap();
        let mounted = stage.mount(&mounts);
        assert_eq!(
            fs::read_to_string(mounted.path().join("last")).unwrap(),
            "19"
        );
        assert_eq!(show(mounted.path()).len(), 21);
    });
}

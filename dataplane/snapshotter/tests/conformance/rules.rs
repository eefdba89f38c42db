//! Names, kinds, labels, listing and what is refused.

use pantala_snapshotter::core::{Filter, Kind, Labels, TreeError};
use pantala_snapshotter::{Error, Snapshotter, StartError};

use crate::stage::{Stage, as_root, write};

fn is_not_found<T>(result: Result<T, Error>) -> bool {
    matches!(result, Err(Error::Tree(TreeError::NotFound(_))))
}

fn already_exists<T>(result: Result<T, Error>) -> bool {
    matches!(result, Err(Error::Tree(TreeError::AlreadyExists(_))))
}

#[test]
fn the_life_of_two_layers_is_as_containerd_expects_it() {
    as_root(async || {
        let stage = Stage::new().await;
        let snapshotter = &stage.snapshotter;
        let mounts = stage.prepare("preparing", "").await.unwrap();
        write(stage.mount(&mounts).path(), "foo", "foo\n");
        let active = snapshotter.stat("preparing").unwrap();
        assert_eq!((active.kind, active.parent), (Kind::Active, None));
        stage.commit("committed", "preparing").await.unwrap();
        assert!(is_not_found(snapshotter.stat("preparing")));
        let committed = snapshotter.stat("committed").unwrap();
        assert_eq!((committed.kind, committed.parent), (Kind::Committed, None));

        let mounts = stage.prepare("next", "committed").await.unwrap();
        write(stage.mount(&mounts).path(), "bar", "bar\n");
        let next = snapshotter.stat("next").unwrap();
        assert_eq!(
            (next.kind, next.parent.as_deref()),
            (Kind::Active, Some("committed"))
        );
        stage.commit("committed-next", "next").await.unwrap();
        assert!(is_not_found(snapshotter.stat("next")));

        let walked = snapshotter.list(&Filter::default());
        let names: Vec<_> = walked
            .iter()
            .map(|snapshot| snapshot.name.as_str())
            .collect();
        assert_eq!(names, ["committed", "committed-next"]);
        for snapshot in &walked {
            assert_eq!(*snapshot, snapshotter.stat(&snapshot.name).unwrap());
        }

        stage.view("seen", "committed-next").await.unwrap();
        snapshotter.remove("seen").await.unwrap();
        let refused = snapshotter.remove("committed").await.unwrap_err();
        assert!(refused.to_string().contains("remove"), "{refused}");
        snapshotter.remove("committed-next").await.unwrap();
        snapshotter.remove("committed").await.unwrap();
        assert_eq!(stage.directories(), 0);
    });
}

#[test]
fn a_key_is_good_for_one_snapshot() {
    as_root(async || {
        let stage = Stage::new().await;
        stage.layer("base", "", |_| {}).await;
        stage.prepare("a", "base").await.unwrap();
        assert!(already_exists(stage.view("a", "base").await));
        assert!(already_exists(stage.prepare("a", "base").await));
        stage.view("v", "base").await.unwrap();
        assert!(already_exists(stage.view("v", "base").await));
        assert!(already_exists(stage.commit("base", "a").await));
        // What was refused leaves no directories.
        assert_eq!(stage.directories(), 3);
    });
}

#[test]
fn mounts_are_for_active_snapshots_and_views_alone() {
    as_root(async || {
        let stage = Stage::new().await;
        stage.layer("base", "", |_| {}).await;
        let call = Default::default();
        let mounts = stage.prepare("a", "base").await.unwrap();
        assert_eq!(stage.snapshotter.mounts(&call, "a").await.unwrap(), mounts);
        let mounts = stage.view("v", "base").await.unwrap();
        assert_eq!(stage.snapshotter.mounts(&call, "v").await.unwrap(), mounts);
        let committed = stage.snapshotter.mounts(&call, "base").await;
        assert!(matches!(
            committed,
            Err(Error::Tree(TreeError::FailedPrecondition { .. }))
        ));
        assert!(is_not_found(
            stage.snapshotter.mounts(&call, "nobody").await
        ));
    });
}

#[test]
fn an_intermediate_layer_cannot_be_removed() {
    as_root(async || {
        let stage = Stage::new().await;
        stage.layer("base", "", |_| {}).await;
        stage.layer("middle", "base", |_| {}).await;
        stage.prepare("top", "middle").await.unwrap();
        let refused = stage.snapshotter.remove("middle").await;
        assert!(matches!(
            refused,
            Err(Error::Tree(TreeError::FailedPrecondition { .. }))
        ));
        for name in ["top", "middle", "base"] {
            stage.snapshotter.remove(name).await.unwrap();
        }
    });
}

#[test]
fn labels_change_by_the_mask_and_survive_a_restart() {
    as_root(async || {
        let stage = Stage::new().await;
        stage.layer("base", "", |_| {}).await;
        let before = stage.snapshotter.stat("base").unwrap();
        let labels = Labels::from([("k".into(), "v".into()), ("l".into(), "w".into())]);
        let all = stage.snapshotter.update("base", labels, &[]).await.unwrap();
        assert_eq!(all.labels.len(), 2);
        assert!(all.updated_unix_ns > before.updated_unix_ns);
        assert_eq!(all.created_unix_ns, before.created_unix_ns);
        let paths = ["labels.k".to_owned()];
        let one = stage
            .snapshotter
            .update("base", Labels::new(), &paths)
            .await
            .unwrap();
        assert_eq!(one.labels, Labels::from([("l".into(), "w".into())]));
        let paths = ["kind".to_owned()];
        let refused = stage
            .snapshotter
            .update("base", Labels::new(), &paths)
            .await;
        assert!(matches!(
            refused,
            Err(Error::Tree(TreeError::InvalidArgument(_)))
        ));
        let stage = stage.restart().await;
        assert_eq!(stage.snapshotter.stat("base").unwrap(), one);
    });
}

#[test]
fn usage_is_that_of_the_snapshot_alone() {
    as_root(async || {
        let stage = Stage::new().await;
        stage
            .layer("base", "", |root| {
                write(root, "large", &"x".repeat(1 << 20));
            })
            .await;
        let base = stage.snapshotter.usage("base").await.unwrap();
        assert!(base.size_bytes >= 1 << 20 && base.inodes == 2, "{base:?}");
        let mounts = stage.prepare("a", "base").await.unwrap();
        assert_eq!(stage.snapshotter.usage("a").await.unwrap().inodes, 1);
        let mounted = stage.mount(&mounts);
        write(mounted.path(), "small", "x");
        std::fs::hard_link(mounted.path().join("small"), mounted.path().join("again")).unwrap();
        assert_eq!(stage.snapshotter.usage("a").await.unwrap().inodes, 2);
        stage.view("v", "base").await.unwrap();
        assert_eq!(
            stage.snapshotter.usage("v").await.unwrap(),
            Default::default()
        );
        assert!(is_not_found(stage.snapshotter.usage("nobody").await));
    });
}

#[test]
fn a_directory_serves_one_process() {
    as_root(async || {
        let stage = Stage::new().await;
        let second = Snapshotter::open(stage.root(), None, None).await;
        assert!(matches!(second, Err(StartError::InUse(_))));
    });
}

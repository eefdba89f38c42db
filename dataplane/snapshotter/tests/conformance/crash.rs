//! Faults survived: the process is killed at any point between two system calls (its files stay as
//! they are), directories and half-written records are left behind, a record is damaged.

use std::fs;

use pantala_snapshotter::core::{Filter, Labels};

use crate::stage::{Stage, as_root, write};

#[test]
fn a_restart_finds_everything_as_it_was() {
    as_root(async || {
        let stage = Stage::new().await;
        stage.layer("base", "", |root| write(root, "f", "x")).await;
        stage
            .layer("top", "base", |root| write(root, "g", "y"))
            .await;
        let mounts = stage.prepare("a", "top").await.unwrap();
        write(stage.mount(&mounts).path(), "mine", "kept");
        stage.view("v", "top").await.unwrap();
        let before = stage.snapshotter.list(&Filter::default());
        let shown = stage.seen("top").await;

        let stage = stage.restart().await;
        assert_eq!(stage.snapshotter.list(&Filter::default()), before);
        assert_eq!(stage.seen("top").await, shown);
        let again = stage
            .snapshotter
            .mounts(&Default::default(), "a")
            .await
            .unwrap();
        assert_eq!(again, mounts);
        let text = fs::read_to_string(stage.mount(&again).path().join("mine")).unwrap();
        assert_eq!(text, "kept");
    });
}

#[test]
fn what_a_crash_left_half_made_is_removed_at_the_start() {
    as_root(async || {
        let stage = Stage::new().await;
        stage.layer("base", "", |root| write(root, "f", "x")).await;
        // A prepare that got as far as its directories, and one that got as far as half a record.
        let snapshots = stage.root().join("snapshots");
        fs::create_dir_all(snapshots.join("41/fs/deep")).unwrap();
        fs::write(snapshots.join("41/fs/deep/file"), "x").unwrap();
        fs::create_dir_all(snapshots.join("42/work")).unwrap();
        fs::write(stage.root().join("records/42.unfinished"), "{\"id\":42").unwrap();
        // A removal that got as far as the record.
        stage
            .layer("gone", "base", |root| write(root, "g", "y"))
            .await;
        let id = stage.snapshotter.stat("gone").unwrap().id;
        fs::remove_file(stage.root().join(format!("records/{id}.json"))).unwrap();

        let stage = stage.restart().await;
        assert_eq!(stage.directories(), 1);
        assert_eq!(
            fs::read_dir(stage.root().join("records")).unwrap().count(),
            1
        );
        assert_eq!(stage.snapshotter.list(&Filter::default()).len(), 1);
        // Its id is not given to another while anyone may still know it.
        stage.prepare("a", "base").await.unwrap();
        assert!(stage.snapshotter.stat("a").unwrap().id > 42);
    });
}

#[test]
fn a_damaged_record_keeps_its_files_and_harms_nobody_else() {
    as_root(async || {
        let stage = Stage::new().await;
        stage.layer("base", "", |root| write(root, "f", "x")).await;
        stage.layer("other", "", |root| write(root, "g", "y")).await;
        stage.prepare("a", "base").await.unwrap();
        let id = stage.snapshotter.stat("base").unwrap().id;
        fs::write(stage.root().join(format!("records/{id}.json")), "{}").unwrap();

        let stage = stage.restart().await;
        stage.snapshotter.cleanup().await.unwrap();
        let kept = stage.root().join(format!("snapshots/{id}/fs/f"));
        assert_eq!(fs::read_to_string(kept).unwrap(), "x");
        assert!(stage.snapshotter.stat("base").is_err());
        let refused = stage.snapshotter.mounts(&Default::default(), "a").await;
        assert!(refused.unwrap_err().to_string().contains("base"));
        assert_eq!(stage.seen("other").await.len(), 1);
        // And it can be removed: nothing of it depends on what was lost.
        stage.snapshotter.remove("a").await.unwrap();
    });
}

#[test]
fn cleanup_leaves_alone_what_is_being_made() {
    as_root(async || {
        let stage = Stage::new().await;
        stage.layer("base", "", |root| write(root, "f", "x")).await;
        let makers = (0..20).map(|number| {
            let snapshotter = stage.snapshotter.clone();
            tokio::spawn(async move {
                let key = format!("k{number}");
                let call = Default::default();
                let kind = pantala_snapshotter::core::Kind::Active;
                let labels = Labels::new();
                snapshotter
                    .create(&call, kind, &key, Some("base"), labels)
                    .await?;
                snapshotter.cleanup().await?;
                snapshotter
                    .commit(&format!("c{number}"), &key, Labels::new())
                    .await
            })
        });
        for maker in makers.collect::<Vec<_>>() {
            maker.await.unwrap().unwrap();
        }
        for number in 0..20 {
            assert_eq!(stage.seen(&format!("c{number}")).await.len(), 1);
        }
    });
}

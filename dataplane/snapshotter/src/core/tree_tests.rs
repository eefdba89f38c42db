//! containerd's rules, one test each; then random calls against a plain model of them.

use proptest::prelude::*;

use super::*;

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs
        .iter()
        .map(|(key, value)| ((*key).to_owned(), (*value).to_owned()))
        .collect()
}

fn create(tree: &mut Tree, kind: Kind, key: &str, parent: Option<&str>) -> Result<(), TreeError> {
    let id = tree.take_id();
    let change = tree.plan_create(id, kind, key, parent, Labels::new(), 1)?;
    tree.apply(change);
    Ok(())
}

fn commit(tree: &mut Tree, name: &str, key: &str) -> Result<(), TreeError> {
    let change = tree.plan_commit(name, key, Labels::new(), Usage::default(), 2)?;
    tree.apply(change);
    Ok(())
}

fn remove(tree: &mut Tree, key: &str) -> Result<(), TreeError> {
    let change = tree.plan_remove(key)?;
    tree.apply(change);
    Ok(())
}

/// `base` and `top`, committed, one on the other.
fn two_layers() -> Tree {
    let mut tree = Tree::default();
    create(&mut tree, Kind::Active, "a", None).unwrap();
    commit(&mut tree, "base", "a").unwrap();
    create(&mut tree, Kind::Active, "b", Some("base")).unwrap();
    commit(&mut tree, "top", "b").unwrap();
    tree
}

#[test]
fn a_commit_takes_the_key_away_and_keeps_the_parent() {
    let tree = two_layers();
    assert!(matches!(tree.get("b"), Err(TreeError::NotFound(_))));
    let top = tree.get("top").unwrap();
    assert_eq!(
        (top.kind, top.parent.as_deref()),
        (Kind::Committed, Some("base"))
    );
    assert_eq!((top.created_unix_ns, top.updated_unix_ns), (2, 2));
    let chain: Vec<_> = tree
        .parents("top")
        .unwrap()
        .iter()
        .map(|s| s.name.as_str())
        .collect();
    assert_eq!(chain, ["base"]);
}

#[test]
fn a_key_in_use_cannot_be_prepared_or_viewed_again() {
    let mut tree = two_layers();
    for kind in [Kind::Active, Kind::View] {
        create(&mut tree, kind, "x", Some("top")).unwrap();
        for again in [Kind::Active, Kind::View] {
            let refused = create(&mut tree, again, "x", Some("top"));
            assert_eq!(refused, Err(TreeError::AlreadyExists("x".into())));
        }
        remove(&mut tree, "x").unwrap();
    }
}

#[test]
fn only_what_is_committed_can_be_a_parent() {
    let mut tree = two_layers();
    create(&mut tree, Kind::Active, "active", None).unwrap();
    create(&mut tree, Kind::View, "view", Some("top")).unwrap();
    for parent in ["active", "view"] {
        let refused = create(&mut tree, Kind::Active, "x", Some(parent));
        assert!(
            matches!(refused, Err(TreeError::InvalidArgument(_))),
            "{parent}"
        );
    }
    let refused = create(&mut tree, Kind::Active, "x", Some("nobody"));
    assert_eq!(refused, Err(TreeError::NotFound("nobody".into())));
}

#[test]
fn only_what_is_active_can_be_committed() {
    let mut tree = two_layers();
    create(&mut tree, Kind::View, "view", Some("top")).unwrap();
    for key in ["view", "top"] {
        let refused = commit(&mut tree, "new", key);
        assert!(
            matches!(refused, Err(TreeError::FailedPrecondition { .. })),
            "{key}"
        );
    }
    create(&mut tree, Kind::Active, "x", None).unwrap();
    assert_eq!(
        commit(&mut tree, "top", "x"),
        Err(TreeError::AlreadyExists("top".into()))
    );
    assert_eq!(
        commit(&mut tree, "new", "nobody"),
        Err(TreeError::NotFound("nobody".into()))
    );
}

#[test]
fn a_snapshot_that_others_stand_on_stays() {
    let mut tree = two_layers();
    let refused = remove(&mut tree, "base");
    assert!(matches!(refused, Err(TreeError::FailedPrecondition { .. })));
    remove(&mut tree, "top").unwrap();
    remove(&mut tree, "base").unwrap();
    assert_eq!(
        remove(&mut tree, "base"),
        Err(TreeError::NotFound("base".into()))
    );
    assert_eq!(tree.iter().count(), 0);
}

#[test]
fn an_update_changes_the_labels_that_the_mask_names() {
    let mut tree = two_layers();
    let update = |tree: &mut Tree, with: Labels, paths: &[&str]| {
        let paths: Vec<String> = paths.iter().map(|path| (*path).to_owned()).collect();
        let change = tree.plan_update("top", with, &paths, 9)?;
        tree.apply(change);
        Ok::<_, TreeError>(tree.get("top")?.labels.clone())
    };
    let all = update(&mut tree, labels(&[("a", "1"), ("b", "2")]), &[]).unwrap();
    assert_eq!(all, labels(&[("a", "1"), ("b", "2")]));
    let one = update(&mut tree, labels(&[("a", "x"), ("b", "y")]), &["labels.b"]).unwrap();
    assert_eq!(one, labels(&[("a", "1"), ("b", "y")]));
    let gone = update(&mut tree, Labels::new(), &["labels.a"]).unwrap();
    assert_eq!(gone, labels(&[("b", "y")]));
    let replaced = update(&mut tree, labels(&[("c", "3")]), &["labels"]).unwrap();
    assert_eq!(replaced, labels(&[("c", "3")]));
    let refused = update(&mut tree, Labels::new(), &["parent"]);
    assert!(matches!(refused, Err(TreeError::InvalidArgument(_))));
    let top = tree.get("top").unwrap();
    assert_eq!((top.created_unix_ns, top.updated_unix_ns), (2, 9));
}

#[test]
fn names_and_labels_are_bounded() {
    let tree = Tree::default();
    let refused = |key: &str, with: Labels| {
        matches!(
            tree.plan_create(1, Kind::Active, key, None, with, 1),
            Err(TreeError::InvalidArgument(_))
        )
    };
    assert!(refused("", Labels::new()));
    assert!(refused(&"x".repeat(NAME_MAX_BYTES + 1), Labels::new()));
    assert!(refused("x", labels(&[("k", &"v".repeat(LABEL_MAX_BYTES))])));
    let many = (0..=LABELS_MAX)
        .map(|n| (n.to_string(), "v".to_owned()))
        .collect();
    assert!(refused("x", many));
    assert!(!refused(
        "x",
        labels(&[("k", &"v".repeat(LABEL_MAX_BYTES - 1))])
    ));
}

#[test]
fn more_layers_than_overlayfs_takes_are_refused() {
    let mut tree = Tree::default();
    let mut parent: Option<String> = None;
    let mut layers = 0;
    let refused = loop {
        let (key, name) = (format!("k{layers}"), format!("n{layers}"));
        if let Err(refused) = create(&mut tree, Kind::Active, &key, parent.as_deref()) {
            break refused;
        }
        commit(&mut tree, &name, &key).unwrap();
        parent = Some(name);
        layers += 1;
    };
    assert!(
        matches!(refused, TreeError::InvalidArgument(_)),
        "{refused}"
    );
    assert_eq!(layers, DEPTH_MAX);
}

#[test]
fn records_that_form_a_circle_do_not_hang_anyone() {
    let mut forged: Vec<Snapshot> = two_layers().iter().cloned().collect();
    forged[0].parent = Some("top".into());
    let tree = Tree::load(forged, 1);
    assert!(tree.parents("top").is_err());
}

#[test]
fn ids_of_what_was_loaded_are_not_given_again() {
    let records: Vec<Snapshot> = two_layers().iter().cloned().collect();
    let last = records.iter().map(|record| record.id).max().unwrap();
    assert!(Tree::load(records.clone(), 1).take_id() > last);
    assert_eq!(Tree::load(records, 77).take_id(), 77);
}

#[derive(Debug, Clone)]
enum Call {
    Create(bool, u8, Option<u8>),
    Commit(u8, u8),
    Remove(u8),
}

fn call() -> impl Strategy<Value = Call> {
    let name = 0..12_u8;
    prop_oneof![
        (
            any::<bool>(),
            name.clone(),
            proptest::option::of(name.clone())
        )
            .prop_map(|(view, key, parent)| Call::Create(view, key, parent)),
        (name.clone(), name.clone()).prop_map(|(to, key)| Call::Commit(to, key)),
        name.prop_map(Call::Remove),
    ]
}

proptest! {
    /// Whatever is called in whatever order: parents exist and are committed, and a tree made anew
    /// from its records is the same tree.
    #[test]
    fn the_tree_stays_a_tree(calls in proptest::collection::vec(call(), 1..200)) {
        let mut tree = Tree::default();
        for call in calls {
            // Refusals are as good as successes here; what counts is the state after them.
            let _ = match call {
                Call::Create(view, key, parent) => {
                    let kind = if view { Kind::View } else { Kind::Active };
                    let parent = parent.map(|parent| parent.to_string());
                    create(&mut tree, kind, &key.to_string(), parent.as_deref())
                }
                Call::Commit(to, key) => commit(&mut tree, &to.to_string(), &key.to_string()),
                Call::Remove(key) => remove(&mut tree, &key.to_string()),
            };
            let mut standing_on: BTreeMap<String, usize> = BTreeMap::new();
            for snapshot in tree.iter() {
                prop_assert_eq!(tree.names.get(&snapshot.id), Some(&snapshot.name));
                if let Some(parent) = &snapshot.parent {
                    prop_assert_eq!(tree.get(parent).map(|parent| parent.kind), Ok(Kind::Committed));
                    *standing_on.entry(parent.clone()).or_default() += 1;
                }
            }
            prop_assert_eq!(&standing_on, &tree.children);
            prop_assert_eq!(tree.names.len(), tree.by_name.len());
        }
        let again = Tree::load(tree.iter().cloned(), 1);
        prop_assert_eq!(again.by_name, tree.by_name);
        prop_assert_eq!(again.children, tree.children);
    }
}

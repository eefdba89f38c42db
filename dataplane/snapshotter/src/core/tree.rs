//! The tree of snapshots and containerd's rules for it.
//!
//! Each `plan_` function says what a call changes, or why it is refused, and changes nothing. The
//! caller makes the [`Change`] durable and then hands it to [`Tree::apply`]. Every change touches one
//! record alone, so a crash leaves the tree as it was before the call or as it is after it. Between a
//! plan and its `apply` there must be no other `apply`.

use std::collections::BTreeMap;

use super::snapshot::{Kind, Labels, Snapshot, Usage};

/// Snapshots on one node. containerd keeps one for each layer and each container; a node with a
/// hundred images of fifty layers has a twentieth of this.
pub const SNAPSHOTS_MAX: usize = 100_000;
/// Bytes of a name; containerd's are a namespace, a number and a digest or a container's name.
pub const NAME_MAX_BYTES: usize = 2_048;
/// Bytes of a label's key and value together: containerd's own limit.
pub const LABEL_MAX_BYTES: usize = 4_096;
/// Labels of one snapshot: more than ten times what containerd, CRI and nydus set, and few enough to
/// bound a record.
pub const LABELS_MAX: usize = 128;
/// Layers under one snapshot: the kernel's overlayfs takes no more.
pub const DEPTH_MAX: usize = 500;

/// Why a call is refused. The kinds are containerd's: it acts on them.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TreeError {
    /// There is no snapshot of that name.
    #[error("snapshot {0:?} does not exist")]
    NotFound(String),
    /// The name is taken.
    #[error("snapshot {0:?} exists already")]
    AlreadyExists(String),
    /// It exists, and its state does not allow this.
    #[error("cannot {what} snapshot {name:?}: {why}")]
    FailedPrecondition {
        /// What was asked for.
        what: &'static str,
        /// Of which snapshot.
        name: String,
        /// What is in the way.
        why: &'static str,
    },
    /// The call itself is wrong.
    #[error("{0}")]
    InvalidArgument(String),
    /// There are as many as this node keeps.
    #[error("this node has {SNAPSHOTS_MAX} snapshots already: remove images that are not in use")]
    Full,
}

/// What one call changes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Change {
    /// This record is new, or takes the place of the one with its id.
    Write(Snapshot),
    /// The record with this id is gone.
    Delete {
        /// Of which record.
        id: u64,
        /// Its name.
        name: String,
    },
}

/// All snapshots of a node.
#[derive(Debug, Default)]
pub struct Tree {
    by_name: BTreeMap<String, Snapshot>,
    names: BTreeMap<u64, String>,
    /// How many stand on the snapshot of that name.
    children: BTreeMap<String, usize>,
    next_id: u64,
}

impl Tree {
    /// The tree of these records. A name that occurs twice stays with the larger id: a record is
    /// replaced under its own id, so two of a name cannot come from this program.
    pub fn load(records: impl IntoIterator<Item = Snapshot>, next_id: u64) -> Self {
        let mut tree = Self {
            next_id: next_id.max(1),
            ..Self::default()
        };
        let mut records: Vec<_> = records.into_iter().collect();
        records.sort_by_key(|record| record.id);
        for record in records {
            tree.apply(Change::Write(record));
        }
        tree
    }

    /// An id that no snapshot has or had since the start.
    pub fn take_id(&mut self) -> u64 {
        let id = self.next_id;
        self.next_id += 1;
        id
    }

    /// The snapshot called `name`.
    ///
    /// # Errors
    /// [`TreeError::NotFound`].
    pub fn get(&self, name: &str) -> Result<&Snapshot, TreeError> {
        self.by_name
            .get(name)
            .ok_or_else(|| TreeError::NotFound(name.to_owned()))
    }

    /// All of them, by name.
    pub fn iter(&self) -> impl Iterator<Item = &Snapshot> {
        self.by_name.values()
    }

    /// Whether a snapshot has this id.
    pub fn has_id(&self, id: u64) -> bool {
        self.names.contains_key(&id)
    }

    /// What `name` stands on, nearest first.
    ///
    /// # Errors
    /// [`TreeError::NotFound`] where a record of the chain was lost.
    pub fn parents(&self, name: &str) -> Result<Vec<&Snapshot>, TreeError> {
        let mut at = self.get(name)?;
        let mut parents = Vec::new();
        while let Some(parent) = &at.parent {
            at = self.get(parent)?;
            parents.push(at);
            // Only a forged record can make a circle.
            if parents.len() > DEPTH_MAX {
                return Err(too_deep(name));
            }
        }
        Ok(parents)
    }

    /// A new view or active snapshot.
    ///
    /// # Errors
    /// As containerd's own snapshotters: a parent that is missing or not committed, a key in use.
    pub fn plan_create(
        &self,
        id: u64,
        kind: Kind,
        key: &str,
        parent: Option<&str>,
        labels: Labels,
        now_unix_ns: u64,
    ) -> Result<Change, TreeError> {
        check_name(key)?;
        let labels = checked_labels(labels)?;
        if let Some(parent) = parent {
            if self.get(parent)?.kind != Kind::Committed {
                return Err(TreeError::InvalidArgument(format!(
                    "parent {parent:?} is not committed"
                )));
            }
            if self.parents(parent)?.len() >= DEPTH_MAX - 1 {
                return Err(too_deep(key));
            }
        }
        if self.by_name.contains_key(key) {
            return Err(TreeError::AlreadyExists(key.to_owned()));
        }
        if self.by_name.len() >= SNAPSHOTS_MAX {
            return Err(TreeError::Full);
        }
        Ok(Change::Write(Snapshot {
            id,
            name: key.to_owned(),
            parent: parent.map(str::to_owned),
            kind,
            labels,
            created_unix_ns: now_unix_ns,
            updated_unix_ns: now_unix_ns,
            usage: Usage::default(),
            image: None,
        }))
    }

    /// The active snapshot `key` becomes the committed one called `name`.
    ///
    /// # Errors
    /// `key` is missing or not active, `name` is taken.
    pub fn plan_commit(
        &self,
        name: &str,
        key: &str,
        labels: Labels,
        usage: Usage,
        now_unix_ns: u64,
    ) -> Result<Change, TreeError> {
        check_name(name)?;
        let active = self.get(key)?;
        if self.by_name.contains_key(name) {
            return Err(TreeError::AlreadyExists(name.to_owned()));
        }
        if active.kind != Kind::Active {
            return Err(TreeError::FailedPrecondition {
                what: "commit",
                name: key.to_owned(),
                why: "it is not active",
            });
        }
        Ok(Change::Write(Snapshot {
            name: name.to_owned(),
            kind: Kind::Committed,
            // Replaced, not inherited: so does containerd.
            labels: checked_labels(labels)?,
            created_unix_ns: now_unix_ns,
            updated_unix_ns: now_unix_ns,
            usage,
            ..active.clone()
        }))
    }

    /// `key` is gone.
    ///
    /// # Errors
    /// It is missing, or another stands on it.
    pub fn plan_remove(&self, key: &str) -> Result<Change, TreeError> {
        let snapshot = self.get(key)?;
        if self.children.contains_key(key) {
            return Err(TreeError::FailedPrecondition {
                what: "remove",
                name: key.to_owned(),
                why: "others stand on it",
            });
        }
        Ok(Change::Delete {
            id: snapshot.id,
            name: key.to_owned(),
        })
    }

    /// New labels for `name`: all of them where `paths` is empty, else those that it names.
    ///
    /// # Errors
    /// It is missing, or a path names something that cannot change.
    pub fn plan_update(
        &self,
        name: &str,
        labels: Labels,
        paths: &[String],
        now_unix_ns: u64,
    ) -> Result<Change, TreeError> {
        let snapshot = self.get(name)?;
        let mut updated = snapshot.labels.clone();
        if paths.is_empty() {
            updated.clone_from(&labels);
        }
        for path in paths {
            match path.strip_prefix("labels.") {
                Some(key) => {
                    let value = labels.get(key).cloned().unwrap_or_default();
                    updated.insert(key.to_owned(), value);
                }
                None if path == "labels" => updated.clone_from(&labels),
                None => {
                    return Err(TreeError::InvalidArgument(format!(
                        "the field {path:?} of snapshot {name:?} cannot change: only labels can"
                    )));
                }
            }
        }
        Ok(Change::Write(Snapshot {
            labels: checked_labels(updated)?,
            updated_unix_ns: now_unix_ns,
            ..snapshot.clone()
        }))
    }

    /// Takes over a change that is durable.
    pub fn apply(&mut self, change: Change) {
        match change {
            Change::Write(snapshot) => {
                self.forget(snapshot.id);
                self.next_id = self.next_id.max(snapshot.id.saturating_add(1));
                if let Some(parent) = &snapshot.parent {
                    *self.children.entry(parent.clone()).or_default() += 1;
                }
                if let Some(before) = self.by_name.get(&snapshot.name).map(|other| other.id) {
                    self.forget(before);
                }
                self.names.insert(snapshot.id, snapshot.name.clone());
                self.by_name.insert(snapshot.name.clone(), snapshot);
            }
            Change::Delete { id, .. } => self.forget(id),
        }
    }

    fn forget(&mut self, id: u64) {
        let gone = self
            .names
            .remove(&id)
            .and_then(|name| self.by_name.remove(&name));
        let Some(parent) = gone.and_then(|snapshot| snapshot.parent) else {
            return;
        };
        if let Some(count) = self.children.get_mut(&parent) {
            *count -= 1;
            if *count == 0 {
                self.children.remove(&parent);
            }
        }
    }
}

fn too_deep(name: &str) -> TreeError {
    TreeError::InvalidArgument(format!(
        "{name:?} has more than {DEPTH_MAX} layers, which overlayfs cannot mount"
    ))
}

fn check_name(name: &str) -> Result<(), TreeError> {
    match name.len() {
        1..=NAME_MAX_BYTES => Ok(()),
        length => Err(TreeError::InvalidArgument(format!(
            "a name of {length} bytes: between 1 and {NAME_MAX_BYTES} are possible"
        ))),
    }
}

/// Within the limits, and without those of no value, which mean "remove this".
fn checked_labels(mut labels: Labels) -> Result<Labels, TreeError> {
    labels.retain(|_, value| !value.is_empty());
    if labels.len() > LABELS_MAX {
        return Err(TreeError::InvalidArgument(format!(
            "{} labels: at most {LABELS_MAX} are possible",
            labels.len()
        )));
    }
    for (key, value) in &labels {
        if key.len() + value.len() > LABEL_MAX_BYTES {
            let shown: String = key.chars().take(64).collect();
            return Err(TreeError::InvalidArgument(format!(
                "the label {shown:?} and its value are longer than {LABEL_MAX_BYTES} bytes"
            )));
        }
    }
    Ok(labels)
}

#[cfg(test)]
#[path = "tree_tests.rs"]
mod tests;

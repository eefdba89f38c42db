//! The table of all tasks: each has a small number that stands for its digest.

use std::collections::HashMap;

use pantala_wire::BlobDigest;

use super::task::Task;

/// A task's place in the table.
pub(super) type TaskId = u32;

#[derive(Default)]
pub(super) struct Tasks {
    by_digest: HashMap<BlobDigest, TaskId>,
    slab: Vec<Option<Box<Task>>>,
    free: Vec<TaskId>,
}

impl Tasks {
    pub(super) fn len(&self) -> usize {
        self.by_digest.len()
    }
    pub(super) fn find(&self, digest: &BlobDigest) -> Option<TaskId> {
        self.by_digest.get(digest).copied()
    }
    pub(super) fn get(&self, id: TaskId) -> Option<&Task> {
        self.slab.get(id as usize)?.as_deref()
    }
    pub(super) fn get_mut(&mut self, id: TaskId) -> Option<&mut Task> {
        self.slab.get_mut(id as usize)?.as_deref_mut()
    }
    pub(super) fn all(&self) -> impl Iterator<Item = &Task> + '_ {
        self.slab.iter().flatten().map(Box::as_ref)
    }
    pub(super) fn add(&mut self, task: Task) -> TaskId {
        let digest = task.digest;
        let id = self.free.pop().unwrap_or(self.slab.len() as TaskId);
        if id as usize == self.slab.len() {
            self.slab.push(Some(Box::new(task)));
        } else {
            self.slab[id as usize] = Some(Box::new(task));
        }
        self.by_digest.insert(digest, id);
        id
    }
    pub(super) fn remove(&mut self, id: TaskId) -> Option<Box<Task>> {
        let task = self.slab.get_mut(id as usize)?.take()?;
        self.by_digest.remove(&task.digest);
        self.free.push(id);
        Some(task)
    }
}

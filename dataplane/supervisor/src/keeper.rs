//! What the supervisor remembers, without the sockets around it.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use crate::message::{Answer, BATCH_MAX, Fault};

/// Reads that wait at one time. Each holds a descriptor here; more wait in the kernel's queue.
pub const WAITING_MAX: usize = 1024;
/// Things kept: files of all mounts of a node, and their notes.
pub const KEPT_MAX: usize = 8192;

/// Something kept for the daemon.
#[derive(Debug)]
pub struct Item {
    /// A file, opened before it was marked.
    pub descriptor: Option<OwnedFd>,
    /// What the daemon wants to know of it.
    pub note: Vec<u8>,
}

/// A read that waits, and the descriptor that keeps its number from being given to another.
#[derive(Debug)]
struct Waiting {
    fault: Fault,
    _descriptor: OwnedFd,
}

/// What is kept, and who waits.
#[derive(Debug, Default)]
pub struct Keeper {
    items: BTreeMap<String, Item>,
    waiting: BTreeMap<i32, Waiting>,
    /// Not yet told to the daemon that is subscribed.
    untold: VecDeque<i32>,
}

impl Keeper {
    /// Keeps it, in place of what was there; false where there is no room.
    pub fn keep(&mut self, name: String, item: Item) -> bool {
        if self.items.len() >= KEPT_MAX && !self.items.contains_key(&name) {
            return false;
        }
        self.items.insert(name, item);
        true
    }

    /// Lets go of it.
    pub fn forget(&mut self, name: &str) {
        self.items.remove(name);
    }

    /// The first thing after `name`.
    pub fn after(&self, name: &str) -> Option<(&str, &Item)> {
        let after = (Bound::Excluded(name), Bound::Unbounded);
        let (name, item) = self.items.range::<str, _>(after).next()?;
        Some((name, item))
    }

    /// The descriptor kept under `name`.
    pub fn descriptor(&self, name: &str) -> Option<BorrowedFd<'_>> {
        let descriptor = self.items.get(name)?.descriptor.as_ref()?;
        Some(descriptor.as_fd())
    }

    /// Nothing is kept and nobody waits.
    pub fn is_empty(&self) -> bool {
        self.items.is_empty() && self.waiting.is_empty()
    }

    /// Room for so many more events of the kernel.
    pub fn has_room(&self, events: usize) -> bool {
        self.waiting.len() + events <= WAITING_MAX
    }

    /// A read waits.
    pub fn add(&mut self, fault: Fault, descriptor: OwnedFd) {
        self.untold.push_back(fault.number);
        let waiting = Waiting {
            fault,
            _descriptor: descriptor,
        };
        self.waiting.insert(fault.number, waiting);
    }

    /// A daemon has subscribed: it has to be told of all that wait.
    pub fn tell_all(&mut self) {
        self.untold = self.waiting.keys().copied().collect();
    }

    /// What to tell the daemon next; the same until [`Self::told`].
    pub fn to_tell(&self) -> Vec<Fault> {
        let numbers = self.untold.iter().take(BATCH_MAX);
        numbers
            .filter_map(|number| Some(self.waiting.get(number)?.fault))
            .collect()
    }

    /// There is something to tell.
    pub fn has_to_tell(&self) -> bool {
        !self.untold.is_empty()
    }

    /// What [`Self::to_tell`] returned has been told.
    pub fn told(&mut self) {
        let count = self.untold.len().min(BATCH_MAX);
        self.untold.drain(..count);
    }

    /// An answer has come; true if its read waits. `write` passes it to the kernel: only after that may
    /// the number be given to another event.
    pub fn answer<E>(
        &mut self,
        answer: Answer,
        write: impl FnOnce(Answer) -> Result<(), E>,
    ) -> Result<bool, E> {
        if !self.waiting.contains_key(&answer.number) {
            return Ok(false);
        }
        write(answer)?;
        self.waiting.remove(&answer.number);
        Ok(true)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fanotify::Verdict;

    fn descriptor() -> OwnedFd {
        tempfile::tempfile().unwrap().into()
    }

    fn fault(number: i32) -> Fault {
        Fault {
            number,
            device: 1,
            inode: 2,
            offset: 3,
            count: 4,
        }
    }

    fn allow(keeper: &mut Keeper, number: i32) -> bool {
        let answer = Answer {
            number,
            verdict: Verdict::Allow,
        };
        keeper.answer(answer, |_| Ok::<_, ()>(())).unwrap()
    }

    #[test]
    fn a_new_daemon_is_told_of_every_read_that_was_not_answered() {
        let mut keeper = Keeper::default();
        for number in 0..3 {
            keeper.add(fault(number), descriptor());
        }
        assert_eq!(keeper.to_tell().len(), 3);
        keeper.told();
        assert!(allow(&mut keeper, 1) && !keeper.has_to_tell());
        keeper.tell_all();
        assert_eq!(keeper.to_tell(), [fault(0), fault(2)]);
    }

    #[test]
    fn an_answer_to_nobody_is_not_passed_on() {
        let mut keeper = Keeper::default();
        keeper.add(fault(7), descriptor());
        assert!(!allow(&mut keeper, 8) && allow(&mut keeper, 7) && !allow(&mut keeper, 7));
        assert!(keeper.is_empty());
    }

    #[test]
    fn things_are_listed_in_order_and_bounded() {
        let mut keeper = Keeper::default();
        let item = || Item {
            descriptor: None,
            note: Vec::new(),
        };
        for number in 0..KEPT_MAX {
            assert!(keeper.keep(format!("{number:05}"), item()));
        }
        assert!(!keeper.keep("x".into(), item()));
        assert!(keeper.keep("00000".into(), item()));
        assert_eq!(keeper.after("").unwrap().0, "00000");
        assert_eq!(keeper.after("00000").unwrap().0, "00001");
        assert!(keeper.after("08191").is_none());
        keeper.forget("00001");
        assert_eq!(keeper.after("00000").unwrap().0, "00002");
    }
}

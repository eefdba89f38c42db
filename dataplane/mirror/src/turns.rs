//! Who of many fast clients on this machine is fed now.
//!
//! What is sent to a client on the same machine lies in memory until the client has taken it. Fed all
//! at once, 64 clients keep more in flight than the processors' caches hold, and every byte goes to
//! memory and back; fed a few at a time, what one copies in is still in the cache when the other copies
//! it out (decision 14 has the figures).
//!
//! [`TurnTable`] decides, without a clock or a socket: time comes in as an argument, whoever is to ask
//! again is woken. It is advice to clients that are equally fast and no lock: a turn that is not used is
//! taken away, by whoever waits for it, and nobody waits longer than [`WAIT_MAX`].

use std::collections::BTreeMap;
use std::task::Waker;
use std::time::Duration;

use tokio::time::Instant;

/// A turn whose client takes nothing for this long goes to another. Longer than it takes until a
/// client is scheduled on a busy machine.
pub(crate) const IDLE_MAX: Duration = Duration::from_millis(20);
/// Longest turn: one of [`crate::feed::TURN_BYTES`] at 40 MiB/s.
pub(crate) const HOLD_MAX: Duration = Duration::from_millis(100);
/// Longest wait for a turn; after that, the client is fed beside those that have one. Far below
/// anything that a client would take for a stall.
pub(crate) const WAIT_MAX: Duration = Duration::from_millis(500);

/// A connection, by the number it was given.
pub(crate) type Who = u64;

/// What a connection that wants to send may do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Answer {
    /// It has a turn.
    Turn,
    /// It has none, but has waited for too long: send something.
    Late,
    /// Wait to be woken; where a time is given, ask again then.
    Wait(Option<Instant>),
}

/// The turns: who has one, who waits for one, in the order they came.
#[derive(Debug)]
pub(crate) struct TurnTable {
    turns_max: usize,
    holders: Vec<Holder>,
    waiting: BTreeMap<u64, Waiting>,
    next_place: u64,
}

#[derive(Debug)]
struct Holder {
    who: Who,
    since: Instant,
    fed_at: Instant,
}

impl Holder {
    fn ends_at(&self) -> Instant {
        (self.fed_at + IDLE_MAX).min(self.since + HOLD_MAX)
    }
}

#[derive(Debug)]
struct Waiting {
    who: Who,
    since: Instant,
    waker: Waker,
}

impl TurnTable {
    /// A table of `turns_max` turns, of which there is at least one.
    pub(crate) fn new(turns_max: usize) -> Self {
        Self {
            turns_max: turns_max.max(1),
            holders: Vec::new(),
            waiting: BTreeMap::new(),
            next_place: 0,
        }
    }

    /// `who` wants to send. `place` is its place in the queue, kept for it by the caller.
    pub(crate) fn ask(
        &mut self,
        who: Who,
        place: &mut Option<u64>,
        now: Instant,
        waker: &Waker,
    ) -> Answer {
        if self.holds(who) {
            return Answer::Turn;
        }
        let mine = *place.get_or_insert_with(|| {
            let next = self.next_place;
            self.next_place += 1;
            next
        });
        let waiting = self.waiting.entry(mine).or_insert_with(|| Waiting {
            who,
            since: now,
            waker: waker.clone(),
        });
        waiting.waker.clone_from(waker);
        let since = waiting.since;
        if self.waiting.first_key_value().map(|(place, _)| *place) != Some(mine) {
            return Answer::Wait(None);
        }
        // The first of the queue sees to it that turns go on: nobody else needs a timer.
        if self.holders.len() >= self.turns_max {
            self.holders.retain(|holder| holder.ends_at() > now);
        }
        let answer = if self.holders.len() < self.turns_max {
            self.holders.push(Holder {
                who,
                since: now,
                fed_at: now,
            });
            Answer::Turn
        } else if now >= since + WAIT_MAX {
            Answer::Late
        } else {
            let turns_end = self.holders.iter().map(Holder::ends_at).min();
            let until = turns_end.map_or(since + WAIT_MAX, |end| end.min(since + WAIT_MAX));
            return Answer::Wait(Some(until));
        };
        self.waiting.remove(&mine);
        *place = None;
        self.wake_first();
        answer
    }

    /// `who` was fed; false where it has no turn (any more).
    pub(crate) fn fed(&mut self, who: Who, now: Instant) -> bool {
        let holder = self.holders.iter_mut().find(|holder| holder.who == who);
        match holder {
            Some(holder) => {
                holder.fed_at = now;
                true
            }
            None => false,
        }
    }

    /// `who` gives its turn back, or its place in the queue.
    pub(crate) fn leave(&mut self, who: Who, place: &mut Option<u64>) {
        let before = self.holders.len();
        self.holders.retain(|holder| holder.who != who);
        let waited = place.take().and_then(|place| self.waiting.remove(&place));
        if waited.is_some() || self.holders.len() < before {
            self.wake_first();
        }
    }

    /// Whether `who` has a turn.
    pub(crate) fn holds(&self, who: Who) -> bool {
        self.holders.iter().any(|holder| holder.who == who)
    }

    /// Whether anybody has a turn or waits for one.
    #[cfg(test)]
    pub(crate) fn is_used(&self) -> bool {
        !self.holders.is_empty() || !self.waiting.is_empty()
    }

    fn wake_first(&self) {
        if let Some((_, first)) = self.waiting.first_key_value() {
            tracing::trace!(who = first.who, "next in turn");
            first.waker.wake_by_ref();
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU32, Ordering};
    use std::task::Wake;

    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[derive(Default)]
    struct Woken(AtomicU32);

    impl Wake for Woken {
        fn wake(self: Arc<Self>) {
            self.0.fetch_add(1, Ordering::Relaxed);
        }
    }

    struct Client {
        who: Who,
        place: Option<u64>,
        woken: Arc<Woken>,
    }

    impl Client {
        fn new(who: Who) -> Self {
            Self {
                who,
                place: None,
                woken: Arc::default(),
            }
        }

        fn ask(&mut self, table: &mut TurnTable, now: Instant) -> Answer {
            let waker = Arc::clone(&self.woken).into();
            table.ask(self.who, &mut self.place, now, &waker)
        }

        fn leave(&mut self, table: &mut TurnTable) {
            table.leave(self.who, &mut self.place);
        }

        fn woken(&self) -> u32 {
            self.woken.0.swap(0, Ordering::Relaxed)
        }
    }

    #[test]
    fn turns_are_given_in_the_order_of_asking() {
        let (mut table, now) = (TurnTable::new(1), Instant::now());
        let [mut a, mut b, mut c] = [1, 2, 3].map(Client::new);
        assert_eq!(a.ask(&mut table, now), Answer::Turn);
        assert_eq!(a.ask(&mut table, now), Answer::Turn);
        assert!(matches!(b.ask(&mut table, now), Answer::Wait(Some(_))));
        assert_eq!(c.ask(&mut table, now), Answer::Wait(None));
        a.leave(&mut table);
        assert_eq!((b.woken(), c.woken()), (1, 0));
        // Whoever was faster does not get in before those who wait.
        assert_eq!(a.ask(&mut table, now), Answer::Wait(None));
        assert_eq!(b.ask(&mut table, now), Answer::Turn);
        assert_eq!((c.woken(), a.woken()), (1, 0));
        assert!(matches!(c.ask(&mut table, now), Answer::Wait(Some(_))));
    }

    #[test]
    fn an_idle_turn_and_a_long_one_go_to_the_next_and_a_busy_one_stays() {
        for (fed_every, lost_after) in [(IDLE_MAX * 2, IDLE_MAX), (IDLE_MAX / 2, HOLD_MAX)] {
            let (mut table, start) = (TurnTable::new(1), Instant::now());
            let [mut a, mut b] = [1, 2].map(Client::new);
            assert_eq!(a.ask(&mut table, start), Answer::Turn);
            let mut now = start;
            let mut fed_at = start;
            loop {
                if now >= fed_at + fed_every {
                    assert!(table.fed(1, now));
                    fed_at = now;
                }
                match b.ask(&mut table, now) {
                    Answer::Wait(Some(until)) => assert!(until > now && until - now <= IDLE_MAX),
                    Answer::Turn => break,
                    other => panic!("{other:?}"),
                }
                now += MS;
            }
            assert_eq!(now, start + lost_after);
            assert!(!table.fed(1, now), "a knows that it lost its turn");
            assert!(matches!(a.ask(&mut table, now), Answer::Wait(Some(_))));
        }
    }

    #[test]
    fn nobody_waits_longer_than_the_bound() {
        let (mut table, start) = (TurnTable::new(1), Instant::now());
        // Twenty before it, each of which makes full use of its turn.
        let mut others: Vec<Client> = (10..30).map(Client::new).collect();
        for other in &mut others {
            other.ask(&mut table, start);
        }
        let mut late = Client::new(0);
        let mut now = start;
        let mut first = 1;
        let answer = loop {
            match late.ask(&mut table, now) {
                Answer::Wait(_) => {}
                answer => break answer,
            }
            while first < others.len()
                && !matches!(others[first].ask(&mut table, now), Answer::Wait(_))
            {
                first += 1;
            }
            for held in 10..30 {
                table.fed(held, now);
            }
            now += MS;
        };
        assert_eq!(answer, Answer::Late);
        assert!(now <= start + WAIT_MAX + HOLD_MAX, "{:?}", now - start);
        assert_eq!(late.place, None, "it asks anew next time");
    }

    #[test]
    fn who_leaves_the_queue_wakes_the_next() {
        let (mut table, now) = (TurnTable::new(1), Instant::now());
        let [mut a, mut b, mut c] = [1, 2, 3].map(Client::new);
        a.ask(&mut table, now);
        b.ask(&mut table, now);
        c.ask(&mut table, now);
        b.leave(&mut table);
        assert_eq!(c.woken(), 1);
        assert!(matches!(c.ask(&mut table, now), Answer::Wait(Some(_))));
        c.leave(&mut table);
        a.leave(&mut table);
        assert!(!table.is_used());
    }
}

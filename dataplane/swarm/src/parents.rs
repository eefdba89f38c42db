//! The parents of a download: who is connected, what each offers, how fast it delivers.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use pantala_wire::{NodeId, PieceIndex, PieceRun, PieceSet};

use crate::spread::spread;
use crate::{Candidate, DownloadConfig};

/// Different times at which the nodes of a rack begin to ask outside of it.
const FAR_STEPS: u32 = 16;

/// The state of a subscription.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Link {
    /// None; not to be tried before `retry_at`.
    Idle { retry_at: Duration },
    /// Asked for.
    Asked { since: Duration },
    /// The parent has spoken.
    Up,
}

/// One parent.
#[derive(Debug)]
pub(crate) struct Parent {
    pub(crate) link: Link,
    /// In control's latest list.
    pub(crate) listed: bool,
    /// In this node's rack.
    near: bool,
    offers: PieceSet,
    /// Pieces that it offered and then did not give.
    denied: PieceSet,
    pub(crate) outstanding_count: u32,
    /// Requests that it may have outstanding: halved when it is busy, one more with each piece.
    allowance: u32,
    /// Of these, what bulk may use: its share of what is outstanding at all parents.
    bulk_share: u32,
    pub(crate) paused_until: Duration,
    busy_in_row: u32,
    pub(crate) strikes: u32,
    /// Time that it takes for a piece, decayed.
    piece_time: Option<Duration>,
    /// When it last delivered anything, or began to owe something.
    pub(crate) progressed: Duration,
    /// When the piece that it now delivers began.
    piece_began: Duration,
    /// Since when it has had nothing to do.
    pub(crate) idle_since: Duration,
    /// A full look through all wanted pieces found none for it.
    pub(crate) dry: bool,
}

impl Parent {
    fn new(piece_count: u32, config: &DownloadConfig, now: Duration) -> Self {
        Self {
            link: Link::Idle { retry_at: now },
            listed: true,
            near: false,
            offers: PieceSet::empty(piece_count),
            denied: PieceSet::empty(piece_count),
            outstanding_count: 0,
            allowance: config.requests_per_parent_max,
            bulk_share: config.requests_per_parent_max,
            paused_until: Duration::ZERO,
            busy_in_row: 0,
            strikes: 0,
            piece_time: None,
            progressed: now,
            piece_began: now,
            idle_since: now,
            dry: false,
        }
    }

    pub(crate) fn is_linked(&self) -> bool {
        !matches!(self.link, Link::Idle { .. })
    }
    /// Given up until control names it again.
    pub(crate) fn is_given_up(&self, config: &DownloadConfig) -> bool {
        self.strikes >= config.strikes_max
    }
    pub(crate) fn offers(&self, piece: u32) -> bool {
        self.link == Link::Up && self.offers.contains(PieceIndex(piece))
    }
    /// Requests it may have outstanding; a quarter of them is for urgent pieces only.
    pub(crate) fn limit(&self, urgent: bool) -> u32 {
        if urgent {
            self.allowance
        } else {
            (self.allowance - self.allowance / 4)
                .min(self.bulk_share)
                .max(1)
        }
    }
    pub(crate) fn has_slot(&self, urgent: bool, now: Duration) -> bool {
        self.link == Link::Up
            && self.paused_until <= now
            && self.outstanding_count < self.limit(urgent)
    }

    /// What one more request is expected to wait for its last byte.
    fn expected_wait(&self, unknown: Duration, now: Duration) -> Duration {
        let piece_time = self.piece_time.unwrap_or(unknown);
        let owed = piece_time * (self.outstanding_count + 1);
        if self.outstanding_count == 0 {
            return owed;
        }
        // What it is late by counts: a parent that has just stopped looks fast in its average.
        owed + now
            .saturating_sub(self.progressed)
            .saturating_sub(piece_time)
    }

    pub(crate) fn request_started(&mut self, now: Duration) {
        if self.outstanding_count == 0 {
            self.progressed = now;
            self.piece_began = now;
        }
        self.outstanding_count += 1;
    }
    pub(crate) fn request_ended(&mut self, now: Duration) {
        self.outstanding_count = self.outstanding_count.saturating_sub(1);
        self.idle_since = now;
    }
    pub(crate) fn delivered(&mut self, config: &DownloadConfig, now: Duration) {
        let took = now.saturating_sub(self.piece_began);
        // A quarter of the newest: eight pieces forget nine tenths of the past.
        self.piece_time = Some(self.piece_time.map_or(took, |old| (old * 3 + took) / 4));
        self.piece_began = now;
        self.progressed = now;
        self.strikes = 0;
        self.busy_in_row = 0;
        self.allowance = (self.allowance + 1).min(config.requests_per_parent_max);
    }
}

/// All parents, and how many of them offer each piece.
#[derive(Debug)]
pub(crate) struct Parents {
    piece_count: u32,
    seed: u64,
    table: BTreeMap<NodeId, Parent>,
    /// Control's list, best first.
    order: Vec<NodeId>,
    shut_out: BTreeSet<NodeId>,
    /// How many connected parents offer each piece.
    offered_by_count: Vec<u16>,
    /// Of these, those in this node's rack.
    offered_near_count: Vec<u16>,
    /// Since when each piece has been offered; of use while it is.
    offered_since: Vec<Duration>,
    /// Connected parents in this node's rack.
    near_up_count: u16,
}

impl Parents {
    pub(crate) fn new(piece_count: u32, seed: u64) -> Self {
        Self {
            piece_count,
            seed,
            table: BTreeMap::new(),
            order: Vec::new(),
            shut_out: BTreeSet::new(),
            offered_by_count: vec![0; piece_count as usize],
            offered_near_count: vec![0; piece_count as usize],
            offered_since: vec![Duration::ZERO; piece_count as usize],
            near_up_count: 0,
        }
    }

    /// Takes control's list. A parent that it no longer names stays while it is connected.
    pub(crate) fn list(
        &mut self,
        config: &DownloadConfig,
        candidates: &[Candidate],
        now: Duration,
    ) {
        for parent in self.table.values_mut() {
            parent.listed = false;
        }
        self.order.clear();
        for &Candidate { id, near } in candidates {
            if self.order.len() >= config.candidates_max as usize {
                break;
            }
            if self.shut_out.contains(&id) || self.order.contains(&id) {
                continue;
            }
            self.order.push(id);
            let parent = self
                .table
                .entry(id)
                .or_insert_with(|| Parent::new(self.piece_count, config, now));
            parent.listed = true;
            if !parent.is_linked() {
                // Its offers are counted by where it stood when they came.
                parent.near = near;
            }
            if parent.is_given_up(config) {
                // One more try, and not at once: control may repeat its list every second.
                parent.strikes = config.strikes_max.saturating_sub(1);
                parent.link = Link::Idle {
                    retry_at: now + config.parent_retry_max,
                };
            }
        }
        self.forget_unlisted();
    }

    fn forget_unlisted(&mut self) {
        self.table
            .retain(|_, parent| parent.listed || parent.is_linked());
    }

    /// Shares what may be outstanding in bulk out among the connected parents.
    pub(crate) fn share_out_bulk(&mut self, config: &DownloadConfig) {
        let up = |p: &&mut Parent| p.link == Link::Up;
        let up_count = self.table.values_mut().filter(up).count() as u32;
        let share = config.bulk_in_flight_target.div_ceil(up_count.max(1));
        for parent in self.table.values_mut() {
            parent.bulk_share = share;
        }
    }

    pub(crate) fn order(&self) -> &[NodeId] {
        &self.order
    }
    pub(crate) fn get(&self, id: NodeId) -> Option<&Parent> {
        self.table.get(&id)
    }
    pub(crate) fn get_mut(&mut self, id: NodeId) -> Option<&mut Parent> {
        self.table.get_mut(&id)
    }
    pub(crate) fn iter(&self) -> impl Iterator<Item = (NodeId, &Parent)> {
        self.table.iter().map(|(id, parent)| (*id, parent))
    }
    pub(crate) fn iter_mut(&mut self) -> impl Iterator<Item = (NodeId, &mut Parent)> {
        self.table.iter_mut().map(|(id, parent)| (*id, parent))
    }
    pub(crate) fn linked_count(&self) -> u32 {
        self.table.values().filter(|p| p.is_linked()).count() as u32
    }
    pub(crate) fn up_count(&self) -> u32 {
        let up = self.table.values().filter(|p| p.link == Link::Up);
        up.count() as u32
    }
    pub(crate) fn is_shut_out(&self, id: NodeId) -> bool {
        self.shut_out.contains(&id)
    }
    pub(crate) fn offered_by_count(&self, piece: u32) -> u16 {
        self.offered_by_count[piece as usize]
    }
    pub(crate) fn is_offered(&self, piece: u32) -> bool {
        self.offered_by_count(piece) > 0
    }

    /// Takes in an offer; returns the pieces that nobody offered before, or `None` where the
    /// parent is none of ours.
    pub(crate) fn offer(
        &mut self,
        id: NodeId,
        runs: &[PieceRun],
        complete: bool,
        now: Duration,
    ) -> Option<Vec<u32>> {
        let parent = self.table.get_mut(&id).filter(|p| p.is_linked())?;
        if parent.near && parent.link != Link::Up {
            self.near_up_count += 1;
        }
        parent.link = Link::Up;
        let whole = PieceRun {
            first: 0,
            count: self.piece_count,
        };
        let mut new = Vec::new();
        let all = runs.iter().copied().chain(complete.then_some(whole));
        for run in all {
            for piece in run.first..run.range().end.min(self.piece_count) {
                if !parent.denied.contains(PieceIndex(piece))
                    && parent.offers.insert(PieceIndex(piece))
                {
                    let count = &mut self.offered_by_count[piece as usize];
                    if *count == 0 {
                        new.push(piece);
                        self.offered_since[piece as usize] = now;
                    }
                    *count += 1;
                    self.offered_near_count[piece as usize] += u16::from(parent.near);
                }
            }
        }
        Some(new)
    }

    /// The parent does not give this piece: do not ask it again in this subscription.
    pub(crate) fn deny(&mut self, id: NodeId, piece: u32) {
        if let Some(parent) = self.table.get_mut(&id) {
            parent.denied.insert(PieceIndex(piece));
            if parent.offers.remove(PieceIndex(piece)) {
                self.offered_by_count[piece as usize] -= 1;
                self.offered_near_count[piece as usize] -= u16::from(parent.near);
            }
        }
    }

    /// The parent is busy; true if it has been so too often in a row.
    pub(crate) fn busy(&mut self, config: &DownloadConfig, id: NodeId, now: Duration) -> bool {
        let Some(parent) = self.table.get_mut(&id) else {
            return false;
        };
        let pause = config.busy_retry * (1 << parent.busy_in_row.min(6));
        parent.busy_in_row += 1;
        parent.allowance = (parent.allowance / 2).max(1);
        parent.paused_until = now + pause;
        parent.busy_in_row > config.strikes_max
    }

    /// Ends a subscription in the books. `strike` counts it as the parent's failure, with a pause
    /// that doubles.
    pub(crate) fn unlink(
        &mut self,
        config: &DownloadConfig,
        id: NodeId,
        strike: bool,
        now: Duration,
    ) {
        let Some(parent) = self.table.get_mut(&id) else {
            return;
        };
        for piece in parent.offers.iter() {
            self.offered_by_count[piece.0 as usize] -= 1;
            self.offered_near_count[piece.0 as usize] -= u16::from(parent.near);
        }
        if parent.near && parent.link == Link::Up {
            self.near_up_count -= 1;
        }
        let doublings = parent.strikes.min(16);
        if strike {
            parent.strikes += 1;
        }
        let pause = (config.parent_retry * (1 << doublings)).min(config.parent_retry_max);
        let fresh = Parent::new(self.piece_count, config, now);
        *parent = Parent {
            link: Link::Idle {
                retry_at: now + pause,
            },
            listed: parent.listed,
            near: parent.near,
            strikes: parent.strikes,
            piece_time: parent.piece_time,
            ..fresh
        };
        self.forget_unlisted();
    }

    /// Never again for this blob.
    pub(crate) fn shut_out(&mut self, config: &DownloadConfig, id: NodeId, now: Duration) {
        self.unlink(config, id, true, now);
        self.table.remove(&id);
        self.order.retain(|other| *other != id);
        self.shut_out.insert(id);
    }

    /// When this node may ask for `piece` outside of its rack. At once, where it knows nobody in its
    /// rack. Else each node of a rack waits for another time, so that mostly one fetches it over the
    /// links that racks share, and the others take it from that one; and longer where one of them
    /// has it already.
    pub(crate) fn far_from(&self, config: &DownloadConfig, piece: u32) -> Duration {
        if self.near_up_count == 0 {
            return Duration::ZERO;
        }
        let step = spread(self.seed, u64::from(piece)) % u64::from(FAR_STEPS);
        let turn = config.far_patience / FAR_STEPS * step as u32;
        let has_near = self.offered_near_count[piece as usize] > 0;
        let longer = if has_near {
            config.far_patience
        } else {
            Duration::ZERO
        };
        self.offered_since[piece as usize] + turn + longer
    }

    /// The connected parent with a free slot from which `piece` is expected first: one in this node's
    /// rack before all others, which count only where `far` says so.
    pub(crate) fn best_for(
        &self,
        piece: u32,
        urgent: bool,
        far: bool,
        except: Option<NodeId>,
        now: Duration,
    ) -> Option<NodeId> {
        if !self.is_offered(piece) {
            return None;
        }
        // A parent not yet measured is taken to be as fast as the best known.
        let known = self.table.values().filter(|p| p.link == Link::Up);
        let unknown = known.filter_map(|p| p.piece_time).min().unwrap_or_default();
        self.iter()
            .filter(|(_, p)| far || p.near)
            .filter(|(id, p)| p.has_slot(urgent, now) && p.offers(piece) && Some(*id) != except)
            .min_by_key(|(id, p)| {
                let wait = p.expected_wait(unknown, now);
                (!p.near, wait, p.outstanding_count, self.tie(*id))
            })
            .map(|(id, _)| id)
    }

    fn tie(&self, id: NodeId) -> u64 {
        let head = id.as_bytes().first_chunk::<8>();
        spread(
            self.seed,
            head.map_or(0, |bytes| u64::from_le_bytes(*bytes)),
        )
    }

    /// Some connected parent could take a request, and has not been looked through in vain.
    pub(crate) fn any_slot(&self, urgent: bool, now: Duration) -> bool {
        self.table
            .values()
            .any(|p| p.has_slot(urgent, now) && (urgent || !p.dry))
    }

    /// The end of the next pause of a connected parent.
    pub(crate) fn next_pause_end(&self, now: Duration) -> Option<Duration> {
        let paused = self.table.values().filter(|p| p.link == Link::Up);
        paused.map(|p| p.paused_until).filter(|&t| t > now).min()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn node(n: u8) -> NodeId {
        NodeId::new([n; 32])
    }
    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    fn connected(count: u8) -> (DownloadConfig, Parents) {
        let config = DownloadConfig::default();
        let mut parents = Parents::new(4, 1);
        let ids: Vec<NodeId> = (0..count).map(node).collect();
        let listed: Vec<Candidate> = ids.iter().map(|&id| id.into()).collect();
        parents.list(&config, &listed, ms(0));
        for id in ids {
            parents.get_mut(id).unwrap().link = Link::Asked { since: ms(0) };
            parents.offer(id, &[], true, ms(0)).unwrap();
        }
        (config, parents)
    }

    #[test]
    fn the_parent_that_delivers_faster_is_asked_and_loses_it_when_it_falls_behind() {
        let (config, mut parents) = connected(2);
        for (id, took) in [(node(0), ms(10)), (node(1), ms(30))] {
            let parent = parents.get_mut(id).unwrap();
            parent.request_started(ms(100));
            parent.delivered(&config, ms(100) + took);
            parent.request_ended(ms(100) + took);
        }
        assert_eq!(
            parents.best_for(0, false, true, None, ms(200)),
            Some(node(0))
        );
        parents.get_mut(node(0)).unwrap().request_started(ms(200));
        assert_eq!(
            parents.best_for(1, false, true, None, ms(201)),
            Some(node(0))
        );
        assert_eq!(
            parents.best_for(1, false, true, None, ms(300)),
            Some(node(1))
        );
    }

    #[test]
    fn a_neighbour_is_asked_before_who_is_faster_and_far() {
        let (config, mut parents) = connected(2);
        assert_eq!(parents.far_from(&config, 0), ms(0), "nobody is near");
        parents.unlink(&config, node(0), false, ms(0));
        let near = Candidate {
            id: node(0),
            near: true,
        };
        parents.list(&config, &[near, node(1).into()], ms(0));
        parents.get_mut(node(0)).unwrap().link = Link::Asked { since: ms(0) };
        parents.offer(node(0), &[PieceRun { first: 0, count: 1 }], false, ms(0));
        parents.get_mut(node(0)).unwrap().piece_time = Some(ms(90));
        parents.get_mut(node(1)).unwrap().piece_time = Some(ms(10));
        assert_eq!(parents.best_for(0, false, true, None, ms(9)), Some(node(0)));
        assert_eq!(parents.best_for(1, false, true, None, ms(9)), Some(node(1)));
        assert_eq!(parents.best_for(1, false, false, None, ms(9)), None);
        let patience = config.far_patience;
        assert!(
            parents.far_from(&config, 1) < patience,
            "nobody near has it"
        );
        assert!(
            parents.far_from(&config, 0) >= patience,
            "a neighbour has it"
        );
        parents.unlink(&config, node(0), true, ms(9));
        assert_eq!(
            parents.far_from(&config, 0),
            ms(0),
            "nobody is near any more"
        );
    }

    #[test]
    fn the_nodes_of_a_rack_ask_outside_for_the_same_piece_at_different_times() {
        let config = DownloadConfig::default();
        let times: BTreeSet<Duration> = (0..100)
            .map(|seed| {
                let mut parents = Parents::new(1, seed);
                parents.near_up_count = 1;
                parents.far_from(&config, 0)
            })
            .collect();
        assert_eq!(times.len(), FAR_STEPS as usize);
        assert!(times.iter().all(|&time| time < config.far_patience));
    }

    #[test]
    fn a_piece_once_denied_is_not_offered_again_in_the_same_subscription() {
        let (_, mut parents) = connected(1);
        parents.deny(node(0), 2);
        assert!(!parents.is_offered(2) && parents.is_offered(1));
        parents.offer(node(0), &[PieceRun { first: 0, count: 9 }], true, ms(0));
        assert!(!parents.is_offered(2));
    }

    #[test]
    fn a_busy_parent_is_asked_less_and_later() {
        let (config, mut parents) = connected(1);
        assert!(!parents.busy(&config, node(0), ms(0)));
        assert_eq!(parents.best_for(0, true, true, None, ms(49)), None);
        assert_eq!(parents.best_for(0, true, true, None, ms(50)), Some(node(0)));
        assert_eq!(parents.get(node(0)).unwrap().limit(true), 4);
        let often = (0..10).map(|_| parents.busy(&config, node(0), ms(50)));
        assert!(often.last().unwrap());
    }

    #[test]
    fn a_liar_is_not_taken_back_when_control_names_it() {
        let (config, mut parents) = connected(2);
        parents.shut_out(&config, node(1), ms(5));
        parents.list(&config, &[node(1).into(), node(0).into()], ms(9));
        assert_eq!(parents.order(), [node(0)]);
        assert!(parents.get(node(1)).is_none());
        assert_eq!(parents.offered_by_count(0), 1);
    }

    #[test]
    fn a_parent_that_fails_again_and_again_waits_longer_and_is_given_up() {
        let (config, mut parents) = connected(1);
        let mut pauses = Vec::new();
        for _ in 0..config.strikes_max {
            parents.unlink(&config, node(0), true, ms(0));
            let Link::Idle { retry_at } = parents.get(node(0)).unwrap().link else {
                panic!("still linked");
            };
            pauses.push(retry_at);
        }
        assert!(pauses.is_sorted() && pauses[0] < pauses[2]);
        assert!(parents.get(node(0)).unwrap().is_given_up(&config));
        parents.list(&config, &[node(0).into()], ms(0));
        assert!(!parents.get(node(0)).unwrap().is_given_up(&config));
    }
}

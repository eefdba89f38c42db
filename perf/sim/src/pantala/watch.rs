//! The bounds that the world sees kept: by each download, and by each node that serves.

use super::node::{Live, Upload};
use super::{DEAR_CHECK_EVERY, World};
use crate::check::Violation;
use crate::scenario::Habit;

impl World {
    /// A node takes a piece into the line to a child.
    pub(super) fn check_promise(&mut self, parent: u32, upload: &Upload) {
        let it = &self.nodes[parent as usize];
        let is_held = it.holds(upload.blob, upload.piece);
        let promised = self
            .referee
            .promised(parent, upload.child, upload.piece, is_held);
        let stored = it.stores.get(&upload.blob);
        let is_bad = stored.is_some_and(|s| s.bad.contains(&upload.piece));
        if let Err(violation) = promised {
            self.breaks(violation);
        } else if is_bad && it.habit == Habit::Honest && !self.has_forgers {
            // A forged piece matches its digests: that is found at the end, and by design.
            let piece = upload.piece;
            let text =
                format!("node {parent} serves piece {piece}, which does not match its digests");
            self.breaks(Violation::new("verified", text));
        }
    }

    /// The bounds of a download, after it has decided.
    pub(super) fn check_task(&mut self, node: u32, blob: u32) {
        let config = &self.policy.download;
        let it = &self.nodes[node as usize];
        let Some(task) = it.tasks.get(&blob) else {
            return;
        };
        let (mut to_parents, mut leased_count, mut alone_count) = (0u32, 0u32, 0u32);
        for live in task.live.values() {
            match live {
                Live::Parent { .. } => to_parents += 1,
                Live::Source { leased: true, .. } => leased_count += 1,
                Live::Source { leased: false, .. } => alone_count += 1,
            }
        }
        let parents = task.subscriptions.len();
        // What is done and not yet taken in still counts here and no more there.
        let wrong = if to_parents > config.requests_in_flight_max {
            Some(format!("{to_parents} requests in flight"))
        } else if leased_count > config.source_fetches_max {
            Some(format!("{leased_count} leased fetches"))
        } else if alone_count > config.alone_fetches_max {
            Some(format!("{alone_count} fetches alone"))
        } else if parents > config.parents_max as usize {
            Some(format!("{parents} parents"))
        } else {
            None
        };
        if let Some(wrong) = wrong {
            let text = format!("node {node} has {wrong}");
            return self.breaks(Violation::new("bounds", text));
        }
        if self.counts.steps.is_multiple_of(DEAR_CHECK_EVERY) {
            self.check_books(node, blob);
        }
    }

    /// What is dear to check, once in a while.
    fn check_books(&mut self, node: u32, blob: u32) {
        let it = &self.nodes[node as usize];
        let Some(task) = it.tasks.get(&blob) else {
            return;
        };
        let mut of_parent: std::collections::BTreeMap<u32, u32> = Default::default();
        for live in task.live.values() {
            if let Live::Parent { parent, .. } = live {
                *of_parent.entry(*parent).or_default() += 1;
            }
        }
        let most = of_parent.values().copied().max().unwrap_or(0);
        let held = it.stores.get(&blob).map_or(0, |stored| stored.held.len());
        let server = &it.server;
        let lined: usize = server
            .lines
            .values()
            .map(|line| line.queue.len() + usize::from(line.active.is_some()))
            .sum();
        let waiting: usize = server.waiting.iter().map(|queue| queue.len()).sum();
        let wrong = if most > self.policy.download.requests_per_parent_max {
            Some(format!("{most} requests at one parent"))
        } else if lined + waiting != server.places_used {
            let places = server.places_used;
            Some(format!("{lined} + {waiting} uploads in {places} places"))
        } else if lined != server.turns_used.iter().sum::<usize>() {
            Some(format!("{lined} uploads in {:?} turns", server.turns_used))
        } else if task.machine.held().len() > held {
            Some("more pieces than its store".to_owned())
        } else {
            task.machine.inconsistency()
        };
        if let Some(wrong) = wrong {
            let text = format!("node {node}, blob {blob}: {wrong}");
            self.breaks(Violation::new("books", text));
        }
    }
}

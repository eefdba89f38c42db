//! Tit for tat: whom a peer serves. Without it, in a mesh that does not choke, every lane is open.

use super::{Choking, Event, Mesh};
use crate::baseline::engine::shuffle;

impl Mesh<'_> {
    /// Serves those neighbours that have given most, or from a complete peer have taken most, and some by
    /// chance; and comes again.
    pub(super) fn choke(&mut self, peer: u32) {
        let Some(choking) = self.rules.choking.clone() else {
            return;
        };
        if !self.engine.alive(peer) {
            return;
        }
        self.engine
            .at(self.engine.now + choking.every, Event::Choke(peer));
        let complete = self.peers[peer as usize].have.is_full();
        let mut ranked: Vec<(u64, u32)> = Vec::new();
        for &connection in &self.peers[peer as usize].connections {
            let (side, _) = self.other(connection, peer);
            let at = &self.connections[connection as usize];
            let counted = if complete { 1 - side } else { side };
            if self.interested(connection, peer) {
                ranked.push((at.lanes[counted].recent_bytes, connection));
            }
        }
        // The order before the stable sort decides among equals.
        shuffle(&mut self.engine.rng, &mut ranked);
        ranked.sort_by_key(|&(bytes, _)| std::cmp::Reverse(bytes));
        let mut chosen: Vec<u32> = ranked.iter().map(|&(_, connection)| connection).collect();
        let regular = choking.regular.min(chosen.len());
        shuffle(&mut self.engine.rng, &mut chosen[regular..]);
        chosen.truncate(choking.regular + choking.optimistic);
        for connection in self.peers[peer as usize].connections.clone() {
            let (side, other) = self.other(connection, peer);
            let lanes = &mut self.connections[connection as usize].lanes;
            lanes[side].recent_bytes = 0;
            let serve = chosen.contains(&connection);
            if lanes[1 - side].open && !serve {
                lanes[1 - side].open = false;
                self.drop_waiting(connection, 1 - side);
                self.request_everywhere(other);
            } else if !lanes[1 - side].open && serve {
                lanes[1 - side].open = true;
                self.request(connection, 1 - side);
            }
        }
    }

    /// What waits is taken back; the piece that is under way still comes.
    fn drop_waiting(&mut self, connection: u32, side: usize) {
        let at = &mut self.connections[connection as usize];
        let peer = at.ends[side] as usize;
        let waiting: Vec<u32> = at.lanes[side]
            .requests
            .drain(1.min(at.lanes[side].requests.len())..)
            .collect();
        waiting
            .into_iter()
            .for_each(|piece| self.peers[peer].asked.remove(piece));
    }

    /// Whether the other end of a connection wants anything that this peer has.
    fn interested(&self, connection: u32, peer: u32) -> bool {
        let (_, other) = self.other(connection, peer);
        self.peers[other as usize]
            .have
            .wants(&self.peers[peer as usize].have)
    }

    /// Serves random neighbours that want something while there are free places: a place that stays
    /// empty until the next choking helps nobody.
    pub(super) fn fill_slots(&mut self, peer: u32) {
        let Some(Choking {
            regular,
            optimistic,
            ..
        }) = self.rules.choking
        else {
            return;
        };
        let connections = &self.peers[peer as usize].connections;
        let lane = |connection: u32| {
            let (side, _) = self.other(connection, peer);
            &self.connections[connection as usize].lanes[1 - side]
        };
        let served = connections
            .iter()
            .filter(|&&connection| lane(connection).open)
            .count();
        if served >= regular + optimistic {
            return;
        }
        let closed = connections
            .iter()
            .copied()
            .filter(|&connection| !lane(connection).open);
        let mut waiting: Vec<u32> = closed
            .filter(|&connection| self.interested(connection, peer))
            .collect();
        shuffle(&mut self.engine.rng, &mut waiting);
        waiting.truncate(regular + optimistic - served);
        for connection in waiting {
            let (side, _) = self.other(connection, peer);
            self.connections[connection as usize].lanes[1 - side].open = true;
            self.request(connection, 1 - side);
        }
    }

    /// A lane has nothing to ask for. When its peer wants nothing more of the other, the place goes to
    /// someone who does.
    pub(super) fn lost_interest(&mut self, connection: u32, side: usize) {
        if self.rules.choking.is_none()
            || !self.connections[connection as usize].lanes[side]
                .requests
                .is_empty()
        {
            return;
        }
        let server = self.connections[connection as usize].ends[1 - side];
        if !self.interested(connection, server) {
            self.connections[connection as usize].lanes[side].open = false;
            self.fill_slots(server);
        }
    }
}

//! Who is connected to whom: what the tracker names, and what deaths and completion take away.

use super::{Connection, Event, Lane, Mesh};
use crate::baseline::engine::shuffle;

impl Mesh<'_> {
    /// Asks the tracker, connects to those it names that have room, and comes again.
    pub(super) fn announce(&mut self, node: u32) {
        if !self.engine.alive(node) || self.peers[node as usize].have.is_full() {
            return;
        }
        if self.has_room(node) {
            for other in self.handout(node) {
                if !self.has_room(node) {
                    break;
                }
                self.connect(node, other);
            }
        }
        self.engine
            .at(self.engine.now + self.rules.announce, Event::Announce(node));
    }

    fn has_room(&self, node: u32) -> bool {
        let peer = &self.peers[node as usize];
        peer.connections.len() < self.rules.neighbours_max
            && peer.initiated < self.rules.initiated_max
    }

    /// A random selection of the peers that the tracker knows, with the seeds in it.
    fn handout(&mut self, node: u32) -> Vec<u32> {
        let mut named: Vec<u32> = Vec::with_capacity(self.rules.handout);
        if self.rules.complete_first {
            // All complete ones are looked at: who has the whole blob is worth most.
            named.extend(
                self.known
                    .iter()
                    .filter(|&&peer| self.peers[peer as usize].have.is_full()),
            );
            shuffle(&mut self.engine.rng, &mut named);
            named.truncate(self.rules.handout - self.seeds.len());
        }
        named.extend(self.seeds.clone());
        let wanted = self.rules.handout.min(self.known.len());
        // Drawn with repeats, so it may come out a little short: no rule asks for exactly that many.
        for _ in 0..2 * wanted {
            if named.len() >= wanted {
                break;
            }
            let peer = self.engine.rng.pick(&self.known);
            if peer != node && !named.contains(&peer) {
                named.push(peer);
            }
        }
        if !self.rules.complete_first {
            shuffle(&mut self.engine.rng, &mut named);
        }
        named
    }

    fn connect(&mut self, node: u32, other: u32) {
        let full = self.peers[other as usize].connections.len() >= self.rules.neighbours_max;
        let twice = self.peers[node as usize]
            .connections
            .iter()
            .any(|&at| self.other(at, node).1 == other);
        if node == other || full || twice || !self.engine.alive(other) {
            return;
        }
        let open = self.rules.choking.is_none();
        let lane = || Lane {
            open,
            ..Lane::default()
        };
        let connection = self.connections.len() as u32;
        self.connections.push(Connection {
            ends: [node, other],
            lanes: [lane(), lane()],
            closed: false,
        });
        self.peers[node as usize].initiated += 1;
        for (one, two) in [(node, other), (other, node)] {
            let pieces = 0..self.cut.pieces;
            let held: Vec<u32> = pieces
                .filter(|&piece| self.peers[two as usize].have.has(piece))
                .collect();
            let peer = &mut self.peers[one as usize];
            peer.connections.push(connection);
            held.into_iter()
                .for_each(|piece| peer.spread[piece as usize] += 1);
        }
        if self.rules.choking.is_some() {
            self.fill_slots(node);
            self.fill_slots(other);
        }
        for side in [0, 1] {
            self.request(connection, side);
        }
    }

    /// Closes a connection; what was asked over it is to be asked of others.
    pub(super) fn disconnect(&mut self, connection: u32) {
        let ends = self.connections[connection as usize].ends;
        self.connections[connection as usize].closed = true;
        self.peers[ends[0] as usize].initiated -= 1;
        for (side, end) in ends.into_iter().enumerate() {
            self.drop_requests(connection, side);
            let other = ends[1 - side] as usize;
            for piece in 0..self.cut.pieces {
                if self.peers[other].have.has(piece) {
                    self.peers[end as usize].spread[piece as usize] -= 1;
                }
            }
            self.peers[end as usize]
                .connections
                .retain(|&at| at != connection);
        }
    }

    /// Takes back all requests of a lane.
    pub(super) fn drop_requests(&mut self, connection: u32, side: usize) {
        let at = &mut self.connections[connection as usize];
        let peer = at.ends[side] as usize;
        let requests = std::mem::take(&mut at.lanes[side].requests);
        if let Some(transfer) = at.lanes[side].transfer.take() {
            self.engine.cancel(transfer);
        }
        for piece in requests {
            // In the endgame another neighbour may still have been asked for it.
            let elsewhere = self.peers[peer].connections.iter().any(|&at| {
                let (side, _) = self.other(at, peer as u32);
                self.connections[at as usize].lanes[side]
                    .requests
                    .contains(&piece)
            });
            if !elsewhere {
                self.peers[peer].asked.remove(piece);
            }
        }
    }

    /// Two peers with the whole blob have nothing to say to each other: their places go to others.
    pub(super) fn part_from_complete(&mut self, peer: u32) {
        for connection in self.peers[peer as usize].connections.clone() {
            let (_, other) = self.other(connection, peer);
            if self.peers[other as usize].have.is_full() {
                // The piece that made it complete is not counted at its neighbours yet.
                self.disconnect_complete(connection);
            }
        }
    }

    fn disconnect_complete(&mut self, connection: u32) {
        let at = &mut self.connections[connection as usize];
        at.closed = true;
        let ends = at.ends;
        self.peers[ends[0] as usize].initiated -= 1;
        for end in ends {
            self.peers[end as usize]
                .connections
                .retain(|&at| at != connection);
        }
        if self.rules.choking.is_some() {
            ends.into_iter().for_each(|end| self.fill_slots(end));
        }
    }

    pub(super) fn died(&mut self, node: u32) {
        self.known.retain(|&known| known != node);
        self.held_back.retain(|&held| held != node);
        for connection in self.peers[node as usize].connections.clone() {
            let (_, other) = self.other(connection, node);
            self.disconnect(connection);
            if self.rules.choking.is_some() {
                self.fill_slots(other);
            }
            self.request_everywhere(other);
        }
    }

    /// Asks over all connections: requests have come free.
    pub(super) fn request_everywhere(&mut self, peer: u32) {
        for at in 0..self.peers[peer as usize].connections.len() {
            let Some(&connection) = self.peers[peer as usize].connections.get(at) else {
                return;
            };
            let (side, _) = self.other(connection, peer);
            self.request(connection, side);
        }
    }
}

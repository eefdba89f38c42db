//! Who waits for news of which blob: one wake-up channel for each blob that somebody watches.
//!
//! Subscribers of other nodes and readers of clients wait here; whoever stores a piece rings. The
//! channel carries no data: a waiter looks at the store itself, so a missed ring loses nothing.

use std::collections::HashMap;
use std::sync::Arc;

use pantala_wire::BlobDigest;
use parking_lot::Mutex;
use tokio::sync::watch;

/// Blobs watched at once, above which the board sweeps out those that nobody watches any more.
const SWEEP_ABOVE: usize = 1024;

/// The wake-up channels of all blobs.
#[derive(Clone, Default)]
pub struct Board {
    bells: Arc<Mutex<HashMap<BlobDigest, watch::Sender<u64>>>>,
}

impl Board {
    /// A receiver that changes whenever something happens to the blob.
    pub fn watch(&self, digest: &BlobDigest) -> watch::Receiver<u64> {
        let mut bells = self.bells.lock();
        if bells.len() >= SWEEP_ABOVE && !bells.contains_key(digest) {
            bells.retain(|_, bell| bell.receiver_count() > 0);
        }
        bells
            .entry(*digest)
            .or_insert_with(|| watch::Sender::new(0))
            .subscribe()
    }

    /// Wakes all who watch the blob.
    pub fn ring(&self, digest: &BlobDigest) {
        if let Some(bell) = self.bells.lock().get(digest) {
            bell.send_modify(|rings| *rings = rings.wrapping_add(1));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_ring_reaches_those_who_watch_that_blob() {
        let board = Board::default();
        let (a, b) = (BlobDigest::new([1; 32]), BlobDigest::new([2; 32]));
        let (mut of_a, mut of_b) = (board.watch(&a), board.watch(&b));
        board.ring(&a);
        assert!(of_a.has_changed().unwrap());
        assert!(!of_b.has_changed().unwrap());
        of_a.mark_unchanged();
        of_b.mark_unchanged();
    }

    #[test]
    fn unwatched_blobs_are_swept_out() {
        let board = Board::default();
        for n in 0..4 * SWEEP_ABOVE as u32 {
            let mut bytes = [0; 32];
            bytes[..4].copy_from_slice(&n.to_be_bytes());
            drop(board.watch(&BlobDigest::new(bytes)));
        }
        assert!(board.bells.lock().len() <= SWEEP_ABOVE);
    }
}

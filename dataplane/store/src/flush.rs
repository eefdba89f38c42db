//! Making pieces survive a crash.

use pantala_wire::{PieceIndex, PieceSet};

use crate::blob::Blob;
use crate::error::StoreError;
use crate::hash::Sha256Proof;

impl Blob {
    /// Makes every piece committed before this call survive a crash: bytes, then records, then the
    /// bits that vouch for both.
    ///
    /// # Errors
    /// [`StoreError::Io`]. Where a sync fails, the kernel may have dropped any page written since
    /// the last one and will not say so again: all pieces and groups that were not durable are
    /// dropped, and have to be fetched again.
    pub fn flush(&self) -> Result<(), StoreError> {
        self.flush_in_turn(&mut self.0.flushing.lock())
    }

    fn flush_in_turn(&self, named: &mut bool) -> Result<(), StoreError> {
        let state = self.0.state.lock();
        let dirty: Vec<(PieceIndex, u64)> = state.dirty.iter().map(|(p, c)| (*p, *c)).collect();
        drop(state);
        if dirty.is_empty() {
            return Ok(());
        }
        self.renew_head()?;
        let synced = self.0.files.sync_data();
        if let Err(error) = synced.and_then(|()| self.0.files.sync_meta()) {
            self.drop_unsynced(&mut self.0.durable.lock());
            return Err(error);
        }
        self.name_in_turn(named)?;
        let mut durable = self.0.durable.lock();
        let state = self.0.state.lock();
        // Discarded meanwhile, or discarded and written anew: not what was synced.
        let still = dirty.iter().filter(|(p, c)| state.dirty.get(p) == Some(c));
        let flushed: Vec<PieceIndex> = still.map(|(piece, _)| *piece).collect();
        drop(state);
        for piece in &flushed {
            durable.insert(*piece);
        }
        self.0.files.write_bitmap(&durable)?;
        self.sync_meta_or_drop(&mut durable)?;
        let mut state = self.0.state.lock();
        for piece in flushed {
            state.dirty.remove(&piece);
        }
        Ok(())
    }

    /// Writes again what a failed sync may have taken from the page cache: the identity, and above
    /// all that the blob is no longer complete.
    fn renew_head(&self) -> Result<(), StoreError> {
        let _seal_stays = self.0.durable.lock();
        let complete = self.0.state.lock().complete;
        self.0.files.write_head()?;
        self.0.files.write_seal(complete)
    }

    /// Marks the blob complete, durably: all its pieces are held and its sha256 is right.
    ///
    /// # Errors
    /// [`StoreError::StaleProof`] where a piece was dropped since the proof was made; as
    /// [`Self::flush`].
    pub fn mark_complete(&self, proof: Sha256Proof) -> Result<(), StoreError> {
        let mut named = self.0.flushing.lock();
        self.flush_in_turn(&mut named)?;
        // An empty blob has nothing to flush, and so no name yet.
        self.name_in_turn(&mut named)?;
        let mut durable = self.0.durable.lock();
        let state = self.0.state.lock();
        let fresh = proof.incarnation == self.0.incarnation && proof.discards == state.discards;
        if !fresh || !state.held.is_full() || !durable.is_full() {
            return Err(StoreError::StaleProof(*self.digest()));
        }
        drop(state);
        self.0.files.write_seal(true)?;
        self.sync_meta_or_drop(&mut durable)?;
        // Pieces are dropped under the lock that is held here: all are still there.
        self.0.state.lock().complete = true;
        Ok(())
    }

    fn name_in_turn(&self, named: &mut bool) -> Result<(), StoreError> {
        if !*named {
            self.0.sync_name()?;
            *named = true;
        }
        Ok(())
    }

    pub(crate) fn sync_meta_or_drop(&self, durable: &mut PieceSet) -> Result<(), StoreError> {
        self.0
            .files
            .sync_meta()
            .inspect_err(|_| self.drop_unsynced(durable))
    }

    fn drop_unsynced(&self, durable: &mut PieceSet) {
        let dropped = self.0.state.lock().discard_unsynced();
        self.0.changed.notify_all();
        for piece in &dropped {
            durable.remove(*piece);
        }
        tracing::warn!(
            blob = %self.digest(),
            pieces = dropped.len(),
            "a sync failed; what was not yet durable is dropped and fetched again"
        );
    }
}

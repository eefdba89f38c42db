//! Making pieces survive a crash.

use pantala_wire::PieceIndex;

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
        let mut named = self.0.flushing.lock();
        let state = self.0.state.lock();
        let dirty: Vec<(PieceIndex, u64)> = state.dirty.iter().map(|(p, c)| (*p, *c)).collect();
        let flushed_bytes = state.unflushed_bytes;
        drop(state);
        if dirty.is_empty() {
            return Ok(());
        }
        let synced = self
            .0
            .files
            .sync_data()
            .and_then(|()| self.0.files.sync_meta());
        if let Err(error) = synced {
            self.drop_unsynced();
            return Err(error);
        }
        if !*named {
            self.0.sync_name()?;
            *named = true;
        }
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
        self.0.files.sync_meta()?;
        let mut state = self.0.state.lock();
        for piece in flushed {
            state.dirty.remove(&piece);
        }
        state.unflushed_bytes = state.unflushed_bytes.saturating_sub(flushed_bytes);
        Ok(())
    }

    /// Marks the blob complete, durably: all its pieces are held and its sha256 is right.
    ///
    /// # Errors
    /// [`StoreError::StaleProof`] where a piece was dropped since the proof was made; as
    /// [`Self::flush`].
    pub fn mark_complete(&self, proof: Sha256Proof) -> Result<(), StoreError> {
        self.flush()?;
        let durable = self.0.durable.lock();
        let state = self.0.state.lock();
        let fresh = proof.incarnation == self.0.incarnation && proof.discards == state.discards;
        if !fresh || !state.held.is_full() || !durable.is_full() {
            return Err(StoreError::StaleProof(*self.digest()));
        }
        drop(state);
        self.0.files.write_seal(true)?;
        self.0.files.sync_meta()?;
        let mut named = self.0.flushing.try_lock();
        if let Some(named) = named.as_mut().filter(|named| !***named) {
            self.0.sync_name()?;
            **named = true;
        }
        self.0.state.lock().complete = true;
        Ok(())
    }

    fn drop_unsynced(&self) {
        let dropped = self.0.state.lock().discard_unsynced();
        self.0.changed.notify_all();
        tracing::warn!(
            blob = %self.digest(),
            pieces = dropped.len(),
            "a sync failed; what was not yet durable is dropped and fetched again"
        );
    }
}

//! The two files of a blob: made, found again, read and written.

use std::path::Path;
use std::sync::Arc;

use pantala_wire::{PieceIndex, PieceSet};

use crate::error::StoreError;
use crate::fs::{FileSystem, MappedFile, StoreFile};
use crate::meta::{
    ACCESS_OFFSET, BLOCK_BYTES, HEAD_LEN, Head, Header, MetaError, PieceProof, SEAL_OFFSET,
    parse_head,
};
use crate::place::Place;

/// The open files of one blob.
pub(crate) struct Files {
    pub(crate) header: Header,
    pub(crate) place: Place,
    pub(crate) data: Arc<dyn StoreFile>,
    meta: Arc<dyn StoreFile>,
    map: Box<dyn MappedFile>,
}

/// What the disk says of a blob.
pub(crate) struct Found {
    pub(crate) head: Head,
    pub(crate) durable: PieceSet,
}

/// Why files that exist are no blob.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unusable {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error("its metadata is damaged: {0}")]
    Meta(#[from] MetaError),
    #[error("its metadata is that of another blob")]
    Name,
    #[error("its data has {got} bytes where {expected} belong")]
    DataLength { got: u64, expected: u64 },
}

/// Bytes that a blob takes on the disk.
pub(crate) fn allocated_bytes(header: &Header) -> u64 {
    header.layout().blob_size().next_multiple_of(BLOCK_BYTES) + header.file_len()
}

impl Files {
    /// Creates the files of a new blob, all zeros and nothing held.
    pub(crate) fn create(
        fs: &dyn FileSystem,
        place: Place,
        header: Header,
    ) -> Result<Self, StoreError> {
        fs.create_dirs(&place.dir)
            .map_err(|e| StoreError::io("create the directory", &place.dir, e))?;
        let make = |path: &Path, len: u64| {
            let file = fs
                .create(path)
                .map_err(|e| StoreError::io("create", path, e))?;
            file.allocate(len)
                .map_err(|e| StoreError::io("reserve the space of", path, e))?;
            Ok::<_, StoreError>(file)
        };
        let data = make(&place.data, header.layout().blob_size())?;
        let meta = make(&place.meta, header.file_len())?;
        meta.write_all_at(&header.encode(), 0)
            .map_err(|e| StoreError::io("write", &place.meta, e))?;
        let map = meta
            .map()
            .map_err(|e| StoreError::io("map", &place.meta, e))?;
        Ok(Self {
            header,
            place,
            data,
            meta,
            map,
        })
    }

    /// Opens the files of a blob and reads what is not in its records.
    pub(crate) fn open(fs: &dyn FileSystem, place: Place) -> Result<(Self, Found), Unusable> {
        let open = |path: &Path| {
            let file = fs.open(path).map_err(|e| StoreError::io("open", path, e))?;
            let len = file
                .length()
                .map_err(|e| StoreError::io("measure", path, e))?;
            Ok::<_, StoreError>((file, len))
        };
        let (meta, meta_len) = open(&place.meta)?;
        let unreadable = |e| StoreError::io("read", &place.meta, e);
        let mut bytes = vec![0; HEAD_LEN];
        meta.read_exact_at(&mut bytes, 0).map_err(unreadable)?;
        let head = parse_head(&bytes)?;
        let header = head.header;
        if place.dir.file_name() != Some(header.digest().to_hex().as_ref()) {
            return Err(Unusable::Name);
        }
        if meta_len != header.file_len() {
            return Err(Unusable::Meta(MetaError::Length {
                got: meta_len,
                expected: header.file_len(),
            }));
        }
        let mut bitmap = vec![0; header.bitmap_len()];
        meta.read_exact_at(&mut bitmap, HEAD_LEN as u64)
            .map_err(unreadable)?;
        let (data, data_len) = open(&place.data)?;
        if data_len != header.layout().blob_size() {
            return Err(Unusable::DataLength {
                got: data_len,
                expected: header.layout().blob_size(),
            });
        }
        let map = meta
            .map()
            .map_err(|e| StoreError::io("map", &place.meta, e))?;
        let durable = header.decode_bitmap(&bitmap);
        let files = Self {
            header,
            place,
            data,
            meta,
            map,
        };
        Ok((files, Found { head, durable }))
    }

    /// Drops from `durable` the pieces whose records do not hold. Records are read, not looked at
    /// through the mapping: a sector that the disk cannot read then costs a piece, not the process.
    pub(crate) fn check_records(&self, durable: &mut PieceSet) {
        let mut record = vec![0; self.header.record_len()];
        let pieces: Vec<PieceIndex> = durable.iter().collect();
        for piece in pieces {
            let at = self.header.record_offset(piece);
            let why = match self.meta.read_exact_at(&mut record, at) {
                Ok(()) => match self.header.check_record(piece, &record) {
                    Ok(_) => continue,
                    Err(error) => error.to_string(),
                },
                Err(error) => error.to_string(),
            };
            tracing::warn!(blob = %self.header.digest(), %piece, why, "a piece's record is damaged; the piece is fetched again");
            durable.remove(piece);
        }
    }

    /// The record of `piece`; `None` where it does not prove itself.
    pub(crate) fn record(&self, piece: PieceIndex) -> Option<PieceProof> {
        let mut record = vec![0; self.header.record_len()];
        self.map
            .read(self.header.record_offset(piece), &mut record)
            .ok()?;
        self.header.decode_record(piece, &record).ok()
    }

    pub(crate) fn write_record(
        &self,
        piece: PieceIndex,
        proof: &PieceProof,
    ) -> Result<(), StoreError> {
        self.write_meta(
            &self.header.encode_record(proof),
            self.header.record_offset(piece),
        )
    }

    pub(crate) fn write_bitmap(&self, pieces: &PieceSet) -> Result<(), StoreError> {
        self.write_meta(&self.header.encode_bitmap(pieces), HEAD_LEN as u64)
    }

    pub(crate) fn write_head(&self) -> Result<(), StoreError> {
        self.write_meta(&self.header.encode(), 0)
    }

    pub(crate) fn write_seal(&self, complete: bool) -> Result<(), StoreError> {
        let seal = if complete {
            self.header.seal()
        } else {
            [0; 32]
        };
        self.write_meta(&seal, SEAL_OFFSET)
    }

    pub(crate) fn write_last_access(&self, access: u64) -> Result<(), StoreError> {
        self.write_meta(&access.to_le_bytes(), ACCESS_OFFSET)
    }

    fn write_meta(&self, bytes: &[u8], offset: u64) -> Result<(), StoreError> {
        self.meta
            .write_all_at(bytes, offset)
            .map_err(|e| StoreError::io("write", &self.place.meta, e))
    }

    pub(crate) fn sync_meta(&self) -> Result<(), StoreError> {
        self.meta
            .sync_data()
            .map_err(|e| StoreError::io("sync", &self.place.meta, e))
    }

    pub(crate) fn sync_data(&self) -> Result<(), StoreError> {
        self.data
            .sync_data()
            .map_err(|e| StoreError::io("sync", &self.place.data, e))
    }
}

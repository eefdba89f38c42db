//! The records of snapshots on disk: one file each.
//!
//! Every call changes one record alone, so a file that is written beside its place, synced and renamed
//! into it is all the transaction that is needed. A record that cannot be read is set aside with its
//! snapshot's files: it may be the only trace of what a container wrote.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use crate::core::Snapshot;
use crate::error::{DiskError, about};

/// The most that labels within their bounds can make of a record, escaped, and some more.
const RECORD_MAX_BYTES: u64 = 4 << 20;
const RECORD: &str = "json";
const DAMAGED: &str = "damaged";
const UNFINISHED: &str = "unfinished";

/// The directory of records.
#[derive(Debug, Clone)]
pub(crate) struct Records {
    dir: PathBuf,
}

/// What was found at the start.
#[derive(Debug, Default)]
pub(crate) struct Loaded {
    pub(crate) snapshots: Vec<Snapshot>,
    /// Of records that cannot be read.
    pub(crate) damaged: Vec<u64>,
}

impl Records {
    pub(crate) fn open(dir: PathBuf) -> Result<Self, DiskError> {
        fs::create_dir_all(&dir).map_err(about("create", &dir))?;
        Ok(Self { dir })
    }

    /// Reads all of them.
    pub(crate) fn load(&self) -> Result<Loaded, DiskError> {
        let mut loaded = Loaded::default();
        for entry in fs::read_dir(&self.dir).map_err(about("read", &self.dir))? {
            let path = entry.map_err(about("read", &self.dir))?.path();
            let id = path
                .file_stem()
                .and_then(|stem| stem.to_str()?.parse::<u64>().ok());
            let extension = path.extension().and_then(|extension| extension.to_str());
            match (id, extension) {
                (Some(id), Some(RECORD)) => match read(&path, id) {
                    Ok(snapshot) => loaded.snapshots.push(snapshot),
                    Err(error) => {
                        tracing::error!(
                            record = %path.display(), %error,
                            "a snapshot's record cannot be read and is set aside with its files: remove its image and pull it again"
                        );
                        let aside = path.with_extension(DAMAGED);
                        fs::rename(&path, &aside).map_err(about("rename", &path))?;
                        loaded.damaged.push(id);
                    }
                },
                (Some(id), Some(DAMAGED)) => loaded.damaged.push(id),
                (_, Some(UNFINISHED)) => {
                    fs::remove_file(&path).map_err(about("remove", &path))?;
                }
                _ => {}
            }
        }
        Ok(loaded)
    }

    /// Makes `snapshot` the record with its id; durable when it returns.
    pub(crate) fn write(&self, snapshot: &Snapshot) -> Result<(), DiskError> {
        let path = self.path(snapshot.id);
        let unfinished = path.with_extension(UNFINISHED);
        let written = serde_json::to_vec(snapshot)
            .map_err(io::Error::other)
            .and_then(|text| {
                let mut file = File::create(&unfinished)?;
                file.write_all(&text)?;
                file.sync_all()?;
                fs::rename(&unfinished, &path)?;
                sync_dir(&self.dir)
            });
        written.map_err(about("write", &path))
    }

    /// Removes the record `id`; durable when it returns.
    pub(crate) fn delete(&self, id: u64) -> Result<(), DiskError> {
        let path = self.path(id);
        fs::remove_file(&path)
            .and_then(|()| sync_dir(&self.dir))
            .map_err(about("remove", &path))
    }

    fn path(&self, id: u64) -> PathBuf {
        self.dir.join(format!("{id}.{RECORD}"))
    }
}

fn read(path: &Path, id: u64) -> io::Result<Snapshot> {
    let mut text = Vec::new();
    File::open(path)?
        .take(RECORD_MAX_BYTES)
        .read_to_end(&mut text)?;
    let snapshot: Snapshot = serde_json::from_slice(&text)?;
    if snapshot.id != id || snapshot.name.is_empty() {
        return Err(io::Error::other("it is another snapshot's record"));
    }
    Ok(snapshot)
}

/// Makes the names in `dir` durable.
pub(crate) fn sync_dir(dir: &Path) -> io::Result<()> {
    File::open(dir)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::core::{Kind, Labels, Usage};

    fn snapshot(id: u64) -> Snapshot {
        Snapshot {
            id,
            name: format!("ns/{id}/key \"quoted\"\n"),
            parent: None,
            kind: Kind::Active,
            labels: Labels::from([("a.b/c".into(), "\u{1}x".into())]),
            created_unix_ns: 5,
            updated_unix_ns: 6,
            usage: Usage::default(),
            image: None,
        }
    }

    #[test]
    fn what_was_written_is_loaded_and_what_was_deleted_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path().join("r")).unwrap();
        records.write(&snapshot(1)).unwrap();
        records.write(&snapshot(2)).unwrap();
        records.delete(1).unwrap();
        let loaded = records.load().unwrap();
        assert_eq!(loaded.snapshots, [snapshot(2)]);
        assert!(loaded.damaged.is_empty());
    }

    #[test]
    fn a_write_that_did_not_end_leaves_the_record_as_it_was() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path().to_owned()).unwrap();
        records.write(&snapshot(7)).unwrap();
        let half = dir.path().join("7.unfinished");
        fs::write(&half, b"{\"id\":7,\"na").unwrap();
        assert_eq!(records.load().unwrap().snapshots, [snapshot(7)]);
        assert!(!half.exists());
    }

    #[test]
    fn damaged_records_are_set_aside_and_remembered() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::open(dir.path().to_owned()).unwrap();
        records.write(&snapshot(1)).unwrap();
        fs::write(dir.path().join("2.json"), b"{").unwrap();
        fs::copy(dir.path().join("1.json"), dir.path().join("3.json")).unwrap();
        for _ in 0..2 {
            let mut loaded = records.load().unwrap();
            loaded.damaged.sort_unstable();
            assert_eq!(loaded.damaged, [2, 3]);
            assert_eq!(loaded.snapshots, [snapshot(1)]);
        }
    }
}

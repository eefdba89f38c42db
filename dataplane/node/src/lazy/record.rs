//! What a node writes down of its lazy mounts, so that the next daemon can take them up: everything but
//! credentials.

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use pantala_wire::BlobDigest;
use serde::{Deserialize, Serialize};
use sha2::{Digest as _, Sha256};

/// A record is short; more is not ours.
const RECORD_BYTES_MAX: u64 = 4 << 20;

/// A blob by its name and length.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct BlobName {
    /// Its digest, `sha256:...`.
    #[serde(with = "digest_text")]
    pub digest: BlobDigest,
    /// Its length in bytes.
    pub size_bytes: u64,
}

mod digest_text {
    use pantala_wire::BlobDigest;
    use serde::de::Error as _;
    use serde::{Deserialize, Deserializer, Serializer};

    pub(super) fn serialize<S: Serializer>(digest: &BlobDigest, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(digest)
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<BlobDigest, D::Error> {
        let text = String::deserialize(from)?;
        text.parse().map_err(D::Error::custom)
    }
}

/// One EROFS image: its metadata, and the devices that these name, in their order.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LayerName {
    /// The image with all metadata.
    pub metadata: BlobName,
    /// Its data.
    pub devices: Vec<BlobName>,
}

/// One mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    /// The image, as it was asked for.
    pub image: String,
    /// Where it is mounted.
    pub at: PathBuf,
    /// The registry's URL.
    pub upstream: String,
    /// The repository there.
    pub repository: String,
    /// Its layers, the lowest first.
    pub layers: Vec<LayerName>,
    /// Which life of the kernel's group guards it.
    pub guard: String,
    /// It was found without its guard: it may have given zeros, and was taken down.
    #[serde(default)]
    pub poisoned: bool,
}

impl Record {
    /// Names the mount: the same for the same directory.
    pub fn id(&self) -> String {
        id_of(&self.at)
    }

    /// Every blob that it needs.
    pub fn blobs(&self) -> impl Iterator<Item = &BlobName> {
        let layers = self.layers.iter();
        layers.flat_map(|layer| layer.devices.iter().chain([&layer.metadata]))
    }
}

/// Names a mount by its directory.
pub fn id_of(at: &Path) -> String {
    use std::os::unix::ffi::OsStrExt;
    hex(&Sha256::digest(at.as_os_str().as_bytes())[..16])
}

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The records of a node, one file each.
#[derive(Debug, Clone)]
pub struct Records {
    dir: PathBuf,
}

impl Records {
    /// In `dir`, which is made with the first record.
    pub fn new(dir: PathBuf) -> Self {
        Self { dir }
    }

    /// All of them. One that cannot be read is named in the log and left where it is.
    ///
    /// # Errors
    /// Where the directory cannot be listed.
    pub fn read(&self) -> io::Result<Vec<Record>> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(error) => return Err(error),
        };
        let mut records = Vec::new();
        for entry in entries {
            let path = entry?.path();
            if path.extension().is_none_or(|extension| extension != "json") {
                continue;
            }
            match read_one(&path) {
                Ok(record) => records.push(record),
                Err(error) => {
                    tracing::warn!(path = %path.display(), %error, "the record of a lazy mount cannot be read");
                }
            }
        }
        Ok(records)
    }

    /// Writes it, durably, in place of an earlier one of the same mount.
    ///
    /// # Errors
    /// The disk's.
    pub fn write(&self, record: &Record) -> io::Result<()> {
        fs::create_dir_all(&self.dir)?;
        let path = self.path(&record.at);
        let unfinished = path.with_extension("unfinished");
        let mut file = File::create(&unfinished)?;
        file.write_all(&serde_json::to_vec_pretty(record)?)?;
        file.sync_all()?;
        fs::rename(&unfinished, &path)?;
        File::open(&self.dir)?.sync_all()
    }

    /// Forgets the mount on `at`.
    ///
    /// # Errors
    /// The disk's.
    pub fn remove(&self, at: &Path) -> io::Result<()> {
        match fs::remove_file(self.path(at)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    fn path(&self, at: &Path) -> PathBuf {
        self.dir.join(id_of(at)).with_extension("json")
    }
}

fn read_one(path: &Path) -> io::Result<Record> {
    use std::io::Read;
    let mut text = Vec::new();
    File::open(path)?
        .take(RECORD_BYTES_MAX)
        .read_to_end(&mut text)?;
    Ok(serde_json::from_slice(&text)?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_come_back_until_they_are_removed_and_rubbish_is_left_out() {
        let dir = tempfile::tempdir().unwrap();
        let records = Records::new(dir.path().join("mounts"));
        assert!(records.read().unwrap().is_empty());
        let blob = |byte| BlobName {
            digest: BlobDigest::new([byte; 32]),
            size_bytes: 7,
        };
        let record = Record {
            image: "r/i:v1".into(),
            at: "/mnt/x".into(),
            upstream: "http://r".into(),
            repository: "i".into(),
            layers: vec![LayerName {
                metadata: blob(1),
                devices: vec![blob(2), blob(3)],
            }],
            guard: "00".into(),
            poisoned: false,
        };
        records.write(&record).unwrap();
        records.write(&record).unwrap();
        fs::write(dir.path().join("mounts/x.json"), "{").unwrap();
        assert_eq!(records.read().unwrap(), std::slice::from_ref(&record));
        assert_eq!(record.blobs().count(), 3);
        records.remove(&record.at).unwrap();
        records.remove(&record.at).unwrap();
        assert!(records.read().unwrap().is_empty());
    }
}

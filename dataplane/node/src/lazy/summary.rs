//! What is told of a mount.

use std::path::PathBuf;

use pantala_lazy::Device as _;

use super::Mounted;
use super::device::FaultTotals;

/// What is told of a mount.
#[derive(Debug, Clone, serde::Serialize, serde::Deserialize)]
pub struct MountSummary {
    /// The image.
    pub image: String,
    /// Where.
    pub at: PathBuf,
    /// `complete`, `lazy`, or `poisoned`.
    pub state: String,
    /// Bytes of all its data devices.
    pub size_bytes: u64,
    /// Of these, verified and on this node's disk.
    pub held_bytes: u64,
    /// What readers waited for since this daemon was started.
    #[serde(flatten)]
    pub totals: FaultTotals,
}

impl Mounted {
    pub(super) fn summary(&self) -> MountSummary {
        let mut summary = MountSummary {
            image: self.record.image.clone(),
            at: self.record.at.clone(),
            state: "complete".into(),
            size_bytes: 0,
            held_bytes: 0,
            totals: FaultTotals::default(),
        };
        if self.record.poisoned {
            summary.state = "poisoned".into();
        }
        for device in self.layers.iter().flat_map(|layer| &layer.devices) {
            let layout = device.blob().layout();
            let held = u64::from(device.blob().held().len()) * layout.piece_size();
            summary.size_bytes += layout.blob_size();
            summary.held_bytes += held.min(layout.blob_size());
            let totals = device.totals();
            summary.totals.faults += totals.faults;
            summary.totals.local_bytes += totals.local_bytes;
            summary.totals.remote_bytes += totals.remote_bytes;
            summary.totals.failed += totals.failed;
            if !device.is_complete() {
                summary.state = "lazy".into();
            }
        }
        summary
    }
}

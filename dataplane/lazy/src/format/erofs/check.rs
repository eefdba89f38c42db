//! An image against its manifest: devices as many and as long as it needs.

use super::superblock::Superblock;
use super::walk::{Progress, Walk};
use crate::format::FormatError;

/// Checks a whole metadata image against what its manifest says: as many devices as there are
/// `device_sizes`, and every byte of every file on one of them. mkfs.erofs up to 1.5 leaves lengths
/// out of the device table, so the files themselves are asked.
///
/// # Errors
/// Where they do not fit each other: the kernel would read past the end of a blob.
pub fn check_image(image: &[u8], device_sizes: &[u64]) -> Result<(), FormatError> {
    const WHAT: &str = "the device table";
    let superblock = Superblock::parse(image)?;
    let slots = superblock.devices(image)?;
    if slots.len() != device_sizes.len() {
        return Err(FormatError::malformed(
            WHAT,
            format!(
                "has {} devices, the manifest {}",
                slots.len(),
                device_sizes.len()
            ),
        ));
    }
    for (index, (slot, size)) in slots.iter().zip(device_sizes).enumerate() {
        let needed = u64::from(slot.blocks) << superblock.block_size_log2;
        if needed > *size {
            return Err(FormatError::malformed(
                WHAT,
                format!("gives device {index} {needed} bytes, the manifest {size}"),
            ));
        }
    }
    let image_len = image.len() as u64;
    let mut walk = Walk::new(&superblock, image_len)?;
    let progress = walk.resume(image, &mut |extent| {
        let device_len = match usize::from(extent.device).checked_sub(1) {
            None => image_len,
            Some(index) => device_sizes.get(index).copied().unwrap_or(0),
        };
        match extent.start.checked_add(extent.len) {
            Some(end) if end <= device_len => Ok(()),
            _ => Err(FormatError::malformed(
                "a file",
                format!(
                    "has {} bytes at {} of device {}, which ends at {device_len}",
                    extent.len, extent.start, extent.device
                ),
            )),
        }
    })?;
    match progress {
        Progress::Done => Ok(()),
        Progress::Need(_) => Err(FormatError::malformed("the image", "is not whole")),
    }
}

//! EROFS images: what the kernel mounts.
//!
//! [`Superblock`] checks what a mount depends on; [`Walk`] finds every byte that the kernel reads
//! without asking anybody (so that it must be local before a mount), and where the data of files lies.

mod check;
mod compressed;
mod inode;
mod ranges;
mod superblock;
mod walk;

pub use check::check_image;
pub use ranges::RangeSet;
pub use superblock::{DeviceSlot, SUPERBLOCK_END, Superblock};
pub use walk::{Extent, Known, Progress, Walk};

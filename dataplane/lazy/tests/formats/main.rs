//! Image formats against the programs that make them and the kernel that mounts them.
//!
//! What needs nydus-image (`$PANTALA_NYDUSD`'s folder or /var/cache/pantala/nydus/bin), mkfs.erofs or
//! root says on stderr that it was left out where that is missing.

#![allow(missing_docs, reason = "a test")]

mod erofs;
mod lies;
mod rafs;
mod rig;

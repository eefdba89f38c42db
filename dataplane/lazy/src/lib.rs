//! EROFS mounted before its data has arrived.
//!
//! An image is *metadata* (an EROFS image that is wholly local and complete before it is mounted) and
//! *data devices*, whose bytes come when somebody touches them. A [`Device`] is such bytes behind a
//! local file; a [`Backend`] is one of the kernel's ways to be told of a touch. They know nothing of
//! each other's insides: a backend asks the device to [`fill`](Device::fill) a range and answers the
//! kernel when that has ended, well or badly. Whatever cannot be filled fails the read: no reader
//! ever gets zeros in place of data.

#![deny(unsafe_code)]

pub mod backend;
pub mod device;
pub mod faults;

pub use backend::{Backend, BackendKind, MountError, MountSpec};
pub use device::{Device, FillError};

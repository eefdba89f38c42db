//! The ring.
#![deny(unsafe_code)]

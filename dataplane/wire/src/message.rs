//! The messages of the peer protocol, made from `proto/peer.proto`.

#![allow(missing_docs, reason = "the schema documents the generated types")]

include!(concat!(env!("OUT_DIR"), "/pantala.peer.v1.rs"));

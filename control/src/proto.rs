//! The messages and the service, made from `proto/control.proto`.

#![allow(
    missing_docs,
    unreachable_pub,
    clippy::all,
    reason = "the schema documents the generated types"
)]

tonic::include_proto!("pantala.control.v1");

//! The suite over quinn on tokio.

mod suite;

const DRIVER: pantala_quic::DriverChoice = pantala_quic::DriverChoice::Tokio;

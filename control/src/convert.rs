//! Between the messages on the wire and those of the core.

//! What lets a restarted node tell its old peers, at once, that their connections are gone.
//!
//! A peer believes a stateless reset (RFC 9000, section 10.3) that carries the token it was given with
//! the connection ID. The token is a function of the ID and of a key that outlives the process, so the
//! restarted node can compute it again. quinn's own connection IDs carry a mark of the process and would
//! make it drop those of an earlier one unread.

use std::sync::Arc;

use quinn::{ConnectionId, ConnectionIdGenerator, EndpointConfig};
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};

/// Bytes of a connection ID: random enough never to be guessed or met twice.
const CONNECTION_ID_BYTES: usize = 8;

/// quinn's configuration with reset tokens made from `reset_key`.
pub(super) fn endpoint_config(reset_key: &[u8; 32]) -> EndpointConfig {
    let key = hmac::Key::new(hmac::HMAC_SHA256, reset_key);
    let mut config = EndpointConfig::new(Arc::new(key));
    config.cid_generator(|| Box::new(RandomIds(SystemRandom::new())));
    config
}

struct RandomIds(SystemRandom);

impl ConnectionIdGenerator for RandomIds {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut bytes = [0; CONNECTION_ID_BYTES];
        self.0
            .fill(&mut bytes)
            .expect("the kernel's random numbers do not fail once the process has started");
        ConnectionId::new(&bytes)
    }

    fn cid_len(&self) -> usize {
        CONNECTION_ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<std::time::Duration> {
        None
    }
}

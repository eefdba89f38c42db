//! Connection IDs: which thread they belong to, that they are this node's, and what lets a restarted
//! node tell its old peers, at once, that their connections are gone.
//!
//! An ID is eight bytes: a first one whose remainder by the number of threads is the thread's number,
//! three random ones, and four that authenticate these under a key that outlives the process. What is
//! addressed to an ID that is not this node's can only be noise, or a peer's stateless reset (RFC 9000,
//! section 10.3), whose bytes look random.
//!
//! A peer believes a stateless reset that carries the token it was given with the connection ID. The
//! token is a function of the ID and of the key, so the restarted node can compute it again. quinn's own
//! IDs carry a mark of the process and would make it drop those of an earlier one unread.

use std::sync::Arc;

use quinn_proto::{ConnectionId, ConnectionIdGenerator, EndpointConfig, InvalidCid};
use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};

/// Bytes of a connection ID.
pub(super) const ID_BYTES: usize = 8;
/// Those of them that are chosen; the others prove them.
const CHOSEN_BYTES: usize = 4;

/// Makes and knows this node's connection IDs.
#[derive(Debug, Clone)]
pub(super) struct IdKey {
    reset: Arc<hmac::Key>,
    proof: Arc<hmac::Key>,
}

impl IdKey {
    pub(super) fn new(secret: &[u8; 32]) -> Self {
        let reset = hmac::Key::new(hmac::HMAC_SHA256, secret);
        let proof = hmac::sign(&reset, b"pantala connection ids v1");
        Self {
            proof: Arc::new(hmac::Key::new(hmac::HMAC_SHA256, proof.as_ref())),
            reset: Arc::new(reset),
        }
    }

    fn prove(&self, chosen: &[u8]) -> [u8; ID_BYTES - CHOSEN_BYTES] {
        let mut proof = [0; ID_BYTES - CHOSEN_BYTES];
        proof.copy_from_slice(&hmac::sign(&self.proof, chosen).as_ref()[..ID_BYTES - CHOSEN_BYTES]);
        proof
    }

    /// Whether this node has made `id`, now or before a restart.
    pub(super) fn made(&self, id: &[u8]) -> bool {
        id.len() == ID_BYTES && self.prove(&id[..CHOSEN_BYTES]) == id[CHOSEN_BYTES..]
    }

    /// quinn's configuration of an endpoint whose IDs belong to `thread` of `threads`.
    pub(super) fn endpoint_config(&self, thread: u8, threads: u8) -> EndpointConfig {
        let mut config = EndpointConfig::new(self.reset.clone());
        let key = self.clone();
        config.cid_generator(move || {
            Box::new(Ids {
                key: key.clone(),
                random: SystemRandom::new(),
                thread,
                threads,
            })
        });
        config
    }
}

/// The thread, of `threads`, that the packets with this first byte of an ID belong to.
pub(super) fn thread_of(first_byte: u8, threads: u8) -> u8 {
    first_byte % threads
}

/// A first byte for the IDs of `thread`: any of those that [`thread_of`] leads back.
fn first_byte_of(thread: u8, threads: u8, random: u8) -> u8 {
    let start = random - random % threads;
    // The last run of first bytes may be cut short by 255.
    start
        .checked_add(thread)
        .unwrap_or_else(|| start - threads + thread)
}

struct Ids {
    key: IdKey,
    random: SystemRandom,
    thread: u8,
    threads: u8,
}

impl ConnectionIdGenerator for Ids {
    fn generate_cid(&mut self) -> ConnectionId {
        let mut bytes = [0; ID_BYTES];
        self.random
            .fill(&mut bytes[..CHOSEN_BYTES])
            .expect("the kernel's random numbers do not fail once the process has started");
        bytes[0] = first_byte_of(self.thread, self.threads, bytes[0]);
        let proof = self.key.prove(&bytes[..CHOSEN_BYTES]);
        bytes[CHOSEN_BYTES..].copy_from_slice(&proof);
        ConnectionId::new(&bytes)
    }

    fn validate(&self, cid: &ConnectionId) -> Result<(), InvalidCid> {
        self.key.made(cid).then_some(()).ok_or(InvalidCid)
    }

    fn cid_len(&self) -> usize {
        ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<std::time::Duration> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_id_leads_to_its_thread_and_is_known_again_after_a_restart() {
        let key = IdKey::new(&[7; 32]);
        for threads in [1, 2, 3, 7, 16] {
            for thread in 0..threads {
                let mut ids = Ids {
                    key: IdKey::new(&[7; 32]),
                    random: SystemRandom::new(),
                    thread,
                    threads,
                };
                for _ in 0..200 {
                    let id = ids.generate_cid();
                    assert_eq!(thread_of(id[0], threads), thread);
                    assert!(key.made(&id));
                    assert!(!IdKey::new(&[8; 32]).made(&id));
                }
                for random in 0..=255 {
                    assert_eq!(
                        thread_of(first_byte_of(thread, threads, random), threads),
                        thread
                    );
                }
            }
        }
    }

    #[test]
    fn what_is_not_an_id_is_told_apart() {
        let key = IdKey::new(&[7; 32]);
        assert!(!key.made(&[]));
        assert!(!key.made(&[0; 7]));
        assert!(!key.made(&[0; ID_BYTES]));
    }
}

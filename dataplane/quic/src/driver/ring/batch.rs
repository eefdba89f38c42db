//! Which connection the datagrams of one receive are for, before anything is decrypted.
//!
//! A pure module, so that it can be fuzzed by itself.

/// Bytes of the connection IDs that this node gives out.
const ID_BYTES: usize = 8;

/// Whether a datagram has a short header, and the connection ID that it is sent to.
pub(crate) fn destination_id(datagram: &[u8]) -> (bool, Option<&[u8]>) {
    match datagram {
        [first, rest @ ..] if first & 0x80 == 0 => (true, rest.get(..ID_BYTES)),
        [_, _, _, _, _, length, rest @ ..] => (false, rest.get(..usize::from(*length))),
        _ => (false, None),
    }
}

/// Where the first datagram begins that has another connection ID than those before it.
pub(crate) fn next_connection(payload: &[u8], segment_bytes: usize) -> Option<usize> {
    let mut datagrams = payload.chunks(segment_bytes.max(1));
    let first = destination_id(datagrams.next()?);
    let same = datagrams.position(|datagram| destination_id(datagram) != first)?;
    Some((1 + same) * segment_bytes.max(1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_ids_are_as_long_here_as_where_they_are_made() {
        assert_eq!(ID_BYTES, crate::driver::ids::ID_BYTES);
    }

    #[test]
    fn merged_datagrams_are_told_apart_by_their_connection_ids() {
        let short = |id: u8| [&[0x40][..], &[id; 8], &[9; 11]].concat();
        let long = |id: u8| [&[0xc0, 0, 0, 0, 1, 8][..], &[id; 8], &[9; 6]].concat();
        for (payload, at) in [
            ([short(1), short(1), short(1)].concat(), None),
            ([short(1), short(1), short(2)].concat(), Some(40)),
            ([short(1), short(2), short(1)].concat(), Some(20)),
            ([long(1), long(1), short(1)].concat(), Some(40)),
            ([long(1), long(2)].concat(), Some(20)),
            // A last one that is cut off has no ID to go by.
            ([&short(1)[..], &[0x40, 1, 1]].concat(), Some(20)),
            (short(1), None),
            (Vec::new(), None),
        ] {
            assert_eq!(next_connection(&payload, 20), at, "{payload:x?}");
        }
    }
}

//! Files through the ring.

use std::fs::File;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};
use pantala_uring::Event;

use crate::rig::{Node, pattern};

#[test]
fn what_is_written_in_slices_is_read_in_one() {
    let mut a = Node::new("127.0.0.1:0");
    let file = Arc::new(tempfile::tempfile().unwrap());
    let bytes = Bytes::from(pattern(3, 3_000_000));
    // More slices than one call takes.
    let slices: Vec<Bytes> = (0..2000)
        .map(|at| bytes.slice(at * 1500..(at + 1) * 1500))
        .collect();
    a.ring.write_vectored(&file, 4096, slices, 7).unwrap();
    match a.event() {
        Event::Wrote { token: 7, result } => assert_eq!(result.unwrap(), bytes.len()),
        other => panic!("{other:?}"),
    }
    let mut whole = Vec::new();
    let mut plain = file.try_clone().unwrap();
    plain.rewind().unwrap();
    plain.read_to_end(&mut whole).unwrap();
    assert_eq!(whole[..4096], [0; 4096]);
    assert_eq!(whole[4096..], bytes);
    let mut read = BytesMut::from(&b"head"[..]);
    read.reserve(100_000);
    let room = read.capacity() - read.len();
    a.ring.read(&file, 4096, read, 8).unwrap();
    match a.event() {
        Event::Read {
            token: 8,
            buffer,
            result,
        } => {
            assert_eq!(result.unwrap(), room);
            assert_eq!(&buffer[..4], b"head");
            assert_eq!(buffer[4..], bytes[..room]);
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn the_end_of_a_file_is_a_short_read_and_then_none() {
    let mut a = Node::new("127.0.0.1:0");
    let file = Arc::new(tempfile::tempfile().unwrap());
    a.ring
        .write_vectored(&file, 0, vec![Bytes::from_static(b"abc")], 1)
        .unwrap();
    assert!(matches!(a.event(), Event::Wrote { result: Ok(3), .. }));
    for (offset, bytes) in [(1, &b"bc"[..]), (3, b""), (99, b"")] {
        a.ring
            .read(&file, offset, BytesMut::with_capacity(10), 2)
            .unwrap();
        match a.event() {
            Event::Read { buffer, result, .. } => {
                assert_eq!(result.unwrap(), bytes.len());
                assert_eq!(buffer, bytes);
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_file_that_refuses_is_an_error_with_the_buffer_back() {
    let mut a = Node::new("127.0.0.1:0");
    let directory = Arc::new(File::open(std::env::temp_dir()).unwrap());
    let mut buffer = BytesMut::with_capacity(100);
    buffer.extend_from_slice(b"kept");
    a.ring.read(&directory, 0, buffer, 1).unwrap();
    match a.event() {
        Event::Read { buffer, result, .. } => {
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::EISDIR));
            assert_eq!(&buffer[..], b"kept");
        }
        other => panic!("{other:?}"),
    }
    a.ring
        .write_vectored(&directory, 0, vec![Bytes::from_static(b"x")], 2)
        .unwrap();
    assert!(matches!(
        a.event(),
        Event::Wrote {
            token: 2,
            result: Err(_)
        }
    ));
}

#[test]
fn a_read_that_would_wait_for_ever_is_cancelled() {
    let mut a = Node::new("127.0.0.1:0");
    let (reader, writer) = std::io::pipe().unwrap();
    let reader = Arc::new(File::from(OwnedFd::from(reader)));
    a.ring
        .read(&reader, 0, BytesMut::with_capacity(64), 5)
        .unwrap();
    a.ring
        .read(&reader, 0, BytesMut::with_capacity(64), 6)
        .unwrap();
    a.ring.submit().unwrap();
    a.ring.cancel(5);
    match a.event() {
        Event::Read {
            token: 5, result, ..
        } => {
            assert_eq!(result.unwrap_err().raw_os_error(), Some(libc::ECANCELED));
        }
        other => panic!("{other:?}"),
    }
    // The other goes on.
    drop(writer);
    assert!(matches!(
        a.event(),
        Event::Read {
            token: 6,
            result: Ok(0),
            ..
        }
    ));
}

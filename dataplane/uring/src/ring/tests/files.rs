use std::fs::File;
use std::sync::Arc;

use bytes::{Bytes, BytesMut};

use super::super::files::FILE_OPERATIONS_MAX;
use super::*;
use crate::kernel::Operation;

fn file() -> Arc<File> {
    Arc::new(tempfile::tempfile().unwrap())
}

fn slices(parts: &[usize]) -> Vec<Bytes> {
    let parts = parts.iter().enumerate();
    parts
        .map(|(seed, bytes)| Bytes::from(pattern(seed, *bytes)))
        .collect()
}

fn outcome(core: &mut Core<Fake>) -> (u64, Result<usize, Option<i32>>) {
    match <[Event; 1]>::try_from(events(core)).unwrap() {
        [Event::Wrote { token, result }] => (token, result.map_err(|error| error.raw_os_error())),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_write_that_is_cut_short_goes_on_where_it_stopped() {
    let (mut core, fake, _) = rig();
    let parts = slices(&[10, 0, 20, 30]);
    let all: Vec<u8> = parts.concat();
    core.write_vectored(&file(), 1000, parts, 7).unwrap();
    core.submit().unwrap();
    let mut at = 0;
    // Within a slice, at its end, within the next but one.
    for step in [4, 6, 25] {
        let tag = fake.files()[0];
        assert_eq!(fake.bytes(tag), all[at..]);
        assert!(
            matches!(fake.operation(tag), Operation::Write { offset, .. } if offset == 1000 + at as u64)
        );
        fake.complete(tag, step);
        at += step as usize;
        assert!(core.next_event().is_none());
        core.submit().unwrap();
    }
    fake.complete(fake.files()[0], 25);
    assert_eq!(outcome(&mut core), (7, Ok(60)));
}

#[test]
fn a_write_that_stops_or_fails_is_never_a_success() {
    for (result, errno) in [(0, None), (-libc::ENOSPC, Some(libc::ENOSPC))] {
        let (mut core, fake, _) = rig();
        core.write_vectored(&file(), 0, slices(&[10, 10]), 1)
            .unwrap();
        core.submit().unwrap();
        fake.complete(fake.files()[0], 15);
        assert!(core.next_event().is_none());
        core.submit().unwrap();
        fake.complete(fake.files()[0], result);
        assert_eq!(outcome(&mut core), (1, Err(errno)));
    }
}

#[test]
fn many_slices_go_in_as_many_calls_as_it_takes() {
    let (mut core, fake, _) = rig();
    let parts = slices(&[3; 2500]);
    let all = parts.concat();
    core.write_vectored(&file(), 0, parts, 1).unwrap();
    let mut arrived = Vec::new();
    for count in [1024, 1024, 452] {
        core.submit().unwrap();
        let tag = fake.files()[0];
        assert!(matches!(fake.operation(tag), Operation::Write { count: is, .. } if is == count));
        let bytes = fake.bytes(tag);
        fake.complete(tag, bytes.len() as i32);
        arrived.extend(bytes);
        if arrived.len() < all.len() {
            assert!(core.next_event().is_none());
        }
    }
    assert_eq!(arrived, all);
    assert_eq!(outcome(&mut core), (1, Ok(7500)));
}

#[test]
fn nothing_to_write_is_written_at_once() {
    let (mut core, fake, _) = rig();
    core.write_vectored(&file(), 0, slices(&[0, 0]), 5).unwrap();
    core.wait(None).unwrap();
    assert_eq!(fake.files().len(), 0);
    assert_eq!(outcome(&mut core), (5, Ok(0)));
}

#[test]
fn a_read_fills_the_spare_room_behind_what_is_there() {
    let (mut core, fake, _) = rig();
    let mut buffer = BytesMut::with_capacity(100);
    buffer.extend_from_slice(b"before");
    core.read(&file(), 5, buffer, 3).unwrap();
    core.submit().unwrap();
    fake.complete(fake.files()[0], 4);
    match events(&mut core).remove(0) {
        Event::Read {
            token: 3,
            buffer,
            result: Ok(4),
        } => assert_eq!(&buffer[..], b"beforeZZZZ"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn a_read_that_fails_gives_its_buffer_back_as_it_was() {
    let (mut core, fake, _) = rig();
    let mut buffer = BytesMut::with_capacity(100);
    buffer.extend_from_slice(b"before");
    core.read(&file(), 5, buffer, 3).unwrap();
    core.submit().unwrap();
    fake.scribble();
    fake.complete(fake.files()[0], -libc::EIO);
    match events(&mut core).remove(0) {
        Event::Read {
            buffer,
            result: Err(_),
            ..
        } => assert_eq!(&buffer[..], b"before"),
        other => panic!("{other:?}"),
    }
}

#[test]
fn there_is_a_bound_and_what_exceeds_it_comes_back() {
    let (mut core, fake, _) = rig();
    let file = file();
    for token in 0..FILE_OPERATIONS_MAX as u64 {
        core.read(&file, 0, BytesMut::with_capacity(16), token)
            .unwrap();
    }
    let busy = core
        .read(&file, 0, BytesMut::from(&b"mine"[..]), 9)
        .unwrap_err();
    assert_eq!(&busy.0[..], b"mine");
    let busy = core
        .write_vectored(&file, 0, slices(&[1, 2]), 9)
        .unwrap_err();
    assert_eq!(busy.0.len(), 2);
    core.submit().unwrap();
    fake.complete(fake.files()[17], 1);
    assert_eq!(events(&mut core).len(), 1);
    core.read(&file, 0, BytesMut::with_capacity(16), 10)
        .unwrap();
}

#[test]
fn a_cancellation_names_its_operation_and_never_one_that_took_its_place() {
    let (mut core, fake, _) = rig();
    let file = file();
    core.read(&file, 0, BytesMut::with_capacity(16), 1).unwrap();
    core.read(&file, 0, BytesMut::with_capacity(16), 2).unwrap();
    core.submit().unwrap();
    let tags = fake.files();
    // The operation completes before the cancellation is handed over, and its slot is used again.
    core.cancel(1);
    core.cancel(1);
    core.cancel(99);
    fake.complete(tags[0], 3);
    assert_eq!(events(&mut core).len(), 1);
    core.read(&file, 0, BytesMut::with_capacity(16), 4).unwrap();
    core.submit().unwrap();
    assert_eq!(fake.cancelled(), [tags[0]], "asked for once");
    let now = fake.files();
    assert_eq!(now.len(), 2);
    assert!(!now.contains(&tags[0]));
    // A cancelled write is not gone on with.
    core.write_vectored(&file, 0, slices(&[10]), 5).unwrap();
    core.submit().unwrap();
    let write = fake.files()[2];
    core.cancel(5);
    core.submit().unwrap();
    fake.complete(write, 4);
    assert_eq!(outcome(&mut core), (5, Err(Some(libc::ECANCELED))));
}

//! Which names are served, and which cache files are open: what decides about each message.
//!
//! No I/O. `D` is what is behind a name, `F` the kernel's descriptor of an open cache file.

use std::collections::HashMap;

use super::protocol::BLOCK_BYTES;

const ENOENT: i32 = 2;
const EINVAL: i32 = 22;

/// The served names and the open files.
#[derive(Debug)]
pub(super) struct Table<D, F> {
    names: HashMap<Vec<u8>, Named<D>>,
    open: HashMap<u32, Open<F>>,
}

#[derive(Debug)]
struct Named<D> {
    device: D,
    size_bytes: u64,
}

#[derive(Debug)]
struct Open<F> {
    name: Vec<u8>,
    descriptor: F,
}

/// What is to be done about a read.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Read<D, F> {
    /// Fill bytes `first..end`, write them (to a whole block), complete the message.
    Serve {
        /// Where the bytes come from.
        device: D,
        /// Where they go.
        descriptor: F,
        /// The first byte, at the beginning of a block.
        first: u64,
        /// One past the last: the end of a block, or of the device.
        end: u64,
    },
    /// Complete the message without having written: the kernel looks, finds a hole, and the read fails.
    Fail(F),
    /// The file is not open: there is nothing by which the message could be completed.
    Lost,
}

impl<D: Clone, F: Clone> Table<D, F> {
    pub(super) fn new() -> Self {
        Self {
            names: HashMap::new(),
            open: HashMap::new(),
        }
    }

    /// From now on `name` is served.
    pub(super) fn add(&mut self, name: impl Into<Vec<u8>>, device: D, size_bytes: u64) {
        self.names.insert(name.into(), Named { device, size_bytes });
    }

    /// From now on reads of `name` fail.
    pub(super) fn remove(&mut self, name: &[u8]) {
        self.names.remove(name);
    }

    /// The kernel opens a file: its length, or why it may not. A refused file's descriptor is not kept.
    pub(super) fn open(
        &mut self,
        object: u32,
        name: Option<Vec<u8>>,
        descriptor: F,
    ) -> Result<u64, i32> {
        let name = name.ok_or(EINVAL)?;
        let size_bytes = self.names.get(&name).ok_or(ENOENT)?.size_bytes;
        // The kernel reuses no number while its file is open; if it did, the later file is the one it means.
        self.open.insert(object, Open { name, descriptor });
        Ok(size_bytes)
    }

    /// The kernel is done with a file; the name if it is served no more, so that nobody needs what is cached.
    pub(super) fn close(&mut self, object: u32) -> Option<Vec<u8>> {
        let open = self.open.remove(&object)?;
        (!self.names.contains_key(&open.name)).then_some(open.name)
    }

    /// The kernel wants bytes.
    pub(super) fn read(&self, object: u32, offset: u64, size_bytes: u64) -> Read<D, F> {
        let Some(open) = self.open.get(&object) else {
            return Read::Lost;
        };
        let fail = Read::Fail(open.descriptor.clone());
        let Some(named) = self.names.get(&open.name) else {
            return fail;
        };
        let first = offset / BLOCK_BYTES * BLOCK_BYTES;
        // Whole blocks, as nothing less can be written; only the device's end may cut one.
        let end = offset
            .saturating_add(size_bytes)
            .checked_next_multiple_of(BLOCK_BYTES)
            .map_or(named.size_bytes, |end| end.min(named.size_bytes));
        if size_bytes == 0 || first >= end {
            return fail;
        }
        Read::Serve {
            device: named.device.clone(),
            descriptor: open.descriptor.clone(),
            first,
            end,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn table() -> Table<&'static str, u8> {
        let mut table = Table::new();
        table.add("a", "device", 10_000);
        table
    }

    #[test]
    fn only_known_names_are_opened() {
        let mut table = table();
        assert_eq!(table.open(1, Some(b"a".to_vec()), 7), Ok(10_000));
        assert_eq!(table.open(2, Some(b"b".to_vec()), 8), Err(ENOENT));
        assert_eq!(table.open(3, None, 9), Err(EINVAL));
        assert_eq!(table.read(2, 0, 4096), Read::Lost);
        assert_eq!(table.read(3, 0, 4096), Read::Lost);
    }

    #[test]
    fn a_read_lies_inside_the_device_and_has_whole_blocks() {
        let mut table = table();
        table.open(1, Some(b"a".to_vec()), 7).unwrap();
        let serve = |first, end| Read::Serve {
            device: "device",
            descriptor: 7,
            first,
            end,
        };
        assert_eq!(table.read(1, 4096, 4096), serve(4096, 8192));
        assert_eq!(table.read(1, 5000, 10), serve(4096, 8192));
        assert_eq!(table.read(1, 8192, u64::MAX), serve(8192, 10_000));
        for (offset, size) in [(12_288, 4096), (u64::MAX, u64::MAX), (0, 0)] {
            assert_eq!(table.read(1, offset, size), Read::Fail(7));
        }
    }

    #[test]
    fn reads_of_what_is_unmounted_fail_and_its_cache_is_let_go() {
        let mut table = table();
        table.open(1, Some(b"a".to_vec()), 7).unwrap();
        table.remove(b"a");
        assert_eq!(table.read(1, 0, 4096), Read::Fail(7));
        assert_eq!(table.close(1), Some(b"a".to_vec()));
        assert_eq!(table.close(1), None);
    }

    #[test]
    fn the_cache_of_a_mount_that_lives_stays() {
        let mut table = table();
        table.open(1, Some(b"a".to_vec()), 7).unwrap();
        assert_eq!(table.close(1), None);
    }
}

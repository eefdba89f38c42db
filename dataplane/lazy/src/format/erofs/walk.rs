//! Every byte of metadata of an image, found from the root without having the image.

use std::borrow::Cow;
use std::collections::HashSet;

use pantala_wire::ByteRange;

use super::compressed::{MAP_HEADER_LEN, index_end, map_header_start};
use super::inode::{
    INODE_LEN_MIN, Inode, Kind, Layout, XATTR_ENTRY_LEN, inode_len, malformed, shared_xattrs,
    xattr_entry_len,
};
use super::ranges::RangeSet;
use super::superblock::{INCOMPAT_FRAGMENTS, INCOMPAT_XATTR_PREFIXES, NODE_LEN, Superblock};
use crate::format::FormatError;
use crate::format::field::Fields;

/// What is asked for at once is rounded to this: metadata lies close together, and a request costs a
/// round trip.
const NEED_ALIGN: u64 = 64 << 10;
/// The kernel reads metadata a page at a time.
const PAGE_LEN: u64 = 4096;
/// Bytes asked for before the walk stops to wait for them: enough to fill a link for a round trip.
const NEED_BYTES_MAX: u64 = 8 << 20;
/// Files in an image: eight times the largest known. Bounds what is remembered of those seen, 16 bytes each.
const NODES_MAX: usize = 1 << 25;
const DIRENT_LEN: u64 = 12;
/// Chunk entries looked at in one step: 32 KiB of index.
const CHUNKS_PER_STEP: u64 = 4096;
const CHUNK_INDEXES: u32 = 0x20;
const CHUNK_SIZE_BITS: u32 = 0x1f;
const CHUNK_HOLE: u32 = u32::MAX;

/// The bytes of an image that are there.
pub trait Known {
    /// `len` bytes from `start`, or nothing where one of them is not there yet.
    fn get(&self, start: u64, len: u64) -> Option<Cow<'_, [u8]>>;
}

impl Known for [u8] {
    fn get(&self, start: u64, len: u64) -> Option<Cow<'_, [u8]>> {
        crate::format::field::slice(self, "the image", start, len)
            .ok()
            .map(Cow::Borrowed)
    }
}

/// Where a walk stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress {
    /// It cannot go on before these bytes are there. Never empty.
    Need(Vec<ByteRange>),
    /// All was seen. What [`Walk::metadata`] lists must be local before a mount.
    Done,
}

/// Bytes of a file that lie uncompressed on a device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// The file's node number.
    pub node: u64,
    /// 0 for the image itself, else the number of the device, from 1.
    pub device: u16,
    /// Where on the device.
    pub start: u64,
    /// How many bytes; not 0.
    pub len: u64,
}

/// What is still to be looked at. Each is done in one go or, where bytes are missing, begun again.
#[derive(Debug, Clone, Copy)]
enum Task {
    Node(u64),
    DirectoryBlock { inode: Inode, offset: u64 },
    Chunks { node: u64, inode: Inode, first: u64 },
    SharedXattr { start: u64 },
    XattrPrefixes { start: u64, count: u8 },
}

/// Why a task stops.
enum Stop {
    Missing { start: u64, len: u64 },
    Wrong(FormatError),
}

impl From<FormatError> for Stop {
    fn from(error: FormatError) -> Self {
        Self::Wrong(error)
    }
}

/// A walk over an image. Call [`Self::resume`]; fetch what it needs; call it again; until it is done.
/// It remembers which nodes it has seen, so that no cycle holds it, and asks for nothing twice.
pub struct Walk {
    superblock: Superblock,
    image_len: u64,
    pending: Vec<Task>,
    seen: HashSet<u64>,
    metadata: RangeSet,
}

impl Walk {
    /// A walk over all of an image of `image_len` bytes.
    ///
    /// # Errors
    /// Where the image keeps metadata in ways that are not followed.
    pub fn new(superblock: &Superblock, image_len: u64) -> Result<Self, FormatError> {
        if image_len > i64::MAX as u64 {
            return Err(FormatError::malformed(
                "the image",
                "has an impossible length",
            ));
        }
        let mut walk = Self::below(superblock, image_len, superblock.root_node);
        walk.metadata
            .insert(0, superblock.head_len().min(image_len));
        let has_fragments = superblock.feature_incompat & INCOMPAT_FRAGMENTS != 0;
        if has_fragments && superblock.packed_node != 0 {
            walk.push_node(superblock.packed_node)?;
        }
        let has_prefixes = superblock.feature_incompat & INCOMPAT_XATTR_PREFIXES != 0;
        if has_prefixes && superblock.xattr_prefix_count > 0 {
            if has_fragments {
                return Err(FormatError::Unsupported {
                    what: "an EROFS image with attribute prefixes in its packed file".into(),
                    hint: "make it without fragments",
                });
            }
            walk.pending.push(Task::XattrPrefixes {
                start: superblock.xattr_prefix_start,
                count: superblock.xattr_prefix_count,
            });
        }
        Ok(walk)
    }

    /// A walk over `node` and what lies below it.
    pub(crate) fn below(superblock: &Superblock, image_len: u64, node: u64) -> Self {
        Self {
            superblock: superblock.clone(),
            image_len,
            pending: vec![Task::Node(node)],
            seen: HashSet::from([node]),
            metadata: RangeSet::default(),
        }
    }

    /// What has been found to be metadata, in whole pages; all of it once the walk is done.
    pub fn metadata(&self) -> &RangeSet {
        &self.metadata
    }

    /// How many nodes have been seen.
    pub fn node_count(&self) -> usize {
        self.seen.len()
    }

    /// Goes on as far as what is `known` allows, and shows `visit` the data of the files on the way,
    /// each extent once. Compressed files have none that could be shown.
    ///
    /// # Errors
    /// Where the image is damaged, or `visit` says so. The walk is of no use then.
    pub fn resume(
        &mut self,
        known: &(impl Known + ?Sized),
        visit: &mut dyn FnMut(Extent) -> Result<(), FormatError>,
    ) -> Result<Progress, FormatError> {
        let mut needs = RangeSet::default();
        let mut waiting = Vec::new();
        while let Some(task) = self.pending.pop() {
            match self.perform(task, known, visit) {
                Ok(()) => {}
                Err(Stop::Wrong(error)) => return Err(error),
                Err(Stop::Missing { start, len }) => {
                    let end = (start + len)
                        .next_multiple_of(NEED_ALIGN)
                        .min(self.image_len);
                    needs.insert(start - start % NEED_ALIGN, end);
                    waiting.push(task);
                    if needs.total_bytes() >= NEED_BYTES_MAX {
                        break;
                    }
                }
            }
        }
        self.pending.append(&mut waiting);
        match self.pending.is_empty() {
            true => Ok(Progress::Done),
            false => Ok(Progress::Need(needs.iter().collect())),
        }
    }

    fn perform(
        &mut self,
        task: Task,
        known: &(impl Known + ?Sized),
        visit: &mut dyn FnMut(Extent) -> Result<(), FormatError>,
    ) -> Result<(), Stop> {
        match task {
            Task::Node(node) => self.node(node, known, visit),
            Task::DirectoryBlock { inode, offset } => self.directory_block(&inode, offset, known),
            Task::Chunks { node, inode, first } => self.chunks(node, &inode, first, known, visit),
            Task::SharedXattr { start } => {
                let head = self.read(known, "an attribute", start, XATTR_ENTRY_LEN)?;
                let len = xattr_entry_len(Fields::new(&head));
                self.note("an attribute", start, len).map_err(Stop::Wrong)
            }
            Task::XattrPrefixes { start, count } => self.xattr_prefix(start, count, known),
        }
    }

    /// One inode: notes what belongs to it and puts off what it refers to.
    fn node(
        &mut self,
        node: u64,
        known: &(impl Known + ?Sized),
        visit: &mut dyn FnMut(Extent) -> Result<(), FormatError>,
    ) -> Result<(), Stop> {
        let start = node
            .checked_mul(NODE_LEN)
            .and_then(|offset| offset.checked_add(self.superblock.meta_start))
            .ok_or_else(|| {
                FormatError::malformed("a node number", format!("{node} is impossible"))
            })?;
        let head = self.read(known, "an inode", start, INODE_LEN_MIN)?;
        let len = inode_len(Fields::new(&head));
        let fixed = self.read(known, "an inode", start, len)?;
        let inode = Inode::parse(Fields::new(&fixed), start)?;
        let attributes = self.read(known, "attributes", start + len, inode.xattr_len())?;
        // Whatever can stop this task has to come before what it must not do twice.
        let index_end = match inode.layout {
            Layout::Compressed { .. } if inode.kind == Kind::Regular => {
                let header = self.read(
                    known,
                    "a map header",
                    map_header_start(&inode),
                    MAP_HEADER_LEN,
                )?;
                index_end(&inode, &self.superblock, Fields::new(&header))?
            }
            _ => inode.end(),
        };
        self.note("an inode", start, inode.end() - start)?;
        for place in shared_xattrs(Fields::new(&attributes), inode.xattr_len()) {
            let start = self.superblock.xattr_start + place;
            // A shared attribute is a place and not a node, but it is remembered as one: its high bit
            // is one that no node number can have.
            if self.remember(start | 1 << 63)? {
                self.pending.push(Task::SharedXattr { start });
            }
        }
        match (inode.kind, inode.layout) {
            (Kind::Special, _) => {}
            (Kind::Regular, Layout::Compressed { .. }) => {
                self.note(
                    "an index",
                    inode.end(),
                    index_end.min(self.image_len).saturating_sub(inode.end()),
                )?;
            }
            (Kind::Regular, Layout::Chunked) => {
                self.pending.push(Task::Chunks {
                    node,
                    inode,
                    first: 0,
                });
            }
            (_, Layout::Compressed { .. } | Layout::Chunked) => {
                return Err(Stop::Wrong(FormatError::Unsupported {
                    what: "an EROFS image with compressed or chunked directories or links".into(),
                    hint: "make it with directories and links in plain form",
                }));
            }
            (kind, Layout::Flat { .. }) => self.flat(node, &inode, kind, visit)?,
        }
        Ok(())
    }

    fn flat(
        &mut self,
        node: u64,
        inode: &Inode,
        kind: Kind,
        visit: &mut dyn FnMut(Extent) -> Result<(), FormatError>,
    ) -> Result<(), FormatError> {
        let (blocks_len, tail_len) = inode.flat_parts(&self.superblock);
        self.note("a tail", inode.end(), tail_len)?;
        let start = inode.flat_start(&self.superblock);
        match kind {
            Kind::Regular if blocks_len > 0 => visit(Extent {
                node,
                device: 0,
                start,
                len: blocks_len,
            }),
            Kind::Regular | Kind::Special => Ok(()),
            Kind::Directory | Kind::Symlink => {
                self.note("a directory or link", start, blocks_len)?;
                if kind == Kind::Directory && inode.size > 0 {
                    self.pending.push(Task::DirectoryBlock {
                        inode: *inode,
                        offset: 0,
                    });
                }
                Ok(())
            }
        }
    }

    /// One block of a directory: notes its entries' nodes and puts off the next block.
    fn directory_block(
        &mut self,
        inode: &Inode,
        offset: u64,
        known: &(impl Known + ?Sized),
    ) -> Result<(), Stop> {
        let (blocks_len, tail_len) = inode.flat_parts(&self.superblock);
        let (start, len) = match offset < blocks_len {
            true => {
                let len = self.superblock.block_size().min(blocks_len - offset);
                (inode.flat_start(&self.superblock) + offset, len)
            }
            false => (inode.end(), tail_len),
        };
        let block = self.read(known, "a directory", start, len)?;
        let fields = Fields::new(&block);
        let names_start = u64::from(fields.u16(8));
        if names_start < DIRENT_LEN || names_start % DIRENT_LEN != 0 || names_start > len {
            return Err(malformed(
                inode.start,
                format!("has a directory block at byte {start} that makes no sense"),
            )
            .into());
        }
        if offset + len < inode.size {
            self.pending.push(Task::DirectoryBlock {
                inode: *inode,
                offset: offset + len,
            });
        }
        // The last one is looked at first, so that files come in the order of their names.
        for index in (0..names_start / DIRENT_LEN).rev() {
            let entry = index * DIRENT_LEN;
            let at = entry as usize;
            let name_start = usize::from(fields.u16(at + 8));
            let name_end = match entry + DIRENT_LEN < names_start {
                true => usize::from(fields.u16(at + DIRENT_LEN as usize + 8)),
                false => block.len(),
            };
            let name = block
                .get(name_start..name_end)
                .ok_or_else(|| malformed(inode.start, "has a name outside its directory"))?;
            // The last name of a block ends at its first zero.
            let name = name.split(|byte| *byte == 0).next().unwrap_or_default();
            if name != b"." && name != b".." {
                self.push_node(fields.u64(at))?;
            }
        }
        Ok(())
    }

    /// Some entries of a file's chunk index.
    fn chunks(
        &mut self,
        node: u64,
        inode: &Inode,
        first: u64,
        known: &(impl Known + ?Sized),
        visit: &mut dyn FnMut(Extent) -> Result<(), FormatError>,
    ) -> Result<(), Stop> {
        let block_log2 = u32::from(self.superblock.block_size_log2);
        let chunk_log2 = block_log2 + (inode.union & CHUNK_SIZE_BITS);
        let entry_len = match inode.union & CHUNK_INDEXES {
            0 => 4,
            _ => 8,
        };
        if inode.union & !(CHUNK_INDEXES | CHUNK_SIZE_BITS) != 0 {
            return Err(malformed(inode.start, "has an unknown chunk format").into());
        }
        let count = inode.size.div_ceil(1 << chunk_log2);
        let table_start = inode.end().next_multiple_of(entry_len);
        let here = (count - first.min(count)).min(CHUNKS_PER_STEP);
        let bytes = self.read(
            known,
            "a chunk index",
            table_start + first * entry_len,
            here * entry_len,
        )?;
        let fields = Fields::new(&bytes);
        // The table's high bits are nydus' own: only as many as there are devices count.
        let device_mask = (u32::from(self.superblock.device_count) + 1).next_power_of_two() as u16;
        let device_mask = device_mask.wrapping_sub(1);
        for index in 0..here {
            let at = (index * entry_len) as usize;
            let (device, block) = match entry_len {
                4 => (0, fields.u32(at)),
                _ => (fields.u16(at + 2) & device_mask, fields.u32(at + 4)),
            };
            if block == CHUNK_HOLE {
                continue;
            }
            if device > self.superblock.device_count {
                return Err(malformed(
                    inode.start,
                    format!("lies on device {device}, which is not there"),
                )
                .into());
            }
            let done = (first + index) << chunk_log2;
            visit(Extent {
                node,
                device,
                start: u64::from(block) << block_log2,
                len: (inode.size - done).min(1 << chunk_log2),
            })?;
        }
        self.note("a chunk index", table_start, (first + here) * entry_len)?;
        if first + here < count {
            self.pending.push(Task::Chunks {
                node,
                inode: *inode,
                first: first + here,
            });
        }
        Ok(())
    }

    fn xattr_prefix(
        &mut self,
        start: u64,
        count: u8,
        known: &(impl Known + ?Sized),
    ) -> Result<(), Stop> {
        /// A prefix starts with its length and begins at a multiple of 4.
        const LEN_LEN: u64 = 2;
        let head = self.read(known, "an attribute prefix", start, LEN_LEN)?;
        let len = LEN_LEN + u64::from(Fields::new(&head).u16(0));
        self.note("an attribute prefix", start, len)?;
        if count > 1 {
            self.pending.push(Task::XattrPrefixes {
                start: (start + len).next_multiple_of(4),
                count: count - 1,
            });
        }
        Ok(())
    }

    /// Puts a node off, unless it was seen: names repeat in hard links, `.` and `..`.
    fn push_node(&mut self, node: u64) -> Result<(), FormatError> {
        if node >> 58 != 0 {
            return Err(FormatError::malformed(
                "a node number",
                format!("{node} is impossible"),
            ));
        }
        if self.remember(node)? {
            self.pending.push(Task::Node(node));
        }
        Ok(())
    }

    fn remember(&mut self, key: u64) -> Result<bool, FormatError> {
        if self.seen.len() >= NODES_MAX {
            return Err(FormatError::Unsupported {
                what: format!("an image of more than {NODES_MAX} files"),
                hint: "split it",
            });
        }
        Ok(self.seen.insert(key))
    }

    /// Bytes of the image, where they are there.
    fn read<'k>(
        &self,
        known: &'k (impl Known + ?Sized),
        what: &'static str,
        start: u64,
        len: u64,
    ) -> Result<Cow<'k, [u8]>, Stop> {
        self.check(what, start, len)?;
        match len {
            0 => Ok(Cow::Borrowed(&[])),
            _ => known.get(start, len).ok_or(Stop::Missing { start, len }),
        }
    }

    /// Notes that these bytes must be local.
    fn note(&mut self, what: &'static str, start: u64, len: u64) -> Result<(), FormatError> {
        if len > 0 {
            self.check(what, start, len)?;
            let end = (start + len).next_multiple_of(PAGE_LEN).min(self.image_len);
            self.metadata.insert(start - start % PAGE_LEN, end);
        }
        Ok(())
    }

    fn check(&self, what: &'static str, start: u64, len: u64) -> Result<(), FormatError> {
        match start.checked_add(len) {
            Some(end) if end <= self.image_len => Ok(()),
            _ => Err(FormatError::Truncated {
                what,
                start,
                len,
                end: self.image_len,
            }),
        }
    }
}

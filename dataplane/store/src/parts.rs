//! Bytes that lie in many parts, one behind the other: hashed and written as one.

use std::io::IoSlice;
use std::ops::Range;

use pantala_wire::tree::group_digest;
use pantala_wire::{GROUP_SIZE, GroupDigest};

/// Bytes in parts. BLAKE3 is fastest over long runs, and a packet's worth at a time costs five times as
/// much, so that a group in many parts is gathered first, in memory that stays in the processor's cache.
pub(crate) struct Parts<'a> {
    /// None is empty.
    parts: Vec<&'a [u8]>,
    len: usize,
}

impl<'a> Parts<'a> {
    pub(crate) fn new(parts: impl IntoIterator<Item = &'a [u8]>) -> Self {
        let parts: Vec<&[u8]> = parts.into_iter().filter(|part| !part.is_empty()).collect();
        let len = parts.iter().map(|part| part.len()).sum();
        Self { parts, len }
    }

    /// Bytes in all parts.
    pub(crate) fn len(&self) -> usize {
        self.len
    }

    /// The digests of the groups, the first of which starts at byte `offset` of the blob.
    pub(crate) fn group_digests(&self, offset: u64) -> Vec<GroupDigest> {
        let group_size = GROUP_SIZE as usize;
        let mut window = Vec::new();
        let mut rest = self.cut(0..self.len);
        (0..self.len.div_ceil(group_size))
            .map(|index| {
                let len = group_size.min(self.len - index * group_size);
                group_digest(
                    offset + (index * group_size) as u64,
                    rest.gather(len, &mut window),
                )
            })
            .collect()
    }

    /// The parts of `range`, to be written.
    pub(crate) fn slices(&self, range: Range<usize>) -> Vec<IoSlice<'a>> {
        self.cut(range).map(IoSlice::new).collect()
    }

    fn cut(&self, range: Range<usize>) -> Cut<'a, '_> {
        let mut cut = Cut {
            parts: &self.parts,
            skipped: range.start,
            len: range.len(),
        };
        while let Some((first, rest)) = cut
            .parts
            .split_first()
            .filter(|(p, _)| p.len() <= cut.skipped)
        {
            cut.skipped -= first.len();
            cut.parts = rest;
        }
        cut
    }
}

/// A range of parts, from the front on.
struct Cut<'a, 'p> {
    parts: &'p [&'a [u8]],
    /// Of the first part.
    skipped: usize,
    /// Bytes of the range that are left.
    len: usize,
}

impl<'a> Cut<'a, '_> {
    /// The next bytes of one part, `max` at most.
    fn next_run(&mut self, max: usize) -> Option<&'a [u8]> {
        let (first, rest) = self.parts.split_first()?;
        let left = &first[self.skipped..];
        let run = &left[..left.len().min(max).min(self.len)];
        if run.is_empty() {
            return None;
        }
        self.len -= run.len();
        if run.len() == left.len() {
            (self.parts, self.skipped) = (rest, 0);
        } else {
            self.skipped += run.len();
        }
        Some(run)
    }

    /// The next `len` bytes, as they are or gathered in `window`.
    fn gather<'w>(&mut self, len: usize, window: &'w mut Vec<u8>) -> &'w [u8]
    where
        'a: 'w,
    {
        window.clear();
        let mut missing = len;
        while let Some(run) = self.next_run(missing) {
            if run.len() == len {
                return run;
            }
            window.extend_from_slice(run);
            missing -= run.len();
        }
        window
    }
}

impl<'a> Iterator for Cut<'a, '_> {
    type Item = &'a [u8];

    fn next(&mut self) -> Option<&'a [u8]> {
        self.next_run(usize::MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use pantala_wire::tree::group_digests;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn bytes_in_parts_are_the_same_bytes(
            len in 1_usize..3 * GROUP_SIZE as usize,
            cuts in proptest::collection::vec(0_usize..3 * GROUP_SIZE as usize, 0..60),
            first_group in 0_u64..5,
            range in (0_usize..200_000, 0_usize..200_000),
        ) {
            let data: Vec<u8> = (0..len).map(|at| (at * 31 + at / 251) as u8).collect();
            let mut cuts: Vec<usize> = cuts.into_iter().map(|cut| cut.min(len)).chain([0, len]).collect();
            cuts.sort_unstable();
            let parts = Parts::new(cuts.windows(2).map(|cut| &data[cut[0]..cut[1]]));
            prop_assert_eq!(parts.len(), len);
            let offset = first_group * GROUP_SIZE;
            prop_assert_eq!(parts.group_digests(offset), group_digests(offset, &data));
            let (a, b) = (range.0.min(len), range.1.min(len));
            let (start, end) = (a.min(b), a.max(b));
            let slices = parts.slices(start..end);
            prop_assert!(slices.iter().all(|slice| !slice.is_empty()));
            let bytes: Vec<u8> = slices.iter().flat_map(|slice| slice.iter().copied()).collect();
            prop_assert_eq!(&bytes[..], &data[start..end]);
        }
    }
}

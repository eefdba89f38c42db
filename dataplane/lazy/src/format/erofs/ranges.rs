//! A set of bytes as ranges.

use std::collections::BTreeMap;

use pantala_wire::ByteRange;

/// Bytes of an image, as ranges that neither touch nor overlap.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct RangeSet {
    /// End by start.
    ranges: BTreeMap<u64, u64>,
}

impl RangeSet {
    /// Adds bytes `start..end`; nothing where that is empty.
    pub fn insert(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let (mut start, mut end) = (start, end);
        // Whatever touches the new range becomes part of it.
        while let Some((&other_start, &other_end)) = self.ranges.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.ranges.remove(&other_start);
            start = start.min(other_start);
            end = end.max(other_end);
        }
        self.ranges.insert(start, end);
    }

    /// True where all of `start..end` is in the set.
    pub fn covers(&self, start: u64, end: u64) -> bool {
        start >= end
            || self
                .ranges
                .range(..=start)
                .next_back()
                .is_some_and(|(_, &other_end)| other_end >= end)
    }

    /// The ranges in order.
    pub fn iter(&self) -> impl Iterator<Item = ByteRange> + '_ {
        self.ranges
            .iter()
            .filter_map(|(&start, &end)| ByteRange::new(start, end))
    }

    /// How many bytes.
    pub fn total_bytes(&self) -> u64 {
        self.ranges.iter().map(|(start, end)| end - start).sum()
    }

    /// How many ranges.
    pub fn range_count(&self) -> usize {
        self.ranges.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_that_touch_become_one() {
        let mut set = RangeSet::default();
        for (start, end) in [(10, 20), (30, 40), (50, 60), (5, 5)] {
            set.insert(start, end);
        }
        assert_eq!(set.range_count(), 3);
        set.insert(20, 30);
        assert!(set.covers(10, 40) && !set.covers(10, 41) && !set.covers(9, 11));
        set.insert(0, 100);
        assert_eq!((set.range_count(), set.total_bytes()), (1, 100));
        assert!(set.covers(7, 7) && set.covers(99, 100) && !set.covers(99, 101));
    }
}

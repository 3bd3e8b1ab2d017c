//! Sets of a payload's groups: which 256 KiB of it are somewhere.

use std::collections::BTreeMap;
use std::ops::Range;

/// Bytes of a group: what of a payload is hashed, verified, written and resumed together. The last
/// group of a payload may be shorter. A payload's root does not depend on it.
pub const GROUP_BYTES: u64 = 256 * 1024;

/// How many groups a payload of so many bytes has; the empty one has one, which is empty.
#[must_use]
pub const fn groups_of(bytes: u64) -> u64 {
    let groups = bytes.div_ceil(GROUP_BYTES);
    if groups == 0 { 1 } else { groups }
}

/// A set of groups, by their numbers from zero.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Groups {
    /// Where each run begins, and behind its end: runs are not empty and do not touch.
    runs: BTreeMap<u64, u64>,
    len: u64,
}

impl Groups {
    /// The empty set.
    #[must_use]
    pub const fn new() -> Self {
        Self { runs: BTreeMap::new(), len: 0 }
    }

    /// The first `count` groups.
    #[must_use]
    pub fn first(count: u64) -> Self {
        let mut all = Self::new();
        all.insert(0..count);
        all
    }

    /// How many groups are in it.
    #[must_use]
    pub const fn len(&self) -> u64 {
        self.len
    }

    /// Whether none is.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Its runs, ascending; they are not empty and do not touch.
    pub fn runs(&self) -> impl ExactSizeIterator<Item = Range<u64>> {
        self.runs.iter().map(|(start, end)| *start..*end)
    }

    /// Adds all of `range`; how many were not in it before.
    pub fn insert(&mut self, range: Range<u64>) -> u64 {
        let Range { mut start, mut end } = range;
        if start >= end {
            return 0;
        }
        let before = self.len;
        // A run that reaches the start, and then every run that begins inside or at the end.
        if let Some((from, to)) = self.run_before(start).filter(|(_, to)| *to >= start) {
            self.take(from);
            (start, end) = (from, end.max(to));
        }
        while let Some((from, to)) = self.run_from(start).filter(|(from, _)| *from <= end) {
            self.take(from);
            end = end.max(to);
        }
        self.put(start, end);
        self.len - before
    }

    /// Takes all of `range` out.
    pub fn remove(&mut self, range: Range<u64>) {
        let Range { start, end } = range;
        if start >= end {
            return;
        }
        if let Some((from, to)) = self.run_before(start).filter(|(_, to)| *to > start) {
            self.take(from);
            self.put(from, start);
            self.put(end.min(to), to);
        }
        while let Some((from, to)) = self.run_from(start).filter(|(from, _)| *from < end) {
            self.take(from);
            self.put(end.min(to), to);
            if to > end {
                break;
            }
        }
    }

    /// Whether all of `range` is in it; of an empty range it is.
    #[must_use]
    pub fn covers(&self, range: Range<u64>) -> bool {
        self.gap(range).is_none()
    }

    /// Whether any of `range` is in it.
    #[must_use]
    pub fn touches(&self, range: Range<u64>) -> bool {
        self.overlap(range).is_some()
    }

    /// The first run of `range` that is not in it.
    #[must_use]
    pub fn gap(&self, range: Range<u64>) -> Option<Range<u64>> {
        let Range { start, end } = range;
        let start = match self.run_before(start).or_else(|| self.run_from(start)) {
            Some((from, to)) if from <= start && to > start => to,
            _ => start,
        };
        let next = self.run_from(start).map_or(end, |(from, _)| from.min(end));
        (start < next).then_some(start..next)
    }

    /// The first run of `range` that is in it.
    #[must_use]
    pub fn overlap(&self, range: Range<u64>) -> Option<Range<u64>> {
        let Range { start, end } = range;
        let reaches = self.run_before(start).filter(|(_, to)| *to > start);
        let (from, to) = reaches.or_else(|| self.run_from(start))?;
        let run = from.max(start)..to.min(end);
        (run.start < run.end).then_some(run)
    }

    /// The runs of `range` that are not in it, ascending.
    pub fn gaps(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<'_> {
        let Range { mut start, end } = range;
        std::iter::from_fn(move || {
            let gap = self.gap(start..end)?;
            start = gap.end;
            Some(gap)
        })
    }

    /// The runs of `range` that are in it, ascending.
    pub fn overlaps(&self, range: Range<u64>) -> impl Iterator<Item = Range<u64>> + use<'_> {
        let Range { mut start, end } = range;
        std::iter::from_fn(move || {
            let run = self.overlap(start..end)?;
            start = run.end;
            Some(run)
        })
    }

    /// How many of `range` are in it.
    #[must_use]
    pub fn count(&self, range: Range<u64>) -> u64 {
        self.overlaps(range).map(|run| run.end - run.start).sum()
    }

    /// The run that begins before `at`, or at it, and is the last of those.
    fn run_before(&self, at: u64) -> Option<(u64, u64)> {
        self.runs.range(..=at).next_back().map(|(from, to)| (*from, *to))
    }

    /// The first run that begins at `at` or behind it.
    fn run_from(&self, at: u64) -> Option<(u64, u64)> {
        self.runs.range(at..).next().map(|(from, to)| (*from, *to))
    }

    fn take(&mut self, from: u64) {
        if let Some(to) = self.runs.remove(&from) {
            self.len -= to - from;
        }
    }

    fn put(&mut self, from: u64, to: u64) {
        if from < to {
            self.runs.insert(from, to);
            self.len += to - from;
        }
    }
}

impl Extend<Range<u64>> for Groups {
    fn extend<I: IntoIterator<Item = Range<u64>>>(&mut self, ranges: I) {
        for range in ranges {
            self.insert(range);
        }
    }
}

impl FromIterator<Range<u64>> for Groups {
    fn from_iter<I: IntoIterator<Item = Range<u64>>>(ranges: I) -> Self {
        let mut groups = Self::new();
        groups.extend(ranges);
        groups
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_payload_has_at_least_one_group() {
        assert_eq!(groups_of(0), 1);
        assert_eq!(groups_of(1), 1);
        assert_eq!(groups_of(GROUP_BYTES), 1);
        assert_eq!(groups_of(GROUP_BYTES + 1), 2);
        assert_eq!(groups_of(u64::MAX), u64::MAX.div_ceil(GROUP_BYTES));
    }

    proptest! {
        /// It is what a plain set of numbers is, in as few runs as there can be.
        #[test]
        fn it_is_a_set(
            turns in proptest::collection::vec((any::<bool>(), 0..60u64, 0..20u64), 0..40),
            looks in proptest::collection::vec((0..70u64, 0..20u64), 0..20),
        ) {
            let mut groups = Groups::new();
            let mut plain = BTreeSet::new();
            for (adds, start, len) in turns {
                let range = start..start + len;
                if adds {
                    let new = range.clone().filter(|n| plain.insert(*n)).count();
                    prop_assert_eq!(groups.insert(range), new as u64);
                } else {
                    groups.remove(range.clone());
                    range.for_each(|n| { plain.remove(&n); });
                }
                let listed: Vec<u64> = groups.runs().flatten().collect();
                prop_assert_eq!(listed, plain.iter().copied().collect::<Vec<_>>());
                prop_assert_eq!(groups.len(), plain.len() as u64);
                let runs: Vec<_> = groups.runs().collect();
                prop_assert!(runs.iter().all(|run| run.start < run.end));
                prop_assert!(runs.windows(2).all(|two| two[0].end < two[1].start));
            }
            for (start, len) in looks {
                let range = start..start + len;
                let inside = range.clone().filter(|n| plain.contains(n)).count() as u64;
                prop_assert_eq!(groups.count(range.clone()), inside);
                prop_assert_eq!(groups.covers(range.clone()), inside == len);
                prop_assert_eq!(groups.touches(range.clone()), inside > 0);
                let first = range.clone().find(|n| !plain.contains(n));
                let gap = first.map(|first| {
                    let end = (first..range.end).find(|n| plain.contains(n));
                    first..end.unwrap_or(range.end)
                });
                prop_assert_eq!(groups.gap(range.clone()), gap);
                let first = range.clone().find(|n| plain.contains(n));
                let run = first.map(|first| {
                    let end = (first..range.end).find(|n| !plain.contains(n));
                    first..end.unwrap_or(range.end)
                });
                prop_assert_eq!(groups.overlap(range), run);
            }
            prop_assert_eq!(groups.runs().collect::<Groups>(), groups);
        }
    }
}

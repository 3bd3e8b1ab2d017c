//! When what is next to be done: a schedule with at most one instant per key.

use std::collections::{BTreeMap, BTreeSet};

use super::time::Boot;

/// A schedule.
#[derive(Clone, Debug)]
pub struct Due<K> {
    at: BTreeMap<K, Boot>,
    order: BTreeSet<(Boot, K)>,
}

impl<K> Default for Due<K> {
    fn default() -> Self {
        Self { at: BTreeMap::new(), order: BTreeSet::new() }
    }
}

impl<K: Ord + Copy> Due<K> {
    /// Sets when `key` is due, whatever was set before.
    pub fn set(&mut self, key: K, at: Boot) {
        if let Some(was) = self.at.insert(key, at) {
            self.order.remove(&(was, key));
        }
        self.order.insert((at, key));
    }

    /// Takes `key` off the schedule.
    pub fn remove(&mut self, key: &K) {
        if let Some(was) = self.at.remove(key) {
            self.order.remove(&(was, *key));
        }
    }

    /// Takes the earliest key that is due at `now` off the schedule.
    pub fn pop(&mut self, now: Boot) -> Option<K> {
        let (at, key) = self.order.first().copied().filter(|(at, _)| *at <= now)?;
        self.order.remove(&(at, key));
        self.at.remove(&key);
        Some(key)
    }

    /// When the next one is due.
    #[must_use]
    pub fn next(&self) -> Option<Boot> {
        self.order.first().map(|(at, _)| *at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_is_due_once_and_where_it_was_set_last() {
        let mut due = Due::default();
        for (key, at) in [(1, 50), (2, 20), (1, 10), (3, 30), (3, 40)] {
            due.set(key, Boot(at));
        }
        due.remove(&2);
        due.remove(&9);
        assert_eq!(due.next(), Some(Boot(10)));
        assert_eq!((due.pop(Boot(9)), due.pop(Boot(10)), due.pop(Boot(39))), (None, Some(1), None));
        assert_eq!((due.pop(Boot(99)), due.pop(Boot(99)), due.next()), (Some(3), None, None));
    }
}

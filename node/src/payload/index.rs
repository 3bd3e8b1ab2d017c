//! Indexes among the payloads: which are, what they name, and what goes with them.
//!
//! Nothing is remembered of an index but that it begins as one: what it names is read when it is
//! asked for, so that many of them cost the disk they take and no memory.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt as _;

use leasehold_proto::words::index::{Index, IndexError, MAGIC, MAX_BYTES};

use super::{Inner, PayloadError, PayloadStore, Root};

impl PayloadStore {
    /// What the index `root` says, verified.
    ///
    /// # Errors
    /// When it is not held, does not match its name, or is no index.
    pub fn index(&self, root: Root) -> Result<Index, PayloadError> {
        let not = |why| PayloadError::NotAnIndex { root, why };
        let size = self.has(root).ok_or(PayloadError::NotHeld(root))?;
        if size > MAX_BYTES as u64 {
            return Err(not(IndexError::NoIndex));
        }
        // To look what it says is not to use it.
        let bytes = self.read_all(&self.open_files(root, size)?)?;
        Index::from_bytes(&bytes).map_err(not)
    }

    /// These payloads, and all that those of them name which are held and are indexes.
    ///
    /// # Errors
    /// When one of them cannot be read, so that what it names is not known.
    pub fn with_named(
        &self,
        roots: impl IntoIterator<Item = Root>,
    ) -> Result<HashSet<Root>, PayloadError> {
        let mut all = HashSet::new();
        for root in roots {
            if self.inner.is_index(root) {
                match self.index(root) {
                    Ok(index) => {
                        all.extend(index.payloads().iter().map(|named| Root::from(named.root)));
                    }
                    // It only begins as one, or is gone by now.
                    Err(
                        PayloadError::NotAnIndex { .. }
                        | PayloadError::NotHeld(_)
                        | PayloadError::Corrupt(_),
                    ) => {}
                    Err(error) => return Err(error),
                }
            }
            all.insert(root);
        }
        Ok(all)
    }

    /// Removes an index and what it names, but for what another index names or is in `spared`. How
    /// many payloads were removed.
    ///
    /// # Errors
    /// As for [`Self::index`], before anything is removed; or when removing fails.
    pub fn remove_index(&self, root: Root, spared: &HashSet<Root>) -> Result<usize, PayloadError> {
        let index = self.index(root)?;
        let others = self.list().into_iter().filter(|stored| stored.index && stored.root != root);
        let named_elsewhere = self.with_named(others.map(|stored| stored.root))?;
        // The index first: what is left when this is cut short is what any payload is that is not
        // used.
        let mut removed = usize::from(self.remove(root)?);
        for payload in index.payloads() {
            let named = Root::from(payload.root);
            if !named_elsewhere.contains(&named) && !spared.contains(&named) {
                removed += usize::from(self.remove(named)?);
            }
        }
        Ok(removed)
    }
}

impl Inner {
    fn is_index(&self, root: Root) -> bool {
        super::lock(&self.held).payloads.get(&root).is_some_and(|known| known.index)
    }

    /// Whether a payload on disk begins as an index does; one that cannot be read does not.
    pub(super) fn begins_as_index(&self, root: Root, size: u64) -> bool {
        let mut first = [0; MAGIC.len()];
        size <= MAX_BYTES as u64
            && File::open(self.data_path(root))
                .is_ok_and(|data| data.read_exact_at(&mut first, 0).is_ok())
            && first == MAGIC
    }
}

#[cfg(test)]
mod tests {
    use leasehold_proto::Payload;
    use leasehold_proto::words::index::IndexedFile;

    use super::super::{Declared, Limits};
    use super::*;

    fn store(dir: &tempfile::TempDir) -> PayloadStore {
        let limits = Limits { keep_free: 0, ..Limits::default() };
        PayloadStore::open_dir(dir.path(), limits).expect("a store")
    }

    fn keep(store: &PayloadStore, bytes: &[u8]) -> Root {
        let kept = store.import(bytes, Declared::Exactly(bytes.len() as u64));
        kept.expect("imports").root
    }

    fn index_of(store: &PayloadStore, contents: &[&[u8]]) -> Root {
        let files = contents.iter().enumerate().map(|(n, content)| {
            let payload = Payload { root: keep(store, content).into(), size: content.len() as u64 };
            IndexedFile { path: n.to_string(), executable: false, payload }
        });
        keep(store, &Index::new(files.collect()).expect("an index").to_bytes())
    }

    #[test]
    fn what_an_index_names_is_known_after_a_restart_too() {
        let dir = tempfile::tempdir().expect("a directory");
        let root = index_of(&store(&dir), &[b"one", b"two", b"one"]);
        let store = store(&dir);
        let indexes: Vec<_> = store.list().into_iter().filter(|stored| stored.index).collect();
        assert_eq!(indexes.iter().map(|stored| stored.root).collect::<Vec<_>>(), [root]);
        let all = store.with_named([root]).expect("reads");
        assert_eq!(all, [root, Root::of(b"one"), Root::of(b"two")].into());
        let absent = Root::of(b"absent");
        assert_eq!(store.with_named([absent]).expect("reads"), [absent].into());
    }

    #[test]
    fn what_is_no_index_is_told() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = store(&dir);
        let long = vec![7; MAX_BYTES + 1];
        for bytes in [&b""[..], b"LHINDEX", b"LHINDEX1", &long] {
            let root = keep(&store, bytes);
            let read = store.index(root);
            assert!(matches!(read, Err(PayloadError::NotAnIndex { .. })), "{read:?}");
            assert_eq!(store.with_named([root]).expect("reads"), [root].into());
        }
        let none = store.index(Root::of(b"x"));
        assert!(matches!(none, Err(PayloadError::NotHeld(_))), "{none:?}");
        let plain = keep(&store, b"plain");
        let read = store.index(plain);
        let no_index = PayloadError::NotAnIndex { root: plain, why: IndexError::NoIndex };
        assert_eq!(read.expect_err("no index").to_string(), no_index.to_string());
    }

    #[test]
    fn indexes_are_told_of_before_what_they_name() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = store(&dir);
        let first = index_of(&store, &[b"1", b"2", b"3", b"4", b"5"]);
        let second = index_of(&store, &[b"6", b"7", b"8"]);
        for n in 10..20u8 {
            keep(&store, &[n]);
        }
        let newest = store.newest(6);
        assert_eq!(newest[..2], [second, first]);
        let last: Vec<_> = (16..20u8).rev().map(|n| Root::of(&[n])).collect();
        assert_eq!(newest[2..], last);
        // They are not all that is told of.
        store.path(first).expect("used");
        assert_eq!(store.newest(2), [first, Root::of(&[19])]);
        assert_eq!(store.newest(100).len(), store.list().len());
    }

    #[test]
    fn an_index_goes_with_what_nobody_else_wants() {
        let dir = tempfile::tempdir().expect("a directory");
        let store = store(&dir);
        let one = index_of(&store, &[b"shared", b"own", b"pinned"]);
        let other = index_of(&store, &[b"shared", b"another"]);
        let spared = [Root::of(b"pinned")].into();
        assert_eq!(store.remove_index(one, &spared).expect("removes"), 2, "itself and its own");
        let mut left: Vec<_> = store.list().into_iter().map(|stored| stored.root).collect();
        let contents = [&b"shared"[..], b"another", b"pinned"];
        let mut right: Vec<_> = contents.iter().map(|content| Root::of(content)).collect();
        right.push(other);
        left.sort();
        right.sort();
        assert_eq!(left, right);
        let plain = store.remove_index(Root::of(b"shared"), &HashSet::new());
        assert!(matches!(plain, Err(PayloadError::NotAnIndex { .. })), "{plain:?}");
        assert!(store.has(Root::of(b"shared")).is_some(), "nothing goes with what is no index");
    }
}

//! An index: a payload that names others, so that one root stands for a directory of files, such as
//! the parts of a model or the layout of an image.
//!
//! ```text
//! LHINDEX1 | files: count u64, then each: path, executable u8, root 32, size u64
//! ```
//!
//! What a directory holds has one index and so one root: its files in the order of their paths, each
//! with its bytes and whether it may be executed. Owners, dates and directories without files are
//! not part of it. The names are only hashes, so a payload that several files or several indexes
//! name is there once.
//!
//! An index that was verified against its root says the roots and sizes of what it names, as an order
//! does. That is all it proves: whether somebody has those payloads is another question.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::wire::{self, DecodeError};
use crate::base::id::Payload;

/// What an index begins with.
pub const MAGIC: [u8; 8] = *b"LHINDEX1";
/// The most files of an index.
pub const MAX_FILES: usize = 65_536;
/// The most bytes of an index.
pub const MAX_BYTES: usize = 16 << 20;
/// Of them, those behind [`MAGIC`].
const MAX_BODY: usize = MAX_BYTES - MAGIC.len();
/// The most bytes of a path.
pub const MAX_PATH: usize = 768;
/// The most names in a path: those of its directories and the file's own.
pub const MAX_DEPTH: usize = 15;
/// The most bytes of one name in a path, as file systems have it.
pub const MAX_NAME: usize = 255;

/// A file that an index names.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct IndexedFile {
    /// Where it lies: names divided by `/`, none of them empty, `.` or `..`.
    pub path: String,
    /// Whether it may be executed.
    pub executable: bool,
    /// Its bytes.
    pub payload: Payload,
}

/// An index that keeps every rule.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Index {
    files: Vec<IndexedFile>,
    payloads: Vec<Payload>,
    size: u64,
}

/// Why files make no index, or bytes are none.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum IndexError {
    /// The bytes begin otherwise.
    #[error("it is no index")]
    NoIndex,
    /// The bytes do not decode, or there are too many.
    #[error("it is no index that can be read: {0}")]
    Malformed(DecodeError),
    /// There are too many files.
    #[error("{0} files are more than an index names: at most {MAX_FILES}")]
    TooMany(usize),
    /// Their names are too long, all together.
    #[error("the index would be longer than {MAX_BYTES} bytes: it has too many or too long paths")]
    TooLong,
    /// A path is not what it should be.
    #[error(
        "path {0:?} cannot be in an index: it is absolute, goes up, is spelled twice over, has a NUL, \
         or is too long or too deep"
    )]
    Path(String),
    /// A path is there twice, or not in its place.
    #[error("path {0:?} is there twice, or not where it should be")]
    Order(String),
    /// What is a file is also a directory of another file.
    #[error("path {0:?} is a file and a directory at once")]
    Both(String),
    /// One root has two sizes, or all files together have more bytes than can be counted.
    #[error("path {0:?} has a size that cannot be right")]
    Size(String),
}

impl Index {
    /// The index of these files, in whatever order they come.
    ///
    /// # Errors
    /// When they break a rule.
    pub fn new(mut files: Vec<IndexedFile>) -> Result<Self, IndexError> {
        files.sort_unstable_by(|one, other| one.path.cmp(&other.path));
        let index = Self::checked(files)?;
        if index.encoded().is_none() { Err(IndexError::TooLong) } else { Ok(index) }
    }

    /// The index that these bytes are.
    ///
    /// # Errors
    /// When they are none. Bytes that are an index are the only ones that are this index.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, IndexError> {
        let body = bytes.strip_prefix(&MAGIC).ok_or(IndexError::NoIndex)?;
        let files = wire::decode::<MAX_BODY, _>(body).map_err(IndexError::Malformed)?;
        Self::checked(files)
    }

    /// Whether bytes that begin like this may be an index.
    #[must_use]
    pub fn may_begin(first: &[u8]) -> bool {
        first.starts_with(&MAGIC)
    }

    /// Its bytes.
    #[must_use]
    pub fn to_bytes(&self) -> Vec<u8> {
        // Both ways to make one see to it that it can be encoded.
        self.encoded().unwrap_or_default()
    }

    fn encoded(&self) -> Option<Vec<u8>> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend(wire::encode::<MAX_BODY>(&self.files).ok()?);
        Some(bytes)
    }

    /// Its files, in the order of their paths.
    #[must_use]
    pub fn files(&self) -> &[IndexedFile] {
        &self.files
    }

    /// The payloads that it names, each of them once, in the order of their roots.
    #[must_use]
    pub fn payloads(&self) -> &[Payload] {
        &self.payloads
    }

    /// How many bytes its files have together: what the directory takes.
    #[must_use]
    pub fn size(&self) -> u64 {
        self.size
    }

    /// How many bytes the payloads that it names have, each of them once: what is to be sent.
    #[must_use]
    pub fn payload_bytes(&self) -> u64 {
        self.payloads.iter().map(|payload| payload.size).sum()
    }

    fn checked(files: Vec<IndexedFile>) -> Result<Self, IndexError> {
        if files.len() > MAX_FILES {
            return Err(IndexError::TooMany(files.len()));
        }
        let (mut payloads, mut size) = (BTreeMap::new(), 0u64);
        let mut before: Option<&str> = None;
        for IndexedFile { path, payload, .. } in &files {
            if !is_path(path) {
                return Err(IndexError::Path(path.clone()));
            }
            if before.is_some_and(|before| before >= path.as_str()) {
                return Err(IndexError::Order(path.clone()));
            }
            before = Some(path);
            let above = path.match_indices('/').map(|(at, _)| path.split_at(at).0);
            for directory in above {
                if files.binary_search_by(|file| file.path.as_str().cmp(directory)).is_ok() {
                    return Err(IndexError::Both(directory.into()));
                }
            }
            let known = payloads.insert(payload.root, payload.size);
            let sum = size.checked_add(payload.size);
            size = match sum {
                Some(sum) if known.is_none_or(|known| known == payload.size) => sum,
                _ => return Err(IndexError::Size(path.clone())),
            };
        }
        let payloads = payloads.into_iter().map(|(root, size)| Payload { root, size }).collect();
        Ok(Self { files, payloads, size })
    }
}

/// Whether a path leads from a directory to a file below it, spelled in the one plain way.
fn is_path(path: &str) -> bool {
    let plain = |name: &str| !matches!(name, "" | "." | "..") && name.len() <= MAX_NAME;
    path.len() <= MAX_PATH
        && !path.contains('\0')
        && path.split('/').count() <= MAX_DEPTH
        && path.split('/').all(plain)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::base::id::Hash;

    fn file(path: &str, root: u8, size: u64) -> IndexedFile {
        let payload = Payload { root: Hash([root; 32]), size };
        IndexedFile { path: path.into(), executable: false, payload }
    }

    fn of(paths: &[&str]) -> Result<Index, IndexError> {
        Index::new(paths.iter().map(|path| file(path, 1, 5)).collect())
    }

    #[test]
    fn a_directory_has_one_index_whatever_the_order() {
        let files = [file("b/c", 2, 3), file("a", 1, 5), file("b/d", 1, 5), file("b-", 3, 0)];
        let one = Index::new(files.to_vec()).expect("an index");
        let other = Index::new(files.into_iter().rev().collect()).expect("an index");
        assert_eq!(one.to_bytes(), other.to_bytes());
        assert_eq!(Index::from_bytes(&one.to_bytes()), Ok(one.clone()));
        let paths: Vec<_> = one.files().iter().map(|file| file.path.as_str()).collect();
        assert_eq!(paths, ["a", "b-", "b/c", "b/d"]);
        let roots: Vec<_> = one.payloads().iter().map(|payload| payload.root.0[0]).collect();
        assert_eq!(roots, [1, 2, 3], "each once");
        assert_eq!((one.size(), one.payload_bytes()), (13, 8));
        assert_eq!(Index::new(Vec::new()).expect("an empty one").files(), []);
    }

    #[test]
    fn no_path_leads_out_of_the_directory() {
        let long = "n".repeat(MAX_NAME + 1);
        let far = vec!["n".repeat(MAX_NAME); 4].join("/");
        let deep = vec!["d"; MAX_DEPTH + 1].join("/");
        let wrong = ["", "/", "/a", "a/", "a//b", ".", "..", "../a", "a/../b", "a/./b", "a\0"];
        for path in wrong.into_iter().chain([&*long, &*far, &*deep]) {
            assert_eq!(of(&[path]), Err(IndexError::Path(path.into())));
        }
        for path in ["a", "...", "-", "a b", "ä/ö", "a\n", &vec!["d"; MAX_DEPTH].join("/")] {
            assert!(of(&[path]).is_ok(), "{path:?}");
        }
    }

    #[test]
    fn a_file_is_there_once_and_is_no_directory() {
        assert_eq!(of(&["a", "b", "a"]), Err(IndexError::Order("a".into())));
        // `a-` comes between `a` and `a/b`.
        assert_eq!(of(&["a/b", "a-", "a"]), Err(IndexError::Both("a".into())));
        assert_eq!(of(&["a/b/c/d", "a/b"]), Err(IndexError::Both("a/b".into())));
        assert!(of(&["a/b", "a/bc", "ab"]).is_ok());
    }

    #[test]
    fn sizes_are_believed_only_where_they_can_be_right() {
        let two = vec![file("a", 1, 5), file("b", 1, 6)];
        assert_eq!(Index::new(two), Err(IndexError::Size("b".into())));
        let many = vec![file("a", 1, u64::MAX), file("b", 2, 1)];
        assert_eq!(Index::new(many), Err(IndexError::Size("b".into())));
    }

    #[test]
    fn other_bytes_are_no_index() {
        let bytes = of(&["a", "b/c"]).expect("an index").to_bytes();
        assert_eq!(Index::from_bytes(b""), Err(IndexError::NoIndex));
        assert_eq!(Index::from_bytes(b"LHINDEX2"), Err(IndexError::NoIndex));
        for end in MAGIC.len()..bytes.len() {
            let cut = Index::from_bytes(&bytes[..end]);
            assert!(matches!(cut, Err(IndexError::Malformed(_))), "{end}: {cut:?}");
        }
        let more = [&bytes[..], b"x"].concat();
        assert_eq!(Index::from_bytes(&more), Err(IndexError::Malformed(DecodeError::Trailing(1))));
        // A count that no bytes follow takes no memory.
        let claims = [&MAGIC[..], &u64::MAX.to_le_bytes()].concat();
        assert!(matches!(Index::from_bytes(&claims), Err(IndexError::Malformed(_))));
        // Bytes out of order name the same files, but are another payload: refused.
        let files = vec![file("b", 1, 5), file("a", 2, 5)];
        let body = wire::encode::<MAX_BYTES>(&files).expect("encodes");
        let unsorted = [&MAGIC[..], &body].concat();
        assert_eq!(Index::from_bytes(&unsorted), Err(IndexError::Order("a".into())));
    }

    #[test]
    fn what_does_not_fit_is_no_index() {
        let many = |count: usize, width: usize| {
            let files = (0..count).map(|n| file(&format!("{n:0width$}"), 1, 5)).collect();
            Index::new(files)
        };
        assert_eq!(many(MAX_FILES + 1, 5), Err(IndexError::TooMany(MAX_FILES + 1)));
        assert_eq!(many(MAX_FILES, 250), Err(IndexError::TooLong));
        let most = many(MAX_FILES, 100).expect("an index");
        assert_eq!(Index::from_bytes(&most.to_bytes()), Ok(most));
        // A file takes 49 bytes and its path: one byte more than fits, and exactly what does.
        let files = |last: usize| {
            let each = 49 + 238;
            let count = (MAX_BODY - 8) / each - 1;
            let left = MAX_BODY - 8 - count * each - 49;
            let mut files: Vec<_> = (0..count).map(|n| file(&format!("{n:0238}"), 1, 5)).collect();
            let name = "n".repeat(200);
            let path = format!("{name}/{}", "m".repeat(left + last - name.len() - 1));
            files.push(file(&path, 1, 5));
            files
        };
        let full = Index::new(files(0)).expect("it fits").to_bytes();
        assert_eq!(full.len(), MAX_BYTES);
        assert!(Index::from_bytes(&full).is_ok());
        assert_eq!(Index::new(files(1)), Err(IndexError::TooLong));
    }
}

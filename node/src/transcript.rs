//! What was asked and answered under a lease on a model, kept by the node that asked: what a replay
//! needs besides the records, which have only hashes. Off unless `models.transcripts` names a directory.
//!
//! ```text
//! DIR/<lease>/<number>.json      0600: the request as it was sent, the answer piece by piece
//! ```
//!
//! Whoever reads them reads prompts. They are kept for a look at a sample, not as a proof: where one is
//! missing the records hold all the same.

use std::io;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use leasehold_keys::disk::{self, Existing};
use leasehold_proto::{Hash, LeaseId};
use serde::{Deserialize, Serialize};

use crate::infer::AnswerHash;

/// What of one request is kept at most, in bytes; longer ones are not.
pub const MAX: usize = 4 << 20;

/// A request and its answer.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transcript {
    /// The path that it was sent to.
    pub path: String,
    /// The JSON that was sent.
    pub request: String,
    /// The JSON that came back, piece by piece.
    pub answer: Vec<String>,
}

/// What is being kept of one answer.
#[derive(Debug, Default)]
pub(crate) struct Keeping {
    pieces: Vec<Bytes>,
    length: usize,
}

impl Keeping {
    /// A piece has come.
    pub(crate) fn piece(&mut self, piece: &Bytes) {
        self.length = self.length.saturating_add(piece.len());
        if self.length <= MAX {
            self.pieces.push(piece.clone());
        }
    }

    /// All of it; none where it was too long.
    pub(crate) fn finish(self, path: &str, request: &Bytes) -> Option<Transcript> {
        let text = |bytes: &Bytes| String::from_utf8(bytes.to_vec()).ok();
        if self.length.saturating_add(request.len()) > MAX {
            return None;
        }
        let answer = self.pieces.iter().map(text).collect::<Option<_>>()?;
        Some(Transcript { path: path.to_owned(), request: text(request)?, answer })
    }
}

fn path_of(dir: &Path, lease: &LeaseId, number: u64) -> PathBuf {
    dir.join(lease.to_string()).join(format!("{number}.json"))
}

impl Transcript {
    /// Keeps it as that of the request with this number under this lease. Blocks.
    ///
    /// # Errors
    /// Those of the file system.
    pub fn write(&self, dir: &Path, lease: &LeaseId, number: u64) -> io::Result<()> {
        let path = path_of(dir, lease, number);
        let parent = path.parent().unwrap_or(dir);
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(parent)?;
        let bytes = serde_json::to_vec(self)?;
        disk::write_atomic(&path, &bytes, 0o600, Existing::Replace).map_err(io::Error::other)
    }

    /// Reads that of a request.
    ///
    /// # Errors
    /// When there is none, or it does not read.
    pub fn read(dir: &Path, lease: &LeaseId, number: u64) -> io::Result<Self> {
        let path = path_of(dir, lease, number);
        if std::fs::metadata(&path)?.len() > 8 * MAX as u64 {
            return Err(io::Error::other("it is longer than a transcript can be"));
        }
        Ok(serde_json::from_slice(&std::fs::read(path)?)?)
    }

    /// The hashes of request and answer, as a record has them.
    #[must_use]
    pub fn hashes(&self) -> (Hash, Hash) {
        let mut answer = AnswerHash::default();
        self.answer.iter().for_each(|piece| answer.piece(piece.as_bytes()));
        (Hash::of(self.request.as_bytes()), answer.finish())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_kept_is_read_and_hashes_as_it_went_and_came() {
        let room = tempfile::tempdir().expect("room");
        let lease = LeaseId(Hash([3; 32]));
        let mut keeping = Keeping::default();
        let mut hash = AnswerHash::default();
        for piece in [&b"{\"a\":1}"[..], b"{\"b\":2}"] {
            hash.piece(piece);
            keeping.piece(&Bytes::from_static(piece));
        }
        let request = Bytes::from_static(b"{\"model\":\"m\"}");
        let kept = keeping.finish("/v1/chat/completions", &request).expect("it is short");
        kept.write(room.path(), &lease, 7).expect("written");
        let read = Transcript::read(room.path(), &lease, 7).expect("reads");
        let hashes = (Hash(*blake3::hash(&request).as_bytes()), hash.finish());
        assert_eq!((read.hashes(), &read), (hashes, &kept));
        assert!(Transcript::read(room.path(), &lease, 8).is_err());
        let mut long = Keeping::default();
        (0..5).for_each(|_| long.piece(&Bytes::from(vec![b'x'; 1 << 20])));
        assert!(long.finish("/", &request).is_none());
    }
}

//! Buffers of a group each, used again and again: a payload at speed needs thousands of them a
//! second, and memory that is fresh from the kernel costs a fault for each 4 KiB of it.

use std::sync::{Arc, Mutex};

use bytes::Bytes;
use leasehold_proto::base::groups::GROUP_BYTES;

use super::lock;

/// How many that are not in use are kept: 16 MiB, as much as is in flight to one receiver.
const KEPT: usize = 64;
/// What a buffer holds: a group, and the most hash pairs that come before one.
const CAPACITY: usize = GROUP_BYTES as usize + 64 * 64;

/// Buffers that are not in use. Clones share them.
#[derive(Clone, Debug, Default)]
pub(super) struct Buffers(Arc<Mutex<Vec<Vec<u8>>>>);

/// One that is, given back when it is dropped, or when the last of the [`Bytes`] it became is.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Vec<u8>,
    home: Buffers,
}

impl Buffers {
    /// An empty one, to be added to.
    pub(super) fn empty(&self) -> Buffer {
        let mut buffer = self.any();
        buffer.bytes.clear();
        buffer
    }

    /// One of this length, whose content is whatever it was used for last.
    pub(super) fn filled(&self, len: usize) -> Buffer {
        let mut buffer = self.any();
        buffer.bytes.resize(len, 0);
        buffer
    }

    fn any(&self) -> Buffer {
        let bytes = lock(&self.0).pop().unwrap_or_else(|| Vec::with_capacity(CAPACITY));
        Buffer { bytes, home: self.clone() }
    }
}

impl Buffer {
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    pub(super) fn add(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    pub(super) fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        &mut self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let mut kept = lock(&self.home.0);
        if kept.len() < KEPT {
            kept.push(std::mem::take(&mut self.bytes));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_done_with_is_used_again_and_not_more_than_some_is_kept() {
        let buffers = Buffers::default();
        let mut first = buffers.empty();
        first.add(b"abc");
        let at = first.bytes.as_ptr();
        let bytes = first.freeze();
        let part = bytes.slice(1..2);
        drop(bytes);
        assert_eq!((&part[..], lock(&buffers.0).len()), (&b"b"[..], 0));
        drop(part);
        let again = buffers.empty();
        assert_eq!((again.bytes.as_ptr(), again.len()), (at, 0));
        let many: Vec<_> = (0..2 * KEPT).map(|_| buffers.filled(9)).collect();
        assert!(many.iter().all(|buffer| buffer.as_ref().len() == 9));
        drop((again, many));
        assert_eq!(lock(&buffers.0).len(), KEPT);
    }
}

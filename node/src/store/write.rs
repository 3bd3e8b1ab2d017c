//! What is kept: one key set to a value or removed, and how that is spelled on disk.
//!
//! Journal and checkpoint use the same spelling, little-endian:
//!
//! ```text
//! key length u8 | value length u32, or ffff_ffff for "removed" | key | value
//! ```
//!
//! Reading never trusts a length: each is checked against its bound and against what is left,
//! before anything is allocated.

use thiserror::Error;

/// The longest key, in bytes.
pub const KEY_MAX: usize = 128;

/// The longest value, in bytes: below 64 KiB, so that sled never moves it into a blob file of
/// its own, which sled writes without any sync.
pub const VALUE_MAX: usize = 64 * 1024 - 1;

const REMOVED: u32 = u32::MAX;

/// One key's new value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Write {
    /// At most [`KEY_MAX`] bytes; keys sort as bytes.
    pub key: Vec<u8>,
    /// At most [`VALUE_MAX`] bytes; `None` removes the key, also one that is not there.
    pub value: Option<Vec<u8>>,
}

impl Write {
    /// Sets `key` to `value`.
    pub fn put(key: impl Into<Vec<u8>>, value: impl Into<Vec<u8>>) -> Self {
        Self { key: key.into(), value: Some(value.into()) }
    }

    /// Removes `key`.
    pub fn remove(key: impl Into<Vec<u8>>) -> Self {
        Self { key: key.into(), value: None }
    }

    /// Whether key and value keep to their bounds.
    pub(super) fn check(&self) -> Result<(), TooLong> {
        if self.key.len() > KEY_MAX {
            return Err(TooLong::Key { bytes: self.key.len() });
        }
        match &self.value {
            Some(value) if value.len() > VALUE_MAX => Err(TooLong::Value { bytes: value.len() }),
            _ => Ok(()),
        }
    }

    /// Its length on disk, in bytes.
    pub(super) fn encoded_len(&self) -> usize {
        encoded_len(&self.key, self.value.as_deref())
    }
}

/// A key or a value over its bound.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
pub enum TooLong {
    /// The key.
    #[error("a key of {bytes} bytes: at most {KEY_MAX} are kept")]
    Key {
        /// Its length.
        bytes: usize,
    },
    /// The value.
    #[error("a value of {bytes} bytes: at most {VALUE_MAX} are kept; larger things are payloads")]
    Value {
        /// Its length.
        bytes: usize,
    },
}

/// The length of one write on disk, in bytes.
pub(super) fn encoded_len(key: &[u8], value: Option<&[u8]>) -> usize {
    1 + 4 + key.len() + value.map_or(0, <[u8]>::len)
}

/// Appends one write to `out`. Bounds were checked when the batch was accepted.
pub(super) fn encode(key: &[u8], value: Option<&[u8]>, out: &mut Vec<u8>) {
    debug_assert!(key.len() <= KEY_MAX, "keys are checked before they are queued");
    out.push(key.len() as u8);
    let length = value.map_or(REMOVED, |value| value.len() as u32);
    out.extend_from_slice(&length.to_le_bytes());
    out.extend_from_slice(key);
    out.extend_from_slice(value.unwrap_or_default());
}

/// Takes one write from the front of `bytes`; `None` when it does not hold one.
pub(super) fn decode(bytes: &mut &[u8]) -> Option<Write> {
    let [key_len] = take::<1>(bytes)?;
    let value_len = u32::from_le_bytes(take(bytes)?);
    if usize::from(key_len) > KEY_MAX {
        return None;
    }
    let key = take_slice(bytes, usize::from(key_len))?.to_vec();
    let value = match value_len {
        REMOVED => None,
        length if length as usize <= VALUE_MAX => {
            Some(take_slice(bytes, length as usize)?.to_vec())
        }
        _ => return None,
    };
    Some(Write { key, value })
}

/// Takes `N` bytes from the front of `bytes`.
pub(super) fn take<const N: usize>(bytes: &mut &[u8]) -> Option<[u8; N]> {
    let (front, rest) = bytes.split_first_chunk::<N>()?;
    *bytes = rest;
    Some(*front)
}

fn take_slice<'a>(bytes: &mut &'a [u8], length: usize) -> Option<&'a [u8]> {
    let (front, rest) = bytes.split_at_checked(length)?;
    *bytes = rest;
    Some(front)
}

/// A sum over all entries that tells two states apart: how many there are, and the sum (modulo
/// 2^128) of a hash of each. It can be kept up to date write by write, and it finds what a
/// database lost on its own: a page, or half of a batch. It guards against accidents, not
/// against somebody who can write to the directory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Sum {
    pub(super) entries: u64,
    pub(super) hash: u128,
}

impl Sum {
    pub(super) fn add(&mut self, key: &[u8], value: &[u8]) {
        self.entries = self.entries.wrapping_add(1);
        self.hash = self.hash.wrapping_add(entry_hash(key, value));
    }

    pub(super) fn subtract(&mut self, key: &[u8], value: &[u8]) {
        self.entries = self.entries.wrapping_sub(1);
        self.hash = self.hash.wrapping_sub(entry_hash(key, value));
    }

    pub(super) fn of<'a>(entries: impl Iterator<Item = (&'a Vec<u8>, &'a Vec<u8>)>) -> Self {
        let mut sum = Self::default();
        for (key, value) in entries {
            sum.add(key, value);
        }
        sum
    }
}

fn entry_hash(key: &[u8], value: &[u8]) -> u128 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&(key.len() as u32).to_le_bytes());
    hasher.update(key);
    hasher.update(value);
    let mut first = [0; 16];
    hasher.finalize_xof().fill(&mut first);
    u128::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_survive_their_spelling() {
        for write in [
            Write::put("", ""),
            Write::put("key", "value"),
            Write::remove("key"),
            Write::put(vec![7; KEY_MAX], vec![9; VALUE_MAX]),
        ] {
            let mut bytes = Vec::new();
            encode(&write.key, write.value.as_deref(), &mut bytes);
            assert_eq!(bytes.len(), write.encoded_len());
            let mut rest = bytes.as_slice();
            assert_eq!(decode(&mut rest), Some(write));
            assert!(rest.is_empty());
            for cut in 0..bytes.len() {
                assert_eq!(decode(&mut &bytes[..cut]), None, "cut at {cut}");
            }
        }
    }

    #[test]
    fn lengths_over_their_bounds_are_refused_before_allocation() {
        let mut long_key = vec![200];
        long_key.extend_from_slice(&REMOVED.to_le_bytes());
        long_key.extend_from_slice(&[0; 200]);
        assert_eq!(decode(&mut long_key.as_slice()), None);

        let mut long_value = vec![1];
        long_value.extend_from_slice(&(u32::MAX - 1).to_le_bytes());
        long_value.extend_from_slice(&[0; 100]);
        assert_eq!(decode(&mut long_value.as_slice()), None);
    }

    #[test]
    fn a_sum_does_not_depend_on_order_and_sees_every_byte() {
        let mut one = Sum::default();
        one.add(b"a", b"1");
        one.add(b"b", b"2");
        let mut two = Sum::default();
        two.add(b"b", b"2");
        two.add(b"x", b"y");
        two.add(b"a", b"1");
        two.subtract(b"x", b"y");
        assert_eq!(one, two);
        let mut shifted = Sum::default();
        shifted.add(b"a1", b"");
        shifted.add(b"b", b"2");
        assert_ne!(one, shifted);
    }
}

//! What requests have in common at their beginning, as a few numbers.
//!
//! A server that answered a request still holds the state of its prompt, and answers another that
//! begins alike sooner and cheaper. Entry nodes need not read prompts to send such requests to the
//! same place: they compare these numbers. Each stands for everything before it, so the longest
//! common beginning is the last number that two requests share.

use blake3::Hasher;

/// How much of a text one number stands for, in bytes.
pub(super) const BLOCK: usize = 1_024;
/// How many numbers there are at most.
pub(super) const KEYS: usize = 64;

/// Collects the numbers.
#[derive(Debug)]
pub(super) struct Prefix {
    keys: Vec<u64>,
    /// Hash of all that was closed so far.
    so_far: [u8; 32],
    open: Hasher,
    /// Bytes in `open`.
    filled: usize,
}

impl Prefix {
    pub(super) fn new(domain: &str) -> Self {
        let so_far = blake3::derive_key("leasehold 2026 prefix of a prompt", domain.as_bytes());
        let mut open = Hasher::new();
        open.update(&so_far);
        Self { keys: Vec::new(), so_far, open, filled: 0 }
    }

    pub(super) const fn is_full(&self) -> bool {
        self.keys.len() >= KEYS
    }

    /// Text that goes on from what was there; a number for each block that it fills.
    pub(super) fn push(&mut self, mut text: &[u8]) {
        while !text.is_empty() && !self.is_full() {
            let (now, later) = text.split_at(text.len().min(BLOCK - self.filled));
            self.open.update(now);
            self.filled += now.len();
            text = later;
            if self.filled == BLOCK {
                self.close(b"block");
            }
        }
    }

    /// Something ends here that a longer request would have as well: a number for it.
    pub(super) fn mark(&mut self, what: &str) {
        if !self.is_full() {
            self.open.update(&(self.filled as u64).to_le_bytes());
            self.open.update(what.as_bytes());
            self.close(b"mark");
        }
    }

    fn close(&mut self, how: &[u8]) {
        self.open.update(how);
        self.so_far = *self.open.finalize().as_bytes();
        let [a, b, c, d, e, f, g, h, ..] = self.so_far;
        self.keys.push(u64::from_le_bytes([a, b, c, d, e, f, g, h]));
        self.open.reset();
        self.open.update(&self.so_far);
        self.filled = 0;
    }

    pub(super) fn into_keys(self) -> Vec<u64> {
        self.keys
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn keys(texts: &[&str]) -> Vec<u64> {
        let mut prefix = Prefix::new("chat");
        for text in texts {
            prefix.push(text.as_bytes());
            prefix.mark("user");
        }
        prefix.into_keys()
    }

    #[test]
    fn longer_requests_begin_with_the_same_numbers() {
        let long = "x".repeat(3_000);
        let short = keys(&["be kind", &long]);
        assert_eq!(short.len(), 4, "a mark, two blocks, a mark");
        let longer = keys(&["be kind", &long, "and now?"]);
        assert_eq!(longer[..4], short);
        let other = keys(&["be kind", &format!("{long}y")]);
        assert_eq!(other[..3], short[..3]);
        assert_ne!(other[3], short[3]);
    }

    #[test]
    fn where_a_message_ends_matters() {
        assert_ne!(keys(&["ab", "c"]), keys(&["a", "bc"]));
        assert_ne!(keys(&["ab"])[0], keys(&["a"])[0]);
        assert_eq!(keys(&["a"; 1_000]).len(), KEYS);
        assert_eq!(keys(&[&"a".repeat(1 << 20)]).len(), KEYS);
    }
}

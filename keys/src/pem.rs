//! The text blocks that keys and signed objects travel in, after RFC 7468:
//!
//! ```text
//! # lines that begin with '#' and blank lines may stand between blocks
//! -----BEGIN LEASEHOLD SIGNED ORDER-----
//! base64, 64 characters a line
//! -----END LEASEHOLD SIGNED ORDER-----
//! ```
//!
//! Stricter than the RFC: no other text outside blocks, so that no object is overlooked because
//! its first line was damaged.

use base64::{Engine, engine::general_purpose::STANDARD};
use zeroize::Zeroizing;

const BEGIN: &str = "-----BEGIN ";
const END: &str = "-----END ";
const DASHES: &str = "-----";
/// Characters per line, as RFC 7468 has it.
const WIDTH: usize = 64;

/// One block.
#[derive(Clone, PartialEq, Eq)]
pub struct Block {
    /// What stands after BEGIN.
    pub label: String,
    /// The bytes in it, which may be a secret.
    pub bytes: Zeroizing<Vec<u8>>,
}

impl std::fmt::Debug for Block {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Block({}, {} bytes)", self.label, self.bytes.len())
    }
}

/// Why a text holds no blocks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PemError {
    /// It is not text.
    #[error("it is not a text file")]
    NotText,
    /// There is no block.
    #[error("it holds no '-----BEGIN …-----' block")]
    Empty,
    /// A line stands where none should.
    #[error("line {0} is neither a block, nor blank, nor a '#' comment")]
    Stray(usize),
    /// A block has no end.
    #[error("the block that begins in line {0} has no matching END: it is cut short")]
    Open(usize),
    /// A block's content is not base64.
    #[error("the block that begins in line {0} is not base64: it is damaged")]
    Base64(usize),
}

/// Writes one block.
#[must_use]
pub fn write(label: &str, bytes: &[u8]) -> Zeroizing<String> {
    let encoded = Zeroizing::new(STANDARD.encode(bytes));
    let lines = encoded.len() / WIDTH + 1;
    // All at once, so that no outgrown buffer keeps a copy of a secret.
    let mut text =
        Zeroizing::new(String::with_capacity(encoded.len() + lines + 2 * (label.len() + 20)));
    text.push_str(BEGIN);
    text.push_str(label);
    text.push_str("-----\n");
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        let (line, after) = rest.split_at(rest.len().min(WIDTH));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text.push_str(END);
    text.push_str(label);
    text.push_str("-----\n");
    text
}

/// Reads every block of `text`. Memory is bounded by the length of `text`.
///
/// # Errors
/// When there is none, or anything else than blocks, blank lines and comments.
pub fn read(text: &[u8]) -> Result<Vec<Block>, PemError> {
    let text = std::str::from_utf8(text).map_err(|_| PemError::NotText)?;
    let mut blocks = Vec::new();
    let mut lines = (1..).zip(text.lines().map(str::trim_end));
    while let Some((number, line)) = lines.next() {
        if line.is_empty() || line.starts_with('#') {
            continue;
        }
        let label = label(line, BEGIN).ok_or(PemError::Stray(number))?;
        // Measured first, then joined: a buffer that grew would leave copies of a secret behind.
        let mut length = 0;
        let mut ahead = lines.clone();
        loop {
            let (_, line) = ahead.next().ok_or(PemError::Open(number))?;
            if self::label(line, END) == Some(label) {
                break;
            } else if line.starts_with(DASHES) {
                return Err(PemError::Open(number));
            }
            length += line.len();
        }
        let mut encoded = Zeroizing::new(String::with_capacity(length));
        for (_, line) in lines.by_ref() {
            if line.starts_with(DASHES) {
                break;
            }
            encoded.push_str(line);
        }
        let bytes = STANDARD.decode(&*encoded).map_err(|_| PemError::Base64(number))?;
        blocks.push(Block { label: label.to_string(), bytes: Zeroizing::new(bytes) });
    }
    if blocks.is_empty() { Err(PemError::Empty) } else { Ok(blocks) }
}

fn label<'a>(line: &'a str, start: &str) -> Option<&'a str> {
    line.strip_prefix(start)?.strip_suffix(DASHES).filter(|label| !label.is_empty())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_read_as_written() {
        for length in [0usize, 1, 47, 48, 49, 5000] {
            let bytes: Vec<u8> = (0..length).map(|i| u8::try_from(i % 251).unwrap()).collect();
            let text = write("A B", &bytes);
            assert!(text.lines().all(|line| line.len() <= 64));
            let two = format!("# first\n\n{}\r\n#x\n{}", &*text, text.replace('\n', "\r\n"));
            let blocks = read(two.as_bytes()).expect("read");
            assert_eq!(blocks.len(), 2);
            for block in blocks {
                assert_eq!((block.label.as_str(), &*block.bytes), ("A B", &bytes));
            }
        }
    }

    #[test]
    fn damage_is_named() {
        let good = write("KEY", b"some bytes or other");
        let wrong = |text: &str| read(text.as_bytes()).expect_err("refused");
        assert_eq!(read(&[0xff, 0xfe]), Err(PemError::NotText));
        assert_eq!(wrong(""), PemError::Empty);
        assert_eq!(wrong("# only a comment\n"), PemError::Empty);
        assert_eq!(wrong(&good.replace("BEGIN", "BEGAN")), PemError::Stray(1));
        assert_eq!(wrong(&good.replace("END KEY", "END KEX")), PemError::Open(1));
        assert_eq!(wrong(&good[..good.len() - 24]), PemError::Open(1));
        assert_eq!(wrong(&format!("{}stray", &*good)), PemError::Stray(4));
        assert_eq!(wrong(&good.replacen('c', "!", 1)), PemError::Base64(1));
        for cut in 1..good.len() - 1 {
            assert!(read(&good.as_bytes()[..cut]).is_err(), "cut at {cut}");
        }
    }
}

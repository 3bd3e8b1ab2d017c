//! Where a passphrase comes from: a terminal, a file that only its owner can read, or an open
//! file descriptor. Never the command line, which every user of the host can read, and never the
//! environment, which every child inherits.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use zeroize::{Zeroize, Zeroizing};

use crate::disk::{self, ReadError};
use crate::exit::Exit;

/// The longest passphrase, in bytes.
pub const MAX_PASSPHRASE: usize = 1024;

/// A passphrase. It leaves memory when dropped and is never shown.
#[derive(Clone)]
pub struct Passphrase(Zeroizing<Vec<u8>>);

/// Where to get it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Source {
    /// Nowhere: whoever asks stays locked out. A daemon that starts unattended says this.
    Nowhere,
    /// Asked on the terminal, without echo.
    Terminal,
    /// The first line of a file with mode 0600.
    File(PathBuf),
    /// All that an open file descriptor holds, less one line end.
    Descriptor(u32),
}

/// Why there is no passphrase.
#[derive(Debug, thiserror::Error)]
pub enum PassphraseError {
    /// A passphrase is needed and none is to be had.
    #[error("the key is locked by a passphrase and none was given")]
    Locked,
    /// There is no terminal to ask on.
    #[error(
        "no terminal to ask for the passphrase on ({0}): give --passphrase-file FILE or \
         --passphrase-fd N"
    )]
    NoTerminal(io::Error),
    /// It is empty.
    #[error(
        "the passphrase is empty: choose one, or say --no-passphrase to store the key in clear"
    )]
    Empty,
    /// It is too long, or the file is no passphrase.
    #[error("the passphrase is longer than {MAX_PASSPHRASE} bytes")]
    TooLong,
    /// The second typing differs from the first.
    #[error("the two passphrases differ: try again")]
    Differ,
    /// Its file cannot be used.
    #[error("passphrase file: {0}")]
    File(#[from] ReadError),
    /// Its descriptor cannot be used.
    #[error("cannot read the passphrase from file descriptor {number}: {why}")]
    Descriptor {
        /// Which one.
        number: u32,
        /// What the system said.
        why: io::Error,
    },
}

impl PassphraseError {
    /// The exit code that says so.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        match self {
            Self::Locked | Self::NoTerminal(_) => Exit::Locked,
            Self::Empty | Self::TooLong | Self::Differ => Exit::Usage,
            Self::File(why) => why.exit(),
            Self::Descriptor { .. } => Exit::Io,
        }
    }
}

impl Passphrase {
    /// Takes `bytes`, less one line end, as a passphrase.
    ///
    /// # Errors
    /// When it is empty or too long.
    pub fn new(mut bytes: Zeroizing<Vec<u8>>) -> Result<Self, PassphraseError> {
        if bytes.last() == Some(&b'\n') {
            bytes.pop();
            if bytes.last() == Some(&b'\r') {
                bytes.pop();
            }
        }
        match bytes.len() {
            0 => Err(PassphraseError::Empty),
            1..=MAX_PASSPHRASE => Ok(Self(bytes)),
            _ => Err(PassphraseError::TooLong),
        }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.0
    }
}

impl fmt::Debug for Passphrase {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Passphrase(…)")
    }
}

impl Source {
    /// Gets the passphrase that unlocks an existing key; `what` names it on the terminal.
    ///
    /// # Errors
    /// When there is none.
    pub fn get(&self, what: &str) -> Result<Passphrase, PassphraseError> {
        match self {
            Self::Nowhere => Err(PassphraseError::Locked),
            Self::Terminal => prompt(&format!("Passphrase for {what}: ")),
            Self::File(path) => from_file(path),
            Self::Descriptor(number) => from_descriptor(*number),
        }
    }

    /// Gets the passphrase for a new key; on a terminal it is typed twice.
    ///
    /// # Errors
    /// When there is none, or the two differ.
    pub fn choose(&self, what: &str) -> Result<Passphrase, PassphraseError> {
        if *self != Self::Terminal {
            return self.get(what);
        }
        let first = prompt(&format!("New passphrase for {what}: "))?;
        let second = prompt("The same again: ")?;
        if first.0 == second.0 { Ok(first) } else { Err(PassphraseError::Differ) }
    }
}

fn prompt(question: &str) -> Result<Passphrase, PassphraseError> {
    let typed = rpassword::prompt_password(question).map_err(PassphraseError::NoTerminal)?;
    Passphrase::new(Zeroizing::new(typed.into_bytes()))
}

fn from_file(path: &Path) -> Result<Passphrase, PassphraseError> {
    let mut bytes = disk::read_private(path, MAX_PASSPHRASE + 2)?;
    if let Some(end) = bytes.iter().position(|byte| *byte == b'\n') {
        bytes.get_mut(end + 1..).unwrap_or_default().zeroize();
        bytes.truncate(end + 1);
    }
    Passphrase::new(bytes)
}

fn from_descriptor(number: u32) -> Result<Passphrase, PassphraseError> {
    let failed = |why| PassphraseError::Descriptor { number, why };
    let file = File::open(format!("/dev/fd/{number}")).map_err(failed)?;
    // Room for all of it at once: a buffer that grows would leave copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MAX_PASSPHRASE + 64));
    let most = u64::try_from(MAX_PASSPHRASE + 3).unwrap_or(u64::MAX);
    file.take(most).read_to_end(&mut bytes).map_err(failed)?;
    Passphrase::new(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(text: &str) -> Result<Passphrase, PassphraseError> {
        Passphrase::new(Zeroizing::new(text.as_bytes().to_vec()))
    }

    #[test]
    fn one_line_end_is_no_part_of_it() {
        for text in ["word", "word\n", "word\r\n"] {
            assert_eq!(made(text).expect("a passphrase").bytes(), b"word");
        }
        assert_eq!(made(" two words \n").expect("a passphrase").bytes(), b" two words ");
    }

    #[test]
    fn empty_and_endless_ones_are_refused() {
        for text in ["", "\n", "\r\n"] {
            assert!(matches!(made(text), Err(PassphraseError::Empty)));
        }
        assert!(made(&"x".repeat(MAX_PASSPHRASE)).is_ok());
        assert!(matches!(made(&"x".repeat(MAX_PASSPHRASE + 1)), Err(PassphraseError::TooLong)));
    }

    #[test]
    fn it_is_never_shown() {
        assert!(!format!("{:?}", made("word").expect("a passphrase")).contains("word"));
    }

    #[test]
    fn a_file_gives_its_first_line_and_must_be_private() {
        use std::os::unix::fs::PermissionsExt;
        let dir = tempfile::tempdir().expect("a directory");
        let path = dir.path().join("p");
        let text = b"first\nsecond\n";
        disk::write_atomic(&path, text, 0o600, disk::Existing::Keep).expect("written");
        let source = Source::File(path.clone());
        assert_eq!(source.get("x").expect("a passphrase").bytes(), b"first");
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("chmod");
        assert_eq!(source.get("x").expect_err("refused").exit(), Exit::Policy);
        assert_eq!(Source::Nowhere.get("x").expect_err("locked").exit(), Exit::Locked);
    }
}

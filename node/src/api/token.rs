//! The token of the API: who can read it may lease and pay with this node's mandate.
//!
//! ```text
//! DIR/api.token                               0600, made once, beside the node's key
//! STATE/leasehold/api/<ip>-<port>             0600, while a node listens there; STATE is
//!                                             $XDG_STATE_HOME or ~/.local/state
//! ```
//!
//! The second is how a user's command line finds the token of a node by its address alone.

use std::fs::{self, DirBuilder};
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use leasehold_keys::disk::{self, Existing, ReadError, WriteError};

/// The token's file in a node's directory.
pub const FILE: &str = "api.token";
/// The longest token that is read, in bytes.
const MAX: usize = 256;
/// The shortest token that is taken, in characters: 128 bits in base64.
const MIN: usize = 22;

/// A token. It is never shown.
#[derive(Clone)]
pub struct Token {
    text: String,
    hash: blake3::Hash,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Token(…)")
    }
}

/// Why there is no token.
#[derive(Debug, thiserror::Error)]
pub enum TokenError {
    /// The file cannot be read, or others can read it too.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The file cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The directory for it cannot be made.
    #[error("cannot make {path}: {source}")]
    Directory {
        /// Which one.
        path: PathBuf,
        /// Why not.
        source: io::Error,
    },
    /// The text is no token.
    #[error("{0} holds no token: expected one line of 22 to 256 letters, digits, '-' or '_'")]
    Content(String),
    /// The system gives no randomness.
    #[error("the system gives no randomness: {0}")]
    Randomness(getrandom::Error),
}

impl Token {
    /// A fresh token of 256 random bits.
    ///
    /// # Errors
    /// When the system gives no randomness.
    pub fn generate() -> Result<Self, TokenError> {
        let mut bytes = [0; 32];
        getrandom::fill(&mut bytes).map_err(TokenError::Randomness)?;
        Ok(Self::new(URL_SAFE_NO_PAD.encode(bytes)))
    }

    fn new(text: String) -> Self {
        let hash = blake3::hash(text.as_bytes());
        Self { text, hash }
    }

    /// Reads a token that came from `origin`.
    ///
    /// # Errors
    /// When it is none.
    pub fn parse(text: &str, origin: &str) -> Result<Self, TokenError> {
        let text = text.trim();
        let plain = |byte: u8| byte.is_ascii_alphanumeric() || b"-_".contains(&byte);
        if (MIN..=MAX).contains(&text.len()) && text.bytes().all(plain) {
            Ok(Self::new(text.into()))
        } else {
            Err(TokenError::Content(origin.into()))
        }
    }

    /// Reads the token in a file that only its owner can read.
    ///
    /// # Errors
    /// When there is none, or others can read it.
    pub fn read(path: &Path) -> Result<Self, TokenError> {
        let bytes = disk::read_private(path, MAX + 2)?;
        Self::parse(&String::from_utf8_lossy(&bytes), &path.display().to_string())
    }

    /// Whether `given` is this token, in a time that does not depend on where they differ:
    /// hashes are compared, and [`blake3::Hash`] compares in constant time.
    #[must_use]
    pub fn is(&self, given: &[u8]) -> bool {
        blake3::hash(given) == self.hash
    }

    /// The token's text, for an Authorization header or a file.
    #[must_use]
    pub fn reveal(&self) -> &str {
        &self.text
    }

    fn write(&self, path: &Path, existing: Existing) -> Result<(), TokenError> {
        Ok(disk::write_atomic(path, format!("{}\n", self.text).as_bytes(), 0o600, existing)?)
    }
}

/// The token of the node in `dir`, made now when there is none.
///
/// # Errors
/// When it cannot be read or written, or others can read it.
pub fn load_or_create(dir: &Path) -> Result<Token, TokenError> {
    let path = dir.join(FILE);
    if path.symlink_metadata().is_ok() {
        return Token::read(&path);
    }
    let token = Token::generate()?;
    match token.write(&path, Existing::Keep) {
        Ok(()) => Ok(token),
        Err(TokenError::Write(WriteError::Exists { .. })) => Token::read(&path),
        Err(error) => Err(error),
    }
}

/// Where the token of a node that listens at `addr` is published, for the user of this process;
/// none where neither `XDG_STATE_HOME` nor `HOME` is set.
#[must_use]
pub fn published_at(addr: SocketAddr) -> Option<PathBuf> {
    let set = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    let state = set("XDG_STATE_HOME").or_else(|| Some(set("HOME")?.join(".local/state")))?;
    Some(published_in(&state, addr))
}

fn published_in(state: &Path, addr: SocketAddr) -> PathBuf {
    state.join("leasehold/api").join(format!("{}-{}", addr.ip(), addr.port()))
}

/// A published token; taken back when dropped.
#[derive(Debug)]
pub struct Published {
    file: Option<(PathBuf, Token)>,
}

impl Drop for Published {
    fn drop(&mut self) {
        // A later node at this address may have published its own by now.
        if let Some((path, token)) = &self.file
            && Token::read(path).is_ok_and(|found| found.text == token.text)
        {
            // Best effort: what stays behind is a token that a later node there replaces.
            let _ = fs::remove_file(path);
        }
    }
}

/// Publishes `token` for the commands of this user, until the guard is dropped. Where there is no
/// home directory nothing is published: commands need `--token-file` then.
///
/// # Errors
/// When the file cannot be written.
pub fn publish(addr: SocketAddr, token: &Token) -> Result<Published, TokenError> {
    match published_at(addr) {
        Some(path) => publish_to(path, token),
        None => Ok(Published { file: None }),
    }
}

fn publish_to(path: PathBuf, token: &Token) -> Result<Published, TokenError> {
    if let Some(dir) = path.parent() {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(dir);
        made.map_err(|source| TokenError::Directory { path: dir.into(), source })?;
    }
    token.write(&path, Existing::Replace)?;
    Ok(Published { file: Some((path, token.clone())) })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    #[test]
    fn a_node_keeps_its_token() {
        let dir = tempfile::tempdir().expect("a directory");
        let first = load_or_create(dir.path()).expect("made");
        let again = load_or_create(dir.path()).expect("read");
        assert_eq!(first.reveal(), again.reveal());
        assert_eq!(first.reveal().len(), 43, "256 bits in base64");
        let mode = fs::metadata(dir.path().join(FILE)).expect("a file").permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn a_token_that_others_can_read_is_refused() {
        let dir = tempfile::tempdir().expect("a directory");
        load_or_create(dir.path()).expect("made");
        let open = fs::Permissions::from_mode(0o644);
        fs::set_permissions(dir.path().join(FILE), open).expect("set");
        assert!(matches!(load_or_create(dir.path()), Err(TokenError::Read(_))));
    }

    #[test]
    fn only_the_token_itself_is_taken() {
        let token = Token::generate().expect("randomness");
        assert!(token.is(token.reveal().as_bytes()));
        let mut near = token.reveal().to_string();
        near.pop();
        for other in ["", "x", near.as_str(), &format!("{}x", token.reveal())] {
            assert!(!token.is(other.as_bytes()), "{other}");
        }
        assert_eq!(format!("{token:?}"), "Token(…)");
    }

    #[test]
    fn nonsense_is_no_token() {
        for text in ["", "short", "with space in the middle of it", &"x".repeat(257), "é"] {
            assert!(Token::parse(text, "here").is_err(), "{text}");
        }
        assert!(Token::parse("abcdefghijklmnopqrstuv\n", "here").is_ok());
    }

    #[test]
    fn a_published_token_goes_with_its_node_and_not_with_another() {
        let state = tempfile::tempdir().expect("a directory");
        let addr: SocketAddr = "[::1]:7700".parse().expect("an address");
        let path = published_in(state.path(), addr);
        assert!(path.ends_with("leasehold/api/::1-7700"));
        let (one, two) = (Token::generate().expect("one"), Token::generate().expect("two"));
        let first = publish_to(path.clone(), &one).expect("published");
        let second = publish_to(path.clone(), &two).expect("published");
        drop(first);
        assert_eq!(Token::read(&path).expect("still there").reveal(), two.reveal());
        drop(second);
        assert!(!path.exists());
    }
}

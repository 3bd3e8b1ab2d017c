//! Key files: one Ed25519 secret each, in clear for a node that starts unattended, or encrypted
//! under a passphrase for a person.
//!
//! ```text
//! -----BEGIN LEASEHOLD PRIVATE KEY-----            version u16 | public 32 | seed 32
//! -----BEGIN LEASEHOLD ENCRYPTED PRIVATE KEY-----
//!     version u16 | kdf u16 | memory_kib u32 | passes u32 | lanes u32
//!   | public 32 | salt 16 | nonce 24 | ciphertext 32 | tag 16
//! ```
//!
//! The key of the cipher (XChaCha20-Poly1305) is Argon2id of the passphrase (RFC 9106); everything
//! before the ciphertext is authenticated with it. The parameters in a file are the file's word:
//! they are capped before memory is taken, since a hostile file could ask for hours. The public
//! key in a file is checked against the secret each time, so that no signature is ever made with
//! a pair that does not belong together.
//!
//! Either file must be a regular file with mode 0600 (or 0400) that belongs to us or to root.

use std::fmt;
use std::path::{Path, PathBuf};

use argon2::{Algorithm, Argon2, Params, Version};
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{Key, XChaCha20Poly1305, XNonce};
use leasehold_proto::KeyId;
use leasehold_proto::words::sign::Signer;
use leasehold_proto::words::wire::{self, DecodeError};
use serde::{Deserialize, Serialize};
use zeroize::{Zeroize, Zeroizing};

use crate::disk::{self, Existing, ReadError, WriteError};
use crate::exit::Exit;
use crate::passphrase::{Passphrase, PassphraseError, Source};
use crate::pem::{self, Block, PemError};

/// The label of a key in clear.
pub const CLEAR: &str = "LEASEHOLD PRIVATE KEY";
/// The label of an encrypted key.
pub const ENCRYPTED: &str = "LEASEHOLD ENCRYPTED PRIVATE KEY";
/// The longest key file, in bytes.
pub const MAX_FILE: usize = 4096;
/// The longest layout inside one, in bytes.
const MAX_LAYOUT: usize = 256;
/// The version of both layouts.
const VERSION: u16 = 1;
/// Argon2id, version 0x13.
const ARGON2ID: u16 = 1;

/// How hard a passphrase is to try: Argon2id's parameters (RFC 9106 §3.1).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Kdf {
    /// Memory, in KiB.
    pub memory_kib: u32,
    /// Passes over it.
    pub passes: u32,
    /// Lanes.
    pub lanes: u32,
}

impl Kdf {
    /// 64 MiB, 3 passes, 4 lanes: RFC 9106's second recommendation.
    pub const DEFAULT: Self = Self { memory_kib: 64 << 10, passes: 3, lanes: 4 };
    /// 2 GiB, 1 pass, 4 lanes: RFC 9106's first recommendation.
    pub const STRONG: Self = Self { memory_kib: 2 << 20, passes: 1, lanes: 4 };
    /// The most that a file may ask for.
    pub const MOST: Self = Self { memory_kib: 2 << 20, passes: 10, lanes: 16 };

    const fn is_within_bounds(self) -> bool {
        let Self { memory_kib, passes, lanes } = self;
        let most = Self::MOST;
        passes >= 1
            && lanes >= 1
            && passes <= most.passes
            && lanes <= most.lanes
            && memory_kib <= most.memory_kib
            && memory_kib >= 8 * lanes
    }

    fn stretch(self, passphrase: &Passphrase, salt: &[u8; 16]) -> Option<Zeroizing<[u8; 32]>> {
        let params = Params::new(self.memory_kib, self.passes, self.lanes, Some(32)).ok()?;
        let argon2 = Argon2::new(Algorithm::Argon2id, Version::V0x13, params);
        let mut key = Zeroizing::new([0; 32]);
        argon2.hash_password_into(passphrase.bytes(), salt, &mut *key).ok()?;
        Some(key)
    }
}

/// An Ed25519 secret. It leaves memory when dropped and is never shown.
pub struct Secret {
    seed: Zeroizing<[u8; 32]>,
    id: KeyId,
}

impl Secret {
    /// A new secret from the operating system's randomness.
    ///
    /// # Errors
    /// When the system has none to give.
    pub fn generate() -> Result<Self, NoRandomness> {
        let mut seed = Zeroizing::new([0; 32]);
        getrandom::fill(&mut *seed).map_err(NoRandomness)?;
        Ok(Self::from_seed(seed))
    }

    /// The secret with this seed (RFC 8032 §5.1.5).
    #[must_use]
    pub fn from_seed(seed: Zeroizing<[u8; 32]>) -> Self {
        let id = Signer::from_seed(&seed).id();
        Self { seed, id }
    }

    /// The public half.
    #[must_use]
    pub const fn id(&self) -> KeyId {
        self.id
    }

    /// What signs with it.
    #[must_use]
    pub fn signer(&self) -> Signer {
        Signer::from_seed(&self.seed)
    }

    /// The seed itself, for libraries that take one. Do not copy it to where it stays.
    #[must_use]
    pub fn seed(&self) -> &[u8; 32] {
        &self.seed
    }
}

impl fmt::Debug for Secret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Secret({})", self.id)
    }
}

/// The operating system has no randomness to give.
#[derive(Debug, thiserror::Error)]
#[error("the operating system gave no randomness: {0}")]
pub struct NoRandomness(getrandom::Error);

/// How a key lies on disk.
#[derive(Clone, Debug)]
pub enum Protection {
    /// In clear: whoever reads the file has the key.
    Clear,
    /// Under a passphrase.
    Passphrase(Passphrase, Kdf),
}

/// What a key file says about itself, without the secret.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Described {
    /// The public key.
    pub id: KeyId,
    /// How it is encrypted; `None` in clear.
    pub kdf: Option<Kdf>,
}

/// Why no key file was made.
#[derive(Debug, thiserror::Error)]
pub enum CreateError {
    /// The file was not written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// There is no randomness.
    #[error(transparent)]
    Randomness(#[from] NoRandomness),
    /// The passphrase could not be stretched.
    #[error("not enough memory to protect the key: {0} KiB are needed")]
    Memory(u32),
    /// The parameters asked for are none that a reader takes.
    #[error("key derivation with {memory_kib} KiB, {passes} passes, {lanes} lanes is out of bounds",
        memory_kib = .0.memory_kib, passes = .0.passes, lanes = .0.lanes)]
    Bounds(Kdf),
}

impl CreateError {
    /// The exit code that says so.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        match self {
            Self::Write(why) => why.exit(),
            Self::Randomness(_) | Self::Memory(_) => Exit::Io,
            Self::Bounds(_) => Exit::Policy,
        }
    }
}

/// Why a key file gives no key.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// The file cannot be used.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It holds no key.
    #[error("{} is no key file: {why}", .path.display())]
    NotAKey {
        /// Which file.
        path: PathBuf,
        /// Why not.
        why: NotAKey,
    },
    /// It asks for more work than a passphrase is worth.
    #[error(
        "{} asks for {memory_kib} KiB, {passes} passes, {lanes} lanes of key derivation: \
         at most 2 GiB, 10 passes and 16 lanes are accepted", .path.display(),
        memory_kib = .kdf.memory_kib, passes = .kdf.passes, lanes = .kdf.lanes
    )]
    Bounds {
        /// Which file.
        path: PathBuf,
        /// What it asks for.
        kdf: Kdf,
    },
    /// No passphrase.
    #[error("{}: {why}", .path.display())]
    Passphrase {
        /// Which file.
        path: PathBuf,
        /// Why not.
        why: PassphraseError,
    },
    /// The wrong passphrase. A changed file cannot be told from it.
    #[error("{}: wrong passphrase (or the file was changed)", .path.display())]
    WrongPassphrase {
        /// Which file.
        path: PathBuf,
    },
    /// The passphrase could not be stretched.
    #[error("not enough memory to unlock {}: {memory_kib} KiB are needed", .path.display())]
    Memory {
        /// Which file.
        path: PathBuf,
        /// How much is needed.
        memory_kib: u32,
    },
}

/// Why bytes are no key.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAKey {
    /// The text is no block.
    #[error(transparent)]
    Pem(#[from] PemError),
    /// There is more than one block.
    #[error("it holds {0} blocks where one is expected")]
    Blocks(usize),
    /// The block is something else.
    #[error("it holds a {0}")]
    Label(String),
    /// The content does not decode.
    #[error("its content is damaged: {0}")]
    Decode(#[from] DecodeError),
    /// A later version.
    #[error("its version ({0}) is not known here")]
    Version(u16),
    /// Another key derivation.
    #[error("its key derivation ({0}) is not known here")]
    Derivation(u16),
    /// Secret and public key do not belong together.
    #[error("its secret does not belong to the public key it names: it was changed")]
    Mismatch,
}

impl LoadError {
    /// The exit code that says so.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        match self {
            Self::Read(why) => why.exit(),
            Self::NotAKey { .. } | Self::Memory { .. } => Exit::Io,
            Self::Bounds { .. } => Exit::Policy,
            Self::Passphrase { why, .. } => why.exit(),
            Self::WrongPassphrase { .. } => Exit::Locked,
        }
    }
}

#[derive(Serialize, Deserialize)]
struct ClearLayout {
    version: u16,
    public: KeyId,
    seed: [u8; 32],
}

/// What is authenticated beside the ciphertext.
#[derive(Clone, Copy, Serialize, Deserialize)]
struct Preamble {
    version: u16,
    kdf: u16,
    params: Kdf,
    public: KeyId,
    salt: [u8; 16],
    nonce: [u8; 24],
}

#[derive(Serialize, Deserialize)]
struct EncryptedLayout {
    preamble: Preamble,
    ciphertext: [u8; 32],
    tag: [u8; 16],
}

impl Preamble {
    /// The label and every field, so that neither can be exchanged.
    fn authenticated(&self) -> Vec<u8> {
        let mut bytes = ENCRYPTED.as_bytes().to_vec();
        // A fixed layout far below the bound: encoding cannot fail.
        bytes.extend(wire::encode::<MAX_LAYOUT>(self).unwrap_or_default());
        bytes
    }
}

enum Layout {
    Clear(Secret),
    Encrypted(EncryptedLayout),
}

/// The text of a key file.
///
/// # Errors
/// When there is no randomness or not enough memory.
pub fn encode(secret: &Secret, protection: &Protection) -> Result<Zeroizing<String>, CreateError> {
    let (passphrase, params) = match protection {
        Protection::Clear => {
            let mut layout =
                ClearLayout { version: VERSION, public: secret.id, seed: *secret.seed };
            let bytes = wire::encode::<MAX_LAYOUT>(&layout).map(Zeroizing::new);
            layout.seed.zeroize();
            return Ok(pem::write(CLEAR, &bytes.unwrap_or_default()));
        }
        Protection::Passphrase(passphrase, params) => (passphrase, *params),
    };
    if !params.is_within_bounds() {
        return Err(CreateError::Bounds(params));
    }
    let (mut salt, mut nonce) = ([0; 16], [0; 24]);
    getrandom::fill(&mut salt).map_err(NoRandomness)?;
    getrandom::fill(&mut nonce).map_err(NoRandomness)?;
    let public = secret.id;
    let preamble = Preamble { version: VERSION, kdf: ARGON2ID, params, public, salt, nonce };
    let memory = || CreateError::Memory(params.memory_kib);
    let key = params.stretch(passphrase, &salt).ok_or_else(memory)?;
    let aad = preamble.authenticated();
    let sealed = XChaCha20Poly1305::new(&Key::from(*key))
        .encrypt(&XNonce::from(nonce), Payload { msg: &*secret.seed, aad: &aad })
        .map_err(|_| memory())?;
    let mut layout = EncryptedLayout { preamble, ciphertext: [0; 32], tag: [0; 16] };
    if let Some((ciphertext, tag)) = sealed.split_first_chunk::<32>() {
        layout.ciphertext = *ciphertext;
        layout.tag = tag.try_into().unwrap_or_default();
    }
    Ok(pem::write(ENCRYPTED, &wire::encode::<MAX_LAYOUT>(&layout).unwrap_or_default()))
}

/// Writes `secret` to a new key file with mode 0600.
///
/// # Errors
/// When there is a file already and `existing` says to keep it, or it cannot be written.
pub fn create(
    path: &Path,
    secret: &Secret,
    protection: &Protection,
    existing: Existing,
) -> Result<KeyId, CreateError> {
    let text = encode(secret, protection)?;
    disk::write_atomic(path, text.as_bytes(), 0o600, existing)?;
    Ok(secret.id)
}

/// Reads a key file. `source` is asked for a passphrase only if the file wants one.
///
/// # Errors
/// When the file breaks a rule, is no key, or stays locked.
pub fn load(path: &Path, source: &Source) -> Result<Secret, LoadError> {
    let layout = match layout(path)? {
        Layout::Clear(secret) => return Ok(secret),
        Layout::Encrypted(layout) => layout,
    };
    let passphrase = source
        .get(&path.display().to_string())
        .map_err(|why| LoadError::Passphrase { path: path.into(), why })?;
    let Preamble { params, public, salt, nonce, .. } = layout.preamble;
    let key = params
        .stretch(&passphrase, &salt)
        .ok_or_else(|| LoadError::Memory { path: path.into(), memory_kib: params.memory_kib })?;
    let aad = layout.preamble.authenticated();
    let sealed = [layout.ciphertext.as_slice(), &layout.tag].concat();
    let wrong = || LoadError::WrongPassphrase { path: path.into() };
    let opened = XChaCha20Poly1305::new(&Key::from(*key))
        .decrypt(&XNonce::from(nonce), Payload { msg: &sealed, aad: &aad })
        .map(Zeroizing::new)
        .map_err(|_| wrong())?;
    let mut seed = Zeroizing::new([0; 32]);
    seed.copy_from_slice(opened.get(..32).ok_or_else(wrong)?);
    belonging(Secret::from_seed(seed), &public, path)
}

/// What a key file says about itself. Needs no passphrase; what an encrypted file says is not
/// authenticated without one.
///
/// # Errors
/// When the file breaks a rule or is no key.
pub fn describe(path: &Path) -> Result<Described, LoadError> {
    Ok(match layout(path)? {
        Layout::Clear(secret) => Described { id: secret.id, kdf: None },
        Layout::Encrypted(EncryptedLayout { preamble, .. }) => {
            Described { id: preamble.public, kdf: Some(preamble.params) }
        }
    })
}

fn belonging(secret: Secret, public: &KeyId, path: &Path) -> Result<Secret, LoadError> {
    if secret.id == *public {
        Ok(secret)
    } else {
        Err(LoadError::NotAKey { path: path.into(), why: NotAKey::Mismatch })
    }
}

/// Reads the file, its text and its layout, and judges the parameters before anyone uses them.
fn layout(path: &Path) -> Result<Layout, LoadError> {
    let text = disk::read_private(path, MAX_FILE)?;
    let no_key = |why: NotAKey| LoadError::NotAKey { path: path.into(), why };
    let mut blocks = pem::read(&text).map_err(|why| no_key(why.into()))?;
    if blocks.len() != 1 {
        return Err(no_key(NotAKey::Blocks(blocks.len())));
    }
    let Some(Block { label, bytes }) = blocks.pop() else { return Err(no_key(NotAKey::Blocks(0))) };
    match label.as_str() {
        CLEAR => {
            let mut clear: ClearLayout =
                wire::decode::<MAX_LAYOUT, _>(&bytes).map_err(|why| no_key(why.into()))?;
            let seed = Zeroizing::new(clear.seed);
            clear.seed.zeroize();
            if clear.version != VERSION {
                return Err(no_key(NotAKey::Version(clear.version)));
            }
            belonging(Secret::from_seed(seed), &clear.public, path).map(Layout::Clear)
        }
        ENCRYPTED => {
            let encrypted: EncryptedLayout =
                wire::decode::<MAX_LAYOUT, _>(&bytes).map_err(|why| no_key(why.into()))?;
            let Preamble { version, kdf, params, .. } = encrypted.preamble;
            if version != VERSION {
                return Err(no_key(NotAKey::Version(version)));
            }
            if kdf != ARGON2ID {
                return Err(no_key(NotAKey::Derivation(kdf)));
            }
            if !params.is_within_bounds() {
                return Err(LoadError::Bounds { path: path.into(), kdf: params });
            }
            Ok(Layout::Encrypted(encrypted))
        }
        other => Err(no_key(NotAKey::Label(crate::text::shown(other)))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// As weak as the algorithm allows: the tests try many files.
    const WEAK: Kdf = Kdf { memory_kib: 32, passes: 1, lanes: 4 };

    fn secret(n: u8) -> Secret {
        Secret::from_seed(Zeroizing::new([n; 32]))
    }

    fn passphrase(text: &str) -> Passphrase {
        Passphrase::new(Zeroizing::new(text.as_bytes().to_vec())).expect("a passphrase")
    }

    struct Dir(tempfile::TempDir);

    impl Dir {
        fn new() -> Self {
            Self(tempfile::tempdir().expect("a directory"))
        }
        fn file(&self, name: &str, text: &[u8]) -> PathBuf {
            let path = self.0.path().join(name);
            disk::write_atomic(&path, text, 0o600, Existing::Replace).expect("written");
            path
        }
        fn source(&self, word: &str) -> Source {
            Source::File(self.file("word", word.as_bytes()))
        }
    }

    #[test]
    fn keys_come_back_as_they_were_stored() {
        let dir = Dir::new();
        let path = dir.0.path().join("key");
        for protection in [Protection::Clear, Protection::Passphrase(passphrase("word"), WEAK)] {
            create(&path, &secret(7), &protection, Existing::Replace).expect("created");
            let loaded = load(&path, &dir.source("word")).expect("loaded");
            assert_eq!((loaded.id(), loaded.seed()), (secret(7).id(), &[7; 32]));
            let kdf = matches!(protection, Protection::Passphrase(..)).then_some(WEAK);
            assert_eq!(describe(&path).expect("described"), Described { id: loaded.id(), kdf });
        }
    }

    #[test]
    fn neither_debug_nor_an_encrypted_file_shows_the_secret() {
        let secret = secret(0x41);
        assert!(!format!("{secret:?}").contains("41, 41"));
        let text = encode(&secret, &Protection::Passphrase(passphrase("AAAAAAAA"), WEAK))
            .expect("encoded");
        let block = pem::read(text.as_bytes()).expect("a block").remove(0);
        assert!(!block.bytes.windows(8).any(|window| window == [0x41; 8]));
        assert!(!format!("{block:?}").contains("41, 41"));
    }

    #[test]
    fn a_wrong_passphrase_and_a_locked_key_are_told_apart_from_damage() {
        let dir = Dir::new();
        let text = encode(&secret(1), &Protection::Passphrase(passphrase("word"), WEAK));
        let path = dir.file("key", text.expect("encoded").as_bytes());
        let wrong = load(&path, &dir.source("ward")).expect_err("wrong");
        assert!(matches!(wrong, LoadError::WrongPassphrase { .. }));
        let locked = load(&path, &Source::Nowhere).expect_err("locked");
        assert_eq!((wrong.exit(), locked.exit()), (Exit::Locked, Exit::Locked));
        assert!(locked.to_string().contains("none was given"), "{locked}");
    }

    #[test]
    fn every_changed_byte_of_a_key_file_is_noticed() {
        let dir = Dir::new();
        let source = dir.source("word");
        for protection in [Protection::Clear, Protection::Passphrase(passphrase("word"), WEAK)] {
            let text = encode(&secret(9), &protection).expect("encoded");
            let Block { label, bytes } = pem::read(text.as_bytes()).expect("a block").remove(0);
            for at in 0..bytes.len() {
                let mut changed = bytes.to_vec();
                changed[at] ^= 1 << (at % 8);
                let path = dir.file("key", pem::write(&label, &changed).as_bytes());
                assert!(load(&path, &source).is_err(), "{label}: byte {at} flipped");
            }
            for length in 0..bytes.len() {
                let path = dir.file("key", pem::write(&label, &bytes[..length]).as_bytes());
                let error = load(&path, &source).expect_err("cut short");
                assert!(matches!(error, LoadError::NotAKey { .. }), "{error}");
            }
            let longer = pem::write(&label, &[&bytes[..], &[0]].concat());
            let error = load(&dir.file("key", longer.as_bytes()), &source).expect_err("longer");
            assert!(error.to_string().contains("1 bytes follow"), "{error}");
        }
    }

    #[test]
    fn hostile_parameters_are_refused_before_they_cost_anything() {
        let dir = Dir::new();
        let source = dir.source("word");
        let text = encode(&secret(9), &Protection::Passphrase(passphrase("word"), WEAK));
        let block = pem::read(text.expect("encoded").as_bytes()).expect("a block").remove(0);
        let most = Kdf::MOST;
        for kdf in [
            Kdf { memory_kib: most.memory_kib + 1, ..most },
            Kdf { memory_kib: u32::MAX, ..most },
            Kdf { passes: 11, ..most },
            Kdf { passes: u32::MAX, ..WEAK },
            Kdf { passes: 0, ..WEAK },
            Kdf { lanes: 17, ..most },
            Kdf { lanes: 0, ..WEAK },
            Kdf { lanes: u32::MAX, ..WEAK },
            Kdf { memory_kib: 31, ..WEAK },
            Kdf { memory_kib: 0, ..WEAK },
        ] {
            let mut layout: EncryptedLayout =
                wire::decode::<MAX_LAYOUT, _>(&block.bytes).expect("a layout");
            layout.preamble.params = kdf;
            let bytes = wire::encode::<MAX_LAYOUT>(&layout).expect("encoded");
            let path = dir.file("key", pem::write(ENCRYPTED, &bytes).as_bytes());
            for error in
                [load(&path, &source).map(|_| ()), describe(&path).map(|_| ())].map(Result::err)
            {
                assert_eq!(error.map(|error| error.exit()), Some(Exit::Policy), "{kdf:?}");
            }
            let protection = Protection::Passphrase(passphrase("word"), kdf);
            let made = encode(&secret(9), &protection);
            assert_eq!(made.map(|_| ()).map_err(|e| e.exit()), Err(Exit::Policy), "{kdf:?}");
        }
    }

    #[test]
    fn a_public_key_that_was_exchanged_together_with_its_tag_is_noticed() {
        // Somebody who knows the passphrase re-seals the same secret under another public key.
        let dir = Dir::new();
        let mut victim = secret(3);
        victim.id = secret(4).id;
        for protection in [Protection::Clear, Protection::Passphrase(passphrase("word"), WEAK)] {
            let text = encode(&victim, &protection).expect("encoded");
            let error = load(&dir.file("key", text.as_bytes()), &dir.source("word"));
            assert!(matches!(error, Err(LoadError::NotAKey { why: NotAKey::Mismatch, .. })));
        }
    }

    #[test]
    fn other_files_are_named_for_what_they_are() {
        let dir = Dir::new();
        let clear = encode(&secret(1), &Protection::Clear).expect("encoded");
        for (text, expected) in [
            (String::new(), "no '-----BEGIN"),
            ("\u{1b}[31m".into(), "line 1 is neither"),
            (pem::write("OPENSSH PRIVATE KEY", b"x").to_string(), "it holds a OPENSSH PRIVATE KEY"),
            (format!("{}{}", &*clear, &*clear), "2 blocks"),
            (pem::write(CLEAR, &[2; 66]).to_string(), "version (514)"),
        ] {
            let error = describe(&dir.file("key", text.as_bytes())).expect_err("no key");
            assert!(error.to_string().contains(expected), "{error}");
            assert_eq!(error.exit(), Exit::Io);
        }
        let long = dir.file("key", &vec![b'#'; MAX_FILE + 1]);
        assert!(matches!(describe(&long), Err(LoadError::Read(ReadError::TooLong { .. }))));
    }
}

//! The node's directory: what lies where, and how it is made.
//!
//! ```text
//! DIR/                 0700
//!   node.key           the node's key, in clear, 0600: it must start unattended
//!   charter            the charter of its fabric
//!   certificate        what admits the node
//!   mandate            what lets it order in a lessee's name; absent: it only sells
//!   leasehold.toml     what the operator decides
//!   api.token          what the API wants, 0600
//!   store/             the journal and the state
//!   payloads/          payloads by root
//!   jobs/              a directory per job
//!   org.key tenant.key (only where `leasehold init` made the fabric; they may move elsewhere)
//! DIR.epoch            beside it: the node's highest epoch, so that a DIR that is restored from an
//!                      older copy is known for one
//! ```

use std::fs::DirBuilder;
use std::os::unix::fs::{DirBuilderExt, PermissionsExt};
use std::path::{Path, PathBuf};

use leasehold_keys::armor::{self, ArmorError, Item, SaveError};
use leasehold_keys::disk::{self, Existing, WriteError};
use leasehold_keys::exit::Exit;
use leasehold_keys::file::{self, CreateError, LoadError, Protection, Secret};
use leasehold_keys::issue::{self, IssueError, NewCertificate, NewCharter, NewMandate};
use leasehold_keys::passphrase::Source;
use leasehold_proto::base::time::Wall;
use leasehold_proto::words::charter::{Limits, Organisation, Role};
use leasehold_proto::words::sign::{Draft, Signed, VerifyError};
use leasehold_proto::{Amount, KeyId, Span};
use serde::{Deserialize, Serialize};

/// The directory of one node.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Home {
    dir: PathBuf,
}

/// Who the node is, as its directory says.
#[derive(Debug)]
pub struct Identity {
    /// Its key.
    pub secret: Secret,
    /// The charter of its fabric.
    pub charter: Signed,
    /// What admits it.
    pub certificate: Signed,
    /// What lets it order.
    pub mandate: Option<Signed>,
}

/// Why a directory cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum HomeError {
    /// It cannot be made or looked at.
    #[error("{path}: {source}")]
    Io {
        /// Which path.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Others may look into it.
    #[error("{path} has mode {mode:04o}: others can look into it; run chmod 700 {path}")]
    Mode {
        /// The directory.
        path: PathBuf,
        /// Its permission bits.
        mode: u32,
    },
    /// There is no node in it.
    #[error("{0} holds no node: run `leasehold init` or `leasehold join` first")]
    Empty(PathBuf),
    /// The key cannot be loaded.
    #[error(transparent)]
    Key(#[from] LoadError),
    /// A key cannot be made.
    #[error(transparent)]
    NewKey(#[from] CreateError),
    /// A file of objects cannot be read.
    #[error(transparent)]
    Armor(#[from] ArmorError),
    /// A file of objects cannot be written.
    #[error(transparent)]
    Save(#[from] SaveError),
    /// A file holds something else than it should.
    #[error("{path} should hold one signed {expected}")]
    Content {
        /// Which file.
        path: PathBuf,
        /// What should be in it.
        expected: &'static str,
    },
    /// A charter, certificate or mandate cannot be issued.
    #[error(transparent)]
    Issue(#[from] IssueError),
    /// A draft cannot be signed.
    #[error("cannot sign: {0}")]
    Sign(#[from] VerifyError),
}

impl HomeError {
    /// The exit code that says so.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        match self {
            Self::Io { .. } | Self::Empty(_) | Self::Content { .. } => Exit::Io,
            Self::Mode { .. } | Self::Sign(_) => Exit::Policy,
            Self::Key(why) => why.exit(),
            Self::NewKey(why) => why.exit(),
            Self::Armor(why) => why.exit(),
            Self::Save(why) => why.exit(),
            Self::Issue(why) => why.exit(),
        }
    }
}

/// The highest epoch that is believed of a note: half of all there are, so that every later start
/// has one.
const MAX_EPOCH: u64 = u64::MAX / 2;

/// What stands in the note beside a node's directory.
#[derive(Debug, Serialize, Deserialize)]
struct EpochNote {
    /// Whose.
    node: KeyId,
    /// The highest epoch in which it ran.
    epoch: u64,
}

/// What founds a fabric.
#[derive(Clone, Debug)]
pub struct Founding {
    /// The fabric's name.
    pub fabric: String,
    /// The currency of every amount.
    pub currency: String,
    /// The name of its one organisation.
    pub organisation: String,
    /// The longest term of a lease.
    pub max_term: Span,
    /// How long an order may be valid: long enough for one that is signed by hand.
    pub max_order_life: Span,
}

/// What a node may order in a tenant's name.
#[derive(Clone, Copy, Debug)]
pub struct Allowance {
    /// The most that one lease may cost per hour.
    pub max_hourly: Amount,
    /// The most that one lease may cost in all.
    pub max_total: Amount,
    /// The longest term of one lease.
    pub max_term: Span,
}

/// An organisation with its charter, able to admit nodes and tenants.
#[derive(Debug)]
pub struct Founder {
    /// The organisation's root key.
    pub root: Secret,
    /// Its name.
    pub organisation: String,
    /// The charter it signed.
    pub charter: Signed,
}

/// How long certificates and mandates of `init` are valid.
const VALID: Span = Span::secs(365 * 24 * 3600);

impl Founder {
    /// Founds a fabric with `root` as the only organisation's key.
    ///
    /// # Errors
    /// When a name breaks a rule.
    pub fn found(root: Secret, founding: &Founding, now: Wall) -> Result<Self, HomeError> {
        let Founding { fabric, currency, organisation, max_term, max_order_life } = founding;
        let (max_term, max_order_life) = (*max_term, *max_order_life);
        let new = NewCharter {
            name: fabric.clone(),
            currency: currency.clone(),
            organisations: vec![Organisation {
                name: organisation.clone(),
                root: root.id(),
                max_nodes: 100_000,
            }],
            limits: Limits { max_term, max_order_life },
            signer: None,
        };
        let charter = root.signer().sign(&issue::charter(new, now)?)?;
        Ok(Self { root, organisation: organisation.clone(), charter })
    }

    /// Admits a key.
    ///
    /// # Errors
    /// When the name breaks a rule.
    pub fn admit(
        &self,
        key: KeyId,
        role: Role,
        name: &str,
        now: Wall,
    ) -> Result<Signed, HomeError> {
        let draft = certificate_draft(&self.charter, &self.organisation, key, role, name, now)?;
        Ok(self.root.signer().sign(&draft)?)
    }
}

/// A key that is in memory only.
///
/// # Errors
/// When the operating system has no randomness to give.
pub fn generate() -> Result<Secret, HomeError> {
    Ok(Secret::generate().map_err(CreateError::from)?)
}

/// A certificate for an organisation to sign.
///
/// # Errors
/// When the charter names no such organisation or a name breaks a rule.
pub fn certificate_draft(
    charter: &Signed,
    organisation: &str,
    key: KeyId,
    role: Role,
    name: &str,
    now: Wall,
) -> Result<Draft, HomeError> {
    let (organisation, name) = (organisation.to_string(), name.to_string());
    let new = NewCertificate { organisation, name, role, key, valid: VALID };
    Ok(issue::certificate(charter, new, now)?)
}

/// A mandate by `tenant` for `delegate`.
///
/// # Errors
/// When the certificate is not the tenant's.
pub fn mandate(
    tenant: &Secret,
    certificate: &Signed,
    delegate: KeyId,
    allowance: Allowance,
    now: Wall,
) -> Result<Signed, HomeError> {
    let Allowance { max_hourly, max_total, max_term } = allowance;
    let new = NewMandate {
        lessee: tenant.id(),
        delegate,
        max_hourly,
        max_total,
        max_term,
        lessors: Vec::new(),
        valid: VALID,
    };
    Ok(tenant.signer().sign(&issue::mandate(certificate, new, now)?)?)
}

impl Home {
    /// Where the node's highest epoch is noted, outside its directory.
    fn note_path(&self) -> Option<PathBuf> {
        let mut name = self.dir.file_name()?.to_os_string();
        name.push(".epoch");
        Some(self.dir.with_file_name(name))
    }

    /// The highest epoch of `node` that is noted beside the directory; zero where nothing is.
    ///
    /// # Errors
    /// When there is a note that does not read: whether the directory is an older copy cannot be
    /// told then.
    pub fn noted_epoch(&self, node: KeyId) -> Result<u64, HomeError> {
        let Some(path) = self.note_path() else { return Ok(0) };
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(0),
            Err(source) => return Err(HomeError::Io { path, source }),
        };
        match serde_json::from_slice::<EpochNote>(&text) {
            Ok(note) if note.epoch > MAX_EPOCH => {
                Err(HomeError::Content { path, expected: "note of an epoch that a node can reach" })
            }
            Ok(note) if note.node == node => Ok(note.epoch),
            // Another node's, which lived here before.
            Ok(_) => Ok(0),
            Err(_) => Err(HomeError::Content { path, expected: "note of the node's epoch" }),
        }
    }

    /// Notes beside the directory that `node` runs in `epoch`, durably.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn note_epoch(&self, node: KeyId, epoch: u64) -> Result<(), WriteError> {
        let Some(path) = self.note_path() else { return Ok(()) };
        let note = serde_json::to_vec(&EpochNote { node, epoch }).unwrap_or_default();
        disk::write_atomic(&path, &note, 0o600, Existing::Replace)
    }

    /// The home in `dir`, which need not exist yet.
    #[must_use]
    pub fn at(dir: impl Into<PathBuf>) -> Self {
        // Jobs run in other directories than their node: a path must mean the same there.
        let dir = dir.into();
        Self { dir: std::path::absolute(&dir).unwrap_or(dir) }
    }

    /// Where it is.
    #[must_use]
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// A path inside.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Makes the directory, for its owner alone.
    ///
    /// # Errors
    /// When it cannot be made, or exists and others may look into it.
    pub fn create(&self) -> Result<(), HomeError> {
        let io = |source| HomeError::Io { path: self.dir.clone(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(&self.dir).map_err(io)?;
        self.check_mode()
    }

    fn check_mode(&self) -> Result<(), HomeError> {
        let io = |source| HomeError::Io { path: self.dir.clone(), source };
        let mode = std::fs::metadata(&self.dir).map_err(io)?.permissions().mode() & 0o7777;
        if mode & 0o077 != 0 {
            return Err(HomeError::Mode { path: self.dir.clone(), mode });
        }
        Ok(())
    }

    /// Whether there is a node in it.
    #[must_use]
    pub fn holds_node(&self) -> bool {
        self.path("node.key").exists()
    }

    /// Makes a key.
    ///
    /// # Errors
    /// When there is one, or it cannot be written.
    pub fn new_key(&self, name: &str, protection: &Protection) -> Result<Secret, HomeError> {
        let secret = generate()?;
        self.put_key(name, &secret, protection)?;
        Ok(secret)
    }

    /// Writes a key.
    ///
    /// # Errors
    /// When there is one, or it cannot be written.
    pub fn put_key(
        &self,
        name: &str,
        secret: &Secret,
        protection: &Protection,
    ) -> Result<(), HomeError> {
        file::create(&self.path(name), secret, protection, Existing::Keep)?;
        Ok(())
    }

    /// Loads a key that needs no passphrase.
    ///
    /// # Errors
    /// When it cannot be loaded.
    pub fn key(&self, name: &str) -> Result<Secret, HomeError> {
        Ok(file::load(&self.path(name), &Source::Nowhere)?)
    }

    /// Writes one signed object.
    ///
    /// # Errors
    /// When it cannot be written.
    pub fn put(&self, name: &str, signed: &Signed) -> Result<(), HomeError> {
        let items = [Item::Signed(signed.clone())];
        Ok(armor::write_objects(&self.path(name), &items, Existing::Replace)?)
    }

    /// Reads the one signed object in a file.
    ///
    /// # Errors
    /// When it cannot be read or holds something else.
    pub fn get(&self, name: &str, expected: &'static str) -> Result<Signed, HomeError> {
        read_one(&self.path(name), expected)
    }

    /// Who the node is.
    ///
    /// # Errors
    /// When a part is missing or unusable.
    pub fn identity(&self) -> Result<Identity, HomeError> {
        if !self.holds_node() {
            return Err(HomeError::Empty(self.dir.clone()));
        }
        self.check_mode()?;
        let mandate = self.path("mandate").exists();
        Ok(Identity {
            secret: self.key("node.key")?,
            charter: self.get("charter", "charter")?,
            certificate: self.get("certificate", "certificate")?,
            mandate: mandate.then(|| self.get("mandate", "mandate")).transpose()?,
        })
    }
}

/// Reads the one signed object of a file.
///
/// # Errors
/// When it cannot be read or holds something else.
pub fn read_one(path: &Path, expected: &'static str) -> Result<Signed, HomeError> {
    let wrong = || HomeError::Content { path: path.into(), expected };
    let mut items = armor::read_objects(path)?;
    match (items.pop(), items.is_empty()) {
        (Some(Item::Signed(signed)), true) => {
            let kind = signed.header().map_err(|_| wrong())?.kind;
            if kind.name() == expected { Ok(signed) } else { Err(wrong()) }
        }
        _ => Err(wrong()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_note_says_an_epoch_of_this_node_or_keeps_it_from_starting() {
        let room = tempfile::tempdir().expect("a directory");
        let home = Home::at(room.path().join("node"));
        let (me, other) = (KeyId([1; 32]), KeyId([2; 32]));
        assert_eq!(home.noted_epoch(me).expect("no note"), 0);
        home.note_epoch(me, 7).expect("it is written");
        assert_eq!(home.noted_epoch(me).expect("it reads"), 7);
        assert_eq!(home.noted_epoch(other).expect("it reads"), 0, "it is of another node");
        home.note_epoch(me, MAX_EPOCH).expect("it is written");
        assert_eq!(home.noted_epoch(me).expect("it reads"), MAX_EPOCH);
        for epoch in [MAX_EPOCH + 1, u64::MAX] {
            home.note_epoch(me, epoch).expect("it is written");
            assert!(matches!(home.noted_epoch(me), Err(HomeError::Content { .. })), "{epoch}");
        }
        std::fs::write(home.note_path().expect("a path"), "7").expect("it is written");
        assert!(matches!(home.noted_epoch(me), Err(HomeError::Content { .. })));
    }
}

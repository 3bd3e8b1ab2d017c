//! Signed objects, drafts and proofs as text files, to be mailed, printed or carried on a stick
//! to a machine without a network. Several may stand in one file.
//!
//! ```text
//! LEASEHOLD SIGNED <KIND>      a signed object: envelope and signature
//! LEASEHOLD UNSIGNED <KIND>    a draft: the envelope alone
//! LEASEHOLD PROOF              a lease with everything that proves it
//! ```
//!
//! The label repeats the kind for people; a label that says another kind than the content is an
//! error. Reading checks no signature: that is what [`crate::judge`] is for.

use std::path::{Path, PathBuf};

use leasehold_proto::proof::Proof;
use leasehold_proto::words::equivocation::Equivocation;
use leasehold_proto::words::object::{Envelope, Kind};
use leasehold_proto::words::sign::{Draft, Signed};
use leasehold_proto::words::wire::{self, DecodeError, EncodeError, MAX_OBJECT};

use crate::disk::{self, Existing, ReadError, WriteError};
use crate::exit::Exit;
use crate::pem::{self, PemError};

/// The longest encoding of a proof, in bytes.
pub const MAX_PROOF: usize = 64 << 20;
/// The longest encoding of two signed objects, in bytes.
const MAX_BOTH: usize = 2 * MAX_SIGNED;
/// The longest file of objects, in bytes: the longest proof in base64, with its lines.
pub const MAX_FILE: usize = 90 << 20;
/// The longest encoding of a signed object or draft: an envelope, its length and a signature.
const MAX_SIGNED: usize = MAX_OBJECT + 8 + 64;

const SIGNED: &str = "LEASEHOLD SIGNED ";
const UNSIGNED: &str = "LEASEHOLD UNSIGNED ";
const PROOF: &str = "LEASEHOLD PROOF";
/// The label of two objects that contradict each other.
const EQUIVOCATION: &str = "LEASEHOLD EQUIVOCATION";

/// One thing in a file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Item {
    /// A signed object of any kind; whether the signature holds is not said.
    Signed(Signed),
    /// An object still to be signed.
    Draft(Draft),
    /// A whole proof; whether it holds is not said.
    Proof(Box<Proof>),
    /// Two objects that contradict each other; whether they do is not said.
    Equivocation(Box<Equivocation>),
}

/// Why a file gives no objects.
#[derive(Debug, thiserror::Error)]
pub enum ArmorError {
    /// The file cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The text is not what it should be.
    #[error("{}: {why}", .path.display())]
    Content {
        /// Which file.
        path: PathBuf,
        /// Why not.
        why: NotArmor,
    },
}

/// Why a text holds no objects.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotArmor {
    /// It holds no blocks.
    #[error(transparent)]
    Pem(#[from] PemError),
    /// A block's content does not decode.
    #[error("block {nth} ({label}) is damaged: {why}")]
    Decode {
        /// Which block, counting from one.
        nth: usize,
        /// What it says it is.
        label: String,
        /// Why not.
        why: DecodeError,
    },
    /// A block says one kind and holds another.
    #[error("block {nth} says {label} but holds {holds}: it was changed")]
    Mislabelled {
        /// Which block, counting from one.
        nth: usize,
        /// What it says it is.
        label: String,
        /// What it is.
        holds: String,
    },
    /// A block is of another sort.
    #[error(
        "block {nth} is a {label}: expected a signed object, a draft, a proof or an equivocation"
    )]
    Label {
        /// Which block, counting from one.
        nth: usize,
        /// What it says it is.
        label: String,
    },
}

impl ArmorError {
    /// The exit code that says so.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        match self {
            Self::Read(why) => why.exit(),
            Self::Content { .. } => Exit::Io,
        }
    }
}

/// Why objects were not written.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// One is too long or no object.
    #[error(transparent)]
    Encode(#[from] EncodeError),
    /// The envelope of one does not decode, so that it has no kind.
    #[error("an object to be written is malformed: {0}")]
    Malformed(#[from] DecodeError),
    /// The file was not written.
    #[error(transparent)]
    Write(#[from] WriteError),
}

impl SaveError {
    /// The exit code that says so.
    #[must_use]
    pub const fn exit(&self) -> Exit {
        match self {
            Self::Encode(_) | Self::Malformed(_) => Exit::Io,
            Self::Write(why) => why.exit(),
        }
    }
}

impl Item {
    /// The label of its block.
    ///
    /// # Errors
    /// When its envelope does not decode.
    pub fn label(&self) -> Result<String, DecodeError> {
        let upper = |kind: Kind| kind.name().to_uppercase();
        Ok(match self {
            Self::Signed(signed) => format!("{SIGNED}{}", upper(signed.header()?.kind)),
            Self::Draft(draft) => {
                let envelope = Envelope::decode(&draft.envelope)?;
                format!("{UNSIGNED}{}", upper(envelope.header.kind))
            }
            Self::Proof(_) => PROOF.to_string(),
            Self::Equivocation(_) => EQUIVOCATION.to_string(),
        })
    }
}

/// Writes one item as a block.
///
/// # Errors
/// When it is too long, or its envelope does not decode.
pub fn encode(item: &Item) -> Result<String, SaveError> {
    let bytes = match item {
        Item::Signed(signed) => wire::encode::<MAX_SIGNED>(signed)?,
        Item::Draft(draft) => wire::encode::<MAX_SIGNED>(draft)?,
        Item::Proof(proof) => wire::encode::<MAX_PROOF>(&**proof)?,
        Item::Equivocation(both) => wire::encode::<MAX_BOTH>(&**both)?,
    };
    Ok(std::mem::take(&mut *pem::write(&item.label()?, &bytes)))
}

/// Reads every item of a text. Memory is bounded by the length of the text.
///
/// # Errors
/// When there is none, or anything else between them.
pub fn decode(text: &[u8]) -> Result<Vec<Item>, NotArmor> {
    (1..).zip(pem::read(text)?).map(|(nth, block)| item(nth, &block)).collect()
}

fn item(nth: usize, block: &pem::Block) -> Result<Item, NotArmor> {
    let label = crate::text::shown(&block.label);
    let damaged = |why| NotArmor::Decode { nth, label: label.clone(), why };
    let item = if block.label.starts_with(SIGNED) {
        Item::Signed(wire::decode::<MAX_SIGNED, _>(&block.bytes).map_err(damaged)?)
    } else if block.label.starts_with(UNSIGNED) {
        Item::Draft(wire::decode::<MAX_SIGNED, _>(&block.bytes).map_err(damaged)?)
    } else if block.label == PROOF {
        Item::Proof(Box::new(wire::decode::<MAX_PROOF, _>(&block.bytes).map_err(damaged)?))
    } else if block.label == EQUIVOCATION {
        Item::Equivocation(Box::new(wire::decode::<MAX_BOTH, _>(&block.bytes).map_err(damaged)?))
    } else {
        return Err(NotArmor::Label { nth, label });
    };
    let holds = item.label().map_err(damaged)?;
    if holds == block.label { Ok(item) } else { Err(NotArmor::Mislabelled { nth, label, holds }) }
}

/// Reads every item of a file of at most [`MAX_FILE`] bytes.
///
/// # Errors
/// When the file cannot be read, or holds anything else.
pub fn read_objects(path: &Path) -> Result<Vec<Item>, ArmorError> {
    let text = disk::read(path, MAX_FILE)?;
    decode(&text).map_err(|why| ArmorError::Content { path: path.into(), why })
}

/// Writes `items` to one file, all or nothing. None of it is secret: the mode is 0644 less the
/// umask.
///
/// # Errors
/// When one is no object, or the file cannot be written.
pub fn write_objects(path: &Path, items: &[Item], existing: Existing) -> Result<(), SaveError> {
    let text = items.iter().map(encode).collect::<Result<Vec<_>, _>>()?.concat();
    Ok(disk::write_atomic(path, text.as_bytes(), 0o644, existing)?)
}

//! The one envelope for everything signed, fixed for ever, and the list of kinds.
//!
//! ```text
//! envelope = kind u16 | version u16 | fabric 32 | signer 32 | subject 32
//!          | epoch u64 | seq u64 | not_after u64 | extensions | body
//! ```
//!
//! A kind that is not known here is relayed unread; an extension says whether it may be ignored.
//! Of two bodies by one signer for one (kind, subject, epoch, seq) at least one is a lie: that is
//! what makes equivocation provable.

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::DeserializeOwned};

use super::charter::{Certificate, Charter};
use super::contract::{
    Acceptance, Claim, Commit, Gang, Grant, Mandate, Order, Refusal, Release, Renew, Renewal,
    Termination,
};
use super::equivocation::Reinstatement;
use super::model::Served;
use super::record::{HostRecord, Offer, Payloads};
use super::sign::{Signed, Verified, VerifyError};
use super::usage::{Acknowledgement, Objection, Receipt};
use super::wire::{self, DecodeError, MAX_OBJECT};
use crate::base::id::{FabricId, Hash, KeyId};
use crate::base::time::Wall;

/// The most extensions an envelope may carry.
const MAX_EXTENSIONS: usize = 8;
/// The longest envelope of a kind that is relayed unread, in bytes.
const MAX_UNREAD: usize = 16 * 1024;

/// What is signed beside the body.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Header {
    /// What sort of object this is.
    pub kind: Kind,
    /// The version of that kind's body.
    pub version: u16,
    /// The fabric it belongs to; zero in a fabric's first charter, which founds one.
    pub fabric: FabricId,
    /// Who signs.
    pub signer: KeyId,
    /// What it is about: a key, a request, a lease; each kind says which.
    pub subject: Hash,
    /// The signer's epoch: rises durably at every start of a node.
    pub epoch: u64,
    /// The number within (kind, subject, epoch).
    pub seq: u64,
    /// When it ceases to be valid.
    pub not_after: Wall,
}

/// Something added to an envelope by a later version.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Extension {
    /// Which extension.
    pub tag: u16,
    /// Whether a reader that does not know it must refuse the object.
    pub critical: bool,
    /// Its content.
    #[serde(with = "wire::octets")]
    pub bytes: Vec<u8>,
}

/// A header with its body, before the signature.
#[derive(Clone, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Envelope {
    /// The fixed fields.
    pub header: Header,
    /// What later versions add.
    pub extensions: Vec<Extension>,
    /// The encoded body.
    #[serde(with = "wire::octets")]
    pub body: Vec<u8>,
}

impl Envelope {
    /// Decodes an envelope.
    ///
    /// # Errors
    /// When the bytes are no envelope, more than its kind may have, or carry too many extensions.
    pub fn decode(bytes: &[u8]) -> Result<Self, DecodeError> {
        let envelope: Self = wire::decode::<MAX_OBJECT, _>(bytes)?;
        if envelope.extensions.len() > MAX_EXTENSIONS {
            return Err(DecodeError::Invalid("the envelope carries too many extensions"));
        }
        let (got, limit) = (bytes.len(), envelope.header.kind.max_len());
        if got > limit {
            return Err(DecodeError::TooLong { got, limit });
        }
        Ok(envelope)
    }

    /// Decodes the body as a `T`, whatever the header says that it is.
    ///
    /// # Errors
    /// When it is no `T`.
    pub fn read<T: Body>(&self) -> Result<T, DecodeError> {
        wire::decode::<MAX_OBJECT, _>(&self.body)
    }
}

/// The body in an encoded envelope of one's own making, or verified before it was kept.
#[must_use]
pub fn body_in<T: Body>(envelope: &[u8]) -> Option<T> {
    Envelope::decode(envelope).ok()?.read().ok()
}

/// A type that can stand in an envelope.
pub trait Body: Serialize + DeserializeOwned {
    /// The kind that says so.
    const KIND: Kind;

    /// Checks what the types alone cannot say (lengths, order). The text completes "this object
    /// is not accepted: …".
    ///
    /// # Errors
    /// The rule that is broken.
    fn validate(&self) -> Result<(), &'static str> {
        Ok(())
    }
}

macro_rules! kinds {
    ($( $(#[$doc:meta])* $number:literal $name:literal $kib:literal KiB $variant:ident )*) => {
        /// The kinds of signed objects. Numbers are never reused.
        #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
        pub enum Kind {
            $( $(#[$doc])* $variant, )*
            /// A kind of a later version: relayed unread.
            Unknown(u16),
        }

        impl Kind {
            /// The number on the wire.
            #[must_use]
            pub const fn number(self) -> u16 {
                match self { $( Self::$variant => $number, )* Self::Unknown(number) => number }
            }

            /// The kind with this number.
            #[must_use]
            pub const fn from_number(number: u16) -> Self {
                match number { $( $number => Self::$variant, )* other => Self::Unknown(other) }
            }

            /// The longest envelope of this kind, in bytes, whatever extensions it carries: what a
            /// node keeps holds several objects and has a bound of its own.
            #[must_use]
            pub const fn max_len(self) -> usize {
                match self { $( Self::$variant => $kib * 1024, )* Self::Unknown(_) => MAX_UNREAD }
            }

            /// The name in signatures, files and messages.
            #[must_use]
            pub fn name(self) -> std::borrow::Cow<'static, str> {
                match self {
                    $( Self::$variant => $name.into(), )*
                    Self::Unknown(number) => format!("unknown-{number}").into(),
                }
            }
        }

        $( impl Body for $variant {
            const KIND: Kind = Kind::$variant;
            fn validate(&self) -> Result<(), &'static str> { Self::check(self) }
        } )*

        /// Any signed object of a known kind, verified: what `inspect` shows.
        #[derive(Debug)]
        pub enum Object {
            $( $(#[$doc])* $variant(Verified<$variant>), )*
        }

        impl Object {
            /// Verifies `signed` as whatever kind it says it is, in whatever fabric.
            ///
            /// # Errors
            /// When it does not verify, or is of a kind unknown to this version.
            pub fn verify(signed: &Signed) -> Result<Self, VerifyError> {
                match signed.header()?.kind {
                    $( Kind::$variant => signed.verify_anywhere().map(Self::$variant), )*
                    Kind::Unknown(number) => Err(VerifyError::Version(number)),
                }
            }

            /// The header of the object.
            #[must_use]
            pub fn header(&self) -> &Header {
                match self { $( Self::$variant(object) => object.header(), )* }
            }

            /// The object's identity.
            #[must_use]
            pub fn id(&self) -> Hash {
                match self { $( Self::$variant(object) => object.id(), )* }
            }

            /// The body as JSON, as people and scripts read it.
            #[must_use]
            pub fn body_json(&self) -> serde_json::Value {
                match self {
                    $( Self::$variant(object) => serde_json::to_value(object.body()), )*
                }.unwrap_or_default()
            }
        }

        /// The body of an unsigned envelope as JSON: what a person reads before signing it.
        ///
        /// # Errors
        /// When the envelope or its body does not decode or breaks a rule of its kind.
        pub fn draft_json(envelope: &[u8]) -> Result<(Header, serde_json::Value), DecodeError> {
            let envelope = Envelope::decode(envelope)?;
            let body = match envelope.header.kind {
                $( Kind::$variant => {
                    let body: $variant = envelope.read()?;
                    body.validate().map_err(DecodeError::Invalid)?;
                    serde_json::to_value(body)
                } )*
                Kind::Unknown(_) => return Err(DecodeError::Invalid("an unknown kind of object")),
            };
            Ok((envelope.header, body.unwrap_or_default()))
        }
    };
}

kinds! {
    /// What founds or changes a fabric. Subject: zero.
    1 "charter" 16 KiB Charter
    /// That an organisation admits a key. Subject: the key.
    2 "certificate" 2 KiB Certificate
    /// A node's addresses and hardware. Subject: the node's key.
    3 "host" 12 KiB HostRecord
    /// What a node has free and at what price. Subject: the node's key.
    4 "offer" 14 KiB Offer
    /// What a lessee lets a delegate order. Subject: the delegate's key.
    5 "mandate" 6 KiB Mandate
    /// A request for a lease. Subject: hash of lessee and request id.
    6 "order" 10 KiB Order
    /// The yes to an order. Subject: the order.
    7 "grant" 6 KiB Grant
    /// The no to an order or an act. Subject: what is refused.
    8 "refusal" 24 KiB Refusal
    /// First use of a lease, with its job. Subject: the lease.
    9 "claim" 17 KiB Claim
    /// That an act was accepted. Subject: the act's object.
    10 "acceptance" 1 KiB Acceptance
    /// The lessee gives a lease back. Subject: the lease.
    11 "release" 1 KiB Release
    /// How and why a lease ended. Subject: the lease.
    12 "termination" 4 KiB Termination
    /// Cumulative usage. Subject: the lease.
    13 "receipt" 1 KiB Receipt
    /// The lessee's countersignature under a receipt. Subject: the lease.
    14 "acknowledgement" 1 KiB Acknowledgement
    /// The lessee's disagreement with a receipt. Subject: the lease.
    15 "objection" 1 KiB Objection
    /// The lessee makes a lease longer. Subject: the lease.
    16 "renew" 1 KiB Renew
    /// That a lease was made longer. Subject: the lease.
    17 "renewal" 1 KiB Renewal
    /// That leases exist together or not at all. Subject: hash of lessee and gang.
    18 "gang" 5 KiB Gang
    /// A lessor's word that its lease is a member of a gang. Subject: the lease.
    19 "commit" 1 KiB Commit
    /// That a quarantined key is believed again. Subject: the key.
    20 "reinstatement" 1 KiB Reinstatement
    /// Which payloads can be fetched from a node. Subject: the node's key.
    21 "payloads" 5 KiB Payloads
    /// What a request to a model came to. Subject: the lease.
    22 "served" 1 KiB Served
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.name())
    }
}

impl Serialize for Kind {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            self.number().serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        u16::deserialize(deserializer).map(Self::from_number)
    }
}

/// The subject of an order: the hash of lessee and request id, the pair that makes at most one
/// lease at one lessor.
#[must_use]
pub fn order_subject(lessee: &KeyId, request: &crate::base::id::RequestId) -> Hash {
    let mut bytes = lessee.0.to_vec();
    bytes.extend_from_slice(&request.0);
    Hash::of(&bytes)
}

/// A key as a subject.
#[must_use]
pub const fn key_subject(key: &KeyId) -> Hash {
    Hash(key.0)
}

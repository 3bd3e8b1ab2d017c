//! What is made durable: records under keys, the newest of each key counts.
//!
//! The state of a node is the fold of these. Keys begin with one letter that says what they hold,
//! so that a prefix scan finds all receipts of a lease in order.

use serde::{Deserialize, Serialize, de::DeserializeOwned};

use crate::base::id::{Hash, KeyId, LeaseId};
use crate::base::resource::Resources;
use crate::minds::book::{self, Lent};
use crate::minds::holdings::Held;
use crate::words::object::Kind;
use crate::words::sign::{Draft, Signed};
use crate::words::wire::{self, DecodeError, EncodeError};

/// The longest value, in bytes: below what sled would put into a file of its own.
pub const MAX_VALUE: usize = 60 * 1024;

/// What a record may take beside the objects in it.
const BESIDE: usize = 3 * 1024;

// Whatever peers put into their objects, what is kept of them fits: a record that does not would
// stop the node.
const _: () = {
    use Kind::{
        Acknowledgement, Claim, Commit, Gang, Grant, HostRecord, Objection, Offer, Order, Receipt,
        Release, Renew, Renewal, Served, Termination, Unknown,
    };
    const fn sum(kinds: &[Kind]) -> usize {
        let (mut sum, mut rest) = (0, kinds);
        while let [kind, after @ ..] = rest {
            sum += kind.max_len() + 72;
            rest = after;
        }
        sum
    }
    let held = [Order, Offer, Grant, Claim, Renew, Renewal, Release, Acknowledgement, Termination];
    let lent = [Order, Offer, Grant, Renew, Gang, Commit, Termination];
    let lent = sum(&lent) + book::MAX_ACTS * book::ACT_LEN;
    assert!(sum(&held) + BESIDE <= MAX_VALUE && lent + BESIDE <= MAX_VALUE);
    assert!(sum(&[Receipt, Acknowledgement]) <= MAX_VALUE && sum(&[Objection]) <= MAX_VALUE);
    assert!(sum(&[Served]) <= MAX_VALUE);
    assert!(2 * sum(&[Unknown(0)]) <= MAX_VALUE);
    assert!(HostRecord.max_len() <= Unknown(0).max_len());
    assert!(Offer.max_len() <= Unknown(0).max_len());
};

/// One durable record.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Kept {
    /// The epoch of the current run.
    Epoch(u64),
    /// What was seen of this key in this epoch is not what this directory knows of: nothing is
    /// granted until the key is reinstated above it.
    Halted(u64),
    /// A lease this node granted.
    Lent(LeaseId, Box<Lent>),
    /// The claim of a lease this node granted: it waits for the other members of its gang, or its
    /// job is not begun yet.
    Claimed(LeaseId, Signed),
    /// It waits no more.
    DropClaimed(LeaseId),
    /// What the operator keeps out of new leases.
    Holdback(Holdback),
    /// An order or lease this node holds.
    Held(Hash, Box<Held>),
    /// The certificate of a gang that is held here, and whether its members end together.
    Gang(Hash, Draft, bool),
    /// It has ended.
    DropGang(Hash),
    /// An order that came to nothing.
    DropHeld(Hash),
    /// A receipt this node wrote.
    Receipt(LeaseId, u64, Draft),
    /// A countersignature this node received.
    Acknowledged(LeaseId, u64, Signed),
    /// A receipt this node received, with its countersignature.
    Countersigned(LeaseId, u64, Signed, Draft),
    /// An objection this node received.
    Objected(LeaseId, Signed),
    /// Two signed objects that contradict each other.
    Equivocation(Signed, Signed),
    /// That a key is believed again.
    Reinstated(KeyId, Signed),
    /// The operator wants this payload kept, whatever else needs its room.
    Pinned(Hash),
    /// No longer.
    Unpinned(Hash),
    /// The record of a request that this node served under a lease on a model.
    Served(LeaseId, u64, Draft),
    /// The record of a request that this node made under a lease on a model.
    Consumed(LeaseId, u64, Signed),
}

/// What the operator keeps out of new leases.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holdback {
    /// So much of the capacity.
    pub withheld: Resources,
    /// All of it: nothing is granted or renewed.
    pub drained: bool,
}

/// Why a kept record cannot be read back.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The key is of no known form.
    #[error("a kept record has an unknown key of {0} bytes")]
    Key(usize),
    /// The value does not decode.
    #[error("a kept record does not decode: {0}")]
    Value(#[from] DecodeError),
}

fn key(letter: u8, parts: &[&[u8]]) -> Vec<u8> {
    let mut key = vec![letter];
    parts.iter().for_each(|part| key.extend_from_slice(part));
    key
}

/// The prefix of every receipt that this node wrote for `lease`.
#[must_use]
pub fn receipts_of(lease: &LeaseId) -> Vec<u8> {
    key(b'r', &[&lease.0.0])
}

/// The prefix of every countersignature that this node received for `lease`.
#[must_use]
pub fn acknowledgements_of(lease: &LeaseId) -> Vec<u8> {
    key(b'a', &[&lease.0.0])
}

/// The prefix of every receipt that this node received for `lease`.
#[must_use]
pub fn countersigned_of(lease: &LeaseId) -> Vec<u8> {
    key(b'c', &[&lease.0.0])
}

/// The prefix of every record of a request that this node served under `lease`.
#[must_use]
pub fn served_of(lease: &LeaseId) -> Vec<u8> {
    key(b's', &[&lease.0.0])
}

/// The prefix of every record of a request that this node made under `lease`.
#[must_use]
pub fn consumed_of(lease: &LeaseId) -> Vec<u8> {
    key(b'u', &[&lease.0.0])
}

/// The key of a lease this node granted.
#[must_use]
pub fn lent_key(lease: &LeaseId) -> Vec<u8> {
    key(b'L', &[&lease.0.0])
}

/// The prefix of every order and lease this node holds.
pub const HELD_PREFIX: &[u8] = b"H";

impl Kept {
    /// Where it is kept.
    #[must_use]
    pub fn key(&self) -> Vec<u8> {
        match self {
            Self::Epoch(_) => key(b'e', &[]),
            Self::Halted(_) => key(b'h', &[]),
            Self::Lent(lease, _) => lent_key(lease),
            Self::Claimed(lease, _) | Self::DropClaimed(lease) => key(b'j', &[&lease.0.0]),
            Self::Holdback(_) => key(b'w', &[]),
            Self::Gang(gang, ..) | Self::DropGang(gang) => key(b'g', &[&gang.0]),
            Self::Held(order, _) | Self::DropHeld(order) => key(b'H', &[&order.0]),
            Self::Receipt(lease, n, _) => key(b'r', &[&lease.0.0, &n.to_be_bytes()]),
            Self::Acknowledged(lease, n, _) => key(b'a', &[&lease.0.0, &n.to_be_bytes()]),
            Self::Countersigned(lease, n, ..) => key(b'c', &[&lease.0.0, &n.to_be_bytes()]),
            Self::Objected(lease, signed) => key(b'o', &[&lease.0.0, &signed.id().0]),
            Self::Reinstated(of, _) => key(b'R', &[&of.0]),
            Self::Equivocation(a, b) => key(b'q', &[&a.id().0, &b.id().0]),
            Self::Pinned(root) | Self::Unpinned(root) => key(b'p', &[&root.0]),
            Self::Served(lease, n, _) => key(b's', &[&lease.0.0, &n.to_be_bytes()]),
            Self::Consumed(lease, n, _) => key(b'u', &[&lease.0.0, &n.to_be_bytes()]),
        }
    }

    /// What is kept there; `None` takes away what was.
    ///
    /// # Errors
    /// When it is longer than [`MAX_VALUE`].
    pub fn value(&self) -> Result<Option<Vec<u8>>, EncodeError> {
        fn put(value: &impl Serialize) -> Result<Option<Vec<u8>>, EncodeError> {
            wire::encode::<MAX_VALUE>(value).map(Some)
        }
        match self {
            Self::Epoch(epoch) | Self::Halted(epoch) => put(epoch),
            Self::Lent(_, lent) => put(lent),
            Self::Held(_, held) => put(held),
            Self::Holdback(holdback) => put(holdback),
            Self::Gang(_, draft, together) => put(&(draft, together)),
            Self::Pinned(_) => put(&()),
            Self::DropHeld(_) | Self::DropClaimed(_) | Self::DropGang(_) | Self::Unpinned(_) => {
                Ok(None)
            }
            Self::Receipt(_, _, draft) | Self::Served(_, _, draft) => put(draft),
            Self::Acknowledged(_, _, signed)
            | Self::Consumed(_, _, signed)
            | Self::Objected(_, signed)
            | Self::Claimed(_, signed)
            | Self::Reinstated(_, signed) => put(signed),
            Self::Countersigned(_, _, receipt, ack) => put(&(receipt, ack)),
            Self::Equivocation(a, b) => put(&(a, b)),
        }
    }

    /// Reads back what was kept.
    ///
    /// # Errors
    /// When key or value are not of a form that [`Kept::key`] and [`Kept::value`] write.
    pub fn read(key: &[u8], value: &[u8]) -> Result<Self, ReadError> {
        fn get<T: DeserializeOwned>(value: &[u8]) -> Result<T, ReadError> {
            Ok(wire::decode::<MAX_VALUE, T>(value)?)
        }
        let unknown = || ReadError::Key(key.len());
        let (letter, rest) = key.split_first().ok_or_else(unknown)?;
        let hash = || -> Option<Hash> { Some(Hash(*rest.first_chunk()?)) };
        let lease = || hash().map(LeaseId).ok_or_else(unknown);
        let number = || -> Result<u64, ReadError> {
            let bytes = rest.get(32..).and_then(|tail| tail.first_chunk());
            bytes.map(|bytes| u64::from_be_bytes(*bytes)).ok_or_else(unknown)
        };
        Ok(match letter {
            b'e' => Self::Epoch(get(value)?),
            b'h' => Self::Halted(get(value)?),
            b'L' => Self::Lent(lease()?, get(value)?),
            b'j' => Self::Claimed(lease()?, get(value)?),
            b'w' => Self::Holdback(get(value)?),
            b'g' => {
                let (draft, together) = get(value)?;
                Self::Gang(hash().ok_or_else(unknown)?, draft, together)
            }
            b'H' => Self::Held(hash().ok_or_else(unknown)?, get(value)?),
            b'r' => Self::Receipt(lease()?, number()?, get(value)?),
            b'a' => Self::Acknowledged(lease()?, number()?, get(value)?),
            b'c' => {
                let (receipt, ack) = get(value)?;
                Self::Countersigned(lease()?, number()?, receipt, ack)
            }
            b'o' => Self::Objected(lease()?, get(value)?),
            b'p' => Self::Pinned(hash().ok_or_else(unknown)?),
            b's' => Self::Served(lease()?, number()?, get(value)?),
            b'u' => Self::Consumed(lease()?, number()?, get(value)?),
            b'R' => Self::Reinstated(KeyId(hash().ok_or_else(unknown)?.0), get(value)?),
            b'q' => {
                let (a, b) = get(value)?;
                Self::Equivocation(a, b)
            }
            _ => return Err(unknown()),
        })
    }
}

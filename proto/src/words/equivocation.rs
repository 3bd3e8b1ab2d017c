//! The proof that a key said two different things where it may say but one, and what lifts its
//! consequences.
//!
//! An honest node signs at most one body under one (kind, subject, epoch, number). Two of them are
//! a proof that needs nothing else: not who met them, not when, and no trust in who shows them. It
//! says that at least one of the two is a lie, or that two nodes run with one key.

use serde::{Deserialize, Serialize};

use super::object::{Header, Kind};
use super::sign::{Signed, VerifyError};
use crate::base::id::{FabricId, KeyId};

/// Two objects that contradict each other, as they travel and are kept.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Equivocation {
    /// One of them.
    pub first: Signed,
    /// The other.
    pub second: Signed,
}

/// A proof that was checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Conviction {
    proof: Equivocation,
    header: Header,
}

/// Why two objects prove nothing.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotEquivocation {
    /// One does not verify.
    #[error("one of the two does not verify: {0}")]
    Object(#[from] VerifyError),
    /// They are the same.
    #[error("both are the same object")]
    Same,
    /// They are about different things.
    #[error("they differ in {0}: an honest key may sign both")]
    Differ(&'static str),
    /// A person's key may sign two of this kind.
    #[error("two objects of kind {0} prove nothing: people sign them, and may sign several")]
    Kind(Kind),
}

impl Equivocation {
    /// Checks that both are of `fabric`, by one key, under one version, and different.
    ///
    /// # Errors
    /// Why they prove nothing.
    pub fn check(&self, fabric: &FabricId) -> Result<Conviction, NotEquivocation> {
        let (one, two) = (self.first.header(), self.second.header());
        let (one, two) = (one.map_err(VerifyError::from)?, two.map_err(VerifyError::from)?);
        let differ = [
            (one.signer != two.signer, "their signer"),
            (one.kind != two.kind, "their kind"),
            (one.subject != two.subject, "their subject"),
            (one.epoch != two.epoch, "their epoch"),
            (one.seq != two.seq, "their number"),
        ];
        if let Some((_, what)) = differ.into_iter().find(|(differs, _)| *differs) {
            return Err(NotEquivocation::Differ(what));
        }
        // What people sign carries the time as its epoch, and a request may be worded anew.
        if matches!(one.kind, Kind::Charter | Kind::Certificate | Kind::Mandate | Kind::Order) {
            return Err(NotEquivocation::Kind(one.kind));
        }
        if self.first.id() == self.second.id() {
            return Err(NotEquivocation::Same);
        }
        self.first.verify_opaque(fabric)?;
        self.second.verify_opaque(fabric)?;
        Ok(Conviction { proof: self.clone(), header: one })
    }
}

impl Conviction {
    /// Whose key it is.
    #[must_use]
    pub const fn signer(&self) -> KeyId {
        self.header.signer
    }

    /// What both objects say they are.
    #[must_use]
    pub const fn header(&self) -> &Header {
        &self.header
    }

    /// The two objects.
    #[must_use]
    pub const fn proof(&self) -> &Equivocation {
        &self.proof
    }
}

/// That an organisation lets a key of its own be believed again, in later epochs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reinstatement {
    /// The organisation, as the charter names it; its root key signs.
    pub organisation: String,
    /// The key.
    pub key: KeyId,
    /// What it signed in this epoch or before is void, and so are proofs about those.
    pub above: u64,
}

/// The highest epoch above which a key is reinstated: what is left lasts for every later start.
const MAX_ABOVE: u64 = 1 << 62;

impl Reinstatement {
    pub(super) fn check(&self) -> Result<(), &'static str> {
        if self.organisation.is_empty() || self.organisation.len() > super::charter::MAX_NAME {
            return Err("a reinstatement names an organisation in at most 64 bytes");
        }
        // A node goes on above it, by one epoch a start.
        if self.above > MAX_ABOVE {
            return Err("a reinstatement is above an epoch of at most 2^62");
        }
        Ok(())
    }
}

//! Who belongs: judges certificates and mandates against the charter.
//!
//! `words::sign` says that a signature holds; this mind says whether the signer counts. The wall
//! clock that it judges validity by is the judge's own, with [`SKEW`] of patience for others'.

use crate::base::id::{FabricId, Hash, KeyId};
use crate::base::money::Amount;
use crate::base::time::{SKEW, Span, Wall};
use crate::words::charter::{Certificate, Charter, Role};
use crate::words::contract::{Authority, Grant, Mandate, Order};
use crate::words::equivocation::Reinstatement;
use crate::words::sign::{Signed, Verified, VerifyError, is_usable};

/// The fabric this node belongs to.
#[derive(Clone, Debug)]
pub struct Admission {
    fabric: FabricId,
    charter: Verified<Charter>,
}

/// Why a charter founds no fabric.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum CharterError {
    /// It does not verify.
    #[error("the charter does not verify: {0}")]
    Verify(#[from] VerifyError),
    /// It is not signed by one of its organisations.
    #[error("the charter is not signed by one of the organisations it names")]
    Signer,
    /// It is not a first charter.
    #[error("charter number {0} cannot found a fabric: start from number 1")]
    NotFirst(u32),
}

/// Why a key is not admitted.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotAdmitted {
    /// No organisation of the charter signed the certificate.
    #[error("the certificate is not signed by an organisation of this fabric's charter")]
    Issuer,
    /// It is signed by an organisation in another one's name.
    #[error("the certificate names another organisation than the one that signed it")]
    Organisation,
    /// It admits in another role.
    #[error("the certificate admits the key in another role")]
    Role,
    /// It is for another key.
    #[error("the certificate is for another key")]
    Key,
    /// It is not valid yet.
    #[error("the certificate is not valid yet")]
    NotYet,
    /// It is no longer valid.
    #[error("the certificate has expired")]
    Expired,
}

/// Why papers do not entitle to an order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotEntitled {
    /// The lessee is not admitted.
    #[error("the lessee is not admitted: {0}")]
    Lessee(NotAdmitted),
    /// The order is signed by neither lessee nor delegate.
    #[error("the order is not signed by the one whom its papers entitle")]
    Signer,
    /// The mandate is not the lessee's, or not for this delegate.
    #[error("the mandate is by or for somebody else")]
    Parties,
    /// The mandate is not valid now.
    #[error("the mandate is not valid at this time")]
    Time,
    /// The mandate does not allow this lessor.
    #[error("the mandate does not allow this lessor")]
    Lessor,
    /// The order exceeds what the mandate allows.
    #[error("the order exceeds the mandate's {0}")]
    Exceeds(&'static str),
}

/// Why an order may not be granted at a time, or not at all under this charter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotTimely {
    /// Its validity was over.
    #[error("it had expired when it was granted")]
    Expired,
    /// It was placed later, by the lessee's clock.
    #[error("it was placed after it was granted")]
    Future,
    /// It is valid for longer than the charter allows.
    #[error("it is valid for too long")]
    TooLong,
    /// Its term is longer than the charter allows.
    #[error("its term is longer than the charter allows")]
    Term,
}

impl Admission {
    /// Takes a first charter as the foundation of a fabric. Whether it is the right one is for
    /// the caller to know, by its fingerprint.
    ///
    /// # Errors
    /// When it does not verify or cannot found a fabric.
    pub fn found(charter: &Signed) -> Result<Self, CharterError> {
        let charter: Verified<Charter> = charter.verify(&FabricId::default())?;
        if charter.body().organisation_of(&charter.signer()).is_none() {
            return Err(CharterError::Signer);
        }
        if charter.body().number != 1 {
            return Err(CharterError::NotFirst(charter.body().number));
        }
        Ok(Self { fabric: FabricId(charter.id()), charter })
    }

    /// The fabric's id.
    #[must_use]
    pub const fn fabric(&self) -> FabricId {
        self.fabric
    }

    /// The charter in force.
    #[must_use]
    pub fn charter(&self) -> &Charter {
        self.charter.body()
    }

    /// The charter in force, as signed.
    #[must_use]
    pub fn signed_charter(&self) -> &Signed {
        self.charter.signed()
    }

    /// The hash of the charter in force.
    #[must_use]
    pub fn charter_id(&self) -> Hash {
        self.charter.id()
    }

    /// Whether `certificate` admits `key` as `role` at `at`.
    ///
    /// # Errors
    /// Why not.
    pub fn admits(
        &self,
        certificate: &Verified<Certificate>,
        key: &KeyId,
        role: Role,
        at: Wall,
    ) -> Result<(), NotAdmitted> {
        let body = certificate.body();
        let issuer = self.charter().organisation_of(&certificate.signer());
        let issuer = issuer.ok_or(NotAdmitted::Issuer)?;
        if issuer.name != body.organisation {
            return Err(NotAdmitted::Organisation);
        }
        if body.role != role {
            return Err(NotAdmitted::Role);
        }
        if body.key != *key || certificate.header().subject.0 != key.0 || !is_usable(key) {
            return Err(NotAdmitted::Key);
        }
        if body.not_before > at + SKEW {
            return Err(NotAdmitted::NotYet);
        }
        if certificate.header().not_after + SKEW < at {
            return Err(NotAdmitted::Expired);
        }
        Ok(())
    }

    /// Whether `order` may be granted at `decided`, by the lessor's wall clock. The lessor judges
    /// by this before it grants, and whoever checks the proof judges by it again.
    ///
    /// # Errors
    /// Why not.
    pub fn timely(&self, order: &Verified<Order>, decided: Wall) -> Result<(), NotTimely> {
        let limits = &self.charter().limits;
        let (not_after, placed) = (order.header().not_after, order.body().placed);
        if not_after + SKEW < decided {
            return Err(NotTimely::Expired);
        }
        if placed > decided + SKEW {
            return Err(NotTimely::Future);
        }
        if not_after > placed + limits.max_order_life + SKEW {
            return Err(NotTimely::TooLong);
        }
        if order.body().longest > limits.max_term {
            return Err(NotTimely::Term);
        }
        Ok(())
    }

    /// Whether the organisation that `reinstatement` names signed it.
    #[must_use]
    pub fn reinstates(&self, reinstatement: &Verified<Reinstatement>) -> bool {
        let issuer = self.charter().organisation_of(&reinstatement.signer());
        issuer.is_some_and(|issuer| issuer.name == reinstatement.body().organisation)
    }

    /// Whether the papers entitle the signer of `order` to place it at `at`.
    ///
    /// # Errors
    /// Why not.
    pub fn entitles(
        &self,
        order: &Verified<Order>,
        mandate: Option<&Verified<Mandate>>,
        certificate: &Verified<Certificate>,
        at: Wall,
    ) -> Result<(), NotEntitled> {
        let body = order.body();
        self.admits(certificate, &body.lessee, Role::Tenant, at).map_err(NotEntitled::Lessee)?;
        match (&body.authority, mandate) {
            (Authority::Lessee(_), None) if order.signer() == body.lessee => Ok(()),
            (Authority::Mandate(_), Some(mandate)) if order.signer() == body.delegate => {
                within_mandate(body, mandate, at)
            }
            _ => Err(NotEntitled::Signer),
        }
    }
}

fn within_mandate(order: &Order, mandate: &Verified<Mandate>, at: Wall) -> Result<(), NotEntitled> {
    let terms = mandate.body();
    if mandate.signer() != order.lessee || terms.delegate != order.delegate {
        return Err(NotEntitled::Parties);
    }
    if terms.not_before > at + SKEW || mandate.header().not_after + SKEW < at {
        return Err(NotEntitled::Time);
    }
    if !terms.lessors.is_empty() && !terms.lessors.contains(&order.lessor) {
        return Err(NotEntitled::Lessor);
    }
    match exceeded(terms, order.ceiling, order.cap, order.longest) {
        Some(what) => Err(NotEntitled::Exceeds(what)),
        None => Ok(()),
    }
}

/// Which limit of a mandate these ask to exceed.
#[must_use]
pub fn exceeded(
    terms: &Mandate,
    hourly: Amount,
    total: Amount,
    term: Span,
) -> Option<&'static str> {
    [
        (hourly > terms.max_hourly, "hourly price"),
        (total > terms.max_total, "total price"),
        (term > terms.max_term, "term"),
    ]
    .into_iter()
    .find_map(|(exceeds, what)| exceeds.then_some(what))
}

/// What a grant says differently than its order allows; `None` when it keeps to it.
#[must_use]
pub fn departure((order, asked): (Hash, &Order), grant: &Verified<Grant>) -> Option<&'static str> {
    let given = grant.body();
    [
        (given.order != order, "it answers another order"),
        (grant.signer() != asked.lessor, "another lessor signed it"),
        (given.lessee != asked.lessee, "it names another lessee"),
        (given.delegate != asked.delegate, "it names another delegate"),
        (given.shape != asked.shape, "it lends another shape"),
        (given.model != asked.model, "it lends another model, or at another price"),
        (given.class != asked.class, "it lends in another class"),
        (given.term != asked.term, "it has another term"),
        (given.longest != asked.longest, "it may be renewed to another term"),
        (given.gang != asked.gang, "it is for another gang"),
        (given.claim_within != asked.claim_within, "it has another time to claim"),
        (given.rate > asked.ceiling, "its price is above the order's ceiling"),
        (given.cap != asked.cap, "it has another cap"),
        (given.exposure != asked.exposure, "it has another limit of exposure"),
        (given.receipt_every < asked.receipt_every, "its receipts come too often"),
    ]
    .into_iter()
    .find_map(|(departs, how)| departs.then_some(how))
}

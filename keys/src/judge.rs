//! Verifying with no network and no node: whole proofs, and single signed objects.
//!
//! A signature that holds says who said something; a charter says whether that one counts. Where
//! no charter is given, the second question stays open and the answer says so.

use leasehold_proto::base::time::SKEW;
use leasehold_proto::minds::admission::{Admission, CharterError, NotAdmitted, NotEntitled};
use leasehold_proto::proof::{self, Proof, ProofError, Verdict};
use leasehold_proto::words::charter::{Certificate, Role};
use leasehold_proto::words::equivocation::{Conviction, Equivocation, NotEquivocation};
use leasehold_proto::words::message::{
    GrantPapers, OrderPapers, RecordSaid, verify_grant, verify_order, verify_record,
};
use leasehold_proto::words::object::{Kind, Object};
use leasehold_proto::words::sign::{Signed, Verified, VerifyError};
use leasehold_proto::words::wire::DecodeError;
use leasehold_proto::{FabricId, Hash, KeyId, Wall};
use serde::Serialize;

/// Why something does not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum NotVerified {
    /// A proof does not hold.
    #[error("the proof does not hold: {0}")]
    Proof(#[from] ProofError),
    /// It belongs to another fabric than asked for.
    #[error("it belongs to fabric {got}, not to {expected}")]
    Fabric {
        /// What was asked for.
        expected: FabricId,
        /// What it is.
        got: FabricId,
    },
    /// An object does not verify.
    #[error("{kind}: {why}")]
    Object {
        /// What it says it is.
        kind: Kind,
        /// Why not.
        why: VerifyError,
    },
    /// An object's envelope does not decode.
    #[error("it is no signed object: {0}")]
    Decode(#[from] DecodeError),
    /// A charter founds no fabric.
    #[error("{0}")]
    Charter(#[from] CharterError),
    /// The charter does not admit the one who counts.
    #[error("{kind}: {why}")]
    NotAdmitted {
        /// What it is.
        kind: Kind,
        /// Why not.
        why: NotAdmitted,
    },
    /// An order's papers do not entitle to it, or a mandate does not hold now.
    #[error("not entitled: {0}")]
    NotEntitled(#[from] NotEntitled),
    /// Two objects do not contradict each other.
    #[error("it proves nothing: {0}")]
    Equivocation(#[from] NotEquivocation),
    /// It is a draft.
    #[error("it is an unsigned draft: it proves nothing")]
    Unsigned,
}

/// A single object whose signature holds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Held {
    /// What it is.
    pub kind: Kind,
    /// Its identity.
    pub id: Hash,
    /// Who signed it.
    pub signer: KeyId,
    /// The fabric it belongs to; of a charter, the one it founds.
    pub fabric: FabricId,
    /// Until when it is valid.
    pub not_after: Wall,
    /// Whether the charter was found to admit the one who counts; `None` when that was not asked
    /// or is not said by this object alone.
    pub admitted: Option<bool>,
}

/// Checks a whole proof, and that it is of `fabric` where one is given.
///
/// # Errors
/// The first thing that does not hold.
pub fn proof(proof: &Proof, fabric: Option<&FabricId>) -> Result<Verdict, NotVerified> {
    let verdict = proof::check(proof)?;
    same_fabric(fabric, verdict.fabric)?;
    Ok(verdict)
}

/// Checks that two objects prove that their signer said two different things under one version.
///
/// # Errors
/// Why they prove nothing, or that they are of another fabric than asked for.
pub fn equivocation(
    both: &Equivocation,
    fabric: Option<&FabricId>,
) -> Result<Conviction, NotVerified> {
    let header = both.first.header()?;
    same_fabric(fabric, header.fabric)?;
    Ok(both.check(&header.fabric)?)
}

fn same_fabric(expected: Option<&FabricId>, got: FabricId) -> Result<(), NotVerified> {
    match expected {
        Some(expected) if *expected != got => Err(NotVerified::Fabric { expected: *expected, got }),
        _ => Ok(()),
    }
}

/// Checks a single object: its signature, its fabric where one is given, and with a charter
/// whether its signer counts. What an order or grant says is judged at the time it names; a
/// certificate, mandate or host record is judged at `now`.
///
/// # Errors
/// The first thing that does not hold.
pub fn object(
    signed: &Signed,
    fabric: Option<&FabricId>,
    charter: Option<&Signed>,
    now: Wall,
) -> Result<Held, NotVerified> {
    let header = signed.header()?;
    let kind = header.kind;
    let object = Object::verify(signed).map_err(|why| NotVerified::Object { kind, why })?;
    let admission = charter.map(Admission::found).transpose()?;
    let of = match &object {
        // A first charter names no fabric: it is one.
        Object::Charter(charter) if charter.body().number == 1 => {
            Admission::found(charter.signed())?.fabric()
        }
        other => other.header().fabric,
    };
    same_fabric(fabric, of)?;
    let admitted = match &admission {
        Some(admission) => {
            same_fabric(Some(&admission.fabric()), of)?;
            admitted(&object, signed, admission, now)?
        }
        None => None,
    };
    let (signer, not_after) = (header.signer, header.not_after);
    Ok(Held { kind, id: signed.id(), signer, fabric: of, not_after, admitted })
}

fn admitted(
    object: &Object,
    signed: &Signed,
    admission: &Admission,
    now: Wall,
) -> Result<Option<bool>, NotVerified> {
    let fabric = admission.fabric();
    let kind = object.header().kind;
    let unverified = |why| NotVerified::Object { kind, why };
    let admits = |certificate: &Verified<Certificate>, key: &KeyId, role, at| {
        admission
            .admits(certificate, key, role, at)
            .map(|()| Some(true))
            .map_err(|why| NotVerified::NotAdmitted { kind, why })
    };
    match object {
        Object::Charter(_) => Ok(Some(true)),
        Object::Certificate(certificate) => {
            admits(certificate, &certificate.body().key, certificate.body().role, now)
        }
        Object::HostRecord(_) => match verify_record(signed, &fabric).map_err(unverified)? {
            RecordSaid::Host(record, certificate) => {
                admits(&certificate, &record.signer(), Role::Node, now)
            }
            _ => Ok(None),
        },
        Object::Mandate(mandate) => {
            let (from, until) = (mandate.body().not_before, mandate.header().not_after);
            if from > now + SKEW || until + SKEW < now {
                return Err(NotEntitled::Time.into());
            }
            let certificate = mandate.body().certificate.verify(&fabric).map_err(unverified)?;
            admits(&certificate, &mandate.signer(), Role::Tenant, now)
        }
        Object::Order(_) => {
            let OrderPapers { order, mandate, certificate } =
                verify_order(signed, &fabric).map_err(unverified)?;
            admission.entitles(&order, mandate.as_ref(), &certificate, order.body().placed)?;
            Ok(Some(true))
        }
        Object::Reinstatement(reinstatement) => Ok(Some(admission.reinstates(reinstatement))),
        Object::Grant(_) => {
            let GrantPapers { grant, certificate } =
                verify_grant(signed, &fabric).map_err(unverified)?;
            admits(&certificate, &grant.signer(), Role::Node, grant.body().decided)
        }
        _ => Ok(None),
    }
}

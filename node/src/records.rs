//! Reading back what was kept: the proof of a lease, from either side.

use leasehold_proto::core::Kept;
use leasehold_proto::core::kept::{
    HELD_PREFIX, ReadError, acknowledgements_of, consumed_of, countersigned_of, lent_key,
    receipts_of, served_of,
};
use leasehold_proto::minds::book::Lent;
use leasehold_proto::minds::holdings::{Held, Placed};
use leasehold_proto::proof::Proof;
use leasehold_proto::words::contract::Grant;
use leasehold_proto::words::object::body_in;
use leasehold_proto::words::sign::{Draft, Signed, Signer, VerifyError};
use leasehold_proto::{KeyId, LeaseId};

use crate::store::{ReadFault, Store};

/// Why there is no proof of a lease.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// It was never kept here.
    #[error("no lease {0} was ever granted or held here")]
    Unknown(LeaseId),
    /// It was ordered but never granted.
    #[error("lease {0} was never granted")]
    NotGranted(LeaseId),
    /// The store does not read.
    #[error(transparent)]
    Store(#[from] ReadFault),
    /// A record does not read.
    #[error(transparent)]
    Record(#[from] ReadError),
    /// A draft cannot be signed again.
    #[error("cannot sign what was kept: {0}")]
    Sign(#[from] VerifyError),
}

/// Everything kept here that proves `lease`. Drafts are signed again: Ed25519 is deterministic,
/// so the bytes are those that were sent.
///
/// # Errors
/// When the lease is unknown here or something does not read.
pub async fn proof(
    store: &Store,
    signer: &Signer,
    charter: &Signed,
    lease: LeaseId,
) -> Result<Proof, ProofError> {
    let lent = store.scan(&lent_key(&lease)).await?;
    for (key, value) in lent {
        if let Kept::Lent(_, lent) = Kept::read(&key, &value)? {
            return from_lessor(store, signer, charter, lease, &lent).await;
        }
    }
    for (key, value) in store.scan(HELD_PREFIX).await? {
        if let Kept::Held(_, held) = Kept::read(&key, &value)?
            && held.grant.as_ref().map(Signed::id) == Some(lease.0)
        {
            return from_lessee(store, signer, charter, lease, &held).await;
        }
    }
    Err(ProofError::Unknown(lease))
}

/// Who may ask for the records of a lease that this node granted, and those from a number on, signed; at
/// most so many.
///
/// # Errors
/// As for [`proof`].
pub async fn served(
    store: &Store,
    signer: &Signer,
    lease: LeaseId,
    (from, most): (u64, usize),
) -> Result<(KeyId, Vec<Signed>), ProofError> {
    let mut delegate = None;
    for (key, value) in store.scan(&lent_key(&lease)).await? {
        if let Kept::Lent(_, lent) = Kept::read(&key, &value)? {
            delegate = body_in::<Grant>(&lent.grant.envelope).map(|grant| grant.delegate);
        }
    }
    let delegate = delegate.ok_or(ProofError::Unknown(lease))?;
    let mut records = Vec::new();
    for (key, value) in store.scan(&served_of(&lease)).await? {
        if let Kept::Served(_, number, draft) = Kept::read(&key, &value)?
            && number >= from
            && records.len() < most
        {
            records.push(signer.sign(&draft)?);
        }
    }
    Ok((delegate, records))
}

async fn from_lessor(
    store: &Store,
    signer: &Signer,
    charter: &Signed,
    lease: LeaseId,
    lent: &Lent,
) -> Result<Proof, ProofError> {
    let sign = |draft: &Draft| signer.sign(draft);
    let mut receipts = Vec::new();
    for (key, value) in store.scan(&receipts_of(&lease)).await? {
        if let Kept::Receipt(_, _, draft) = Kept::read(&key, &value)? {
            receipts.push(sign(&draft)?);
        }
    }
    let mut acknowledgements = Vec::new();
    for (key, value) in store.scan(&acknowledgements_of(&lease)).await? {
        if let Kept::Acknowledged(_, _, signed) = Kept::read(&key, &value)? {
            acknowledgements.push(signed);
        }
    }
    let mut served = Vec::new();
    for (key, value) in store.scan(&served_of(&lease)).await? {
        if let Kept::Served(_, _, draft) = Kept::read(&key, &value)? {
            served.push(sign(&draft)?);
        }
    }
    let mut renewals = Vec::new();
    if let Some(renew) = &lent.renew {
        renewals.push(renew.clone());
        if let Some(act) = lent.acts.iter().find(|act| act.of == renew.id()) {
            renewals.push(sign(&act.answer)?);
        }
    }
    Ok(Proof {
        charter: charter.clone(),
        offer: lent.offer.as_ref().map(sign).transpose()?,
        order: lent.order.clone(),
        grant: sign(&lent.grant)?,
        renewals,
        receipts,
        acknowledgements,
        served,
        termination: lent.termination.as_ref().map(sign).transpose()?,
    })
}

async fn from_lessee(
    store: &Store,
    signer: &Signer,
    charter: &Signed,
    lease: LeaseId,
    held: &Held,
) -> Result<Proof, ProofError> {
    let mut receipts = Vec::new();
    let mut acknowledgements = Vec::new();
    for (key, value) in store.scan(&countersigned_of(&lease)).await? {
        if let Kept::Countersigned(_, _, receipt, ack) = Kept::read(&key, &value)? {
            receipts.push(receipt);
            acknowledgements.push(signer.sign(&ack)?);
        }
    }
    let mut served = Vec::new();
    for (key, value) in store.scan(&consumed_of(&lease)).await? {
        if let Kept::Consumed(_, _, signed) = Kept::read(&key, &value)? {
            served.push(signed);
        }
    }
    let order = match &held.order {
        Placed::Here(draft) => signer.sign(draft)?,
        Placed::Elsewhere(signed) => signed.clone(),
    };
    let mut renewals = Vec::new();
    if let Some((renew, _)) = &held.renew {
        renewals.push(signer.sign(renew)?);
    }
    renewals.extend(held.renewal.clone());
    Ok(Proof {
        charter: charter.clone(),
        offer: held.offer.clone(),
        order,
        grant: held.grant.clone().ok_or(ProofError::NotGranted(lease))?,
        renewals,
        receipts,
        acknowledgements,
        served,
        termination: held.closing().cloned(),
    })
}

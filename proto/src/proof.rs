//! A lease with everything that proves it, and the check that needs no network and no node.
//!
//! [`check`] recomputes the whole story from the signed objects alone: the charter founds the
//! fabric, certificates admit the parties, the mandate allows the order, the grant keeps to it,
//! the receipts chain and their charges follow from the rate, the lessee countersigned them, and
//! the termination closes at the last one. What it does not prove: that the work was right.

use serde::{Deserialize, Serialize};

use crate::base::id::{FabricId, Hash, KeyId, LeaseId};
use crate::base::money::Amount;
use crate::base::time::{Span, Wall};
use crate::minds::admission::{
    Admission, CharterError, NotAdmitted, NotEntitled, NotTimely, departure,
};
use crate::words::chain::Chain;
use crate::words::charter::Role;
use crate::words::contract::{EndReason, Grant, Renew, Renewal, Termination};
use crate::words::message::{GrantPapers, OrderPapers, verify_grant, verify_order};
use crate::words::model::{ModelTerms, Served, Tally};
use crate::words::object::Kind;
use crate::words::record::Offer;
use crate::words::sign::{Signed, Verified, VerifyError};
use crate::words::usage::{Acknowledgement, ObjectionReason, Receipt, Usage};

/// The most receipts that one proof may hold.
pub const MAX_RECEIPTS: usize = 1 << 20;
/// The most requests to a model that one proof may hold.
pub const MAX_REQUESTS: usize = 1 << 20;
/// The most objects about the last renewal.
const MAX_RENEWALS: usize = 2;

/// A lease with its papers, as exported from a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proof {
    /// The charter that founds the fabric.
    pub charter: Signed,
    /// The offer that fixed the price, when the exporter still had it.
    pub offer: Option<Signed>,
    /// The order, with mandate and certificates inside.
    pub order: Signed,
    /// The grant, with the lessor's certificate inside.
    pub grant: Signed,
    /// The renewal that was agreed last: the lessee's act, the lessor's yes to it, or both.
    pub renewals: Vec<Signed>,
    /// All receipts in order.
    pub receipts: Vec<Signed>,
    /// The acknowledgements that the exporter has, in order; one covers all before it.
    pub acknowledgements: Vec<Signed>,
    /// Of a lease on a model: the record of every request, in order.
    pub served: Vec<Signed>,
    /// How the lease ended, if it did.
    pub termination: Option<Signed>,
}

/// What a proof shows.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Verdict {
    /// The fabric.
    pub fabric: FabricId,
    /// The currency of every amount.
    pub currency: String,
    /// The lease.
    pub lease: LeaseId,
    /// Who lent.
    pub lessor: KeyId,
    /// Who borrowed and owes.
    pub lessee: KeyId,
    /// Who acted for the lessee.
    pub delegate: KeyId,
    /// The model whose tokens were lent, and at what price, if it was one.
    pub model: Option<ModelTerms>,
    /// The price per hour.
    pub rate: Amount,
    /// How long it was, renewals included.
    pub term: Span,
    /// The most it could cost.
    pub worst_case: Amount,
    /// When it was granted, by the lessor's wall clock.
    pub decided: Wall,
    /// How many receipts there are.
    pub receipts: u64,
    /// Usage by the last receipt.
    pub usage: Usage,
    /// What is owed by the last receipt.
    pub charge: Amount,
    /// Up to which receipt the lessee countersigned.
    pub acknowledged: u64,
    /// What the lessee agreed to owe.
    pub acknowledged_charge: Amount,
    /// What the lessor owes back, because its side ended the lease.
    pub credit: Amount,
    /// Why it ended; `None` while it runs or where no termination was exported.
    pub end: Option<EndReason>,
    /// How many requests to a model were checked one by one: all that the last receipt covers, where
    /// their records were exported.
    pub requests_checked: u64,
    /// Whether the price could be recomputed from the offer named in the order.
    pub price_checked: bool,
}

/// The first thing in a proof that does not hold.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProofError {
    /// The charter founds no fabric.
    #[error("charter: {0}")]
    Charter(#[from] CharterError),
    /// An object does not verify.
    #[error("{what}: {why}")]
    Object {
        /// Which object.
        what: String,
        /// Why not.
        why: VerifyError,
    },
    /// The lessor is not admitted.
    #[error("lessor: {0}")]
    Lessor(NotAdmitted),
    /// The order is not covered by its papers.
    #[error("order: {0}")]
    Order(NotEntitled),
    /// The order was not one to be granted when it was.
    #[error("order: {0}")]
    Terms(NotTimely),
    /// The grant departs from its order.
    #[error("grant: {0}")]
    Grant(&'static str),
    /// The price does not follow from the offer.
    #[error("offer: {0}")]
    Offer(&'static str),
    /// A renewal is not one of this lease.
    #[error("renewal: {0}")]
    Renewal(&'static str),
    /// A receipt does not follow from the one before it.
    #[error("receipt {number}: {}", objection(.reason))]
    Receipt {
        /// Which receipt, counting from one.
        number: u64,
        /// What is wrong.
        reason: ObjectionReason,
    },
    /// A receipt or acknowledgement is signed by somebody else, or about another lease.
    #[error("{what} {number}: it is not by or about the parties of this lease")]
    Parties {
        /// What sort of object.
        what: &'static str,
        /// Which one, counting from one.
        number: u64,
    },
    /// The record of a request does not follow from those before it.
    #[error("request {number}: {why}")]
    Request {
        /// Which request, counting from one.
        number: u64,
        /// What is wrong.
        why: &'static str,
    },
    /// An acknowledgement matches no receipt.
    #[error("acknowledgement {0}: it matches no receipt of this lease")]
    Acknowledgement(u64),
    /// The termination does not close the receipts.
    #[error("termination: {0}")]
    Termination(&'static str),
    /// More receipts than are read.
    #[error("more than {MAX_RECEIPTS} receipts")]
    TooMany,
    /// More requests than are read.
    #[error("more than {MAX_REQUESTS} requests")]
    TooManyRequests,
}

const fn objection(reason: &ObjectionReason) -> &'static str {
    match reason {
        ObjectionReason::Chain => "it does not follow from the receipt before it",
        ObjectionReason::Time => "it bills more time than passed",
        ObjectionReason::Charge => "its charge does not follow from the price and what was used",
        ObjectionReason::Limit => "it says more than the lease allows",
        ObjectionReason::Tokens => "it counts requests that were not agreed on",
    }
}

/// Names the object that did not verify.
fn of<T>(what: &str, result: Result<T, VerifyError>) -> Result<T, ProofError> {
    result.map_err(|why| ProofError::Object { what: what.to_string(), why })
}

/// Checks a proof against the charter inside it. Whether that charter is the right one is for the
/// reader to know: compare [`Verdict::fabric`].
///
/// # Errors
/// The first thing that does not hold.
pub fn check(proof: &Proof) -> Result<Verdict, ProofError> {
    let admission = Admission::found(&proof.charter)?;
    let fabric = admission.fabric();
    let OrderPapers { order, mandate, certificate } =
        of("order", verify_order(&proof.order, &fabric))?;
    let GrantPapers { grant, certificate: lessor } =
        of("grant", verify_grant(&proof.grant, &fabric))?;
    let (asked, given) = (order.body(), grant.body());
    admission
        .entitles(&order, mandate.as_ref(), &certificate, given.decided)
        .map_err(ProofError::Order)?;
    admission
        .admits(&lessor, &grant.signer(), Role::Node, given.decided)
        .map_err(ProofError::Lessor)?;
    if let Some(how) = departure((order.id(), asked), &grant) {
        return Err(ProofError::Grant(how));
    }
    admission.timely(&order, given.decided).map_err(ProofError::Terms)?;
    let price_checked = match &proof.offer {
        None => false,
        Some(offer) => {
            let offer: Verified<Offer> = of("offer", offer.verify(&fabric))?;
            if offer.id() != asked.offer || offer.signer() != asked.lessor {
                return Err(ProofError::Offer("it is not the offer that the order names"));
            }
            let rate = match &given.model {
                Some(terms) => offer.body().sells_model(terms, asked.class).then_some(Amount::ZERO),
                None => offer.body().hourly(&asked.shape, asked.class),
            };
            if rate != Some(given.rate) {
                return Err(ProofError::Offer("the price granted does not follow from it"));
            }
            if offer.body().early != given.early {
                let how = "the grant says otherwise of an early end";
                return Err(ProofError::Offer(how));
            }
            true
        }
    };
    let lease = LeaseId(grant.id());
    let term = check_renewals(proof, &fabric, lease, &grant)?;
    let tallies = check_requests(proof, &fabric, lease, &grant)?;
    let (chain, hashes) = check_receipts(proof, &fabric, (lease, term), &grant, &tallies)?;
    let acknowledged = check_acknowledgements(proof, &fabric, lease, given.delegate, &hashes)?;
    let ended = check_termination(proof, &fabric, (lease, term), &grant, &chain)?;
    let (end, credit) = ended.map_or((None, Amount::ZERO), |(end, credit)| (Some(end), credit));
    Ok(Verdict {
        fabric,
        currency: admission.charter().currency.clone(),
        lease,
        lessor: grant.signer(),
        lessee: given.lessee,
        delegate: given.delegate,
        model: given.model.clone(),
        rate: given.rate,
        term,
        worst_case: given.worst_case_over(term),
        decided: given.decided,
        receipts: chain.number,
        usage: chain.usage,
        charge: chain.charge,
        acknowledged: acknowledged.0,
        acknowledged_charge: acknowledged.1,
        credit,
        end,
        requests_checked: tallies.len().try_into().unwrap_or(u64::MAX),
        price_checked,
    })
}

/// What a checked receipt is remembered by: its hash and its charge.
type Checked = (Hash, Amount);

/// The longest term that the parties agreed on. The lessee's act alone is its consent to be billed
/// for it, and a receipt over it is the lessor's.
fn check_renewals(
    proof: &Proof,
    fabric: &FabricId,
    lease: LeaseId,
    grant: &Verified<Grant>,
) -> Result<Span, ProofError> {
    if proof.renewals.len() > MAX_RENEWALS {
        return Err(ProofError::Renewal("a proof holds at most two, of the last one"));
    }
    let terms = grant.body();
    let mut longest = terms.term;
    for signed in &proof.renewals {
        let header = of("renewal", signed.header().map_err(VerifyError::from))?;
        let (about, term, theirs) = match header.kind {
            Kind::Renew => {
                let renew: Verified<Renew> = of("renewal", signed.verify(fabric))?;
                let by = renew.signer();
                let theirs = by == terms.delegate || by == terms.lessee;
                (renew.body().lease, renew.body().term, theirs)
            }
            _ => {
                let renewal: Verified<Renewal> = of("renewal", signed.verify(fabric))?;
                let theirs = renewal.signer() == grant.signer();
                (renewal.body().lease, renewal.body().term, theirs)
            }
        };
        if about != lease || !theirs {
            return Err(ProofError::Renewal("it is not by the parties about this lease"));
        }
        if term > terms.longest {
            return Err(ProofError::Renewal("it is longer than the order and grant allow"));
        }
        longest = longest.max(term);
    }
    Ok(longest)
}

/// What a lease on a model came to after each of its requests.
fn check_requests(
    proof: &Proof,
    fabric: &FabricId,
    lease: LeaseId,
    grant: &Verified<Grant>,
) -> Result<Vec<Tally>, ProofError> {
    if proof.served.len() > MAX_REQUESTS {
        return Err(ProofError::TooManyRequests);
    }
    let mut tallies: Vec<Tally> = Vec::new();
    for (number, signed) in (1..).zip(&proof.served) {
        let wrong = |why| ProofError::Request { number, why };
        let served: Verified<Served> = of(&format!("request {number}"), signed.verify(fabric))?;
        if served.signer() != grant.signer() || served.body().lease != lease {
            return Err(ProofError::Parties { what: "request", number });
        }
        let model = grant.body().model.as_ref().ok_or(wrong("the lease is not on a model"))?;
        let before = tallies.last().copied().unwrap_or_default();
        before.is_followed_by(served.body(), model.digest).map_err(wrong)?;
        tallies.push(served.body().tally(served.id()));
    }
    Ok(tallies)
}

fn check_receipts(
    proof: &Proof,
    fabric: &FabricId,
    (lease, term): (LeaseId, Span),
    grant: &Verified<Grant>,
    tallies: &[Tally],
) -> Result<(Chain, Vec<Checked>), ProofError> {
    if proof.receipts.len() > MAX_RECEIPTS {
        return Err(ProofError::TooMany);
    }
    let mut chain = Chain::default();
    let mut hashes = Vec::new();
    for (number, signed) in (1..).zip(&proof.receipts) {
        let receipt: Verified<Receipt> = of(&format!("receipt {number}"), signed.verify(fabric))?;
        if receipt.signer() != grant.signer() || receipt.body().lease != lease {
            return Err(ProofError::Parties { what: "receipt", number });
        }
        chain
            .check(grant.body(), term, receipt.body())
            .map_err(|reason| ProofError::Receipt { number, reason })?;
        // Where the records were exported, what a receipt counts follows from them.
        let counted = receipt.body().usage.tally;
        let nth = usize::try_from(counted.requests).ok().and_then(|n| n.checked_sub(1));
        if !tallies.is_empty() && nth.is_some_and(|nth| tallies.get(nth) != Some(&counted)) {
            return Err(ProofError::Receipt { number, reason: ObjectionReason::Tokens });
        }
        chain.advance(receipt.body(), receipt.id());
        hashes.push((receipt.id(), receipt.body().charge));
    }
    Ok((chain, hashes))
}

fn check_acknowledgements(
    proof: &Proof,
    fabric: &FabricId,
    lease: LeaseId,
    delegate: KeyId,
    receipts: &[Checked],
) -> Result<(u64, Amount), ProofError> {
    if proof.acknowledgements.len() > MAX_RECEIPTS {
        return Err(ProofError::TooMany);
    }
    let mut best = (0, Amount::ZERO);
    for (nth, signed) in (1..).zip(&proof.acknowledgements) {
        let what = format!("acknowledgement {nth}");
        let ack: Verified<Acknowledgement> = of(&what, signed.verify(fabric))?;
        let body = ack.body();
        if ack.signer() != delegate || body.lease != lease {
            return Err(ProofError::Parties { what: "acknowledgement", number: nth });
        }
        let index = usize::try_from(body.number).ok().and_then(|n| n.checked_sub(1));
        let receipt = index.and_then(|i| receipts.get(i));
        if receipt != Some(&(body.receipt, body.charge)) {
            return Err(ProofError::Acknowledgement(nth));
        }
        best = best.max((body.number, body.charge));
    }
    Ok(best)
}

fn check_termination(
    proof: &Proof,
    fabric: &FabricId,
    (lease, term): (LeaseId, Span),
    grant: &Verified<Grant>,
    chain: &Chain,
) -> Result<Option<(EndReason, Amount)>, ProofError> {
    let Some(signed) = &proof.termination else { return Ok(None) };
    let termination: Verified<Termination> = of("termination", signed.verify(fabric))?;
    let body = termination.body();
    if termination.signer() != grant.signer() || body.lease != lease {
        return Err(ProofError::Termination("it is not by the lessor about this lease"));
    }
    chain.closes(grant.body(), term, body).map_err(ProofError::Termination)?;
    Ok(Some((body.reason, body.credit)))
}

//! The arithmetic of receipts, the same for lessor, lessee and anyone who checks later.
//!
//! ```text
//! lessor:  usage --next--> receipt n+1 --sent-->  lessee: agrees? --> acknowledgement | objection
//! ```
//!
//! A receipt follows from the one before it: number + 1, its hash, usage that never falls, and a
//! charge that is the lease's rate over the billed time, and the price of the tokens served, at
//! most the cap. The lessee adds what
//! only it can know: that no more time was billed than has passed on its own boot clock since it
//! first sent the claim.

use crate::base::id::{Hash, LeaseId};
use crate::base::money::Amount;
use crate::base::time::{Span, Wall};
use crate::words::contract::{EndReason, Grant, Termination};
use crate::words::model::Tally;
use crate::words::usage::{ObjectionReason, Receipt, Usage};

/// How long grants, receipts and terminations stay valid as evidence after they were signed.
pub const EVIDENCE_LIFE: Span = Span::secs(10 * 365 * 24 * 3600);

/// Where a chain of receipts stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct Chain {
    /// The number of the latest receipt; zero before the first.
    pub number: u64,
    /// Its hash; zero before the first.
    pub last: Hash,
    /// Its usage.
    pub usage: Usage,
    /// Its charge.
    pub charge: Amount,
    /// Why the lease ended, once the final one is written.
    pub end: Option<EndReason>,
}

/// What `usage` costs under `grant`.
#[must_use]
pub fn charge(grant: &Grant, usage: &Usage) -> Amount {
    let Tally { prompt_tokens, completion_tokens, .. } = usage.tally;
    let tokens = grant
        .model
        .as_ref()
        .map_or(Amount::ZERO, |model| model.rates.charge(prompt_tokens, completion_tokens));
    grant.rate.per_hour_over(usage.billed).plus(tokens).min(grant.cap)
}

/// The longest time that may be billed under `grant` while its term is `term`: that, or until its
/// cap is reached; none where it is tokens that are lent.
#[must_use]
pub fn billable(grant: &Grant, term: Span) -> Span {
    if grant.model.is_some() {
        return Span::ZERO;
    }
    grant.cap.lasts_at(grant.rate).map_or(term, |span| span.min(term))
}

/// What the lessor owes back when its side ended the lease with `missed` of its term to go, after
/// `charge`.
#[must_use]
pub fn credit(grant: &Grant, charge: Amount, missed: Span, reason: EndReason) -> Amount {
    match reason {
        EndReason::Reclaimed | EndReason::Revoked | EndReason::Lost => {
            grant.rate.per_hour_over(missed).permille(grant.early.credit_permille).min(charge)
        }
        EndReason::Lapsed
        | EndReason::Term
        | EndReason::Released
        | EndReason::Budget
        | EndReason::Exposure => Amount::ZERO,
    }
}

impl Chain {
    /// The receipt that follows, for `usage` so far, while the term is `term`. Usage never falls
    /// and never exceeds what may be billed: a meter that was restarted does not take back what
    /// was agreed.
    #[must_use]
    pub fn next(
        &self,
        lease: LeaseId,
        (grant, term): (&Grant, Span),
        usage: Usage,
        end: Option<EndReason>,
        at: Wall,
    ) -> Receipt {
        let usage = Usage {
            billed: usage.billed.max(self.usage.billed).min(billable(grant, term)),
            cpu: usage.cpu.max(self.usage.cpu),
            memory_mib_ms: usage.memory_mib_ms.max(self.usage.memory_mib_ms),
            memory_peak: usage.memory_peak.max(self.usage.memory_peak).min(grant.shape.memory),
            tally: if self.usage.tally.may_become(&usage.tally) {
                usage.tally
            } else {
                self.usage.tally
            },
        };
        let charge = charge(grant, &usage);
        Receipt { lease, number: self.number + 1, previous: self.last, usage, charge, end, at }
    }

    /// Whether the latest receipt is the final one.
    #[must_use]
    pub const fn closed(&self) -> bool {
        self.end.is_some()
    }

    /// Whether `end` closes a lease with these terms, and a term of at most `term`, where its
    /// receipts end.
    ///
    /// # Errors
    /// Why not, in words.
    pub fn closes(&self, terms: &Grant, term: Span, end: &Termination) -> Result<(), &'static str> {
        if (end.receipt, end.charge) != (self.last, self.charge) {
            return Err("it does not close at the last receipt");
        }
        if end.billed != self.usage.billed {
            return Err("it bills another time than the last receipt");
        }
        // One that was never claimed has no receipts: it lapsed, was given back or lost unused.
        if self.number > 0 && self.end != Some(end.reason) {
            return Err("the last receipt is not final, for the same reason");
        }
        if end.missed > term.saturating_sub(end.billed) {
            return Err("more of the term is missing than was left");
        }
        if end.credit != credit(terms, end.charge, end.missed, end.reason) {
            return Err("the credit does not follow from the lease's terms");
        }
        Ok(())
    }

    /// Takes `receipt` with hash `id` as the latest, after it was checked or made here.
    pub fn advance(&mut self, receipt: &Receipt, id: Hash) {
        self.number = receipt.number;
        self.last = id;
        self.usage = receipt.usage;
        self.charge = receipt.charge;
        self.end = receipt.end;
    }

    /// Whether `receipt` follows from this chain under `grant` with the term `term`, by what anyone
    /// can check.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn check(
        &self,
        grant: &Grant,
        term: Span,
        receipt: &Receipt,
    ) -> Result<(), ObjectionReason> {
        if self.closed() || receipt.number != self.number + 1 || receipt.previous != self.last {
            return Err(ObjectionReason::Chain);
        }
        let (was, is) = (self.usage, receipt.usage);
        if is.billed < was.billed
            || is.cpu < was.cpu
            || is.memory_mib_ms < was.memory_mib_ms
            || is.memory_peak < was.memory_peak
            || !was.tally.may_become(&is.tally)
        {
            return Err(ObjectionReason::Chain);
        }
        if is.billed > term || is.memory_peak > grant.shape.memory {
            return Err(ObjectionReason::Limit);
        }
        let (tokens, time) = (is.tally != Tally::default(), is.billed > Span::ZERO);
        if (grant.model.is_none() && tokens) || (grant.model.is_some() && time) {
            return Err(ObjectionReason::Limit);
        }
        if receipt.charge != charge(grant, &is) {
            return Err(ObjectionReason::Charge);
        }
        Ok(())
    }
}

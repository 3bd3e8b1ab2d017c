//! One lease in the lessor's book: what is kept of it, and what is due for it when.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::base::id::{ActId, Hash, KeyId, RequestId};
use crate::base::money::Amount;
use crate::base::time::{Boot, BootId, SKEW, Span, Wall};
use crate::minds::book::{ANSWER, AWAIT, GATHER_FOR, MAX_ACTS, MAX_DENIED, MAX_UNANSWERED};
use crate::words::chain::{self, Chain};
use crate::words::contract::{Claim, EndReason, Gang, Grant, MIN_RECEIPT_EVERY, Termination};
use crate::words::object::{Envelope, Kind, body_in};
use crate::words::sign::{Draft, Signed, Verified};
use crate::words::usage::{Outcome, Receipt, Usage};

/// Where a lease stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// Promised, not yet used.
    Granted,
    /// In use.
    Active,
    /// Its job is being ended.
    Draining,
    /// Over.
    Ended,
}

/// A lease as it is kept on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lent {
    /// The order, as the lessee signed it.
    pub order: Signed,
    /// The grant, as it was decided.
    pub grant: Draft,
    /// The offer that fixed the price.
    pub offer: Option<Draft>,
    /// In which boot the deadlines below count.
    pub boot: BootId,
    /// When it was decided.
    pub decided: Boot,
    /// Where it stands.
    pub stage: Stage,
    /// When it was claimed.
    pub claimed: Option<Boot>,
    /// The claim: its job's warden knows it by that.
    pub claim: Option<Hash>,
    /// When billing stopped.
    pub stopped: Option<Boot>,
    /// How long the term is now.
    pub term: Span,
    /// How often that was changed.
    pub version: u64,
    /// The act that changed it last.
    pub renew: Option<Signed>,
    /// For how long it was frozen before, unbilled.
    pub paused: Span,
    /// Since when it is frozen.
    pub frozen: Option<Boot>,
    /// Early ends that were announced, at most one for each reason.
    pub holds: Vec<Hold>,
    /// The gang that it is a member of, once it has committed.
    pub joined: Option<Joined>,
    /// Why it ends or ended, and who brought it about.
    pub end: Option<(EndReason, KeyId)>,
    /// How its job ended.
    pub outcome: Option<Outcome>,
    /// Whether it is given back by itself once its job has ended.
    pub release_after: bool,
    /// The acts that were decided: all that were accepted, and those that were refused for what may
    /// pass.
    pub acts: Vec<Act>,
    /// Where the receipts stand.
    pub chain: Chain,
    /// Up to which receipt the lessee countersigned, and what it agreed to owe.
    pub acknowledged: (u64, Amount),
    /// The termination, once ended.
    pub termination: Option<Draft>,
}

/// An early end that was announced.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// Why.
    pub why: EndReason,
    /// Who brings it about.
    pub by: KeyId,
    /// When the job is frozen, and billing pauses.
    pub freeze: Boot,
    /// When it ends.
    pub end: Boot,
}

/// What a member of a gang has committed to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Joined {
    /// The gang's certificate.
    pub gang: Signed,
    /// This lessor's word.
    pub commit: Draft,
    /// Whether every member has given its word.
    pub whole: bool,
}

/// An act that was decided, with the answer that a repeat gets: a yes, or a [`Refusal`] that has to
/// stay one.
///
/// [`Refusal`]: crate::words::contract::Refusal
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Act {
    /// Its id.
    pub id: ActId,
    /// The act's object.
    pub of: Hash,
    /// The answer.
    pub answer: Draft,
}

impl Act {
    /// Whether its answer is of this kind.
    pub(super) fn is(&self, kind: Kind) -> bool {
        Envelope::decode(&self.answer.envelope).is_ok_and(|answer| answer.header.kind == kind)
    }

    /// How long its answer is valid.
    fn until(&self) -> Wall {
        let answer = Envelope::decode(&self.answer.envelope);
        answer.map_or(Wall(u64::MAX), |answer| answer.header.not_after)
    }
}

/// A lease in memory.
#[derive(Clone, Debug)]
pub struct Lease {
    /// What is on disk.
    pub kept: Lent,
    /// The grant, decoded.
    pub terms: Grant,
    /// Who may ask again with which request.
    pub request: (KeyId, RequestId),
    /// Until when a repeat of the order must be answered.
    pub order_not_after: Wall,
    /// The usage that the job's meter reported last.
    pub reported: Usage,
    /// Whether a job was started and is not reaped yet.
    pub running: bool,
    /// Receipts that the lessee has not countersigned, oldest first.
    pub unacknowledged: VecDeque<(u64, Draft)>,
    /// When the next receipt is due.
    pub(super) receipt_due: Boot,
    /// Since when a receipt waits for a countersignature.
    pub(super) asked: Option<Boot>,
    /// When it ended, as far as this run knows.
    pub(super) ended: Option<Boot>,
    /// The gang, decoded, once it has committed to it.
    pub gang: Option<Gang>,
    /// The other members' words so far, by lessor.
    pub commits: BTreeMap<KeyId, Signed>,
    /// The claim that waits for them, or whose job is not begun yet.
    pub pending: Option<Verified<Claim>>,
}

/// What an active lease is due for.
pub(super) enum Next {
    /// To end, for this reason, by whom.
    End(EndReason, KeyId),
    /// To be frozen.
    Freeze,
    /// A receipt.
    Receipt,
    /// Nothing yet.
    Nothing,
}

impl Lease {
    /// When the term ends.
    #[must_use]
    pub fn term_end(&self) -> Boot {
        self.kept.decided + self.kept.term
    }

    /// Until when it may be claimed. One that has committed to a gang may be started by the other
    /// members at any moment, so it waits for their words longer; that a gang will never be whole
    /// it learns from them.
    #[must_use]
    pub fn claim_by(&self) -> Boot {
        let more = if self.kept.joined.is_some() { GATHER_FOR } else { Span::ZERO };
        self.kept.decided + (self.terms.claim_within + more).min(self.kept.term)
    }

    /// When its cap is reached; never while it is frozen.
    #[must_use]
    pub fn spent(&self) -> Boot {
        match (self.kept.claimed, self.kept.frozen) {
            (Some(claimed), None) => self.capped(claimed),
            _ => Boot(u64::MAX),
        }
    }

    /// What it costs as things stand, if it was billed for so long.
    pub(super) fn charge_after(&self, billed: Span) -> Amount {
        chain::charge(&self.terms, &Usage { billed, ..self.reported })
    }

    /// Whether the tokens that were served have reached its cap.
    #[must_use]
    pub fn is_used_up(&self) -> bool {
        self.terms.model.is_some() && self.charge_after(Span::ZERO) >= self.terms.cap
    }

    /// When its cap is reached by time if it is never frozen again.
    pub(super) fn capped(&self, claimed: Boot) -> Boot {
        let lasts = match self.terms.model {
            Some(_) => self.kept.term,
            None => chain::billable(&self.terms, self.kept.term),
        };
        claimed + self.kept.paused + lasts
    }

    /// For how long it is billed if it runs until then, by its clock alone.
    pub(super) fn billed(&self, claimed: Boot, until: Boot) -> Span {
        until.since(claimed).saturating_sub(self.kept.paused)
    }

    /// When its job must be over, without its grace, as things stand. While it is frozen its cap
    /// is not being reached: it may last longer by as long as it can stand still.
    #[must_use]
    pub fn deadline(&self) -> Boot {
        let Some(claimed) = self.kept.claimed else { return self.term_end() };
        let still = self.kept.frozen.map_or(Span::ZERO, |since| {
            let end = self.kept.holds.iter().map(|hold| hold.end).max();
            end.map_or(Span::ZERO, |end| end.since(since))
        });
        self.term_end().min(self.capped(claimed) + still)
    }

    /// Whether it is no member of a gang, or every member of its gang has committed.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.terms.gang.is_none() || self.kept.joined.as_ref().is_some_and(|joined| joined.whole)
    }

    pub(super) fn activate(&mut self, now: Boot, claim: &Verified<Claim>) {
        self.kept.stage = Stage::Active;
        self.kept.claimed = Some(now);
        self.kept.claim = Some(claim.id());
        self.kept.release_after = claim.body().job.release_after;
        self.receipt_due = now + self.terms.receipt_every;
        self.running = true;
    }

    /// Remembers an act; of many the oldest renewal goes first, whose version is over.
    pub(super) fn remember(&mut self, act: Act) {
        let acts = &mut self.kept.acts;
        if acts.len() >= MAX_ACTS {
            acts.remove(acts.iter().position(|act| act.is(Kind::Renewal)).unwrap_or(0));
        }
        acts.push(act);
    }

    /// Remembers a refused act. False where there is no room for that: of many, those go whose
    /// refusal is over, which is not before the act is.
    pub(super) fn deny(&mut self, now: Wall, act: Act) -> bool {
        let refused = |act: &&Act| act.is(Kind::Refusal);
        if self.kept.acts.iter().filter(refused).count() >= MAX_DENIED {
            self.kept.acts.retain(|act| !act.is(Kind::Refusal) || act.until() >= now);
        }
        let room = self.kept.acts.iter().filter(refused).count() < MAX_DENIED;
        if room {
            self.remember(act);
        }
        room
    }

    pub(super) fn is_held(&self, why: EndReason) -> bool {
        self.kept.holds.iter().any(|hold| hold.why == why)
    }

    /// Ends a freeze that no hold asks for any more. True when there was one.
    pub(super) fn thaw(&mut self, now: Boot) -> bool {
        if self.kept.holds.iter().any(|hold| hold.freeze <= now) {
            return false;
        }
        let Some(since) = self.kept.frozen.take() else { return false };
        self.kept.paused += now.since(since);
        true
    }

    /// How much of its term is missing because the lessor's side ended it.
    pub(super) fn missed(&self, reason: EndReason) -> Span {
        let theirs = matches!(reason, EndReason::Reclaimed | EndReason::Revoked | EndReason::Lost);
        match self.kept.stopped {
            Some(stopped) if theirs => {
                let left = self.kept.term.saturating_sub(self.kept.chain.usage.billed);
                // Before its notice was over it may have stood still for want of a countersignature.
                let hold = self.kept.holds.iter().find(|hold| hold.why == reason);
                let from = hold.map_or(stopped, |hold| stopped.max(hold.freeze));
                self.term_end().since(from).min(left)
            }
            _ => Span::ZERO,
        }
    }

    /// Whether less than `amount` is owed beyond what was agreed to, as it is billed now.
    pub(super) fn owes_less_than(&self, amount: Amount) -> bool {
        let Some(claimed) = self.kept.claimed else { return true };
        let until = self.kept.frozen.unwrap_or(claimed);
        let charge = self.charge_after(self.billed(claimed, until));
        charge.minus(self.kept.acknowledged.1) < amount || charge == self.kept.acknowledged.1
    }

    /// When `amount` more than the lessee agreed to is owed; never while that is beyond the cap.
    pub(super) fn owed_at(&self, amount: Amount) -> Boot {
        let never = Boot(u64::MAX);
        let (Some(claimed), None) = (self.kept.claimed, self.kept.frozen) else { return never };
        let total = self.kept.acknowledged.1.plus(amount);
        if total >= self.terms.cap {
            return never;
        }
        if self.terms.model.is_some() {
            let owed = self.charge_after(Span::ZERO);
            return if owed >= total && owed > self.kept.acknowledged.1 { Boot(0) } else { never };
        }
        let began = claimed + self.kept.paused;
        total.lasts_at(self.terms.rate).map_or(never, |span| began + span + Span::millis(1))
    }

    /// When the next receipt is due: at its interval, and early enough that a lessee who answers is
    /// never ended for what it was not asked to countersign.
    pub(super) fn next_receipt(&self) -> Boot {
        if self.unacknowledged.len() >= MAX_UNANSWERED || self.kept.frozen.is_some() {
            return Boot(u64::MAX);
        }
        // Of a model nothing is used while nobody asks: there is nothing to agree on.
        if self.terms.model.is_some() && self.reported.tally == self.kept.chain.usage.tally {
            return Boot(u64::MAX);
        }
        let paced = self.receipt_due - self.terms.receipt_every + MIN_RECEIPT_EVERY;
        let half = self.owed_at(Amount(self.terms.exposure.0 / 2));
        self.receipt_due.min(half.max(paced))
    }

    /// When more stands unacknowledged than the lease allows, and the lessee had time to answer.
    pub(super) fn exposed_out(&self) -> Boot {
        let never = Boot(u64::MAX);
        let Some(asked) = self.asked else { return never };
        self.owed_at(self.terms.exposure).max(asked + ANSWER)
    }

    /// What an active lease is due for; `me` is its lessor.
    pub(super) fn turn(&self, now: Boot, me: KeyId) -> Next {
        if self.term_end() <= now {
            // One that stood still to be taken back was not there for the rest of its term.
            let taken = self.taken_back_by().filter(|_| self.kept.frozen.is_some());
            let taken = taken.filter(|hold| hold.freeze < self.term_end());
            return taken.map_or(Next::End(EndReason::Term, me), |h| Next::End(h.why, h.by));
        }
        if self.spent() <= now || self.is_used_up() {
            return Next::End(EndReason::Budget, me);
        }
        if let Some(hold) = self.kept.holds.iter().find(|hold| hold.end <= now) {
            return Next::End(hold.why, hold.by);
        }
        let freezes = self.kept.holds.iter().any(|hold| hold.freeze <= now);
        if self.kept.frozen.is_none() && (freezes || self.exposed_out() <= now) {
            return Next::Freeze;
        }
        if self.next_receipt() <= now { Next::Receipt } else { Next::Nothing }
    }
}

/// The claim whose job may still run under a kept lease, in this boot.
#[must_use]
pub fn running_claim(kept: &Lent, boot: BootId) -> Option<Hash> {
    let open = matches!(kept.stage, Stage::Active | Stage::Draining) && kept.outcome.is_none();
    kept.claim.filter(|_| open && kept.boot == boot)
}

/// Whether a kept lease is of no more concern: ended and agreed a while ago, its order no longer
/// valid. Its papers stay on disk, as proof.
#[must_use]
pub fn is_past(kept: &Lent, now: Wall) -> bool {
    let agreed = kept.stage == Stage::Ended && kept.acknowledged.0 == kept.chain.number;
    let Some(end) = kept.termination.as_ref().filter(|_| agreed) else { return false };
    let order = Envelope::decode(&kept.order.envelope).ok();
    let end = body_in::<Termination>(&end.envelope);
    order.is_some_and(|order| order.header.not_after + SKEW < now)
        && end.is_some_and(|end| end.at + AWAIT < now)
}

pub(super) fn charge_of(receipt: &Draft) -> Amount {
    let receipt = body_in::<Receipt>(&receipt.envelope);
    receipt.map_or(Amount::ZERO, |receipt| receipt.charge)
}

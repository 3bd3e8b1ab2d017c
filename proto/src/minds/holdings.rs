//! The lessee's side: the leases this node holds as a delegate, from order to termination.
//!
//! ```text
//! Ordered --grant--> Granted --claim accepted--> Claimed --termination--> Ended
//!    |                  '----------renewal: a longer term----------'
//!    \--refused, silent, or another grant was faster--> dropped (a surplus grant is given back)
//! ```
//!
//! What the lessee relies on lies inside what the lessor honours: it counts the term from the
//! first *sending* of the order on its own boot clock, less a margin for drift, while the lessor
//! counts from its later decision. Receipts are countersigned only when they follow from what was
//! agreed and bill no more time than has passed here since the claim was first sent.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::base::id::{Hash, KeyId, LeaseId, RequestId};
use crate::base::money::Amount;
use crate::base::time::{Boot, BootId, Now, SKEW, Span, Wall};
use crate::words::chain::{self, Chain, EVIDENCE_LIFE};
use crate::words::contract::{EndReason, GangOf, Grant, Renewal, Termination};
use crate::words::model::{Served, Tally};
use crate::words::object::body_in;
use crate::words::sign::{Draft, Hand, Signed, Verified};
use crate::words::usage::{Acknowledgement, Objection, ObjectionReason, Outcome, Receipt};

/// How far the clocks of two hosts may drift apart in a term: 200 ppm, and a fixed margin.
const DRIFT_PPM: u64 = 200;
/// The fixed part of the margin.
const MARGIN: Span = Span::millis(50);
/// How much more than the time since the claim was sent a receipt may bill, beside drift: clock
/// resolution.
const RESOLUTION: Span = Span::millis(2);

/// How far ahead of those before it the record of a request may come.
const MAX_EARLY: u64 = 1_024;
/// How many requests may be agreed on without a receipt for them.
const MAX_UNCOVERED: usize = 65_536;

/// Where a held lease stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Stage {
    /// The order is out.
    Ordered,
    /// It is granted, not yet used.
    Granted,
    /// In use.
    Claimed,
    /// Over.
    Ended,
}

/// A held lease as it is kept on disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Held {
    /// The order as this node drafted it, or as the lessee signed it elsewhere.
    pub order: Placed,
    /// Whom it was sent to.
    pub lessor: KeyId,
    /// The offer it names.
    pub offer: Option<Signed>,
    /// In which boot the instants below count.
    pub boot: BootId,
    /// When the order was first sent.
    pub sent: Boot,
    /// The grant.
    pub grant: Option<Signed>,
    /// Where it stands.
    pub stage: Stage,
    /// The claim, as first sent.
    pub claim: Option<Draft>,
    /// When the claim was first sent, on both clocks of this host.
    pub claim_sent: Option<(Boot, Wall)>,
    /// Whether the lessor refused it: then another one may take its place.
    pub claim_refused: bool,
    /// The release, as first sent.
    pub release: Option<Draft>,
    /// The term that was agreed on, once granted.
    pub term: Span,
    /// How often it was renewed.
    pub version: u64,
    /// The renewal that was asked for last, with the term that it consents to.
    pub renew: Option<(Draft, Span)>,
    /// The lessor's yes to the last one that it said yes to.
    pub renewal: Option<Signed>,
    /// The gang that it was ordered for.
    pub gang: Option<GangOf>,
    /// Where the receipts stand.
    pub chain: Chain,
    /// The latest countersignature, for a repeat of its receipt.
    pub acknowledgement: Option<Draft>,
    /// What was wrong with the last receipt, if it was not countersigned.
    pub objection: Option<ObjectionReason>,
    /// How it ended.
    pub termination: Option<Signed>,
}

impl Held {
    /// The termination, if it closes the lease where its countersigned receipts end. Another one
    /// proves nothing: a lessor that ends a lease in words that its receipts contradict would
    /// spoil the proof of what it did agree to.
    #[must_use]
    pub fn closing(&self) -> Option<&Signed> {
        let grant = body_in::<Grant>(&self.grant.as_ref()?.envelope)?;
        self.termination.as_ref().filter(|signed| {
            let end = body_in::<Termination>(&signed.envelope);
            end.is_some_and(|end| self.chain.closes(&grant, self.term, &end).is_ok())
        })
    }
}

/// An order on its way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Placed {
    /// Signed by this node as a delegate.
    Here(Draft),
    /// Signed by the lessee, elsewhere.
    Elsewhere(Signed),
}

impl Placed {
    /// The order's identity.
    #[must_use]
    pub fn id(&self) -> Hash {
        match self {
            Self::Here(draft) => draft.id(),
            Self::Elsewhere(signed) => signed.id(),
        }
    }
}

/// A held lease in memory.
#[derive(Clone, Debug)]
pub struct Holding {
    /// What is on disk.
    pub kept: Held,
    /// The lease's id and the grant, decoded, once granted.
    pub terms: Option<(LeaseId, Grant)>,
    /// The last objection with the receipt it is about, and how many there were: a repeat of a
    /// receipt gets the same bytes, another one gets another number.
    objected: Option<(Hash, Draft, u64)>,
    /// How many claims and renewals were drafted in this run: each is a statement of its own.
    pub acts: u64,
    /// Whether the renewal that was asked for last may have left: in this run, or in an earlier one,
    /// of which nobody knows.
    pub renew_left: bool,
    /// How its job ended, by the termination.
    pub ended: Option<Over>,
    /// Of a lease on a model: what it came to after each request that no receipt has covered yet,
    /// the last one agreed on last.
    tallies: VecDeque<Tally>,
    /// Records that came before those that they follow.
    early: BTreeMap<u64, Verified<Served>>,
}

/// How a held lease ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Over {
    /// Why.
    pub reason: EndReason,
    /// How its job ended.
    pub outcome: Option<Outcome>,
    /// What is owed.
    pub charge: Amount,
    /// What is owed back.
    pub credit: Amount,
}

/// All leases this node holds.
#[derive(Debug, Default)]
pub struct Holdings {
    /// Boxed, as the lessor's are.
    orders: BTreeMap<Hash, Box<Holding>>,
    leases: BTreeMap<LeaseId, Hash>,
}

/// The answer to a receipt.
#[derive(Debug)]
pub enum Judged {
    /// It is countersigned; the flag says whether that is new.
    Agreed(Draft, bool),
    /// It is not.
    Objected(Draft),
    /// It counts requests whose records are not here yet: it is to come again.
    Later,
    /// It is about no lease held here, or not by its lessor.
    Foreign,
}

impl Holdings {
    /// Takes back a lease that was kept; `tallies` is what a lease on a model came to after each of its
    /// requests, in any order.
    pub fn restore(
        &mut self,
        kept: Held,
        terms: Option<(LeaseId, Grant)>,
        mut tallies: Vec<Tally>,
    ) {
        let order = kept.order.id();
        if let Some((lease, _)) = &terms {
            self.leases.insert(*lease, order);
        }
        let ended = kept.termination.as_ref().and_then(|signed| {
            let end: Termination = body_in(&signed.envelope)?;
            Some(over(&kept, terms.as_ref().map(|(_, terms)| terms), &end))
        });
        let lost = (kept.stage == Stage::Ended).then(|| unheard(&kept));
        let ended = ended.or(lost);
        let renew_left = kept.renew.is_some();
        tallies.retain(|tally| tally.requests > kept.chain.usage.tally.requests);
        tallies.sort();
        let (objected, acts, early) = (None, 0, BTreeMap::new());
        let tallies = tallies.into();
        let holding = Holding { kept, terms, objected, acts, renew_left, ended, tallies, early };
        self.orders.insert(order, Box::new(holding));
    }

    /// An order is about to be sent.
    pub fn ordered(&mut self, kept: Held) {
        let order = kept.order.id();
        let holding = Holding {
            kept,
            terms: None,
            objected: None,
            acts: 0,
            renew_left: false,
            ended: None,
            tallies: VecDeque::new(),
            early: BTreeMap::new(),
        };
        self.orders.insert(order, Box::new(holding));
    }

    /// A grant answers an order. `None` when no such order is out.
    pub fn granted(&mut self, order: &Hash, grant: &Verified<Grant>) -> Option<LeaseId> {
        let holding = self.orders.get_mut(order)?;
        let lease = LeaseId(grant.id());
        if holding.kept.stage == Stage::Ordered {
            holding.kept.stage = Stage::Granted;
            holding.kept.grant = Some(grant.signed().clone());
            holding.kept.term = grant.body().term;
            holding.terms = Some((lease, grant.body().clone()));
            self.leases.insert(lease, *order);
        }
        Some(lease)
    }

    /// An order came to nothing.
    pub fn drop_order(&mut self, order: &Hash) {
        if let Some(holding) = self.orders.remove(order)
            && let Some((lease, _)) = holding.terms
        {
            self.leases.remove(&lease);
        }
    }

    /// One held lease.
    #[must_use]
    pub fn get(&self, lease: &LeaseId) -> Option<&Holding> {
        self.order(self.leases.get(lease)?)
    }

    /// One held lease, to be changed.
    pub fn get_mut(&mut self, lease: &LeaseId) -> Option<&mut Holding> {
        self.orders.get_mut(self.leases.get(lease)?).map(AsMut::as_mut)
    }

    /// One order.
    #[must_use]
    pub fn order(&self, order: &Hash) -> Option<&Holding> {
        self.orders.get(order).map(AsRef::as_ref)
    }

    /// Every order and lease in memory.
    pub fn all(&self) -> impl Iterator<Item = (&Hash, &Holding)> {
        self.orders.iter().map(|(order, holding)| (order, holding.as_ref()))
    }

    /// Judges a receipt and drafts the answer.
    pub fn judge(
        &mut self,
        now: Now,
        hand: &Hand,
        boot: BootId,
        receipt: &Verified<Receipt>,
    ) -> Judged {
        let body = receipt.body();
        let Some(holding) = self.get_mut(&body.lease) else { return Judged::Foreign };
        let Some((lease, terms)) = holding.terms.clone() else { return Judged::Foreign };
        let kept = &mut holding.kept;
        if receipt.signer() != kept.lessor {
            return Judged::Foreign;
        }
        let latest = body.number == kept.chain.number && receipt.id() == kept.chain.last;
        // An older one came late: the latest countersignature covers all before it.
        let older = body.number > 0 && body.number < kept.chain.number;
        if let Some(answer) = kept.acknowledgement.as_ref().filter(|_| latest || older) {
            return Judged::Agreed(answer.clone(), false);
        }
        // Who asked for a renewal has consented to be billed for it, heard or not.
        let asked = kept.renew.as_ref().filter(|_| holding.renew_left);
        let term = asked.map_or(kept.term, |(_, asked)| kept.term.max(*asked));
        // Its record of the last request it covers may still be on its way.
        let (covers, newest) = (body.usage.tally, holding.tallies.back());
        let newest = *newest.unwrap_or(&kept.chain.usage.tally);
        if terms.model.is_some() && covers.requests > newest.requests {
            return Judged::Later;
        }
        let agreed = covers == kept.chain.usage.tally || holding.tallies.contains(&covers);
        let checked = kept.chain.check(&terms, term, body).and_then(|()| {
            if !agreed {
                return Err(ObjectionReason::Tokens);
            }
            // What was never claimed costs nothing. After a reboot of this host the boot clock
            // says nothing about the claim any more, and the wall clock has to do, unless it has
            // evidently been set back since.
            let passed = match kept.claim_sent.filter(|_| !kept.claim_refused) {
                Some((sent, _)) if kept.boot == boot => {
                    let span = now.boot.since(sent);
                    span + span.scale(DRIFT_PPM, 1_000_000) + RESOLUTION
                }
                Some((_, sent)) if now.wall + SKEW < sent + kept.chain.usage.billed => {
                    body.usage.billed
                }
                Some((_, sent)) => now.wall.since(sent) + SKEW,
                None => return Err(ObjectionReason::Time),
            };
            if body.usage.billed > passed { Err(ObjectionReason::Time) } else { Ok(()) }
        });
        let not_after = now.wall + EVIDENCE_LIFE;
        match checked {
            Ok(()) => {
                let (number, charge) = (body.number, body.charge);
                let ack = Acknowledgement { lease, number, receipt: receipt.id(), charge };
                let Ok(draft) = hand.draft(lease.0, body.number, not_after, &ack) else {
                    return Judged::Foreign;
                };
                kept.chain.advance(body, receipt.id());
                holding.tallies.retain(|tally| tally.requests > covers.requests);
                kept.acknowledgement = Some(draft.clone());
                kept.objection = None;
                if kept.stage == Stage::Granted {
                    // Only the claim's acceptance was lost.
                    kept.stage = Stage::Claimed;
                }
                Judged::Agreed(draft, true)
            }
            Err(reason) => {
                let count = match &holding.objected {
                    Some((of, answer, _)) if *of == receipt.id() => {
                        return Judged::Objected(answer.clone());
                    }
                    Some((_, _, count)) => count + 1,
                    None => 1,
                };
                kept.objection = Some(reason);
                let charge = kept.chain.charge;
                let objection = Objection { lease, receipt: receipt.id(), reason, charge };
                match hand.draft(lease.0, count, not_after, &objection) {
                    Ok(draft) => {
                        holding.objected = Some((receipt.id(), draft.clone(), count));
                        Judged::Objected(draft)
                    }
                    Err(_) => Judged::Foreign,
                }
            }
        }
    }

    /// Takes the record of a request under a lease on a model, of which this node knows that it says
    /// what was asked and answered. Gives the records that are agreed on with it: none while those
    /// before it are not here.
    ///
    /// # Errors
    /// When it is not one to agree on.
    pub fn consume(
        &mut self,
        served: &Verified<Served>,
    ) -> Result<Vec<Verified<Served>>, &'static str> {
        let body = served.body();
        let holding = self.get_mut(&body.lease).ok_or("this node holds no such lease")?;
        let Some((_, Grant { model: Some(model), .. })) = &holding.terms else {
            return Err("the lease is not on a model");
        };
        if served.signer() != holding.kept.lessor {
            return Err("another node signed it than lends");
        }
        let newest = holding.tallies.back().copied().unwrap_or(holding.kept.chain.usage.tally);
        if body.number <= newest.requests {
            let known = holding.tallies.iter().any(|tally| tally.last == served.id());
            return if known { Ok(Vec::new()) } else { Err("another request has its number") };
        }
        if body.number > newest.requests + MAX_EARLY || body.model != model.digest {
            return Err("it does not follow from the records before it");
        }
        if holding.tallies.len() >= MAX_UNCOVERED {
            return Err("too many requests are covered by no receipt");
        }
        let (model, mut tally) = (model.digest, newest);
        if body.number == tally.requests + 1 {
            tally.is_followed_by(body, model)?;
        }
        holding.early.insert(body.number, served.clone());
        let mut agreed = Vec::new();
        while let Some(next) = holding.early.remove(&(tally.requests + 1)) {
            // One that came early and does not follow is never agreed on, nor is what follows it.
            if tally.is_followed_by(next.body(), model).is_err() {
                break;
            }
            tally = next.body().tally(next.id());
            holding.tallies.push_back(tally);
            agreed.push(next);
        }
        Ok(agreed)
    }

    /// Takes a termination. True when it is new and by the lessor of a lease held here.
    pub fn terminated(&mut self, termination: &Verified<Termination>) -> bool {
        let body = termination.body();
        let Some(holding) = self.get_mut(&body.lease) else { return false };
        let by_lessor = termination.signer() == holding.kept.lessor;
        if !by_lessor || holding.kept.termination.is_some() {
            return false;
        }
        holding.kept.termination = Some(termination.signed().clone());
        holding.kept.stage = Stage::Ended;
        let terms = holding.terms.as_ref().map(|(_, terms)| terms);
        holding.ended = Some(over(&holding.kept, terms, body));
        true
    }

    /// Takes the lessor's yes to a renewal. False when it is not what was asked for.
    pub fn renewed(&mut self, renewal: &Verified<Renewal>) -> bool {
        let body = renewal.body();
        let Some(holding) = self.get_mut(&body.lease) else { return false };
        let kept = &mut holding.kept;
        let Some((asked, term)) = &kept.renew else { return false };
        let answers = body.of == asked.id() && body.term == *term;
        let later = body.version > kept.version && body.term >= kept.term;
        if !answers || !later || renewal.signer() != kept.lessor {
            return false;
        }
        (kept.version, kept.term) = (body.version, body.term);
        kept.renewal = Some(renewal.signed().clone());
        true
    }

    /// The lessor knows the lease no more: what was agreed so far is what is owed, and its final
    /// receipt says why it ended, where there is one. False when it has ended already.
    pub fn lost(&mut self, lease: &LeaseId) -> bool {
        let Some(holding) = self.get_mut(lease) else { return false };
        if holding.kept.stage == Stage::Ended {
            return false;
        }
        holding.kept.stage = Stage::Ended;
        holding.ended = Some(unheard(&holding.kept));
        true
    }
}

impl Holding {
    /// The id of an act that is drafted now. A repeat is the draft that was kept; another draft, after
    /// a no, is another act.
    #[must_use]
    pub fn act_id(&self, lease: &LeaseId, verb: &str, now: Wall) -> RequestId {
        act_id(lease, &format!("{verb} {} {}", now.0, self.acts))
    }

    /// Until when the lessee may rely on the lease: from the first sending of the order, less
    /// drift and margin. `None` before the grant.
    #[must_use]
    pub fn relied_until(&self) -> Option<Boot> {
        self.terms.as_ref()?;
        let term = self.kept.term;
        let drift = term.scale(DRIFT_PPM, 1_000_000);
        Some(self.kept.sent + term.saturating_sub(drift + MARGIN))
    }
}

/// How a lease ended that its lessor knows no more: what was agreed so far is what is owed.
fn unheard(kept: &Held) -> Over {
    let reason = kept.chain.end.unwrap_or(EndReason::Lost);
    Over { reason, outcome: None, charge: kept.chain.charge, credit: Amount::ZERO }
}

/// How a lease ended, by its termination. What is owed is what was agreed on, and never more than
/// the lease allows, whatever its lessor says at the end; what is owed back follows from the terms.
fn over(kept: &Held, terms: Option<&Grant>, end: &Termination) -> Over {
    let (reason, outcome) = (end.reason, end.outcome.clone());
    let Some(terms) = terms else {
        let none = Amount::ZERO;
        return Over { reason, outcome, charge: none, credit: none };
    };
    let most = terms.worst_case_over(kept.term);
    // Of a model nothing is owed but what was agreed on, record by record.
    let agreed = kept.chain.closed() || terms.model.is_some();
    let charge = if agreed { kept.chain.charge } else { end.charge.min(most) };
    let credit = chain::credit(terms, charge, end.missed, reason);
    Over { reason, outcome, charge, credit }
}

/// The act id of a release, derived from what it is about so that a repeat is the same.
#[must_use]
pub fn act_id(lease: &LeaseId, verb: &str) -> RequestId {
    RequestId::derive(&[&lease.0.0, verb.as_bytes()])
}

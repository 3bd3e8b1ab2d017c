//! The lessor's book: every lease this node granted, and never more than it has.
//!
//! ```text
//! order ->  Granted --claim--> Active --release, term, budget, exposure, lost--> Draining --reaped--> Ended
//!              \--claim_by passes--> Ended(lapsed, unbilled)
//! ```
//!
//! The node decides alone about its capacity, in one total order, so no consensus is needed.
//! Promised capacity (granted + active + draining) never exceeds what there is, and returns when
//! the runner is reaped, not when the term ends. Deadlines are boot time, counted from the
//! decision. Ended is final. At this lessor one (lessee, request id) makes at most one lease, and
//! a repeat of an order or an act is answered with the same bytes.
//!
//! The book changes state and says what follows; the core keeps, sends and starts.

use std::collections::{BTreeMap, VecDeque};

use serde::{Deserialize, Serialize};

use crate::base::due::Due;
use crate::base::id::{ActId, Hash, KeyId, LeaseId, RequestId};
use crate::base::money::Amount;
use crate::base::plant::Plant;
use crate::base::resource::Resources;
use crate::base::time::{Boot, BootId, Now, SKEW, Span, Wall};
use crate::words::chain::{self, Chain, EVIDENCE_LIFE};
use crate::words::contract::{
    Acceptance, Claim, EndReason, Fence, Figure, Grant, MIN_RECEIPT_EVERY, Order, Reason, Release,
    Termination,
};
use crate::words::object::Envelope;
use crate::words::sign::{Draft, Hand, Signed, Verified};
use crate::words::usage::{Acknowledgement, Outcome, Receipt, Usage};
use crate::words::wire::{self, MAX_OBJECT};

/// The most acts remembered per lease.
pub const MAX_ACTS: usize = 32;
/// What one of them takes on disk at most, in bytes: its answer is of fixed size.
pub const ACT_LEN: usize = 512;
/// The most leases that may be promised at once.
const MAX_LEASES: usize = 100_000;
/// The most leases in memory, ended ones included.
const MAX_KNOWN: usize = 300_000;
/// How long an ended lease waits for a countersignature under its last receipt. Its papers stay on
/// disk.
const AWAIT: Span = Span::secs(15 * 60);
/// How many receipts may wait for a countersignature: the next one covers them all.
const MAX_UNANSWERED: usize = 8;
/// How long a lessee has to countersign before what stands unacknowledged ends its lease.
const ANSWER: Span = Span::secs(2);
/// The most requests remembered beyond their leases.
const MAX_SPENT: usize = 1_000_000;
/// How long a request is remembered beyond its lease. The wall clock may be set back, but an order
/// names an offer, which is honoured no longer than this on the boot clock.
pub const REMEMBER: Span = Span::secs(15 * 60);

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
    /// When billing stopped.
    pub stopped: Option<Boot>,
    /// Why it ends or ended, and who brought it about.
    pub end: Option<(EndReason, KeyId)>,
    /// How its job ended.
    pub outcome: Option<Outcome>,
    /// Whether it is given back by itself once its job has ended.
    pub release_after: bool,
    /// The acts that were accepted.
    pub acts: Vec<Act>,
    /// Where the receipts stand.
    pub chain: Chain,
    /// Up to which receipt the lessee countersigned, and what it agreed to owe.
    pub acknowledged: (u64, Amount),
    /// The termination, once ended.
    pub termination: Option<Draft>,
}

/// An act that was accepted, with the answer that a repeat gets.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Act {
    /// Its id.
    pub id: ActId,
    /// The act's object.
    pub of: Hash,
    /// The answer.
    pub answer: Draft,
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
    receipt_due: Boot,
    /// Since when a receipt waits for a countersignature.
    asked: Option<Boot>,
    /// When it ended, as far as this run knows.
    ended: Option<Boot>,
}

/// All leases of this lessor.
#[derive(Debug)]
pub struct Book {
    hand: Hand,
    certificate: Signed,
    boot: BootId,
    grace: Span,
    capacity: Resources,
    promised: Resources,
    leases: BTreeMap<LeaseId, Lease>,
    /// How many of them have not ended.
    open: usize,
    requests: BTreeMap<(KeyId, RequestId), LeaseId>,
    /// Requests whose lease was forgotten, with the instant from which they may be as well.
    spent: VecDeque<(Boot, (KeyId, RequestId))>,
    due: Due<LeaseId>,
    fence: u64,
    plant: Plant,
}

/// The answer to an order.
#[derive(Debug)]
pub enum Placed {
    /// The same order was granted before: here is the same grant.
    Repeat(Draft),
    /// It is granted.
    Granted(LeaseId, Draft),
    /// It is refused.
    Refused(Reason, Vec<Figure>),
}

/// The answer to an act.
#[derive(Debug)]
pub enum Acted {
    /// The same act was accepted before: here is the same answer.
    Repeat(Draft),
    /// It is accepted.
    Accepted(Draft),
    /// It is refused.
    Refused(Reason),
}

/// What follows from time passing or a job ending.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    /// The lease lapsed unclaimed.
    Lapsed(LeaseId),
    /// The lease's job must end.
    Drain(LeaseId, EndReason),
    /// A receipt is due.
    Receipt(LeaseId),
}

/// What the order's price and shape were judged against.
#[derive(Debug)]
pub struct Quote<'a> {
    /// The offer named in the order, when this node still honours it.
    pub offer: Option<(&'a Draft, Option<Amount>)>,
    /// Whether class, term and intervals are ones that this node sells, else what is not.
    pub sold: Result<(), Vec<Figure>>,
}

impl Book {
    /// An empty book over `capacity`.
    #[must_use]
    pub fn new(
        hand: Hand,
        certificate: Signed,
        boot: BootId,
        grace: Span,
        capacity: Resources,
        plant: Plant,
    ) -> Self {
        Self {
            hand,
            certificate,
            boot,
            grace,
            capacity,
            promised: Resources::default(),
            leases: BTreeMap::new(),
            open: 0,
            requests: BTreeMap::new(),
            spent: VecDeque::new(),
            due: Due::default(),
            fence: 0,
            plant,
        }
    }

    /// Takes back a lease that was kept, with its receipts in any order; those that are
    /// countersigned, or were not yet part of the chain when the node died, are left out.
    /// `None` when what was kept does not decode: the caller must not go on without it.
    pub fn restore(
        &mut self,
        now: Boot,
        kept: Lent,
        mut unacknowledged: VecDeque<(u64, Draft)>,
    ) -> Option<LeaseId> {
        let id = LeaseId(kept.grant.id());
        let order_envelope = Envelope::decode(&kept.order.envelope).ok()?;
        let order: Order = wire::decode::<MAX_OBJECT, _>(&order_envelope.body).ok()?;
        let envelope = Envelope::decode(&kept.grant.envelope).ok()?;
        let terms: Grant = wire::decode::<MAX_OBJECT, _>(&envelope.body).ok()?;
        let request = (order.lessee, order.request);
        // A receipt beyond the kept chain was cut off from it by a crash: it never left.
        let number = kept.chain.number;
        unacknowledged.retain(|(n, _)| *n > kept.acknowledged.0 && *n <= number);
        unacknowledged.make_contiguous().sort_by_key(|(n, _)| *n);
        if kept.stage != Stage::Ended {
            self.promised = self.promised.plus(&terms.shape);
            self.open += 1;
        }
        let lease = Lease {
            terms,
            request,
            order_not_after: order_envelope.header.not_after,
            reported: kept.chain.usage,
            running: kept.stage != Stage::Ended && kept.claimed.is_some() && kept.outcome.is_none(),
            // Whoever waited through a restart of this node gets its time to answer anew.
            asked: (!unacknowledged.is_empty()).then_some(now),
            unacknowledged,
            receipt_due: now,
            ended: (kept.stage == Stage::Ended).then_some(now),
            kept,
        };
        self.requests.insert(request, id);
        self.leases.insert(id, lease);
        self.reschedule(id);
        Some(id)
    }

    /// What is not promised.
    #[must_use]
    pub fn free(&self) -> Resources {
        self.capacity.minus(&self.promised)
    }

    /// All there is.
    #[must_use]
    pub const fn capacity(&self) -> &Resources {
        &self.capacity
    }

    /// Changes what there is; what is promised stays promised.
    pub fn set_capacity(&mut self, capacity: Resources) {
        self.capacity = capacity;
    }

    /// What is promised: granted, active and draining.
    #[must_use]
    pub const fn promised(&self) -> &Resources {
        &self.promised
    }

    /// One lease.
    #[must_use]
    pub fn get(&self, id: &LeaseId) -> Option<&Lease> {
        self.leases.get(id)
    }

    /// Every lease in memory.
    pub fn leases(&self) -> impl Iterator<Item = (&LeaseId, &Lease)> {
        self.leases.iter()
    }

    /// Decides about an order whose papers were judged already.
    pub fn place(&mut self, now: Now, order: &Verified<Order>, quote: &Quote<'_>) -> Placed {
        let body = order.body();
        let request = (body.lessee, body.request);
        if let Some(id) = self.requests.get(&request) {
            // Its validity was over when it was forgotten, whatever the wall clock says now.
            let Some(lease) = self.leases.get(id) else {
                return Placed::Refused(Reason::Expired, Vec::new());
            };
            let same = lease.terms.order == order.id();
            if same || self.plant.is("forget-conflicts") {
                return Placed::Repeat(lease.kept.grant.clone());
            }
            return Placed::Refused(Reason::Conflict, Vec::new());
        }
        let Some((offer, rate)) = quote.offer else {
            return Placed::Refused(Reason::StaleOffer, Vec::new());
        };
        if let Err(figures) = &quote.sold {
            return Placed::Refused(Reason::NotOffered, figures.clone());
        }
        let Some(rate) = rate else {
            return Placed::Refused(Reason::NotOffered, Vec::new());
        };
        if rate > body.ceiling {
            let figure = Figure { of: "rate".into(), have: rate.0, need: body.ceiling.0 };
            return Placed::Refused(Reason::Price, vec![figure]);
        }
        let full = self.open >= MAX_LEASES || self.leases.len() >= MAX_KNOWN;
        if full || self.spent.len() >= MAX_SPENT {
            return Placed::Refused(Reason::Busy, Vec::new());
        }
        let free = self.free();
        if !body.shape.fits(&free) && !self.plant.is("oversell") {
            return Placed::Refused(Reason::Capacity, figures(&body.shape, &free));
        }
        match self.grant(now, order, offer, rate) {
            Ok((id, draft)) => Placed::Granted(id, draft),
            Err(_) => Placed::Refused(Reason::NotOffered, Vec::new()),
        }
    }

    fn grant(
        &mut self,
        now: Now,
        order: &Verified<Order>,
        offer: &Draft,
        rate: Amount,
    ) -> Result<(LeaseId, Draft), wire::EncodeError> {
        let body = order.body();
        self.fence += 1;
        let terms = Grant {
            order: order.id(),
            lessee: body.lessee,
            delegate: body.delegate,
            shape: body.shape.clone(),
            class: body.class,
            rate,
            cap: body.cap,
            exposure: body.exposure,
            term: body.term,
            claim_within: body.claim_within,
            grace: self.grace,
            receipt_every: body.receipt_every,
            fence: Fence { epoch: self.hand.epoch, number: self.fence },
            decided: now.wall,
            certificate: self.certificate.clone(),
        };
        let not_after = now.wall + terms.term + EVIDENCE_LIFE;
        let grant = self.hand.draft(order.id(), 0, not_after, &terms)?;
        let id = LeaseId(grant.id());
        self.promised = self.promised.plus(&terms.shape);
        self.open += 1;
        self.requests.insert((body.lessee, body.request), id);
        let kept = Lent {
            order: order.signed().clone(),
            grant: grant.clone(),
            offer: Some(offer.clone()),
            boot: self.boot,
            decided: now.boot,
            stage: Stage::Granted,
            claimed: None,
            stopped: None,
            end: None,
            outcome: None,
            release_after: false,
            acts: Vec::new(),
            chain: Chain::default(),
            acknowledged: (0, Amount::ZERO),
            termination: None,
        };
        let lease = Lease {
            kept,
            terms,
            request: (body.lessee, body.request),
            order_not_after: order.header().not_after,
            reported: Usage::default(),
            running: false,
            unacknowledged: VecDeque::new(),
            receipt_due: Boot(0),
            asked: None,
            ended: None,
        };
        self.leases.insert(id, lease);
        self.reschedule(id);
        Ok((id, grant))
    }

    /// Decides about a claim.
    pub fn claim(&mut self, now: Now, claim: &Verified<Claim>, runs: bool) -> Acted {
        let (id, body) = (claim.body().lease, claim.body());
        let late = self.plant.is("claim-after-lapse");
        let lease = match self.act(&id, body.act, claim.id(), claim.signer()) {
            Ok(lease) => lease,
            Err(answer) => return answer,
        };
        match lease.kept.stage {
            Stage::Ended | Stage::Draining if !late => return Acted::Refused(Reason::Ended),
            Stage::Active => return Acted::Refused(Reason::InUse),
            _ => {}
        }
        if lease.kept.decided + lease.terms.claim_within <= now.boot && !late {
            return Acted::Refused(Reason::Ended);
        }
        if !runs {
            return Acted::Refused(Reason::NotOffered);
        }
        let every = lease.terms.receipt_every;
        lease.kept.stage = Stage::Active;
        lease.kept.claimed = Some(now.boot);
        lease.kept.release_after = body.job.release_after;
        lease.receipt_due = now.boot + every;
        lease.running = true;
        self.accept(id, body.act, claim.id(), now)
    }

    /// Decides about a release. The lease drains at once; whether a job is still to be ended is
    /// in [`Lease::running`].
    pub fn release(&mut self, now: Now, release: &Verified<Release>) -> Acted {
        let (id, body) = (release.body().lease, release.body());
        let lease = match self.act(&id, body.act, release.id(), release.signer()) {
            Ok(lease) => lease,
            Err(answer) => return answer,
        };
        if lease.kept.stage == Stage::Ended {
            return Acted::Refused(Reason::Ended);
        }
        let answer = self.accept(id, body.act, release.id(), now);
        self.drain(now, &id, EndReason::Released, release.signer());
        answer
    }

    /// Finds the lease an act is about, unless the act is answered already.
    fn act(&mut self, id: &LeaseId, act: ActId, of: Hash, by: KeyId) -> Result<&mut Lease, Acted> {
        let rewords = self.plant.is("reword-repeats");
        let unknown = Acted::Refused(Reason::UnknownLease);
        let Some(lease) = self.leases.get_mut(id) else { return Err(unknown) };
        if by != lease.terms.delegate && by != lease.terms.lessee {
            return Err(Acted::Refused(Reason::NotAdmitted));
        }
        if let Some(done) = lease.kept.acts.iter().find(|done| done.id == act) {
            return Err(if done.of == of && rewords {
                let body = Acceptance { lease: *id, act, of };
                let answer = self.hand.draft(of, 0, Wall(u64::MAX), &body);
                Acted::Repeat(answer.unwrap_or_else(|_| done.answer.clone()))
            } else if done.of == of {
                Acted::Repeat(done.answer.clone())
            } else {
                Acted::Refused(Reason::Conflict)
            });
        }
        if lease.kept.acts.len() >= MAX_ACTS {
            return Err(Acted::Refused(Reason::Busy));
        }
        Ok(lease)
    }

    fn accept(&mut self, id: LeaseId, act: ActId, of: Hash, now: Now) -> Acted {
        let body = Acceptance { lease: id, act, of };
        let answer = self.hand.draft(of, 0, now.wall + EVIDENCE_LIFE, &body);
        let (Ok(answer), Some(lease)) = (answer, self.leases.get_mut(&id)) else {
            return Acted::Refused(Reason::UnknownLease);
        };
        lease.kept.acts.push(Act { id: act, of, answer: answer.clone() });
        self.reschedule(id);
        Acted::Accepted(answer)
    }

    /// Begins to end a lease: billing stops here. False when it is ending or over already.
    pub fn drain(&mut self, now: Now, id: &LeaseId, reason: EndReason, by: KeyId) -> bool {
        let Some(lease) = self.leases.get_mut(id) else { return false };
        if lease.kept.stage >= Stage::Draining {
            return false;
        }
        lease.kept.stage = Stage::Draining;
        lease.kept.end = Some((reason, by));
        if lease.kept.claimed.is_some() {
            // What is billed ends with the lease's own limits, however late the clock was read.
            let latest = lease.kept.claimed.map(|at| at + chain::billable(&lease.terms));
            let term_end = lease.kept.decided + lease.terms.term;
            let stop = now.boot.min(term_end).min(latest.unwrap_or(now.boot));
            lease.kept.stopped = Some(stop);
        }
        self.reschedule(*id);
        true
    }

    /// The job's processes are gone. True when that completes the end of a lease.
    pub fn reaped(&mut self, id: &LeaseId, outcome: Outcome) -> bool {
        let Some(lease) = self.leases.get_mut(id) else { return false };
        lease.running = false;
        lease.kept.outcome.get_or_insert(outcome);
        lease.kept.stage == Stage::Draining
    }

    /// The job has ended: a lease that was claimed for that long drains. True when it does.
    pub fn release_after(&mut self, now: Now, id: &LeaseId) -> bool {
        let Some(lease) = self.leases.get(id) else { return false };
        let over = lease.kept.outcome.is_some() && lease.kept.release_after;
        let by = lease.terms.delegate;
        over && self.drain(now, id, EndReason::Released, by)
    }

    /// Takes what the job's meter says.
    pub fn report(&mut self, id: &LeaseId, usage: Usage) {
        if let Some(lease) = self.leases.get_mut(id) {
            lease.reported = usage;
        }
    }

    /// The next receipt of a lease; the final one when it is draining. `None` when it was never
    /// claimed or its last receipt is written.
    pub fn receipt(&mut self, now: Now, id: &LeaseId) -> Option<(u64, Draft)> {
        let lease = self.leases.get_mut(id)?;
        let claimed = lease.kept.claimed?;
        if lease.kept.chain.closed() {
            return None;
        }
        let until = lease.kept.stopped.unwrap_or(now.boot);
        let billed = until.since(claimed).min(chain::billable(&lease.terms));
        let usage = Usage { billed, ..lease.reported };
        let end = (lease.kept.stage == Stage::Draining)
            .then_some(lease.kept.end.map(|(reason, _)| reason))
            .flatten();
        let mut receipt = lease.kept.chain.next(*id, &lease.terms, usage, end, now.wall);
        if self.plant.is("inflate-receipts") {
            receipt.charge = receipt.charge.plus(Amount(1_000));
        }
        let draft =
            self.hand.draft(id.0, receipt.number, now.wall + EVIDENCE_LIFE, &receipt).ok()?;
        lease.kept.chain.advance(&receipt, draft.id());
        lease.unacknowledged.push_back((receipt.number, draft.clone()));
        lease.asked.get_or_insert(now.boot);
        lease.receipt_due = now.boot + lease.terms.receipt_every;
        self.reschedule(*id);
        Some((receipt.number, draft))
    }

    /// Takes the lessee's countersignature. False when it matches no receipt of this lease.
    pub fn acknowledge(&mut self, now: Boot, ack: &Verified<Acknowledgement>) -> bool {
        let body = ack.body();
        let Some(lease) = self.leases.get_mut(&body.lease) else { return false };
        let known = lease.unacknowledged.iter().any(|(number, draft)| {
            *number == body.number && draft.id() == body.receipt && body.charge == charge_of(draft)
        });
        if !known || ack.signer() != lease.terms.delegate {
            return false;
        }
        lease.unacknowledged.retain(|(number, _)| *number > body.number);
        lease.kept.acknowledged = (body.number, body.charge);
        lease.asked = (!lease.unacknowledged.is_empty()).then_some(now);
        self.reschedule(body.lease);
        true
    }

    /// Ends a draining lease whose job is gone (or a granted one that lapsed): its capacity is
    /// free from here on. Gives the termination.
    pub fn finish(&mut self, now: Now, id: &LeaseId) -> Option<Draft> {
        let lease = self.leases.get_mut(id)?;
        if lease.kept.stage == Stage::Ended || lease.running {
            return None;
        }
        let (reason, by) = lease.kept.end.unwrap_or((EndReason::Lapsed, self.hand.me));
        let body = Termination {
            lease: *id,
            reason,
            by,
            at: now.wall,
            billed: lease.kept.chain.usage.billed,
            charge: lease.kept.chain.charge,
            credit: Amount::ZERO,
            receipt: lease.kept.chain.last,
            outcome: lease.kept.outcome.clone(),
        };
        let draft = self.hand.draft(id.0, 0, now.wall + EVIDENCE_LIFE, &body).ok()?;
        lease.kept.stage = Stage::Ended;
        lease.kept.end = Some((reason, by));
        lease.kept.termination = Some(draft.clone());
        lease.ended = Some(now.boot);
        self.promised = self.promised.minus(&lease.terms.shape);
        self.open = self.open.saturating_sub(1);
        self.reschedule(*id);
        Some(draft)
    }

    /// What is due at `now`.
    pub fn due(&mut self, now: Boot) -> Vec<Turn> {
        let mut turns = Vec::new();
        while let Some(id) = self.due.pop(now) {
            let Some(lease) = self.leases.get_mut(&id) else { continue };
            match lease.kept.stage {
                Stage::Granted => turns.push(Turn::Lapsed(id)),
                Stage::Active => match lease.turn(now) {
                    // Scheduled no more: the caller drains it.
                    Some(Some(reason)) => turns.push(Turn::Drain(id, reason)),
                    Some(None) => {
                        // Not to be found due again within this very instant.
                        lease.receipt_due = now + lease.terms.receipt_every;
                        self.reschedule(id);
                        turns.push(Turn::Receipt(id));
                    }
                    None => self.reschedule(id),
                },
                Stage::Draining | Stage::Ended => {}
            }
        }
        turns
    }

    /// When [`Book::due`] is next due.
    #[must_use]
    pub fn next_wake(&self) -> Option<Boot> {
        self.due.next()
    }

    /// Forgets leases that are over, agreed or long waited for, that `may_go`, and whose order can
    /// no longer be repeated; gives them for the history.
    pub fn prune(&mut self, now: Now, may_go: impl Fn(&LeaseId) -> bool) -> Vec<(LeaseId, Lease)> {
        let over = |(id, lease): (&LeaseId, &Lease)| {
            let waited = lease.ended.is_some_and(|at| at + AWAIT < now.boot);
            let over = lease.kept.stage == Stage::Ended
                && (lease.unacknowledged.is_empty() || waited)
                && lease.order_not_after + SKEW < now.wall
                && may_go(id);
            over.then_some(*id)
        };
        let gone: Vec<_> = self.leases.iter().filter_map(over).collect();
        let mut pruned = Vec::with_capacity(gone.len());
        for id in gone {
            if let Some(lease) = self.leases.remove(&id) {
                self.spent.push_back((now.boot + REMEMBER, lease.request));
                pruned.push((id, lease));
            }
        }
        while let Some((_, request)) = self.spent.pop_front_if(|(at, _)| *at < now.boot) {
            self.requests.remove(&request);
        }
        pruned
    }

    /// Whether an order with this request was granted before.
    #[must_use]
    pub fn has_request(&self, lessee: &KeyId, request: &RequestId) -> bool {
        self.requests.contains_key(&(*lessee, *request))
    }

    /// The host has rebooted: instants of the boot before say nothing on this clock. What was
    /// billed stays what the last receipt says.
    pub fn rebase(&mut self, id: &LeaseId, boot: BootId, now: Boot) {
        let Some(lease) = self.leases.get_mut(id) else { return };
        lease.kept.boot = boot;
        lease.kept.decided = now;
        if lease.kept.claimed.is_some() {
            lease.kept.claimed = Some(now - lease.kept.chain.usage.billed);
        }
        self.reschedule(*id);
    }

    /// What ran under a lease is gone with its node or host: it ends, billed up to its last
    /// receipt.
    pub fn drain_lost(&mut self, now: Now, id: &LeaseId) {
        let me = self.hand.me;
        self.drain(now, id, EndReason::Lost, me);
        let Some(lease) = self.leases.get_mut(id) else { return };
        if let Some(claimed) = lease.kept.claimed {
            lease.kept.stopped = Some(claimed + lease.kept.chain.usage.billed);
        }
    }

    /// A planted bug: gives capacity back while the runner is still there.
    pub fn plant_free_early(&mut self, id: &LeaseId) {
        if let Some(lease) = self.leases.get(id).filter(|_| self.plant.is("free-at-term")) {
            self.promised = self.promised.minus(&lease.terms.shape);
        }
    }

    fn reschedule(&mut self, id: LeaseId) {
        let Some(lease) = self.leases.get_mut(&id) else { return };
        let kept = &lease.kept;
        let term_end = kept.decided + lease.terms.term;
        let next = match kept.stage {
            Stage::Granted => {
                let claim_by = kept.decided + lease.terms.claim_within;
                Some(if self.plant.is("never-lapse") {
                    Boot(u64::MAX)
                } else {
                    claim_by.min(term_end)
                })
            }
            Stage::Active => {
                let spent = kept.claimed.map(|at| at + chain::billable(&lease.terms));
                let end = term_end.min(spent.unwrap_or(term_end));
                let end = if self.plant.is("outlive-term") { end + Span::secs(60) } else { end };
                Some(end.min(lease.next_receipt()).min(lease.exposed_out()))
            }
            Stage::Draining | Stage::Ended => None,
        };
        match next {
            Some(at) => self.due.set(id, at),
            None => self.due.remove(&id),
        }
    }
}

/// Whether a kept lease is of no more concern: ended and agreed a while ago, its order no longer
/// valid. Its papers stay on disk, as proof.
#[must_use]
pub fn is_past(kept: &Lent, now: Wall) -> bool {
    let agreed = kept.stage == Stage::Ended && kept.acknowledged.0 == kept.chain.number;
    let Some(end) = kept.termination.as_ref().filter(|_| agreed) else { return false };
    let order = Envelope::decode(&kept.order.envelope).ok();
    let end = Envelope::decode(&end.envelope).ok();
    let end = end.and_then(|e| wire::decode::<MAX_OBJECT, Termination>(&e.body).ok());
    order.is_some_and(|order| order.header.not_after + SKEW < now)
        && end.is_some_and(|end| end.at + AWAIT < now)
}

impl Lease {
    /// When the term ends.
    #[must_use]
    pub fn term_end(&self) -> Boot {
        self.kept.decided + self.terms.term
    }

    /// When `amount` more than the lessee agreed to is owed; never while that is beyond the cap.
    fn owed_at(&self, amount: Amount) -> Boot {
        let never = Boot(u64::MAX);
        let Some(claimed) = self.kept.claimed else { return never };
        let total = self.kept.acknowledged.1.plus(amount);
        if total >= self.terms.cap {
            return never;
        }
        total.lasts_at(self.terms.rate).map_or(never, |span| claimed + span + Span::millis(1))
    }

    /// When the next receipt is due: at its interval, and early enough that a lessee who answers is
    /// never ended for what it was not asked to countersign.
    fn next_receipt(&self) -> Boot {
        if self.unacknowledged.len() >= MAX_UNANSWERED {
            return Boot(u64::MAX);
        }
        let paced = self.receipt_due - self.terms.receipt_every + MIN_RECEIPT_EVERY;
        let half = self.owed_at(Amount(self.terms.exposure.0 / 2));
        self.receipt_due.min(half.max(paced))
    }

    /// When more stands unacknowledged than the lease allows, and the lessee had time to answer.
    fn exposed_out(&self) -> Boot {
        let never = Boot(u64::MAX);
        let Some(asked) = self.asked else { return never };
        self.owed_at(self.terms.exposure).max(asked + ANSWER)
    }

    /// What an active lease is due for: `Some(Some(reason))` to end, `Some(None)` a receipt.
    #[allow(clippy::option_option)] // nothing, an end, a receipt: said where it is used
    fn turn(&self, now: Boot) -> Option<Option<EndReason>> {
        let spent = self.kept.claimed.map(|at| at + chain::billable(&self.terms));
        if self.term_end() <= now {
            Some(Some(EndReason::Term))
        } else if spent.is_some_and(|at| at <= now) {
            Some(Some(EndReason::Budget))
        } else if self.exposed_out() <= now {
            Some(Some(EndReason::Exposure))
        } else if self.next_receipt() <= now {
            Some(None)
        } else {
            None
        }
    }
}

fn charge_of(receipt: &Draft) -> Amount {
    let body = Envelope::decode(&receipt.envelope).ok();
    let receipt = body.and_then(|e| wire::decode::<MAX_OBJECT, Receipt>(&e.body).ok());
    receipt.map_or(Amount::ZERO, |receipt| receipt.charge)
}

/// What runs short, as figures.
#[must_use]
pub fn figures(need: &Resources, have: &Resources) -> Vec<Figure> {
    let mut out = Vec::new();
    for (of, have, need) in [
        ("cpu_milli", have.cpu_milli, need.cpu_milli),
        ("memory", have.memory, need.memory),
        ("disk", have.disk, need.disk),
    ] {
        if need > have {
            out.push(Figure { of: of.into(), have, need });
        }
    }
    for gpu in &need.gpus {
        let count = have.gpu_count(&gpu.kind);
        if gpu.count > count {
            let of = format!("gpu {}", gpu.kind);
            out.push(Figure { of, have: count.into(), need: gpu.count.into() });
        }
    }
    out
}

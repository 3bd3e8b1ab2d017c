//! The lessor's book: every lease this node granted, and never more than it has.
//!
//! ```text
//! order -> Granted --claim--> Active --term, release, budget, lost, a hold's end--> Draining --reaped--> Ended
//!             \--claim_by passes--> Ended(lapsed, unbilled)
//!
//! a hold: notice --> frozen, unbilled --> end            (reclaimed, revoked, exposure)
//!             \-----------\--lifted--> Active as before
//! ```
//!
//! The node decides alone about its capacity, in one total order, so no consensus is needed.
//! Promised capacity (granted + active + draining) never exceeds what there is, and returns when
//! the runner is reaped, not when the term ends. Deadlines are boot time, counted from the
//! decision. Ended is final. At this lessor one (lessee, request id) makes at most one lease, and
//! a repeat of an order or an act is answered with the same bytes. A renewal never shortens, and
//! is only taken for the version of the lease that it names. A member of a gang starts nothing
//! before every member has committed.
//!
//! The book changes state and says what follows; the core keeps, sends and starts.

mod acts;
mod early;
mod lease;

use std::collections::{BTreeMap, VecDeque};

pub use early::{ReclaimPlan, Reclaimed};
pub use lease::{Act, Hold, Joined, Lease, Lent, Stage, is_past, running_claim};
use lease::{Next, charge_of};

use crate::base::due::Due;
use crate::base::id::{KeyId, LeaseId, RequestId};
use crate::base::money::Amount;
use crate::base::plant::Plant;
use crate::base::resource::Resources;
use crate::base::time::{Boot, BootId, Now, SKEW, Span};
use crate::words::chain::{self, Chain, EVIDENCE_LIFE};
use crate::words::contract::{
    EarlyEnd, EndReason, Fence, Figure, Grant, Order, Reason, Termination,
};
use crate::words::model::{Service, Tally};
use crate::words::object::{Envelope, body_in};
use crate::words::sign::{Draft, Hand, Signed, Verified};
use crate::words::usage::{Acknowledgement, Outcome, Usage};
use crate::words::wire;

/// The most acts remembered per lease: of many renewals the oldest are forgotten, a repeat of those
/// is refused for its version.
pub const MAX_ACTS: usize = 24;
/// How many of them may be refusals.
const MAX_DENIED: usize = 8;
/// What one of them takes on disk at most, in bytes: its answer is of fixed size.
pub const ACT_LEN: usize = 512;
/// The most leases that may be promised at once.
const MAX_LEASES: usize = 100_000;
/// The most leases on models that one lessee may hold here.
const MAX_MODEL_LEASES: usize = 256;
/// The most leases in memory, ended ones included.
const MAX_KNOWN: usize = 300_000;
/// How long an ended lease waits for a countersignature under its last receipt. Its papers stay on
/// disk.
const AWAIT: Span = Span::secs(15 * 60);
/// How many receipts may wait for a countersignature: the next one covers them all.
const MAX_UNANSWERED: usize = 8;
/// How long a lessee has to countersign before what stands unacknowledged ends its lease.
const ANSWER: Span = Span::secs(2);
/// How much longer than it may stay unclaimed a member of a gang waits for the words of the others.
pub const GATHER_FOR: Span = Span::secs(60);
/// The most requests remembered beyond their leases.
const MAX_SPENT: usize = 1_000_000;
/// How long a request is remembered beyond its lease. The wall clock may be set back, but an order
/// names an offer, which is honoured no longer than this on the boot clock.
pub const REMEMBER: Span = Span::secs(15 * 60);

/// All leases of this lessor.
#[derive(Debug)]
pub struct Book {
    hand: Hand,
    certificate: Signed,
    boot: BootId,
    grace: Span,
    capacity: Resources,
    promised: Resources,
    /// Boxed: a node of the map has room for eleven, and is a third empty on average.
    leases: BTreeMap<LeaseId, Box<Lease>>,
    /// How many of them have not ended.
    open: usize,
    requests: BTreeMap<(KeyId, RequestId), LeaseId>,
    /// Requests whose lease was forgotten, with the instant from which they may be as well.
    spent: VecDeque<(Boot, (KeyId, RequestId))>,
    due: Due<LeaseId>,
    fence: u64,
    /// What the operator keeps for itself of the capacity, lent or not.
    withheld: Resources,
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
    /// The same act was refused before, and stays so: here is the same refusal.
    Denied(Draft),
    /// It is accepted.
    Accepted(Draft),
    /// It is refused.
    Refused(Reason, Vec<Figure>),
}

/// What becomes of a refusal.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Denied {
    /// It is remembered, and to be kept before it is said.
    Remembered,
    /// It need not be: the act could not be accepted anyhow.
    Needless,
    /// There is no room for it: nothing is to be said that binds.
    NoRoom,
}

/// What follows from time passing or a job ending.
#[derive(Debug, PartialEq, Eq)]
pub enum Turn {
    /// The lease lapsed unclaimed.
    Lapsed(LeaseId),
    /// The lease's job must end; who brought that about.
    Drain(LeaseId, EndReason, KeyId),
    /// The lease's job is to be frozen.
    Freeze(LeaseId),
    /// A receipt is due.
    Receipt(LeaseId),
}

/// An offer that is still honoured: the offer, the price per hour if what is ordered has one, and
/// what holds if the lease is ended early.
pub type Honoured<'a> = (&'a Draft, Option<Amount>, EarlyEnd);

/// What the order's price and shape were judged against.
#[derive(Debug)]
pub struct Quote<'a> {
    /// What the offer named in the order says, when this node still honours it.
    pub offer: Option<Honoured<'a>>,
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
            withheld: Resources::default(),
            plant,
        }
    }

    /// Takes back a lease that was kept, with its receipts in any order; those that are
    /// countersigned, or were not yet part of the chain when the node died, are left out. `None` when what was kept does not decode: the caller must not go on without it.
    pub fn restore(
        &mut self,
        now: Boot,
        kept: Lent,
        mut unacknowledged: VecDeque<(u64, Draft)>,
    ) -> Option<LeaseId> {
        let id = LeaseId(kept.grant.id());
        let order_envelope = Envelope::decode(&kept.order.envelope).ok()?;
        let order: Order = order_envelope.read().ok()?;
        let mut terms: Grant = body_in(&kept.grant.envelope)?;
        // What many leases hold they share.
        if terms.certificate == self.certificate {
            terms.certificate = self.certificate.clone();
        }
        let request = (order.lessee, order.request);
        // A receipt beyond the kept chain was cut off from it by a crash: it never left.
        let number = kept.chain.number;
        unacknowledged.retain(|(n, _)| *n > kept.acknowledged.0 && *n <= number);
        unacknowledged.make_contiguous().sort_by_key(|(n, _)| *n);
        if kept.stage != Stage::Ended {
            self.promised = self.promised.plus(&terms.shape);
            self.open += 1;
        }
        let gang = kept.joined.as_ref().and_then(|joined| body_in(&joined.gang.envelope));
        let lease = Lease {
            terms,
            request,
            order_not_after: order_envelope.header.not_after,
            gang,
            commits: BTreeMap::new(),
            pending: None,
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
        self.leases.insert(id, Box::new(lease));
        self.reschedule(id);
        Some(id)
    }

    /// What is neither promised nor withheld.
    #[must_use]
    pub fn free(&self) -> Resources {
        self.capacity.minus(&self.promised).minus(&self.withheld)
    }

    /// What the operator keeps for itself.
    #[must_use]
    pub const fn withheld(&self) -> &Resources {
        &self.withheld
    }

    /// Keeps so much of the capacity out of any new lease.
    pub fn withhold(&mut self, withheld: Resources) {
        self.withheld = withheld;
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
        self.leases.get(id).map(AsRef::as_ref)
    }

    /// Every lease in memory.
    pub fn leases(&self) -> impl Iterator<Item = (&LeaseId, &Lease)> {
        self.leases.iter().map(|(id, lease)| (id, lease.as_ref()))
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
        let Some((offer, rate, early)) = quote.offer else {
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
        // Nothing else bounds how many of them somebody takes: they hold no capacity.
        let theirs = |lease: &Lease| {
            lease.terms.model.is_some()
                && lease.terms.lessee == body.lessee
                && lease.kept.stage != Stage::Ended
        };
        if body.model.is_some()
            && self.leases.values().filter(|lease| theirs(lease)).count() >= MAX_MODEL_LEASES
        {
            return Placed::Refused(Reason::Busy, Vec::new());
        }
        let free = self.free();
        if !body.shape.fits(&free) && !self.plant.is("oversell") {
            return Placed::Refused(Reason::Capacity, figures(&body.shape, &free));
        }
        match self.grant(now, order, (offer, early), rate) {
            Ok((id, draft)) => Placed::Granted(id, draft),
            Err(_) => Placed::Refused(Reason::NotOffered, Vec::new()),
        }
    }

    fn grant(
        &mut self,
        now: Now,
        order: &Verified<Order>,
        (offer, early): (&Draft, EarlyEnd),
        rate: Amount,
    ) -> Result<(LeaseId, Draft), wire::EncodeError> {
        let body = order.body();
        self.fence += 1;
        let terms = Grant {
            order: order.id(),
            lessee: body.lessee,
            delegate: body.delegate,
            shape: body.shape.clone(),
            model: body.model.clone(),
            class: body.class,
            rate,
            cap: body.cap,
            exposure: body.exposure,
            term: body.term,
            longest: body.longest,
            early,
            gang: body.gang,
            claim_within: body.claim_within,
            grace: self.grace,
            receipt_every: body.receipt_every,
            fence: Fence { epoch: self.hand.epoch, number: self.fence },
            decided: now.wall,
            certificate: self.certificate.clone(),
        };
        let not_after = now.wall + terms.longest + EVIDENCE_LIFE;
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
            claim: None,
            stopped: None,
            term: terms.term,
            version: 0,
            renew: None,
            paused: Span::ZERO,
            frozen: None,
            holds: Vec::new(),
            joined: None,
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
            gang: None,
            commits: BTreeMap::new(),
            pending: None,
        };
        self.leases.insert(id, Box::new(lease));
        self.reschedule(id);
        Ok((id, grant))
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
            let (term_end, spent) = (lease.term_end(), lease.spent());
            let stop = now.boot.min(term_end).min(spent);
            // Since it was frozen nothing was billed.
            lease.kept.stopped = Some(lease.kept.frozen.map_or(stop, |at| at.min(stop)));
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

    /// Takes what the job's meter says. What was served of a model is counted by its records alone.
    pub fn report(&mut self, id: &LeaseId, usage: Usage) {
        if let Some(lease) = self.leases.get_mut(id) {
            lease.reported = Usage { tally: lease.reported.tally, ..usage };
        }
    }

    /// What was served of a model, by the last record that was kept, where no receipt covers it yet.
    pub fn restore_tally(&mut self, id: &LeaseId, tally: Tally) {
        if let Some(lease) = self.leases.get_mut(id)
            && lease.kept.chain.usage.tally.may_become(&tally)
        {
            lease.reported.tally = tally;
            self.reschedule(*id);
        }
    }

    /// A request was served under a lease on a model. Gives its number and record; none where the
    /// lease is not on a model, was not claimed, or has its final receipt.
    pub fn serve(&mut self, now: Now, id: &LeaseId, service: Service) -> Option<(u64, Draft)> {
        let lease = self.leases.get_mut(id)?;
        let model = lease.terms.model.as_ref()?.digest;
        if lease.kept.claimed.is_none() || lease.kept.chain.closed() {
            return None;
        }
        let served = lease.reported.tally.next(*id, model, service, now.wall);
        let draft = self.hand.draft(id.0, served.number, now.wall + EVIDENCE_LIFE, &served).ok()?;
        lease.reported.tally = served.tally(draft.id());
        self.reschedule(*id);
        Some((served.number, draft))
    }

    /// The next receipt of a lease; the final one when it is draining. `None` when it was never
    /// claimed or its last receipt is written.
    pub fn receipt(&mut self, now: Now, id: &LeaseId) -> Option<(u64, Draft)> {
        let lease = self.leases.get_mut(id)?;
        let claimed = lease.kept.claimed?;
        if lease.kept.chain.closed() {
            return None;
        }
        let until = lease.kept.stopped.or(lease.kept.frozen).unwrap_or(now.boot);
        let billed =
            lease.billed(claimed, until).min(chain::billable(&lease.terms, lease.kept.term));
        let usage = Usage { billed, ..lease.reported };
        let end = (lease.kept.stage == Stage::Draining)
            .then_some(lease.kept.end.map(|(reason, _)| reason))
            .flatten();
        let mut receipt =
            lease.kept.chain.next(*id, (&lease.terms, lease.kept.term), usage, end, now.wall);
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

    /// Takes the lessee's countersignature. `None` when it matches no receipt of this lease, else
    /// whether the job, frozen for want of it, is to be thawed.
    pub fn acknowledge(&mut self, now: Boot, ack: &Verified<Acknowledgement>) -> Option<bool> {
        let body = ack.body();
        let lease = self.leases.get_mut(&body.lease)?;
        let known = lease.unacknowledged.iter().any(|(number, draft)| {
            *number == body.number && draft.id() == body.receipt && body.charge == charge_of(draft)
        });
        if !known || ack.signer() != lease.terms.delegate {
            return None;
        }
        lease.unacknowledged.retain(|(number, _)| *number > body.number);
        lease.kept.acknowledged = (body.number, body.charge);
        lease.asked = (!lease.unacknowledged.is_empty()).then_some(now);
        let agreed = lease.owes_less_than(lease.terms.exposure);
        let thaws = agreed && lease.is_held(EndReason::Exposure) && {
            lease.kept.holds.retain(|hold| hold.why != EndReason::Exposure);
            lease.thaw(now)
        };
        self.reschedule(body.lease);
        Some(thaws)
    }

    /// Ends a draining lease whose job is gone (or a granted one that lapsed): its capacity is
    /// free from here on. Gives the termination.
    pub fn finish(&mut self, now: Now, id: &LeaseId) -> Option<Draft> {
        let lease = self.leases.get_mut(id)?;
        if lease.kept.stage == Stage::Ended || lease.running {
            return None;
        }
        let (reason, by) = lease.kept.end.unwrap_or((EndReason::Lapsed, self.hand.me));
        let missed = lease.missed(reason);
        let charge = lease.kept.chain.charge;
        let body = Termination {
            lease: *id,
            reason,
            by,
            at: now.wall,
            billed: lease.kept.chain.usage.billed,
            charge,
            missed,
            credit: chain::credit(&lease.terms, charge, missed, reason),
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
                Stage::Granted => match lease.withdrawn(now) {
                    Some(hold) => turns.push(Turn::Drain(id, hold.why, hold.by)),
                    None => turns.push(Turn::Lapsed(id)),
                },
                Stage::Active => match lease.turn(now, self.hand.me) {
                    // Scheduled no more: the caller drains or freezes it.
                    Next::End(reason, by) => turns.push(Turn::Drain(id, reason, by)),
                    Next::Freeze => turns.push(Turn::Freeze(id)),
                    Next::Receipt => {
                        // Not to be found due again within this very instant.
                        lease.receipt_due = now + lease.terms.receipt_every;
                        self.reschedule(id);
                        turns.push(Turn::Receipt(id));
                    }
                    Next::Nothing => self.reschedule(id),
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
    pub fn prune(
        &mut self,
        now: Now,
        may_go: impl Fn(&LeaseId) -> bool,
    ) -> Vec<(LeaseId, Box<Lease>)> {
        let over = |(id, lease): (&LeaseId, &Lease)| {
            let waited = lease.ended.is_some_and(|at| at + AWAIT < now.boot);
            let over = lease.kept.stage == Stage::Ended
                && (lease.unacknowledged.is_empty() || waited)
                && lease.order_not_after + SKEW < now.wall
                && may_go(id);
            over.then_some(*id)
        };
        let gone: Vec<_> = self.leases().filter_map(over).collect();
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
        match (lease.kept.claimed, lease.kept.stopped) {
            // Billing stopped before: for how long it was billed, and how much of the term was
            // left then, stays as it was.
            (Some(claimed), Some(stopped)) => {
                let billed = lease.billed(claimed, stopped);
                let left = lease.term_end().since(stopped);
                let begun = now - billed;
                lease.kept.claimed = Some(begun);
                lease.kept.stopped = Some(begun + billed);
                lease.kept.decided = begun + billed + left - lease.kept.term;
            }
            (Some(_), None) => {
                lease.kept.claimed = Some(now - lease.kept.chain.usage.billed);
                lease.kept.decided = now;
            }
            (None, _) => lease.kept.decided = now,
        }
        lease.kept.paused = Span::ZERO;
        lease.kept.frozen = None;
        lease.kept.holds.clear();
        self.reschedule(*id);
    }

    /// What ran under a lease is gone with its node or host: it ends, billed up to its last
    /// receipt.
    pub fn drain_lost(&mut self, now: Now, id: &LeaseId) {
        let me = self.hand.me;
        // What was ending already ends as it was, billed to when that began.
        if !self.drain(now, id, EndReason::Lost, me) {
            return;
        }
        self.stop_at_last_receipt(id);
    }

    /// A lease that is ending is billed up to its last receipt and no further: nobody can say how
    /// much longer what ran was there.
    pub fn stop_at_last_receipt(&mut self, id: &LeaseId) {
        let Some(lease) = self.leases.get_mut(id) else { return };
        if let Some(claimed) = lease.kept.claimed {
            let billed = lease.kept.chain.usage.billed;
            lease.kept.stopped = Some(claimed + lease.kept.paused + billed);
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
        let holds = lease.kept.holds.iter();
        let next = match lease.kept.stage {
            Stage::Granted => {
                let held = holds.map(|hold| hold.freeze).min().unwrap_or(Boot(u64::MAX));
                Some(if self.plant.is("never-lapse") {
                    Boot(u64::MAX)
                } else {
                    lease.claim_by().min(held)
                })
            }
            Stage::Active => {
                let frozen = lease.kept.frozen.is_some();
                let held = holds.map(|hold| if frozen { hold.end } else { hold.freeze }).min();
                let spent = if lease.is_used_up() { Boot(0) } else { lease.spent() };
                let end = lease.term_end().min(spent);
                let end = if self.plant.is("outlive-term") { end + Span::secs(60) } else { end };
                let end = end.min(held.unwrap_or(end));
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

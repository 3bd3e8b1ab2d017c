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
    Acceptance, Claim, Class, Commit, EarlyEnd, EndReason, Fence, Figure, Gang, Grant,
    MIN_RECEIPT_EVERY, Order, Reason, Release, Renew, Renewal, Termination,
};
use crate::words::object::{Envelope, Kind, body_in};
use crate::words::sign::{Draft, Hand, Signed, Verified};
use crate::words::usage::{Acknowledgement, Outcome, Receipt, Usage};
use crate::words::wire;

/// The most acts remembered per lease: of many renewals the oldest are forgotten, a repeat of those
/// is refused for its version.
pub const MAX_ACTS: usize = 24;
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
/// How much longer than it may stay unclaimed a member of a gang waits for the words of the others.
pub const GATHER_FOR: Span = Span::secs(60);
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
    /// The acts that were accepted.
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
    /// The gang, decoded, once it has committed to it.
    pub gang: Option<Gang>,
    /// The other members' words so far, by lessor.
    pub commits: BTreeMap<KeyId, Signed>,
    /// The claim that waits for them, or whose job is not begun yet.
    pub pending: Option<Verified<Claim>>,
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
    /// It is accepted.
    Accepted(Draft),
    /// It is refused.
    Refused(Reason, Vec<Figure>),
}

/// A lease that would be taken back.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reclaimed {
    /// Which.
    pub lease: LeaseId,
    /// What comes back.
    pub shape: Resources,
    /// How firmly it was lent.
    pub class: Class,
    /// What is owed to its lessee for that, by its own terms.
    pub credit: Amount,
    /// Why it ends: by itself in time, or taken back.
    pub why: EndReason,
    /// In what time its capacity is back at the latest, from now on.
    pub within: Span,
}

/// How capacity can be had back.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReclaimPlan {
    /// Which leases end for it.
    pub leases: Vec<Reclaimed>,
    /// What is free already.
    pub free: Resources,
    /// What is still missing then.
    pub short: Resources,
    /// All credits together.
    pub credit: Amount,
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
        let order: Order = order_envelope.read().ok()?;
        let terms: Grant = body_in(&kept.grant.envelope)?;
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
        self.leases.insert(id, lease);
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
        self.leases.insert(id, lease);
        self.reschedule(id);
        Ok((id, grant))
    }

    /// Decides about a claim.
    pub fn claim(&mut self, now: Now, claim: &Verified<Claim>, runs: bool) -> Acted {
        let (id, body) = (claim.body().lease, claim.body());
        let late = self.plant.is("claim-after-lapse");
        let alone = self.plant.is("start-uncommitted");
        let lease = match self.act(&id, body.act, claim.id(), claim.signer()) {
            Ok(lease) => lease,
            Err(answer) => return answer,
        };
        match lease.kept.stage {
            Stage::Ended | Stage::Draining if !late => return no(Reason::Ended),
            Stage::Active => return no(Reason::InUse),
            _ => {}
        }
        if lease.claim_by() <= now.boot && !late {
            return no(Reason::Ended);
        }
        if !runs {
            return no(Reason::NotOffered);
        }
        if !lease.is_whole() && !alone {
            return no(Reason::NotCommitted);
        }
        lease.activate(now.boot, claim);
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
            return no(Reason::Ended);
        }
        let answer = self.accept(id, body.act, release.id(), now);
        self.drain(now, &id, EndReason::Released, release.signer());
        answer
    }

    /// Decides about a renewal. What it says is in force once it is durable.
    pub fn renew(&mut self, now: Now, renew: &Verified<Renew>) -> Acted {
        let (id, body) = (renew.body().lease, renew.body());
        let (stale, shorter) = (self.plant.is("renew-stale"), self.plant.is("renew-shorter"));
        let revived = self.plant.is("renew-ended");
        let hand = self.hand.clone();
        let lease = match self.act(&id, body.act, renew.id(), renew.signer()) {
            Ok(lease) => lease,
            Err(answer) => return answer,
        };
        let kept = &mut lease.kept;
        if kept.stage >= Stage::Draining && !revived || kept.decided + kept.term <= now.boot {
            return no(Reason::Ended);
        }
        if lease.taken_back_by().is_some() {
            return no(Reason::Withdrawn);
        }
        let kept = &mut lease.kept;
        if body.version != kept.version && !stale {
            let figure = Figure { of: "version".into(), have: kept.version, need: body.version };
            return Acted::Refused(Reason::Version, vec![figure]);
        }
        if (body.term < kept.term && !shorter) || body.term > lease.terms.longest {
            let bound = if body.term < kept.term { kept.term } else { lease.terms.longest };
            let (have, need) = (bound.as_millis(), body.term.as_millis());
            let figure = Figure { of: "term_ms".into(), have, need };
            return Acted::Refused(Reason::Term, vec![figure]);
        }
        let version = kept.version + 1;
        let answer = Renewal { lease: id, act: body.act, of: renew.id(), version, term: body.term };
        let not_after = now.wall + body.term + EVIDENCE_LIFE;
        let Ok(answer) = hand.draft(id.0, version, not_after, &answer) else {
            return no(Reason::Term);
        };
        kept.version = version;
        kept.term = body.term;
        kept.renew = Some(renew.signed().clone());
        if kept.stage == Stage::Ended && revived {
            kept.stage = Stage::Active;
        }
        lease.remember(Act { id: body.act, of: renew.id(), answer: answer.clone() });
        self.reschedule(id);
        Acted::Accepted(answer)
    }

    /// Decides about membership in a gang: whether `certificate` is of the gang that the lease was
    /// ordered for, in time, with this lease among its members.
    pub fn join(&mut self, now: Now, id: &LeaseId, certificate: &Verified<Gang>) -> Acted {
        let Some(lease) = self.leases.get_mut(id) else { return no(Reason::UnknownLease) };
        let (gang, terms) = (certificate.body(), &lease.terms);
        if certificate.signer() != terms.delegate {
            return no(Reason::NotAdmitted);
        }
        if let Some(joined) = &lease.kept.joined {
            let same = joined.gang.id() == certificate.id();
            return if same { Acted::Repeat(joined.commit.clone()) } else { no(Reason::Conflict) };
        }
        match lease.kept.stage {
            // A gang is not begun with a member that is being taken back.
            Stage::Granted if !lease.kept.holds.is_empty() => return no(Reason::Withdrawn),
            Stage::Granted if now.boot < lease.claim_by() => {}
            Stage::Active => return no(Reason::InUse),
            _ => return no(Reason::Ended),
        }
        let ordered = terms
            .gang
            .is_some_and(|of| of.gang == gang.gang && usize::from(of.size) == gang.members.len());
        let parties = gang.lessee == terms.lessee && gang.delegate == terms.delegate;
        let me = self.hand.me;
        let member = gang.members.iter().any(|m| m.lease == *id && m.lessor == me);
        if !ordered || !parties || !member {
            return no(Reason::BadGang);
        }
        let commit = Commit { gang: certificate.id(), lease: *id };
        let Ok(commit) = self.hand.draft(id.0, 0, now.wall + EVIDENCE_LIFE, &commit) else {
            return no(Reason::BadGang);
        };
        lease.gang = Some(gang.clone());
        let signed = certificate.signed().clone();
        let whole = gang.members.len() == 1;
        lease.kept.joined = Some(Joined { gang: signed, commit: commit.clone(), whole });
        self.reschedule(*id);
        Acted::Accepted(commit)
    }

    /// Takes another member's word. True when with it every member has given its own.
    pub fn committed(&mut self, id: &LeaseId, commit: &Verified<Commit>) -> bool {
        let Some(lease) = self.leases.get_mut(id) else { return false };
        let (Some(gang), Some(joined)) = (&lease.gang, &mut lease.kept.joined) else {
            return false;
        };
        let (body, by) = (commit.body(), commit.signer());
        let member = gang.members.iter().any(|m| m.lessor == by && m.lease == body.lease);
        if joined.whole || body.gang != joined.gang.id() || !member || by == self.hand.me {
            return false;
        }
        lease.commits.insert(by, commit.signed().clone());
        joined.whole = lease.commits.len() + 1 >= gang.members.len();
        joined.whole
    }

    /// A claim waits for the other members of its gang, or for its job to be begun.
    pub fn set_pending(&mut self, id: &LeaseId, claim: Option<Verified<Claim>>) {
        if let Some(lease) = self.leases.get_mut(id) {
            lease.pending = claim;
        }
    }

    /// Finds the lease an act is about, unless the act is answered already.
    fn act(&mut self, id: &LeaseId, act: ActId, of: Hash, by: KeyId) -> Result<&mut Lease, Acted> {
        let rewords = self.plant.is("reword-repeats");
        let Some(lease) = self.leases.get_mut(id) else { return Err(no(Reason::UnknownLease)) };
        if by != lease.terms.delegate && by != lease.terms.lessee {
            return Err(no(Reason::NotAdmitted));
        }
        if let Some(done) = lease.kept.acts.iter().find(|done| done.id == act) {
            return Err(if done.of == of && rewords {
                let body = Acceptance { lease: *id, act, of };
                let answer = self.hand.draft(of, 0, Wall(u64::MAX), &body);
                Acted::Repeat(answer.unwrap_or_else(|_| done.answer.clone()))
            } else if done.of == of {
                Acted::Repeat(done.answer.clone())
            } else {
                no(Reason::Conflict)
            });
        }
        Ok(lease)
    }

    fn accept(&mut self, id: LeaseId, act: ActId, of: Hash, now: Now) -> Acted {
        let body = Acceptance { lease: id, act, of };
        let answer = self.hand.draft(of, 0, now.wall + EVIDENCE_LIFE, &body);
        let (Ok(answer), Some(lease)) = (answer, self.leases.get_mut(&id)) else {
            return no(Reason::UnknownLease);
        };
        lease.remember(Act { id: act, of, answer: answer.clone() });
        self.reschedule(id);
        Acted::Accepted(answer)
    }

    /// Announces that a lease will end early: its job is frozen at `hold.freeze` and ended at
    /// `hold.end`. False when it is ending already, or was told so for the same reason.
    pub fn hold(&mut self, id: &LeaseId, hold: Hold) -> bool {
        let Some(lease) = self.leases.get_mut(id) else { return false };
        let known = lease.kept.holds.iter().any(|known| known.why == hold.why);
        if lease.kept.stage >= Stage::Draining || known {
            return false;
        }
        lease.kept.holds.push(hold);
        self.reschedule(*id);
        true
    }

    /// Takes back what [`Book::hold`] announced for that reason. `None` when there was nothing to
    /// take back, else whether the job is to be thawed.
    pub fn lift(&mut self, now: Boot, id: &LeaseId, why: EndReason) -> Option<bool> {
        let lease = self.leases.get_mut(id)?;
        if lease.kept.stage >= Stage::Draining {
            return None;
        }
        let before = lease.kept.holds.len();
        lease.kept.holds.retain(|hold| hold.why != why);
        if lease.kept.holds.len() == before {
            return None;
        }
        let thaws = lease.thaw(now);
        self.reschedule(*id);
        Some(thaws)
    }

    /// A job is frozen from now on, and billing pauses. True when it was not before.
    pub fn freeze(&mut self, now: Boot, id: &LeaseId) -> bool {
        let Some(lease) = self.leases.get_mut(id) else { return false };
        if lease.kept.stage != Stage::Active || lease.kept.frozen.is_some() {
            return false;
        }
        if lease.exposed_out() <= now && !lease.is_held(EndReason::Exposure) {
            let end = now + lease.terms.early.freeze;
            let (why, by) = (EndReason::Exposure, self.hand.me);
            lease.kept.holds.push(Hold { why, by, freeze: now, end });
        }
        lease.kept.frozen = Some(now);
        self.reschedule(*id);
        true
    }

    /// How `need` can be had back within `within`: by what is free, by what ends by itself in
    /// time, and by slack leases whose notice fits, cheapest credit first.
    #[must_use]
    pub fn reclaim_plan(&self, now: Boot, need: &Resources, within: Span) -> ReclaimPlan {
        let free = self.capacity.minus(&self.promised);
        let mut plan =
            ReclaimPlan { free: free.clone(), short: need.minus(&free), ..ReclaimPlan::default() };
        let open = self.leases.iter().filter(|(_, lease)| lease.kept.stage != Stage::Ended);
        let mut taken: Vec<(bool, Reclaimed)> = open
            .filter_map(|(id, lease)| {
                let by_itself = lease.ends_by_itself(now, within);
                let why = by_itself.or_else(|| lease.reclaimable(within));
                Some((by_itself.is_none(), lease.taken_back(*id, now, within, why?)))
            })
            .collect();
        // What comes back by itself costs nothing and nobody is disturbed for it.
        taken.sort_by_key(|(disturbs, lease)| (*disturbs, lease.credit, lease.lease));
        let mut chosen = Vec::new();
        for (_, lease) in taken {
            if plan.short.is_nothing() {
                break;
            }
            let short = plan.short.minus(&lease.shape);
            if short != plan.short {
                plan.short = short;
                chosen.push(lease);
            }
        }
        // One that was taken early may have become needless by a larger one taken later.
        let covers = |chosen: &[Reclaimed], without: usize| {
            let others = chosen.iter().enumerate().filter(|(nth, _)| *nth != without);
            need.fits(&others.fold(free.clone(), |sum, (_, lease)| sum.plus(&lease.shape)))
        };
        for nth in (0..chosen.len()).rev() {
            if plan.short.is_nothing() && covers(&chosen, nth) {
                chosen.remove(nth);
            }
        }
        plan.credit = chosen.iter().map(|lease| lease.credit).sum();
        plan.leases = chosen;
        plan
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
            lease.kept.paused = Span::ZERO;
            lease.kept.frozen = None;
        }
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
                let end = lease.term_end().min(lease.spent());
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

/// What an active lease is due for.
enum Next {
    /// To end, for this reason, by whom.
    End(EndReason, KeyId),
    /// To be frozen.
    Freeze,
    /// A receipt.
    Receipt,
    /// Nothing yet.
    Nothing,
}

const fn no(reason: Reason) -> Acted {
    Acted::Refused(reason, Vec::new())
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

    /// When its cap is reached if it is never frozen again.
    fn capped(&self, claimed: Boot) -> Boot {
        claimed + self.kept.paused + chain::billable(&self.terms, self.kept.term)
    }

    /// For how long it is billed if it runs until then, by its clock alone.
    fn billed(&self, claimed: Boot, until: Boot) -> Span {
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

    fn activate(&mut self, now: Boot, claim: &Verified<Claim>) {
        self.kept.stage = Stage::Active;
        self.kept.claimed = Some(now);
        self.kept.claim = Some(claim.id());
        self.kept.release_after = claim.body().job.release_after;
        self.receipt_due = now + self.terms.receipt_every;
        self.running = true;
    }

    /// Remembers an act; of many the oldest renewal goes first.
    fn remember(&mut self, act: Act) {
        let acts = &mut self.kept.acts;
        if acts.len() >= MAX_ACTS {
            let is_renewal = |act: &Act| {
                let envelope = Envelope::decode(&act.answer.envelope);
                envelope.is_ok_and(|envelope| envelope.header.kind == Kind::Renewal)
            };
            acts.remove(acts.iter().position(is_renewal).unwrap_or(0));
        }
        acts.push(act);
    }

    fn is_held(&self, why: EndReason) -> bool {
        self.kept.holds.iter().any(|hold| hold.why == why)
    }

    /// Ends a freeze that no hold asks for any more. True when there was one.
    fn thaw(&mut self, now: Boot) -> bool {
        if self.kept.holds.iter().any(|hold| hold.freeze <= now) {
            return false;
        }
        let Some(since) = self.kept.frozen.take() else { return false };
        self.kept.paused += now.since(since);
        true
    }

    /// Why it ends within `within` by itself, if it does.
    #[must_use]
    pub fn ends_by_itself(&self, now: Boot, within: Span) -> Option<EndReason> {
        if let Some((why, _)) = self.kept.end {
            return Some(why);
        }
        let by = now + within;
        let in_time = |end: Boot| end + self.terms.grace <= by;
        let hold = self.kept.holds.iter().find(|hold| in_time(hold.end));
        let term = in_time(self.term_end()).then_some(EndReason::Term);
        hold.map(|hold| hold.why).or(term)
    }

    /// Whether it can be taken back within `within` by its own terms.
    fn reclaimable(&self, within: Span) -> Option<EndReason> {
        let EarlyEnd { notice, freeze, .. } = self.terms.early;
        let fits = notice + freeze + self.terms.grace <= within;
        (fits && self.terms.class == Class::Slack).then_some(EndReason::Reclaimed)
    }

    /// By what it is taken back so that its capacity is there within `within`, or as soon after as
    /// its notice allows: its job goes on for as long as it can.
    #[must_use]
    pub fn hold_within(&self, now: Boot, within: Span, why: EndReason, by: KeyId) -> Hold {
        let EarlyEnd { notice, freeze, .. } = self.terms.early;
        let latest = within.saturating_sub(freeze + self.terms.grace);
        let freeze_at = now + notice.max(latest);
        Hold { why, by, freeze: freeze_at, end: freeze_at + freeze }
    }

    /// What its being taken back, or ending by itself, within `within` comes to.
    #[must_use]
    pub fn taken_back(&self, id: LeaseId, now: Boot, within: Span, why: EndReason) -> Reclaimed {
        let hold = self.hold_within(now, within, why, self.terms.lessee);
        let known = self.kept.holds.iter().map(|hold| (hold.freeze, hold.end)).min();
        let theirs = matches!(why, EndReason::Reclaimed | EndReason::Revoked);
        let (stops, ends) = match known {
            _ if self.kept.end.is_some() => (now, now),
            Some((freeze, end)) => (freeze.min(self.term_end()), end.min(self.term_end())),
            None if theirs => (hold.freeze.min(self.term_end()), hold.end.min(self.term_end())),
            None => (self.term_end(), self.term_end()),
        };
        let credit = self.kept.claimed.filter(|_| theirs).map_or(Amount::ZERO, |claimed| {
            let stops = self.kept.frozen.unwrap_or(stops);
            let charge = chain::charge(&self.terms, self.billed(claimed, stops));
            chain::credit(&self.terms, charge, self.term_end().since(stops), why)
        });
        let within = ends.since(now) + self.terms.grace;
        let (shape, class) = (self.terms.shape.clone(), self.terms.class);
        Reclaimed { lease: id, shape, class, credit, why, within }
    }

    /// How much of its term is missing because the lessor's side ended it.
    fn missed(&self, reason: EndReason) -> Span {
        let theirs = matches!(reason, EndReason::Reclaimed | EndReason::Revoked | EndReason::Lost);
        match self.kept.stopped {
            Some(stopped) if theirs => {
                let left = self.kept.term.saturating_sub(self.kept.chain.usage.billed);
                self.term_end().since(stopped).min(left)
            }
            _ => Span::ZERO,
        }
    }

    /// Whether less than `amount` is owed beyond what was agreed to, as it is billed now.
    fn owes_less_than(&self, amount: Amount) -> bool {
        let Some(claimed) = self.kept.claimed else { return true };
        let until = self.kept.frozen.unwrap_or(claimed);
        let charge = chain::charge(&self.terms, self.billed(claimed, until));
        charge.minus(self.kept.acknowledged.1) < amount || charge == self.kept.acknowledged.1
    }

    /// The hold by which its operator takes it back, if that was announced.
    #[must_use]
    pub fn taken_back_by(&self) -> Option<Hold> {
        let holds = self.kept.holds.iter().filter(|hold| hold.why != EndReason::Exposure);
        holds.min_by_key(|hold| hold.freeze).copied()
    }

    /// The hold by which a lease that was never claimed is taken back, once it is time.
    fn withdrawn(&self, now: Boot) -> Option<Hold> {
        self.kept.holds.iter().find(|hold| hold.freeze <= now).copied()
    }

    /// When `amount` more than the lessee agreed to is owed; never while that is beyond the cap.
    fn owed_at(&self, amount: Amount) -> Boot {
        let never = Boot(u64::MAX);
        let (Some(claimed), None) = (self.kept.claimed, self.kept.frozen) else { return never };
        let total = self.kept.acknowledged.1.plus(amount);
        if total >= self.terms.cap {
            return never;
        }
        let began = claimed + self.kept.paused;
        total.lasts_at(self.terms.rate).map_or(never, |span| began + span + Span::millis(1))
    }

    /// When the next receipt is due: at its interval, and early enough that a lessee who answers is
    /// never ended for what it was not asked to countersign.
    fn next_receipt(&self) -> Boot {
        if self.unacknowledged.len() >= MAX_UNANSWERED || self.kept.frozen.is_some() {
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

    /// What an active lease is due for; `me` is its lessor.
    fn turn(&self, now: Boot, me: KeyId) -> Next {
        if self.term_end() <= now {
            // One that stood still to be taken back was not there for the rest of its term.
            let taken = self.taken_back_by().filter(|_| self.kept.frozen.is_some());
            let taken = taken.filter(|hold| hold.freeze <= now);
            return taken.map_or(Next::End(EndReason::Term, me), |h| Next::End(h.why, h.by));
        }
        if self.spent() <= now {
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

fn charge_of(receipt: &Draft) -> Amount {
    let receipt = body_in::<Receipt>(&receipt.envelope);
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

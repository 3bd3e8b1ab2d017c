//! The lessor's part: orders, claims and releases heard, jobs, receipts and terminations sent.

use super::{
    Core, Effect, Extending, Kept, ModelLease, Notice, Notified, Orphan, Past, Pending, StartJob,
    Ticket,
};
use crate::base::id::{ActId, Hash, KeyId, LeaseId};
use crate::base::time::{Boot, Now, SKEW, Span, Wall};
use crate::minds::admission::{NotEntitled, NotTimely};
use crate::minds::book::{Acted, Denied, Lease, Placed, Quote, Stage, Turn};
use crate::words::chain::EVIDENCE_LIFE;
use crate::words::contract::{
    Claim, EndReason, Figure, JobSpec, MAX_REFERRALS, Order, Reason, Refusal, Release, Renew,
};
use crate::words::message::{Message, OrderPapers, Utterance, Word};
use crate::words::model::MODEL;
use crate::words::sign::{Draft, Verified};
use crate::words::usage::{Acknowledgement, Objection, Outcome, Usage};
use crate::words::wire;

use super::view::LentView;

/// The longest encoding of a job's description: it is kept with its lease.
pub(super) const MAX_JOB: usize = 16 * 1024;
/// How long after a start a gang's job that was not begun waits until it is known where the other
/// members are.
const WAIT_FOR_MEMBERS: Span = Span::secs(10);
/// How many hosts are looked at for referrals.
const REFERRAL_LOOK: usize = 64;
/// How long a refusal stays valid as evidence.
const REFUSAL_LIFE: Span = Span::secs(24 * 3600);
/// How often a termination is told before the lessee has to ask for it.
const MAX_TELLS: u32 = 20;
/// How long after its term an ended lease is told again by a node that was restarted.
const TELL_AGAIN: Span = Span::secs(600);
/// The most repeats of one renewal that wait for its warden.
const MAX_WAITING: usize = 4;
/// The most ended leases remembered for `lease list`.
const MAX_HISTORY: usize = 1_000;

impl Core {
    pub(super) fn order(
        &mut self,
        now: Now,
        papers: &OrderPapers,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) {
        self.counters.orders += 1;
        let order = &papers.order;
        let (reason, figures) = match self.decide(now, papers) {
            Ok(Placed::Granted(lease, draft)) => {
                self.counters.grants += 1;
                self.pricing.changed();
                self.keep_lent(&lease, out);
                let what = Utterance::Signs(Word::Granted, draft);
                out.push(Effect::Reply { ticket, what });
                out.push(Effect::Notice(Notice::Granted(lease)));
                return;
            }
            Ok(Placed::Repeat(draft)) => {
                let what = Utterance::Signs(Word::Granted, draft);
                out.push(Effect::Reply { ticket, what });
                return;
            }
            Ok(Placed::Refused(reason, figures)) => (reason, figures),
            Err(reason) => (reason, Vec::new()),
        };
        self.counters.refusals += 1;
        self.refuse(now, (order.id(), Some(order.body())), reason, figures, ticket, out);
    }

    /// Judges an order: first the parties and the papers, then the book.
    fn decide(&mut self, now: Now, papers: &OrderPapers) -> Result<Placed, Reason> {
        let OrderPapers { order, mandate, certificate } = papers;
        let body = order.body();
        if body.lessor != self.config.me {
            return Err(Reason::WrongLessor);
        }
        self.admission.timely(order, now.wall).map_err(|why| match why {
            NotTimely::Expired | NotTimely::Future | NotTimely::TooLong => Reason::Expired,
            NotTimely::Term => Reason::NotOffered,
        })?;
        if !self.is_admitted(&body.delegate) {
            return Err(Reason::NotAdmitted);
        }
        if self.conduct.is_quarantined(&body.delegate) {
            return Err(Reason::Quarantined);
        }
        self.admission.entitles(order, mandate.as_ref(), certificate, now.wall).map_err(|why| {
            match why {
                NotEntitled::Lessee(_) | NotEntitled::Signer => Reason::NotAdmitted,
                _ => Reason::Mandate,
            }
        })?;
        // A repeat of what was granted is answered also by a node that grants nothing new.
        let known = self.book.has_request(&body.lessee, &body.request);
        if !known && !self.is_vouched(now.boot) {
            return Err(Reason::NotReady);
        }
        if let Some(reason) = self.unwilling().filter(|_| !known) {
            return Err(reason);
        }
        let honoured = self.pricing.quote(now.boot, body);
        let offer = honoured.map(|honoured| (honoured.offer, honoured.rate, honoured.early));
        let quote = Quote { offer, sold: self.pricing.sells(body) };
        Ok(self.book.place(now, order, &quote))
    }

    /// Why nothing new is granted or renewed here, whatever it is.
    const fn unwilling(&self) -> Option<Reason> {
        if self.halted.is_some() || self.leaving {
            Some(Reason::NotReady)
        } else if self.holdback.drained {
            Some(Reason::Withdrawn)
        } else if self.disk_full {
            Some(Reason::DiskFull)
        } else {
            None
        }
    }

    pub(super) fn refuse(
        &mut self,
        now: Now,
        (of, order): (Hash, Option<&Order>),
        reason: Reason,
        figures: Vec<Figure>,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) {
        let referrals = match (reason, order) {
            (
                Reason::Capacity | Reason::DiskFull | Reason::NotReady | Reason::Withdrawn,
                Some(order),
            ) => self.referrals(now, order),
            _ => Vec::new(),
        };
        let offer = order.and_then(|_| self.spread.offer(&self.config.me));
        let offer = offer.map(|(offer, _)| offer.signed().clone());
        let refusal = Refusal { of, reason, figures, offer, referrals };
        // Each refusal is another statement: the number of commands heard keeps them apart.
        self.tokens += 1;
        let draft = self.hand.draft(of, self.tokens, now.wall + REFUSAL_LIFE, &refusal);
        let what = match draft {
            Ok(draft) => Utterance::Signs(Word::Refused, draft),
            Err(_) => Utterance::Plain(Message::Done),
        };
        out.push(Effect::Reply { ticket, what });
    }

    /// Says no to an act. The lessee goes on from there, so one that could become a yes is kept: the
    /// act gets the same answer for as long as it could be repeated, which is `until`.
    fn deny<T>(
        &mut self,
        now: Now,
        act: (&Verified<T>, LeaseId, ActId),
        (reason, figures): (Reason, Vec<Figure>),
        until: Option<Wall>,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) {
        let (act, lease, id) = act;
        let of = act.id();
        let refusal = Refusal { of, reason, figures, offer: None, referrals: Vec::new() };
        self.tokens += 1;
        let valid = until.unwrap_or(now.wall + REFUSAL_LIFE);
        let Ok(draft) = self.hand.draft(of, self.tokens, valid, &refusal) else {
            out.push(Effect::Reply { ticket, what: Utterance::Plain(Message::Done) });
            return;
        };
        let denied = match until {
            Some(_) => self.book.deny(now.wall, (&lease, id), (of, act.signer()), &draft),
            None => Denied::Needless,
        };
        match denied {
            Denied::Remembered => self.keep_lent(&lease, out),
            Denied::Needless => {}
            Denied::NoRoom => {
                out.push(Effect::Reply { ticket, what: Utterance::Plain(Message::Done) });
                return;
            }
        }
        reply(Word::Refused, draft, ticket, out);
    }

    /// Says no to a claim. There is no instant from which one is not taken, but the lease's end.
    fn deny_claim(
        &mut self,
        now: Now,
        claim: &Verified<Claim>,
        (reason, figures): (Reason, Vec<Figure>),
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) {
        let lease = claim.body().lease;
        // One that went with its gang's certificate is carried out once the gang is whole, and its
        // lessee knows: it is told by how long it is valid.
        let early = reason == Reason::NotCommitted
            && claim.header().not_after > now.wall + EVIDENCE_LIFE.scale(1, 2);
        let longest = self.book.get(&lease).map_or(Span::ZERO, |known| known.terms.longest);
        let over = now.wall + longest + EVIDENCE_LIFE;
        let until = (reason.may_pass() && !early).then_some(over);
        let act = (claim, lease, claim.body().act);
        self.deny(now, act, (reason, figures), until, ticket, out);
    }

    /// Says no to a renewal.
    fn deny_renewal(
        &mut self,
        now: Now,
        renew: &Verified<Renew>,
        (reason, figures): (Reason, Vec<Figure>),
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) {
        let (lease, body) = (renew.body().lease, renew.body());
        // One about a version that is still to come would fit then.
        let version = self.book.get(&lease).map_or(u64::MAX, |known| known.kept.version);
        let ahead = reason == Reason::Version && body.version > version;
        let over = renew.header().not_after + SKEW + SKEW;
        let until = (reason.may_pass() || ahead).then_some(over);
        self.deny(now, (renew, lease, body.act), (reason, figures), until, ticket, out);
    }

    /// Other nodes that seem to have what an order asks for.
    fn referrals(&mut self, now: Now, order: &Order) -> Vec<KeyId> {
        let start = self.dice.number();
        let fits = |key: &KeyId| {
            self.spread.offer(key).is_some_and(|(offer, heard)| {
                let rate = offer.body().hourly(&order.shape, order.class);
                offer.body().fits(&order.shape)
                    && offer.body().classes.contains(&order.class)
                    && rate.is_some_and(|rate| rate <= order.ceiling)
                    && self.is_up(key, Some(heard), now.boot)
            })
        };
        // From some host on, so that not everybody is sent to the same few; a bounded look, since
        // a full host refuses often.
        let keys = self.spread.hosts_from(start).take(REFERRAL_LOOK);
        keys.filter(|key| *key != self.config.me && fits(key)).take(MAX_REFERRALS).collect()
    }

    pub(super) fn keep_lent(&self, lease: &LeaseId, out: &mut Vec<Effect>) {
        if let Some(known) = self.book.get(lease) {
            out.push(Effect::Keep(Kept::Lent(*lease, Box::new(known.kept.clone()))));
        }
    }

    pub(super) fn hear_claim(
        &mut self,
        now: Now,
        claim: &Verified<Claim>,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) {
        let (lease, job) = (claim.body().lease, &claim.body().job);
        if let Some(figures) = misfit(job, self.book.get(&lease)) {
            self.deny_claim(now, claim, (Reason::BadJob, figures), ticket, out);
            return;
        }
        // One of two copies of a node must not begin what the other one may have begun.
        if self.halted.is_some() && !self.book.has_act(&lease, &claim.body().act) {
            self.deny_claim(now, claim, (Reason::NotReady, Vec::new()), ticket, out);
            return;
        }
        let runs = job.runtime == MODEL || self.pricing.runs(&job.runtime);
        match self.book.claim(now, claim, runs) {
            Acted::Repeat(answer) => reply(Word::Accepted, answer, ticket, out),
            Acted::Denied(answer) => reply(Word::Refused, answer, ticket, out),
            Acted::Refused(reason, figures) => {
                self.deny_claim(now, claim, (reason, figures), ticket, out);
            }
            Acted::Accepted(answer) => {
                // Kept until its job is begun: a node that dies before that starts it again.
                self.book.set_pending(&lease, Some(claim.clone()));
                out.push(Effect::Keep(Kept::Claimed(lease, claim.signed().clone())));
                self.keep_lent(&lease, out);
                // Whoever is told may use it at once.
                self.start_job(lease, claim, out);
                reply(Word::Accepted, answer, ticket, out);
            }
        }
    }

    pub(super) fn start_job(
        &mut self,
        lease: LeaseId,
        claim: &Verified<Claim>,
        out: &mut Vec<Effect>,
    ) {
        if let Some(known) = self.book.get(&lease) {
            let start = self.start(lease, known, claim);
            let notified = notified(known);
            out.push(Effect::StartJob(Box::new(start)));
            if notified.is_some() {
                out.push(Effect::NotifyJob(lease, notified));
            }
        }
    }

    fn start(&self, lease: LeaseId, known: &Lease, claim: &Verified<Claim>) -> StartJob {
        let late = if self.config.plant.is("outlive-term") { Span::secs(60) } else { Span::ZERO };
        let mut job = claim.body().job.clone();
        job.env.extend(self.gang_env(known));
        StartJob {
            lease,
            claim: claim.id(),
            delegate: known.terms.delegate,
            sources: self.data_addresses(&known.terms.delegate),
            job,
            shape: known.terms.shape.clone(),
            model: known.terms.model.clone().map(|terms| ModelLease {
                terms,
                class: known.terms.class,
                cap: known.terms.cap,
                tally: known.reported.tally,
            }),
            deadline: known.deadline() + late,
            grace: known.terms.grace,
        }
    }

    pub(super) fn hear_renew(
        &mut self,
        now: Now,
        renew: &Verified<Renew>,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) {
        let (lease, act) = (renew.body().lease, renew.body().act);
        let known = self.book.has_act(&lease, &act);
        let expired = renew.header().not_after + SKEW < now.wall;
        let quarantined = self.conduct.is_quarantined(&renew.signer());
        let unwilling = expired
            .then_some(Reason::Expired)
            .or(self.unwilling())
            .or(quarantined.then_some(Reason::Quarantined));
        if let Some(reason) = unwilling.filter(|_| !known) {
            self.deny_renewal(now, renew, (reason, Vec::new()), ticket, out);
            return;
        }
        let answer = match self.book.renew(now, renew) {
            Acted::Repeat(answer) => answer,
            Acted::Denied(answer) => {
                reply(Word::Refused, answer, ticket, out);
                return;
            }
            Acted::Refused(reason, figures) => {
                self.deny_renewal(now, renew, (reason, figures), ticket, out);
                return;
            }
            Acted::Accepted(answer) => {
                self.counters.renewals += 1;
                self.keep_lent(&lease, out);
                answer
            }
        };
        let hasty = self.config.plant.is("renew-unacknowledged");
        match self.book.get(&lease).filter(|known| known.running && !hasty) {
            // The lessee may rely on it once the warden does.
            Some(known) => {
                let deadline = known.deadline();
                out.push(Effect::ExtendJob(lease, deadline));
                let waiting = self.extending.entry(lease).or_default();
                if waiting.len() >= MAX_WAITING {
                    let what = Utterance::Plain(Message::Done);
                    out.push(Effect::Reply { ticket: waiting.remove(0).ticket, what });
                }
                waiting.push(Extending { ticket, deadline, answer });
            }
            None => reply(Word::Renewed, answer, ticket, out),
        }
    }

    /// The warden has a deadline in force, or could not be asked: then whoever waits for that one
    /// asks again.
    pub(super) fn extended(
        &mut self,
        lease: &LeaseId,
        taken: Boot,
        done: bool,
        out: &mut Vec<Effect>,
    ) {
        for waits in self.extending.remove(lease).unwrap_or_default() {
            let Extending { ticket, deadline, answer } = waits;
            if done && deadline <= taken {
                reply(Word::Renewed, answer, ticket, out);
            } else if deadline <= taken {
                out.push(Effect::Reply { ticket, what: Utterance::Plain(Message::Done) });
            } else {
                let waits = Extending { ticket, deadline, answer };
                self.extending.entry(*lease).or_default().push(waits);
            }
        }
    }

    /// A job stands still from now on.
    fn freeze(&mut self, now: Now, lease: &LeaseId, out: &mut Vec<Effect>) {
        if !self.book.freeze(now.boot, lease) {
            return;
        }
        self.keep_lent(lease, out);
        let Some(known) = self.book.get(lease) else { return };
        let why = known.kept.holds.first().map_or(EndReason::Exposure, |hold| hold.why);
        if known.running {
            let deadline = known.deadline();
            out.push(Effect::FreezeJob(*lease));
            // Standing still, it cannot reach its cap.
            out.push(Effect::ExtendJob(*lease, deadline));
        }
        out.push(Effect::Notice(Notice::Frozen(*lease, why)));
    }

    /// A frozen job goes on.
    pub(super) fn thaw(&mut self, lease: &LeaseId, out: &mut Vec<Effect>) {
        if self.book.get(lease).is_some_and(|known| known.running) {
            out.push(Effect::ThawJob(*lease));
        }
        out.push(Effect::Notice(Notice::Thawed(*lease)));
    }

    pub(super) fn hear_release(
        &mut self,
        now: Now,
        release: &Verified<Release>,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) {
        let lease = release.body().lease;
        match self.book.release(now, release) {
            Acted::Repeat(answer) => reply(Word::Accepted, answer, ticket, out),
            Acted::Denied(answer) => reply(Word::Refused, answer, ticket, out),
            Acted::Refused(reason, figures) => {
                let act = (release, lease, release.body().act);
                self.deny(now, act, (reason, figures), None, ticket, out);
            }
            Acted::Accepted(answer) => {
                self.keep_lent(&lease, out);
                reply(Word::Accepted, answer, ticket, out);
                self.wind_down(now, &lease, EndReason::Released, out);
            }
        }
    }

    /// A lease began to drain: its job is ended, or what is left of it at once.
    pub(super) fn wind_down(
        &mut self,
        now: Now,
        lease: &LeaseId,
        why: EndReason,
        out: &mut Vec<Effect>,
    ) {
        if self.unbegun.remove(lease) {
            self.book.reaped(lease, Outcome::Stopped);
        }
        let running = self.book.get(lease).is_some_and(|known| known.running);
        if running {
            out.push(Effect::StopJob(*lease, why));
            if self.config.plant.is("free-at-term") {
                self.book.plant_free_early(lease);
            }
        } else {
            self.close(now, lease, out);
        }
    }

    /// Writes the final receipt and the termination: the lease has ended.
    pub(super) fn close(&mut self, now: Now, lease: &LeaseId, out: &mut Vec<Effect>) {
        self.write_receipt(now, lease, out);
        let Some(_) = self.book.finish(now, lease) else { return };
        self.counters.ended += 1;
        self.keep_lent(lease, out);
        self.drop_pending(lease, out);
        if !self.config.plant.is("hide-freed") {
            self.pricing.changed();
        }
        let reason = self.book.get(lease).and_then(|known| known.kept.end);
        let reason = reason.map_or(EndReason::Lapsed, |(reason, _)| reason);
        self.tell_at(*lease, now.boot, 0);
        out.push(Effect::Notice(Notice::Ended(*lease, reason)));
    }

    fn write_receipt(&mut self, now: Now, lease: &LeaseId, out: &mut Vec<Effect>) {
        if let Some((number, draft)) = self.book.receipt(now, lease) {
            self.counters.receipts += 1;
            out.push(Effect::Keep(Kept::Receipt(*lease, number, draft)));
            self.keep_lent(lease, out);
            self.send_receipt(now, lease, out);
        }
    }

    /// Sends the oldest receipt that is not countersigned, unless one is on its way.
    fn send_receipt(&mut self, now: Now, lease: &LeaseId, out: &mut Vec<Effect>) {
        match self.receipts_out.get(lease) {
            Some(None) => return,
            Some(Some(not_before)) if *not_before > now.boot => return,
            _ => {}
        }
        let Some(known) = self.book.get(lease) else { return };
        let Some((_, draft)) = known.unacknowledged.front() else {
            self.receipts_out.remove(lease);
            return;
        };
        let what = Utterance::Signs(Word::Receipt, draft.clone());
        let to = known.terms.delegate;
        self.receipts_out.insert(*lease, None);
        self.ask(to, Pending::Receipt(*lease), what, out);
    }

    pub(super) fn hear_acknowledgement(
        &mut self,
        now: Now,
        lease: &LeaseId,
        ack: &Verified<Acknowledgement>,
        out: &mut Vec<Effect>,
    ) {
        self.receipts_out.remove(lease);
        let agreed = Some(ack).filter(|ack| ack.body().lease == *lease);
        let Some(thaws) = agreed.and_then(|ack| self.book.acknowledge(now.boot, ack)) else {
            let pause = now.boot + Span::secs(5);
            self.receipts_out.insert(*lease, Some(pause));
            return;
        };
        self.counters.acknowledged += 1;
        let kept = Kept::Acknowledged(*lease, ack.body().number, ack.signed().clone());
        out.push(Effect::Keep(kept));
        self.keep_lent(lease, out);
        if thaws {
            self.thaw(lease, out);
        }
        self.send_receipt(now, lease, out);
    }

    pub(super) fn hear_objection(
        &mut self,
        now: Now,
        lease: &LeaseId,
        objection: &Verified<Objection>,
        out: &mut Vec<Effect>,
    ) {
        self.counters.objections += 1;
        // Not asked again soon: the limit of exposure decides what follows.
        self.receipts_out.insert(*lease, Some(now.boot + Span::secs(30)));
        let delegate = self.book.get(lease).map(|known| known.terms.delegate);
        if delegate == Some(objection.signer()) {
            out.push(Effect::Keep(Kept::Objected(*lease, objection.signed().clone())));
            out.push(Effect::Notice(Notice::Objected(*lease)));
        }
    }

    pub(super) fn inquired(
        &mut self,
        now: Now,
        from: KeyId,
        lease: LeaseId,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) {
        let known = self
            .book
            .get(&lease)
            .filter(|known| from == known.terms.delegate || from == known.terms.lessee);
        match known.map(|known| (&known.kept.termination, known.unacknowledged.front())) {
            Some((Some(end), _)) => reply(Word::Terminated, end.clone(), ticket, out),
            Some((None, Some((_, receipt)))) => reply(Word::Receipt, receipt.clone(), ticket, out),
            Some((None, None)) => {
                out.push(Effect::Reply { ticket, what: Utterance::Plain(Message::Done) });
            }
            None => {
                if let Some(end) = self.past(from, &lease) {
                    reply(Word::Terminated, end, ticket, out);
                    return;
                }
                self.refuse(now, (lease.0, None), Reason::UnknownLease, Vec::new(), ticket, out);
                return;
            }
        }
        // Who asks is there: what waits for a countersignature need not wait any longer.
        if let Some(Some(not_before)) = self.receipts_out.get_mut(&lease) {
            *not_before = now.boot;
        }
        self.send_receipt(now, &lease, out);
    }

    /// The termination of a lease of `from` that was dropped from memory.
    fn past(&self, from: KeyId, lease: &LeaseId) -> Option<Draft> {
        let past = self.history.iter().rev().find(|past| past.view.id == *lease)?;
        let theirs = past.view.delegate == from || past.view.lessee == from;
        past.termination.clone().filter(|_| theirs)
    }

    pub(super) fn job_ended(
        &mut self,
        now: Now,
        lease: &LeaseId,
        outcome: Outcome,
        usage: Usage,
        out: &mut Vec<Effect>,
    ) {
        self.book.report(lease, usage);
        // There is nothing left that a deadline could end too early, or that could be begun.
        self.extended(lease, Boot(u64::MAX), true, out);
        self.drop_pending(lease, out);
        if self.book.reaped(lease, outcome) || self.book.release_after(now, lease) {
            self.close(now, lease, out);
        } else {
            self.keep_lent(lease, out);
        }
        out.push(Effect::JobNoted(*lease));
    }

    /// Takes up a lease after a restart: its job, if it had one, was adopted or is gone by now.
    pub(super) fn resume_lent(
        &mut self,
        now: Now,
        lease: &LeaseId,
        orphan: Option<&Orphan>,
        out: &mut Vec<Effect>,
    ) {
        let Some(known) = self.book.get(lease) else { return };
        let same_boot = known.kept.boot == self.config.boot;
        let (running, stage) = (known.running, known.kept.stage);
        if stage == Stage::Ended {
            // Whether its delegate was told is not kept: a lease of late is told again.
            let late = known.terms.decided + known.kept.term + TELL_AGAIN;
            if !known.unacknowledged.is_empty() || late > now.wall {
                self.tell_at(*lease, now.boot, 0);
            }
            return;
        }
        if stage == Stage::Granted && same_boot && known.kept.joined.is_some() {
            self.resume_gang(now, *lease);
        }
        if !same_boot {
            self.book.rebase(lease, self.config.boot, now.boot);
        }
        match orphan {
            Some(Orphan::Adopted(usage, frozen)) if running && same_boot => {
                self.drop_pending(lease, out);
                self.book.report(lease, *usage);
                self.adopt(lease, *frozen, out);
                return;
            }
            // A lease on a model is a job of this process alone: it is taken up as if not begun.
            None if running && same_boot && self.is_unbegun(now, lease) => {
                self.unbegun.insert(*lease);
                return;
            }
            _ if running => self.lose_or_end(now, lease, orphan, same_boot),
            _ if !same_boot => self.book.drain_lost(now, lease),
            _ => {}
        }
        let draining = self.book.get(lease).is_some_and(|k| k.kept.stage == Stage::Draining);
        if draining {
            self.close(now, lease, out);
        } else if running {
            self.drop_pending(lease, out);
            self.keep_lent(lease, out);
        }
    }

    /// Whether a job that was accepted before a restart, and of which nothing is found, was not
    /// begun: its claim waits for that still, so no warden can have run any of it.
    fn is_unbegun(&self, now: Now, lease: &LeaseId) -> bool {
        self.book.get(lease).is_some_and(|known| {
            let claim = known.pending.as_ref().map(Verified::id);
            let open = known.kept.stage == Stage::Active && now.boot < known.deadline();
            open && claim.is_some() && claim == known.kept.claim
        })
    }

    /// Begins what was accepted before a restart and not begun, once nobody is left to say that
    /// this is a copy of a node whose other one did: then it is lost. A gang's job is told the
    /// other members' addresses: it waits a while for these.
    fn begin_unbegun(&mut self, now: Now, out: &mut Vec<Effect>) {
        if self.unbegun.is_empty() || !self.vouched && self.halted.is_none() {
            return;
        }
        let waits = now.boot < self.started + WAIT_FOR_MEMBERS;
        for lease in std::mem::take(&mut self.unbegun) {
            if waits && self.halted.is_none() && !self.knows_members(&lease) {
                self.unbegun.insert(lease);
                continue;
            }
            let claim = self.book.get(&lease).and_then(|known| known.pending.clone());
            match claim.filter(|_| self.halted.is_none()) {
                Some(claim) => {
                    self.start_job(lease, &claim, out);
                    self.adopt(&lease, false, out);
                }
                None => {
                    self.lose_or_end(now, &lease, None, true);
                    self.close(now, &lease, out);
                }
            }
        }
    }

    /// The job of an active lease is gone: it came to its own end, or is lost with what it did.
    fn lose_or_end(&mut self, now: Now, lease: &LeaseId, orphan: Option<&Orphan>, same_boot: bool) {
        let ended = match orphan {
            Some(Orphan::Ended(outcome, usage)) => Some((outcome.clone(), *usage)),
            _ => None,
        };
        let (outcome, usage) = ended.unwrap_or((Outcome::Lost, Usage::default()));
        // Nobody but this side stops a job whose lease is not ending.
        let lost = matches!(outcome, Outcome::Lost | Outcome::Stopped);
        // What is lost is billed to its last receipt, and its usage is told up to there too.
        if !lost {
            self.book.report(lease, usage);
        }
        self.book.reaped(lease, outcome);
        if lost || !same_boot {
            self.book.drain_lost(now, lease);
            return;
        }
        // Where its own end came first, the lease ends by that.
        let over = |known: &Lease| known.term_end().min(known.spent()) <= now.boot;
        if !self.book.get(lease).is_some_and(over) && self.book.release_after(now, lease) {
            // It ended while nobody was there to see when.
            self.book.stop_at_last_receipt(lease);
        }
    }

    /// A job that runs on is brought in line with what the book says: what was decided about it
    /// may not have reached its warden.
    fn adopt(&mut self, lease: &LeaseId, frozen: bool, out: &mut Vec<Effect>) {
        let Some(known) = self.book.get(lease) else { return };
        if known.kept.stage == Stage::Draining {
            let why = known.kept.end.map_or(EndReason::Lost, |(why, _)| why);
            out.push(Effect::StopJob(*lease, why));
            return;
        }
        out.push(Effect::ExtendJob(*lease, known.deadline()));
        match (known.kept.frozen.is_some(), frozen) {
            (true, false) => out.push(Effect::FreezeJob(*lease)),
            (false, true) => out.push(Effect::ThawJob(*lease)),
            _ => {}
        }
        out.push(Effect::NotifyJob(*lease, notified(known)));
    }

    pub(super) fn wake_lessor(&mut self, now: Now, out: &mut Vec<Effect>) {
        self.begin_unbegun(now, out);
        for turn in self.book.due(now.boot) {
            match turn {
                Turn::Lapsed(lease) => {
                    self.counters.lapsed += 1;
                    self.book.drain(now, &lease, EndReason::Lapsed, self.config.me);
                    self.close(now, &lease, out);
                }
                Turn::Drain(lease, reason, by) => {
                    self.book.drain(now, &lease, reason, by);
                    self.keep_lent(&lease, out);
                    self.wind_down(now, &lease, reason, out);
                }
                Turn::Freeze(lease) => self.freeze(now, &lease, out),
                Turn::Receipt(lease) => self.write_receipt(now, &lease, out),
            }
        }
        while let Some(lease) = self.untold_due.pop(now.boot) {
            let tries = self.untold.get(&lease).copied().unwrap_or_default();
            self.tell(now, lease, tries, out);
        }
    }

    /// The delegate is told of a lease's end then, after so many tries.
    pub(super) fn tell_at(&mut self, lease: LeaseId, at: Boot, tries: u32) {
        self.untold.insert(lease, tries);
        self.untold_due.set(lease, at);
    }

    /// The delegate knows of a lease's end, or will not be told again.
    pub(super) fn told(&mut self, lease: &LeaseId) {
        self.untold.remove(lease);
        self.untold_due.remove(lease);
    }

    /// Tells the delegate that a lease has ended, once its receipts are countersigned or a few
    /// tries have passed.
    fn tell(&mut self, now: Now, lease: LeaseId, tries: u32, out: &mut Vec<Effect>) {
        let Some(known) = self.book.get(&lease) else {
            self.told(&lease);
            return;
        };
        let lapsed = known.kept.claimed.is_none();
        let waits = !known.unacknowledged.is_empty() && tries < 3;
        let next = now.boot + Span::millis(if waits { 200 } else { 15_000 });
        if tries >= MAX_TELLS || (lapsed && tries >= 3) {
            self.told(&lease);
            return;
        }
        let told_lately = matches!(self.receipts_out.get(&lease), Some(Some(_)));
        let counts = !waits || told_lately;
        let (to, termination) = (known.terms.delegate, known.kept.termination.clone());
        self.tell_at(lease, next, tries + u32::from(counts));
        if waits {
            self.send_receipt(now, &lease, out);
            return;
        }
        if let Some(draft) = termination {
            let what = Utterance::Signs(Word::Terminated, draft);
            self.ask(to, Pending::Termination(lease), what, out);
        }
    }

    pub(super) fn tick_lessor(&mut self, now: Now, out: &mut Vec<Effect>) {
        let open: Vec<_> = self
            .book
            .leases()
            .filter(|(_, known)| !known.unacknowledged.is_empty())
            .map(|(id, _)| *id)
            .collect();
        for lease in open {
            self.send_receipt(now, &lease, out);
        }
        let untold = &self.untold;
        let gone = self.book.prune(now, |lease| !untold.contains_key(lease));
        for (id, lease) in gone {
            self.receipts_out.remove(&id);
            let termination = lease.kept.termination.clone();
            self.history.push_back(Past { view: view_of(&id, &lease), termination });
        }
        while self.history.len() > MAX_HISTORY {
            self.history.pop_front();
        }
    }

    pub(super) fn view_lent(&self) -> Vec<LentView> {
        let current = self.book.leases().map(|(id, lease)| view_of(id, lease));
        self.history.iter().map(|past| past.view.clone()).chain(current).collect()
    }
}

/// What a job is told about the end of its lease, if it is being taken back.
fn notified(known: &Lease) -> Option<Notified> {
    known.taken_back_by().map(|hold| Notified { why: hold.why, end: hold.freeze })
}

/// What keeps a job from being carried out under a lease, in figures where it is its size.
pub(super) fn misfit(job: &JobSpec, under: Option<&Lease>) -> Option<Vec<Figure>> {
    if wire::encode::<MAX_JOB>(job).is_err() {
        return Some(Vec::new());
    }
    let (have, need) = (under?.terms.payload_room(), job.payload_bytes());
    (need > have).then(|| vec![Figure { of: "disk".into(), have, need }])
}

pub(super) fn reply(word: Word, draft: Draft, ticket: Ticket, out: &mut Vec<Effect>) {
    out.push(Effect::Reply { ticket, what: Utterance::Signs(word, draft) });
}

fn view_of(id: &LeaseId, lease: &Lease) -> LentView {
    let (kept, terms) = (&lease.kept, &lease.terms);
    LentView {
        id: *id,
        order: terms.order,
        request: lease.request.1,
        stage: kept.stage,
        lessee: terms.lessee,
        delegate: terms.delegate,
        shape: terms.shape.clone(),
        model: terms.model.clone(),
        class: terms.class,
        rate: terms.rate,
        decided: terms.decided,
        term_end: lease.term_end(),
        term: kept.term,
        longest: terms.longest,
        version: kept.version,
        running: lease.running,
        frozen: kept.frozen.is_some(),
        ends_early: kept.holds.iter().map(|hold| (hold.why, hold.end)).min_by_key(|(_, end)| *end),
        usage: kept.chain.usage,
        charge: kept.chain.charge,
        receipts: kept.chain.number,
        acknowledged: kept.acknowledged.0,
        end: kept.end.map(|(reason, _)| reason),
        outcome: kept.outcome.clone(),
    }
}

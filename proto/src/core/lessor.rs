//! The lessor's part: orders, claims and releases heard, jobs, receipts and terminations sent.

use super::{Core, Effect, Kept, Notice, Past, Pending, StartJob, Ticket};
use crate::base::id::{Hash, KeyId, LeaseId};
use crate::base::time::{Boot, Now, Span};
use crate::minds::admission::{NotEntitled, NotTimely};
use crate::minds::book::{Acted, Lease, Placed, Quote, Stage, Turn};
use crate::words::chain;
use crate::words::contract::{
    Claim, EndReason, Figure, MAX_REFERRALS, Order, Reason, Refusal, Release,
};
use crate::words::message::{Message, OrderPapers, Utterance, Word};
use crate::words::sign::{Draft, Verified};
use crate::words::usage::{Acknowledgement, Objection, Outcome, Usage};
use crate::words::wire;

use super::view::LentView;

/// The longest encoding of a job's description: it is kept with its lease.
pub(super) const MAX_JOB: usize = 16 * 1024;
/// How many hosts are looked at for referrals.
const REFERRAL_LOOK: usize = 64;
/// How long a refusal stays valid as evidence.
const REFUSAL_LIFE: Span = Span::secs(24 * 3600);
/// How often a termination is told before the lessee has to ask for it.
const MAX_TELLS: u32 = 20;
/// How long after its term an ended lease is told again by a node that was restarted.
const TELL_AGAIN: Span = Span::secs(600);
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
        self.admission.entitles(order, mandate.as_ref(), certificate, now.wall).map_err(|why| {
            match why {
                NotEntitled::Lessee(_) | NotEntitled::Signer => Reason::NotAdmitted,
                _ => Reason::Mandate,
            }
        })?;
        // A repeat of what was granted is answered also by a node that grants nothing new.
        let known = self.book.has_request(&body.lessee, &body.request);
        if !known && (self.halted.is_some() || self.leaving) {
            return Err(Reason::NotReady);
        }
        if !known && self.disk_full {
            return Err(Reason::DiskFull);
        }
        let offer = self.pricing.quote(now.boot, &body.offer, &body.shape);
        let quote = Quote { offer, sold: self.pricing.sells(body) };
        Ok(self.book.place(now, order, &quote))
    }

    fn refuse(
        &mut self,
        now: Now,
        (of, order): (Hash, Option<&Order>),
        reason: Reason,
        figures: Vec<Figure>,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) {
        let referrals = match (reason, order) {
            (Reason::Capacity | Reason::DiskFull | Reason::NotReady, Some(order)) => {
                self.referrals(now, order)
            }
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

    /// Other nodes that seem to have what an order asks for.
    fn referrals(&mut self, now: Now, order: &Order) -> Vec<KeyId> {
        let start = self.dice.number();
        let fits = |key: &KeyId| {
            self.spread.offer(key).is_some_and(|(offer, heard)| {
                offer.body().fits(&order.shape)
                    && offer.body().rates.hourly(&order.shape).is_some_and(|r| r <= order.ceiling)
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
        if wire::encode::<MAX_JOB>(job).is_err() {
            self.refuse(now, (claim.id(), None), Reason::BadJob, Vec::new(), ticket, out);
            return;
        }
        if let Some(known) = self.book.get(&lease) {
            let (have, need) = (known.terms.payload_room(), job.payload_bytes());
            if need > have {
                let figures = vec![Figure { of: "disk".into(), have, need }];
                self.refuse(now, (claim.id(), None), Reason::BadJob, figures, ticket, out);
                return;
            }
        }
        let runs = self.pricing.runs(&job.runtime);
        match self.book.claim(now, claim, runs) {
            Acted::Repeat(answer) => reply(Word::Accepted, answer, ticket, out),
            Acted::Refused(reason) => {
                self.refuse(now, (claim.id(), None), reason, Vec::new(), ticket, out);
            }
            Acted::Accepted(answer) => {
                self.keep_lent(&lease, out);
                reply(Word::Accepted, answer, ticket, out);
                if let Some(known) = self.book.get(&lease) {
                    out.push(Effect::StartJob(Box::new(self.start(lease, known, claim))));
                }
            }
        }
    }

    fn start(&self, lease: LeaseId, known: &Lease, claim: &Verified<Claim>) -> StartJob {
        let spent = known.kept.claimed.map(|at| at + chain::billable(&known.terms));
        let end = known.term_end();
        let late = if self.config.plant.is("outlive-term") { Span::secs(60) } else { Span::ZERO };
        StartJob {
            lease,
            delegate: known.terms.delegate,
            sources: self.data_addresses(&known.terms.delegate),
            job: claim.body().job.clone(),
            shape: known.terms.shape.clone(),
            deadline: end.min(spent.unwrap_or(end)) + late,
            grace: known.terms.grace,
        }
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
            Acted::Refused(reason) => {
                self.refuse(now, (release.id(), None), reason, Vec::new(), ticket, out);
            }
            Acted::Accepted(answer) => {
                self.keep_lent(&lease, out);
                reply(Word::Accepted, answer, ticket, out);
                self.wind_down(now, &lease, EndReason::Released, out);
            }
        }
    }

    /// A lease began to drain: its job is ended, or what is left of it at once.
    fn wind_down(&mut self, now: Now, lease: &LeaseId, why: EndReason, out: &mut Vec<Effect>) {
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
    fn close(&mut self, now: Now, lease: &LeaseId, out: &mut Vec<Effect>) {
        self.write_receipt(now, lease, out);
        let Some(_) = self.book.finish(now, lease) else { return };
        self.counters.ended += 1;
        self.keep_lent(lease, out);
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
        if ack.body().lease != *lease || !self.book.acknowledge(now.boot, ack) {
            let pause = now.boot + Span::secs(5);
            self.receipts_out.insert(*lease, Some(pause));
            return;
        }
        self.counters.acknowledged += 1;
        let kept = Kept::Acknowledged(*lease, ack.body().number, ack.signed().clone());
        out.push(Effect::Keep(kept));
        self.keep_lent(lease, out);
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
        if self.book.reaped(lease, outcome) || self.book.release_after(now, lease) {
            self.close(now, lease, out);
        } else {
            self.keep_lent(lease, out);
        }
    }

    /// Takes up a lease after a restart: its job, if it had one, is dead by now.
    pub(super) fn resume_lent(
        &mut self,
        now: Now,
        lease: &LeaseId,
        orphan: Option<&(Outcome, Usage)>,
        out: &mut Vec<Effect>,
    ) {
        let Some(known) = self.book.get(lease) else { return };
        let same_boot = known.kept.boot == self.config.boot;
        let (running, stage) = (known.running, known.kept.stage);
        if stage == Stage::Ended {
            // Whether its delegate was told is not kept: a lease of late is told again.
            let late = known.terms.decided + known.terms.term + TELL_AGAIN;
            if !known.unacknowledged.is_empty() || late > now.wall {
                self.tell_at(*lease, now.boot, 0);
            }
            return;
        }
        if !same_boot {
            self.book.rebase(lease, self.config.boot, now.boot);
        }
        if running {
            let (outcome, usage) = orphan.cloned().unwrap_or((Outcome::Lost, Usage::default()));
            let lost = !matches!(outcome, Outcome::Exited(_));
            // What is lost is billed to its last receipt, and its usage is told up to there too.
            if orphan.is_some() && !lost {
                self.book.report(lease, usage);
            }
            self.book.reaped(lease, outcome);
            if lost || !same_boot {
                self.book.drain_lost(now, lease);
            } else {
                self.book.release_after(now, lease);
            }
        } else if !same_boot {
            self.book.drain_lost(now, lease);
        }
        let draining = self.book.get(lease).is_some_and(|k| k.kept.stage == Stage::Draining);
        if draining {
            self.close(now, lease, out);
        } else if running {
            self.keep_lent(lease, out);
        }
    }

    pub(super) fn wake_lessor(&mut self, now: Now, out: &mut Vec<Effect>) {
        for turn in self.book.due(now.boot) {
            match turn {
                Turn::Lapsed(lease) => {
                    self.counters.lapsed += 1;
                    self.book.drain(now, &lease, EndReason::Lapsed, self.config.me);
                    self.close(now, &lease, out);
                }
                Turn::Drain(lease, reason) => {
                    self.book.drain(now, &lease, reason, self.config.me);
                    self.keep_lent(&lease, out);
                    self.wind_down(now, &lease, reason, out);
                }
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

fn reply(word: Word, draft: Draft, ticket: Ticket, out: &mut Vec<Effect>) {
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
        class: terms.class,
        rate: terms.rate,
        decided: terms.decided,
        term_end: lease.term_end(),
        term: terms.term,
        running: lease.running,
        usage: kept.chain.usage,
        charge: kept.chain.charge,
        receipts: kept.chain.number,
        acknowledged: kept.acknowledged.0,
        end: kept.end.map(|(reason, _)| reason),
        outcome: kept.outcome.clone(),
    }
}

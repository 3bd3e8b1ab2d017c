//! The lessee's part: seeking a lease, using it, countersigning what it costs.

mod acts;
mod ends;

pub(super) use acts::{Verb, draft_claim, small_enough};
use ends::ended_of;

use super::event::{Failure, Leased, Reply};
use super::view::HeldView;
use super::{CommandId, Core, Effect, Kept, Pending, Record};
use crate::base::dice::Dice;
use crate::base::id::{Hash, KeyId, LeaseId};
use crate::base::time::{Boot, Now, SKEW, Span};
use crate::minds::admission::{departure, exceeded};
use crate::minds::holdings::{Held, Holding, Placed, Stage};
use crate::minds::seek::{Next, Pursuit};
use crate::placement::{self, Candidate, Ranking};
use crate::words::charter::{Certificate, Role};
use crate::words::contract::{Authority, GangOf, Grant, Order, Refusal};
use crate::words::equivocation::Equivocation;
use crate::words::message::{GrantPapers, Message, OrderPapers, Utterance, Word};
use crate::words::object::{Envelope, body_in, order_subject};
use crate::words::sign::{Draft, HeaderOf, Signed, Verified};
use crate::words::want::{Choice, Want};

/// The most searches at once.
const MAX_PURSUITS: usize = 1_024;
/// How long an order stays valid: long enough for every retry of it.
const ORDER_LIFE: Span = Span::secs(30);
/// How long a host that refused or failed is avoided.
const AVOID: Span = Span::secs(2);
/// How long after a lease may no longer be relied on its lessor is asked how it ended.
const SILENT: Span = Span::secs(10);
/// How long after that an unused lease, or an order nobody can be granted, is remembered.
const FORGET: Span = Span::secs(10 * 60);
/// The most ended leases kept in memory.
const MAX_ENDED: usize = 1_000;

impl Core {
    /// Ranks the hosts on the map for `want`.
    pub(super) fn rank(&mut self, now: Now, want: &Want) -> Ranking {
        self.rank_those(now, want, |_| true)
    }

    /// Ranks some of the hosts on the map for `want`.
    fn rank_those(&mut self, now: Now, want: &Want, these: impl Fn(&KeyId) -> bool) -> Ranking {
        let mut dice = Dice::new(self.dice.number());
        let candidates: Vec<_> = self
            .spread
            .hosts()
            .filter(|record| these(&record.signer()))
            .map(|record| {
                let key = record.signer();
                let offer = self.spread.offer(&key);
                let known = self.records.get(&key).copied().unwrap_or_default();
                Candidate {
                    key,
                    host: Some(record.body()),
                    offer: offer.map(|(offer, _)| offer),
                    up: self.is_up(&key, offer.map(|(_, heard)| heard), now.boot),
                    avoided: known.avoid_until > now.boot,
                    quarantined: self.conduct.is_quarantined(&key),
                    record: (known.failed, known.all),
                }
            })
            .collect();
        placement::rank(want, &candidates, &mut dice)
    }

    pub(super) fn seek(
        &mut self,
        now: Now,
        command: CommandId,
        want: Want,
        out: &mut Vec<Effect>,
    ) -> Result<(), Failure> {
        let mandate = self.mandate.as_ref().ok_or(Failure::NoMandate)?;
        let allowed = mandate.body();
        if let Some(what) = exceeded(allowed, want.max_hourly, want.budget, want.longest) {
            return Err(Failure::BadOrder(format!(
                "its {what} exceeds this node's mandate, which allows {} per hour, {} in all and \
                 terms of {}",
                allowed.max_hourly, allowed.max_total, allowed.max_term
            )));
        }
        if self.pursuits.len() >= MAX_PURSUITS {
            return Err(Failure::Busy);
        }
        let ranking = self.rank(now, &want);
        if ranking.choices.is_empty() {
            return Err(Failure::NothingFits(ranking.against));
        }
        let pursuit = Pursuit::new(now.boot, want, ranking.choices);
        self.pursuits.insert(command, pursuit);
        self.pursue(now, command, out);
        Ok(())
    }

    /// Does what a search wants next.
    fn pursue(&mut self, now: Now, command: CommandId, out: &mut Vec<Effect>) {
        loop {
            let Some(pursuit) = self.pursuits.get_mut(&command) else { return };
            match pursuit.next(now.boot) {
                Next::Wait(_) => return,
                Next::Ask(choice) => {
                    let want = pursuit.want.clone();
                    if let Some(order) = self.send_order(now, (&want, None), &choice, out)
                        && let Some(pursuit) = self.pursuits.get_mut(&command)
                    {
                        pursuit.asked(now.boot, order, choice);
                    }
                }
                Next::Failed if pursuit.rounds > 0 && !pursuit.heard().is_empty() => {
                    let want = pursuit.want.clone();
                    let ranking = self.rank(now, &want);
                    if let Some(pursuit) = self.pursuits.get_mut(&command) {
                        pursuit.widen(ranking.choices);
                    }
                }
                Next::Failed => {
                    if let Some(pursuit) = self.pursuits.remove(&command) {
                        let heard = pursuit.heard().to_vec();
                        out.push(Effect::Answer(command, Err(Failure::Refused(heard))));
                    }
                    return;
                }
            }
        }
    }

    fn order_body(
        &mut self,
        now: Now,
        (want, gang): (&Want, Option<GangOf>),
        choice: &Choice,
        authority: Authority,
        lessee: KeyId,
    ) -> Order {
        Order {
            lessee,
            delegate: self.config.me,
            authority,
            lessor: choice.lessor,
            offer: choice.offer,
            request: self.dice.request(),
            shape: want.shape.clone(),
            model: want.model.clone(),
            class: want.class,
            term: want.term,
            longest: want.longest,
            gang,
            claim_within: want.claim_within,
            ceiling: want.max_hourly,
            cap: want.budget,
            exposure: want.exposure,
            receipt_every: want.receipt_every,
            placed: now.wall,
        }
    }

    pub(super) fn send_order(
        &mut self,
        now: Now,
        (want, gang): (&Want, Option<GangOf>),
        choice: &Choice,
        out: &mut Vec<Effect>,
    ) -> Option<Hash> {
        let mandate = self.mandate.clone()?;
        let authority = Authority::Mandate(mandate.signed().clone());
        let body = self.order_body(now, (want, gang), choice, authority, mandate.signer());
        let subject = order_subject(&body.lessee, &body.request);
        let draft = self.hand.draft(subject, 0, now.wall + ORDER_LIFE, &body).ok()?;
        let order = draft.id();
        let placed = Placed::Here(draft.clone());
        self.keep_order(now, placed, (choice.lessor, gang), &choice.offer, out);
        let what = Utterance::Signs(Word::Order, draft);
        self.ask(choice.lessor, Pending::Order(order), what, out);
        Some(order)
    }

    fn keep_order(
        &mut self,
        now: Now,
        placed: Placed,
        (lessor, gang): (KeyId, Option<GangOf>),
        offer: &Hash,
        out: &mut Vec<Effect>,
    ) {
        let known = self.spread.offer(&lessor).map(|(offer, _)| offer);
        let offer = known.filter(|known| known.id() == *offer);
        let kept = Held {
            order: placed,
            lessor,
            offer: offer.map(|offer| offer.signed().clone()),
            boot: self.config.boot,
            sent: now.boot,
            grant: None,
            stage: Stage::Ordered,
            claim: None,
            claim_sent: None,
            claim_refused: false,
            release: None,
            term: Span::ZERO,
            version: 0,
            renew: None,
            renewal: None,
            gang,
            chain: crate::words::chain::Chain::default(),
            acknowledgement: None,
            objection: None,
            termination: None,
        };
        let order = kept.order.id();
        out.push(Effect::Keep(Kept::Held(order, Box::new(kept.clone()))));
        self.holdings.ordered(kept);
    }

    pub(super) fn lease_by(
        &mut self,
        now: Now,
        command: CommandId,
        papers: &OrderPapers,
        out: &mut Vec<Effect>,
    ) -> Result<(), Failure> {
        let (order, body) = (&papers.order, papers.order.body());
        if body.delegate != self.config.me {
            let text =
                format!("it names {} as delegate, this is {}", body.delegate, self.config.me);
            return Err(Failure::BadOrder(text));
        }
        if order.header().not_after < now.wall {
            return Err(Failure::BadOrder("it has expired".into()));
        }
        let known = self.holdings.order(&order.id()).is_some();
        if let Some(holding) = self.holdings.order(&order.id()).filter(|h| h.terms.is_some()) {
            // The same file twice is one lease.
            let leased = self.leased_from(holding, order.id());
            let leased = leased.ok_or(Failure::Busy)?;
            out.push(Effect::Answer(command, Ok(Reply::Leased(Box::new(leased)))));
            return Ok(());
        }
        if self.command_of(&order.id()).is_some() || self.pursuits.len() >= MAX_PURSUITS {
            return Err(Failure::Busy);
        }
        let choice = Choice {
            lessor: body.lessor,
            name: self.name_of(&body.lessor),
            offer: body.offer,
            rate: body.ceiling,
            worst_case: body.ceiling.per_hour_over(body.term).min(body.cap),
            score: 0,
            why: "named by the order".into(),
        };
        let want = want_of(body);
        let mut pursuit = Pursuit::new(now.boot, want, Vec::new());
        pursuit.rounds = 0;
        pursuit.asked(now.boot, order.id(), choice);
        self.pursuits.insert(command, pursuit);
        // One that was sent before without an answer counts from its first sending.
        if !known {
            let placed = Placed::Elsewhere(order.signed().clone());
            self.keep_order(now, placed, (body.lessor, body.gang), &body.offer, out);
        }
        let what = Utterance::Plain(Message::Order(order.signed().clone()));
        self.ask(body.lessor, Pending::Order(order.id()), what, out);
        Ok(())
    }

    pub(super) fn draft_for(
        &mut self,
        now: Now,
        command: CommandId,
        want: &Want,
        lessee: KeyId,
        certificate: Signed,
        out: &mut Vec<Effect>,
    ) -> Result<(), Failure> {
        let admitted: Verified<Certificate> = certificate
            .verify(&self.hand.fabric)
            .map_err(|why| Failure::BadOrder(format!("the lessee's certificate: {why}")))?;
        self.admission
            .admits(&admitted, &lessee, Role::Tenant, now.wall)
            .map_err(|why| Failure::BadOrder(format!("the lessee's certificate: {why}")))?;
        let ranking = self.rank(now, want);
        let Some(choice) = ranking.choices.into_iter().next() else {
            return Err(Failure::NothingFits(ranking.against));
        };
        let authority = Authority::Lessee(certificate);
        let body = self.order_body(now, (want, None), &choice, authority, lessee);
        let header = HeaderOf {
            fabric: self.hand.fabric,
            signer: lessee,
            subject: order_subject(&lessee, &body.request),
            // An offline key has no epoch of its own: the time of drafting takes its place.
            epoch: now.wall.0,
            seq: 0,
            not_after: now.wall + self.admission.charter().limits.max_order_life,
        };
        let draft = Draft::new(header, &body);
        let draft = draft.map_err(|error| Failure::BadOrder(error.to_string()))?;
        out.push(Effect::Answer(command, Ok(Reply::Drafted(draft, choice))));
        Ok(())
    }

    fn command_of(&self, order: &Hash) -> Option<CommandId> {
        let mut all = self.pursuits.iter();
        all.find(|(_, pursuit)| pursuit.awaits(order)).map(|(command, _)| *command)
    }

    pub(super) fn granted(
        &mut self,
        now: Now,
        order: &Hash,
        papers: &GrantPapers,
        out: &mut Vec<Effect>,
    ) {
        let grant = &papers.grant;
        let lessor = grant.signer();
        let verdict = self.judge_grant(now, order, papers);
        self.compare_grants(order, grant, out);
        if let Err(why) = verdict {
            self.order_silent(now, order, &why, out);
            return;
        }
        if let Some(command) = self.assembly_of(order) {
            let Some(lease) = self.holdings.granted(order, grant) else { return };
            self.records.entry(lessor).or_default().all += 1;
            self.keep_held(order, out);
            self.gang_granted(now, command, (*order, lease), grant.signed(), out);
            return;
        }
        let Some(command) = self.command_of(order) else {
            self.decline(now, order, grant, out);
            return;
        };
        let Some(lease) = self.holdings.granted(order, grant) else { return };
        if self.config.plant.is("rely-from-grant")
            && let Some(holding) = self.holdings.get_mut(&lease)
        {
            holding.kept.sent = now.boot;
        }
        self.records.entry(lessor).or_default().all += 1;
        self.keep_held(order, out);
        let Some(pursuit) = self.pursuits.remove(&command) else { return };
        let Some(choice) = pursuit.choice(order).cloned() else { return };
        let (rate, most) = (grant.body().rate, grant.body().worst_case_over(grant.body().term));
        let choice = Choice { rate, worst_case: most, ..choice };
        let leased = Leased {
            lease,
            order: *order,
            grant: grant.signed().clone(),
            choice,
            heard: pursuit.heard().to_vec(),
        };
        out.push(Effect::Answer(command, Ok(Reply::Leased(Box::new(leased)))));
    }

    /// A grant that nobody waits for any more, such as of a hedge that came second: others
    /// compete for what it holds, so it is given back and not left to lapse. One for an order that
    /// was signed elsewhere is there for whoever sends that order again.
    fn decline(&mut self, now: Now, order: &Hash, grant: &Verified<Grant>, out: &mut Vec<Effect>) {
        let here = |holding: &Holding| matches!(holding.kept.order, Placed::Here(_));
        if self.holdings.order(order).is_some_and(here)
            && let Some(lease) = self.holdings.granted(order, grant)
        {
            self.release_quietly(now, &lease, out);
        }
    }

    /// Two grants of one order under one version prove that their lessor lies.
    fn compare_grants(&mut self, order: &Hash, grant: &Verified<Grant>, out: &mut Vec<Effect>) {
        let known = self.holdings.order(order).and_then(|holding| holding.kept.grant.clone());
        let Some(first) = known.filter(|known| known.id() != grant.id()) else { return };
        let proof = Equivocation { first, second: grant.signed().clone() };
        if let Ok(conviction) = proof.check(&self.hand.fabric) {
            self.convict(conviction, None, out);
        }
    }

    fn judge_grant(&self, now: Now, order: &Hash, papers: &GrantPapers) -> Result<(), String> {
        let GrantPapers { grant, certificate } = papers;
        let holding = self.holdings.order(order).ok_or("no such order is out")?;
        let envelope = match &holding.kept.order {
            Placed::Here(draft) => &draft.envelope,
            Placed::Elsewhere(signed) => &signed.envelope,
        };
        let asked = body_in::<Order>(envelope).ok_or("the order does not decode")?;
        let until = Envelope::decode(envelope).map(|envelope| envelope.header.not_after);
        if self.conduct.is_quarantined(&grant.signer()) {
            return Err("its lessor was convicted of saying two different things".into());
        }
        if grant.header().epoch <= self.conduct.floor(&grant.signer()) {
            return Err("it was signed in an epoch that its organisation has declared void".into());
        }
        if grant.body().order != *order {
            return Err("it answers another order".into());
        }
        if let Some(how) = departure((*order, &asked), grant) {
            return Err(format!("its grant does not keep to the order: {how}"));
        }
        // Whoever checks the proof of this lease later judges the order as of that day.
        let decided = grant.body().decided;
        if asked.placed > decided + SKEW || until.is_ok_and(|until| until + SKEW < decided) {
            return Err("its grant is dated to when the order did not hold".into());
        }
        self.admission
            .admits(certificate, &grant.signer(), Role::Node, now.wall)
            .map_err(|why| why.to_string())
    }

    /// What a node is called, as far as is known here.
    fn name_of(&self, node: &KeyId) -> String {
        self.spread.host(node).map_or_else(|| node.short(), |host| host.body().name.clone())
    }

    fn leased_from(&self, holding: &Holding, order: Hash) -> Option<Leased> {
        let (lease, terms) = holding.terms.as_ref()?;
        let lessor = holding.kept.lessor;
        let choice = Choice {
            lessor,
            name: self.name_of(&lessor),
            offer: holding.kept.offer.as_ref().map(Signed::id).unwrap_or_default(),
            rate: terms.rate,
            worst_case: terms.worst_case_over(holding.kept.term),
            score: 0,
            why: "granted before".into(),
        };
        let grant = holding.kept.grant.clone()?;
        Some(Leased { lease: *lease, order, grant, choice, heard: Vec::new() })
    }

    fn keep_held(&self, order: &Hash, out: &mut Vec<Effect>) {
        if let Some(holding) = self.holdings.order(order) {
            out.push(Effect::Keep(Kept::Held(*order, Box::new(holding.kept.clone()))));
        }
    }

    pub(super) fn keep_held_lease(&self, lease: &LeaseId, out: &mut Vec<Effect>) {
        if let Some(holding) = self.holdings.get(lease) {
            let order = holding.kept.order.id();
            out.push(Effect::Keep(Kept::Held(order, Box::new(holding.kept.clone()))));
        }
    }

    fn avoid(&mut self, now: Now, lessor: KeyId, failed: bool) {
        if self.records.len() > 10_000 {
            self.records.retain(|_, record| record.avoid_until > now.boot);
        }
        let record: &mut Record = self.records.entry(lessor).or_default();
        record.avoid_until = now.boot + AVOID;
        if failed {
            record.failed += 1;
            record.all += 1;
        }
    }

    pub(super) fn refused(
        &mut self,
        now: Now,
        order: &Hash,
        from: KeyId,
        refusal: &Verified<Refusal>,
        out: &mut Vec<Effect>,
    ) {
        let body = refusal.body();
        if refusal.signer() != from || body.of != *order {
            self.order_silent(now, order, "it refused something else", out);
            return;
        }
        let figures = body.figures.iter();
        let figures: Vec<_> =
            figures.map(|f| format!("{}: have {}, need {}", f.of, f.have, f.need)).collect();
        let detail =
            if figures.is_empty() { body.reason.meaning().into() } else { figures.join(", ") };
        self.avoid(now, from, false);
        self.give_up_order(order, out);
        if let Some(command) = self.command_of(order) {
            let named = self.named(now, &command, &body.referrals);
            if let Some(pursuit) = self.pursuits.get_mut(&command) {
                pursuit.refused(order, body.reason, detail);
                pursuit.refer(named);
            }
            self.pursue(now, command, out);
        } else if let Some(command) = self.assembly_of(order) {
            let named = self.named(now, &command, &body.referrals);
            if let Some(assembly) = self.assemblies.get_mut(&command) {
                assembly.refer(named);
            }
            self.gang_refused_order(now, command, order, (Some(body.reason), detail), out);
        }
    }

    /// What hosts that somebody named have for what a command seeks, by their offers as known here.
    fn named(&mut self, now: Now, command: &CommandId, referrals: &[KeyId]) -> Vec<Choice> {
        if referrals.is_empty() {
            return Vec::new();
        }
        let pursuit = self.pursuits.get(command).map(|pursuit| &pursuit.want);
        let want = pursuit.or_else(|| self.assemblies.get(command).map(|a| &a.want)).cloned();
        // Who named hosts has said in which order.
        let Some(want) = want.filter(|want| want.lessors.is_empty()) else { return Vec::new() };
        let records = &self.records;
        let avoided =
            |key: &KeyId| records.get(key).is_some_and(|record| record.avoid_until > now.boot);
        let these: Vec<_> = referrals.iter().filter(|key| !avoided(key)).copied().collect();
        self.rank_those(now, &want, |key| these.contains(key)).choices
    }

    /// Nobody waits for this order's grant any more. One that was signed elsewhere can be sent
    /// again by anybody who has the file, so the instant of its first sending is not forgotten.
    fn give_up_order(&mut self, order: &Hash, out: &mut Vec<Effect>) {
        let Some(holding) = self.holdings.order(order) else { return };
        if matches!(holding.kept.order, Placed::Elsewhere(_)) {
            return;
        }
        self.holdings.drop_order(order);
        out.push(Effect::Keep(Kept::DropHeld(*order)));
    }

    pub(super) fn order_silent(
        &mut self,
        now: Now,
        order: &Hash,
        why: &str,
        out: &mut Vec<Effect>,
    ) {
        let lessor = self.holdings.order(order).map(|holding| holding.kept.lessor);
        if let Some(lessor) = lessor {
            self.avoid(now, lessor, true);
        }
        self.give_up_order(order, out);
        if let Some(command) = self.command_of(order) {
            if let Some(pursuit) = self.pursuits.get_mut(&command) {
                pursuit.silent(order, why.to_string());
            }
            self.pursue(now, command, out);
        } else if let Some(command) = self.assembly_of(order) {
            self.gang_refused_order(now, command, order, (None, why.to_string()), out);
        }
    }

    pub(super) fn next_pursuit(&self) -> Option<Boot> {
        let waits = self.pursuits.values().filter_map(|pursuit| pursuit.waits_until());
        waits.min()
    }

    pub(super) fn wake_lessee(&mut self, now: Now, out: &mut Vec<Effect>) {
        let due: Vec<_> = self
            .pursuits
            .iter()
            .filter(|(_, pursuit)| pursuit.waits_until().is_none_or(|at| at <= now.boot))
            .map(|(command, _)| *command)
            .collect();
        for command in due {
            let overdue = self.pursuits.get(&command).map(|pursuit| pursuit.overdue(now.boot));
            for order in overdue.unwrap_or_default() {
                self.order_silent(now, &order, "it did not answer in time", out);
            }
            self.pursue(now, command, out);
        }
    }

    pub(super) fn tick_lessee(&mut self, now: Now, out: &mut Vec<Effect>) {
        let (boot, limits) = (self.config.boot, &self.admission.charter().limits);
        let (mut over, mut silent) = (Vec::new(), Vec::new());
        self.returning.retain(|lease, _| {
            let known = self.holdings.get(lease);
            known.is_some_and(|holding| holding.kept.stage != Stage::Ended)
        });
        let mut returns = Vec::new();
        for (order, holding) in self.holdings.all() {
            let kept = &holding.kept;
            let same_boot = kept.boot == boot;
            if let Some((lease, terms)) = &holding.terms
                && kept.release.is_some()
                && kept.stage != Stage::Ended
                && self.is_return_due(now, lease)
                && if same_boot {
                    kept.sent + kept.term + SKEW > now.boot
                } else {
                    terms.decided + kept.term + SKEW > now.wall
                }
            {
                returns.push(*lease);
            }
            match (&holding.terms, kept.stage) {
                (_, Stage::Ended) => {}
                (None, _) => {
                    // An order signed elsewhere, until nobody can be granted it any more.
                    let spent = kept.sent + limits.max_order_life + SKEW + SKEW;
                    if !same_boot || spent < now.boot {
                        over.push(*order);
                    }
                }
                (Some((lease, _)), _) => {
                    let relied = holding.relied_until().unwrap_or_default();
                    if same_boot && relied + SILENT > now.boot {
                        continue;
                    }
                    let used = kept.claim.is_some() || kept.release.is_some();
                    if used || self.awaiting_end.contains_key(lease) {
                        silent.push((*lease, kept.lessor));
                    } else if !same_boot || relied + FORGET < now.boot {
                        over.push(*order);
                    }
                }
            }
        }
        for order in over {
            let expired = self.holdings.order(&order).is_some_and(|holding| {
                let Placed::Elsewhere(signed) = &holding.kept.order else { return true };
                let header = signed.header();
                header.map_or(true, |header| header.not_after + FORGET < now.wall)
            });
            if expired {
                self.holdings.drop_order(&order);
                out.push(Effect::Keep(Kept::DropHeld(order)));
            }
        }
        for lease in returns {
            self.return_again(now, lease, out);
        }
        for (lease, lessor) in silent {
            let (next, tries) = self.inquiries.get(&lease).copied().unwrap_or_default();
            if next <= now.boot {
                let pause = Span::secs(5).scale(u64::from(tries + 1).min(12), 1);
                self.inquiries.insert(lease, (now.boot + pause, tries));
                let what = Utterance::Plain(Message::Inquire(lease));
                self.ask(lessor, Pending::Inquire(lease), what, out);
            }
        }
        let ended = self.holdings.all().filter(|(_, h)| h.kept.stage == Stage::Ended).count();
        if ended > MAX_ENDED {
            let mut old: Vec<_> = self
                .holdings
                .all()
                .filter(|(_, h)| h.kept.stage == Stage::Ended)
                .map(|(order, h)| (h.terms.as_ref().map(|(_, terms)| terms.decided), *order))
                .collect();
            old.sort();
            for (_, order) in old.into_iter().take(ended - MAX_ENDED) {
                self.holdings.drop_order(&order);
            }
        }
    }

    pub(super) fn view_held(&self, now: Now) -> Vec<HeldView> {
        let granted = self.holdings.all().filter_map(|(order, holding)| {
            let (lease, terms) = holding.terms.as_ref()?;
            let kept = &holding.kept;
            let left = holding.relied_until().filter(|_| kept.boot == self.config.boot);
            let ended = ended_of(holding);
            Some(HeldView {
                id: Some(*lease),
                order: *order,
                lessor: kept.lessor,
                stage: kept.stage,
                shape: terms.shape.clone(),
                model: terms.model.clone(),
                class: terms.class,
                rate: terms.rate,
                worst_case: terms.worst_case_over(kept.term),
                decided: terms.decided,
                term: kept.term,
                longest: terms.longest,
                version: kept.version,
                left: left.map_or(Span::ZERO, |until| until.since(now.boot)),
                usage: kept.chain.usage,
                charge: kept.chain.charge,
                receipts: kept.chain.number,
                objection: kept.objection,
                end: ended.as_ref().map(|ended| ended.reason),
                outcome: ended.and_then(|ended| ended.outcome),
            })
        });
        granted.collect()
    }
}

fn want_of(order: &Order) -> Want {
    Want {
        shape: order.shape.clone(),
        model: order.model.clone(),
        class: order.class,
        term: order.term,
        longest: order.longest,
        claim_within: order.claim_within,
        max_hourly: order.ceiling,
        budget: order.cap,
        exposure: order.exposure,
        receipt_every: order.receipt_every,
        runtime: String::new(),
        lessors: vec![order.lessor],
        labels: Vec::new(),
        isolation: Vec::new(),
    }
}

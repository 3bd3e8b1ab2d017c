//! What is done with held leases: claimed, renewed, given back. Each act is signed once, kept, and
//! sent again, the same bytes, until its lessor answers.

use std::collections::BTreeMap;

use crate::base::id::LeaseId;
use crate::base::time::{BootId, Now, Span};
use crate::core::event::{Failure, Reply};
use crate::core::lessee::ORDER_LIFE;
use crate::core::lessor::MAX_JOB;
use crate::core::{Acting, CommandId, Core, Effect, Pending};
use crate::minds::holdings::{Held, Holding, Holdings, Stage, act_id};
use crate::words::chain::EVIDENCE_LIFE;
use crate::words::contract::{
    Acceptance, Claim, JobSpec, Reason, Refusal, Release, Renew, Renewal,
};
use crate::words::message::{Utterance, Word};
use crate::words::object::{Envelope, body_in};
use crate::words::sign::{Draft, Hand, Verified};
use crate::words::wire::{self, EncodeError};

/// How often an act is repeated at once to a lessor that does not answer.
const MAX_TRIES: u32 = 3;

/// What is done with a held lease, each in a map of its own while it waits for its answer.
#[derive(Clone, Copy, Debug)]
pub(in crate::core) enum Verb {
    Claim,
    Renew,
    Release,
}

impl Verb {
    const fn word(self) -> Word {
        match self {
            Self::Claim => Word::Claim,
            Self::Renew => Word::Renew,
            Self::Release => Word::Release,
        }
    }

    const fn about(self, lease: LeaseId) -> Pending {
        match self {
            Self::Claim => Pending::Claim(lease),
            Self::Renew => Pending::Renew(lease),
            Self::Release => Pending::Release(lease),
        }
    }

    fn draft(self, kept: &Held) -> Option<&Draft> {
        match self {
            Self::Claim => kept.claim.as_ref(),
            Self::Renew => kept.renew.as_ref().map(|(draft, _)| draft),
            Self::Release => kept.release.as_ref(),
        }
    }
}

impl Core {
    pub(in crate::core) fn claim(
        &mut self,
        now: Now,
        command: CommandId,
        lease: LeaseId,
        job: &JobSpec,
        out: &mut Vec<Effect>,
    ) -> Result<(), Failure> {
        job.check().map_err(|why| Failure::BadJob(why.into()))?;
        small_enough(job)?;
        let holding = relied_on(&mut self.holdings, &lease, self.config.boot, now)?;
        let room = holding.terms.as_ref().map_or(0, |(_, terms)| terms.payload_room());
        let need = job.payload_bytes();
        if need > room {
            return Err(Failure::BadJob(format!(
                "its program and inputs take {need} bytes, and this lease has room for {room}: ask \
                 for more disk"
            )));
        }
        let standing = holding.kept.claim.as_ref().filter(|_| !holding.kept.claim_refused);
        let draft = match standing {
            Some(draft) => {
                let same = body_in::<Claim>(&draft.envelope).is_some_and(|known| known.job == *job);
                if !same {
                    return Err(Failure::InUse);
                }
                draft.clone()
            }
            None => {
                let draft = draft_claim(&self.hand, holding, now, (lease, job), ORDER_LIFE);
                draft.map_err(|error| Failure::BadJob(error.to_string()))?
            }
        };
        self.act(Verb::Claim, lease, draft, vec![command], out);
        Ok(())
    }

    const fn acting(&mut self, verb: Verb) -> &mut BTreeMap<LeaseId, Acting> {
        match verb {
            Verb::Claim => &mut self.claims,
            Verb::Renew => &mut self.renewals,
            Verb::Release => &mut self.releases,
        }
    }

    /// Keeps an act and sends it to the lease's lessor, or waits for the answer with those who
    /// asked for it before.
    fn act(
        &mut self,
        verb: Verb,
        lease: LeaseId,
        draft: Draft,
        commands: Vec<CommandId>,
        out: &mut Vec<Effect>,
    ) {
        if let Some(acting) = self.acting(verb).get_mut(&lease) {
            acting.commands.extend(commands);
            return;
        }
        let Some(lessor) = self.holdings.get(&lease).map(|holding| holding.kept.lessor) else {
            return;
        };
        self.keep_held_lease(&lease, out);
        self.acting(verb).insert(lease, Acting { commands, tries: 1 });
        self.ask(lessor, verb.about(lease), Utterance::Signs(verb.word(), draft), out);
    }

    /// An act was not answered as it should be: it is sent again, the same bytes, until it was
    /// tried often enough.
    pub(in crate::core) fn act_silent(
        &mut self,
        verb: Verb,
        lease: &LeaseId,
        why: &str,
        out: &mut Vec<Effect>,
    ) {
        let kept = self.holdings.get(lease).map(|holding| &holding.kept);
        let again = kept.and_then(|kept| Some((kept.lessor, verb.draft(kept)?.clone())));
        let acting = self.acting(verb).get_mut(lease).filter(|acting| acting.tries < MAX_TRIES);
        if let (Some(acting), Some((lessor, draft))) = (acting, again) {
            acting.tries += 1;
            self.ask(lessor, verb.about(*lease), Utterance::Signs(verb.word(), draft), out);
            return;
        }
        let given_up = self.acting(verb).remove(lease);
        answer(given_up, &Err(Failure::Unreachable(why.into())), out);
    }

    pub(in crate::core) fn claim_accepted(
        &mut self,
        lease: &LeaseId,
        acceptance: &Verified<Acceptance>,
        out: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(lease) else { return };
        let lessor = holding.kept.lessor;
        let of = holding.kept.claim.as_ref().map(Draft::id);
        if acceptance.signer() != lessor || Some(acceptance.body().of) != of {
            self.act_silent(Verb::Claim, lease, "it accepted something else", out);
            return;
        }
        if holding.kept.stage == Stage::Granted {
            holding.kept.stage = Stage::Claimed;
            self.keep_held_lease(lease, out);
        }
        answer(self.claims.remove(lease), &Ok(Reply::Claimed(lessor)), out);
    }

    pub(in crate::core) fn claim_refused(
        &mut self,
        now: Now,
        lease: &LeaseId,
        refusal: &Verified<Refusal>,
        out: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(lease) else { return };
        let kept = &mut holding.kept;
        let of = kept.claim.as_ref().map(Draft::id);
        if refusal.signer() != kept.lessor || Some(refusal.body().of) != of {
            self.act_silent(Verb::Claim, lease, "it refused something else", out);
            return;
        }
        // One that went with its gang's certificate is carried out once the gang is whole.
        let early = refusal.body().reason == Reason::NotCommitted
            && kept
                .claim
                .as_ref()
                .and_then(|claim| Envelope::decode(&claim.envelope).ok())
                .is_some_and(|claim| claim.header.not_after > now.wall + EVIDENCE_LIFE.scale(1, 2));
        if kept.stage == Stage::Granted && !early {
            // Nothing was claimed: the lease is there for another job.
            kept.claim_refused = true;
            self.keep_held_lease(lease, out);
        }
        let failure = Failure::Act(refusal.body().reason);
        answer(self.claims.remove(lease), &Err(failure), out);
    }

    /// Gives a lease back for which nobody waits. What cannot be given back ends by its term, or
    /// lapses.
    pub(in crate::core) fn release_quietly(
        &mut self,
        now: Now,
        lease: &LeaseId,
        out: &mut Vec<Effect>,
    ) {
        let _ = self.send_release(now, Vec::new(), *lease, out);
    }

    pub(in crate::core) fn release(
        &mut self,
        now: Now,
        command: CommandId,
        lease: LeaseId,
        out: &mut Vec<Effect>,
    ) -> Result<(), Failure> {
        let holding = self.holdings.get(&lease).ok_or(Failure::UnknownLease)?;
        if holding.kept.stage == Stage::Ended {
            out.push(Effect::Answer(command, Ok(Reply::Released)));
            return Ok(());
        }
        self.send_release(now, vec![command], lease, out)
    }

    fn send_release(
        &mut self,
        now: Now,
        commands: Vec<CommandId>,
        lease: LeaseId,
        out: &mut Vec<Effect>,
    ) -> Result<(), Failure> {
        let holding = self.holdings.get_mut(&lease).ok_or(Failure::UnknownLease)?;
        let draft = match &holding.kept.release {
            Some(draft) => draft.clone(),
            None => {
                let body = Release { lease, act: act_id(&lease, "release") };
                let draft = self.hand.draft(lease.0, 0, now.wall + ORDER_LIFE, &body);
                let draft = draft.map_err(|error| Failure::BadJob(error.to_string()))?;
                holding.kept.release = Some(draft.clone());
                draft
            }
        };
        self.act(Verb::Release, lease, draft, commands, out);
        Ok(())
    }

    /// Whether a release that nobody has answered is to be sent again.
    pub(in crate::core) fn is_return_due(&self, now: Now, lease: &LeaseId) -> bool {
        let waits = match self.returning.get(lease) {
            None => false,
            Some(None) => true,
            Some(Some((at, _))) => *at > now.boot,
        };
        !waits && !self.releases.contains_key(lease)
    }

    /// Sends a release again that nobody has answered: until it is, the lease may cost.
    pub(in crate::core) fn return_again(
        &mut self,
        now: Now,
        lease: LeaseId,
        out: &mut Vec<Effect>,
    ) {
        let Some(kept) = self.holdings.get(&lease).map(|holding| &holding.kept) else { return };
        let (lessor, Some(draft)) = (kept.lessor, kept.release.clone()) else { return };
        let tries = self.returning.get(&lease).copied().flatten().map_or(0, |(_, tries)| tries);
        // Twice as long after each, up to a minute.
        let pause = Span::secs(60).min(Span::secs(1 << tries.min(6)));
        self.returning.insert(lease, Some((now.boot + pause, tries + 1)));
        let acting = Acting { commands: Vec::new(), tries: MAX_TRIES };
        self.releases.insert(lease, acting);
        self.ask(lessor, Pending::Release(lease), Utterance::Signs(Word::Release, draft), out);
    }

    pub(in crate::core) fn release_accepted(
        &mut self,
        lease: &LeaseId,
        acceptance: &Verified<Acceptance>,
        out: &mut Vec<Effect>,
    ) {
        let lessor = self.holdings.get(lease).map(|holding| holding.kept.lessor);
        if Some(acceptance.signer()) != lessor {
            self.act_silent(Verb::Release, lease, "somebody else answered", out);
            return;
        }
        self.returning.insert(*lease, None);
        answer(self.releases.remove(lease), &Ok(Reply::Released), out);
    }

    pub(in crate::core) fn release_refused(
        &mut self,
        lease: &LeaseId,
        refusal: &Verified<Refusal>,
        out: &mut Vec<Effect>,
    ) {
        let kept = self.holdings.get(lease).map(|holding| &holding.kept);
        let of = kept.and_then(|kept| kept.release.as_ref()).map(Draft::id);
        let lessor = kept.map(|kept| kept.lessor);
        if Some(refusal.signer()) != lessor || Some(refusal.body().of) != of {
            self.act_silent(Verb::Release, lease, "it refused something else", out);
            return;
        }
        let reason = refusal.body().reason;
        let over = matches!(reason, Reason::Ended);
        let reply = if over { Ok(Reply::Released) } else { Err(Failure::Act(reason)) };
        self.returning.insert(*lease, None);
        answer(self.releases.remove(lease), &reply, out);
    }

    /// Asks the lessor to make a lease longer.
    pub(in crate::core) fn renew(
        &mut self,
        now: Now,
        command: CommandId,
        lease: LeaseId,
        term: Span,
        out: &mut Vec<Effect>,
    ) -> Result<(), Failure> {
        let holding = relied_on(&mut self.holdings, &lease, self.config.boot, now)?;
        let longest = holding.terms.as_ref().map_or(Span::ZERO, |(_, terms)| terms.longest);
        if term < holding.kept.term || term > longest {
            return Err(Failure::Term { least: holding.kept.term, most: longest, asked: term });
        }
        if self.renewals.contains_key(&lease) {
            return Err(Failure::Busy);
        }
        let act = holding.act_id(&lease, "renew", now.wall);
        let kept = &mut holding.kept;
        // One that was asked before without an answer is asked again with the same bytes.
        let asked = kept.renew.as_ref().filter(|(_, asked)| *asked > kept.term);
        let draft = match asked {
            Some((_, asked)) if *asked != term => return Err(Failure::Unanswered(*asked)),
            Some((draft, _)) => draft.clone(),
            None => {
                let version = kept.version;
                let body = Renew { lease, act, version, term };
                let draft = self.hand.draft(lease.0, holding.acts, now.wall + ORDER_LIFE, &body);
                let draft = draft.map_err(|error| Failure::BadOrder(error.to_string()))?;
                holding.acts += 1;
                kept.renew = Some((draft.clone(), term));
                holding.renew_left = false;
                draft
            }
        };
        self.act(Verb::Renew, lease, draft, vec![command], out);
        Ok(())
    }

    pub(in crate::core) fn renewed(
        &mut self,
        now: Now,
        lease: &LeaseId,
        renewal: &Verified<Renewal>,
        out: &mut Vec<Effect>,
    ) {
        if renewal.body().lease != *lease || !self.holdings.renewed(renewal) {
            self.act_silent(Verb::Renew, lease, "it renewed something else", out);
            return;
        }
        self.keep_held_lease(lease, out);
        let Some(holding) = self.holdings.get(lease) else { return };
        let left = holding.relied_until().map_or(Span::ZERO, |until| until.since(now.boot));
        let (version, term) = (holding.kept.version, holding.kept.term);
        let reply = Ok(Reply::Renewed { version, term, left });
        answer(self.renewals.remove(lease), &reply, out);
    }

    pub(in crate::core) fn renew_refused(
        &mut self,
        lease: &LeaseId,
        refusal: &Verified<Refusal>,
        out: &mut Vec<Effect>,
    ) {
        let Some(holding) = self.holdings.get_mut(lease) else { return };
        let kept = &mut holding.kept;
        let of = kept.renew.as_ref().map(|(draft, _)| draft.id());
        if refusal.signer() != kept.lessor || Some(refusal.body().of) != of {
            self.act_silent(Verb::Renew, lease, "it refused something else", out);
            return;
        }
        // Nothing was agreed: nothing may be billed beyond the term as it is.
        kept.renew = None;
        self.keep_held_lease(lease, out);
        let failure = Failure::Act(refusal.body().reason);
        answer(self.renewals.remove(lease), &Err(failure), out);
    }
}

/// Whether a job's description can be kept with its lease.
pub(in crate::core) fn small_enough(job: &JobSpec) -> Result<(), Failure> {
    match wire::encode::<MAX_JOB>(job) {
        Ok(_) => Ok(()),
        Err(_) => Err(Failure::BadJob(format!("its description takes over {MAX_JOB} bytes"))),
    }
}

/// Replies to every command that waited for an act.
fn answer(acting: Option<Acting>, reply: &Result<Reply, Failure>, out: &mut Vec<Effect>) {
    for command in acting.map(|acting| acting.commands).unwrap_or_default() {
        out.push(Effect::Answer(command, reply.clone()));
    }
}

/// A lease that can still be relied on here.
fn relied_on<'a>(
    holdings: &'a mut Holdings,
    lease: &LeaseId,
    boot: BootId,
    now: Now,
) -> Result<&'a mut Holding, Failure> {
    let holding = holdings.get_mut(lease).ok_or(Failure::UnknownLease)?;
    let relied = holding.relied_until().filter(|_| holding.kept.boot == boot);
    if holding.kept.stage == Stage::Ended || relied.is_none_or(|until| until <= now.boot) {
        return Err(Failure::Over);
    }
    Ok(holding)
}

/// Drafts the claim of a lease for a job: from now on it is this one.
pub(in crate::core) fn draft_claim(
    hand: &Hand,
    holding: &mut Holding,
    now: Now,
    (lease, job): (LeaseId, &JobSpec),
    life: Span,
) -> Result<Draft, EncodeError> {
    let body = Claim { lease, act: holding.act_id(&lease, "claim", now.wall), job: job.clone() };
    let draft = hand.draft(lease.0, holding.acts, now.wall + life, &body)?;
    holding.acts += 1;
    holding.kept.claim = Some(draft.clone());
    holding.kept.claim_refused = false;
    holding.kept.claim_sent = Some((now.boot, now.wall));
    Ok(draft)
}

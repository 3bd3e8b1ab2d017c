//! Gangs: leases on several hosts that exist together or not at all.
//!
//! ```text
//! delegate --orders--> k and a quarter more          members' lessors
//!          <--grants--
//!          --certificate, claims--> k   commit is durable, then told to the others
//!          <--commits--                 <------- commits ------->
//!                                       all k are here: the claim is carried out
//! ```
//!
//! No member starts its job before it holds the words of all. What is not whole by the time to
//! claim lapses, unbilled. Once every member has committed no further word of the delegate is
//! needed, so its death between two of them leaves no half of a gang running.

use super::lessee::draft_claim;
use super::lessor::{misfit, reply};
use super::{CommandId, Core, Effect, Failure, Kept, Leased, Pending, Reply, Ticket};
use crate::base::id::{Hash, KeyId, LeaseId};
use crate::base::time::{Boot, Now, Span};
use crate::minds::admission::exceeded;
use crate::minds::assembly::{Assembly, Granted, Next, Whole};
use crate::minds::book::{Acted, Lease, Stage};
use crate::words::chain::EVIDENCE_LIFE;
use crate::words::contract::{
    Claim, Commit, EndReason, Gang, GangOf, JobSpec, MAX_GANG, Member, Reason, Refusal,
};
use crate::words::message::{Utterance, Word};
use crate::words::object::{body_in, order_subject};
use crate::words::sign::{Draft, Signed, Verified};
use crate::words::want::Want;

/// The most gangs that are brought together here at once.
const MAX_ASSEMBLIES: usize = 256;
/// How long after it has committed a member asks the others for their words again, and its delegate
/// tells it once more if it did not answer, at first.
const GATHER: Span = Span::millis(250);
/// The longest pause between two times.
const MAX_GATHER: Span = Span::secs(2);

/// The words of a gang's members, on their way from the delegate to one of them.
#[derive(Clone, Debug)]
pub(super) struct Passing {
    lessor: KeyId,
    words: Vec<Signed>,
    /// When they are told again; `None` while an answer is waited for.
    at: Option<Boot>,
    pause: Span,
}

/// A member that waits for the words of the others.
#[derive(Clone, Copy, Debug)]
pub(super) struct Gathering {
    pub(super) at: Boot,
    pause: Span,
}

/// The lessor's side.
impl Core {
    pub(super) fn hear_gang(
        &mut self,
        now: Now,
        gang: &Verified<Gang>,
        claim: Option<&Verified<Claim>>,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) {
        match self.join(now, gang, claim) {
            Ok((lease, commit, new)) => {
                if new {
                    if let Some(claim) = claim {
                        out.push(Effect::Keep(Kept::Claimed(lease, claim.signed().clone())));
                    }
                    self.keep_lent(&lease, out);
                }
                reply(Word::Committed, commit, ticket, out);
                if new {
                    self.gathering.insert(lease, Gathering { at: now.boot, pause: GATHER });
                    self.gather(now, lease, out);
                }
            }
            Err(reason) => self.refuse(now, (gang.id(), None), reason, Vec::new(), ticket, out),
        }
    }

    /// Joins the gang, if this node lends one of its members and the claim is one to be carried
    /// out. Gives the lease, the commit, and whether that is new.
    fn join(
        &mut self,
        now: Now,
        gang: &Verified<Gang>,
        claim: Option<&Verified<Claim>>,
    ) -> Result<(LeaseId, Draft, bool), Reason> {
        let me = self.config.me;
        let member = gang.body().members.iter().find(|member| member.lessor == me);
        let lease = member.ok_or(Reason::BadGang)?.lease;
        let known = self.book.get(&lease).ok_or(Reason::UnknownLease)?;
        if known.kept.joined.is_none() {
            if self.halted.is_some() || self.leaving {
                return Err(Reason::NotReady);
            }
            if self.conduct.is_quarantined(&gang.signer()) {
                return Err(Reason::Quarantined);
            }
        }
        if let Some(claim) = claim {
            let (body, terms) = (claim.body(), &known.terms);
            let theirs = claim.signer() == terms.delegate || claim.signer() == terms.lessee;
            if body.lease != lease || !theirs {
                return Err(Reason::BadGang);
            }
            if misfit(&body.job, Some(known)).is_some() {
                return Err(Reason::BadJob);
            }
            if !self.pricing.runs(&body.job.runtime) {
                return Err(Reason::NotOffered);
            }
        }
        match self.book.join(now, &lease, gang) {
            Acted::Repeat(commit) => Ok((lease, commit, false)),
            Acted::Refused(reason, _) => Err(reason),
            Acted::Denied(_) => Err(Reason::Conflict),
            Acted::Accepted(commit) => {
                self.book.set_pending(&lease, claim.cloned());
                Ok((lease, commit, true))
            }
        }
    }

    /// Asks those members for their words that have not given them yet, and gives this one.
    fn gather(&mut self, now: Now, lease: LeaseId, out: &mut Vec<Effect>) {
        let Some(known) = self.book.get(&lease) else {
            self.gathering.remove(&lease);
            return;
        };
        let waits = known.kept.stage == Stage::Granted
            && known.kept.joined.as_ref().is_some_and(|joined| !joined.whole);
        if !waits {
            self.gathering.remove(&lease);
            // A gang of one is whole with its own word.
            if known.kept.stage == Stage::Granted {
                self.carry_out(now, lease, out);
            }
            return;
        }
        let (words, own) = self.words_of(known);
        let missing: Vec<Member> = known
            .gang
            .iter()
            .flat_map(|gang| &gang.members)
            .filter(|m| m.lessor != self.config.me && !known.commits.contains_key(&m.lessor))
            .copied()
            .collect();
        for member in missing {
            let what = Utterance::Commits(member.lease, words.clone(), own.clone());
            self.ask(member.lessor, Pending::Commits(lease), what, out);
        }
        if let Some(gathering) = self.gathering.get_mut(&lease) {
            gathering.at = now.boot + gathering.pause;
            gathering.pause = gathering.pause.scale(2, 1).min(MAX_GATHER);
        }
    }

    /// The words of a gang's members that are known here, this node's own apart.
    fn words_of(&self, known: &Lease) -> (Vec<Signed>, Option<Draft>) {
        let own = known.kept.joined.as_ref().map(|joined| joined.commit.clone());
        (known.commits.values().cloned().collect(), own)
    }

    pub(super) fn hear_commits(
        &mut self,
        now: Now,
        lease: LeaseId,
        commits: &[Verified<Commit>],
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) {
        self.take_commits(now, lease, commits, out);
        let Some(known) = self.book.get(&lease) else {
            self.refuse(now, (lease.0, None), Reason::UnknownLease, Vec::new(), ticket, out);
            return;
        };
        // One that ended before it was used never gave its word, or has taken it back in time.
        if known.kept.stage >= Stage::Draining && known.kept.claimed.is_none() {
            self.refuse(now, (lease.0, None), Reason::Ended, Vec::new(), ticket, out);
            return;
        }
        let (words, own) = self.words_of(known);
        let what = Utterance::Commits(lease, words, own);
        out.push(Effect::Reply { ticket, what });
    }

    /// A member of the gang that `lease` is one of will never give its word: the gang will not be
    /// whole, and nothing is waited for any more.
    pub(super) fn commits_refused(
        &mut self,
        now: Now,
        lease: LeaseId,
        refusal: &Verified<Refusal>,
        out: &mut Vec<Effect>,
    ) {
        let Some(known) = self.book.get(&lease) else { return };
        let over = matches!(refusal.body().reason, Reason::Ended | Reason::UnknownLease);
        let whole = known.kept.joined.as_ref().is_none_or(|joined| joined.whole);
        let (by, of) = (refusal.signer(), refusal.body().of);
        let mut members = known.gang.iter().flat_map(|gang| &gang.members);
        let theirs = members.any(|member| member.lessor == by && member.lease.0 == of);
        if over && theirs && !whole && known.kept.stage == Stage::Granted {
            self.book.drain(now, &lease, EndReason::Lapsed, by);
            self.counters.lapsed += 1;
            self.close(now, &lease, out);
        }
    }

    pub(super) fn take_commits(
        &mut self,
        now: Now,
        lease: LeaseId,
        commits: &[Verified<Commit>],
        out: &mut Vec<Effect>,
    ) {
        for commit in commits {
            if self.book.committed(&lease, commit) {
                self.keep_lent(&lease, out);
                self.gathering.remove(&lease);
                self.carry_out(now, lease, out);
            }
        }
    }

    /// The gang is whole: the claim that came with it is carried out.
    fn carry_out(&mut self, now: Now, lease: LeaseId, out: &mut Vec<Effect>) {
        let pending = self.book.get(&lease).and_then(|known| known.pending.clone());
        let Some(claim) = pending.filter(|_| self.halted.is_none()) else { return };
        let runs = self.pricing.runs(&claim.body().job.runtime);
        if let Acted::Accepted(_) = self.book.claim(now, &claim, runs) {
            // The claim stays kept until its job is begun.
            self.gathering.remove(&lease);
            self.keep_lent(&lease, out);
            self.start_job(lease, &claim, out);
        }
    }

    pub(super) fn drop_pending(&mut self, lease: &LeaseId, out: &mut Vec<Effect>) {
        if self.book.get(lease).is_some_and(|known| known.pending.is_some()) {
            self.book.set_pending(lease, None);
            out.push(Effect::Keep(Kept::DropClaimed(*lease)));
        }
        self.gathering.remove(lease);
    }

    /// Takes up a member after a restart: the words of the others were not kept.
    pub(super) fn resume_gang(&mut self, now: Now, lease: LeaseId) {
        self.gathering.insert(lease, Gathering { at: now.boot, pause: GATHER });
    }

    pub(super) fn wake_gangs(&mut self, now: Now, out: &mut Vec<Effect>) {
        let due = self.gathering.iter().filter(|(_, gathering)| gathering.at <= now.boot);
        for lease in due.map(|(lease, _)| *lease).collect::<Vec<_>>() {
            self.gather(now, lease, out);
        }
        let due = self.passing.iter().filter(|(_, p)| p.at.is_some_and(|at| at <= now.boot));
        for lease in due.map(|(lease, _)| *lease).collect::<Vec<_>>() {
            self.pass_words(lease, out);
        }
        let due = self.assemblies.iter().filter(|(_, a)| a.waits_until() <= now.boot);
        for command in due.map(|(command, _)| *command).collect::<Vec<_>>() {
            let overdue = self.assemblies.get(&command).map(|a| a.overdue(now.boot));
            for order in overdue.unwrap_or_default() {
                self.order_silent(now, &order, "it did not answer in time", out);
            }
            self.assemble(now, command, out);
        }
    }

    pub(super) fn next_gang(&self) -> Option<Boot> {
        let gathering = self.gathering.values().map(|gathering| gathering.at);
        let passing = self.passing.values().filter_map(|passing| passing.at);
        gathering.chain(passing).chain(self.assemblies.values().map(Assembly::waits_until)).min()
    }

    /// Whether it is known where all members of a lease's gang are, if it has one.
    pub(super) fn knows_members(&self, lease: &LeaseId) -> bool {
        let gang = self.book.get(lease).and_then(|known| known.gang.as_ref());
        let mut members = gang.into_iter().flat_map(|gang| &gang.members);
        members.all(|member| {
            member.lessor == self.config.me || !self.data_addresses(&member.lessor).is_empty()
        })
    }

    /// What a member's job learns from its environment.
    pub(super) fn gang_env(&self, known: &Lease) -> Vec<(String, String)> {
        let Some(gang) = &known.gang else { return Vec::new() };
        let rank = gang.members.iter().position(|member| member.lessor == self.config.me);
        let address = |key: &KeyId| {
            let address = self.data_addresses(key).first().map(|address| address.ip().to_string());
            let mine = || self.config.addresses.data.first().map(|a| a.ip().to_string());
            let own = (*key == self.config.me).then(mine).flatten();
            address.or(own).unwrap_or_else(|| "-".into())
        };
        let hosts: Vec<_> = gang.members.iter().map(|member| address(&member.lessor)).collect();
        [
            ("LEASEHOLD_GANG", gang.gang.to_string()),
            ("LEASEHOLD_RANK", rank.unwrap_or_default().to_string()),
            ("LEASEHOLD_SIZE", gang.members.len().to_string()),
            ("LEASEHOLD_HOSTS", hosts.join(",")),
        ]
        .map(|(name, value)| (name.to_string(), value))
        .into()
    }
}

/// The delegate's side.
impl Core {
    pub(super) fn gang(
        &mut self,
        now: Now,
        command: CommandId,
        (want, size): (Want, u16),
        (job, together): (Option<JobSpec>, bool),
        out: &mut Vec<Effect>,
    ) -> Result<(), Failure> {
        if size == 0 || usize::from(size) > MAX_GANG {
            return Err(Failure::BadOrder(format!("a gang has 1 to {MAX_GANG} members")));
        }
        if let Some(job) = &job {
            job.check().map_err(|why| Failure::BadJob(why.into()))?;
            super::lessee::small_enough(job)?;
        }
        let mandate = self.mandate.as_ref().ok_or(Failure::NoMandate)?;
        let allowed = mandate.body();
        if let Some(what) = exceeded(allowed, want.max_hourly, want.budget, want.longest) {
            let text = format!("its {what} exceeds this node's mandate");
            return Err(Failure::BadOrder(text));
        }
        if self.assemblies.len() >= MAX_ASSEMBLIES {
            return Err(Failure::Busy);
        }
        let ranking = self.rank(now, &want);
        let have = ranking.choices.len();
        if have < usize::from(size) {
            return Err(Failure::TooFew { have, need: size.into(), against: ranking.against });
        }
        let gang = self.dice.request();
        let what = (want, gang, size);
        let assembly = Assembly::new(now.boot, what, (job, together), ranking.choices);
        self.assemblies.insert(command, assembly);
        self.assemble(now, command, out);
        Ok(())
    }

    /// Does what bringing a gang together wants next.
    fn assemble(&mut self, now: Now, command: CommandId, out: &mut Vec<Effect>) {
        loop {
            let Some(assembly) = self.assemblies.get_mut(&command) else { return };
            let certificate = assembly.certificate();
            let next = assembly.next(now.boot, &mut self.dice);
            if let Some(given_up) = certificate.filter(|_| assembly.certificate() != certificate) {
                // What it certified is given back: nothing is left that goes together.
                self.certificates.remove(&given_up);
                out.push(Effect::Keep(Kept::DropGang(given_up)));
            }
            match next {
                Next::Wait(_) => return,
                Next::Ask(choices) => {
                    let of = GangOf { gang: assembly.gang, size: assembly.size };
                    let want = assembly.want.clone();
                    for choice in choices {
                        let order = self.send_order(now, (&want, Some(of)), &choice, out);
                        if let (Some(order), Some(assembly)) =
                            (order, self.assemblies.get_mut(&command))
                        {
                            assembly.asked(now.boot, order, choice);
                        }
                    }
                }
                Next::Rank => {
                    let want = assembly.want.clone();
                    let ranking = self.rank(now, &want);
                    if let Some(assembly) = self.assemblies.get_mut(&command) {
                        assembly.rank(ranking.choices);
                    }
                }
                Next::GiveBack(members) => self.give_back(now, &members, out),
                Next::Commit(members, surplus) => {
                    self.give_back(now, &surplus, out);
                    if !self.certify(now, command, &members, out) {
                        self.fail_gang(command, out);
                    }
                }
                Next::Remind(members) => self.send_gang(command, &members, out),
                Next::Whole(members, words) => {
                    self.whole(command, &members, &words, out);
                    return;
                }
                Next::Failed => {
                    self.fail_gang(command, out);
                    return;
                }
            }
        }
    }

    fn fail_gang(&mut self, command: CommandId, out: &mut Vec<Effect>) {
        if let Some(assembly) = self.assemblies.remove(&command) {
            let heard = assembly.heard().to_vec();
            out.push(Effect::Answer(command, Err(Failure::Refused(heard))));
        }
    }

    /// Signs the gang's certificate and the claims under it, and sends each member's lessor its
    /// own.
    fn certify(
        &mut self,
        now: Now,
        command: CommandId,
        granted: &[Granted],
        out: &mut Vec<Effect>,
    ) -> bool {
        let Some(mandate) = &self.mandate else { return false };
        let lessee = mandate.signer();
        let Some(assembly) = self.assemblies.get_mut(&command) else { return false };
        let members: Vec<_> = granted.iter().map(Granted::member).collect();
        let (gang, delegate, job) = (assembly.gang, self.config.me, assembly.job.clone());
        let together = assembly.together;
        let body = Gang { gang, lessee, delegate, members: members.clone() };
        self.tokens += 1;
        let subject = order_subject(&lessee, &gang);
        let not_after = now.wall + EVIDENCE_LIFE;
        let Ok(certificate) = self.hand.draft(subject, self.tokens, not_after, &body) else {
            return false;
        };
        let id = certificate.id();
        assembly.committing(now.boot, id);
        out.push(Effect::Keep(Kept::Gang(id, certificate.clone(), together)));
        self.certificates.insert(id, certificate);
        for member in &members {
            if let Some((job, holding)) = job.as_ref().zip(self.holdings.get_mut(&member.lease)) {
                // One that cannot be drafted is found missing by its lessor.
                let _ = draft_claim(&self.hand, holding, now, (member.lease, job), EVIDENCE_LIFE);
            }
            self.keep_held_lease(&member.lease, out);
        }
        self.send_gang(command, &members, out);
        true
    }

    fn send_gang(&mut self, command: CommandId, members: &[Member], out: &mut Vec<Effect>) {
        let Some(assembly) = self.assemblies.get(&command) else { return };
        let id = assembly.certificate();
        let certificate = id.and_then(|id| self.certificates.get(&id)).cloned();
        let Some(certificate) = certificate else { return };
        for member in members {
            let claim = self.holdings.get(&member.lease).and_then(|held| held.kept.claim.clone());
            let what = Utterance::Gang(certificate.clone(), claim);
            self.ask(member.lessor, Pending::Gang(member.lease), what, out);
        }
    }

    fn assembly_with(&self, lease: &LeaseId) -> Option<CommandId> {
        let mut all = self.assemblies.iter();
        all.find(|(_, assembly)| assembly.has(lease)).map(|(command, _)| *command)
    }

    pub(super) fn assembly_of(&self, order: &Hash) -> Option<CommandId> {
        let mut all = self.assemblies.iter();
        all.find(|(_, assembly)| assembly.awaits(order)).map(|(command, _)| *command)
    }

    /// A host granted what it was asked for a gang.
    pub(super) fn gang_granted(
        &mut self,
        now: Now,
        command: CommandId,
        (order, lease): (Hash, LeaseId),
        grant: &Signed,
        out: &mut Vec<Effect>,
    ) {
        if let Some(assembly) = self.assemblies.get_mut(&command) {
            assembly.granted(order, lease, grant.clone());
        }
        self.assemble(now, command, out);
    }

    /// A host did not grant what it was asked for a gang.
    pub(super) fn gang_refused_order(
        &mut self,
        now: Now,
        command: CommandId,
        order: &Hash,
        (reason, detail): (Option<Reason>, String),
        out: &mut Vec<Effect>,
    ) {
        if let Some(assembly) = self.assemblies.get_mut(&command) {
            assembly.refused(order, reason, detail);
        }
        self.assemble(now, command, out);
    }

    pub(super) fn gang_committed(
        &mut self,
        now: Now,
        lease: &LeaseId,
        commit: &Verified<Commit>,
        out: &mut Vec<Effect>,
    ) {
        let Some(command) = self.assembly_with(lease) else { return };
        let lessor = self.holdings.get(lease).map(|holding| holding.kept.lessor);
        let Some(assembly) = self.assemblies.get_mut(&command) else { return };
        let body = commit.body();
        let about = body.lease == *lease && Some(body.gang) == assembly.certificate();
        if about && lessor == Some(commit.signer()) {
            assembly.committed(*lease, commit.signed().clone());
        }
        self.assemble(now, command, out);
    }

    pub(super) fn gang_refused(
        &mut self,
        now: Now,
        lease: &LeaseId,
        refusal: &Verified<Refusal>,
        out: &mut Vec<Effect>,
    ) {
        let Some(command) = self.assembly_with(lease) else { return };
        let lessor = self.holdings.get(lease).map(|holding| holding.kept.lessor);
        let Some(assembly) = self.assemblies.get_mut(&command) else { return };
        let about = Some(refusal.body().of) == assembly.certificate();
        if about && lessor == Some(refusal.signer()) {
            assembly.declined(lease, refusal.body().reason);
        }
        self.assemble(now, command, out);
    }

    /// A member's lessor did not answer: it is asked again in time.
    pub(super) fn gang_silent(&mut self, now: Now, lease: &LeaseId, out: &mut Vec<Effect>) {
        if let Some(command) = self.assembly_with(lease) {
            self.assemble(now, command, out);
        }
    }

    /// Every member has committed. Their words are passed on, since two members may not be able
    /// to reach each other.
    fn whole(
        &mut self,
        command: CommandId,
        granted: &[Granted],
        words: &[Signed],
        out: &mut Vec<Effect>,
    ) {
        let Some(assembly) = self.assemblies.remove(&command) else { return };
        let members: Vec<_> = granted.iter().map(Granted::member).collect();
        let certificate = assembly.certificate().unwrap_or_default();
        if members.len() > 1 {
            for member in &members {
                let (lessor, words) = (member.lessor, words.to_vec());
                let passing = Passing { lessor, words, at: None, pause: GATHER };
                self.passing.insert(member.lease, passing);
                self.pass_words(member.lease, out);
            }
        }
        self.certificates.remove(&certificate);
        for member in &members {
            self.gang_members.insert(member.lease, certificate);
        }
        let together = assembly.together;
        self.gangs.insert(certificate, Whole { members, together });
        let heard = assembly.heard().to_vec();
        let leases = granted.iter().map(|member| Leased {
            lease: member.lease,
            order: member.order,
            grant: member.grant.clone(),
            choice: member.choice.clone(),
            heard: Vec::new(),
        });
        let leases = leases.collect();
        let reply = Reply::Ganged { gang: certificate, leases, heard };
        out.push(Effect::Answer(command, Ok(reply)));
    }

    /// Tells a member the words of all.
    fn pass_words(&mut self, lease: LeaseId, out: &mut Vec<Effect>) {
        let Some(passing) = self.passing.get_mut(&lease) else { return };
        passing.at = None;
        let (lessor, words) = (passing.lessor, passing.words.clone());
        let what = Utterance::Commits(lease, words, None);
        self.ask(lessor, Pending::Words(lease), what, out);
    }

    /// A member did not answer when it was told the words of all: it may be waiting for them.
    pub(super) fn words_astray(&mut self, now: Now, lease: &LeaseId) {
        let over = self.holdings.get(lease).is_none_or(|holding| {
            holding.ended.is_some() || holding.relied_until().is_none_or(|until| until <= now.boot)
        });
        if over {
            self.passing.remove(lease);
        } else if let Some(passing) = self.passing.get_mut(lease) {
            passing.at = Some(now.boot + passing.pause);
            passing.pause = passing.pause.scale(2, 1).min(MAX_GATHER);
        }
    }

    /// Gives back what came to nothing, at once: others compete for it.
    fn give_back(&mut self, now: Now, members: &[Granted], out: &mut Vec<Effect>) {
        for member in members {
            self.release_quietly(now, &member.lease, out);
        }
    }

    /// A member has ended: the others go with it, if they were to be together and it was not its
    /// lessee who ended it, or its job that was done.
    pub(super) fn member_ended(
        &mut self,
        now: Now,
        lease: &LeaseId,
        reason: EndReason,
        out: &mut Vec<Effect>,
    ) {
        let Some(gang) = self.gang_members.remove(lease) else { return };
        let Some(whole) = self.gangs.get_mut(&gang) else { return };
        whole.members.retain(|member| member.lease != *lease);
        let others = whole.members.clone();
        let lost = whole.together && !matches!(reason, EndReason::Released | EndReason::Term);
        if others.is_empty() || lost {
            self.gangs.remove(&gang);
            out.push(Effect::Keep(Kept::DropGang(gang)));
        }
        if lost {
            for other in others {
                self.gang_members.remove(&other.lease);
                self.release_quietly(now, &other.lease, out);
            }
        }
    }

    /// Takes up a gang after a restart of its delegate.
    pub(super) fn restore_gang(&mut self, certificate: Hash, draft: &Draft, together: bool) {
        let Some(gang) = body_in::<Gang>(&draft.envelope) else { return };
        let open = |member: &Member| {
            self.holdings.get(&member.lease).is_some_and(|held| held.ended.is_none())
        };
        let members: Vec<_> = gang.members.into_iter().filter(open).collect();
        for member in &members {
            self.gang_members.insert(member.lease, certificate);
        }
        if !members.is_empty() {
            self.gangs.insert(certificate, Whole { members, together });
        }
    }
}

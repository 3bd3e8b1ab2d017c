//! What lessees do with their leases: claims, releases, renewals, and membership in a gang. Each is
//! decided once, and a repeat is answered with the same bytes.

use crate::base::id::{ActId, Hash, KeyId, LeaseId};
use crate::base::time::{Now, Wall};
use crate::minds::book::lease::{Act, Joined, Lease, Stage};
use crate::minds::book::{Acted, Book, Denied};
use crate::words::chain::EVIDENCE_LIFE;
use crate::words::contract::{
    Acceptance, Claim, Commit, EndReason, Figure, Gang, Reason, Release, Renew, Renewal,
};
use crate::words::model::MODEL;
use crate::words::object::Kind;
use crate::words::sign::{Draft, Verified};

impl Book {
    /// Whether an act was decided before: then a repeat of it gets the same answer.
    #[must_use]
    pub fn has_act(&self, id: &LeaseId, act: &ActId) -> bool {
        self.get(id).is_some_and(|lease| lease.kept.acts.iter().any(|known| known.id == *act))
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
        // A lease on a model is used by requests to it, any other by a job.
        if lease.terms.model.is_some() != (body.job.runtime == MODEL) {
            return no(Reason::BadJob);
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

    /// Remembers that the act `of` was refused with `answer`, so that it stays refused. That of
    /// somebody else, or about an unknown lease, stays so anyhow.
    pub fn deny(
        &mut self,
        now: Wall,
        (id, act): (&LeaseId, ActId),
        (of, by): (Hash, KeyId),
        answer: &Draft,
    ) -> Denied {
        let Some(lease) = self.leases.get_mut(id) else { return Denied::Needless };
        let theirs = by == lease.terms.delegate || by == lease.terms.lessee;
        if !theirs || lease.kept.acts.iter().any(|known| known.id == act) {
            return Denied::Needless;
        }
        let remembered = lease.deny(now, Act { id: act, of, answer: answer.clone() });
        if remembered { Denied::Remembered } else { Denied::NoRoom }
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
            } else if done.of == of && done.is(Kind::Refusal) {
                Acted::Denied(done.answer.clone())
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
}

const fn no(reason: Reason) -> Acted {
    Acted::Refused(reason, Vec::new())
}

//! The operator's part: what the owner of a host wants back, and when.
//!
//! ```text
//! reclaim: slack leases, cheapest credit first --hold--> notice --> frozen --> ended, withheld
//! drain:   nothing new, slack reclaimed, firm leases run to their term or are revoked
//! resume:  what is not ended yet goes on, and everything is for sale again
//! ```
//!
//! What is withheld or drained is kept, and holds through a restart.

use super::{CommandId, Core, Effect, Failure, Kept, Notified, Reply};
use crate::base::id::LeaseId;
use crate::base::resource::Resources;
use crate::base::time::{Now, Span};
use crate::minds::book::{ReclaimPlan, Stage};
use crate::words::contract::{Class, EndReason, Reason};
use crate::words::equivocation::Reinstatement;
use crate::words::sign::{Signed, Verified};

impl Core {
    /// Takes back one lease that this node granted: after its notice, whatever its class.
    pub(super) fn revoke(
        &mut self,
        now: Now,
        command: CommandId,
        lease: LeaseId,
        out: &mut Vec<Effect>,
    ) -> Result<(), Failure> {
        let known = self.book.get(&lease).ok_or(Failure::UnknownLease)?;
        if known.kept.stage >= Stage::Draining {
            return Err(Failure::Act(Reason::Ended));
        }
        let revoked = known.taken_back(lease, now.boot, Span::ZERO, EndReason::Revoked);
        self.take_back(now, &lease, Span::ZERO, EndReason::Revoked, out);
        let (credit, leases) = (revoked.credit, vec![revoked]);
        let plan = ReclaimPlan { leases, credit, ..ReclaimPlan::default() };
        out.push(Effect::Answer(command, Ok(Reply::Reclaim(plan))));
        Ok(())
    }

    /// Takes back `shape` within `within` beyond what is withheld already, and keeps it out of new
    /// leases. Where that cannot be, nothing is done.
    pub(super) fn reclaim(
        &mut self,
        now: Now,
        command: CommandId,
        shape: &Resources,
        within: Span,
        dry_run: bool,
        out: &mut Vec<Effect>,
    ) {
        let need = self.book.withheld().plus(shape);
        let plan = self.book.reclaim_plan(now.boot, &need, within);
        if !dry_run && plan.short.is_nothing() {
            self.holdback.withheld = need.clone();
            self.book.withhold(need);
            self.keep_holdback(out);
            for lease in plan.leases.iter().filter(|lease| lease.why == EndReason::Reclaimed) {
                self.take_back(now, &lease.lease, within, EndReason::Reclaimed, out);
            }
        }
        out.push(Effect::Answer(command, Ok(Reply::Reclaim(plan))));
    }

    /// Grants and renews nothing any more; slack is reclaimed within `within`, and firm leases
    /// that end later are revoked if the operator wants that.
    pub(super) fn drain(
        &mut self,
        now: Now,
        command: CommandId,
        within: Span,
        (revoke, dry_run): (bool, bool),
        out: &mut Vec<Effect>,
    ) {
        let open = self.book.leases().filter(|(_, lease)| lease.kept.stage != Stage::Ended);
        let leases = open.map(|(id, lease)| {
            let why = lease.ends_by_itself(now.boot, within).unwrap_or(match lease.terms.class {
                Class::Slack => EndReason::Reclaimed,
                Class::Firm if revoke => EndReason::Revoked,
                Class::Firm => EndReason::Term,
            });
            lease.taken_back(*id, now.boot, within, why)
        });
        let leases: Vec<_> = leases.collect();
        if !dry_run {
            self.holdback.drained = true;
            self.keep_holdback(out);
            for lease in &leases {
                if matches!(lease.why, EndReason::Reclaimed | EndReason::Revoked) {
                    self.take_back(now, &lease.lease, within, lease.why, out);
                }
            }
        }
        let credit = leases.iter().map(|lease| lease.credit).sum();
        let free = self.book.capacity().minus(self.book.promised());
        let plan = ReclaimPlan { leases, free, short: Resources::default(), credit };
        out.push(Effect::Answer(command, Ok(Reply::Reclaim(plan))));
    }

    /// Takes what an organisation says about a quarantined key.
    pub(super) fn reinstate(
        &mut self,
        now: Now,
        command: CommandId,
        signed: &Signed,
        out: &mut Vec<Effect>,
    ) -> Result<(), Failure> {
        let bad = |why: String| Failure::BadOrder(why);
        let lifted: Verified<Reinstatement> =
            signed.verify(&self.hand.fabric).map_err(|why| bad(why.to_string()))?;
        if lifted.header().not_after < now.wall {
            return Err(bad("the reinstatement has expired".into()));
        }
        let (key, above) = (lifted.body().key, lifted.body().above);
        if !self.is_admitted(&key) {
            let why = "this node knows no certificate of the key yet: ask one that lists it";
            return Err(bad(why.into()));
        }
        if !self.take_reinstatement(lifted, None, out) {
            let why = "the reinstatement is not signed by the organisation that admits the key";
            return Err(bad(why.into()));
        }
        out.push(Effect::Answer(command, Ok(Reply::Reinstated(key, above))));
        Ok(())
    }

    /// Ends a drain or reclaim.
    pub(super) fn resume(&mut self, now: Now, command: CommandId, out: &mut Vec<Effect>) {
        self.holdback = super::Holdback::default();
        self.book.withhold(Resources::default());
        self.keep_holdback(out);
        let held: Vec<_> = self.book.leases().map(|(id, _)| *id).collect();
        let mut lifted = 0;
        for lease in held {
            let lifts = [EndReason::Reclaimed, EndReason::Revoked]
                .map(|why| self.book.lift(now.boot, &lease, why));
            if lifts.iter().all(Option::is_none) {
                continue;
            }
            lifted += 1;
            self.keep_lent(&lease, out);
            out.push(Effect::NotifyJob(lease, None));
            if lifts.contains(&Some(true)) {
                self.thaw(&lease, out);
            }
        }
        out.push(Effect::Answer(command, Ok(Reply::Resumed { lifted })));
    }

    /// Announces a lease's early end, and tells its job.
    fn take_back(
        &mut self,
        now: Now,
        lease: &LeaseId,
        within: Span,
        why: EndReason,
        out: &mut Vec<Effect>,
    ) {
        let Some(known) = self.book.get(lease) else { return };
        let hold = known.hold_within(now.boot, within, why, self.config.me);
        let running = known.running;
        if self.book.hold(lease, hold) {
            self.keep_lent(lease, out);
            if running {
                let end = hold.freeze;
                out.push(Effect::NotifyJob(*lease, Some(Notified { why, end })));
            }
        }
    }

    fn keep_holdback(&mut self, out: &mut Vec<Effect>) {
        self.pricing.changed();
        out.push(Effect::Keep(Kept::Holdback(self.holdback.clone())));
    }
}

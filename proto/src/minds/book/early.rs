//! Early ends: leases that are announced to end, frozen, let go again, and which of them to take back
//! for capacity that is wanted.

use serde::{Deserialize, Serialize};

use crate::base::id::{KeyId, LeaseId};
use crate::base::money::Amount;
use crate::base::resource::Resources;
use crate::base::time::{Boot, Span};
use crate::minds::book::Book;
use crate::minds::book::lease::{Hold, Lease, Stage};
use crate::words::chain;
use crate::words::contract::{Class, EarlyEnd, EndReason};

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

impl Book {
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
}

impl Lease {
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
            let billed = self.billed(claimed, self.kept.frozen.unwrap_or(stops));
            let charge = self.charge_after(billed);
            chain::credit(&self.terms, charge, self.term_end().since(stops), why)
        });
        let within = ends.since(now) + self.terms.grace;
        let (shape, class) = (self.terms.shape.clone(), self.terms.class);
        Reclaimed { lease: id, shape, class, credit, why, within }
    }

    /// The hold by which its operator takes it back, if that was announced.
    #[must_use]
    pub fn taken_back_by(&self) -> Option<Hold> {
        let holds = self.kept.holds.iter().filter(|hold| hold.why != EndReason::Exposure);
        holds.min_by_key(|hold| hold.freeze).copied()
    }

    /// The hold by which a lease that was never claimed is taken back, once it is time.
    pub(super) fn withdrawn(&self, now: Boot) -> Option<Hold> {
        self.kept.holds.iter().find(|hold| hold.freeze <= now).copied()
    }
}

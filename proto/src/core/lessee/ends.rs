//! What held leases cost and how they end: receipts to countersign, terminations, and inquiries where
//! a lessor is silent.

use crate::base::id::LeaseId;
use crate::base::time::Now;
use crate::core::event::{Ended, Failure, Reply};
use crate::core::{CommandId, Core, Effect, Kept, Notice, Ticket};
use crate::minds::holdings::{Holding, Judged, Over};
use crate::words::contract::{EndReason, Reason, Refusal, Termination};
use crate::words::message::{Message, Utterance, Word};
use crate::words::sign::Verified;
use crate::words::usage::Receipt;

/// How many inquiries in a row may fail before those who wait for the end are told.
const MAX_INQUIRIES: u32 = 5;

impl Core {
    pub(in crate::core) fn hear_receipt(
        &mut self,
        now: Now,
        receipt: &Verified<Receipt>,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) {
        let lease = receipt.body().lease;
        let what = match self.holdings.judge(now, &self.hand, self.config.boot, receipt) {
            Judged::Agreed(answer, new) => {
                if new {
                    let (number, signed) = (receipt.body().number, receipt.signed().clone());
                    let kept = Kept::Countersigned(lease, number, signed, answer.clone());
                    out.push(Effect::Keep(kept));
                    self.keep_held_lease(&lease, out);
                }
                Utterance::Signs(Word::Acknowledged, answer)
            }
            Judged::Objected(answer) => {
                self.keep_held_lease(&lease, out);
                out.push(Effect::Notice(Notice::Objected(lease)));
                Utterance::Signs(Word::Objected, answer)
            }
            Judged::Later | Judged::Foreign => Utterance::Plain(Message::Done),
        };
        out.push(Effect::Reply { ticket, what });
    }

    pub(in crate::core) fn hear_termination(
        &mut self,
        now: Now,
        termination: &Verified<Termination>,
        ticket: Ticket,
        out: &mut Vec<Effect>,
    ) {
        self.take_termination(now, termination, out);
        out.push(Effect::Reply { ticket, what: Utterance::Plain(Message::Done) });
    }

    fn take_termination(
        &mut self,
        now: Now,
        termination: &Verified<Termination>,
        out: &mut Vec<Effect>,
    ) {
        let lease = termination.body().lease;
        if self.holdings.terminated(termination) {
            self.keep_held_lease(&lease, out);
            self.tell_ended(&lease, out);
            self.member_ended(now, &lease, termination.body().reason, out);
        }
    }

    /// A held lease has ended: those who wait for that hear it.
    fn tell_ended(&mut self, lease: &LeaseId, out: &mut Vec<Effect>) {
        self.inquiries.remove(lease);
        let Some(ended) = self.holdings.get(lease).and_then(ended_of) else { return };
        for command in self.awaiting_end.remove(lease).unwrap_or_default() {
            out.push(Effect::Answer(command, Ok(Reply::Ended(ended.clone()))));
        }
    }

    pub(in crate::core) fn await_end(
        &mut self,
        command: CommandId,
        lease: LeaseId,
        out: &mut Vec<Effect>,
    ) -> Result<(), Failure> {
        let holding = self.holdings.get(&lease).ok_or(Failure::UnknownLease)?;
        match ended_of(holding) {
            Some(ended) => out.push(Effect::Answer(command, Ok(Reply::Ended(ended)))),
            None => self.awaiting_end.entry(lease).or_default().push(command),
        }
        Ok(())
    }

    /// The lessor said how an inquired lease ended, or that it runs on.
    pub(in crate::core) fn inquiry_answered(
        &mut self,
        now: Now,
        lease: &LeaseId,
        termination: Option<&Verified<Termination>>,
        out: &mut Vec<Effect>,
    ) {
        if let Some((_, tries)) = self.inquiries.get_mut(lease) {
            *tries = 0;
        }
        if let Some(termination) = termination.filter(|end| end.body().lease == *lease) {
            self.take_termination(now, termination, out);
        }
    }

    /// The lessor does not know the lease: its directory was lost, or the end was long ago.
    pub(in crate::core) fn inquiry_refused(
        &mut self,
        now: Now,
        lease: &LeaseId,
        refusal: &Verified<Refusal>,
        out: &mut Vec<Effect>,
    ) {
        let lessor = self.holdings.get(lease).map(|holding| holding.kept.lessor);
        let about = refusal.body().of == lease.0 && lessor == Some(refusal.signer());
        if about && refusal.body().reason == Reason::UnknownLease && self.holdings.lost(lease) {
            self.keep_held_lease(lease, out);
            self.tell_ended(lease, out);
            self.member_ended(now, lease, EndReason::Lost, out);
        }
    }

    /// The lessor did not answer an inquiry. Those who wait for the end are told after a few.
    pub(in crate::core) fn inquiry_silent(
        &mut self,
        lease: &LeaseId,
        why: &str,
        out: &mut Vec<Effect>,
    ) {
        let Some((_, tries)) = self.inquiries.get_mut(lease) else { return };
        *tries = tries.saturating_add(1);
        if *tries >= MAX_INQUIRIES {
            for command in self.awaiting_end.remove(lease).unwrap_or_default() {
                out.push(Effect::Answer(command, Err(Failure::Unreachable(why.into()))));
            }
        }
    }
}

/// How a held lease ended, by its termination.
pub(in crate::core) fn ended_of(holding: &Holding) -> Option<Ended> {
    let Over { reason, outcome, charge, credit } = holding.ended.clone()?;
    Some(Ended { reason, outcome, charge, credit, receipts: holding.kept.chain.number })
}

//! Which payloads this node has, told to everybody; who else has one; which are not to be removed.
//!
//! A record that changes with every payload would be most of what a busy fabric says. So each node
//! says so many bytes at once, and so many a second beyond: one with few payloads may say every
//! change, one with many the sum of some. Whoever hears of a payload too late has asked others.

use std::collections::BTreeSet;
use std::net::SocketAddr;

use super::{CommandId, Core, Effect, Failure, InUse, Kept, Reply};
use crate::base::id::{Hash, KeyId};
use crate::base::time::{Boot, Now, Span};
use crate::minds::holdings;
use crate::words::contract::Claim;
use crate::words::object::{body_in, key_subject};
use crate::words::record::{MAX_PAYLOADS, Payloads};

/// How many bytes of records a node says at once, and how many a second beyond. Two thousand nodes
/// that all say as much as they may cost each of them 256 KB a second.
const AT_ONCE: u64 = 64 * 1024;
const A_SECOND: u64 = 128;
/// What a record takes beside what it names.
const RECORD: u64 = 256;
/// How long a change waits for others.
const BATCH: Span = Span::millis(100);
/// How often an unchanged record is signed anew, and how long it is valid.
const REFRESH: Span = Span::secs(30 * 60);
const LIFE: Span = Span::secs(90 * 60);
/// The most holders of a payload that are named.
const MAX_HOLDERS: usize = 64;

/// What this node says of its payloads.
#[derive(Debug, Default)]
pub(super) struct Stock {
    said: Payloads,
    has: Payloads,
    /// When that is to be said.
    due: Option<Boot>,
    /// How many bytes were said beyond what has had its time, when that was last reckoned.
    owed: (u64, Boot),
    /// The number and the id of what was said last in this run.
    last: (u64, Hash),
    /// What the operator wants kept.
    pub(super) pinned: BTreeSet<Hash>,
}

impl Stock {
    pub(super) fn next_wake(&self) -> Option<Boot> {
        self.due
    }

    /// Whether a record of this key and epoch is none that was said in this run: not by the map, which
    /// may have forgotten what others still know.
    pub(super) fn is_foreign(&self, seq: u64, id: Hash) -> bool {
        let (last, of) = self.last;
        seq > last || (seq == last && id != of)
    }

    /// What a record of all that is there costs.
    fn cost(&self) -> u64 {
        RECORD + 8 * self.has.roots.len() as u64
    }

    /// What is owed at `at`.
    fn owed(&self, at: Boot) -> u64 {
        let (owed, since) = self.owed;
        owed.saturating_sub(at.since(since).as_millis().saturating_mul(A_SECOND) / 1_000)
    }

    /// When to say something that is wanted at `at`, with what was said before.
    fn after(&self, at: Boot) -> Boot {
        let over = (self.owed(at) + self.cost()).saturating_sub(AT_ONCE);
        at + Span::millis(over.saturating_mul(1_000).div_ceil(A_SECOND))
    }
}

impl Core {
    pub(super) fn has_payloads(&mut self, now: Now, mut roots: Vec<u64>) {
        roots.truncate(MAX_PAYLOADS);
        roots.sort_unstable();
        roots.dedup();
        self.stock.has = Payloads { roots };
        let soon = self.stock.after(now.boot + BATCH);
        if self.stock.has != self.stock.said {
            self.stock.due = Some(self.stock.due.map_or(soon, |due| due.min(soon)));
        }
    }

    pub(super) fn wake_payloads(&mut self, now: Now, out: &mut Vec<Effect>) {
        if self.stock.due.is_none_or(|due| due > now.boot) {
            return;
        }
        let stock = &mut self.stock;
        stock.due = None;
        let nothing = stock.said.roots.is_empty() && stock.has.roots.is_empty();
        if nothing || self.halted.is_some() || self.leaving {
            return;
        }
        stock.said = stock.has.clone();
        stock.owed = (stock.owed(now.boot) + stock.cost(), now.boot);
        stock.due = Some(stock.after(now.boot + REFRESH));
        let (seq, said) = (stock.last.0 + 1, stock.said.clone());
        let subject = key_subject(&self.config.me);
        if let Ok(draft) = self.hand.draft(subject, seq, now.wall + LIFE, &said) {
            self.stock.last = (seq, draft.id());
            out.push(Effect::Record(draft));
        }
    }

    pub(super) fn pin(
        &mut self,
        command: CommandId,
        root: Hash,
        pinned: bool,
        out: &mut Vec<Effect>,
    ) -> Result<(), Failure> {
        if pinned && self.stock.pinned.insert(root) {
            out.push(Effect::Keep(Kept::Pinned(root)));
        } else if !pinned && self.stock.pinned.remove(&root) {
            out.push(Effect::Keep(Kept::Unpinned(root)));
        }
        out.push(Effect::Answer(command, Ok(Reply::Pinned)));
        Ok(())
    }

    /// What a lessor may still come for, and what a job here has not been given yet.
    pub(super) fn payloads_in_use(&self) -> InUse {
        let held = self.holdings.all().filter(|(_, h)| h.kept.stage != holdings::Stage::Ended);
        let claims = held.filter_map(|(_, holding)| {
            let claim = holding.kept.claim.as_ref()?;
            body_in::<Claim>(&claim.envelope)
        });
        let lent = self.book.leases().filter_map(|(_, lease)| lease.pending.as_ref());
        let jobs = claims.map(|claim| claim.job).chain(lent.map(|claim| claim.body().job.clone()));
        let leased = jobs.flat_map(|job| job.payloads().map(|p| p.root).collect::<Vec<_>>());
        InUse { pinned: self.stock.pinned.clone(), leased: leased.collect() }
    }

    /// Says it again, with another date.
    pub(super) fn restate_payloads(&mut self, now: Now) {
        self.stock.due = self.stock.due.map(|_| self.stock.after(now.boot));
    }

    pub(super) fn holders(&mut self, now: Now, root: &Hash) -> Vec<(KeyId, Vec<SocketAddr>)> {
        let mut keys: Vec<_> = self
            .spread
            .holders(root)
            .filter(|key| *key != self.config.me && self.is_up(key, None, now.boot))
            .filter(|key| !self.conduct.is_quarantined(key))
            .collect();
        self.dice.shuffle(&mut keys);
        keys.truncate(MAX_HOLDERS);
        keys.into_iter().map(|key| (key, self.data_addresses(&key))).collect()
    }
}

//! Which payloads this node has, told to everybody, and who else has one.
//!
//! A record that changes with every payload would be most of what a busy fabric says. So a few
//! changes are told at once, those beyond when they have become few again; whoever hears of a
//! payload too late has asked others meanwhile.

use std::collections::VecDeque;

use super::{Core, Effect};
use crate::base::id::{Hash, KeyId};
use crate::base::time::{Boot, Now, Span};
use crate::words::object::key_subject;
use crate::words::record::{MAX_PAYLOADS, Payloads};

/// How many changes are told in [`WITHIN`] at most.
const AT_ONCE: usize = 4;
const WITHIN: Span = Span::secs(40);
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
    /// When something was said last.
    told: VecDeque<Boot>,
    seq: u64,
}

impl Stock {
    pub(super) fn next_wake(&self) -> Option<Boot> {
        self.due
    }

    /// When to say something that is wanted at `at`, with what was said before.
    fn after(&self, at: Boot) -> Boot {
        let full = self.told.len() >= AT_ONCE;
        let free = self.told.front().filter(|_| full).map(|first| *first + WITHIN);
        free.map_or(at, |free| free.max(at))
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
        stock.seq += 1;
        stock.said = stock.has.clone();
        stock.told.push_back(now.boot);
        if stock.told.len() > AT_ONCE {
            stock.told.pop_front();
        }
        stock.due = Some(stock.after(now.boot + REFRESH));
        let (seq, said) = (stock.seq, stock.said.clone());
        let subject = key_subject(&self.config.me);
        if let Ok(draft) = self.hand.draft(subject, seq, now.wall + LIFE, &said) {
            out.push(Effect::Record(draft));
        }
    }

    /// Says it again, with another date.
    pub(super) fn restate_payloads(&mut self, now: Now) {
        self.stock.due = self.stock.due.map(|_| self.stock.after(now.boot));
    }

    pub(super) fn holders(
        &mut self,
        now: Now,
        root: &Hash,
    ) -> Vec<(KeyId, Vec<std::net::SocketAddr>)> {
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

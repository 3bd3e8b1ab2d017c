//! Placing one order: whom to ask next, when to hedge, when to give up.
//!
//! ```text
//!            .--refused or silent--.
//!            v                     |
//! ranked --> asking one --HEDGE--> asking two --first grant--> placed
//!    \--nobody left, nothing out, or too late--> failed(with every reason heard)
//! ```
//!
//! One who refuses may name others that have what is wanted: they come next.
//!
//! The best is asked first; if it has not answered within the hedge delay the next one is asked
//! as well. At most two answers are awaited at once. The first grant wins; a surplus one is
//! given back.

use std::collections::VecDeque;

use crate::base::id::{Hash, KeyId};
use crate::base::time::{Boot, Span};
use crate::words::contract::Reason;
use crate::words::want::{Choice, Heard, Want};

/// How long the best may take before the next is asked too. A grant takes one round trip and a
/// sync; this is many times that.
const HEDGE: Span = Span::millis(150);
/// How long one lessor may take to answer.
pub const PATIENCE: Span = Span::secs(4);
/// How long the whole search may take.
const GIVE_UP: Span = Span::secs(15);
/// The most answers awaited at once.
const AT_ONCE: usize = 2;

/// One search.
#[derive(Clone, Debug)]
pub struct Pursuit {
    /// What is wanted.
    pub want: Want,
    /// How many more times the map may be ranked anew when everybody said no.
    pub rounds: u32,
    ranked: VecDeque<Choice>,
    out: Vec<Asked>,
    heard: Vec<Heard>,
    started: Boot,
    late: bool,
}

#[derive(Clone, Debug)]
struct Asked {
    order: Hash,
    choice: Choice,
    at: Boot,
}

/// What to do next.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Next {
    /// Ask this one.
    Ask(Choice),
    /// Wait until then.
    Wait(Boot),
    /// It came to nothing.
    Failed,
}

impl Pursuit {
    /// Starts a search among `ranked`, best first.
    #[must_use]
    pub fn new(now: Boot, want: Want, ranked: Vec<Choice>) -> Self {
        let ranked = ranked.into();
        let (out, heard) = (Vec::new(), Vec::new());
        Self { want, rounds: 2, ranked, out, heard, started: now, late: false }
    }

    /// What to do now.
    pub fn next(&mut self, now: Boot) -> Next {
        self.late |= self.started + GIVE_UP <= now;
        if self.out.is_empty() && (self.ranked.is_empty() || self.late) {
            return Next::Failed;
        }
        let may_ask = self.newest().is_none_or(|at| at + HEDGE <= now) && self.may_hedge();
        match self.ranked.pop_front_if(|_| may_ask) {
            Some(choice) => Next::Ask(choice),
            None => Next::Wait(self.waits_until().unwrap_or(now)),
        }
    }

    /// Whether another one may be asked beside those that are out.
    fn may_hedge(&self) -> bool {
        self.out.len() < AT_ONCE && !self.ranked.is_empty() && !self.late
    }

    /// `choice` was asked by `order`.
    pub fn asked(&mut self, now: Boot, order: Hash, choice: Choice) {
        self.out.push(Asked { order, choice, at: now });
    }

    /// Whether `order` is one of this search's.
    #[must_use]
    pub fn awaits(&self, order: &Hash) -> bool {
        self.out.iter().any(|asked| asked.order == *order)
    }

    /// The lessor of `order` said no.
    pub fn refused(&mut self, order: &Hash, reason: Reason, detail: String) {
        self.close(order, Some(reason), detail);
    }

    /// One who said no named these: they come next, but for those that were asked already. What it
    /// knows is newer than the ranking.
    pub fn refer(&mut self, named: Vec<Choice>) {
        let asked = |lessor: &KeyId| {
            self.heard.iter().any(|heard| heard.lessor == *lessor)
                || self.out.iter().any(|asked| asked.choice.lessor == *lessor)
        };
        Choice::put_first(&mut self.ranked, named, asked);
    }

    /// The lessor of `order` did not answer.
    pub fn silent(&mut self, order: &Hash, detail: String) {
        self.close(order, None, detail);
    }

    fn close(&mut self, order: &Hash, reason: Option<Reason>, detail: String) {
        if let Some(at) = self.out.iter().position(|asked| asked.order == *order) {
            let Asked { choice, .. } = self.out.remove(at);
            let Choice { lessor, name, .. } = choice;
            self.heard.push(Heard { lessor, name, reason, detail });
        }
    }

    /// Orders that have waited too long for an answer.
    #[must_use]
    pub fn overdue(&self, now: Boot) -> Vec<Hash> {
        let late = self.out.iter().filter(|asked| asked.at + PATIENCE <= now);
        late.map(|asked| asked.order).collect()
    }

    /// The choice behind `order`.
    #[must_use]
    pub fn choice(&self, order: &Hash) -> Option<&Choice> {
        self.out.iter().find(|asked| asked.order == *order).map(|asked| &asked.choice)
    }

    /// Goes on with a fresh ranking, leaving out who already answered.
    pub fn widen(&mut self, ranked: Vec<Choice>) {
        let heard = &self.heard;
        let said_no = |choice: &Choice| heard.iter().any(|h| h.lessor == choice.lessor);
        self.ranked = ranked.into_iter().filter(|choice| !said_no(choice)).collect();
        self.rounds = self.rounds.saturating_sub(1);
    }

    /// Until when it only waits; `None` when there is something to do now.
    #[must_use]
    pub fn waits_until(&self) -> Option<Boot> {
        let hedge = self.newest().filter(|_| self.may_hedge()).map(|at| at + HEDGE);
        let patience = self.out.iter().map(|asked| asked.at + PATIENCE).min();
        hedge.into_iter().chain(patience).min()
    }

    fn newest(&self) -> Option<Boot> {
        self.out.iter().map(|asked| asked.at).max()
    }

    /// What was heard so far.
    #[must_use]
    pub fn heard(&self) -> &[Heard] {
        &self.heard
    }
}

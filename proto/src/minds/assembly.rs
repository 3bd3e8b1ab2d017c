//! Bringing a gang together: whom to ask, when it is complete, when to let go and try again.
//!
//! ```text
//!             .--refused or slow: the next host--.
//!             v                                  |
//! ranked --> asking k and a quarter more at once --k grants--> committing --k commits--> whole
//!    ^           | cannot come to k any more                       | refused or silent
//!    |           v                                                 v
//!    '--rest-- given back  <---------------------------------------'
//! ```
//!
//! Nobody is asked to wait: a host grants or refuses at once, so gangs that compete for the same
//! hosts cannot deadlock; what is granted too few times is given back at once. Against livelock
//! the rests are random and grow, and from the third try on the hosts are asked in the order of
//! their keys, the first of them alone: of several gangs that one who gets it goes on, and the
//! others hold nothing while they rest (ordered acquisition, Havender 1968).

use std::collections::{BTreeMap, VecDeque};

use crate::base::dice::Dice;
use crate::base::id::{Hash, KeyId, LeaseId, RequestId};
use crate::base::time::{Boot, Span};
use crate::words::contract::{JobSpec, Member, Reason};
use crate::words::sign::Signed;
use crate::words::want::{Choice, Heard, Want};

/// How long a host may take before another one is asked beside it.
const HEDGE: Span = Span::millis(150);
/// How long a host may take to grant at all.
const PATIENCE: Span = Span::secs(2);
/// How long a member may take to commit, repeats included.
const COMMIT: Span = Span::secs(3);
/// How often a member is asked again meanwhile.
const AGAIN: Span = Span::millis(400);
/// How long the whole search may take.
const GIVE_UP: Span = Span::secs(20);
/// The first rest; each one is up to twice as long as the one before.
const REST: Span = Span::millis(20);
/// How often it is doubled at most.
const MAX_DOUBLINGS: u32 = 6;
/// From which try on hosts are asked in the order of their keys.
const ORDERED: u32 = 2;

/// One gang that is being brought together.
#[derive(Clone, Debug)]
pub struct Assembly {
    /// What each member is to have.
    pub want: Want,
    /// Its number.
    pub gang: RequestId,
    /// How many members it is to have.
    pub size: u16,
    /// What each of them runs, if that is known already.
    pub job: Option<JobSpec>,
    /// Whether the others are given back when one is lost.
    pub together: bool,
    phase: Phase,
    ranked: VecDeque<Choice>,
    out: Vec<Asked>,
    granted: Vec<Granted>,
    /// Granted when the members were chosen already.
    late: Vec<Granted>,
    heard: Vec<Heard>,
    started: Boot,
    tries: u32,
}

#[derive(Clone, Debug)]
enum Phase {
    Asking,
    Resting(Boot),
    Committing(Committing),
}

#[derive(Clone, Debug)]
struct Committing {
    certificate: Hash,
    since: Boot,
    asked: Boot,
    words: BTreeMap<LeaseId, Signed>,
}

#[derive(Clone, Debug)]
struct Asked {
    order: Hash,
    choice: Choice,
    at: Boot,
    /// Whether it has taken so long that another one is asked in its place.
    slow: bool,
}

/// A lease that one of the hosts granted.
#[derive(Clone, Debug)]
pub struct Granted {
    /// The order.
    pub order: Hash,
    /// The lease.
    pub lease: LeaseId,
    /// The grant.
    pub grant: Signed,
    /// Who granted it, and why that one was asked.
    pub choice: Choice,
}

/// What to do next.
#[derive(Clone, Debug)]
pub enum Next {
    /// Ask these.
    Ask(Vec<Choice>),
    /// Enough have granted: these are the members; the others are given back.
    Commit(Vec<Granted>, Vec<Granted>),
    /// Ask these members once more whether they commit.
    Remind(Vec<Member>),
    /// Every member has committed: these are their words.
    Whole(Vec<Granted>, Vec<Signed>),
    /// Give these back, and go on.
    GiveBack(Vec<Granted>),
    /// Rank the hosts anew.
    Rank,
    /// Wait until then.
    Wait(Boot),
    /// It came to nothing.
    Failed,
}

impl Assembly {
    /// Starts to bring `size` members together out of `ranked`, best first.
    #[must_use]
    pub fn new(
        now: Boot,
        (want, gang, size): (Want, RequestId, u16),
        (job, together): (Option<JobSpec>, bool),
        ranked: Vec<Choice>,
    ) -> Self {
        let mut assembly = Self {
            want,
            gang,
            size,
            job,
            together,
            phase: Phase::Asking,
            ranked: VecDeque::new(),
            out: Vec::new(),
            granted: Vec::new(),
            late: Vec::new(),
            heard: Vec::new(),
            started: now,
            tries: 0,
        };
        assembly.rank(ranked);
        assembly
    }

    /// Takes a new ranking, for a new try.
    pub fn rank(&mut self, mut ranked: Vec<Choice>) {
        if self.tries >= ORDERED {
            ranked.sort_by_key(|choice| choice.lessor);
        }
        self.ranked = ranked.into();
        self.phase = Phase::Asking;
    }

    /// What to do now.
    pub fn next(&mut self, now: Boot, dice: &mut Dice) -> Next {
        match &self.phase {
            Phase::Resting(_) if self.is_late(now) => Next::Failed,
            Phase::Resting(until) if *until <= now => Next::Rank,
            Phase::Resting(until) => Next::Wait(*until),
            Phase::Committing(_) => self.next_of_commit(now, dice),
            Phase::Asking => self.next_of_asking(now, dice),
        }
    }

    fn next_of_asking(&mut self, now: Boot, dice: &mut Dice) -> Next {
        let size = usize::from(self.size);
        if self.granted.len() >= size {
            let surplus = self.granted.split_off(size);
            return Next::Commit(self.granted.clone(), surplus);
        }
        let possible = self.granted.len() + self.out.len() + self.ranked.len();
        if possible < size || self.is_late(now) && self.out.is_empty() {
            return self.rest(now, dice);
        }
        self.out.iter_mut().for_each(|asked| asked.slow |= asked.at + HEDGE <= now);
        let fresh = self.out.iter().filter(|asked| !asked.slow).count();
        // The one with the lowest key is asked alone: it is where competing gangs meet.
        let gate = self.tries >= ORDERED && self.granted.is_empty();
        let target = if gate { 1 } else { size + size.div_ceil(4) };
        let lacking = target.saturating_sub(self.granted.len() + fresh).min(self.ranked.len());
        if lacking > 0 && !self.is_late(now) {
            return Next::Ask(self.ranked.drain(..lacking).collect());
        }
        Next::Wait(self.waits_until())
    }

    fn next_of_commit(&mut self, now: Boot, dice: &mut Dice) -> Next {
        if !self.late.is_empty() {
            return Next::GiveBack(std::mem::take(&mut self.late));
        }
        let Phase::Committing(committing) = &mut self.phase else { return Next::Failed };
        if committing.words.len() >= self.granted.len() {
            let words = committing.words.values().cloned().collect();
            return Next::Whole(std::mem::take(&mut self.granted), words);
        }
        if committing.since + COMMIT <= now {
            return self.rest(now, dice);
        }
        if committing.asked + AGAIN <= now {
            committing.asked = now;
            let words = &committing.words;
            let silent = self.granted.iter().filter(|member| !words.contains_key(&member.lease));
            return Next::Remind(silent.map(Granted::member).collect());
        }
        Next::Wait(committing.asked + AGAIN)
    }

    /// Gives everything back and rests, or ends.
    fn rest(&mut self, now: Boot, dice: &mut Dice) -> Next {
        let longest = REST.scale(1 << self.tries.min(MAX_DOUBLINGS), 1);
        let rest = REST + Span::millis(dice.below(longest.as_millis() + 1));
        self.tries += 1;
        self.phase = Phase::Resting(now + rest);
        self.out.clear();
        Next::GiveBack(std::mem::take(&mut self.granted))
    }

    fn is_late(&self, now: Boot) -> bool {
        self.started + GIVE_UP <= now
    }

    /// These were asked by these orders.
    pub fn asked(&mut self, now: Boot, order: Hash, choice: Choice) {
        self.out.push(Asked { order, choice, at: now, slow: false });
    }

    /// Whether `order` is one of this gang's that waits for its answer.
    #[must_use]
    pub fn awaits(&self, order: &Hash) -> bool {
        self.out.iter().any(|asked| asked.order == *order)
    }

    /// The host said yes.
    pub fn granted(&mut self, order: Hash, lease: LeaseId, grant: Signed) {
        if let Some(Asked { choice, .. }) = self.take(&order) {
            let chosen = matches!(self.phase, Phase::Committing(_));
            let granted = if chosen { &mut self.late } else { &mut self.granted };
            granted.push(Granted { order, lease, grant, choice });
        }
    }

    /// The host said no, or nothing.
    pub fn refused(&mut self, order: &Hash, reason: Option<Reason>, detail: String) {
        if let Some(Asked { choice: Choice { lessor, name, .. }, .. }) = self.take(order) {
            self.heard.retain(|heard| heard.lessor != lessor);
            self.heard.push(Heard { lessor, name, reason, detail });
        }
    }

    /// One who said no named these: they come next, but for those that were asked already. Where
    /// hosts are asked by their keys that order stands.
    pub fn refer(&mut self, named: Vec<Choice>) {
        if self.tries >= ORDERED {
            return;
        }
        let asked = |lessor: &KeyId| {
            self.out.iter().any(|asked| asked.choice.lessor == *lessor)
                || self.granted.iter().any(|granted| granted.choice.lessor == *lessor)
        };
        Choice::put_first(&mut self.ranked, named, asked);
    }

    fn take(&mut self, order: &Hash) -> Option<Asked> {
        let at = self.out.iter().position(|asked| asked.order == *order)?;
        Some(self.out.remove(at))
    }

    /// The members were asked to commit to `certificate`.
    pub fn committing(&mut self, now: Boot, certificate: Hash) {
        let words = BTreeMap::new();
        self.phase = Phase::Committing(Committing { certificate, since: now, asked: now, words });
    }

    /// The certificate that its members are asked to commit to.
    #[must_use]
    pub const fn certificate(&self) -> Option<Hash> {
        match &self.phase {
            Phase::Committing(committing) => Some(committing.certificate),
            _ => None,
        }
    }

    /// A member gave its word.
    pub fn committed(&mut self, lease: LeaseId, word: Signed) {
        let member = self.granted.iter().any(|member| member.lease == lease);
        if let Phase::Committing(committing) = &mut self.phase
            && member
        {
            committing.words.insert(lease, word);
        }
    }

    /// A member will not commit.
    pub fn declined(&mut self, lease: &LeaseId, reason: Reason) {
        let Some(member) = self.granted.iter().find(|member| member.lease == *lease) else {
            return;
        };
        let Choice { lessor, name, .. } = member.choice.clone();
        let detail = reason.meaning().to_string();
        self.heard.push(Heard { lessor, name, reason: Some(reason), detail });
        if let Phase::Committing(committing) = &mut self.phase {
            // Nothing more will come of it.
            committing.since = Boot(0);
        }
    }

    /// Whether the lease is one of its members so far.
    #[must_use]
    pub fn has(&self, lease: &LeaseId) -> bool {
        self.granted.iter().any(|member| member.lease == *lease)
    }

    /// Orders that have waited too long for an answer.
    #[must_use]
    pub fn overdue(&self, now: Boot) -> Vec<Hash> {
        let late = self.out.iter().filter(|asked| asked.at + PATIENCE <= now);
        late.map(|asked| asked.order).collect()
    }

    /// Until when it only waits.
    #[must_use]
    pub fn waits_until(&self) -> Boot {
        match &self.phase {
            Phase::Resting(until) => *until,
            Phase::Committing(committing) => {
                (committing.asked + AGAIN).min(committing.since + COMMIT)
            }
            Phase::Asking => {
                let more = !self.ranked.is_empty();
                let hedged = self.out.iter().filter(|asked| more && !asked.slow);
                let hedge = hedged.map(|asked| asked.at + HEDGE).min();
                let patience = self.out.iter().map(|asked| asked.at + PATIENCE).min();
                hedge.into_iter().chain(patience).min().unwrap_or(Boot(0))
            }
        }
    }

    /// What was heard so far from those who said no.
    #[must_use]
    pub fn heard(&self) -> &[Heard] {
        &self.heard
    }
}

impl Granted {
    /// As a member of a gang.
    #[must_use]
    pub const fn member(&self) -> Member {
        Member { lessor: self.choice.lessor, lease: self.lease }
    }
}

/// A gang that is whole, at its delegate.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Whole {
    /// Its members.
    pub members: Vec<Member>,
    /// Whether the others are given back when one is lost.
    pub together: bool,
}

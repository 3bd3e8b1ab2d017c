//! Fetching one payload from all who hold it: which part from whom next.
//!
//! ```text
//!   group    missing --asked for--> coming --verified--> here
//!               ^---- its ask ended early ----'
//!
//!   holder   idle --ask--> busy --all came--> idle
//!              ^             |--busy, lost, slow--> resting --later--> idle
//!              '             '--wrong bytes--> out, for good
//! ```
//!
//! An *ask* is one request to one holder for one run of groups, which come in order and are each
//! verified on arrival. How long a run is asked for follows how quick the holder is and how much is
//! left; two are out to each at a time, so that none waits for the next request.
//!
//! What few have is asked for first (of several that are as rare, what follows on what its holder was
//! asked for last, or a random one): hosts that want the same payload then soon have different parts
//! to give to each other. A holder that has all of it is spared while those that have some can bring
//! what they have soon enough: so the origin of a payload sends little more than one copy to all who
//! feed each other.
//!
//! When all that is missing is under way, who is idle takes over the second half of what the
//! slowest would take longest for. A group comes from at most two at once; who finds that all it
//! still had to bring is here is cut short.
//!
//! The mind knows no sizes but groups and no addresses: the shell connects, verifies, writes, and
//! tells what came and how asks ended.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::base::dice::Dice;
use crate::base::groups::{GROUP_BYTES, Groups};
use crate::base::id::KeyId;
use crate::base::time::{Boot, Span};

/// The unit in which is chosen, in groups (2 MiB), for all but the largest payloads.
const PIECE: u64 = 8;
/// The most pieces that a payload is seen as; of larger payloads the pieces are larger.
const MAX_PIECES: u64 = 65_536;
/// The most groups in one ask (16 MiB).
const MAX_RUN: u64 = 64;
/// How long an ask should keep its holder busy.
const RUN_TIME: Span = Span::millis(500);
/// How many asks are out to one holder.
const OUT_EACH: usize = 2;
/// How much longer than all holders together those that have only some may take, that those that
/// have all are spared.
const SPARE: (u128, u128) = (3, 2);
/// What is left of an ask is taken over if it would take longer than this; by a holder that is
/// spared, if longer than the second.
const TAKE_OVER: [Span; 2] = [Span::millis(100), Span::secs(1)];
/// Over how long at least a holder's rate is measured.
const MEASURE: Span = Span::millis(200);
/// How long a holder rests that ended an ask early; twice as long each time in a row.
const REST: Span = Span::millis(250);
/// The longest rest.
const MAX_REST: Span = Span::secs(8);
/// How often the whole is looked at while asks are out: one may have become slow.
const LOOK: Span = Span::millis(250);
/// The rate that a holder is thought to have before it is measured, in bytes a second.
const UNKNOWN_RATE: u64 = 16 << 20;

/// Names an ask within its transfer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct AskId(pub u64);

/// What to do.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Do {
    /// Ask this holder for these groups.
    Ask(AskId, KeyId, Range<u64>),
    /// Cut this ask short: what it would still bring is not wanted from there any more.
    Cancel(AskId),
}

/// How an ask ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// All of it came.
    Done,
    /// The holder had too much to do.
    Busy,
    /// It does not have all that was asked for after all.
    NotHeld,
    /// It could not be reached, went away, or sent too little for too long.
    Lost,
    /// It sent what does not belong to this payload: nothing is taken from it any more.
    Wrong,
}

/// One who has the payload, or some of it.
#[derive(Clone, Debug)]
struct Holder {
    has: Groups,
    /// Bytes a second, measured.
    rate: Option<u64>,
    /// Since when bytes are counted for the next measurement, and how many came.
    window: Option<(Boot, u64)>,
    out: Vec<AskId>,
    /// Behind what it was asked for last.
    next: u64,
    /// How many asks in a row ended early.
    failures: u32,
    resting: Boot,
    banned: bool,
    /// Bytes that came from it.
    brought: u64,
}

#[derive(Clone, Debug)]
struct Ask {
    holder: KeyId,
    /// What has not come yet: it comes in order.
    left: Range<u64>,
}

/// One payload on its way.
#[derive(Clone, Debug)]
pub struct Transfer {
    groups: u64,
    piece: u64,
    here: Groups,
    /// What is here or asked for.
    taken: Groups,
    holders: BTreeMap<KeyId, Holder>,
    asks: BTreeMap<AskId, Ask>,
    asked: u64,
    /// For each piece, how many have it of those that do not have all.
    some: Vec<u16>,
    dice: Dice,
}

impl Transfer {
    /// A payload of so many groups, of which `here` are here already.
    #[must_use]
    pub fn new(groups: u64, here: Groups, dice: Dice) -> Self {
        let piece = groups.div_ceil(MAX_PIECES).max(PIECE);
        let pieces = usize::try_from(groups.div_ceil(piece)).unwrap_or(usize::MAX);
        Self {
            groups,
            piece,
            taken: here.clone(),
            here,
            holders: BTreeMap::new(),
            asks: BTreeMap::new(),
            asked: 0,
            some: vec![0; pieces],
            dice,
        }
    }

    /// What is here.
    #[must_use]
    pub const fn here(&self) -> &Groups {
        &self.here
    }

    /// Whether all of it is.
    #[must_use]
    pub const fn is_whole(&self) -> bool {
        self.here.len() >= self.groups
    }

    /// Who is known to hold some of it and is not out, how many bytes came from each, and its rate in
    /// bytes a second if known.
    pub fn holders(&self) -> impl Iterator<Item = (KeyId, u64, Option<u64>)> {
        let good = self.holders.iter().filter(|(_, holder)| !holder.banned);
        good.map(|(key, holder)| (*key, holder.brought, holder.rate))
    }

    /// Whether nothing is taken from this holder any more.
    #[must_use]
    pub fn is_banned(&self, key: &KeyId) -> bool {
        self.holders.get(key).is_some_and(|holder| holder.banned)
    }

    /// Whether nobody is left who could bring what is missing, now or after a rest.
    #[must_use]
    pub fn is_hopeless(&self) -> bool {
        let mut could = Groups::new();
        let good = self.holders.values().filter(|holder| !holder.banned);
        could.extend(good.flat_map(|holder| holder.has.runs()));
        !self.here.gaps(0..self.groups).all(|gap| could.covers(gap))
    }

    /// A holder is found, or has another part than before.
    pub fn holds(&mut self, key: KeyId, mut has: Groups) {
        has.remove(self.groups..u64::MAX);
        let holder = self.holders.entry(key).or_insert_with(|| Holder {
            has: Groups::new(),
            rate: None,
            window: None,
            out: Vec::new(),
            next: u64::MAX,
            failures: 0,
            resting: Boot(0),
            banned: false,
            brought: 0,
        });
        if holder.banned {
            return;
        }
        let before = std::mem::replace(&mut holder.has, has);
        let after = holder.has.clone();
        self.count(&before, false);
        self.count(&after, true);
    }

    /// A holder is gone: its asks are over. That it sent wrong bytes is not forgotten.
    pub fn gone(&mut self, key: &KeyId) {
        let Some(holder) = self.holders.get_mut(key) else { return };
        let (out, has) = (std::mem::take(&mut holder.out), std::mem::take(&mut holder.has));
        let banned = holder.banned;
        self.count(&has, false);
        out.into_iter().for_each(|ask| {
            self.close(ask);
        });
        if !banned {
            self.holders.remove(key);
        }
    }

    /// More came of an ask, verified and written: everything of it before group `next`.
    pub fn came(&mut self, now: Boot, ask: AskId, next: u64) -> Vec<Do> {
        let Some(open) = self.asks.get_mut(&ask) else { return Vec::new() };
        let came = open.left.start..next.min(open.left.end);
        if came.is_empty() {
            return Vec::new();
        }
        open.left.start = came.end;
        let bytes = (came.end - came.start).saturating_mul(GROUP_BYTES);
        if let Some(holder) = self.holders.get_mut(&open.holder) {
            holder.brought = holder.brought.saturating_add(bytes);
            holder.measure(now, bytes);
        }
        self.here.insert(came.clone());
        self.taken.insert(came);
        // Whoever still brings what is all here by now need not.
        let needless = |(id, open): (&AskId, &Ask)| {
            let over = !open.left.is_empty() && self.here.covers(open.left.clone());
            over.then_some(*id)
        };
        let needless: Vec<_> = self.asks.iter().filter_map(needless).collect();
        needless.iter().for_each(|id| {
            self.close(*id);
        });
        needless.into_iter().map(Do::Cancel).collect()
    }

    /// An ask is over. One that was cancelled is over already.
    pub fn ended(&mut self, now: Boot, ask: AskId, end: End) -> Vec<Do> {
        let Some(Ask { holder: key, left }) = self.close(ask) else { return Vec::new() };
        let Some(holder) = self.holders.get_mut(&key) else { return Vec::new() };
        match end {
            End::Done if left.is_empty() => holder.failures = 0,
            End::Wrong => {
                holder.banned = true;
                let (out, has) = (std::mem::take(&mut holder.out), holder.has.clone());
                holder.has = Groups::new();
                self.count(&has, false);
                out.iter().for_each(|ask| {
                    self.close(*ask);
                });
                return out.into_iter().map(Do::Cancel).collect();
            }
            End::NotHeld => {
                // What comes behind the first that it lacks it may have: that is asked for again, as
                // far as it says so.
                let before = holder.has.clone();
                let piece = left.start / self.piece;
                holder.has.remove(left.start..(piece + 1) * self.piece);
                let after = holder.has.clone();
                holder.rest(now);
                self.count(&before, false);
                self.count(&after, true);
            }
            End::Done | End::Busy | End::Lost => holder.rest(now),
        }
        Vec::new()
    }

    /// What to ask for now: when an ask has ended, a holder has come or has more, and when
    /// [`Self::wake`] says so.
    pub fn next(&mut self, now: Boot) -> Vec<Do> {
        let mut done = Vec::new();
        let spares = self.spares(now);
        // In turn, the quickest first, so that one is not given everything.
        for turn in 0..OUT_EACH {
            let mut idle: Vec<KeyId> = self.usable(now).map(|(key, _)| *key).collect();
            idle.sort_by_key(|key| {
                let rate = self.holders.get(key).and_then(|holder| holder.rate);
                (std::cmp::Reverse(rate), *key)
            });
            for key in idle {
                if self.holders.get(&key).is_some_and(|holder| holder.out.len() == turn)
                    && let Some(run) =
                        self.choose(&key, spares).or_else(|| self.take_over(now, &key, spares))
                {
                    done.push(self.ask(now, key, run));
                }
            }
        }
        done
    }

    /// When to ask for more at the latest, if nothing comes before.
    #[must_use]
    pub fn wake(&self, now: Boot) -> Option<Boot> {
        let resting = self.holders.values().filter(|holder| !holder.banned && holder.resting > now);
        let rested = resting.map(|holder| holder.resting).min();
        let look = (!self.asks.is_empty()).then_some(now + LOOK);
        rested.into_iter().chain(look).min()
    }

    fn ask(&mut self, now: Boot, key: KeyId, run: Range<u64>) -> Do {
        self.asked += 1;
        let id = AskId(self.asked);
        if let Some(holder) = self.holders.get_mut(&key) {
            if holder.out.is_empty() {
                holder.window = Some((now, 0));
            }
            holder.out.push(id);
            holder.next = run.end;
        }
        self.taken.insert(run.clone());
        self.asks.insert(id, Ask { holder: key, left: run.clone() });
        Do::Ask(id, key, run)
    }

    /// Takes an ask off the books; what it did not bring is missing again.
    fn close(&mut self, ask: AskId) -> Option<Ask> {
        let closed = self.asks.remove(&ask)?;
        if let Some(holder) = self.holders.get_mut(&closed.holder) {
            holder.out.retain(|out| *out != ask);
            if holder.out.is_empty() {
                holder.window = None;
            }
        }
        self.taken.remove(closed.left.clone());
        let others = self.asks.values().map(|other| other.left.clone());
        let still: Vec<_> = others.chain(self.here.overlaps(closed.left.clone())).collect();
        self.taken.extend(still);
        Some(closed)
    }

    fn usable(&self, now: Boot) -> impl Iterator<Item = (&KeyId, &Holder)> {
        self.holders.iter().filter(move |(_, holder)| {
            !holder.banned && holder.resting <= now && holder.out.len() < OUT_EACH
        })
    }

    fn has_all(&self, holder: &Holder) -> bool {
        holder.has.len() >= self.groups
    }

    /// Counts what one that does not have all has, in or out.
    fn count(&mut self, has: &Groups, more: bool) {
        if has.len() >= self.groups {
            return;
        }
        for run in has.runs() {
            // Pieces that are in it altogether.
            let pieces = run.start.div_ceil(self.piece)..self.piece_behind(run.end);
            let pieces = index(pieces.start)..index(pieces.end);
            for count in self.some.get_mut(pieces).unwrap_or_default() {
                *count = if more { count.saturating_add(1) } else { count.saturating_sub(1) };
            }
        }
    }

    /// The number behind the last piece that ends at group `end` or before.
    fn piece_behind(&self, end: u64) -> u64 {
        if end >= self.groups { self.some.len() as u64 } else { end / self.piece }
    }

    /// How many groups to ask this holder for at once.
    fn run_len(&self, holder: &Holder) -> u64 {
        let rate = holder.rate.unwrap_or(UNKNOWN_RATE / 4);
        let paced = rate.saturating_mul(RUN_TIME.as_millis()) / 1_000 / GROUP_BYTES;
        // Towards the end in ever smaller runs, so that all are done at about the same time.
        let others = self.holders.values().filter(|holder| !holder.banned).count() as u64;
        let share = (self.groups - self.here.len()) / (2 * others).max(1);
        paced.min(share).min(MAX_RUN).max(self.piece)
    }

    /// What this holder is asked for: of what it has and nobody is asked for, the rarest.
    fn choose(&mut self, key: &KeyId, spares: bool) -> Option<Range<u64>> {
        let holder = self.holders.get(key)?;
        let spared = spares && self.has_all(holder);
        // One of the rarest, each as likely as the other; on from where it is, which is easier for
        // its disk and ours, where that is as rare.
        let mut best: Option<(u16, Range<u64>)> = None;
        let mut onward = None;
        let mut alike = 0;
        let mut at = 0;
        while let Some(gap) = self.taken.gap(at..self.groups) {
            // Piece by piece.
            let end = gap.end.min((gap.start / self.piece + 1) * self.piece);
            at = end;
            let Some(run) = holder.has.overlap(gap.start..end) else { continue };
            let rarity = self.rarity(run.start);
            if spared && rarity > 0 {
                continue;
            }
            if run.start == holder.next {
                onward = Some((rarity, run.clone()));
            }
            match &best {
                Some((least, _)) if rarity > *least => continue,
                Some((least, _)) if rarity == *least => alike += 1,
                _ => alike = 1,
            }
            if self.dice.chance(1, alike) {
                best = Some((rarity, run));
            }
        }
        let best = best?;
        let (rarity, mut run) = onward.filter(|(rarity, _)| *rarity == best.0).unwrap_or(best);
        let most = self.run_len(holder);
        // On from there, as long as it is as rare.
        while run.end < self.groups && run.end - run.start < most && self.rarity(run.end) == rarity
        {
            let end = self.groups.min((run.end / self.piece + 1) * self.piece);
            let open = self.taken.gap(run.end..end).filter(|gap| gap.start == run.end);
            match open.and_then(|gap| holder.has.overlap(gap)) {
                Some(more) if more.start == run.end => run.end = more.end,
                _ => break,
            }
        }
        run.end = run.end.min(run.start.saturating_add(most));
        Some(run)
    }

    /// How many of those that have only some have the piece of this group.
    fn rarity(&self, group: u64) -> u16 {
        self.some.get(index(group / self.piece)).copied().unwrap_or(0)
    }

    /// Whether holders that have all are not to be asked for what others have: those alone bring
    /// that hardly later than all together would bring all that is missing. Who rests, or has
    /// nothing of what is missing, brings nothing.
    fn spares(&self, now: Boot) -> bool {
        let awake = |holder: &&Holder| !holder.banned && holder.resting <= now;
        let rate = |holder: &Holder| u128::from(holder.rate_now(now).unwrap_or(UNKNOWN_RATE));
        if self.holders.values().filter(awake).all(|holder| self.has_all(holder)) {
            return false;
        }
        let missing: Groups = self.here.gaps(0..self.groups).collect();
        let (mut some, mut all) = (0, 0);
        let mut bring = Groups::new();
        for holder in self.holders.values().filter(awake) {
            if self.has_all(holder) {
                all += rate(holder);
                continue;
            }
            if holder.has.runs().any(|run| missing.touches(run)) {
                all += rate(holder);
                some += rate(holder);
                bring.extend(holder.has.runs());
            }
        }
        if some == 0 {
            return false;
        }
        let theirs: u64 = self.taken.gaps(0..self.groups).map(|gap| bring.count(gap)).sum();
        let (part, of) = SPARE;
        theirs > 0 && u128::from(theirs) * all * of <= u128::from(missing.len()) * some * part
    }

    /// The second half of what is left of the ask that would take longest, if this holder is
    /// quicker.
    fn take_over(&self, now: Boot, key: &KeyId, spares: bool) -> Option<Range<u64>> {
        let holder = self.holders.get(key)?;
        let mine = holder.rate.unwrap_or(UNKNOWN_RATE).max(1);
        let [bearable, spared] = TAKE_OVER;
        let bearable = if spares && self.has_all(holder) { spared } else { bearable };
        let slow = self.asks.values().filter(|ask| ask.holder != *key).filter_map(|ask| {
            let other = self.holders.get(&ask.holder)?;
            // What it was asked for before comes before.
            let queued: u64 = other
                .out
                .iter()
                .filter_map(|id| self.asks.get(id))
                .map(|ask| ask.left.end - ask.left.start)
                .sum();
            let missing = self.here.gap(ask.left.clone())?;
            let rate = other.rate_now(now).unwrap_or(UNKNOWN_RATE / 4).max(1);
            let takes =
                Span::millis(queued.saturating_mul(GROUP_BYTES).saturating_mul(1_000) / rate);
            let half = missing.start + (missing.end - missing.start) / 2..missing.end;
            let alone = !self.asks.values().any(|twin| {
                !std::ptr::eq(twin, ask) && twin.left.start < half.end && half.start < twin.left.end
            });
            let quicker = Span::millis(
                (half.end - half.start).saturating_mul(GROUP_BYTES).saturating_mul(1_000) / mine,
            );
            let worth = takes > bearable && takes.as_millis() / 2 > quicker.as_millis();
            (alone && worth && holder.has.covers(half.clone())).then_some((takes, half))
        });
        let (_, mut half) = slow.max_by_key(|(takes, _)| *takes)?;
        half.start = half.start.max(half.end.saturating_sub(MAX_RUN));
        Some(half)
    }
}

impl Holder {
    /// Its rate as far as can be said now: of one that has become slow less than was measured.
    fn rate_now(&self, now: Boot) -> Option<u64> {
        let Some((since, so_far)) = self.window else { return self.rate };
        let took = now.since(since).as_millis();
        let most = so_far.saturating_add(GROUP_BYTES).saturating_mul(1_000) / took.max(1);
        if took < 2 * MEASURE.as_millis() {
            self.rate
        } else {
            Some(self.rate.map_or(most, |rate| rate.min(most)))
        }
    }

    fn measure(&mut self, now: Boot, bytes: u64) {
        let Some((since, so_far)) = &mut self.window else { return };
        *so_far = so_far.saturating_add(bytes);
        let took = now.since(*since);
        if took >= MEASURE {
            let rate = so_far.saturating_mul(1_000) / took.as_millis().max(1);
            // The newest counts as much as all before it.
            self.rate = Some(self.rate.map_or(rate, |before| before / 2 + rate / 2));
            self.window = Some((now, 0));
        }
    }

    fn rest(&mut self, now: Boot) {
        let long = REST.as_millis() << self.failures.min(10);
        self.failures = self.failures.saturating_add(1);
        self.resting = now + Span::millis(long).min(MAX_REST);
    }
}

fn index(piece: u64) -> usize {
    usize::try_from(piece).unwrap_or(usize::MAX)
}

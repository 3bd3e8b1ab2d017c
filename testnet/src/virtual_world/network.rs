//! The virtual network: how long what is said travels, and where it does not get through.

use std::collections::BTreeMap;

use leasehold_proto::base::dice::Dice;

use crate::scenario::Network as Terms;

/// A link that hears nothing for this long is dead (QUIC's idle timeout), in microseconds.
pub(super) const IDLE_US: u64 = 3_000_000;

/// Names a link.
pub(super) type LinkId = u64;

/// A link between two processes.
#[derive(Debug)]
pub(super) struct Link<T> {
    /// The hosts at its ends.
    pub(super) ends: [usize; 2],
    /// The lives of the processes at its ends.
    pub(super) lives: [u64; 2],
    /// When the last message each way arrives: what follows does not overtake it.
    last: [u64; 2],
    /// What waits for a cut to heal, in order: to which end, and what.
    stalled: Vec<(usize, T)>,
}

/// A cut between some hosts and the others.
#[derive(Debug)]
struct Cut {
    island: Vec<bool>,
    /// Only what the island says is lost.
    one_way: bool,
}

/// What is wrong with all ways to and from a host.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Rough {
    /// How late something may be, at most, in microseconds.
    pub(super) late_us: u64,
    /// How many packets of a thousand are lost.
    pub(super) lost: u64,
    /// How many of a thousand arrive twice.
    pub(super) doubled: u64,
}

/// All links, with what is wrong between hosts.
#[derive(Debug)]
pub(super) struct Network<T> {
    terms: Terms,
    mix: u64,
    links: BTreeMap<LinkId, Link<T>>,
    of_host: Vec<BTreeMap<LinkId, usize>>,
    made: LinkId,
    cuts: BTreeMap<usize, Cut>,
    slow_us: Vec<u64>,
    /// Rough ways, by the step that made them so.
    rough: BTreeMap<usize, (usize, Rough)>,
}

impl<T> Network<T> {
    pub(super) fn new(terms: Terms, hosts: usize, dice: &mut Dice) -> Self {
        Self {
            terms,
            mix: dice.number(),
            links: BTreeMap::new(),
            of_host: vec![BTreeMap::new(); hosts],
            made: 0,
            cuts: BTreeMap::new(),
            slow_us: vec![0; hosts],
            rough: BTreeMap::new(),
        }
    }

    /// One way from `a` to `b`, in microseconds.
    pub(super) fn delay(&self, a: usize, b: usize, dice: &mut Dice) -> u64 {
        if a == b {
            return 20;
        }
        let (low, high) = self.terms.latency_us;
        let pair = (a.min(b) as u64) << 32 | a.max(b) as u64;
        let fixed = (pair ^ self.mix).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 33;
        let slow =
            self.slow_us.get(a).copied().unwrap_or(0) + self.slow_us.get(b).copied().unwrap_or(0);
        low + fixed % (high - low + 1) + dice.below(self.terms.jitter_us) + slow
    }

    /// When the copies of a packet from `a` to `b` arrive, from now; none if it is lost.
    pub(super) fn packet(&self, a: usize, b: usize, dice: &mut Dice) -> [Option<u64>; 2] {
        let rough = self.rough_between(a, b);
        if dice.chance(self.terms.loss.max(rough.lost), 1000) {
            return [None; 2];
        }
        let doubled = dice.chance(self.terms.doubled.max(rough.doubled), 1000);
        let mut arrives = || {
            let stray = dice.chance(self.terms.strayed, 1000);
            let detour = if stray { dice.below(self.terms.detour_us) } else { 0 };
            self.delay(a, b, dice) + detour + dice.below(rough.late_us)
        };
        [Some(arrives()), doubled.then(arrives)]
    }

    pub(super) fn roughen(&mut self, name: usize, host: usize, how: Rough) {
        self.rough.insert(name, (host, how));
    }

    pub(super) fn smooth(&mut self, name: usize) {
        self.rough.remove(&name);
    }

    /// The worst of what is wrong with the ways of `a` and of `b`.
    fn rough_between(&self, a: usize, b: usize) -> Rough {
        let on_the_way = self.rough.values().filter(|(host, _)| *host == a || *host == b);
        on_the_way.fold(Rough::default(), |worst, (_, rough)| Rough {
            late_us: worst.late_us.max(rough.late_us),
            lost: worst.lost.max(rough.lost),
            doubled: worst.doubled.max(rough.doubled),
        })
    }

    pub(super) fn slow(&mut self, host: usize, by_us: i64) {
        if let Some(slow) = self.slow_us.get_mut(host) {
            *slow = slow.saturating_add_signed(by_us);
        }
    }

    /// Whether a cut keeps what `from` says from `to`.
    pub(super) fn blocked(&self, from: usize, to: usize) -> bool {
        self.cuts.values().any(|cut| {
            let side = |host: usize| cut.island.get(host).copied().unwrap_or(false);
            side(from) != side(to) && (!cut.one_way || side(from))
        })
    }

    /// Whether one of two hosts is not heard by the other: no link lasts or is made then.
    pub(super) fn severed(&self, a: usize, b: usize) -> bool {
        self.blocked(a, b) || self.blocked(b, a)
    }

    /// Cuts between `island` and all others; the links that go across it.
    pub(super) fn cut(&mut self, name: usize, island: &[usize], one_way: bool) -> Vec<LinkId> {
        let island = (0..self.of_host.len()).map(|host| island.contains(&host)).collect();
        self.cuts.insert(name, Cut { island, one_way });
        let across = |link: &&LinkId| self.is_severed(link);
        self.links.keys().filter(across).copied().collect()
    }

    pub(super) fn is_severed(&self, link: &LinkId) -> bool {
        self.links.get(link).is_some_and(|link| self.severed(link.ends[0], link.ends[1]))
    }

    /// Takes a cut away; what waited for that, in order, link by link.
    pub(super) fn heal(&mut self, name: usize) -> Vec<(LinkId, usize, T)> {
        self.cuts.remove(&name);
        let mut freed = Vec::new();
        let waiting = self.links.iter().filter(|(_, link)| !link.stalled.is_empty());
        let waiting: Vec<_> = waiting.map(|(id, link)| (*id, link.ends)).collect();
        for (id, [a, b]) in waiting {
            let still = [self.blocked(b, a), self.blocked(a, b)];
            let Some(link) = self.links.get_mut(&id) else { continue };
            for (to, what) in std::mem::take(&mut link.stalled) {
                if still[usize::from(to == b)] {
                    link.stalled.push((to, what));
                } else {
                    freed.push((id, to, what));
                }
            }
        }
        freed
    }

    /// Makes a link between two processes.
    pub(super) fn connect(&mut self, ends: [usize; 2], lives: [u64; 2]) -> LinkId {
        self.made += 1;
        for (host, other) in [(ends[0], ends[1]), (ends[1], ends[0])] {
            if let Some(links) = self.of_host.get_mut(host) {
                links.insert(self.made, other);
            }
        }
        self.links.insert(self.made, Link { ends, lives, last: [0; 2], stalled: Vec::new() });
        self.made
    }

    pub(super) fn remove(&mut self, id: LinkId) -> Option<Link<T>> {
        let link = self.links.remove(&id)?;
        for host in link.ends {
            if let Some(links) = self.of_host.get_mut(host) {
                links.remove(&id);
            }
        }
        Some(link)
    }

    pub(super) fn get(&self, id: LinkId) -> Option<&Link<T>> {
        self.links.get(&id)
    }

    /// The links of `host`, oldest first, each with the host at its other end.
    pub(super) fn of(&self, host: usize) -> impl Iterator<Item = (LinkId, usize)> + '_ {
        let links = self.of_host.get(host).into_iter().flatten();
        links.map(|(link, other)| (*link, *other))
    }

    /// Sends `what` to the end of `link` at host `to`. Gives it back with its time of arrival,
    /// or keeps it while a cut lies between.
    pub(super) fn send(
        &mut self,
        now: u64,
        link: LinkId,
        to: usize,
        what: T,
        dice: &mut Dice,
    ) -> Option<(u64, T)> {
        let ends = self.links.get(&link)?.ends;
        let from = if ends[1] == to { ends[0] } else { ends[1] };
        let delay = self.delay(from, to, dice);
        let late = dice.below(self.rough_between(from, to).late_us);
        let blocked = self.blocked(from, to);
        let link = self.links.get_mut(&link)?;
        if blocked || link.stalled.iter().any(|(end, _)| *end == to) {
            link.stalled.push((to, what));
            return None;
        }
        let way = usize::from(ends[1] == to);
        let last = link.last.get_mut(way)?;
        if late > 0 {
            // Each message has a stream of its own: one whose packets are lost holds up no other.
            return Some((now + delay + late, what));
        }
        *last = (now + delay).max(*last + 1);
        Some((*last, what))
    }
}

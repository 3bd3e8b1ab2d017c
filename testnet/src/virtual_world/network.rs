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

/// All links, with what is wrong between hosts.
#[derive(Debug)]
pub(super) struct Network<T> {
    terms: Terms,
    mix: u64,
    links: BTreeMap<LinkId, Link<T>>,
    of_host: Vec<BTreeMap<LinkId, usize>>,
    made: LinkId,
    cuts: BTreeMap<usize, Vec<bool>>,
    slow_us: Vec<u64>,
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

    pub(super) fn lost(&self, dice: &mut Dice) -> bool {
        dice.chance(self.terms.loss, 1000)
    }

    pub(super) fn slow(&mut self, host: usize, by_us: i64) {
        if let Some(slow) = self.slow_us.get_mut(host) {
            *slow = slow.saturating_add_signed(by_us);
        }
    }

    /// Whether a cut lies between `a` and `b`.
    pub(super) fn blocked(&self, a: usize, b: usize) -> bool {
        let side = |cut: &Vec<bool>, host: usize| cut.get(host).copied().unwrap_or(false);
        self.cuts.values().any(|cut| side(cut, a) != side(cut, b))
    }

    /// Cuts between `island` and all others; the links that go across it.
    pub(super) fn cut(&mut self, name: usize, island: &[usize]) -> Vec<LinkId> {
        let side = (0..self.of_host.len()).map(|host| island.contains(&host)).collect();
        self.cuts.insert(name, side);
        let across = |link: &&LinkId| self.is_blocked(link);
        self.links.keys().filter(across).copied().collect()
    }

    pub(super) fn is_blocked(&self, link: &LinkId) -> bool {
        self.links.get(link).is_some_and(|link| self.blocked(link.ends[0], link.ends[1]))
    }

    /// Takes a cut away; what waited for that, in order, link by link.
    pub(super) fn heal(&mut self, name: usize) -> Vec<(LinkId, usize, T)> {
        self.cuts.remove(&name);
        let free: Vec<_> = self
            .links
            .iter()
            .filter(|(_, link)| {
                !link.stalled.is_empty() && !self.blocked(link.ends[0], link.ends[1])
            })
            .map(|(id, _)| *id)
            .collect();
        let mut freed = Vec::new();
        for id in free {
            let Some(link) = self.links.get_mut(&id) else { continue };
            let stalled = std::mem::take(&mut link.stalled);
            freed.extend(stalled.into_iter().map(|(to, what)| (id, to, what)));
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
        let delay = self.delay(ends[0], ends[1], dice);
        let blocked = self.blocked(ends[0], ends[1]);
        let link = self.links.get_mut(&link)?;
        if blocked || !link.stalled.is_empty() {
            link.stalled.push((to, what));
            return None;
        }
        let way = usize::from(ends[1] == to);
        let last = link.last.get_mut(way)?;
        *last = (now + delay).max(*last + 1);
        Some((*last, what))
    }
}

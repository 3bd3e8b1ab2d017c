//! At most so many bytes a second for all that is sent of payloads, and whose turn it is.
//!
//! What is sent goes in slices, one after the other. Each time the peers that wait take turns, however
//! many streams one of them has; what one waits for longest goes first. What the node itself wants
//! delivered has every other turn, whoever waits.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Bound;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::sync::oneshot;
use tokio::time::{Instant, sleep_until};

use super::lock;

/// At most so many bytes a second.
#[derive(Debug)]
pub(super) struct Throttle {
    /// None for as much as there is.
    rate: Option<u64>,
    turns: Arc<Mutex<Turns>>,
}

/// Who waits, and when what was sent so far has had its time.
#[derive(Debug)]
struct Turns {
    /// Whether somebody has the turn.
    taken: bool,
    free_at: Instant,
    own: Waiting,
    others: Waiting,
    /// Whether the last turn was the node's own, while others waited.
    own_last: bool,
}

/// Those who wait, by peer.
#[derive(Debug, Default)]
struct Waiting {
    of: BTreeMap<[u8; 32], VecDeque<oneshot::Sender<Turn>>>,
    /// Who had the last turn.
    last: [u8; 32],
}

/// The right to send the next slice: passed on when dropped, by whatever end.
#[derive(Debug)]
struct Turn {
    turns: Option<Arc<Mutex<Turns>>>,
}

impl Throttle {
    /// What may be sent at once after a rest.
    const BURST: Duration = Duration::from_millis(20);
    /// The bytes of a slice.
    pub(super) const SLICE: usize = 32 << 10;

    pub(super) fn new(rate: Option<u64>) -> Self {
        let turns = Turns {
            taken: false,
            free_at: Instant::now(),
            own: Waiting::default(),
            others: Waiting::default(),
            own_last: false,
        };
        Self { rate, turns: Arc::new(Mutex::new(turns)) }
    }

    /// Whether there is a limit at all.
    pub(super) fn is_on(&self) -> bool {
        self.rate.is_some()
    }

    /// Waits until so many bytes more may go to `peer`. One who gives up meanwhile has cost nobody
    /// anything.
    pub(super) async fn take(&self, peer: [u8; 32], own: bool, bytes: usize) {
        let Some(rate) = self.rate else { return };
        let _turn = self.turn(peer, own).await;
        let now = Instant::now();
        let free_at = lock(&self.turns).free_at;
        let begins = free_at.max(now.checked_sub(Self::BURST).unwrap_or(now));
        let until = begins + Duration::from_secs_f64(bytes as f64 / rate.max(1) as f64);
        sleep_until(until).await;
        lock(&self.turns).free_at = until;
    }

    async fn turn(&self, peer: [u8; 32], own: bool) -> Turn {
        let mine = Turn { turns: Some(self.turns.clone()) };
        let waiting = {
            let mut turns = lock(&self.turns);
            let taken = std::mem::replace(&mut turns.taken, true);
            let queue = if own { &mut turns.own } else { &mut turns.others };
            if !taken {
                queue.last = peer;
                return mine;
            }
            let (turn, waiting) = oneshot::channel();
            queue.of.entry(peer).or_default().push_back(turn);
            waiting
        };
        mine.forgo();
        // Whoever has the turn passes it on.
        waiting.await.unwrap_or(Turn { turns: None })
    }
}

impl Turns {
    /// Whose turn is next; nobody's when nobody waits.
    fn next(&mut self) -> Option<oneshot::Sender<Turn>> {
        let others_wait = !self.others.of.is_empty();
        let own = !(self.own.of.is_empty() || others_wait && self.own_last);
        self.own_last = own && others_wait;
        let next = if own { self.own.next() } else { self.others.next() };
        self.taken = next.is_some();
        next
    }
}

impl Waiting {
    fn next(&mut self) -> Option<oneshot::Sender<Turn>> {
        let after = (Bound::Excluded(self.last), Bound::Unbounded);
        let next = self.of.range(after).next().or_else(|| self.of.iter().next());
        let peer = *next?.0;
        self.last = peer;
        let queue = self.of.get_mut(&peer)?;
        let turn = queue.pop_front();
        if queue.is_empty() {
            self.of.remove(&peer);
        }
        turn
    }
}

impl Turn {
    /// It was not had after all.
    fn forgo(mut self) {
        self.turns = None;
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let Some(turns) = self.turns.take() else { return };
        loop {
            let Some(next) = lock(&turns).next() else { return };
            match next.send(Self { turns: Some(turns.clone()) }) {
                Ok(()) => return,
                // It does not wait any more.
                Err(unwanted) => unwanted.forgo(),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use futures::future::join_all;

    use super::*;

    /// The order in which slices go that wait at the same time, by the first byte of their peer.
    async fn order(waiting: &[(u8, bool)]) -> Vec<u8> {
        let throttle = Throttle::new(Some(1_000_000));
        let order = RefCell::new(Vec::new());
        let takes = waiting.iter().map(|(peer, own)| {
            let (throttle, order) = (&throttle, &order);
            async move {
                throttle.take([*peer; 32], *own, 100).await;
                order.borrow_mut().push(*peer);
            }
        });
        join_all(takes).await;
        order.into_inner()
    }

    #[tokio::test]
    async fn no_more_goes_than_the_rate_whoever_takes_it() {
        let throttle = Throttle::new(Some(10_000));
        let start = Instant::now();
        let take = |peer, bytes| throttle.take([peer; 32], peer == 1, bytes);
        tokio::join!(take(1, 1_000), take(2, 500), take(2, 500));
        // Less what may go at once.
        assert!(start.elapsed() >= Duration::from_millis(180), "{:?}", start.elapsed());
        Throttle::new(None).take([1; 32], false, usize::MAX).await;
    }

    #[tokio::test]
    async fn peers_take_turns_however_many_streams_they_have() {
        let mut waiting = vec![(1, false); 6];
        waiting.extend([(2, false), (3, false), (2, false)]);
        // The first had it before others waited.
        assert_eq!(order(&waiting).await, [1, 2, 3, 1, 2, 1, 1, 1, 1]);
    }

    #[tokio::test]
    async fn what_is_the_nodes_own_has_every_other_turn() {
        let mut waiting = vec![(1, false), (2, false), (1, false), (2, false)];
        waiting.extend(vec![(9, true); 5]);
        assert_eq!(order(&waiting).await, [1, 9, 2, 9, 1, 9, 2, 9, 9]);
    }

    #[tokio::test]
    async fn who_gives_up_holds_up_nobody() {
        let throttle = Throttle::new(Some(10));
        let hour = Box::pin(throttle.take([1; 32], false, 36_000));
        let behind = Box::pin(throttle.take([2; 32], false, 36_000));
        let both = async { tokio::join!(hour, behind) };
        let tried = tokio::time::timeout(Duration::from_millis(20), both).await;
        assert!(tried.is_err(), "they would have waited for an hour");
        throttle.take([3; 32], false, 0).await;
        assert!(!lock(&throttle.turns).taken && lock(&throttle.turns).others.of.is_empty());
    }
}

//! The terms on which one linked peer is heard: what the codec asks before it reads.
//!
//! ```text
//!   unadmitted --admit--> admitted          (for as long as the peer stays linked)
//!        \                   \
//!         `-- a broken rule --`--> broken: reported once, the link is closed
//! ```
//! An unadmitted peer that asks for more than it may is not punished but left unread: it may
//! have been admitted on its own side a moment before it is here. What ends a stranger's link is
//! `Limits::unadmitted_time`.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed},
};

use libp2p::PeerId;
use tokio::sync::{mpsc, watch};

use super::{
    Violation,
    limits::Limits,
    stats::{NetStats, count},
};

/// What all links share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) limits: Limits,
    pub(super) stats: Arc<NetStats>,
    /// Bytes of frames read and not yet handed over, of all peers.
    held: AtomicUsize,
    /// Where broken rules are told. One place for each possible connection, and each peer tells
    /// once, so there is always room.
    broken: mpsc::Sender<(PeerId, Violation)>,
}

impl Shared {
    pub(super) fn new(
        limits: Limits,
        stats: Arc<NetStats>,
    ) -> (Arc<Self>, mpsc::Receiver<(PeerId, Violation)>) {
        let (broken, told) = mpsc::channel(limits.connections.max(1) as usize);
        (Arc::new(Self { limits, stats, held: AtomicUsize::new(0), broken }), told)
    }
}

/// The terms of one peer, shared by its connections and their streams.
#[derive(Debug)]
pub(super) struct Terms {
    peer: PeerId,
    admitted: watch::Sender<bool>,
    asked: AtomicUsize,
    held: AtomicUsize,
    broken: AtomicBool,
    shared: Arc<Shared>,
}

impl Terms {
    pub(super) fn new(peer: PeerId, shared: Arc<Shared>) -> Arc<Self> {
        Arc::new(Self {
            peer,
            admitted: watch::Sender::new(false),
            asked: AtomicUsize::new(0),
            held: AtomicUsize::new(0),
            broken: AtomicBool::new(false),
            shared,
        })
    }

    pub(super) fn admit(&self) {
        self.admitted.send_replace(true);
    }

    fn is_admitted(&self) -> bool {
        *self.admitted.borrow()
    }

    /// Waits until the peer is admitted. The link's end drops the waiting stream.
    async fn admission(&self) {
        count(&self.shared.stats.held_back);
        // The sender lives in `self`, so the wait cannot fail.
        let _ = self.admitted.subscribe().wait_for(|admitted| *admitted).await;
    }

    /// Passes when one more request may be read.
    pub(super) async fn request(&self) {
        if !self.is_admitted()
            && self.asked.fetch_add(1, Relaxed) >= self.shared.limits.unadmitted_requests
        {
            self.admission().await;
        }
    }

    /// Passes when a frame of `length` bytes may be read.
    pub(super) async fn frame(&self, length: usize) -> Result<(), Violation> {
        let bound = self.shared.limits.frame_admitted;
        if length > bound {
            return Err(self.violation(Violation::Oversize { length, bound }));
        }
        if length > self.shared.limits.frame_unadmitted && !self.is_admitted() {
            self.admission().await;
        }
        Ok(())
    }

    /// Counts a broken rule and tells it, the first time.
    pub(super) fn violation(&self, violation: Violation) -> Violation {
        match violation {
            Violation::Oversize { .. } => count(&self.shared.stats.oversize),
            Violation::Trailing => count(&self.shared.stats.trailing),
        }
        if !self.broken.swap(true, Relaxed) {
            // Full is impossible (see `Shared::broken`), closed means the net is closing.
            let _ = self.shared.broken.try_send((self.peer, violation));
        }
        violation
    }

    /// Takes `bytes` out of the two budgets, or `None` when one of them is spent.
    pub(super) fn hold(self: &Arc<Self>, bytes: usize) -> Option<Hold> {
        let hold = Hold { terms: Arc::clone(self), bytes };
        let mine = self.held.fetch_add(bytes, Relaxed).saturating_add(bytes);
        let all = self.shared.held.fetch_add(bytes, Relaxed).saturating_add(bytes);
        if mine > self.shared.limits.held_per_peer || all > self.shared.limits.held {
            count(&self.shared.stats.over_budget);
            return None; // dropping `hold` gives back what it took
        }
        Some(hold)
    }

    pub(super) fn stats(&self) -> &NetStats {
        &self.shared.stats
    }
}

/// Bytes taken out of the budgets; dropping it gives them back.
#[derive(Debug)]
pub(super) struct Hold {
    terms: Arc<Terms>,
    bytes: usize,
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.terms.held.fetch_sub(self.bytes, Relaxed);
        self.terms.shared.held.fetch_sub(self.bytes, Relaxed);
    }
}

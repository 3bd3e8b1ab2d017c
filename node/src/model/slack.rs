//! When requests that can wait are begun: those under slack leases, and this node's own of that class.
//!
//! ```text
//! request --firm-----------------------------------------------> engine
//!         --slack--> line --first in it, and little under way--> engine
//!                      \--the line is full, or half a minute is over: refused, and nothing is charged
//! ```
//!
//! What is begun goes on to its end: a slack request takes a place only where enough of them stay free
//! for firm ones that may come.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use tokio::sync::{Mutex, Notify, Semaphore};
use tokio::time::{sleep, timeout};

use super::engine::{Engine, Pieces};
use crate::openai::Fault;

/// How many requests wait for a model.
const WAITING: usize = 64;
/// Of them, those under one lease.
pub(super) const WAITING_PER_LEASE: usize = WAITING / 2;
/// How long one of them waits before it is refused. Whoever asked may go elsewhere, or come again.
const PATIENCE: Duration = Duration::from_secs(30);
/// How often it is looked whether an engine that others ask as well has less to do.
const LOOK: Duration = Duration::from_millis(100);

/// The answers that one engine works on, and the line of those that wait.
#[derive(Debug)]
pub(super) struct Line {
    under_way: AtomicU32,
    waiting: Semaphore,
    /// Whoever has it is the first in the line. It is given in the order in which it was asked for.
    first: Mutex<()>,
    freed: Notify,
    patience: Duration,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            under_way: AtomicU32::new(0),
            waiting: Semaphore::new(WAITING),
            first: Mutex::default(),
            freed: Notify::new(),
            patience: PATIENCE,
        }
    }
}

/// A request that an engine works on, for as long as this is held.
#[derive(Debug)]
pub(crate) struct Place(Arc<Line>, u32);

impl Drop for Place {
    fn drop(&mut self) {
        self.0.under_way.fetch_sub(self.1, Ordering::AcqRel);
        self.0.freed.notify_one();
    }
}

/// An answer that has begun.
#[derive(Debug)]
pub(crate) struct Answering {
    /// Its pieces.
    pub(crate) pieces: Pieces,
    /// To be held until the last of them.
    pub(crate) place: Place,
}

impl Line {
    /// A request for so many answers that cannot wait.
    pub(super) fn firm(self: &Arc<Self>, answers: u32) -> Place {
        self.under_way.fetch_add(answers, Ordering::AcqRel);
        Place(Arc::clone(self), answers)
    }

    /// A request that can: returns once no more than `most` answers are under way with its own, with those
    /// that others ask of the engine, or none is. `waiting` bounds those that wait for whoever asks.
    ///
    /// # Errors
    /// 429 when too many wait, or it has waited too long.
    pub(super) async fn slack(
        self: &Arc<Self>,
        (answers, most): (u32, u32),
        waiting: Option<&Semaphore>,
        engine: &dyn Engine,
    ) -> Result<Place, Fault> {
        let full = |_| Fault::no_slack(PATIENCE);
        let _waits = self.waiting.try_acquire().map_err(full)?;
        let _theirs = waiting.map(Semaphore::try_acquire).transpose().map_err(full)?;
        let turn = async {
            // One that wants more than there ever is waits for a calm moment, beside the line.
            let _first = match answers <= most {
                true => Some(self.first.lock().await),
                false => None,
            };
            loop {
                let load = engine.load();
                let known = self.under_way.load(Ordering::Acquire);
                let busy = known.max(load.active.saturating_add(load.queued));
                if busy == 0 || busy.saturating_add(answers) <= most {
                    return self.firm(answers);
                }
                tokio::select! {
                    () = self.freed.notified() => {}
                    () = sleep(LOOK) => {}
                }
            }
        };
        timeout(self.patience, turn).await.map_err(|_| Fault::no_slack(PATIENCE))
    }
}

#[cfg(test)]
mod tests {
    use futures::future::BoxFuture;
    use futures::{FutureExt as _, poll};

    use super::*;
    use crate::model::engine::{Ask, Load};

    /// An engine that others give so much to do.
    #[derive(Debug, Default)]
    struct Busy(AtomicU32);

    impl Engine for Busy {
        fn ask(&self, _: Ask) -> BoxFuture<'_, Result<Pieces, Fault>> {
            futures::future::ready(Err(Fault::internal())).boxed()
        }

        fn load(&self) -> Load {
            Load { active: self.0.load(Ordering::Relaxed), ..Load::default() }
        }
    }

    #[tokio::test]
    async fn what_can_wait_is_begun_when_there_is_little_else_and_in_its_order() {
        let (line, engine) = (Arc::<Line>::default(), Busy::default());
        // There is room for one beside a firm one, and firm ones never wait.
        let firm = line.firm(1);
        let one = line.slack((1, 2), None, &engine).await.expect("there is room");
        let (mut two, mut three) = (
            Box::pin(line.slack((1, 2), None, &engine)),
            Box::pin(line.slack((1, 2), None, &engine)),
        );
        assert!(poll!(&mut two).is_pending() && poll!(&mut three).is_pending());
        let more = line.firm(1);
        drop((firm, one));
        let two = two.await.expect("there is room");
        assert!(poll!(&mut three).is_pending());
        drop(more);
        let three = three.await.expect("there is room");
        drop((two, three));
        // What others ask of the engine counts as well.
        engine.0.store(2, Ordering::Relaxed);
        let mut four = Box::pin(line.slack((1, 2), None, &engine));
        assert!(poll!(&mut four).is_pending());
        engine.0.store(1, Ordering::Relaxed);
        assert!(four.await.is_ok());
        // One that wants several answers counts as so many, and is begun at the latest when all is calm.
        let mut many = Box::pin(line.slack((3, 2), None, &engine));
        assert!(poll!(&mut many).is_pending());
        engine.0.store(0, Ordering::Relaxed);
        let many = many.await.expect("it is calm");
        let mut five = Box::pin(line.slack((1, 4), None, &engine));
        assert!(poll!(&mut five).is_ready());
        drop(many);
    }

    #[tokio::test]
    async fn nobody_takes_the_whole_line() {
        let (line, engine, theirs) = (Arc::<Line>::default(), Busy::default(), Semaphore::new(1));
        let all = line.firm(2);
        let mut one = Box::pin(line.slack((1, 2), Some(&theirs), &engine));
        assert!(poll!(&mut one).is_pending());
        let more = line.slack((1, 2), Some(&theirs), &engine).now_or_never().expect("at once");
        assert!(more.is_err_and(|fault| fault.is_no_slack()));
        let others = Semaphore::new(1);
        let mut another = Box::pin(line.slack((1, 2), Some(&others), &engine));
        assert!(poll!(&mut another).is_pending(), "who has places of its own waits");
        drop(all);
        assert!(one.await.is_ok());
    }

    #[tokio::test]
    async fn who_waits_too_long_or_comes_too_late_is_refused() {
        let patience = Duration::from_millis(100);
        let (line, engine) = (Arc::new(Line { patience, ..Line::default() }), Busy::default());
        let all = [line.firm(1), line.firm(1)];
        let mut waiting: Vec<_> =
            (0..WAITING).map(|_| Box::pin(line.slack((1, 2), None, &engine))).collect();
        for one in &mut waiting {
            assert!(poll!(one).is_pending());
        }
        let late = line.slack((1, 2), None, &engine).now_or_never().expect("at once");
        assert!(late.is_err_and(|fault| fault.is_no_slack()));
        // One that gives up makes room for another.
        drop(waiting.pop());
        waiting.push(Box::pin(line.slack((1, 2), None, &engine)));
        for refused in futures::future::join_all(waiting).await {
            assert!(refused.is_err_and(|fault| fault.is_no_slack()));
        }
        drop(all);
        assert!(line.slack((1, 2), None, &engine).await.is_ok());
    }
}

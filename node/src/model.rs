//! The models that this node serves, and the requests that leases admit to them.
//!
//! ```text
//! catalog (a file) --> engines: embedded, or an upstream server      cold -> loading -> warm
//!                         ^
//! StartJob(lease on a model) --> admitted --request over the data plane--> pieces, counted, recorded
//!                                    \--StopJob--> generation stops, JobEnded
//! ```
//!
//! | file | what it is about |
//! |---|---|
//! | [`catalog`] | which models there are here, and whether and at what price they are sold |
//! | [`engine`] | the one interface of whatever answers |
//! | [`embedded`] | the engine that every node has |
//! | `local` | it behind that interface |
//! | [`upstream`] | an adapter for any OpenAI-compatible server |
//! | `slack` | when requests that can wait are begun |
//! | `serving` | one request of another node, from its first byte to its signed record |
//!
//! An engine belongs to the node and serves all leases at once. A lease on a model is no process: the
//! core's word about it (start, freeze, stop) only says who may ask.

pub mod catalog;
pub mod embedded;
pub mod engine;
mod local;
pub(crate) mod serving;
pub(crate) mod slack;
pub mod upstream;

use std::collections::{BTreeMap, HashSet};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use leasehold_proto::core::{Event, StartJob};
use leasehold_proto::words::contract::Class;
use leasehold_proto::words::model::{
    Endpoint, ModelOffer, ModelState, ModelTerms, Tally, TokenRates,
};
use leasehold_proto::words::sign::Signer;
use leasehold_proto::words::usage::{Outcome, Usage};
use leasehold_proto::{Amount, Boot, LeaseId, Span};
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use self::catalog::{Catalog, CatalogError, Entry, Spec};
use self::engine::{Ask, Engine, Load, State};
use self::slack::{Answering, Line};
use crate::handle::Asked;
use crate::infer::Head;
use crate::openai::tally::{Bounds, Density};
use crate::openai::{Fault, Needs};
use crate::payload::{PayloadError, PayloadStore, Root};
use crate::store::Store;

/// Requests of other nodes that are worked on at once; more are refused as busy.
const MAX_REQUESTS: usize = 1_024;
/// Of them, those under one lease.
const MAX_PER_LEASE: usize = 512;
/// Of them, those that are large at once.
const MAX_LARGE: usize = 32;
/// What a request may have without counting as large, in bytes.
const LARGE: usize = 1 << 20;
/// How long requests get to end when their lease does.
const FAREWELL: Duration = Duration::from_secs(2);
/// How often engines are looked at for what is offered.
const LOOK: Duration = Duration::from_millis(500);
/// How often engines are got ready, and upstreams looked after.
const TEND: Duration = Duration::from_secs(5);
/// How long what only changed in its figures is not offered anew.
const CALM: Duration = Duration::from_secs(3);

/// What was counted since the start, for metrics.
#[derive(Debug, Default)]
pub struct Counts {
    /// Requests of other nodes that were taken.
    pub requests: AtomicU64,
    /// Of them, those that can wait.
    pub slack: AtomicU64,
    /// Of those, the ones that were refused because there was no time for them.
    pub slack_refused: AtomicU64,
    /// Requests that came to nothing otherwise.
    pub faults: AtomicU64,
    /// Of them, those whose asker hung up.
    pub hung_up: AtomicU64,
    /// Tokens that were asked.
    pub prompt_tokens: AtomicU64,
    /// Tokens that were answered.
    pub completion_tokens: AtomicU64,
}

/// The models of this node. Clones share them.
#[derive(Clone, Debug)]
pub(crate) struct Models {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    catalog: Catalog,
    payloads: PayloadStore,
    signer: Arc<Signer>,
    events: mpsc::Sender<Event>,
    commands: mpsc::Sender<Asked>,
    store: Store,
    engines: Mutex<BTreeMap<String, Arc<Loaded>>>,
    leases: Mutex<BTreeMap<LeaseId, Arc<Lease>>>,
    places: Arc<Semaphore>,
    large: Arc<Semaphore>,
    /// Of both what those may take that can wait: they hold them while they do.
    slack_places: Arc<Semaphore>,
    slack_large: Arc<Semaphore>,
    counts: Arc<Counts>,
    /// How many threads an embedded engine may use.
    threads: usize,
    /// A model was added or changed.
    added: Notify,
    /// Held while one is.
    putting: tokio::sync::Mutex<()>,
}

/// A model with what answers for it.
#[derive(Clone, Debug)]
struct Loaded {
    entry: Entry,
    engine: Arc<dyn Engine>,
    line: Arc<Line>,
    density: Arc<Density>,
}

/// A lease under which others may ask.
#[derive(Debug)]
struct Lease {
    delegate: [u8; 32],
    terms: ModelTerms,
    class: Class,
    cap: Amount,
    state: Mutex<LeaseState>,
    stop: CancellationToken,
    requests: TaskTracker,
    /// Of its requests, those that may wait at once.
    waiting: Semaphore,
}

#[derive(Debug)]
struct LeaseState {
    deadline: Boot,
    frozen: bool,
    tally: Tally,
    /// What requests under way may cost at most.
    aside: u64,
}

/// Part of a lease's budget, for a request that is under way.
#[derive(Debug)]
struct Aside<'a> {
    lease: &'a Lease,
    amount: u64,
}

impl Drop for Aside<'_> {
    fn drop(&mut self) {
        let mut state = hold(&self.lease.state);
        state.aside = state.aside.saturating_sub(self.amount);
    }
}

impl Lease {
    /// What was spent.
    fn spent(&self, state: &LeaseState) -> Amount {
        self.terms.rates.charge(state.tally.prompt_tokens, state.tally.completion_tokens)
    }

    /// Sets aside what a request may cost at most; none where the budget has no room for it.
    fn set_aside(&self, worst: Amount) -> Option<Aside<'_>> {
        let mut state = hold(&self.state);
        let wanted = self.spent(&state).0.saturating_add(state.aside).saturating_add(worst.0);
        if wanted > self.cap.0 {
            return None;
        }
        state.aside += worst.0;
        Some(Aside { lease: self, amount: worst.0 })
    }
}

/// Keeps what private models are made of from peers, but for what a model that is not has as well: that
/// is no secret. What no model names stays as it is.
fn settle_privacy(catalog: &Catalog, payloads: &PayloadStore) -> Result<(), PayloadError> {
    let of = |private: bool| -> HashSet<Root> {
        let entries = catalog.list().into_iter().filter(|entry| entry.private == private);
        entries.flat_map(|entry| entry.payloads(payloads)).collect()
    };
    let open = of(false);
    open.iter()
        .filter(|root| payloads.is_private(**root))
        .try_for_each(|root| payloads.publish(*root))?;
    of(true).difference(&open).try_for_each(|root| payloads.keep_private(*root))
}

/// What a request may cost at most: every byte of it a token, and as many tokens of answer as it may
/// have. Each of its answers, or of the texts that it has embedded, is within the model's context.
pub(crate) fn worst_case(bounds: &Bounds, context: u32, rates: &TokenRates) -> Amount {
    let context = u64::from(context).max(1);
    let all = context.saturating_mul(bounds.answers.max(bounds.texts));
    let answer = bounds.completion.unwrap_or(all).min(all);
    rates.charge(bounds.prompt.min(all), answer)
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Models {
    pub(crate) fn new(
        catalog: Catalog,
        (payloads, store): (PayloadStore, Store),
        signer: Arc<Signer>,
        (events, commands): (mpsc::Sender<Event>, mpsc::Sender<Asked>),
        threads: usize,
    ) -> Self {
        let inner = Inner {
            catalog,
            payloads,
            signer,
            events,
            commands,
            store,
            engines: Mutex::default(),
            leases: Mutex::default(),
            places: Arc::new(Semaphore::new(MAX_REQUESTS)),
            large: Arc::new(Semaphore::new(MAX_LARGE)),
            slack_places: Arc::new(Semaphore::new(MAX_REQUESTS / 2)),
            slack_large: Arc::new(Semaphore::new(MAX_LARGE / 2)),
            counts: Arc::default(),
            threads,
            added: Notify::new(),
            putting: tokio::sync::Mutex::default(),
        };
        let models = Self { inner: Arc::new(inner) };
        // It is so already, unless the store was put together anew.
        if let Err(error) = settle_privacy(&models.inner.catalog, &models.inner.payloads) {
            tracing::error!(%error, "which weights peers do not get is not on disk");
        }
        for entry in models.inner.catalog.list() {
            models.take_up(entry);
        }
        models
    }

    /// What was counted.
    pub(crate) fn counts(&self) -> Arc<Counts> {
        Arc::clone(&self.inner.counts)
    }

    /// Every model here, with how its engine fares.
    pub(crate) fn list(&self) -> Vec<Listed> {
        let engines = hold(&self.inner.engines);
        engines.values().map(|loaded| loaded.listed()).collect()
    }

    /// One model here.
    pub(crate) fn listed(&self, name: &str) -> Option<Listed> {
        hold(&self.inner.engines).get(name).map(|loaded| loaded.listed())
    }

    /// Adds a model, or changes the one of that name.
    ///
    /// # Errors
    /// When what it names is not here or not a model, or the catalog cannot be written.
    pub(crate) async fn put(&self, name: String, spec: Spec) -> Result<Entry, CatalogError> {
        // One after another: what one keeps from peers another might let them have.
        let _turn = self.inner.putting.lock().await;
        let (catalog, payloads) = (self.inner.catalog.clone(), self.inner.payloads.clone());
        let put = move || {
            let entry = catalog.put(&name, &spec, &payloads)?;
            settle_privacy(&catalog, &payloads)?;
            Ok::<_, CatalogError>(entry)
        };
        let entry = tokio::task::spawn_blocking(put).await.map_err(CatalogError::panicked)??;
        self.take_up(entry.clone());
        Ok(entry)
    }

    /// Removes a model. False when there is none of that name.
    ///
    /// # Errors
    /// When the catalog cannot be written.
    pub(crate) fn remove(&self, name: &str) -> Result<bool, CatalogError> {
        let known = self.inner.catalog.remove(name)?;
        hold(&self.inner.engines).remove(name);
        Ok(known)
    }

    fn take_up(&self, entry: Entry) {
        let name = entry.name.clone();
        let mut engines = hold(&self.inner.engines);
        // What only costs another price stays in memory.
        let known = engines.get(&name).filter(|known| known.entry.source == entry.source);
        let loaded = match known {
            Some(known) => Loaded { entry, ..Loaded::clone(known) },
            None => Loaded {
                engine: entry.engine(&self.inner.payloads, self.inner.threads),
                entry,
                line: Arc::default(),
                density: Arc::default(),
            },
        };
        engines.insert(name, Arc::new(loaded));
        drop(engines);
        self.inner.added.notify_one();
    }

    /// Asks a model of this node's own, in this class and for so many answers.
    ///
    /// # Errors
    /// When it is not here, or says no.
    pub(crate) async fn ask(
        &self,
        name: &str,
        ask: Ask,
        class: (Class, u64),
    ) -> Result<Answering, Fault> {
        let loaded = hold(&self.inner.engines).get(name).cloned();
        let loaded = loaded.ok_or_else(|| Fault::model_not_found(name))?;
        loaded.ask(ask, class, None).await
    }

    /// What this node's own clients can be answered, sold to others or not.
    pub(crate) fn own(&self) -> Vec<ModelOffer> {
        hold(&self.inner.engines).values().filter_map(|loaded| loaded.offer()).collect()
    }

    /// What is offered of them now, sorted by name.
    pub(crate) fn offers(&self) -> Vec<ModelOffer> {
        let engines = hold(&self.inner.engines);
        let served = engines.values().filter(|loaded| loaded.entry.serve);
        served.filter_map(|loaded| loaded.offer()).collect()
    }

    /// Gets engines ready that are to serve, and looks after upstreams, until `shutdown`.
    pub(crate) async fn tend(self, shutdown: CancellationToken) {
        let mut look = tokio::time::interval(TEND);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = look.tick() => {}
                () = self.inner.added.notified() => {}
            }
            let engines: Vec<_> = hold(&self.inner.engines).values().cloned().collect();
            let tended = engines.iter().filter(|loaded| loaded.entry.is_tended());
            let tending = futures::future::join_all(tended.map(|loaded| loaded.engine.warm()));
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = tending => {}
            }
        }
    }

    /// Tells the core what is offered, as it changes, until `shutdown`.
    pub(crate) async fn tell(self, shutdown: CancellationToken) {
        let mut look = tokio::time::interval(LOOK);
        look.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut said: Vec<ModelOffer> = Vec::new();
        let mut calm = tokio::time::Instant::now();
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = look.tick() => {}
            }
            let offers = self.offers();
            let fixed = |offers: &[ModelOffer]| -> Vec<(ModelTerms, ModelState)> {
                offers.iter().map(|offer| (offer.terms.clone(), offer.state)).collect()
            };
            let now = tokio::time::Instant::now();
            let due = fixed(&offers) != fixed(&said) || now >= calm;
            if offers == said || !due {
                continue;
            }
            calm = now + CALM;
            said.clone_from(&offers);
            if self.inner.events.send(Event::Models(offers)).await.is_err() {
                return;
            }
        }
    }

    /// A lease admits its delegate's requests from now on.
    pub(crate) fn start(&self, start: StartJob) {
        let Some(model) = start.model else { return };
        let lease = Lease {
            delegate: start.delegate.0,
            terms: model.terms,
            class: model.class,
            cap: model.cap,
            state: Mutex::new(LeaseState {
                deadline: start.deadline,
                frozen: false,
                tally: model.tally,
                aside: 0,
            }),
            stop: CancellationToken::new(),
            requests: TaskTracker::new(),
            waiting: Semaphore::new(slack::WAITING_PER_LEASE),
        };
        hold(&self.inner.leases).insert(start.lease, Arc::new(lease));
    }

    fn lease(&self, id: &LeaseId) -> Option<Arc<Lease>> {
        hold(&self.inner.leases).get(id).cloned()
    }

    /// A lease lasts longer. False when it is not on a model.
    pub(crate) fn extend(&self, id: LeaseId, deadline: Boot) -> bool {
        let Some(lease) = self.lease(&id) else { return false };
        let mut state = hold(&lease.state);
        state.deadline = state.deadline.max(deadline);
        drop(state);
        self.tell_core(Event::Extended(id, deadline, true));
        true
    }

    /// A lease stands still, or goes on: what is being answered goes on, nothing new is. False when it
    /// is not on a model.
    pub(crate) fn freeze(&self, id: &LeaseId, frozen: bool) -> bool {
        let Some(lease) = self.lease(id) else { return false };
        hold(&lease.state).frozen = frozen;
        true
    }

    /// A lease has ended: so do its requests. False when it is not on a model.
    pub(crate) fn stop(&self, id: LeaseId) -> bool {
        let Some(lease) = hold(&self.inner.leases).remove(&id) else { return false };
        lease.stop.cancel();
        lease.requests.close();
        let events = self.inner.events.clone();
        tokio::spawn(async move {
            // What they produced is counted before the last receipt is written.
            let _ = tokio::time::timeout(FAREWELL, lease.requests.wait()).await;
            let ended = Event::JobEnded(id, Outcome::Stopped, Usage::default());
            let _ = events.send(ended).await;
        });
        true
    }

    fn tell_core(&self, event: Event) {
        let events = self.inner.events.clone();
        tokio::spawn(async move {
            let _ = events.send(event).await;
        });
    }

    /// Who serves a lease's model, and what it may still cost; by what it is refused, if it is.
    fn admit(&self, head: &Head, peer: [u8; 32]) -> Result<Admitted, serving::No> {
        let lease = self.lease(&head.lease).filter(|lease| lease.delegate == peer);
        // The same answer for what does not exist and for what is not theirs.
        let lease = lease.ok_or(serving::No::Stranger)?;
        let state = hold(&lease.state);
        if state.frozen {
            return Err(serving::No::Frozen);
        }
        if state.deadline <= crate::clock::boot() {
            return Err(serving::No::Stranger);
        }
        if lease.spent(&state) >= lease.cap {
            return Err(serving::No::Spent);
        }
        drop(state);
        if lease.requests.len() >= MAX_PER_LEASE {
            return Err(serving::No::Busy);
        }
        let loaded = hold(&self.inner.engines).get(&lease.terms.name).cloned();
        let same = |loaded: &Arc<Loaded>| loaded.entry.digest == lease.terms.digest;
        let loaded = loaded.filter(same).ok_or(serving::No::Gone)?;
        let (slack, large) = (lease.class == Class::Slack, head.length > LARGE);
        let inner = &self.inner;
        let taken = [
            (true, &inner.places),
            (large, &inner.large),
            (slack, &inner.slack_places),
            (slack && large, &inner.slack_large),
        ];
        let taken = taken.into_iter().filter(|(takes, _)| *takes);
        let taken = taken.map(|(_, of)| Arc::clone(of).try_acquire_owned());
        let permits = taken.collect::<Result<_, _>>().map_err(|_| serving::No::Busy)?;
        inner.counts.requests.fetch_add(1, Ordering::Relaxed);
        self.inner.counts.slack.fetch_add(slack.into(), Ordering::Relaxed);
        Ok(Admitted { lease, loaded, _permits: permits })
    }
}

/// A request that may be answered.
struct Admitted {
    lease: Arc<Lease>,
    loaded: Arc<Loaded>,
    _permits: Vec<OwnedSemaphorePermit>,
}

/// A model here, as its operator is told of it.
#[derive(Clone, Debug)]
pub(crate) struct Listed {
    /// What was said of it; its context and endpoints are what they are found to be.
    pub(crate) entry: Entry,
    /// How its engine fares.
    pub(crate) load: Load,
    /// What is wrong with it.
    pub(crate) trouble: Option<String>,
}

impl Loaded {
    fn listed(&self) -> Listed {
        let (context, endpoints) = (self.context(), self.endpoints());
        let entry = Entry { context, endpoints, ..self.entry.clone() };
        Listed { entry, load: self.engine.load(), trouble: self.engine.nature().trouble }
    }

    /// What is offered of it; nothing while it cannot answer.
    fn offer(&self) -> Option<ModelOffer> {
        let load = self.engine.load();
        let state = match load.state {
            State::Warm => ModelState::Warm,
            State::Loading => ModelState::Loading,
            State::Cold => ModelState::Cold,
            State::Down => return None,
        };
        let (context, endpoints) = (self.context(), self.endpoints());
        // How much it takes it has not said yet.
        let unknown = self.entry.context == 0 && self.engine.nature().context.is_none();
        if state == ModelState::Loading && unknown {
            return None;
        }
        (!endpoints.is_empty()).then(|| ModelOffer {
            context,
            endpoints,
            ..self.entry.offer(state, &load)
        })
    }

    /// The most tokens of prompt and answer together: no more than the engine has, whatever is said.
    fn context(&self) -> u32 {
        let found = self.engine.nature().context;
        match self.entry.context {
            0 => found.unwrap_or(catalog::CONTEXT),
            said => found.map_or(said, |found| found.min(said)),
        }
    }

    /// What can be asked of it: what was said, but for `/v1/responses` of what is known not to have it;
    /// where nothing was said, that as well of what has it.
    fn endpoints(&self) -> Vec<Endpoint> {
        let (entry, has) = (&self.entry, self.engine.nature().responses);
        let mut endpoints = entry.endpoints.clone();
        match has {
            Some(true) if !entry.endpoints_said && !endpoints.contains(&Endpoint::Responses) => {
                endpoints.push(Endpoint::Responses);
            }
            Some(false) => endpoints.retain(|endpoint| *endpoint != Endpoint::Responses),
            _ => {}
        }
        endpoints
    }

    /// Begins to answer, in slack once there is time.
    async fn ask(
        &self,
        ask: Ask,
        (class, answers): (Class, u64),
        waiting: Option<&Semaphore>,
    ) -> Result<Answering, Fault> {
        let answers = u32::try_from(answers).unwrap_or(u32::MAX);
        let place = match class {
            Class::Firm => self.line.firm(answers),
            Class::Slack => {
                let room = (answers, self.entry.slack_requests);
                self.line.slack(room, waiting, &*self.engine).await?
            }
        };
        let pieces = self.engine.ask(ask).await?;
        Ok(Answering { pieces, place })
    }
}

/// Rounded to so many steps between a number and its double, so that what is said does not change
/// with every request.
fn rounded(number: u64, steps: u64) -> u32 {
    let step = (number.checked_ilog2().map_or(1, |log| 1_u64 << log) / steps).max(1);
    u32::try_from(number / step * step).unwrap_or(u32::MAX)
}

impl Entry {
    /// What is offered of it while its engine fares like this.
    fn offer(&self, state: ModelState, load: &Load) -> ModelOffer {
        let first = u64::try_from(load.first_token.as_millis()).unwrap_or(u64::MAX);
        let (name, digest, rates) = (self.name.clone(), self.digest, self.rates);
        ModelOffer {
            terms: ModelTerms { name, digest, rates },
            slack: self.slack(),
            quantisation: self.quantisation.clone(),
            context: self.context,
            endpoints: self.endpoints.clone(),
            abilities: self.abilities,
            demo: self.demo,
            state,
            load: rounded(load.active.saturating_add(load.queued).into(), 1),
            tokens_per_second: rounded(load.tokens_per_second.into(), 4),
            first_token: Span::millis(rounded(first, 4).into()),
        }
    }

    /// What its tokens cost in slack; none where it is not sold so.
    #[must_use]
    pub fn slack(&self) -> Option<TokenRates> {
        self.slack_permille.map(|permille| self.rates.permille(permille))
    }

    /// What it can do beyond plain text.
    #[must_use]
    pub const fn needs(&self) -> Needs {
        Needs::of_bits(self.abilities)
    }
}

#[cfg(test)]
mod tests {
    use super::rounded;

    #[test]
    fn figures_are_rounded_by_steps() {
        for (steps, number, expected) in
            [(1, 0, 0), (1, 1, 1), (1, 3, 2), (1, 7, 4), (4, 57, 56), (4, 63, 56), (4, 130, 128)]
        {
            assert_eq!(rounded(number, steps), expected, "{number} by {steps}");
        }
    }
}

//! The entry side of hosted models: from a client's request to an answer of whichever node serves the
//! model best, under a lease that this node holds there.
//!
//! ```text
//! request --route--> node 1 --lease, stream--> first piece --> the rest, to the client
//!                      \--fails before that--> node 2 ...        \--counted, compared, agreed on
//! ```
//!
//! Until the first piece has come a request may go to another node; after that it may not, since the
//! client has some of it. What a serving node says of a request is compared with what went there and
//! what came back, before this node agrees to pay for it: the hashes must be those of the very bytes,
//! and the tokens no more than these bytes can be ([`crate::openai::tally`]).
//!
//! A lease is held for each serving node, model and class that is used, as a purse: taken when the first
//! request wants it, anew when its budget or term runs out, and given back when nobody has asked for a
//! while. A model that this node serves itself needs none.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::net::SocketAddr;
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use leasehold_proto::base::dice::Dice;
use leasehold_proto::core::{Command, Failure, Reply, Seller};
use leasehold_proto::minds::route::{
    Choice, Host, Lack, Nobody, Question, Router, Sort, Wanted as WantedClass, Went,
};
use leasehold_proto::words::contract::{Class, JobSpec, Mandate};
use leasehold_proto::words::model::{
    Finish, MODEL, ModelOffer, ModelTerms, Served, Service, TokenRates,
};
use leasehold_proto::words::object::body_in;
use leasehold_proto::words::sign::Signed;
use leasehold_proto::words::want::Want;
use leasehold_proto::{Amount, FabricId, Hash, KeyId, LeaseId, Payload, Resources, Span};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::{timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use crate::clock;
use crate::data::frame::{Code, Refusal};
use crate::data::{LinkError, RecvHalf, SendHalf};
use crate::handle::{AskError, Handle};
use crate::infer::{self, AnswerHash, Frame, Head, INFER, RECORDS};
use crate::model::engine::{Ask, Piece, Pieces, WAITING};
use crate::model::serving::sampling_of;
use crate::model::slack::Answering;
use crate::model::{Models, worst_case};
use crate::openai::provider::{Provider, Sort as Wanted};
use crate::openai::rewrite::CHUNK;
use crate::openai::tally::{Bounds, Density, Tally};
use crate::openai::{Counted, Endpoint, Fault, Need, Request};
use crate::transcript::{Keeping, Transcript};

/// How long what the map says of sellers is used before it is read again.
const FRESH: Duration = Duration::from_millis(200);
/// How many nodes one request is tried on.
const MAX_TRIES: usize = 4;
/// How often it is looked whether a node that is asked is still alive.
const PULSE: Duration = Duration::from_millis(500);
/// How long a serving node may take to begin its answer.
const BEGIN: Duration = Duration::from_secs(120);
/// How long it may take where the answer comes whole.
const WHOLE: Duration = Duration::from_secs(600);
/// How long it may take between two pieces.
const STALL: Duration = Duration::from_secs(60);
/// How long its record may take after the answer.
const RECORD: Duration = Duration::from_secs(10);
/// A lease that may be relied on for less than this, or half its term, is not used for another
/// request: an answer is to end before it.
const LAST: Duration = Duration::from_secs(600);
/// How many requests are made under one lease: its proof holds the record of each.
const MAX_REQUESTS: u64 = 50_000;
/// How many of them at once: the serving node takes 512.
const MAX_RUNNING: u64 = 448;
/// When a record that did not come is looked for, each time after the one before.
const FIND: [Duration; 3] =
    [Duration::from_secs(1), Duration::from_secs(5), Duration::from_secs(20)];
/// How far a client may be behind what it is answered, in bytes.
const BACKLOG: usize = 256 << 10;
/// What a piece takes beside its bytes.
const PIECE: usize = 256;
/// How long it may be so before it is given up, where it is alone with that.
const CATCH_UP: Duration = Duration::from_secs(3);
/// With so many more of them it is half as long, a third with twice as many, and so on: each takes of
/// the room that a connection has for all.
const BEHIND: usize = 8;
/// How often it is looked how many they are.
const LOOK: Duration = Duration::from_millis(200);
/// A lease that nobody has used for this long is given back.
const IDLE: Duration = Duration::from_secs(600);
/// How often that is looked at.
const SWEEP: Duration = Duration::from_secs(30);
/// How often receipts are wanted.
const RECEIPT_EVERY: Span = Span::secs(10);
/// Requests of batches that are asked firmly at once: those who wait for an answer come first.
const LATER: usize = 4;
/// How long one waits for a place of these.
const LATER_WAIT: Duration = Duration::from_secs(30);
/// Of how many models it is remembered that there are any.
const MAX_KNOWN: usize = 4_096;
/// Of how many models it is remembered what their prompts come to.
const MAX_DENSITIES: usize = 1_024;
/// Within what time a lease is claimed: at once.
const CLAIM_WITHIN: Span = Span::secs(10);

/// What this node pays for a lease on a model, and what it takes for an answer.
#[derive(Clone, Debug)]
pub struct Terms {
    /// The budget of one lease.
    pub budget: Amount,
    /// Its term.
    pub term: Span,
    /// What is added to the price paid, in thousandths.
    pub markup_permille: u32,
    /// Where what was asked and answered is kept, if it is.
    pub transcripts: Option<PathBuf>,
}

/// What was counted since the start, for metrics.
#[derive(Debug, Default)]
pub struct Counts {
    /// Requests that clients made.
    pub requests: AtomicU64,
    /// Of them, those that went on to another node after one had failed.
    pub fallbacks: AtomicU64,
    /// Of them, those that came to nothing.
    pub faults: AtomicU64,
    /// Of them, those whose client hung up.
    pub hung_up: AtomicU64,
    /// Records of serving nodes that were not agreed on.
    pub disagreed: AtomicU64,
    /// Leases that were taken.
    pub leases: AtomicU64,
    /// Tokens that were asked.
    pub prompt_tokens: AtomicU64,
    /// Tokens that were answered.
    pub completion_tokens: AtomicU64,
}

/// The entry side. Clones share it.
#[derive(Clone, Debug)]
pub(crate) struct Gateway {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    handle: Handle,
    models: Models,
    fabric: FabricId,
    terms: Terms,
    router: Mutex<(Router, Dice)>,
    sellers: tokio::sync::Mutex<Option<(Instant, Arc<Vec<Seller>>)>>,
    purses: Mutex<BTreeMap<(KeyId, Class, ModelTerms), Arc<Purse>>>,
    counts: Arc<Counts>,
    /// What prompts come to, by model and the answers so far.
    densities: Mutex<BTreeMap<String, Arc<Density>>>,
    /// For requests that can wait and are asked firmly.
    later: Arc<Semaphore>,
    /// The names of models that were sold at some time.
    known: Mutex<BTreeSet<String>>,
    /// How many clients are too far behind.
    behind: Arc<AtomicUsize>,
}

/// The leases of one class on one model at one node, the newest last. Mostly it is one: more where much is asked at
/// once, or while one that is used up waits for its last requests.
#[derive(Debug)]
struct Purse {
    lessor: KeyId,
    class: Class,
    terms: ModelTerms,
    held: tokio::sync::Mutex<Vec<Arc<Held>>>,
}

/// A lease that this node holds.
#[derive(Debug)]
struct Held {
    id: LeaseId,
    cap: u64,
    /// What was spent and what is set aside for requests that are under way.
    spent: AtomicU64,
    until: Instant,
    /// How much of its term one more request must have left.
    last: Duration,
    used: Mutex<Instant>,
    rates: TokenRates,
    /// How many requests were made under it.
    requests: AtomicU64,
    /// How many of them are under way.
    running: AtomicU64,
    /// Whose records are agreed on.
    agreed: Mutex<Numbers>,
    /// The lessor does not take it any more, or what it says of it is not agreed on.
    over: AtomicBool,
}

/// The numbers of requests, from one on: up to one all of them, and some beyond.
#[derive(Debug, Default)]
struct Numbers(u64, BTreeSet<u64>);

impl Numbers {
    fn has(&self, number: u64) -> bool {
        number <= self.0 || self.1.contains(&number)
    }

    fn insert(&mut self, number: u64) {
        self.1.insert(number);
        while self.1.remove(&(self.0 + 1)) {
            self.0 += 1;
        }
    }
}

/// What a lease sets aside for a request, until that has ended.
#[derive(Debug)]
struct Aside {
    held: Arc<Held>,
    amount: u64,
}

impl Aside {
    /// The request has ended, and cost this.
    fn settle(&mut self, cost: Amount) {
        self.held.spent.fetch_add(cost.0, Ordering::Relaxed);
        self.give_back();
    }

    fn give_back(&mut self) {
        self.held.spent.fetch_sub(std::mem::take(&mut self.amount), Ordering::Relaxed);
    }

    /// The same in other hands.
    fn take(&mut self) -> Self {
        count(&self.held.running);
        Self { held: Arc::clone(&self.held), amount: std::mem::take(&mut self.amount) }
    }
}

impl Drop for Aside {
    fn drop(&mut self) {
        self.held.running.fetch_sub(1, Ordering::Relaxed);
        self.give_back();
    }
}

/// An answer that has begun.
#[derive(Debug)]
pub(crate) struct Answer {
    /// The name of the node that answers.
    pub(crate) node: String,
    /// In which class.
    pub(crate) class: Class,
    /// The model, and what this node pays for it.
    pub(crate) terms: ModelTerms,
    /// The most tokens of prompt and answer together.
    pub(crate) context: u32,
    /// How many tokens were asked, where that is known before the first piece.
    pub(crate) prompt: u64,
    /// The first piece.
    pub(crate) first: Piece,
    /// What follows. To drop it is to hang up.
    pub(crate) rest: Pieces,
    /// What it takes of the places for what can wait and was asked firmly.
    _place: Option<OwnedSemaphorePermit>,
}

/// Why a node did not begin to answer.
enum Failed {
    /// Another one may.
    Elsewhere(Fault),
    /// None can.
    Final(Fault),
}

fn hold<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn count(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Gateway {
    pub(crate) fn new(handle: Handle, shutdown: CancellationToken) -> Self {
        let hosted = handle.hosted().clone();
        let mut dice = [0; 8];
        // Without randomness all nodes draw alike: no more than a pity.
        let _ = getrandom::fill(&mut dice);
        let seed = u64::from_le_bytes(dice);
        let inner = Inner {
            models: hosted.models,
            fabric: FabricId(handle.facts().charter.id()),
            terms: hosted.terms,
            counts: hosted.asked,
            handle,
            router: Mutex::new((Router::default(), Dice::new(seed))),
            sellers: tokio::sync::Mutex::default(),
            purses: Mutex::default(),
            densities: Mutex::default(),
            later: Arc::new(Semaphore::new(LATER)),
            known: Mutex::default(),
            behind: Arc::default(),
        };
        let gateway = Self { inner: Arc::new(inner) };
        tokio::spawn(gateway.clone().sweep(shutdown));
        gateway
    }

    /// What it takes for what costs it this.
    pub(crate) fn price(&self, terms: &ModelTerms) -> TokenRates {
        terms.rates.with_markup(self.inner.terms.markup_permille)
    }

    /// Who sells models, this node among them if it serves any.
    ///
    /// # Errors
    /// 503 when the node is stopping.
    pub(crate) async fn sellers(&self) -> Result<Arc<Vec<Seller>>, Fault> {
        let mut known = self.inner.sellers.lock().await;
        if let Some((at, sellers)) = &*known
            && at.elapsed() < FRESH
        {
            return Ok(Arc::clone(sellers));
        }
        let facts = self.inner.handle.facts();
        let told = self.inner.handle.ask(Command::Sellers).await;
        let Ok(Reply::Sellers(mut sellers)) = told else {
            return Err(Fault::unavailable("The node is stopping."));
        };
        // What it serves itself it knows better than the map does.
        sellers.retain(|seller| seller.key != facts.me);
        let models = self.inner.models.own();
        if !models.is_empty() {
            sellers.push(Seller {
                key: facts.me,
                name: facts.name.clone(),
                up: true,
                max_term: Span::ZERO,
                models,
                addresses: Vec::new(),
            });
        }
        self.remember(&sellers);
        let sellers = Arc::new(sellers);
        *known = Some((Instant::now(), Arc::clone(&sellers)));
        Ok(sellers)
    }

    fn remember(&self, sellers: &[Seller]) {
        let mut known = hold(&self.inner.known);
        for offer in sellers.iter().flat_map(|seller| &seller.models) {
            if known.len() < MAX_KNOWN && !known.contains(&offer.terms.name) {
                known.insert(offer.terms.name.clone());
            }
        }
    }

    /// Whether there is such a model, though nobody may sell it now.
    fn is_known(&self, model: &str) -> bool {
        hold(&self.inner.known).contains(model) || self.inner.models.listed(model).is_some()
    }

    /// A place among the requests that can wait and are asked firmly.
    async fn later_place(&self) -> Result<OwnedSemaphorePermit, Fault> {
        let place = timeout(LATER_WAIT, Arc::clone(&self.inner.later).acquire_owned()).await;
        place.ok().and_then(Result::ok).ok_or_else(|| Fault::no_slack(LATER_WAIT))
    }

    /// What prompts to a model come to.
    pub(crate) fn density(&self, model: &str) -> Arc<Density> {
        let mut densities = hold(&self.inner.densities);
        if densities.len() >= MAX_DENSITIES && !densities.contains_key(model) {
            densities.clear();
        }
        Arc::clone(densities.entry(model.to_owned()).or_default())
    }

    /// The most that a client may have to pay for a request, whichever node answers it.
    ///
    /// # Errors
    /// 503 when the node is stopping.
    pub(crate) async fn worst(&self, request: &Request, bounds: &Bounds) -> Result<Amount, Fault> {
        let named = |name: &String| *name == request.model || request.models.contains(name);
        let sellers = self.sellers().await?;
        let offers = sellers.iter().filter(|seller| seller.up).flat_map(|seller| &seller.models);
        let offers = offers.filter(|offer| named(&offer.terms.name));
        let worst = offers.filter_map(|offer| {
            let class = match request.class {
                WantedClass::Slack => Class::Slack,
                _ => Class::Firm,
            };
            let rates = self.price(&offer.terms_in(class)?);
            Some(worst_case(bounds, offer.context, &rates))
        });
        Ok(worst.max().unwrap_or(Amount::ZERO))
    }

    /// Begins to answer a request: returns with the first piece.
    ///
    /// # Errors
    /// What the client is to be told.
    pub(crate) async fn ask(&self, request: &Request) -> Result<Answer, Fault> {
        let counts = &self.inner.counts;
        count(&counts.requests);
        let sellers = self.sellers().await?;
        let prefixes = request.prefix_keys();
        let (mut fault, mut no_time) = (None, None);
        for model in std::iter::once(&request.model).chain(&request.models) {
            let choices = match self.choose(model, request, &prefixes, &sellers) {
                Ok(choices) => choices,
                Err(no) => {
                    fault.get_or_insert(no);
                    continue;
                }
            };
            let mut tries = 0;
            for choice in within(MAX_TRIES, choices) {
                // Who only has no time now has it later: to pay more for it nobody asked.
                let waits = request.class == WantedClass::SlackIfSold && no_time.is_some();
                if waits && choice.class == Class::Firm {
                    break;
                }
                tries += 1;
                if tries > 1 {
                    count(&counts.fallbacks);
                }
                let (node, class) = (choice.name.clone(), choice.class);
                // What can wait, and is asked firmly, takes few places of those who cannot.
                let can_wait = request.class != WantedClass::Firm && class == Class::Firm;
                let place = match can_wait {
                    false => None,
                    true => match self.later_place().await {
                        Ok(place) => Some(place),
                        Err(why) => {
                            no_time = Some(why);
                            break;
                        }
                    },
                };
                match Box::pin(self.try_one(request, choice, &prefixes, &sellers)).await {
                    Ok(answer) => return Ok(Answer { _place: place, ..answer }),
                    Err(Failed::Elsewhere(why)) => {
                        tracing::info!(node, model, %why, "a node did not answer");
                        if why.is_no_slack() && class == Class::Slack {
                            no_time = Some(why);
                        } else {
                            fault = Some(why);
                        }
                    }
                    Err(Failed::Final(why)) => {
                        count(&counts.faults);
                        return Err(why);
                    }
                }
            }
        }
        count(&counts.faults);
        Err(no_time.or(fault).unwrap_or_else(|| Fault::model_not_found(&request.model)))
    }

    fn choose(
        &self,
        model: &str,
        request: &Request,
        prefixes: &[u64],
        sellers: &[Seller],
    ) -> Result<Vec<Choice>, Fault> {
        let hosts: Vec<_> = sellers
            .iter()
            .map(|Seller { key, name, up, models, .. }| Host { key: *key, name, up: *up, models })
            .collect();
        let provider = &request.provider;
        let question = Question {
            model,
            endpoint: request.endpoint,
            needs: request.needs().bits(),
            // Four bytes a token, as most text is.
            prompt_tokens: (request.prompt_bytes() / 4) as u64,
            max_tokens: request.sampling.max_tokens.map(u64::from),
            class: request.class,
            sort: sort_of(provider),
            max_price: (provider.max_price.prompt, provider.max_price.completion),
            order: &provider.order,
            only: &provider.only,
            ignore: &provider.ignore,
            allow_fallbacks: provider.allow_fallbacks,
            quantizations: &provider.quantizations,
            min_throughput: provider
                .preferred_min_throughput
                .map(|least| u32::try_from(least / 1_000).unwrap_or(u32::MAX)),
            max_latency: provider
                .preferred_max_latency
                .map(|most| Span::millis(u64::try_from(most.as_millis()).unwrap_or(u64::MAX))),
            prefixes,
        };
        let mut router = hold(&self.inner.router);
        let (router, dice) = &mut *router;
        let chosen = router.choose(clock::boot(), &question, &hosts, dice);
        chosen.map_err(|nobody| match nobody {
            Nobody::Unknown if self.is_known(model) => {
                let why = format!("No node that serves the model '{model}' is there now.");
                Fault::unavailable(why)
            }
            Nobody::Unknown => Fault::model_not_found(model),
            Nobody::Unable(Lack::Abilities(bits)) => {
                let lacking = crate::openai::Needs::of_bits(bits).iter().next();
                Fault::unsupported(lacking.map_or("messages", Need::param), model)
            }
            Nobody::Unable(Lack::Context(context)) => {
                let prompt = (request.prompt_bytes() / 4) as u64;
                let most = request.sampling.max_tokens.map_or(0, u64::from);
                Fault::context_length(context.into(), prompt, most)
            }
            Nobody::Unable(Lack::Slack) => {
                let why = format!("The model '{model}' is not sold to whoever can wait.");
                Fault::invalid(Some("unsupported_value"), why).at("service_tier")
            }
            Nobody::Unable(Lack::Endpoint) => {
                let path = request.endpoint.path();
                let why = format!("The model '{model}' does not answer {path}.");
                Fault::invalid(Some("unsupported_endpoint"), why).at("model")
            }
            Nobody::Against(_) => {
                let why = format!("No node can answer with '{model}' now: {nobody}.");
                Fault::unavailable(why)
            }
        })
    }

    /// Asks one node, and waits for the first piece.
    async fn try_one(
        &self,
        request: &Request,
        choice: Choice,
        prefixes: &[u64],
        sellers: &[Seller],
    ) -> Result<Answer, Failed> {
        let name = &choice.terms.name;
        let asked_of = (choice.key, choice.class);
        hold(&self.inner.router).0.begun(clock::boot(), asked_of, name);
        let body = request.forward(name, true);
        let bounds = Bounds::of(request.endpoint, &body);
        let mut asking = Asking {
            gateway: self.clone(),
            key: choice.key,
            class: choice.class,
            model: name.clone(),
            prompt: (request.prompt_bytes(), bounds),
            prefixes: prefixes.to_vec(),
            asked: Instant::now(),
            first: None,
            pieces: 0,
            went: Some(Went::Neither),
        };
        let (sender, mut rest) = mpsc::channel(WAITING);
        if choice.key == self.inner.handle.facts().me {
            let stream = request.stream;
            let ask = Ask { endpoint: request.endpoint, body, stream };
            let asked = self.inner.models.ask(name, ask, (choice.class, bounds.answers)).await;
            let answering = asked.map_err(|fault| asking.fail(fault))?;
            tokio::spawn(own(asking, answering, sender));
        } else {
            let opened = tokio::select! {
                opened = self.remote(request, &choice, (body, bounds), sellers) => opened,
                () = self.gone(choice.key) => Err(Fault::unavailable("The serving node went down.")),
            };
            match opened {
                Ok(opened) => tokio::spawn(opened.run(asking, sender)),
                Err(fault) => return Err(asking.fail(fault)),
            };
        }
        let begin = if request.stream { BEGIN } else { WHOLE };
        let until = tokio::time::Instant::now() + begin;
        let mut prompt = 0;
        let first = loop {
            match timeout_at(until, rest.recv()).await {
                Ok(Some(Ok(Piece::Prompt(tokens)))) => prompt = tokens,
                Ok(Some(Ok(first))) => break first,
                Ok(Some(Err(fault))) if fault.may_pass_elsewhere() => {
                    return Err(Failed::Elsewhere(fault));
                }
                Ok(Some(Err(fault))) => return Err(Failed::Final(fault)),
                Ok(None) => {
                    let fault = Fault::bad_upstream("The serving node ended without an answer.");
                    return Err(Failed::Elsewhere(fault));
                }
                Err(_) => {
                    let fault = Fault::timeout("The serving node did not begin in time.");
                    return Err(Failed::Elsewhere(fault));
                }
            }
        };
        let Choice { name: node, class, terms, context, .. } = choice;
        Ok(Answer { node, class, terms, context, prompt, first, rest, _place: None })
    }

    /// Resolves when a node is not held to be alive any more.
    async fn gone(&self, key: KeyId) {
        if key == self.inner.handle.facts().me {
            return std::future::pending().await;
        }
        // Once may be a moment between two views of the same node.
        let mut looks = 0;
        while looks < 2 {
            tokio::time::sleep(PULSE).await;
            let Ok(sellers) = self.sellers().await else { continue };
            let up = sellers.iter().any(|seller| seller.key == key && seller.up);
            looks = if up { 0 } else { looks + 1 };
        }
    }

    /// Opens a stream to a node under a lease there.
    async fn remote(
        &self,
        request: &Request,
        choice: &Choice,
        (body, bounds): (Bytes, Bounds),
        sellers: &[Seller],
    ) -> Result<Opened, Fault> {
        let seller = sellers.iter().find(|seller| seller.key == choice.key);
        let seller = seller.ok_or_else(|| Fault::unavailable("The node is gone."))?;
        let sold =
            |offer: &&ModelOffer| offer.terms_in(choice.class).as_ref() == Some(&choice.terms);
        let offer = seller.models.iter().find(sold);
        let offer = offer.ok_or_else(|| Fault::unavailable("The node sells that no more."))?;
        let most = worst_case(&bounds, offer.context, &choice.terms.rates);
        let mut last = None;
        // A lease may have ended there that is thought to be good here: once more with another.
        for _ in 0..2 {
            let aside = self.purse(choice).lease(self, most, seller.max_term).await?;
            let mut owed = Owed {
                gateway: self.clone(),
                lessor: choice.key,
                addresses: seller.addresses.clone(),
                held: Arc::clone(&aside.held),
                aside,
                open: Some(Expected::of(request, &body, bounds)),
            };
            let (lease, length) = (owed.held.id, body.len());
            let head = Head { lease, endpoint: request.endpoint, stream: request.stream, length };
            let (first, left) = head.open(&body);
            let data = self.inner.handle.data();
            let opened = data.open(choice.key.0, seller.addresses.clone(), INFER, first).await;
            match opened {
                Ok((send, recv)) => {
                    let (endpoint, stream) = (request.endpoint, request.stream);
                    return Ok(Opened { send, recv, left, body, owed, endpoint, stream, bounds });
                }
                Err(LinkError::Refused { refused, .. }) => {
                    owed.nothing();
                    let fault = Fault::unavailable(format!("The serving node refused: {refused}."));
                    if refused.why != Refusal::Denied {
                        return Err(fault);
                    }
                    owed.held.over.store(true, Ordering::Relaxed);
                    last = Some(fault);
                }
                Err(error) => {
                    return Err(Fault::unavailable(format!(
                        "The serving node cannot be asked: {error}."
                    )));
                }
            }
        }
        Err(last.unwrap_or_else(|| Fault::unavailable("The serving node refused.")))
    }

    fn purse(&self, choice: &Choice) -> Arc<Purse> {
        let mut purses = hold(&self.inner.purses);
        let Choice { key: lessor, class, terms, .. } = choice.clone();
        let purse = purses.entry((lessor, class, terms.clone())).or_insert_with(|| {
            Arc::new(Purse { lessor, class, terms, held: tokio::sync::Mutex::default() })
        });
        Arc::clone(purse)
    }

    /// Gives back leases that nobody uses.
    async fn sweep(self, shutdown: CancellationToken) {
        let mut look = tokio::time::interval(SWEEP);
        loop {
            tokio::select! {
                () = shutdown.cancelled() => return,
                _ = look.tick() => {}
            }
            let purses: Vec<_> = hold(&self.inner.purses).values().cloned().collect();
            for purse in purses {
                let mut held = purse.held.lock().await;
                let (kept, unused) = held.drain(..).partition(|held| !held.is_unused());
                *held = kept;
                drop(held);
                let unused: Vec<_> = unused;
                for held in unused {
                    let _ = self.inner.handle.ask(Command::Release(held.id)).await;
                }
            }
            hold(&self.inner.purses).retain(|_, purse| {
                let unused = purse.held.try_lock().is_ok_and(|held| held.is_empty());
                !(unused && Arc::strong_count(purse) == 1)
            });
        }
    }
}

impl Held {
    fn set_aside(self: &Arc<Self>, amount: u64) -> Aside {
        count(&self.requests);
        count(&self.running);
        self.spent.fetch_add(amount, Ordering::Relaxed);
        *hold(&self.used) = Instant::now();
        Aside { held: Arc::clone(self), amount }
    }

    /// Whether one more request for so much may be made under it.
    fn has(&self, amount: u64) -> bool {
        let spent = self.spent.load(Ordering::Relaxed);
        let place = self.running.load(Ordering::Relaxed) < MAX_RUNNING;
        self.is_good() && place && spent.saturating_add(amount) <= self.cap
    }

    fn is_good(&self) -> bool {
        !self.over.load(Ordering::Relaxed)
            && Instant::now() + self.last < self.until
            && self.requests.load(Ordering::Relaxed) < MAX_REQUESTS
    }

    /// Whether it may be given back: nothing is under way, and nothing more is to be expected.
    fn is_unused(self: &Arc<Self>) -> bool {
        let left = self.cap.saturating_sub(self.spent.load(Ordering::Relaxed));
        let done = !self.is_good() || left < self.cap / 100;
        Arc::strong_count(self) == 1 && (done || hold(&self.used).elapsed() > IDLE)
    }
}

impl Purse {
    /// Sets `most` aside of a lease that has room for it, taken now if there is none. What is taken is
    /// not lost when whoever wanted it hangs up.
    async fn lease(
        self: Arc<Self>,
        gateway: &Gateway,
        most: Amount,
        max_term: Span,
    ) -> Result<Aside, Fault> {
        if let Some(held) = self.held.lock().await.iter().rev().find(|held| held.has(most.0)) {
            return Ok(held.set_aside(most.0));
        }
        let gateway = gateway.clone();
        let taking = async move { self.or_take(&gateway, most, max_term).await };
        tokio::spawn(taking).await.unwrap_or_else(|_| Err(Fault::internal()))
    }

    async fn or_take(
        &self,
        gateway: &Gateway,
        most: Amount,
        max_term: Span,
    ) -> Result<Aside, Fault> {
        let mut held = self.held.lock().await;
        if let Some(held) = held.iter().rev().find(|held| held.has(most.0)) {
            return Ok(held.set_aside(most.0));
        }
        let new = self.take(gateway, most, max_term).await?;
        let aside = new.set_aside(most.0);
        held.push(new);
        Ok(aside)
    }

    async fn take(
        &self,
        gateway: &Gateway,
        most: Amount,
        max_term: Span,
    ) -> Result<Arc<Held>, Fault> {
        let handle = &gateway.inner.handle;
        let none = || Fault::unavailable("This node has no mandate to order in a lessee's name.");
        let mandate = handle.facts().mandate.as_ref().ok_or_else(none)?;
        let allowed: Mandate = body_in(&mandate.envelope).ok_or_else(none)?;
        if most > allowed.max_total {
            return Err(Fault::unavailable(format!(
                "The request may cost up to {most} there, and this node's mandate allows {} for a \
                 lease: a lower max_tokens costs less.",
                allowed.max_total
            )));
        }
        let terms = &gateway.inner.terms;
        let term = terms.term.min(max_term).min(allowed.max_term);
        let cap = terms.budget.max(Amount(most.0.saturating_mul(2))).min(allowed.max_total);
        let want = Want {
            shape: Resources::default(),
            model: Some(self.terms.clone()),
            class: self.class,
            term,
            longest: term,
            claim_within: CLAIM_WITHIN.min(term),
            max_hourly: Amount::ZERO,
            budget: cap,
            exposure: Amount(cap.0 / 4).max(most),
            receipt_every: RECEIPT_EVERY,
            runtime: MODEL.into(),
            lessors: vec![self.lessor],
            labels: Vec::new(),
            isolation: Vec::new(),
        };
        let refused = |error: AskError| {
            let detail = match &error {
                AskError::Failed(Failure::Refused(heard)) => {
                    heard.iter().map(|heard| heard.detail.clone()).collect::<Vec<_>>().join("; ")
                }
                AskError::Failed(Failure::NothingFits(against)) => {
                    against.iter().flat_map(|a| a.reasons.clone()).collect::<Vec<_>>().join("; ")
                }
                other => other.to_string(),
            };
            Fault::unavailable(format!("The serving node grants no lease: {detail}."))
        };
        let asked = Instant::now();
        let told = handle.ask(Command::Lease(want)).await.map_err(refused)?;
        let Reply::Leased(leased) = told else { return Err(Fault::internal()) };
        let job = JobSpec {
            runtime: MODEL.into(),
            program: Payload::default(),
            args: Vec::new(),
            env: Vec::new(),
            stdin: None,
            inputs: Vec::new(),
            outputs: Vec::new(),
            release_after: false,
        };
        handle.ask(Command::Claim { lease: leased.lease, job }).await.map_err(refused)?;
        count(&gateway.inner.counts.leases);
        let held = Held {
            id: leased.lease,
            cap: cap.0,
            spent: AtomicU64::new(0),
            // As the core relies on it, less what a pause may hide: an early end is met as a refusal.
            until: asked + Duration::from_millis(term.as_millis()),
            used: Mutex::new(asked),
            last: LAST.min(Duration::from_millis(term.as_millis()) / 2),
            rates: self.terms.rates,
            requests: AtomicU64::new(0),
            running: AtomicU64::new(0),
            agreed: Mutex::default(),
            over: AtomicBool::new(false),
        };
        Ok(Arc::new(held))
    }
}

/// A request under way, for what the router learns of it.
struct Asking {
    gateway: Gateway,
    key: KeyId,
    class: Class,
    model: String,
    /// How many bytes are asked, and what they can come to.
    prompt: (usize, Bounds),
    prefixes: Vec<u64>,
    asked: Instant,
    first: Option<Instant>,
    pieces: u64,
    /// Taken when it is told.
    went: Option<Went>,
}

impl Asking {
    fn piece(&mut self) {
        self.pieces += 1;
        self.first.get_or_insert_with(Instant::now);
    }

    fn went_well(&mut self, counted: Counted) {
        let span =
            |time: Duration| Span::millis(u64::try_from(time.as_millis()).unwrap_or(u64::MAX));
        let first = self.first.unwrap_or_else(Instant::now);
        let first_token = span(first.duration_since(self.asked));
        let took = span(first.elapsed());
        // Of an answer that came whole nobody can say how fast its tokens came.
        let tokens = if self.pieces > 1 { counted.completion } else { 0 };
        self.went = Some(Went::Well { first_token, tokens, took });
        let (bytes, bounds) = &self.prompt;
        self.gateway.density(&self.model).seen(*bytes, bounds, counted.prompt);
        let counts = &self.gateway.inner.counts;
        counts.prompt_tokens.fetch_add(counted.prompt, Ordering::Relaxed);
        counts.completion_tokens.fetch_add(counted.completion, Ordering::Relaxed);
    }

    fn failed(&mut self) {
        self.went = Some(Went::Failed);
    }

    /// It came to this.
    fn came_to(&mut self, fault: &Fault) {
        if fault.is_no_slack() && self.class == Class::Slack {
            self.went = Some(Went::NoTime);
        } else if fault.may_pass_elsewhere() {
            self.failed();
        }
    }

    /// The node did not begin: whether another one may.
    fn fail(&mut self, fault: Fault) -> Failed {
        self.came_to(&fault);
        if fault.may_pass_elsewhere() { Failed::Elsewhere(fault) } else { Failed::Final(fault) }
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        let went = self.went.take().unwrap_or(Went::Neither);
        let mut router = hold(&self.gateway.inner.router);
        let asked_of = (self.key, self.class);
        router.0.ended(clock::boot(), asked_of, &self.model, &self.prefixes, went);
    }
}

/// Passes on the pieces of a model of this node's own.
async fn own(mut asking: Asking, answering: Answering, sender: Sender) {
    let Answering { mut pieces, place: _place } = answering;
    loop {
        let piece = tokio::select! {
            piece = pieces.recv() => piece,
            () = sender.closed() => {
                count(&asking.gateway.inner.counts.hung_up);
                return;
            }
        };
        let last = match &piece {
            Some(Ok(Piece::Done(counted))) => {
                asking.went_well(*counted);
                true
            }
            Some(Ok(Piece::Prompt(_))) => false,
            Some(Ok(Piece::Data(_))) => {
                asking.piece();
                false
            }
            Some(Err(fault)) => {
                asking.came_to(fault);
                true
            }
            None => true,
        };
        let Some(piece) = piece else { return };
        if sender.send(piece).await.is_err() || last {
            return;
        }
    }
}

/// A request that may have reached a serving node, until its record is agreed on or there is none.
///
/// What is dropped before that is looked for: one record that is missed would keep all that come after
/// it under the same lease from being agreed on.
struct Owed {
    gateway: Gateway,
    lessor: KeyId,
    addresses: Vec<SocketAddr>,
    held: Arc<Held>,
    /// None once it is known what became of it.
    open: Option<Expected>,
    /// Of the lease, for this request.
    aside: Aside,
}

/// What a record has to say.
#[derive(Clone, Copy, Debug)]
struct Expected {
    service: Service,
    /// The answer came whole, with its counts. Otherwise only its beginning is known.
    whole: bool,
    bounds: Bounds,
    /// The most tokens that what came can be.
    completion: u64,
}

impl Expected {
    fn of(request: &Request, body: &[u8], bounds: Bounds) -> Self {
        let service = Service {
            endpoint: request.endpoint,
            request: Hash::of(body),
            response: AnswerHash::default().finish(),
            sampling: sampling_of(request),
            finish: Finish::HungUp,
            prompt_tokens: 0,
            cached_tokens: 0,
            completion_tokens: 0,
        };
        Self { service, whole: false, bounds, completion: 0 }
    }

    /// Whether a record is of this request and says no more than is known of it.
    fn is_met_by(&self, said: &Service) -> bool {
        let within =
            said.prompt_tokens <= self.bounds.prompt && said.completion_tokens <= self.completion;
        let same = if self.whole {
            // Where this node hung up, only the serving node knows what came first.
            let crossed = self.service.finish == Finish::HungUp;
            let finish = if crossed { said.finish } else { self.service.finish };
            Service { finish, ..self.service } == *said
        } else {
            let Service { endpoint, request, sampling, .. } = self.service;
            Service { endpoint, request, sampling, ..*said } == *said
        };
        within && same
    }
}

impl Owed {
    /// What is known of the answer until now.
    fn seen(&mut self, completion: u64) {
        if let Some(open) = &mut self.open {
            open.completion = completion;
        }
    }

    /// The answer is complete.
    fn done(&mut self, counted: Counted, response: Hash, finish: Finish) {
        if let Some(open) = &mut self.open {
            open.whole = true;
            open.service.response = response;
            open.service.finish = finish;
            open.service.prompt_tokens = counted.prompt;
            open.service.cached_tokens = counted.cached;
            open.service.completion_tokens = counted.completion;
        }
    }

    /// Nothing was counted, as the serving node itself says.
    fn nothing(&mut self) {
        self.open = None;
    }

    /// Its record came.
    async fn record(&mut self, record: &Signed) -> Option<(LeaseId, u64)> {
        let number = record.verify::<Served>(&self.gateway.inner.fabric);
        if number.is_ok_and(|served| hold(&self.held.agreed).has(served.body().number)) {
            // Taken for the record of the same request, made twice: there is another one.
            return None;
        }
        let expected = self.open.take()?;
        let agreed = self.gateway.agree(record, &expected, &self.held, self.lessor).await;
        match &agreed {
            Some((.., cost)) => self.aside.settle(*cost),
            // All that follow would not be agreed on either.
            None => self.held.over.store(true, Ordering::Relaxed),
        }
        agreed.map(|(lease, number, _)| (lease, number))
    }
}

impl Drop for Owed {
    fn drop(&mut self) {
        let Some(expected) = self.open.take() else { return };
        let lost = Self {
            gateway: self.gateway.clone(),
            lessor: self.lessor,
            addresses: self.addresses.clone(),
            held: Arc::clone(&self.held),
            open: None,
            aside: self.aside.take(),
        };
        if let Ok(runtime) = tokio::runtime::Handle::try_current() {
            runtime.spawn(lost.find(expected));
        }
    }
}

impl Owed {
    /// Looks for a record that did not come. There may be none, and there may be some of other requests
    /// that are about to be agreed on; where one stays that nobody agrees on, or nobody can say, the
    /// lease is not used any more.
    async fn find(mut self, expected: Expected) {
        let (mut before, mut stays) = (BTreeSet::new(), true);
        for wait in FIND {
            tokio::time::sleep(wait).await;
            let Some(records) = self.missing().await else {
                stays = true;
                continue;
            };
            let mut others = BTreeSet::new();
            for (number, service, record) in records {
                if expected.is_met_by(&service) {
                    let gateway = self.gateway.clone();
                    let agreed = gateway.agree(&record, &expected, &self.held, self.lessor).await;
                    if let Some((.., cost)) = agreed {
                        self.aside.settle(cost);
                        return;
                    }
                }
                others.insert(number);
            }
            stays = !others.is_disjoint(&before);
            before = others;
        }
        if stays {
            self.held.over.store(true, Ordering::Relaxed);
        }
    }

    /// The records of the lease that are not agreed on yet, as the serving node tells them; none when
    /// it cannot be asked.
    async fn missing(&self) -> Option<Vec<(u64, Service, Signed)>> {
        let from = hold(&self.held.agreed).0 + 1;
        let body = infer::ask_records(&self.held.id, from);
        let data = self.gateway.inner.handle.data();
        let opened = data.open(self.lessor.0, self.addresses.clone(), RECORDS, body);
        let (_send, mut recv) = timeout(RECORD, opened).await.ok()?.ok()?;
        let mut records = Vec::new();
        while records.len() < infer::MAX_RECORDS {
            match timeout(RECORD, infer::read(&mut recv)).await.ok()?.ok()? {
                Some(Frame::Record(record)) => {
                    let served = record.verify::<Served>(&self.gateway.inner.fabric).ok()?;
                    let (number, service) = (served.body().number, served.body().service);
                    if !hold(&self.held.agreed).has(number) {
                        records.push((number, service, *record));
                    }
                }
                Some(_) => return None,
                None => break,
            }
        }
        Some(records)
    }
}

/// What has come and the client has not taken yet.
#[derive(Default)]
struct Backlog {
    pieces: VecDeque<Result<Piece, Fault>>,
    bytes: usize,
}

impl Backlog {
    fn push(&mut self, piece: Result<Piece, Fault>) {
        self.bytes += size(&piece);
        self.pieces.push_back(piece);
    }

    fn pop(&mut self) -> Option<Result<Piece, Fault>> {
        let piece = self.pieces.pop_front()?;
        self.bytes -= size(&piece);
        Some(piece)
    }

    /// Whether the client is further behind than is waited for. One piece, however long, it may be.
    fn is_full(&self) -> bool {
        self.pieces.len() > 1 && self.bytes > BACKLOG
    }
}

fn size(piece: &Result<Piece, Fault>) -> usize {
    match piece {
        Ok(Piece::Data(data)) => data.len() + PIECE,
        _ => PIECE,
    }
}

/// A client that is too far behind, as long as it is.
struct Behind {
    since: tokio::time::Instant,
    all: Arc<AtomicUsize>,
}

impl Behind {
    fn new(all: &Arc<AtomicUsize>) -> Self {
        all.fetch_add(1, Ordering::Relaxed);
        Self { since: tokio::time::Instant::now(), all: Arc::clone(all) }
    }

    /// Until when it may be so, as things are.
    fn until(&self) -> tokio::time::Instant {
        let others = self.all.load(Ordering::Relaxed).saturating_sub(1);
        let share = u32::try_from(1 + others / BEHIND).unwrap_or(u32::MAX);
        self.since + CATCH_UP / share
    }

    /// When to look again.
    fn look(&self) -> tokio::time::Instant {
        self.until().min(tokio::time::Instant::now() + LOOK)
    }

    fn is_over(&self) -> bool {
        self.until() <= tokio::time::Instant::now()
    }
}

impl Drop for Behind {
    fn drop(&mut self) {
        self.all.fetch_sub(1, Ordering::Relaxed);
    }
}

/// What happened to an answer that is being read.
enum Met {
    Read(Result<Option<Frame>, infer::Broken>),
    /// The client wants no more of it, or does not take it.
    HungUp,
    /// Nothing, for as long as is waited.
    Nothing,
}

/// What comes to a client.
type Sender = mpsc::Sender<Result<Piece, Fault>>;

/// A stream to a serving node on which a request goes.
struct Opened {
    send: SendHalf,
    recv: RecvHalf,
    left: Bytes,
    body: Bytes,
    owed: Owed,
    endpoint: Endpoint,
    stream: bool,
    bounds: Bounds,
}

impl Opened {
    /// Sends what is left of the request, passes the pieces on, and agrees on the record.
    ///
    /// What comes is read soon, whether or not the client takes it: streams of one connection share its
    /// room, and one that is not read takes it from the others. A client that is too far behind for
    /// too long is given up.
    async fn run(mut self, mut asking: Asking, sender: Sender) {
        let left = std::mem::take(&mut self.left);
        if !left.is_empty() {
            let sending = tokio::io::AsyncWriteExt::write_all(&mut self.send, &left);
            if !matches!(timeout(STALL, sending).await, Ok(Ok(()))) {
                asking.failed();
                let _ = sender.send(Err(broken("it did not take the request"))).await;
                return;
            }
        }
        let mut backlog = Backlog::default();
        self.read(&mut asking, &sender, &mut backlog).await;
        drop(asking);
        while let Some(piece) = backlog.pop() {
            if !matches!(timeout(STALL, sender.send(piece)).await, Ok(Ok(()))) {
                return;
            }
        }
    }

    /// Reads the answer and its record. What the client has not taken by then stays in `backlog`.
    async fn read(self, asking: &mut Asking, sender: &Sender, backlog: &mut Backlog) {
        let Self { mut send, recv, body, mut owed, endpoint, stream, bounds, .. } = self;
        let (mut hash, mut seen) = (AnswerHash::default(), Tally::new(endpoint, bounds));
        let keeps = asking.gateway.inner.terms.transcripts.is_some();
        let mut keeping = Keeping::default();
        // The client wants no more of it, and it has been counted.
        let (mut hung_up, mut done) = (false, false);
        let mut prompted = false;
        let begin = if stream { BEGIN } else { WHOLE };
        let mut until = tokio::time::Instant::now() + begin;
        let mut reading = Box::pin(next_frame(recv));
        let watching = asking.gateway.clone();
        // Dropped as soon as it is not looked at any more: it may hold what others wait for.
        let mut gone = Some(Box::pin(watching.gone(asking.key)));
        // Since when the client is too far behind, until it has caught up.
        let mut behind: Option<Behind> = None;
        loop {
            let waiting = !backlog.pieces.is_empty();
            if hung_up || backlog.bytes < BACKLOG / 2 {
                behind = None;
            } else if backlog.is_full() {
                behind.get_or_insert_with(|| Behind::new(&watching.inner.behind));
            }
            let pauses = behind.is_some();
            if hung_up || done {
                gone = None;
            }
            let patience = behind.as_ref().map_or(until, Behind::look);
            let met = tokio::select! {
                biased;
                room = sender.reserve(), if waiting => {
                    if let Ok(room) = room {
                        if let Some(piece) = backlog.pop() {
                            room.send(piece);
                        }
                        continue;
                    }
                    // Nobody is there to take it.
                    *backlog = Backlog::default();
                    if hung_up || done {
                        continue;
                    }
                    Met::HungUp
                }
                // A frame that is half read goes on being read whatever else happens meanwhile.
                (recv, read) = &mut reading, if !pauses => {
                    reading = Box::pin(next_frame(recv));
                    Met::Read(read)
                }
                () = watched(gone.as_mut()), if gone.is_some() => {
                    asking.failed();
                    backlog.push(Err(broken("it went down")));
                    return;
                }
                () = sender.closed(), if !hung_up && !done => Met::HungUp,
                () = tokio::time::sleep_until(patience), if behind.is_some() => {
                    if behind.as_ref().is_some_and(|behind| !behind.is_over()) {
                        continue;
                    }
                    backlog.push(Err(Fault::unread()));
                    Met::HungUp
                }
                () = tokio::time::sleep_until(until), if behind.is_none() => Met::Nothing,
            };
            let wrong = match met {
                Met::HungUp => {
                    hung_up = true;
                    until = tokio::time::Instant::now() + RECORD;
                    count(&asking.gateway.inner.counts.hung_up);
                    // Generation stops there; what was produced until then still comes, with its record.
                    send.reset(Code::Cancelled);
                    continue;
                }
                Met::Read(Ok(Some(Frame::Piece(piece)))) if !done => {
                    if !stream && asking.pieces > 0 {
                        "it sent more than one answer".to_owned()
                    } else if stream && piece.len() > CHUNK {
                        "it sent too long a piece".to_owned()
                    } else {
                        asking.piece();
                        hash.piece(&piece);
                        if keeps {
                            keeping.piece(&piece);
                        }
                        match seen.see(&piece) {
                            Ok(_) => {
                                owed.seen(seen.bound());
                                if !hung_up {
                                    until = tokio::time::Instant::now() + STALL;
                                    backlog.push(Ok(Piece::Data(piece)));
                                }
                                continue;
                            }
                            Err(fault) => fault.message,
                        }
                    }
                }
                Met::Read(Ok(Some(Frame::Prompt(tokens)))) if !done => {
                    // It says so once.
                    if !hung_up && !std::mem::replace(&mut prompted, true) {
                        backlog.push(Ok(Piece::Prompt(tokens.min(bounds.prompt))));
                    }
                    continue;
                }
                Met::Read(Ok(Some(Frame::Done(counted)))) if !done => {
                    let most = Counted {
                        prompt: counted.prompt.min(bounds.prompt),
                        cached: counted.cached.min(counted.prompt),
                        completion: counted.completion.min(seen.bound()),
                    };
                    if most == counted {
                        asking.went_well(counted);
                    } else {
                        tracing::warn!(
                            node = %asking.key, ?counted, ?most,
                            "a serving node counts more tokens than there can be: not agreed on"
                        );
                        asking.failed();
                    }
                    done = true;
                    until = tokio::time::Instant::now() + RECORD;
                    let finish = if hung_up { Finish::HungUp } else { Finish::Answered };
                    owed.done(counted, hash.clone().finish(), finish);
                    if !hung_up {
                        backlog.push(Ok(Piece::Done(most)));
                    }
                    continue;
                }
                Met::Read(Ok(Some(Frame::Fault(fault)))) if !done => {
                    owed.nothing();
                    if fault.is_no_room() {
                        // The two nodes do not count alike: the node is well, the lease is not.
                        owed.held.over.store(true, Ordering::Relaxed);
                    } else {
                        asking.came_to(&fault);
                    }
                    // What this node says of its clients only it can say.
                    let fault = if fault.is_unread() { broken(&fault.message) } else { fault };
                    backlog.push(Err(fault));
                    return;
                }
                Met::Read(Ok(Some(Frame::Record(record)))) if done => {
                    let agreed = owed.record(&record).await;
                    if let Some((lease, number)) = agreed.filter(|_| keeps) {
                        let transcript = keeping.finish(endpoint.path(), &body);
                        asking.gateway.keep(transcript, lease, number).await;
                    }
                    return;
                }
                _ if done => {
                    tracing::debug!(node = %asking.key, "the record of a request did not come");
                    return;
                }
                Met::Nothing => "nothing came for too long".to_owned(),
                Met::Read(Err(error)) => error.to_string(),
                Met::Read(Ok(_)) => "it ended too early".to_owned(),
            };
            if !hung_up {
                asking.failed();
                backlog.push(Err(broken(&wrong)));
            }
            return;
        }
    }
}

/// What is watched for, if it still is.
async fn watched(gone: Option<&mut Pin<Box<impl Future<Output = ()>>>>) {
    match gone {
        Some(gone) => gone.await,
        None => std::future::pending().await,
    }
}

/// The next frame, and the stream again.
async fn next_frame(mut recv: RecvHalf) -> (RecvHalf, Result<Option<Frame>, infer::Broken>) {
    let frame = infer::read(&mut recv).await;
    (recv, frame)
}

fn broken(why: &str) -> Fault {
    Fault::bad_upstream(format!("The serving node broke off: {why}."))
}

impl Gateway {
    /// Keeps what was asked and answered.
    async fn keep(&self, transcript: Option<Transcript>, lease: LeaseId, number: u64) {
        let (Some(transcript), Some(dir)) = (transcript, &self.inner.terms.transcripts) else {
            return;
        };
        let dir = dir.clone();
        let write = move || transcript.write(&dir, &lease, number);
        if let Ok(Err(error)) = tokio::task::spawn_blocking(write).await {
            tracing::warn!(%lease, number, %error, "a transcript is not kept");
        }
    }

    /// Agrees on the record of a request, if it says what this node knows: then of which lease, which
    /// request under it, and what it costs.
    async fn agree(
        &self,
        record: &Signed,
        expected: &Expected,
        held: &Held,
        from: KeyId,
    ) -> Option<(LeaseId, u64, Amount)> {
        let why = match record.verify::<Served>(&self.inner.fabric) {
            Err(error) => error.to_string(),
            Ok(served) => {
                let (lease, number) = (served.body().lease, served.body().number);
                let said = served.body().service;
                if lease != held.id {
                    "it is of another lease".to_owned()
                } else if !expected.is_met_by(&said) {
                    "it says otherwise of what was asked or answered".to_owned()
                } else {
                    match self.inner.handle.ask(Command::Consume(Box::new(served))).await {
                        Ok(_) => {
                            hold(&held.agreed).insert(number);
                            let cost =
                                held.rates.charge(said.prompt_tokens, said.completion_tokens);
                            return Some((lease, number, cost));
                        }
                        Err(error) => error.to_string(),
                    }
                }
            }
        };
        count(&self.inner.counts.disagreed);
        tracing::warn!(node = %from, why, "the record of a request is not agreed on");
        None
    }
}

/// The first so many of each class.
fn within(most: usize, choices: Vec<Choice>) -> impl Iterator<Item = Choice> {
    let mut left = [most; 2];
    choices.into_iter().filter(move |choice| {
        let left = &mut left[usize::from(choice.class == Class::Slack)];
        let within = *left > 0;
        *left = left.saturating_sub(1);
        within
    })
}

fn sort_of(provider: &Provider) -> Sort {
    match provider.sort {
        None => Sort::Balanced,
        Some(Wanted::Price) => Sort::Price,
        Some(Wanted::Throughput) => Sort::Throughput,
        Some(Wanted::Latency) => Sort::Latency,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_close_up_as_they_come() {
        let mut numbers = Numbers::default();
        for (number, all) in [(2, 0), (3, 0), (5, 0), (1, 3), (4, 5)] {
            assert!(!numbers.has(number));
            numbers.insert(number);
            assert!(numbers.has(number));
            assert_eq!(numbers.0, all, "after {number}");
        }
        assert!(!numbers.has(6) && numbers.1.is_empty());
    }

    #[test]
    fn a_record_is_held_against_what_was_seen() {
        let body = br#"{"model":"m","messages":[{"role":"user","content":"hi"}],"max_tokens":9}"#;
        let request = Request::parse(Endpoint::Chat, &Bytes::from_static(body)).expect("parses");
        let bounds = Bounds::of(Endpoint::Chat, body);
        let begun = Expected { completion: 5, ..Expected::of(&request, body, bounds) };
        let said = Service {
            finish: Finish::Answered,
            response: Hash([7; 32]),
            prompt_tokens: 3,
            completion_tokens: 5,
            ..begun.service
        };
        assert!(begun.is_met_by(&said), "of a beginning no more is known");
        let whole = Expected { whole: true, service: said, ..begun };
        let hung_up = Service { finish: Finish::HungUp, ..said };
        assert!(!whole.is_met_by(&hung_up), "what came whole was not broken off");
        let crossed = Expected { service: hung_up, ..whole };
        assert!(crossed.is_met_by(&said) && crossed.is_met_by(&hung_up));
        let others = [
            Service { request: Hash([8; 32]), ..said },
            Service { endpoint: Endpoint::Completions, ..said },
            Service { prompt_tokens: bounds.prompt + 1, ..said },
            Service { completion_tokens: 6, ..said },
        ];
        for other in others {
            assert!(!begun.is_met_by(&other) && !whole.is_met_by(&other), "{other:?}");
        }
        assert!(!whole.is_met_by(&Service { response: Hash([8; 32]), ..said }));
        assert!(!whole.is_met_by(&Service { completion_tokens: 4, ..said }));
    }

    #[test]
    fn the_more_are_behind_the_less_long_they_may_be() {
        let all = Arc::default();
        let first = Behind::new(&all);
        assert_eq!(first.until() - first.since, CATCH_UP);
        let more: Vec<_> = (0..3 * BEHIND).map(|_| Behind::new(&all)).collect();
        assert_eq!(first.until() - first.since, CATCH_UP / 4);
        drop(more);
        assert_eq!(first.until() - first.since, CATCH_UP);
    }

    #[test]
    fn a_backlog_is_full_by_its_bytes_and_never_by_one_piece() {
        let piece = |size: usize| Ok(Piece::Data(vec![b' '; size].into()));
        let mut backlog = Backlog::default();
        backlog.push(piece(BACKLOG * 4));
        assert!(!backlog.is_full());
        backlog.push(piece(1));
        assert!(backlog.is_full());
        assert!(backlog.pop().is_some() && !backlog.is_full() && backlog.bytes == 1 + PIECE);
    }
}

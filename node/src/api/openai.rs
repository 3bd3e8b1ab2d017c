//! The hosted models' API, in OpenAI's shapes: what an SDK that is pointed at this node meets.
//!
//! ```text
//! POST /v1/chat/completions  /v1/completions  /v1/embeddings  /v1/responses
//! GET  /v1/models  /v1/models/{id}
//! /v1/files  /v1/batches                                                    see `batch`
//! ```
//!
//! It wants an API key of this node, or the node's own token. Every error has OpenAI's body; before the
//! first byte of a stream as a status, after it in the stream. A stream that has to wait says so in
//! comments, so that nothing between gives it up. A client that hangs up stops what is generated.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, Path, Request as HttpRequest, State};
use axum::http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use bytes::Bytes;
use futures::stream;
use http_body_util::{BodyExt as _, LengthLimitError, Limited};
use leasehold_proto::core::Seller;
use leasehold_proto::minds::route::Wanted;
use leasehold_proto::words::contract::Class;
use leasehold_proto::words::model::{ModelState, TokenRates};
use leasehold_proto::{Amount, Hash};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::time::{Instant, timeout};
use tokio_util::sync::CancellationToken;

use super::batch;
use super::guard::Guard;
use crate::api_key::{Entered, Keys};
use crate::batch::{self as batch_ask, Batches, MAX_FILE, OPERATOR, Owner};
use crate::gateway::{Answer, Gateway};
use crate::handle::Handle;
use crate::infer::MAX_REQUEST;
use crate::model::engine::Piece;
use crate::openai::catalogue::{Catalogue, Model, Pricing, supported_parameters};
use crate::openai::rewrite::Bill;
use crate::openai::tally::{Bounds, Tally};
use crate::openai::{Counted, Endpoint, Fault, Needs, Request, Rewriter, sse};

/// Requests that are worked on at once: each may hold a body, and some wait long.
const MAX_AT_ONCE: usize = 2_048;
/// Of them, those whose body may be large at once.
const MAX_LARGE: usize = 32;
/// What a body may have without counting as large, in bytes.
const LARGE: usize = 1 << 20;
/// The longest form that brings a file, in bytes.
const MAX_FORM: usize = MAX_FILE as usize + (1 << 20);
/// How long a body may take to come.
const BODY: Duration = Duration::from_secs(60);
/// How long a stream waits for its first piece before it begins without it.
const SILENT: Duration = Duration::from_secs(10);
/// How often a stream in which nothing happens says that it lives.
const ALIVE: Duration = Duration::from_secs(15);
/// How long a whole answer may take.
const WHOLE: Duration = Duration::from_secs(600);

/// What every handler has.
#[derive(Clone, Debug)]
pub struct Service {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    gateway: Gateway,
    keys: Keys,
    batches: Batches,
    currency: String,
    places: Arc<Semaphore>,
    large: Arc<Semaphore>,
    started: u64,
    shutdown: CancellationToken,
}

/// Who asks.
enum Client {
    /// Whoever holds the node's own token.
    Operator,
    /// The owner of an API key.
    Key(Hash),
}

impl Service {
    /// Whose what a client brings is.
    pub(super) fn owner(&self, guard: Option<&Guard>, headers: &HeaderMap) -> Result<Owner, Fault> {
        Ok(match self.client(guard, headers)? {
            Client::Operator => OPERATOR.to_owned(),
            Client::Key(key) => key.to_string(),
        })
    }

    /// Whose files and batches a client sees; none is named for whoever sees all.
    pub(super) fn sees(
        &self,
        guard: Option<&Guard>,
        headers: &HeaderMap,
    ) -> Result<Option<Owner>, Fault> {
        let owner = self.owner(guard, headers)?;
        Ok((owner != OPERATOR).then_some(owner))
    }

    pub(super) fn batches(&self) -> &Batches {
        &self.inner.batches
    }

    /// Asks one request of a batch for its owner.
    async fn ask_for(self, asking: batch_ask::Asking) -> Result<Vec<u8>, Fault> {
        let batch_ask::Asking { owner, endpoint, body, hurry } = asking;
        let mut request = Request::parse(endpoint, &body.into())?;
        // There is a day for it.
        if request.class == Wanted::Firm {
            request.class = if hurry { Wanted::SlackFirst } else { Wanted::SlackIfSold };
        }
        let key = match owner.as_str() {
            OPERATOR => None,
            key => Some(key.parse::<Hash>().map_err(|_| Fault::wrong_key())?),
        };
        let asked = self.admit(key, &request, Room::default()).await?;
        let (text, _) = asked.whole_text(request).await?;
        Ok(text.to_vec())
    }

    async fn enter(
        &self,
        key: &Hash,
        request: &Request,
        bounds: &Bounds,
    ) -> Result<Entered, Fault> {
        let models = request.models.iter().map(String::as_str);
        let models: Vec<_> = models.chain([request.model.as_str()]).collect();
        let answer = request.sampling.max_tokens.map_or(256, u64::from);
        let tokens = request.prompt_bytes() as u64 / 4 + answer.min(4_096);
        let worst = self.inner.gateway.worst(request, bounds).await?;
        self.inner.keys.enter(key, &models, (tokens, worst))
    }

    /// Lets a request in: for whoever holds the node's own token without more, for a key within its
    /// limits.
    async fn admit(
        &self,
        key: Option<Hash>,
        request: &Request,
        room: Room,
    ) -> Result<Asked, Fault> {
        let endpoint = request.endpoint;
        let bounds = Bounds::of(endpoint, &request.forward(&request.model, false));
        let entered = match key {
            None => None,
            Some(key) => Some(self.enter(&key, request, &bounds).await?),
        };
        Ok(Asked {
            service: self.clone(),
            endpoint,
            stream: request.stream,
            include_usage: request.include_usage,
            bounds,
            prompt_bytes: request.prompt_bytes(),
            entered,
            room,
        })
    }

    /// The API of a node, with the gateway behind it.
    #[must_use]
    pub fn of(handle: &Handle, shutdown: CancellationToken) -> Self {
        let inner = Inner {
            gateway: Gateway::new(handle.clone(), shutdown.clone()),
            keys: handle.hosted().keys.clone(),
            batches: handle.hosted().batches.clone(),
            currency: handle.facts().currency.clone(),
            places: Arc::new(Semaphore::new(MAX_AT_ONCE)),
            large: Arc::new(Semaphore::new(MAX_LARGE)),
            started: seconds(),
            shutdown,
        };
        let service = Self { inner: Arc::new(inner) };
        let asking = service.clone();
        let ask: batch_ask::Ask = Arc::new(move |one| Box::pin(asking.clone().ask_for(one)));
        let (batches, closing) = (service.inner.batches.clone(), service.inner.shutdown.clone());
        tokio::spawn(batches.run(ask, closing));
        service
    }

    /// The routes, for a listener that `guard` stands before: with none, hosts are not compared, and only
    /// API keys open, not the node's own token.
    pub(super) fn router(self, guard: Option<Arc<Guard>>) -> Router {
        let asks = |endpoint: Endpoint| {
            post(move |State((service, guard)): Shared, request: HttpRequest| {
                let id = new_id("req");
                async move {
                    let guard = guard.as_deref();
                    let answered = Box::pin(service.ask(endpoint, request, guard, &id)).await;
                    with_id(answered.unwrap_or_else(refused), &id)
                }
            })
        };
        Router::new()
            .route(Endpoint::Chat.path(), asks(Endpoint::Chat).fallback(no_method))
            .route(Endpoint::Completions.path(), asks(Endpoint::Completions).fallback(no_method))
            .route(Endpoint::Embeddings.path(), asks(Endpoint::Embeddings).fallback(no_method))
            .route(Endpoint::Responses.path(), asks(Endpoint::Responses).fallback(no_method))
            .route(
                "/v1/files",
                post(batch::upload)
                    .layer(DefaultBodyLimit::max(MAX_FORM))
                    .get(batch::files)
                    .fallback(no_method),
            )
            .route("/v1/files/{id}", get(batch::file).delete(batch::remove).fallback(no_method))
            .route("/v1/files/{id}/content", get(batch::content).fallback(no_method))
            .route("/v1/batches", post(batch::make).get(batch::list).fallback(no_method))
            .route("/v1/batches/{id}", get(batch::show).fallback(no_method))
            .route("/v1/batches/{id}/cancel", post(batch::cancel).fallback(no_method))
            .route("/v1/models", get(list).fallback(no_method))
            // Names of models may hold a slash.
            .route("/v1/models/{*id}", get(show).fallback(no_method))
            .with_state((self, guard))
    }

    fn client(&self, guard: Option<&Guard>, headers: &HeaderMap) -> Result<Client, Fault> {
        let value = headers.get(header::AUTHORIZATION).ok_or_else(Fault::no_key)?;
        let (scheme, key) = value.as_bytes().split_at_checked(7).unwrap_or_default();
        if !scheme.eq_ignore_ascii_case(b"bearer ") {
            return Err(Fault::no_key());
        }
        let key = key.trim_ascii();
        if guard.is_some_and(|guard| guard.is_token(key)) {
            return Ok(Client::Operator);
        }
        let key = std::str::from_utf8(key).map_err(|_| Fault::wrong_key())?;
        self.inner.keys.find(key).map(Client::Key)
    }

    async fn ask(
        &self,
        endpoint: Endpoint,
        request: HttpRequest,
        guard: Option<&Guard>,
        id: &str,
    ) -> Result<Response, Fault> {
        let began = Instant::now();
        let overloaded = || Fault::overloaded(Duration::from_secs(1));
        if guard.is_some_and(|guard| guard.check_host(&request).is_err()) {
            return Err(Fault::forbidden("The Host header names another host than this."));
        }
        if self.inner.shutdown.is_cancelled() {
            return Err(Fault::unavailable("The node is stopping.").after(Duration::from_secs(5)));
        }
        let place = Arc::clone(&self.inner.places).try_acquire_owned();
        let place = place.map_err(|_| overloaded())?;
        let (parts, body) = request.into_parts();
        let client = self.client(guard, &parts.headers)?;
        let (body, large) = self.body(&parts.headers, body).await?;
        let room = Room { _place: Some(place), _large: large };
        let request = Request::parse(endpoint, &body)?;
        let body_length = body.len();
        drop(body);
        let key = match client {
            Client::Operator => None,
            Client::Key(key) => Some(key),
        };
        let asked = self.admit(key, &request, room).await?;
        let limits = asked.entered.as_ref().map(|entered| entered.limits);
        tracing::debug!(id, model = request.model, body_length, "a request to a model");
        let (mut response, node) = if request.stream {
            asked.stream(request).await?
        } else {
            let answering = timeout(WHOLE, Box::pin(asked.whole(request)));
            let late = || Fault::timeout("The answer was not complete within 10 minutes.");
            answering.await.map_err(|_| late())??
        };
        let headers = response.headers_mut();
        let mut put = |name: &'static str, value: String| {
            if let Ok(value) = HeaderValue::from_str(&value) {
                headers.insert(HeaderName::from_static(name), value);
            }
        };
        if let Some(node) = node {
            put("x-leasehold-node", node);
        }
        put("openai-processing-ms", began.elapsed().as_millis().to_string());
        if let Some(limits) = limits {
            let named = [("requests", limits.requests), ("tokens", limits.tokens)];
            for (what, limit) in named {
                let Some((limit, left, reset)) = limit else { continue };
                let names = if what == "requests" {
                    [
                        "x-ratelimit-limit-requests",
                        "x-ratelimit-remaining-requests",
                        "x-ratelimit-reset-requests",
                    ]
                } else {
                    [
                        "x-ratelimit-limit-tokens",
                        "x-ratelimit-remaining-tokens",
                        "x-ratelimit-reset-tokens",
                    ]
                };
                let reset = format!("{}ms", reset.as_millis());
                for (name, value) in
                    names.into_iter().zip([limit.to_string(), left.to_string(), reset])
                {
                    put(name, value);
                }
            }
        }
        Ok(response)
    }

    async fn body(
        &self,
        headers: &HeaderMap,
        body: Body,
    ) -> Result<(Bytes, Option<OwnedSemaphorePermit>), Fault> {
        let length = headers.get(header::CONTENT_LENGTH);
        let length = length.and_then(|value| value.to_str().ok()?.parse::<usize>().ok());
        if length.is_some_and(|length| length > MAX_REQUEST) {
            return Err(Fault::too_large(MAX_REQUEST));
        }
        // One that does not say how long it is may be anything.
        let large = length.is_none_or(|length| length > LARGE);
        let overloaded = || Fault::overloaded(Duration::from_secs(5));
        let room = if large {
            let room = timeout(BODY, Arc::clone(&self.inner.large).acquire_owned()).await;
            Some(room.map_err(|_| overloaded())?.map_err(|_| overloaded())?)
        } else {
            None
        };
        let limited = Limited::new(body, MAX_REQUEST).collect();
        match timeout(BODY, limited).await {
            Err(_) => Err(Fault::timeout("The request did not come within 60 s.")),
            Ok(Ok(body)) => {
                let body = body.to_bytes();
                let room = room.filter(|_| body.len() > LARGE);
                Ok((body, room))
            }
            Ok(Err(error)) if error.is::<LengthLimitError>() => Err(Fault::too_large(MAX_REQUEST)),
            Ok(Err(_)) => Err(Fault::not_json("the body broke off")),
        }
    }
}

/// A request that was let in.
struct Asked {
    service: Service,
    endpoint: Endpoint,
    stream: bool,
    include_usage: bool,
    bounds: Bounds,
    prompt_bytes: usize,
    entered: Option<Entered>,
    room: Room,
}

/// What a request takes of what the node has for all of them, until its answer has ended.
#[derive(Debug, Default)]
struct Room {
    _place: Option<OwnedSemaphorePermit>,
    _large: Option<OwnedSemaphorePermit>,
}

/// An answer on its way to the client, and what it comes to.
struct Billed {
    endpoint: Endpoint,
    entered: Option<Entered>,
    currency: Arc<str>,
    rates: TokenRates,
    bounds: Bounds,
    rewriter: Rewriter,
    seen: Tally,
    /// Tokens that were asked, as far as that is known before the end, and about how many they are.
    prompt: u64,
    usual: u64,
    counted: Option<Counted>,
    _room: Room,
}

impl Billed {
    fn new(asked: Asked, answer: &Answer) -> Self {
        let gateway = &asked.service.inner.gateway;
        let id = new_id(if asked.endpoint == Endpoint::Chat { "chatcmpl" } else { "cmpl" });
        let model = answer.terms.name.as_str();
        let (stream, usage) = (asked.stream, asked.include_usage);
        Self {
            endpoint: asked.endpoint,
            currency: asked.service.inner.currency.as_str().into(),
            rates: gateway.price(&answer.terms),
            bounds: asked.bounds,
            rewriter: Rewriter::new(asked.endpoint, stream, usage, &id, model, &answer.node)
                .of(answer.class),
            seen: Tally::new(asked.endpoint, asked.bounds),
            prompt: answer.prompt,
            usual: gateway.density(model).tokens(asked.prompt_bytes, &asked.bounds, answer.context),
            counted: None,
            _room: asked.room,
            entered: asked.entered,
        }
    }

    /// A piece as the client is to see it; none where it is not.
    fn rewrite(&mut self, piece: &[u8]) -> Result<Option<Bytes>, Fault> {
        // What is malformed the rewriter refuses.
        let _ = self.seen.see(piece);
        let Self { rewriter, rates, currency, bounds, seen, .. } = self;
        let bill = |said: Counted| {
            // What cannot be is not billed.
            let completion = said.completion.min(seen.bound());
            let counted = Counted { prompt: said.prompt.min(bounds.prompt), completion, ..said };
            let cost = rates.charge(counted.prompt, counted.completion);
            Bill { counted, cost: cost.0, currency }
        };
        rewriter.rewrite(piece, bill)
    }

    /// It came to nothing: neither this node nor its client owes anything for it.
    fn broke_off(&mut self) {
        self.counted = Some(Counted::default());
    }
}

impl Drop for Billed {
    fn drop(&mut self) {
        // Who hangs up pays for what was produced until then, as far as it was seen.
        let counted =
            self.counted.unwrap_or_else(|| self.seen.broken_off(self.prompt, || self.usual));
        let cost: Amount = self.rates.charge(counted.prompt, counted.completion);
        if let Some(entered) = &mut self.entered {
            entered.charge(counted.total(), cost);
        }
    }
}

impl Asked {
    /// A whole answer.
    async fn whole(self, request: Request) -> Result<(Response, Option<String>), Fault> {
        let (text, node) = self.whole_text(request).await?;
        let response = ([(header::CONTENT_TYPE, "application/json")], text).into_response();
        Ok((response, Some(node)))
    }

    async fn whole_text(self, request: Request) -> Result<(Bytes, String), Fault> {
        let mut answer = self.service.inner.gateway.ask(&request).await?;
        let mut billed = Billed::new(self, &answer);
        let mut whole = None;
        let mut next =
            Some(Ok(std::mem::replace(&mut answer.first, Piece::Done(Counted::default()))));
        let short = || Fault::bad_upstream("The serving node ended without an answer.");
        let mut failed = None;
        while let Some(piece) = next {
            match piece {
                Ok(Piece::Data(piece)) => whole = Some(piece),
                Ok(Piece::Done(counted)) => {
                    billed.counted = Some(counted);
                    break;
                }
                Ok(Piece::Prompt(tokens)) => billed.prompt = tokens,
                Err(fault) => {
                    failed = Some(fault);
                    break;
                }
            }
            next = answer.rest.recv().await;
        }
        let (Some(whole), Some(_)) = (whole, billed.counted) else {
            billed.broke_off();
            return Err(failed.unwrap_or_else(short));
        };
        let text = billed.rewrite(&whole)?.ok_or_else(short)?;
        Ok((text, answer.node))
    }

    /// An answer in chunks, as server-sent events.
    async fn stream(self, request: Request) -> Result<(Response, Option<String>), Fault> {
        let gateway = self.service.inner.gateway.clone();
        let mut asking = Box::pin(async move { gateway.ask(&request).await });
        let (state, node) = match timeout(SILENT, &mut asking).await {
            Ok(answer) => {
                let answer = answer?;
                let node = answer.node.clone();
                (Streaming::answering(self, answer), Some(node))
            }
            Err(_) => (Streaming::Waiting(self, asking), None),
        };
        let events = stream::unfold(Some(state), |state| async move {
            let (bytes, next) = state?.next().await;
            Some((Ok::<_, Infallible>(bytes), next))
        });
        let headers = [
            (header::CONTENT_TYPE, "text/event-stream; charset=utf-8"),
            (header::CACHE_CONTROL, "no-cache"),
            (HeaderName::from_static("x-accel-buffering"), "no"),
        ];
        Ok(((headers, Body::from_stream(events)).into_response(), node))
    }
}

type Asking = std::pin::Pin<Box<dyn Future<Output = Result<Answer, Fault>> + Send>>;

/// Where a stream stands.
enum Streaming {
    /// Nothing has come yet.
    Waiting(Asked, Asking),
    /// Pieces come; the first one is already here.
    Answering { answer: Answer, billed: Box<Billed>, first: bool },
}

impl Streaming {
    fn answering(asked: Asked, answer: Answer) -> Self {
        let billed = Box::new(Billed::new(asked, &answer));
        Self::Answering { answer, billed, first: true }
    }

    /// The next bytes for the client, and what follows; nothing follows the end.
    async fn next(self) -> (Bytes, Option<Self>) {
        let comment = || Bytes::from_static(b": leasehold is waiting for the model\n\n");
        match self {
            Self::Waiting(asked, mut asking) => match timeout(ALIVE, &mut asking).await {
                Err(_) => (comment(), Some(Self::Waiting(asked, asking))),
                Ok(Err(fault)) => (sse::error(asked.endpoint, &fault), None),
                Ok(Ok(answer)) => {
                    let begun = Self::answering(asked, answer);
                    (Bytes::from_static(b": begun\n\n"), Some(begun))
                }
            },
            Self::Answering { mut answer, mut billed, mut first } => loop {
                let endpoint = billed.endpoint;
                let piece = if std::mem::take(&mut first) {
                    let none = Piece::Done(Counted::default());
                    Ok(Some(Ok(std::mem::replace(&mut answer.first, none))))
                } else {
                    timeout(ALIVE, answer.rest.recv()).await
                };
                let rest = |answer, billed| Some(Self::Answering { answer, billed, first: false });
                match piece {
                    Err(_) => return (comment(), rest(answer, billed)),
                    Ok(Some(Ok(Piece::Data(piece)))) => match billed.rewrite(&piece) {
                        Ok(Some(text)) => {
                            return (sse::piece(endpoint, &text), rest(answer, billed));
                        }
                        Ok(None) => {}
                        Err(fault) => return (sse::error(endpoint, &fault), None),
                    },
                    Ok(Some(Ok(Piece::Prompt(tokens)))) => billed.prompt = tokens,
                    Ok(Some(Ok(Piece::Done(counted)))) => {
                        billed.counted = Some(counted);
                        return (sse::end(endpoint), None);
                    }
                    Ok(Some(Err(fault))) => {
                        // What a client leaves unread is owed all the same.
                        if !fault.is_unread() {
                            billed.broke_off();
                        }
                        return (sse::error(endpoint, &fault), None);
                    }
                    Ok(None) => {
                        billed.broke_off();
                        let fault = Fault::bad_upstream("The serving node broke off.");
                        return (sse::error(endpoint, &fault), None);
                    }
                }
            },
        }
    }
}

/// Every model that can be had, as this node sells it.
fn catalogue(service: &Service, sellers: &[Seller]) -> Vec<Model> {
    let mut models: std::collections::BTreeMap<&str, Model> = std::collections::BTreeMap::new();
    let mut cheapest: std::collections::BTreeMap<&str, TokenRates> = Default::default();
    let mut slack: std::collections::BTreeMap<&str, TokenRates> = Default::default();
    let mut abilities: std::collections::BTreeMap<&str, u64> = Default::default();
    for offer in sellers.iter().filter(|seller| seller.up).flat_map(|seller| &seller.models) {
        let name = offer.terms.name.as_str();
        let rates = service.inner.gateway.price(&offer.terms);
        let best = cheapest.entry(name).or_insert(rates);
        *best = (*best).min(rates);
        if let Some(terms) = offer.terms_in(Class::Slack) {
            let rates = service.inner.gateway.price(&terms);
            let best = slack.entry(name).or_insert(rates);
            *best = (*best).min(rates);
        }
        *abilities.entry(name).or_default() |= offer.abilities;
        let model = models.entry(name).or_insert_with(|| Model {
            id: name.to_owned(),
            object: "model".to_owned(),
            created: service.inner.started,
            owned_by: "leasehold".to_owned(),
            context_length: 0,
            pricing: Pricing::per_million(0, 0),
            flex_pricing: None,
            currency: service.inner.currency.clone(),
            quantizations: Vec::new(),
            providers: 0,
            warm: 0,
            state: "cold".to_owned(),
            supported_parameters: Vec::new(),
            demo: true,
        });
        model.context_length = model.context_length.max(offer.context);
        if !offer.quantisation.is_empty() && !model.quantizations.contains(&offer.quantisation) {
            model.quantizations.push(offer.quantisation.clone());
        }
        model.providers += 1;
        model.demo &= offer.demo;
        match offer.state {
            ModelState::Warm => {
                model.warm += 1;
                model.state = "warm".to_owned();
            }
            ModelState::Loading if model.warm == 0 => model.state = "loading".to_owned(),
            _ => {}
        }
    }
    let known = models.into_iter().map(|(name, mut model)| {
        let rates = cheapest.get(name).copied().unwrap_or_default();
        model.pricing = Pricing::per_million(rates.prompt.0, rates.completion.0);
        let slack = slack.get(name);
        model.flex_pricing =
            slack.map(|rates| Pricing::per_million(rates.prompt.0, rates.completion.0));
        let abilities = abilities.get(name).copied().unwrap_or_default();
        model.supported_parameters = supported_parameters(Needs::of_bits(abilities));
        model
    });
    known.collect()
}

pub(super) type Shared = State<(Service, Option<Arc<Guard>>)>;

async fn visible(
    service: &Service,
    guard: Option<&Guard>,
    headers: &HeaderMap,
) -> Result<Vec<Model>, Fault> {
    let client = service.client(guard, headers)?;
    let sellers = service.inner.gateway.sellers().await?;
    let mut models = catalogue(service, &sellers);
    if let Client::Key(key) = client {
        models.retain(|model| service.inner.keys.allows(&key, &model.id));
    }
    Ok(models)
}

async fn list(State((service, guard)): Shared, headers: HeaderMap) -> Response {
    let id = new_id("req");
    let models = visible(&service, guard.as_deref(), &headers).await.map(Catalogue::new);
    with_id(models.map_or_else(refused, |models| axum::Json(models).into_response()), &id)
}

async fn show(
    State((service, guard)): Shared,
    Path(name): Path<String>,
    headers: HeaderMap,
) -> Response {
    let id = new_id("req");
    let model = visible(&service, guard.as_deref(), &headers).await.and_then(|models| {
        let model = models.into_iter().find(|model| model.id == name);
        model.ok_or_else(|| Fault::model_not_found(&name))
    });
    with_id(model.map_or_else(refused, |model| axum::Json(model).into_response()), &id)
}

/// What there is not.
pub(super) async fn no_path(method: Method, request: HttpRequest) -> Response {
    let fault = Fault::no_such_path(method.as_str(), request.uri().path());
    with_id(refused(fault), &new_id("req"))
}

async fn no_method(method: Method, request: HttpRequest) -> Response {
    let mut fault = Fault::no_such_path(method.as_str(), request.uri().path());
    fault.status = 405;
    with_id(refused(fault), &new_id("req"))
}

/// A fault as an answer.
pub(super) fn refused(fault: Fault) -> Response {
    let status = StatusCode::from_u16(fault.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
    let json = [(header::CONTENT_TYPE, "application/json")];
    let mut response = (status, json, fault.body()).into_response();
    let headers = response.headers_mut();
    if let Some(wait) = fault.retry_after_seconds() {
        headers.insert(header::RETRY_AFTER, wait.into());
    }
    if status == StatusCode::UNAUTHORIZED {
        let scheme = HeaderValue::from_static("Bearer realm=\"leasehold\"");
        headers.insert(header::WWW_AUTHENTICATE, scheme);
    }
    response
}

fn with_id(mut response: Response, id: &str) -> Response {
    if let Ok(id) = HeaderValue::from_str(id) {
        response.headers_mut().insert(HeaderName::from_static("x-request-id"), id);
    }
    response
}

fn seconds() -> u64 {
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
    now.map_or(0, |now| now.as_secs())
}

fn new_id(what: &str) -> String {
    let mut bytes = [0; 12];
    // Only a name: where there is no randomness, two may share one.
    let _ = getrandom::fill(&mut bytes);
    let hex: String = bytes.iter().map(|byte| format!("{byte:02x}")).collect();
    format!("{what}-{hex}")
}

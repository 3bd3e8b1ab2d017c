//! Routes about the models of this node, for its operator: which there are, what they cost, whether
//! they are sold; and about API keys. What clients ask of models is in `openai`.

// The attribute for the description expands to paths longer than they need to be.
#![allow(unused_qualifications)]

use std::path::PathBuf;

use axum::Json;
use axum::extract::{Path, State};
use axum::http::StatusCode;
use leasehold_proto::core::{Command, Reply};
use leasehold_proto::words::model::{Endpoint, TokenRates};
use leasehold_proto::{Amount, Payload};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::App;
use super::error::{ApiError, Code, ErrorBody};
use super::guard::Input;
use super::payload::blocking;
use super::want::PayloadText;
use crate::api_key::{Grant, Kept, KeyError};
use crate::model::Listed;
use crate::model::catalog::{CatalogError, Source, Spec};
use crate::model::engine::State as Ready;
use crate::openai::{Need, Needs};
use crate::quantity;

/// Prices for a million tokens, in the fabric's currency.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct PriceText {
    /// Of what is asked.
    pub prompt: String,
    /// Of what is answered.
    pub completion: String,
}

/// An OpenAI-compatible server.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct UpstreamText {
    /// Where: `http://host:port/v1`.
    pub url: String,
    /// What the model is called there, if not as here.
    #[serde(default)]
    pub model: Option<String>,
    /// A file on the node's host that holds its API key, if it wants one.
    #[serde(default)]
    #[schema(value_type = Option<String>)]
    pub key_file: Option<PathBuf>,
}

/// What is said of a model. What is left out stays as it was, or is found out.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ModelSpec {
    /// Its weights: a GGUF file of the llama family, among the node's payloads.
    pub weights: Option<PayloadText>,
    /// A sentence encoder of the BERT family: the index of its files, among the node's payloads.
    pub encoder: Option<PayloadText>,
    /// The server that has it.
    pub upstream: Option<UpstreamText>,
    /// What its tokens cost.
    pub price: Option<PriceText>,
    /// What they cost whoever can wait, of that price (`"60%"`); empty: it is not sold so.
    pub slack: Option<String>,
    /// Requests that can wait are begun while fewer than this are under way.
    pub slack_requests: Option<u32>,
    /// Whether it is sold to others.
    pub serve: Option<bool>,
    /// Whether its weights are kept from peers who ask for them.
    pub private: Option<bool>,
    /// Whether it is there to show how things work.
    pub demo: Option<bool>,
    /// How its weights are kept, for an upstream.
    pub quantisation: Option<String>,
    /// How many tokens it looks back on, for an upstream.
    pub context: Option<u32>,
    /// What can be asked of it, for an upstream: `chat`, `completions`, `embeddings`, `responses`.
    #[schema(value_type = Option<Vec<String>>)]
    pub endpoints: Option<Vec<Endpoint>>,
    /// What it can do beyond plain text, for an upstream: `tools`, `images`, ….
    pub abilities: Option<Vec<String>>,
}

/// A model of this node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ModelLine {
    /// What it is called.
    pub name: String,
    /// What it is: the root of its weights, or of what its operator says it is.
    pub digest: String,
    /// What answers for it: `embedded`, or the server's address.
    pub engine: String,
    /// Whether it is sold.
    pub serve: bool,
    /// Whether its weights are kept from peers.
    pub private: bool,
    /// Whether it is there to show how things work.
    pub demo: bool,
    /// `cold`, `loading`, `warm` or `down`.
    pub state: String,
    /// What its tokens cost.
    pub price: PriceText,
    /// What they cost whoever can wait; absent where it is not sold so.
    pub slack: Option<PriceText>,
    /// Requests that can wait are begun while fewer than this are under way.
    pub slack_requests: u32,
    /// How its weights are kept.
    pub quantisation: String,
    /// The most tokens of prompt and answer together.
    pub context: u32,
    /// What can be asked of it.
    #[schema(value_type = Vec<String>)]
    pub endpoints: Vec<Endpoint>,
    /// What it can do beyond plain text.
    pub abilities: Vec<String>,
    /// How many weights it has; zero where that is not known.
    pub parameters: u64,
    /// Under which licence its weights are, where they say it.
    pub licence: Option<String>,
    /// Requests that are answered now.
    pub active: u32,
    /// Requests that wait.
    pub queued: u32,
    /// Tokens that one request gets in a second; zero where that is not known.
    pub tokens_per_second: u32,
    /// Tokens of a prompt that are read in a second; zero where that is not known.
    pub prefill_per_second: u32,
    /// Of the tokens that were asked, those that were known from an earlier request, in percent; absent
    /// where that is not known.
    pub cached_percent: Option<f32>,
    /// How long the first token takes.
    pub first_token_ms: u64,
    /// What is wrong with it, if something is.
    pub trouble: Option<String>,
}

/// The models of this node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, ToSchema)]
pub struct ModelLines {
    /// The currency of every price.
    pub currency: String,
    /// Sorted by name.
    pub models: Vec<ModelLine>,
}

/// An API key to be made.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
#[serde(deny_unknown_fields, default)]
pub struct KeySpec {
    /// Whom it is for.
    pub name: String,
    /// Only these models; empty: all.
    pub models: Vec<String>,
    /// Requests a minute.
    pub rpm: Option<u32>,
    /// Tokens a minute, both ways.
    pub tpm: Option<u32>,
    /// Requests at once.
    pub concurrency: Option<u32>,
    /// What it may cost in all.
    pub budget: Option<String>,
    /// For how long it holds, from now on (`"30d"`).
    pub expires: Option<String>,
}

/// An API key, without what opens.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KeyLine {
    /// By which it is named.
    pub id: String,
    /// Whom it is for.
    pub name: String,
    /// Only these models; empty: all.
    pub models: Vec<String>,
    /// Requests a minute.
    pub rpm: Option<u32>,
    /// Tokens a minute.
    pub tpm: Option<u32>,
    /// Requests at once.
    pub concurrency: Option<u32>,
    /// What it may cost in all.
    pub budget: Option<String>,
    /// What it has cost.
    pub spent: String,
    /// How many requests were answered.
    pub requests: u64,
    /// How many tokens they took.
    pub tokens: u64,
    /// When it was made.
    pub created: String,
    /// Until when it holds.
    pub expires: Option<String>,
}

/// The API keys of this node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KeyLines {
    /// The currency of every amount.
    pub currency: String,
    /// The oldest first.
    pub keys: Vec<KeyLine>,
}

/// An API key that was made.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, ToSchema)]
pub struct KeyMade {
    /// The key itself: it is shown this once.
    pub key: String,
    /// What it allows.
    #[serde(flatten)]
    pub line: KeyLine,
}

impl PriceText {
    fn of(rates: &TokenRates) -> Self {
        let TokenRates { prompt, completion } = rates;
        Self { prompt: prompt.to_string(), completion: completion.to_string() }
    }
}

fn state_word(state: Ready) -> &'static str {
    match state {
        Ready::Cold => "cold",
        Ready::Loading => "loading",
        Ready::Warm => "warm",
        Ready::Down => "down",
    }
}

impl ModelLine {
    fn of(listed: Listed) -> Self {
        let Listed { entry, load, trouble } = listed;
        let abilities = entry.needs().iter().map(|need| need.word().to_owned()).collect();
        Self {
            digest: entry.digest.to_string(),
            engine: match entry.source {
                Source::Weights(_) | Source::Encoder(_) => "embedded".to_owned(),
                Source::Upstream { ref url, .. } => url.clone(),
            },
            serve: entry.serve,
            private: entry.private,
            demo: entry.demo,
            state: state_word(load.state).to_owned(),
            price: PriceText::of(&entry.rates),
            slack: entry.slack().as_ref().map(PriceText::of),
            slack_requests: entry.slack_requests,
            quantisation: entry.quantisation,
            context: entry.context,
            endpoints: entry.endpoints,
            abilities,
            parameters: entry.parameters,
            licence: entry.licence,
            active: load.active,
            queued: load.queued,
            tokens_per_second: load.tokens_per_second,
            prefill_per_second: load.prefill_per_second,
            cached_percent: load.cached_permille.map(|permille| f32::from(permille) / 10.0),
            trouble,
            first_token_ms: u64::try_from(load.first_token.as_millis()).unwrap_or(u64::MAX),
            name: entry.name,
        }
    }
}

impl ModelSpec {
    fn read(self) -> Result<Spec, ApiError> {
        let payload = |field: &'static str, text: PayloadText| -> Result<Payload, ApiError> {
            Ok(text.parse(field)?)
        };
        let named = [self.weights.is_some(), self.encoder.is_some(), self.upstream.is_some()];
        if named.iter().filter(|named| **named).count() > 1 {
            let why = "one of weights, encoder and upstream answers for a model, not several";
            return Err(ApiError::field("upstream", why));
        }
        let source = match (self.weights, self.encoder, self.upstream) {
            (Some(weights), _, _) => Some(Source::Weights(payload("weights", weights)?)),
            (_, Some(files), _) => Some(Source::Encoder(payload("encoder", files)?)),
            (_, _, Some(UpstreamText { url, model, key_file })) => {
                Some(Source::Upstream { url, model, key_file })
            }
            _ => None,
        };
        let amount = |field: &'static str, text: &str| -> Result<Amount, ApiError> {
            quantity::amount(text).map_err(|why| ApiError::field(field, why))
        };
        let rates = match self.price {
            Some(PriceText { prompt, completion }) => Some(TokenRates {
                prompt: amount("price.prompt", &prompt)?,
                completion: amount("price.completion", &completion)?,
            }),
            None => None,
        };
        let abilities = match self.abilities {
            Some(words) => Some(abilities_of(&words)?),
            None => None,
        };
        let slack_permille = match self.slack.as_deref() {
            None => None,
            Some("") => Some(None),
            Some(text) => {
                let share = quantity::share(text);
                Some(Some(share.map_err(|why| ApiError::field("slack", why))?))
            }
        };
        Ok(Spec {
            source,
            rates,
            slack_permille,
            slack_requests: self.slack_requests,
            serve: self.serve,
            private: self.private,
            demo: self.demo,
            quantisation: self.quantisation,
            context: self.context,
            endpoints: self.endpoints,
            abilities,
        })
    }
}

fn abilities_of(words: &[String]) -> Result<u64, ApiError> {
    let mut abilities = Needs::PLAIN;
    for word in words {
        let need = Need::ALL.iter().find(|need| need.word() == word).ok_or_else(|| {
            let known: Vec<_> = Need::ALL.iter().map(|need| need.word()).collect();
            ApiError::field("abilities", format!("'{word}' is none: {}", known.join(", ")))
        })?;
        abilities = abilities.with(*need);
    }
    Ok(abilities.bits())
}

impl KeyLine {
    fn of(kept: Kept) -> Self {
        let Grant { name, models, rpm, tpm, concurrency, budget, expires } = kept.grant;
        Self {
            id: kept.id,
            name,
            models,
            rpm,
            tpm,
            concurrency,
            budget: budget.map(|budget| budget.to_string()),
            spent: kept.spent.to_string(),
            requests: kept.requests,
            tokens: kept.tokens,
            created: kept.created.to_string(),
            expires: expires.map(|until| until.to_string()),
        }
    }
}

impl From<CatalogError> for ApiError {
    fn from(error: CatalogError) -> Self {
        let said = error.to_string();
        match error {
            CatalogError::Io { .. } | CatalogError::Read { .. } => {
                Self::internal("keeping the list of models", &said)
            }
            CatalogError::Full => Self::conflict(said),
            CatalogError::Rule(_) => Self::new(StatusCode::BAD_REQUEST, Code::BadRequest, said),
            CatalogError::Name => Self::field("name", said),
            CatalogError::NoSource(_) | CatalogError::NotHere(_) => Self::not_found(said),
            CatalogError::NotHeld(_) => Self::field("weights", said),
            CatalogError::Payload(error) => error.into(),
            CatalogError::Weights(_) => Self::field("weights", said),
            CatalogError::Encoder(_) => Self::field("encoder", said),
            CatalogError::Upstream(_) => Self::field("upstream", said),
        }
    }
}

impl From<KeyError> for ApiError {
    fn from(error: KeyError) -> Self {
        let said = error.to_string();
        match error {
            KeyError::Io { .. } | KeyError::Randomness => Self::internal("keeping API keys", &said),
            KeyError::Rule(_) => Self::new(StatusCode::BAD_REQUEST, Code::BadRequest, said),
            KeyError::Full => Self::conflict(said),
        }
    }
}

/// The models of this node
#[utoipa::path(get, path = "/v1/catalog", tag = "models", responses(
    (status = 200, body = ModelLines), (status = 401, body = ErrorBody)))]
pub(super) async fn list(State(app): State<App>) -> Json<ModelLines> {
    let models = app.handle.hosted().models.list().into_iter();
    let models = models.map(ModelLine::of).collect();
    Json(ModelLines { currency: app.handle.facts().currency.clone(), models })
}

/// Add a model, or change the one of that name
#[utoipa::path(put, path = "/v1/catalog/{name}", tag = "models", request_body = ModelSpec,
    params(("name" = String, Path, description = "What it is called")), responses(
    (status = 200, body = ModelLine), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody), (status = 404, body = ErrorBody),
    (status = 409, body = ErrorBody)))]
pub(super) async fn put(
    State(app): State<App>,
    Path(name): Path<String>,
    Input(spec): Input<ModelSpec>,
) -> Result<Json<ModelLine>, ApiError> {
    let models = &app.handle.hosted().models;
    let entry = models.put(name, spec.read()?).await?;
    // What a model names is not to make room for anything else.
    if let Some(root) = entry.pins() {
        app.handle.ask(Command::Pin(root, true)).await?;
    }
    let gone = || ApiError::not_found(format!("the model '{}' was removed", entry.name));
    models.listed(&entry.name).map(ModelLine::of).map(Json).ok_or_else(gone)
}

/// Remove a model; its weights stay as a payload that may make room
#[utoipa::path(delete, path = "/v1/catalog/{name}", tag = "models",
    params(("name" = String, Path, description = "What it is called")), responses(
    (status = 204), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(super) async fn remove(
    State(app): State<App>,
    Path(name): Path<String>,
) -> Result<StatusCode, ApiError> {
    let models = &app.handle.hosted().models;
    let known = models.listed(&name);
    if !models.remove(&name)? {
        return Err(ApiError::not_found(format!("there is no model '{name}' at this node")));
    }
    let pinned = known.and_then(|known| known.entry.pins());
    let still = |root| models.list().iter().any(|known| known.entry.pins() == Some(root));
    if let Some(root) = pinned.filter(|root| !still(*root)) {
        match app.handle.ask(Command::Pin(root, false)).await? {
            Reply::Pinned => {}
            other => tracing::warn!(?other, "the weights of a model stay pinned"),
        }
    }
    Ok(StatusCode::NO_CONTENT)
}

/// The API keys of this node
#[utoipa::path(get, path = "/v1/api-keys", tag = "models", responses(
    (status = 200, body = KeyLines), (status = 401, body = ErrorBody)))]
pub(super) async fn keys(State(app): State<App>) -> Json<KeyLines> {
    let keys = app.handle.hosted().keys.list().into_iter().map(KeyLine::of).collect();
    Json(KeyLines { currency: app.handle.facts().currency.clone(), keys })
}

/// Make an API key; it is shown this once
#[utoipa::path(post, path = "/v1/api-keys", tag = "models", request_body = KeySpec, responses(
    (status = 201, body = KeyMade), (status = 400, body = ErrorBody),
    (status = 401, body = ErrorBody), (status = 409, body = ErrorBody)))]
pub(super) async fn add_key(
    State(app): State<App>,
    Input(spec): Input<KeySpec>,
) -> Result<(StatusCode, Json<KeyMade>), ApiError> {
    let budget = spec.budget.as_deref().map(quantity::amount).transpose();
    let budget = budget.map_err(|why| ApiError::field("budget", why))?;
    let expires = spec.expires.as_deref().map(quantity::span).transpose();
    let expires = expires.map_err(|why| ApiError::field("expires", why))?;
    let grant = Grant {
        name: spec.name,
        models: spec.models,
        rpm: spec.rpm,
        tpm: spec.tpm,
        concurrency: spec.concurrency,
        budget,
        expires: expires.map(|span| crate::clock::now().wall + span),
    };
    let keys = app.handle.hosted().keys.clone();
    let (key, kept) = blocking("making an API key", move || keys.add(grant)).await??;
    Ok((StatusCode::CREATED, Json(KeyMade { key, line: KeyLine::of(kept) })))
}

/// Remove an API key, by its id or name
#[utoipa::path(delete, path = "/v1/api-keys/{id}", tag = "models",
    params(("id" = String, Path, description = "Its id, or its name where only one has it")),
    responses((status = 204), (status = 401, body = ErrorBody), (status = 404, body = ErrorBody)))]
pub(super) async fn remove_key(
    State(app): State<App>,
    Path(id): Path<String>,
) -> Result<StatusCode, ApiError> {
    let keys = app.handle.hosted().keys.clone();
    let named = id.clone();
    if blocking("removing an API key", move || keys.remove(&named)).await?? {
        return Ok(StatusCode::NO_CONTENT);
    }
    Err(ApiError::not_found(format!("there is no API key '{id}', or several have that name")))
}

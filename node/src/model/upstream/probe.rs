//! How an upstream is: its models, its health, its load, and whether it has `/v1/responses`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use hyper::http::uri::PathAndQuery;
use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde_json::Value;
use tokio::time::timeout;

use super::gauges::Gauges;
use super::{Inner, path_of, relay};
use crate::model::engine::State;
use crate::openai::{Endpoint, Fault};

/// The longest answer to a probe, in bytes: vLLM's histograms come to some hundred thousand.
const ANSWER: usize = 4 << 20;
/// How many models are taken over from a list.
const MODELS: usize = 1_024;

/// What a probe found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Found {
    /// Whether the model that it is asked for can answer there.
    pub state: State,
    /// What it is, as far as its list of models shows it.
    pub server: Server,
    /// Its models; at most 1,024.
    pub models: Vec<Listed>,
    /// How busy it says it is, where it does.
    pub gauges: Option<Gauges>,
    /// Of that, what others have asked of it: so many that run, and wait.
    pub others: (u64, u64),
    /// Whether it has `/v1/responses`, where that is known.
    pub responses: Option<bool>,
    /// Whether it was asked for that.
    asked_responses: bool,
}

/// A model of an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name there.
    pub id: String,
    /// How many tokens it can look back on, where the upstream says so.
    pub context: Option<u32>,
}

/// What serves, by the owner that every model in its list names.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Server {
    /// It refuses every name that it does not list.
    Vllm,
    /// It takes any name for its one model, and lists that while it is still loading it.
    Llama,
    /// It loads models when they are asked for, and says at `/api/ps` which are.
    Ollama,
    /// Anything else. It is asked nothing that it need not know: some answer whatever they are asked, and
    /// some take a look at their health for an order to try all their models.
    #[default]
    Other,
}

impl Server {
    fn of(owner: &str) -> Self {
        match owner {
            "vllm" => Self::Vllm,
            "llamacpp" => Self::Llama,
            "library" => Self::Ollama,
            _ => Self::Other,
        }
    }
}

impl Found {
    const fn loading(server: Server, models: Vec<Listed>) -> Self {
        let (state, others) = (State::Loading, (0, 0));
        let (gauges, responses, asked_responses) = (None, None, false);
        Self { state, server, models, gauges, others, responses, asked_responses }
    }

    /// The model that it has under this name.
    #[must_use]
    pub fn listed(&self, model: &str) -> Option<&Listed> {
        self.models.iter().find(|listed| is_called(&listed.id, model))
    }

    /// The model that it has, where it is the only one.
    #[must_use]
    pub fn only(&self) -> Option<&Listed> {
        match self.models.as_slice() {
            [only] if self.server == Server::Llama => Some(only),
            _ => None,
        }
    }

    /// What to tell an operator who wants this model of it; nothing of a server that may have more than it
    /// lists.
    pub(super) fn lacks(&self, model: &str) -> Option<String> {
        if !matches!(self.server, Server::Vllm | Server::Ollama) || self.listed(model).is_some() {
            return None;
        }
        let known: Vec<_> = self.models.iter().take(5).map(|known| known.id.as_str()).collect();
        let more = if self.models.len() > known.len() { ", …" } else { "" };
        Some(format!("the server does not list '{model}': it has {}{more}", known.join(", ")))
    }
}

/// Ollama takes a name without a tag for that with the usual one.
fn is_called(id: &str, model: &str) -> bool {
    id == model || id.strip_suffix(":latest") == Some(model)
}

pub(super) async fn probe(inner: &Arc<Inner>) -> Result<Found, Fault> {
    let found = look(inner).await;
    inner.set_state(found.as_ref().map_or(State::Down, |found| found.state));
    let mut probed = inner.probed();
    match &found {
        Ok(found) => {
            // While it loads it says less than it has.
            let known = probed.found.take().filter(|_| found.state == State::Loading);
            let (models, server, responses) = match known {
                Some(known) => (known.models, known.server, known.responses),
                None => (found.models.clone(), found.server, found.responses),
            };
            probed.found = Some(Found { models, server, responses, ..found.clone() });
            probed.fault = None;
        }
        Err(fault) => probed.fault = Some(fault.clone()),
    }
    drop(probed);
    found
}

/// Only its list of models decides whether it is there: all else it may answer late or not at all, as
/// llama-server does while it works.
async fn look(inner: &Arc<Inner>) -> Result<Found, Fault> {
    let address = inner.links.address();
    let get = |path| send(inner, Method::GET, path, Bytes::new());
    let well = |answer: Result<(StatusCode, Bytes), Fault>| {
        answer.ok().filter(|(status, _)| status.is_success()).map(|(_, body)| body)
    };
    let (status, body) = get(address.api("/v1/models")).await?;
    if status == StatusCode::SERVICE_UNAVAILABLE {
        return Ok(Found::loading(Server::default(), Vec::new()));
    }
    if !status.is_success() {
        return Err(match status {
            StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => {
                Fault::unavailable("The engine refused the key.")
            }
            _ => {
                Fault::bad_upstream(format!("The engine answered {status} when asked for models."))
            }
        });
    }
    let (mut models, server) = models(&body)?;
    let known = inner.probed().clone();
    // What does not change while it runs is asked once; it may be another one since it was away.
    let same = known.fault.is_none()
        && known.found.as_ref().is_some_and(|known| known.state != State::Loading);
    let known = known.found.filter(|known| known.server == server);
    if matches!(server, Server::Vllm | Server::Llama) {
        let health = get(address.beside("/health")).await;
        if health.is_ok_and(|(status, _)| status == StatusCode::SERVICE_UNAVAILABLE) {
            // vLLM answers nothing until it has loaded.
            return match server {
                Server::Vllm => Err(Fault::unavailable("The engine says that it is not well.")),
                _ => Ok(Found::loading(server, models)),
            };
        }
    }
    if let (Server::Llama, [only]) = (server, models.as_mut_slice())
        && only.context.is_none()
    {
        let before = known.as_ref().and_then(Found::only).and_then(|known| known.context);
        // It says there how long its sequences may be; its list says what the model was trained for.
        let said = match before.filter(|_| same) {
            Some(_) => None,
            None => well(get(address.beside("/props")).await).as_deref().and_then(slot),
        };
        only.context = said.or(before);
    }
    let loaded = match server {
        Server::Ollama => well(get(address.beside("/api/ps")).await).as_deref().and_then(loaded),
        _ => None,
    };
    let gauges = match server {
        Server::Ollama => None,
        _ => well(get(address.beside("/metrics")).await),
    };
    let gauges = gauges.and_then(|body| Gauges::read(std::str::from_utf8(&body).ok()?));
    let others = gauges.map_or((0, 0), |gauges| {
        // This node's own requests run first, and what of them does not run waits.
        let own = u64::from(inner.active.load(Ordering::Acquire));
        let (running, waiting) = (gauges.running.unwrap_or(0), gauges.waiting.unwrap_or(0));
        let own_waiting = own.saturating_sub(running);
        (running.saturating_sub(own), waiting.saturating_sub(own_waiting))
    });
    let before = known.as_ref().and_then(|known| known.responses);
    let asked = same && known.as_ref().is_some_and(|known| known.asked_responses);
    let said = match asked {
        true => None,
        // A request without anything in it costs nothing: whoever knows the path refuses it.
        false => {
            let path = path_of(inner, Endpoint::Responses);
            let asked = send(inner, Method::POST, path, Bytes::from_static(b"{}")).await;
            match asked.map(|(status, _)| status.as_u16()) {
                Ok(404 | 405 | 501) => Some(false),
                Ok(400 | 422) => Some(true),
                // Some answer anything with 200.
                _ => None,
            }
        }
    };
    let (responses, asked_responses) = (said.or(before), true);
    let mut found =
        Found { state: State::Warm, server, models, gauges, others, responses, asked_responses };
    if let Some(model) = &inner.model {
        let loaded = loaded.is_none_or(|loaded| loaded.iter().any(|id| is_called(id, model)));
        if server == Server::Vllm && found.listed(model).is_none() {
            found.state = State::Down;
        } else if !loaded {
            found.state = State::Cold;
        }
    }
    Ok(found)
}

/// How many tokens each sequence of llama-server has.
fn slot(body: &[u8]) -> Option<u32> {
    #[derive(Deserialize)]
    struct Props {
        default_generation_settings: Settings,
    }
    #[derive(Deserialize)]
    struct Settings {
        n_ctx: u32,
    }
    let props: Props = serde_json::from_slice(body).ok()?;
    Some(props.default_generation_settings.n_ctx).filter(|context| *context > 0)
}

/// The models that Ollama has in memory; none where it is no Ollama.
fn loaded(body: &[u8]) -> Option<Vec<String>> {
    #[derive(Deserialize)]
    struct List {
        models: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        name: String,
    }
    let list: List = serde_json::from_slice(body).ok()?;
    Some(list.models.into_iter().take(MODELS).map(|Item { name }| name).collect())
}

/// Sends a request that is answered shortly, by a status and perhaps by something to read.
async fn send(
    inner: &Arc<Inner>,
    method: Method,
    path: Option<PathAndQuery>,
    body: Bytes,
) -> Result<(StatusCode, Bytes), Fault> {
    let request = inner.request(method, path, "*/*", body)?;
    let wait = inner.waits.probe;
    let answer = async {
        let sent = inner.links.send(request).await;
        let (response, link) = sent.map_err(|error| inner.unreached(&error))?;
        let status = response.status();
        let mut body = response.into_body();
        let read = relay::read(&mut body, ANSWER, wait).await;
        let read = read.map_err(relay::Unread::fault)?;
        drop(body);
        inner.links.keep(link).await;
        Ok((status, read))
    };
    let late = |_| Fault::timeout("The engine did not answer a probe in time.");
    timeout(wait, answer).await.map_err(late)?
}

/// What it lists, and what it is.
fn models(body: &[u8]) -> Result<(Vec<Listed>, Server), Fault> {
    #[derive(Deserialize)]
    struct List {
        data: Vec<Item>,
    }
    // Only the names have to be what they should be: everything else is as each server likes.
    #[derive(Deserialize)]
    struct Item {
        id: String,
        #[serde(default)]
        owned_by: Value,
        /// vLLM's name for it.
        #[serde(default)]
        max_model_len: Value,
        #[serde(default)]
        context_length: Value,
    }
    let list: List = serde_json::from_slice(body)
        .map_err(|_| Fault::bad_upstream("The engine answered no list of models."))?;
    let fits = |id: &str| {
        let printable = !id.chars().any(char::is_control);
        !id.is_empty() && id.len() <= crate::openai::request::MODEL && printable
    };
    let owners = || list.data.iter().map(|item| item.owned_by.as_str().unwrap_or_default());
    let owners = || owners().map(Server::of);
    let all = |server: Server| !list.data.is_empty() && owners().all(|other| other == server);
    // Ollama names whoever made a model, where that is not its own library.
    let server = match [Server::Vllm, Server::Llama].into_iter().find(|server| all(*server)) {
        Some(server) => server,
        None if owners().any(|other| other == Server::Ollama)
            && !owners().any(|other| matches!(other, Server::Vllm | Server::Llama)) =>
        {
            Server::Ollama
        }
        None => Server::Other,
    };
    let tokens = |value: &Value| {
        value.as_u64().and_then(|tokens| u32::try_from(tokens).ok()).filter(|tokens| *tokens > 0)
    };
    let items = list.data.into_iter().filter(|item| fits(&item.id)).take(MODELS);
    let listed = items.map(|Item { id, max_model_len, context_length, .. }| Listed {
        id,
        context: tokens(&max_model_len).or_else(|| tokens(&context_length)),
    });
    Ok((listed.collect(), server))
}

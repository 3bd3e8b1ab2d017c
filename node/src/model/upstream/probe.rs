//! How an upstream is: its models, its health, its load, and whether it has `/v1/responses`.

use std::sync::Arc;

use bytes::Bytes;
use hyper::http::uri::PathAndQuery;
use hyper::{Method, StatusCode};
use serde::Deserialize;
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
    /// Its models; at most 1,024.
    pub models: Vec<Listed>,
    /// Whether it has no others, whatever it is asked for. llama-server takes any name for its one.
    pub strict: bool,
    /// How busy it says it is, where it does.
    pub gauges: Option<Gauges>,
    /// Whether it has `/v1/responses`, where that is known.
    pub responses: Option<bool>,
}

/// A model of an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name there.
    pub id: String,
    /// How many tokens it can look back on, where the upstream says so.
    pub context: Option<u32>,
}

impl Found {
    /// The model that it has under this name.
    #[must_use]
    pub fn listed(&self, model: &str) -> Option<&Listed> {
        self.models.iter().find(|listed| is_called(&listed.id, model))
    }

    /// The model that it has, where it is the only one.
    #[must_use]
    pub fn only(&self) -> Option<&Listed> {
        match self.models.as_slice() {
            [only] if !self.strict => Some(only),
            _ => None,
        }
    }

    /// What to tell an operator who wants this model of it; nothing of a server that takes any name.
    pub(super) fn lacks(&self, model: &str) -> Option<String> {
        if !self.strict {
            return None;
        }
        let known: Vec<_> = self.models.iter().take(5).map(|known| known.id.as_str()).collect();
        let more = if self.models.len() > known.len() { ", …" } else { "" };
        Some(match known.is_empty() {
            true => format!("the server has no model '{model}', nor any other"),
            false => {
                format!("the server has no model '{model}': it has {}{more}", known.join(", "))
            }
        })
    }
}

/// Ollama takes a name without a tag for that with the usual one.
fn is_called(id: &str, model: &str) -> bool {
    id == model || id.strip_suffix(":latest") == Some(model)
}

pub(super) async fn probe(inner: &Arc<Inner>) -> Result<Found, Fault> {
    let found = look(inner).await;
    inner.set_state(found.as_ref().map_or(State::Down, |found| found.state));
    *inner.found() = Some(found.clone());
    found
}

async fn look(inner: &Arc<Inner>) -> Result<Found, Fault> {
    let address = inner.links.address();
    let get = |path| send(inner, Method::GET, path, Bytes::new());
    // Where there is none, nothing is wrong: Ollama has none.
    let (health, _) = get(address.beside("/health")).await?;
    let (status, body) = get(address.api("/v1/models")).await?;
    let loading = StatusCode::SERVICE_UNAVAILABLE;
    if health == loading || status == loading {
        let (state, models) = (State::Loading, Vec::new());
        return Ok(Found { state, models, strict: false, gauges: None, responses: None });
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
    let (mut models, is_vllm) = models(&body)?;
    // What does not change while it runs is asked once.
    let known = match &*inner.found() {
        Some(Ok(found)) if found.state != State::Loading => Some(found.clone()),
        _ => None,
    };
    if let ([only], true) = (models.as_mut_slice(), health.is_success())
        && only.context.is_none()
    {
        only.context = match &known {
            Some(known) => known.only().and_then(|known| known.context),
            // llama-server says there how long its sequences may be; its list says what the model
            // was trained for.
            None => match get(address.beside("/props")).await? {
                (status, body) if status.is_success() => slot(&body),
                _ => None,
            },
        };
    }
    // Ollama alone says which of its models are in memory.
    let loaded = match health.is_success() {
        true => None,
        false => match get(address.beside("/api/ps")).await? {
            (status, body) if status.is_success() => loaded(&body),
            _ => None,
        },
    };
    let gauges = match get(address.beside("/metrics")).await? {
        (status, body) if status.is_success() => {
            std::str::from_utf8(&body).ok().and_then(Gauges::read)
        }
        _ => None,
    };
    let responses = match known.and_then(|known| known.responses) {
        Some(known) => Some(known),
        None => {
            // A request without anything in it costs nothing: whoever knows the path refuses it.
            let path = path_of(inner, Endpoint::Responses);
            let (status, _) = send(inner, Method::POST, path, Bytes::from_static(b"{}")).await?;
            match status.as_u16() {
                404 | 405 | 501 => Some(false),
                200 | 400 | 422 => Some(true),
                _ => None,
            }
        }
    };
    let strict = is_vllm || loaded.is_some();
    let mut found = Found { state: State::Warm, models, strict, gauges, responses };
    if let Some(model) = &inner.model {
        if strict && found.listed(model).is_none() {
            found.state = State::Down;
        } else if loaded.is_some_and(|loaded| !loaded.iter().any(|id| is_called(id, model))) {
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

/// What it lists, and whether it is vLLM, which refuses every other name.
fn models(body: &[u8]) -> Result<(Vec<Listed>, bool), Fault> {
    #[derive(Deserialize)]
    struct List {
        data: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        id: String,
        owned_by: Option<String>,
        /// vLLM's name for it.
        max_model_len: Option<u32>,
        context_length: Option<u32>,
    }
    let list: List = serde_json::from_slice(body)
        .map_err(|_| Fault::bad_upstream("The engine answered no list of models."))?;
    let fits = |id: &str| {
        let printable = !id.chars().any(char::is_control);
        !id.is_empty() && id.len() <= crate::openai::request::MODEL && printable
    };
    let is_vllm = list.data.iter().any(|item| item.owned_by.as_deref() == Some("vllm"));
    let items = list.data.into_iter().filter(|item| fits(&item.id)).take(MODELS);
    let listed = items.map(|Item { id, max_model_len, context_length, .. }| Listed {
        id,
        context: max_model_len.or(context_length),
    });
    Ok((listed.collect(), is_vllm))
}

//! How an upstream is: its models, its health, its load, and whether it has `/v1/responses`.

use std::sync::Arc;
use std::sync::PoisonError;

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
    /// Whether it can answer.
    pub state: State,
    /// Its models; at most 1,024.
    pub models: Vec<Listed>,
    /// How busy it says it is, where it does.
    pub gauges: Option<Gauges>,
}

/// A model of an upstream.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Listed {
    /// Its name there.
    pub id: String,
    /// How many tokens it can look back on, where the upstream says so.
    pub context: Option<u32>,
}

pub(super) async fn probe(inner: &Arc<Inner>) -> Result<Found, Fault> {
    let found = look(inner).await;
    match &found {
        Ok(found) => {
            inner.set_state(found.state);
            *inner.gauges.lock().unwrap_or_else(PoisonError::into_inner) = found.gauges;
        }
        Err(_) => inner.set_state(State::Down),
    }
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
        return Ok(Found { state: State::Loading, models: Vec::new(), gauges: None });
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
    let models = models(&body)?;
    let gauges = match get(address.beside("/metrics")).await? {
        (status, body) if status.is_success() => {
            std::str::from_utf8(&body).ok().and_then(Gauges::read)
        }
        _ => None,
    };
    let known = *inner.responses.lock().unwrap_or_else(PoisonError::into_inner);
    if known.is_none() {
        // A request without anything in it costs nothing: whoever knows the path refuses it.
        let path = path_of(inner, Endpoint::Responses);
        let (status, _) = send(inner, Method::POST, path, Bytes::from_static(b"{}")).await?;
        let has = match status.as_u16() {
            404 | 405 | 501 => Some(false),
            200 | 400 | 422 => Some(true),
            _ => None,
        };
        *inner.responses.lock().unwrap_or_else(PoisonError::into_inner) = has;
    }
    Ok(Found { state: State::Warm, models, gauges })
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

fn models(body: &[u8]) -> Result<Vec<Listed>, Fault> {
    #[derive(Deserialize)]
    struct List {
        data: Vec<Item>,
    }
    #[derive(Deserialize)]
    struct Item {
        id: String,
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
    let items = list.data.into_iter().filter(|item| fits(&item.id)).take(MODELS);
    Ok(items
        .map(|Item { id, max_model_len, context_length }| Listed {
            id,
            context: max_model_len.or(context_length),
        })
        .collect())
}

//! A model behind another server that speaks OpenAI's API: vLLM, llama-server, Ollama.
//!
//! ```text
//!   ask --> link (kept alive) --> POST --> head --> error? --> a fault, translated
//!                                           |
//!             whole: the body, read at once + stream: relay, event by event
//!                                           |
//!                     tally: what was said, what can be believed of its usage
//! ```
//!
//! The server is not trusted with anything: it may be slow, hang, break off, send garbage or
//! megabytes, and report tokens that it never made. Everything waits within [`Waits`] and is read
//! within bounds, and its usage is believed as far as [`tally`](crate::openai::tally) says. Where
//! it reports none, a stream counts one token for each chunk with text and nothing for the prompt,
//! while a whole answer, of which nothing can be counted, is refused with 502.
//!
//! To drop what [`Engine::ask`] gave closes the connection, on which servers stop.

mod address;
mod gauges;
mod link;
mod measure;
mod probe;
mod relay;

use std::fmt;
use std::io::Read as _;
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use futures::future::BoxFuture;
use http_body_util::Full;
use hyper::header::{self, HeaderValue};
use hyper::http::uri::PathAndQuery;
use hyper::{Method, Request, Uri};
use thiserror::Error;

use super::engine::{Ask, Engine, Load, Nature, Pieces, State, share};
use crate::openai::{Endpoint, Fault};
use link::{LinkError, Links};
use measure::Measured;

pub use address::{Address, AddressError};
pub use gauges::Gauges;
pub use link::TlsError;
pub use probe::{Found, Listed, Server};
pub use rustls::pki_types::CertificateDer;

/// How long to wait for an upstream.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Waits {
    /// For a connection, TLS included.
    pub connect: Duration,
    /// For the first event of a stream: a full queue and a long prompt are within it.
    pub first: Duration,
    /// Between bytes of an answer that has begun.
    pub between: Duration,
    /// For the whole of an answer that is no stream.
    pub whole: Duration,
    /// For the whole of a stream.
    pub stream: Duration,
    /// For each answer to a probe.
    pub probe: Duration,
}

impl Default for Waits {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(5),
            first: Duration::from_secs(120),
            between: Duration::from_secs(60),
            whole: Duration::from_secs(600),
            stream: Duration::from_secs(7_200),
            probe: Duration::from_secs(5),
        }
    }
}

/// An upstream and how to speak to it.
#[derive(Clone, Debug)]
pub struct Config {
    /// Where it is.
    pub address: Address,
    /// Its key, where it wants one.
    pub key: Option<Key>,
    /// The model's name there; None for the name that requests have.
    pub model: Option<String>,
    /// How long to wait for it.
    pub waits: Waits,
    /// How many requests it gets at once; more are refused with 503.
    pub most_active: u32,
    /// Authorities to be trusted beside those of the host, for `https`.
    pub roots: Vec<CertificateDer<'static>>,
}

impl Config {
    /// How many requests an upstream gets at once, unless it is said otherwise.
    pub const MOST_ACTIVE: u32 = 512;

    /// The upstream at this address, with the usual waits and without a key.
    #[must_use]
    pub fn new(address: Address) -> Self {
        let waits = Waits::default();
        let most_active = Self::MOST_ACTIVE;
        Self { address, key: None, model: None, waits, most_active, roots: Vec::new() }
    }
}

/// A key for an upstream. It is never shown.
#[derive(Clone, PartialEq, Eq)]
pub struct Key(HeaderValue);

/// A key cannot be had.
#[derive(Debug, Error)]
pub enum KeyError {
    /// The file cannot be read.
    #[error("cannot read the key: {0}")]
    Io(#[from] std::io::Error),
    /// What it holds is no key: one line of visible ASCII, at most 4 KiB.
    #[error("the file holds no key: one line of at most 4096 visible characters")]
    Malformed,
}

impl Key {
    const LONGEST: usize = 4_096;

    /// A key as text; white space around it counts for nothing.
    ///
    /// # Errors
    /// When it is empty, too long, or has anything but visible ASCII.
    pub fn new(text: &str) -> Result<Self, KeyError> {
        let text = text.trim();
        let fits = !text.is_empty() && text.len() <= Self::LONGEST;
        if !fits || !text.bytes().all(|byte| byte.is_ascii_graphic()) {
            return Err(KeyError::Malformed);
        }
        let value = HeaderValue::from_str(&format!("Bearer {text}"));
        let mut value = value.map_err(|_| KeyError::Malformed)?;
        value.set_sensitive(true);
        Ok(Self(value))
    }

    /// Reads a key from a file.
    ///
    /// # Errors
    /// When the file cannot be read or holds no key.
    pub fn read(path: &Path) -> Result<Self, KeyError> {
        let mut text = String::new();
        let most = Self::LONGEST as u64 + 64;
        std::fs::File::open(path)?.take(most).read_to_string(&mut text)?;
        Self::new(&text)
    }
}

impl fmt::Debug for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Key(…)")
    }
}

/// What happened so far.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counts {
    /// Requests sent.
    pub asked: u64,
    /// Requests that came to a fault, before their first piece or after.
    pub failed: u64,
    /// Requests that were given up.
    pub dropped: u64,
    /// Answers whose usage was more than can be.
    pub implausible: u64,
    /// Streams without usage.
    pub unreported: u64,
    /// Connections made.
    pub connected: u64,
    /// Requests sent over a connection that was there already.
    pub reused: u64,
}

#[derive(Debug, Default)]
struct Counters {
    asked: AtomicU64,
    failed: AtomicU64,
    dropped: AtomicU64,
    implausible: AtomicU64,
    unreported: AtomicU64,
}

/// A model behind another server.
#[derive(Clone, Debug)]
pub struct Upstream {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    links: Links,
    key: Option<Key>,
    model: Option<String>,
    waits: Waits,
    most_active: u32,
    active: AtomicU32,
    state: AtomicU8,
    measured: Measured,
    probed: Mutex<Probed>,
    counters: Counters,
    /// Whether it was said already that it reports no usage or too much.
    warned: AtomicBool,
}

/// What probes found.
#[derive(Clone, Debug, Default)]
struct Probed {
    /// When one last found something.
    found: Option<Found>,
    /// Why the last one found nothing, if it did not.
    fault: Option<Fault>,
}

/// One of the requests being answered, for as long as it is held.
#[derive(Debug)]
struct Active(Arc<Inner>);

impl Drop for Active {
    fn drop(&mut self) {
        self.0.active.fetch_sub(1, Ordering::AcqRel);
    }
}

impl Upstream {
    /// An adapter for the upstream; nothing is sent yet.
    ///
    /// # Errors
    /// When the address wants TLS and it cannot be set up.
    pub fn new(config: Config) -> Result<Self, TlsError> {
        let Config { address, key, model, waits, most_active, roots } = config;
        let inner = Inner {
            links: Links::new(address, waits.connect, roots)?,
            key,
            model,
            waits,
            most_active,
            active: AtomicU32::new(0),
            state: AtomicU8::new(0),
            measured: Measured::default(),
            probed: Mutex::default(),
            counters: Counters::default(),
            warned: AtomicBool::new(false),
        };
        Ok(Self { inner: Arc::new(inner) })
    }

    /// Where it is.
    #[must_use]
    pub fn address(&self) -> &Address {
        self.inner.links.address()
    }

    /// What happened so far.
    #[must_use]
    pub fn counts(&self) -> Counts {
        let Counters { asked, failed, dropped, implausible, unreported } = &self.inner.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        Counts {
            asked: read(asked),
            failed: read(failed),
            dropped: read(dropped),
            implausible: read(implausible),
            unreported: read(unreported),
            connected: read(&self.inner.links.made),
            reused: read(&self.inner.links.reused),
        }
    }

    /// Asks it how it is: its models, its health, its load. To be done every few seconds; also
    /// what [`Engine::load`] says comes from it.
    ///
    /// # Errors
    /// When it cannot be reached or answers no list of models.
    pub async fn probe(&self) -> Result<Found, Fault> {
        probe::probe(&self.inner).await
    }
}

impl Engine for Upstream {
    fn ask(&self, ask: Ask) -> BoxFuture<'_, Result<Pieces, Fault>> {
        Box::pin(relay::ask(&self.inner, ask))
    }

    fn warm(&self) -> BoxFuture<'_, ()> {
        Box::pin(async {
            if let Err(fault) = self.probe().await {
                tracing::debug!(%fault, "an upstream is not there");
            }
        })
    }

    fn nature(&self) -> Nature {
        let probed = self.inner.probed();
        let trouble = probed.fault.as_ref().map(|fault| fault.message.clone());
        let Some(found) = &probed.found else { return Nature { trouble, ..Nature::default() } };
        let model = self.inner.model.as_deref();
        let listed = model.and_then(|model| found.listed(model)).or_else(|| found.only());
        Nature {
            context: listed.and_then(|listed| listed.context),
            responses: found.responses,
            trouble: trouble.or_else(|| found.lacks(model?)),
        }
    }

    fn load(&self) -> Load {
        let averages = self.inner.measured.now();
        let (gauges, others) = match &*self.inner.probed() {
            Probed { found: Some(found), fault: None } => {
                (found.gauges.unwrap_or_default(), found.others)
            }
            _ => (Gauges::default(), (0, 0)),
        };
        let small = |figure: u64| u32::try_from(figure).unwrap_or(u32::MAX);
        let own = self.inner.active.load(Ordering::Acquire);
        let said = gauges.tokens_per_second.map(small);
        Load {
            state: self.inner.state(),
            // Others may ask it as well.
            active: own.saturating_add(small(others.0)),
            queued: small(others.1),
            tokens_per_second: averages.tokens_per_second().or(said).unwrap_or(0),
            prefill_per_second: averages.prefill_per_second().unwrap_or(0),
            cached_permille: gauges
                .cache_hits
                .zip(gauges.cache_queries)
                .and_then(|(hits, queries)| share(hits, queries)),
            first_token: averages.first_token(),
        }
    }
}

impl Inner {
    fn probed(&self) -> MutexGuard<'_, Probed> {
        self.probed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self) -> State {
        match self.state.load(Ordering::Acquire) {
            1 => State::Cold,
            2 => State::Loading,
            3 => State::Warm,
            _ => State::Down,
        }
    }

    fn set_state(&self, state: State) {
        let number = match state {
            State::Down => 0,
            State::Cold => 1,
            State::Loading => 2,
            State::Warm => 3,
        };
        self.state.store(number, Ordering::Release);
    }

    /// A place among the requests being answered, if there is one.
    fn begin(self: &Arc<Self>) -> Result<Active, Fault> {
        let before = self.active.fetch_add(1, Ordering::AcqRel);
        let active = Active(self.clone());
        if before >= self.most_active {
            return Err(Fault::overloaded(Duration::from_secs(1)));
        }
        Ok(active)
    }

    fn request(
        &self,
        method: Method,
        path: Option<PathAndQuery>,
        accept: &'static str,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, Fault> {
        const AGENT: HeaderValue =
            HeaderValue::from_static(concat!("leasehold/", env!("CARGO_PKG_VERSION")));
        let path = path.ok_or_else(Fault::internal)?;
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = method;
        *request.uri_mut() = Uri::from(path);
        let headers = request.headers_mut();
        headers.insert(header::HOST, self.links.address().authority.clone());
        headers.insert(header::USER_AGENT, AGENT);
        headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
        let json = HeaderValue::from_static("application/json");
        if request.method() == Method::POST {
            request.headers_mut().insert(header::CONTENT_TYPE, json);
        }
        if let Some(Key(value)) = &self.key {
            request.headers_mut().insert(header::AUTHORIZATION, value.clone());
        }
        Ok(request)
    }

    /// A fault for a request that got no answer.
    fn unreached(&self, error: &LinkError) -> Fault {
        tracing::warn!(upstream = %self.links.address(), %error, "no answer from the upstream");
        match error {
            LinkError::Connect(_) => {
                self.set_state(State::Down);
                Fault::unavailable("The serving node cannot reach its engine.")
            }
            LinkError::Broken(_) => {
                Fault::bad_upstream("The serving node's engine broke off before it answered.")
            }
        }
    }
}

/// The path of an endpoint.
fn path_of(inner: &Inner, endpoint: Endpoint) -> Option<PathAndQuery> {
    inner.links.address().api(endpoint.path())
}

#[cfg(test)]
mod tests;

//! One request to an upstream, from its head to the last event.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::{Bytes, BytesMut};
use http_body_util::BodyExt as _;
use hyper::body::{Body as _, Incoming};
use hyper::header;
use hyper::{HeaderMap, Method, Response, StatusCode};
use tokio::sync::mpsc;
use tokio::time::{Instant, sleep_until, timeout, timeout_at};

use super::link::Link;
use super::measure::Timed;
use super::{Active, Inner};
use crate::model::engine::{Ask, Piece, Pieces, State, WAITING};
use crate::openai::rewrite::{CHUNK, WHOLE};
use crate::openai::sse::{self, Parser};
use crate::openai::tally::{Bounds, Seen, Tally};
use crate::openai::{Counted, Fault, request};

/// The longest error body that is read.
const ERROR: usize = 64 << 10;
/// How long a connection may take to end an answer that is complete.
const DRAIN: Duration = Duration::from_secs(1);

/// One request being answered.
struct Exchange {
    inner: Arc<Inner>,
    active: Active,
    tally: Tally,
    bounds: Bounds,
    begun: Instant,
    /// When the first piece with text came, and the last.
    first: Option<Instant>,
    last: Instant,
}

/// Counts a request as given up unless it comes to an end.
struct Ends<'a> {
    inner: &'a Inner,
    ended: bool,
}

impl Ends<'_> {
    fn failed(&mut self) {
        self.ended = true;
        self.inner.counters.failed.fetch_add(1, Ordering::Relaxed);
    }
}

impl Drop for Ends<'_> {
    fn drop(&mut self) {
        if !self.ended {
            self.inner.counters.dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
}

pub(super) async fn ask(inner: &Arc<Inner>, ask: Ask) -> Result<Pieces, Fault> {
    inner.counters.asked.fetch_add(1, Ordering::Relaxed);
    let mut ends = Ends { inner, ended: false };
    let answered = begin(inner, ask).await;
    match &answered {
        Ok(_) => ends.ended = true,
        Err(_) => ends.failed(),
    }
    answered
}

async fn begin(inner: &Arc<Inner>, ask: Ask) -> Result<Pieces, Fault> {
    let active = inner.begin()?;
    let begun = Instant::now();
    let body = match &inner.model {
        Some(model) => request::with_model(&ask.body, model)?,
        None => ask.body,
    };
    let bounds = Bounds::of(ask.endpoint, &body);
    let accept = if ask.stream { "text/event-stream" } else { "application/json" };
    let path = super::path_of(inner, ask.endpoint);
    let request = inner.request(Method::POST, path, accept, body)?;
    let wait = if ask.stream { inner.waits.first } else { inner.waits.whole };
    let until = begun + wait;
    let sent = timeout_at(until, inner.links.send(request)).await.map_err(|_| late(wait))?;
    let (response, link) = sent.map_err(|error| inner.unreached(&error))?;
    if !response.status().is_success() {
        return Err(refused(inner, response, link).await);
    }
    inner.set_state(State::Warm);
    let exchange = Exchange {
        inner: inner.clone(),
        active,
        tally: Tally::new(ask.endpoint, bounds),
        bounds,
        begun,
        first: None,
        last: begun,
    };
    if ask.stream {
        if !has_events(response.headers()) {
            return Err(no_events(inner, response, link).await);
        }
        let (pieces, receiver) = mpsc::channel(WAITING);
        tokio::spawn(exchange.relay(response.into_body(), link, pieces));
        Ok(receiver)
    } else {
        exchange.whole(response.into_body(), link, until).await
    }
}

impl Exchange {
    /// A whole answer. Nobody waits for it but the future that this is part of, so it needs no
    /// task of its own.
    async fn whole(
        mut self,
        mut body: Incoming,
        link: Link,
        until: Instant,
    ) -> Result<Pieces, Fault> {
        let wait = self.inner.waits.whole;
        let whole = read(&mut body, WHOLE, self.inner.waits.between);
        let whole = timeout_at(until, whole).await.map_err(|_| late(wait))?;
        let whole = whole.map_err(|error| error.fault())?;
        match self.tally.see(&whole)? {
            Seen::Failed(fault) => return Err(translated(fault)),
            Seen::Text | Seen::Frame => {}
        }
        if self.tally.settle().reported.is_none() {
            return Err(Fault::bad_upstream(
                "The serving node's engine does not say how many tokens its answer has.",
            ));
        }
        let counted = self.settled();
        keep(&self.inner, body, link).await;
        let (pieces, receiver) = mpsc::channel(2);
        for piece in [Piece::Data(whole), Piece::Done(counted)] {
            // There is room for both.
            let _ = pieces.try_send(Ok(piece));
        }
        Ok(receiver)
    }

    /// A stream, event by event.
    async fn relay(
        mut self,
        mut body: Incoming,
        link: Link,
        pieces: mpsc::Sender<Result<Piece, Fault>>,
    ) {
        let inner = self.inner.clone();
        let mut ends = Ends { inner: &inner, ended: false };
        let end = self.begun + inner.waits.stream;
        let relayed = tokio::select! {
            biased;
            relayed = self.events(&mut body, &pieces) => relayed,
            // Also when it is the reader that does not go on.
            () = sleep_until(end) => Err(broken("the answer takes too long")),
            // Nobody wants it any more; the link is dropped and closes.
            () = pieces.closed() => return,
        };
        // Who is asked next need not wait until this answer is read: the place is free, and a
        // connection that is of no more use is closed, before the last piece goes.
        drop(self.active);
        match relayed {
            Ok(Some(counted)) => {
                ends.ended = true;
                let done = async move {
                    let _ = pieces.send(Ok(Piece::Done(counted))).await;
                };
                tokio::join!(done, keep(&inner, body, link));
            }
            Ok(None) => {}
            Err(fault) => {
                ends.failed();
                drop((body, link));
                let _ = pieces.send(Err(fault)).await;
            }
        }
    }

    /// None when nobody takes the pieces.
    async fn events(
        &mut self,
        body: &mut Incoming,
        pieces: &mpsc::Sender<Result<Piece, Fault>>,
    ) -> Result<Option<Counted>, Fault> {
        let waits = self.inner.waits;
        let mut parser = Parser::new(CHUNK);
        loop {
            // Comments keep a connection alive, but the first token has to come all the same.
            let until = match self.first {
                None => self.begun + waits.first,
                Some(_) => Instant::now() + waits.between,
            };
            let Ok(frame) = timeout_at(until, body.frame()).await else {
                return Err(match self.first {
                    None => late(waits.first),
                    Some(_) => broken("it fell silent"),
                });
            };
            match frame {
                Some(Ok(frame)) => {
                    if let Ok(bytes) = frame.into_data() {
                        parser.push(bytes);
                    }
                }
                Some(Err(_)) => return Err(broken("the connection broke")),
                // `/v1/responses` has no other end than this, after an event that says so.
                None if self.tally.is_finished() && !parser.is_inside() => {
                    return Ok(Some(self.settled()));
                }
                None => return Err(broken("it ended in the middle")),
            }
            loop {
                let event = parser.next_event();
                let event = event.map_err(|_| broken("it sent an event that is too long"))?;
                let Some(event) = event else { break };
                if event.is_done() {
                    return Ok(Some(self.settled()));
                }
                if event.data.is_empty() {
                    continue;
                }
                match self.tally.see(&event.data)? {
                    Seen::Failed(fault) => return Err(translated(fault)),
                    Seen::Text => self.last = Instant::now(),
                    Seen::Frame => {}
                }
                if self.first.is_none() && self.tally.bearing() > 0 {
                    self.first = Some(self.last);
                }
                if self.is_too_much() {
                    return Err(broken("it goes on beyond what it was asked for"));
                }
                if pieces.send(Ok(Piece::Data(event.data))).await.is_err() {
                    return Ok(None);
                }
            }
        }
    }

    /// Whether far more chunks came than tokens were asked for. Some servers make several chunks
    /// of a tool call's token, so this is generous.
    fn is_too_much(&self) -> bool {
        let most = self.bounds.completion.map(|most| most.saturating_mul(2).saturating_add(1_024));
        most.is_some_and(|most| self.tally.bearing() > most)
    }

    /// What the answer comes to, noted and measured.
    fn settled(&self) -> Counted {
        let inner = &self.inner;
        let settled = self.tally.settle();
        let counted = settled.counted;
        let upstream = inner.links.address();
        // Every answer counts, but the log needs to hear it once.
        if settled.is_cut() {
            inner.counters.implausible.fetch_add(1, Ordering::Relaxed);
            if !inner.warned.swap(true, Ordering::Relaxed) {
                let reported = settled.reported;
                tracing::warn!(%upstream, ?reported, ?counted, "usage is more than can be: cut");
            }
        } else if settled.reported.is_none() {
            inner.counters.unreported.fetch_add(1, Ordering::Relaxed);
            if !inner.warned.swap(true, Ordering::Relaxed) {
                tracing::warn!(%upstream, ?counted, "no usage reported: chunks are counted");
            }
        }
        if let Some(first) = self.first {
            inner.measured.add(Timed {
                first: first - self.begun,
                rest: self.last - first,
                read: counted.prompt - counted.cached,
                produced: counted.completion,
            });
        }
        counted
    }
}

/// Reads an answer to its end, so that the connection can be used again, and keeps it.
async fn keep(inner: &Inner, mut body: Incoming, link: Link) {
    let rest = async {
        while !body.is_end_stream() {
            match body.frame().await {
                Some(Ok(_)) => {}
                Some(Err(_)) => return false,
                None => break,
            }
        }
        drop(body);
        true
    };
    let kept = async {
        if rest.await {
            inner.links.keep(link).await;
        }
    };
    // One that takes longer is closed.
    let _ = timeout(DRAIN, kept).await;
}

/// Why a body was not read.
#[derive(Clone, Copy, Debug)]
pub(super) enum Unread {
    TooLong,
    Silent,
    Broken,
}

impl Unread {
    pub(super) fn fault(self) -> Fault {
        match self {
            Self::TooLong => broken("its answer is too long"),
            Self::Silent => broken("it fell silent"),
            Self::Broken => broken("the connection broke"),
        }
    }
}

/// Reads a body of at most so many bytes.
pub(super) async fn read(
    body: &mut Incoming,
    most: usize,
    between: Duration,
) -> Result<Bytes, Unread> {
    let mut first: Option<Bytes> = None;
    let mut whole = BytesMut::new();
    while let Some(frame) = timeout(between, body.frame()).await.map_err(|_| Unread::Silent)? {
        let Ok(data) = frame.map_err(|_| Unread::Broken)?.into_data() else { continue };
        let so_far = whole.len() + first.as_ref().map_or(0, Bytes::len);
        if so_far + data.len() > most {
            return Err(Unread::TooLong);
        }
        // Most answers come in one piece, which need not be copied.
        match first.take() {
            None if whole.is_empty() => first = Some(data),
            first => {
                whole.extend_from_slice(&first.unwrap_or_default());
                whole.extend_from_slice(&data);
            }
        }
    }
    Ok(first.unwrap_or_else(|| whole.freeze()))
}

/// What an answer says that is an error.
async fn refused(inner: &Inner, response: Response<Incoming>, link: Link) -> Fault {
    let status = response.status();
    let wait = response.headers().get(header::RETRY_AFTER);
    let wait = wait.and_then(|value| value.to_str().ok()?.trim().parse().ok());
    let mut body = response.into_body();
    let said = match read(&mut body, ERROR, inner.waits.probe).await {
        Ok(said) => {
            keep(inner, body, link).await;
            said
        }
        Err(_) => Bytes::new(),
    };
    let mut fault = Fault::from_json(status.as_u16(), &said);
    if status.is_server_error()
        || matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN)
    {
        let upstream = inner.links.address();
        tracing::warn!(%upstream, %status, said = %fault, "the upstream refuses");
    }
    // Dates are allowed there, too, but no such server sends them. An hour is long enough.
    let wait = wait.map(|seconds: u64| Duration::from_secs(seconds.min(3_600)));
    fault.retry_after = wait;
    translated(fault)
}

/// An upstream's fault as the serving node's: the client's own mistakes stay what they are, and
/// everything that is between the serving node and its engine becomes that.
fn translated(fault: Fault) -> Fault {
    let wait = fault.retry_after;
    let mut fault = match fault.status {
        400 | 408 | 413 => fault,
        // What this node offers its engine should have: others may have it.
        404 => Fault::unavailable("The serving node's engine does not have that."),
        422 => Fault { status: 400, ..fault },
        429 => fault.after(wait.unwrap_or(Duration::from_secs(1))),
        401..=403 => Fault::unavailable("The serving node's engine refused its key."),
        503 | 529 => Fault::unavailable("The serving node's engine is not available."),
        504 => Fault::unavailable("The serving node's engine timed out."),
        _ => Fault::bad_upstream("The serving node's engine failed."),
    };
    fault.retry_after = fault.retry_after.or(wait);
    fault
}

fn has_events(headers: &HeaderMap) -> bool {
    let content = headers.get(header::CONTENT_TYPE).and_then(|value| value.to_str().ok());
    content.is_some_and(|content| content.trim_start().starts_with("text/event-stream"))
}

/// What is wrong with an answer that should have been a stream: perhaps it says so itself.
async fn no_events(inner: &Inner, response: Response<Incoming>, link: Link) -> Fault {
    let mut body = response.into_body();
    let said = read(&mut body, ERROR, inner.waits.probe).await.unwrap_or_default();
    drop(link);
    match serde_json::from_slice::<serde_json::Value>(&said) {
        Ok(said) if said.get("error").is_some() => translated(Fault::from_value(502, &said)),
        _ => broken("it was asked for a stream and answered none"),
    }
}

fn late(wait: Duration) -> Fault {
    let seconds = wait.as_secs_f32();
    Fault::timeout(format!("The serving node's engine did not answer within {seconds} s."))
}

fn broken(how: &str) -> Fault {
    Fault::bad_upstream(format!("The serving node's engine broke off: {how}."))
}

// What parses events must take whatever may be rewritten later.
const _: () = assert!(sse::EVENT >= CHUNK);

//! What answers requests for a model: the one interface of the embedded engine and of upstreams.

use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::BoxFuture;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

use crate::openai::{Counted, Endpoint, Fault};

/// How many pieces wait for whoever reads them before an engine pauses.
pub const WAITING: usize = 32;

/// One request.
#[derive(Clone, Debug)]
pub struct Ask {
    /// What is asked for.
    pub endpoint: Endpoint,
    /// The JSON that [`Request::forward`](crate::openai::Request::forward) made.
    pub body: Bytes,
    /// Whether the answer is to come in chunks; the body says the same.
    pub stream: bool,
}

/// A piece of an answer.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Piece {
    /// How many tokens were asked, from an engine that knows it before the end: what was asked is
    /// counted also where somebody hangs up.
    Prompt(u64),
    /// One whole JSON text: a chunk of a stream, or the whole answer when it is none.
    Data(Bytes),
    /// The answer is complete; nothing comes after it.
    Done(Counted),
}

/// The pieces of an answer as they come. A fault is the last; an end without [`Piece::Done`] or a
/// fault is a failure, too. To drop it stops the generation. At most [`WAITING`] pieces wait.
pub type Pieces = mpsc::Receiver<Result<Piece, Fault>>;

/// Something that answers requests for one model.
pub trait Engine: Send + Sync + std::fmt::Debug {
    /// Begins to answer. Faults that are known before the first piece come from the future
    /// itself; to drop the future gives up the request.
    fn ask(&self, ask: Ask) -> BoxFuture<'_, Result<Pieces, Fault>>;

    /// Gets ready to answer, and looks whether it is. To be done every few seconds.
    fn warm(&self) -> BoxFuture<'_, ()> {
        futures::future::ready(()).boxed()
    }

    /// How busy and how quick it is. Costs next to nothing.
    fn load(&self) -> Load;

    /// What was found out about it when it was looked at last. Costs next to nothing.
    fn nature(&self) -> Nature {
        Nature::default()
    }
}

/// What an engine was found to be, whatever its operator says of it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nature {
    /// How many tokens it can look back on, where it says so.
    pub context: Option<u32>,
    /// Whether it has `/v1/responses`, where that is known.
    pub responses: Option<bool>,
    /// What is wrong with it, for its operator.
    pub trouble: Option<String>,
}

/// Whether a model can answer.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// Not in memory; the first request loads it.
    Cold,
    /// Being loaded.
    Loading,
    /// Ready.
    Warm,
    /// Cannot answer, or has not been heard of yet.
    #[default]
    Down,
}

/// How busy and how quick an engine is. What was never measured is zero.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Whether it can answer.
    pub state: State,
    /// Requests being answered.
    pub active: u32,
    /// Requests that wait for others.
    pub queued: u32,
    /// Tokens a second that one request gets after its first.
    pub tokens_per_second: u32,
    /// Tokens of a prompt read in a second, those from a cache left out.
    pub prefill_per_second: u32,
    /// Of the tokens that were asked, those that were known from an earlier request, in thousandths;
    /// none where that is not known.
    pub cached_permille: Option<u16>,
    /// From a request to its first token.
    pub first_token: Duration,
}

/// How many thousandths of `all` are `part`; none of nothing.
#[must_use]
pub fn share(part: u64, all: u64) -> Option<u16> {
    let permille = u128::from(part) * 1_000 / u128::from(all.max(1));
    (all > 0).then(|| u16::try_from(permille.min(1_000)).unwrap_or(1_000))
}

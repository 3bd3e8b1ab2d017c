//! OpenAI's shapes, exactly: what the hosted models' API reads and writes.
//!
//! ```text
//!   body --> request  (typed reading, needs, prefix keys, provider)  --> forward --> an engine
//!   sse  <-- rewrite  (id, model, cost, serving node)                <-- pieces  <-- an engine
//!                       tally (what was produced)
//! ```
//!
//! Nothing here opens a socket or reads a clock. Everything a client or an upstream sends is read
//! within stated bounds, and what is refused is refused by name, as a [`Fault`].

pub mod answer;
pub mod catalogue;
pub mod decimal;
#[cfg(test)]
pub(crate) mod dice;
pub mod fault;
mod fields;
mod json;
pub mod message;
pub mod needs;
mod prefix;
pub mod provider;
mod read;
pub mod request;
pub mod rewrite;
pub mod sampling;
pub mod sse;
pub mod tally;

use serde::{Deserialize, Serialize};

pub use fault::{Fault, Kind};
pub use leasehold_proto::words::model::Endpoint;
pub use needs::{Need, Needs};
pub use request::Request;
pub use rewrite::Rewriter;

/// The tokens of one request.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Counted {
    /// Tokens of what was asked, those from a cache included.
    pub prompt: u64,
    /// How many of them came from a cache; at most `prompt`.
    pub cached: u64,
    /// Tokens produced.
    pub completion: u64,
}

impl Counted {
    /// Both together.
    #[must_use]
    pub const fn total(self) -> u64 {
        self.prompt.saturating_add(self.completion)
    }
}

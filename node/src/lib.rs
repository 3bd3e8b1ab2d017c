//! The running node: one loop around the pure core, and the edges that are its hands.
//!
//! ```text
//!              cli  api  metrics                    what people and programs meet
//!                 \  |  /
//!                 handle                            commands in, replies out
//!                    |
//!   verify --->     run     ---> jobs, model        the loop: inputs -> core -> effects
//!      ^           / | \          |  \
//!     net      probe | store    work  data+payload  the edges; none imports another
//! ```
//!
//! Start at [`node::Node`], which assembles everything, then read [`run`].

pub mod api;
pub mod api_key;
pub mod attach;
pub mod batch;
pub mod cli;
pub mod client;
pub mod clock;
pub mod config;
pub mod data;
#[doc(hidden)]
pub mod fuzz;
pub mod gateway;
pub mod handle;
pub mod history;
mod holders;
pub mod home;
pub mod host;
pub mod infer;
mod jobs;
pub mod metrics;
pub mod model;
pub mod net;
pub mod node;
pub mod openai;
pub mod payload;
pub mod probe;
pub mod quantity;
pub mod records;
pub mod run;
pub mod store;
pub mod transcript;
mod verify;
pub mod work;

pub use node::Node;

//! Hosted models with real processes: nodes that sell, a node that clients talk to, servers behind
//! adapters, SDKs before it, and what goes wrong with any of them.
//!
//! Nothing here waits for a fixed time; patience only says when to give up.

#[path = "models/adapter.rs"]
mod adapter;
#[path = "models/clients.rs"]
mod clients;
#[path = "models/fabric.rs"]
mod fabric;
#[path = "models/keys.rs"]
mod keys;
#[path = "models/llama_server.rs"]
mod llama_server;
#[path = "models/replay.rs"]
mod replay;
#[path = "models/sdks.rs"]
mod sdks;
#[path = "models/selling.rs"]
mod selling;
#[path = "models/slack.rs"]
mod slack;
#[path = "models/upstream.rs"]
mod upstream;
#[path = "models/web.rs"]
mod web;
#[path = "models/weights.rs"]
mod weights;

use std::time::Duration;

use serde_json::{Value, json};

/// How long anything may take before a test fails.
const PATIENCE: Duration = Duration::from_secs(60);

/// A short chat.
fn hello(model: &str) -> Value {
    json!({"model": model, "messages": [{"role": "user", "content": "Hello there"}],
        "max_tokens": 8, "temperature": 0, "seed": 1})
}

//! The first token of a real model: through the fabric, from the node that has it, and straight from
//! the engine.
//!
//! The engine is there twice, in the serving node and in this process, with the same weights and
//! threads; both are asked the same prompts in the same order, so that what they remember of earlier
//! ones is the same. Only one works at a time.

use std::{
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use bytes::Bytes;
use futures::stream;
use leasehold_node::{
    api::{body::Uploaded, model::ModelSpec, want::PayloadText},
    model::embedded::{Engine, Limits, Message, Model, Request, Sampling, Step},
};

use super::{ENTRY, Kind, Nodes, Options, Row, SERVING, client::Target};
use crate::bench::{Spread, line, settled};

const NAME: &str = "smollm2-135m-instruct";
const FIRST: Kind = ("first-token", "ms", 2);
/// How often each is asked in a run.
const ASKS: u32 = 8;
/// Tokens of an answer: only the first one is timed.
const TOKENS: u32 = 4;
/// How long a node may take for the weights.
const UPLOAD: Duration = Duration::from_secs(120);

/// Measures all, and prints the lines.
pub(super) async fn run(options: &Options, weights: &Path) -> anyhow::Result<()> {
    let model = Arc::new(Model::load(weights, options.threads.into())?);
    let engine = Engine::start(model, Limits::default())?;
    let nodes = Nodes::start(options).await?;
    let measured = Box::pin(measure(options, weights, &engine, &nodes)).await;
    settled(measured, nodes.stop().await)
}

async fn measure(
    options: &Options,
    weights: &Path,
    engine: &Engine,
    nodes: &Nodes,
) -> anyhow::Result<()> {
    let bytes = Bytes::from(std::fs::read(weights)?);
    let path = format!("/v1/payloads?size={}", bytes.len());
    let source = stream::iter([Ok(bytes)]);
    let held: Uploaded = nodes.serving()?.client()?.upload(&path, source, UPLOAD).await?;
    let weights = Some(PayloadText { root: held.root, size: held.size });
    let spec = ModelSpec { weights, serve: Some(true), ..ModelSpec::default() };
    nodes.serve(NAME, &spec).await?;
    let through = nodes.target(ENTRY, NAME).await?;
    let beside = nodes.target(SERVING, NAME).await?;

    let [mut ours, mut own, mut straight] = [const { Vec::new() }; 3];
    // The first run does not count: both engines come to remember what all prompts begin with.
    for turn in 0..=options.repeats {
        let [mut fabric, mut node, mut here] = [const { Vec::new() }; 3];
        for ask in 0..ASKS {
            let number = turn * ASKS + ask;
            // The two that ask the serving node have prompts of their own, or it would remember the
            // other's.
            let prompt = |side: u32| format!("What is {} plus two?", 1_000 + number * 2 + side);
            let rounds: [u32; 3] = if ask % 2 == 0 { [0, 1, 2] } else { [2, 1, 0] };
            for side in rounds {
                match side {
                    0 => fabric.push(asked(&through, &prompt(0)).await?),
                    1 => node.push(asked(&beside, &prompt(1)).await?),
                    _ => {
                        here.push(written(engine, &prompt(0)).await?);
                        // As the engine of the serving node was.
                        written(engine, &prompt(1)).await?;
                    }
                }
            }
        }
        if turn > 0 {
            for (all, run) in [(&mut ours, fabric), (&mut own, node), (&mut straight, here)] {
                all.push(Spread::of(run).context("no answer")?.median);
            }
            let last = [ours.last(), own.last(), straight.last()];
            eprintln!("first token, run {turn} of {}: ms {last:?}", options.repeats);
        }
    }
    line(&Row::of(FIRST, ("engine", None), &ours, &straight))?;
    line(&Row::of(FIRST, ("serving node", None), &ours, &own))
}

/// Milliseconds until a node's answer begins.
async fn asked(target: &Target, prompt: &str) -> anyhow::Result<f64> {
    // A connection of its own, made before: a node closes those on which nothing is asked for some
    // seconds.
    let mut client = target.open().await?;
    client.stream(prompt, TOKENS).await?.first_ms().context("no text came")
}

/// Milliseconds until the engine's answer begins.
async fn written(engine: &Engine, prompt: &str) -> anyhow::Result<f64> {
    let begun = Instant::now();
    let said = Message { role: "user".into(), content: prompt.into() };
    let mut generation = engine.submit(Request {
        prompt: engine.model().chat(&[said])?,
        sampling: Sampling::greedy(),
        max_tokens: Some(TOKENS as usize),
        stop: Vec::new(),
    })?;
    let mut first = None;
    while let Some(step) = generation.next().await {
        match step {
            Step::Token { text, .. } if !text.is_empty() => {
                first.get_or_insert_with(|| begun.elapsed());
            }
            Step::Token { .. } => {}
            Step::Finished { .. } => break,
            Step::Failed(why) => bail!("the engine failed: {why}"),
        }
    }
    Ok(first.context("no text came")?.as_secs_f64() * 1e3)
}

//! The embedded engine beside llama.cpp: the same file, the same prompts, as many threads.
//!
//! llama.cpp runs by way of llama-cpp-python, in a process that waits while it is not its turn
//! (`llama.py`); only its own work is timed there, the choice of the likeliest token in it, as here.

use std::{
    io::{BufRead as _, BufReader, Write as _},
    path::Path,
    process::{ChildStdin, ChildStdout, Stdio},
    sync::Arc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail};
use leasehold_node::model::embedded::{Engine, Limits, Model, Reason, Request, Sampling, Step};
use serde::{Deserialize, de::DeserializeOwned};
use serde_json::json;

use super::{Options, Row};
use crate::bench::{
    line,
    peer::{self, Running},
};

/// What the peer is called.
pub(super) const NAME: &str = "llama.cpp";
/// What runs it.
const SCRIPT: &str = include_str!("llama.py");
/// Tokens of a long prompt.
const PREFILL: usize = 512;
/// Tokens of the prompt after which tokens are written.
const PROMPT: usize = 8;
/// Tokens that are written, the first of which comes with the prompt.
const DECODE: usize = 128;
/// Between turns: threads that wait busily for a while come to rest.
const REST: Duration = Duration::from_millis(100);

/// Measures both, and prints their lines.
pub(super) fn run(options: &Options, weights: &Path) -> anyhow::Result<()> {
    let model = Arc::new(Model::load(weights, options.threads.into())?);
    // Nothing is kept: each prompt is read whole.
    let limits = Limits { kept: 0, ..Limits::default() };
    let ours = Ours { engine: Engine::start(Arc::clone(&model), limits)?, model };
    let peer = options.peer(NAME);
    let mut llama =
        peer.map(|python| Llama::start(python, weights, options.threads)).transpose()?;
    let mut prefill = [Vec::new(), Vec::new()];
    let mut decode = [Vec::new(), Vec::new()];
    // The first turn does not count.
    for turn in 0..=options.repeats {
        for first in [true, false] {
            let mine = first == (turn % 2 == 0);
            let (side, long, written) = if mine {
                let long = ours.prefill(&prompt(PREFILL, turn))?;
                thread::sleep(REST);
                (0, long, ours.decode(&prompt(PROMPT, turn))?)
            } else if let Some(llama) = &mut llama {
                let long = llama.ask(&prompt(PREFILL, turn), 0)?;
                thread::sleep(REST);
                (1, long, llama.ask(&prompt(PROMPT, turn), DECODE - 1)?)
            } else {
                continue;
            };
            thread::sleep(REST);
            if turn > 0 {
                prefill[side].push(PREFILL as f64 / long);
                decode[side].push((DECODE - 1) as f64 / written);
            }
        }
        let speeds = [&prefill, &decode].map(|figures| [figures[0].last(), figures[1].last()]);
        eprintln!("engine, run {turn} of {}: tokens/s {speeds:?}", options.repeats);
    }
    for (case, [ours, theirs]) in [("engine-prefill", prefill), ("engine-decode", decode)] {
        let version = llama.as_ref().map(|llama| llama.version.clone());
        line(&Row::of((case, "tokens/s", 1), (NAME, version), &ours, &theirs))?;
    }
    Ok(())
}

/// Many different tokens, none of which ends a text.
fn prompt(tokens: usize, seed: u32) -> Vec<u32> {
    let tokens = u32::try_from(tokens).unwrap_or(u32::MAX);
    (0..tokens).map(|token| 100 + (token * 7_919 + seed * 104_729) % 40_000).collect()
}

struct Ours {
    engine: Engine,
    model: Arc<Model>,
}

impl Ours {
    /// The seconds from the request until the token after a prompt is there.
    fn prefill(&self, prompt: &[u32]) -> anyhow::Result<f64> {
        let begun = Instant::now();
        let [first, _] = self.write(prompt, 1)?;
        Ok((first - begun).as_secs_f64())
    }

    /// The seconds from the first token to the last.
    fn decode(&self, prompt: &[u32]) -> anyhow::Result<f64> {
        let [first, last] = self.write(prompt, DECODE)?;
        Ok((last - first).as_secs_f64())
    }

    /// When the first of so many tokens after a prompt came, and the last.
    fn write(&self, prompt: &[u32], tokens: usize) -> anyhow::Result<[Instant; 2]> {
        // Ends are made unlikely, so that all of the tokens come.
        let never = self.model.tokenizer().stops().iter().map(|id| (*id, -100.0)).collect();
        let mut generation = self.engine.submit(Request {
            prompt: prompt.to_vec(),
            sampling: Sampling { logit_bias: never, ..Sampling::greedy() },
            max_tokens: Some(tokens),
            stop: Vec::new(),
        })?;
        let (mut first, mut last) = (None, None);
        while let Some(step) = generation.wait() {
            match step {
                Step::Token { .. } => {
                    last = Some(Instant::now());
                    first = first.or(last);
                }
                Step::Finished { reason: Reason::Length, .. } => break,
                other => bail!("the engine ended otherwise: {other:?}"),
            }
        }
        first.zip(last).map(|(first, last)| [first, last]).context("no token came")
    }
}

/// A process with llama.cpp in it; it ends when dropped, or when this one does.
struct Llama {
    _process: Running,
    asks: ChildStdin,
    answers: BufReader<ChildStdout>,
    version: String,
}

impl Llama {
    fn start(python: &Path, weights: &Path, threads: u16) -> anyhow::Result<Self> {
        #[derive(Deserialize)]
        struct Ready {
            version: String,
        }
        let mut command = peer::command(python);
        command.args(["-c", SCRIPT]).arg(weights).arg(threads.to_string());
        command.stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = Running::start(&mut command).context("cannot start it")?;
        let child = process.child();
        let pipes = child.stdin.take().zip(child.stdout.take());
        let (asks, answers) = pipes.context("it has no pipes")?;
        let (answers, version) = (BufReader::new(answers), String::new());
        let mut llama = Self { _process: process, asks, answers, version };
        llama.version = llama.read::<Ready>()?.version;
        Ok(llama)
    }

    fn read<T: DeserializeOwned>(&mut self) -> anyhow::Result<T> {
        let mut text = String::new();
        self.answers.read_line(&mut text)?;
        serde_json::from_str(&text).context("llama.cpp did not answer")
    }

    /// The seconds for a prompt, or for so many tokens after it.
    fn ask(&mut self, prompt: &[u32], decode: usize) -> anyhow::Result<f64> {
        #[derive(Deserialize)]
        struct Took {
            seconds: f64,
        }
        writeln!(self.asks, "{}", json!({ "prompt": prompt, "decode": decode }))?;
        self.asks.flush()?;
        Ok(self.read::<Took>()?.seconds)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_differ_and_hold_words_only() {
        let (one, next) = (prompt(PREFILL, 0), prompt(PREFILL, 1));
        assert_ne!(one, next);
        assert!(one.iter().chain(&next).all(|token| (100..40_100).contains(token)));
    }
}

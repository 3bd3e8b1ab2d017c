//! What the fabric adds to an answer: the same upstream, which answers at once, asked directly and
//! through it.
//!
//! ```text
//! client -----------------------------------------> upstream        theirs, "upstream"
//! client --> entry node == data plane ==> serving node --> upstream  ours
//! client --> LiteLLM -----------------------------> upstream        theirs, "litellm"
//! ```
//!
//! Clients and upstream are in this process, the upstream on a thread of its own: a token that
//! carries when it left can be timed where it comes.

use std::time::{Duration, Instant};

use anyhow::Context as _;
use leasehold_node::api::model::{ModelSpec, UpstreamText};

use super::{
    ENTRY, Kind, Nodes, Options, Row,
    client::Target,
    litellm::{self, LiteLlm},
    mock::{BURST, MODEL, Mock, PACED, TOKENS},
};
use crate::bench::{Spread, line, load::drive, percentile, settled};

/// What the upstream is called in the lines.
const UPSTREAM: &str = "upstream";
/// What comes first and does not count.
const WARM_UP: Duration = Duration::from_millis(300);
/// Streams of each kind in a run.
const STREAMS: usize = 20;

const P50: Kind = ("gateway-p50", "ms", 3);
const P99: Kind = ("gateway-p99", "ms", 3);
const MANY: Kind = ("gateway-many", "requests/s", 1);
const FIRST: Kind = ("gateway-first-token", "ms", 3);
const BURST_EACH: Kind = ("gateway-burst-token", "ms", 4);
const UNDER_WAY: Kind = ("gateway-paced-token", "ms", 3);
const UNDER_WAY_P99: Kind = ("gateway-paced-token-p99", "ms", 3);
const KINDS: [Kind; 7] = [P50, P99, MANY, FIRST, BURST_EACH, UNDER_WAY, UNDER_WAY_P99];

/// One side's figures, run by run, by kind.
#[derive(Debug)]
struct Side {
    name: &'static str,
    version: Option<String>,
    target: Target,
    figures: [Vec<f64>; KINDS.len()],
}

impl Side {
    const fn new(name: &'static str, version: Option<String>, target: Target) -> Self {
        Self { name, version, target, figures: [const { Vec::new() }; KINDS.len()] }
    }

    fn add(&mut self, run: [f64; KINDS.len()]) {
        for (figures, figure) in self.figures.iter_mut().zip(run) {
            figures.push(figure);
        }
    }
}

/// Measures all sides, and prints their lines.
pub(super) async fn run(options: &Options) -> anyhow::Result<()> {
    let mock = Mock::start()?;
    let proxy = match options.peer(litellm::NAME) {
        Some(program) => Some(LiteLlm::start(program, mock.at).await.context(litellm::NAME)?),
        None => None,
    };
    let nodes = Nodes::start(options).await?;
    let measured = Box::pin(measure(options, &mock, proxy.as_ref(), &nodes)).await;
    settled(measured, nodes.stop().await)
}

async fn measure(
    options: &Options,
    mock: &Mock,
    proxy: Option<&LiteLlm>,
    nodes: &Nodes,
) -> anyhow::Result<()> {
    let url = format!("http://{}/v1", mock.at);
    let spec = ModelSpec {
        upstream: Some(UpstreamText { url, model: None, key_file: None }),
        serve: Some(true),
        ..ModelSpec::default()
    };
    nodes.serve(MODEL, &spec).await?;
    let entry = nodes.target(ENTRY, MODEL).await?;
    for member in nodes.fleet.members() {
        eprintln!("gateway: {} is process {}", member.name(), member.file()?.pid);
    }
    let mut sides = vec![
        Side::new("leasehold", None, entry),
        Side::new(UPSTREAM, None, Target::new(mock.at, "none", MODEL)),
    ];
    sides.extend(proxy.map(|it| Side::new(litellm::NAME, it.version.clone(), it.target())));
    for turn in 0..options.repeats {
        for side in &mut sides {
            let name = side.name;
            let run = Box::pin(one(options, mock, &side.target)).await.context(name)?;
            eprintln!("gateway, run {} of {}, {name}: {run:?}", turn + 1, options.repeats);
            side.add(run);
        }
        // Who goes first takes turns.
        sides.rotate_left(1);
    }
    let (ours, theirs): (Vec<_>, Vec<_>) = sides.iter().partition(|side| side.name == "leasehold");
    let ours = ours.first().context("nothing was measured")?;
    for (index, kind) in KINDS.into_iter().enumerate() {
        for side in &theirs {
            let peer = (side.name, side.version.clone());
            let [ours, theirs] = [ours, *side].map(|side| side.figures[index].as_slice());
            line(&Row::of(kind, peer, ours, theirs))?;
        }
    }
    Ok(())
}

/// One run with one side, in the order of [`KINDS`].
async fn one(
    options: &Options,
    mock: &Mock,
    target: &Target,
) -> anyhow::Result<[f64; KINDS.len()]> {
    let span = Duration::from_secs(options.seconds);
    let mut asked = Vec::new();
    let mut speeds = Vec::new();
    for clients in [1, options.clients] {
        let mut open = Vec::new();
        for _ in 0..clients {
            open.push(target.open().await?);
        }
        let from = Instant::now() + WARM_UP;
        let (_, came) = drive(open, from, from + span).await?;
        anyhow::ensure!(came.errors == 0, "{} requests failed", came.errors);
        speeds.push(came.took_ms.len() as f64 / options.seconds as f64);
        asked.push(sorted(came.took_ms));
    }
    let one = asked.first().context("one client")?;
    let share = |figures: &[f64], share| percentile(figures, share).context("nothing was answered");
    let (p50, p99) = (share(one, 0.5)?, share(one, 0.99)?);
    let many = *speeds.last().context("many clients")?;

    let mut client = target.open().await?;
    let (mut first, mut each, mut under_way) = (Vec::new(), Vec::new(), Vec::new());
    for stream in 0..=STREAMS {
        let burst = client.stream(BURST, 128).await?;
        let paced = client.stream(PACED, 128).await?;
        for streamed in [&burst, &paced] {
            let came = streamed.pieces.len();
            anyhow::ensure!(came == TOKENS, "{came} tokens came of {TOKENS}");
        }
        // The first of each does not count.
        if stream > 0 {
            first.extend(burst.first_ms());
            each.extend(burst.each_ms());
            for (came, text) in &paced.pieces {
                under_way.push(mock.under_way_ms(*came, text)?);
            }
        }
    }
    let under_way = sorted(under_way);
    let median = |figures: Vec<f64>| Spread::of(figures).context("no stream").map(|it| it.median);
    Ok([
        p50,
        p99,
        many,
        median(first)?,
        median(each)?,
        share(&under_way, 0.5)?,
        share(&under_way, 0.99)?,
    ])
}

fn sorted(mut figures: Vec<f64>) -> Vec<f64> {
    figures.sort_by(f64::total_cmp);
    figures
}

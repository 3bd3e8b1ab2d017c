//! Order to grant: how many leases a second two nodes make with each other, how long one takes, and
//! the same of etcd, where that is installed.
//!
//! ```text
//! client --HTTP, kept open--> lessee --order--> lessor
//!   ^                           |  ^              | judged, kept, synced
//!   '------- 201 ---------------'  '--grant-------'
//!        grant verified, kept, synced
//!
//! client --gRPC--> etcd       a lease, and one put under it: each kept and synced
//! ```
//!
//! A client asks for the next lease as soon as it has one. Nothing is claimed, so grants lapse and
//! give their capacity back: that work, too, is done while the next ones are made. etcd's leases
//! outlive the benchmark.
//!
//! The two take turns, so that what else happens on the machine hits both alike.

use std::{
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use serde::Serialize;

use super::{
    Spread,
    api::{Door, Kept, metric},
    block_on,
    etcd::{self, Etcd},
    line,
    load::{Asked, Client, drive},
    machine,
    pair::{Pair, ready},
    rounded, settled,
};
use crate::fleet::Member;

/// What comes before it counts: links open, caches warm, the first grants lapsed.
const WARM_UP: Duration = Duration::from_secs(2);
/// How long a grant waits to be claimed. Short: so much capacity is promised at once.
const CLAIM_WITHIN: &str = "250ms";

/// Options of `bench lease`.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// How long each run is measured, in seconds.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// How many clients ask at once, case by case.
    #[arg(long, value_delimiter = ',', default_value = "1,16,64")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=512))]
    clients: Vec<u16>,
    /// Runs of each case; Leasehold and etcd take turns.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// How many clients share a connection to etcd.
    #[arg(long, default_value_t = 16, value_parser = clap::value_parser!(u16).range(1..))]
    etcd_share: u16,
    /// How long etcd's leases live, in seconds; by default longer than the benchmark.
    #[arg(long, default_value_t = 3600, value_parser = clap::value_parser!(u64).range(1..=86_400))]
    etcd_ttl: u64,
    /// Where the nodes live, their journals and etcd's [default: the directory for temporary
    /// files].
    #[arg(long)]
    dir: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct CaseLine {
    bench: &'static str,
    /// Who was measured, if not Leasehold, and which version of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    peer: Option<&'static str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    version: Option<String>,
    clients: u16,
    /// Median, and the slowest and fastest run; the same for what has no other name below.
    grants_per_s: f64,
    min: f64,
    max: f64,
    runs: usize,
    /// Of all runs together.
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    max_ms: Option<f64>,
    /// Grants for each sync of the lessor's journal.
    grants_per_sync: Option<f64>,
    /// Grants for each sync of the lessee's journal.
    grants_per_lessee_sync: Option<f64>,
    /// Of all runs together.
    errors: u64,
    seconds: u64,
    /// Processor time per grant of each process, lapses included.
    lessor_cpu_ms: Option<f64>,
    lessee_cpu_ms: Option<f64>,
    client_cpu_ms: Option<f64>,
    /// What the journals are on.
    journal_on: String,
}

#[derive(Debug, Serialize)]
struct RatioLine {
    bench: &'static str,
    case: &'static str,
    peer: &'static str,
    clients: u16,
    /// How many times as many grants a second: the medians' ratio; the least and most of runs
    /// next to each other.
    ratio: f64,
    min: f64,
    max: f64,
    /// How much longer the median grant takes.
    p50_more_ms: Option<f64>,
    runs: usize,
}

/// One run of one case.
#[derive(Debug)]
struct Run {
    asked: Asked,
    grants_per_s: f64,
    grants_per_sync: Option<f64>,
    grants_per_lessee_sync: Option<f64>,
    lessor_cpu_ms: Option<f64>,
    lessee_cpu_ms: Option<f64>,
    client_cpu_ms: Option<f64>,
    journal_on: String,
}

/// Runs the benchmark.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    let etcd = Etcd::find();
    if etcd.is_none() {
        eprintln!("etcd is not installed: measured without it (apt-get install etcd-server)");
    }
    // One thread: the cores are the nodes'.
    block_on(async {
        for clients in &options.clients {
            let measured = Box::pin(compare(options, *clients, etcd.as_ref())).await;
            measured.with_context(|| format!("with {clients} clients"))?;
        }
        Ok(())
    })
}

/// Measures both, and prints their lines.
async fn compare(options: &Options, clients: u16, etcd: Option<&Etcd>) -> anyhow::Result<()> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for turn in 0..options.runs {
        // Who goes first takes turns, too.
        for first in [true, false] {
            if first == (turn % 2 == 0) {
                ours.push(Box::pin(leasehold(options, clients)).await?);
            } else if let Some(etcd) = etcd {
                theirs.push(Box::pin(peer(etcd, options, clients)).await.context("etcd")?);
            }
        }
        let speeds = [&ours, &theirs].map(|runs| runs.last().map(|run| run.grants_per_s));
        eprintln!("{clients} clients, run {} of {}: grants/s {speeds:?}", turn + 1, options.runs);
    }
    let mine = case(options, clients, &ours)?;
    line(&mine)?;
    let Some(etcd) = etcd else { return Ok(()) };
    let mut peer = case(options, clients, &theirs)?;
    peer.peer = Some(etcd::NAME);
    peer.version = Some(etcd.version.clone());
    line(&peer)?;
    let ratios = ours.iter().zip(&theirs).map(|(a, b)| a.grants_per_s / b.grants_per_s);
    let ratios = Spread::of(ratios).context("no run")?;
    line(&RatioLine {
        bench: "lease",
        case: "ratio",
        peer: etcd::NAME,
        clients,
        ratio: rounded(mine.grants_per_s / peer.grants_per_s, 3),
        min: rounded(ratios.min, 3),
        max: rounded(ratios.max, 3),
        p50_more_ms: mine.p50_ms.zip(peer.p50_ms).map(|(mine, peer)| rounded(mine - peer, 2)),
        runs: ours.len(),
    })
}

fn case(options: &Options, clients: u16, runs: &[Run]) -> anyhow::Result<CaseLine> {
    let speeds = Spread::of(runs.iter().map(|run| run.grants_per_s)).context("no run")?;
    let median = |figure: fn(&Run) -> Option<f64>, digits| {
        let spread = Spread::of(runs.iter().filter_map(figure));
        spread.map(|spread| rounded(spread.median, digits))
    };
    let mut asked = Asked::default();
    for run in runs {
        asked.add(&run.asked);
    }
    let [p50_ms, p99_ms, max_ms] = asked.percentiles([0.5, 0.99, 1.0]);
    Ok(CaseLine {
        bench: "lease",
        peer: None,
        version: None,
        clients,
        grants_per_s: rounded(speeds.median, 1),
        min: rounded(speeds.min, 1),
        max: rounded(speeds.max, 1),
        runs: runs.len(),
        p50_ms,
        p99_ms,
        max_ms,
        grants_per_sync: median(|run| run.grants_per_sync, 2),
        grants_per_lessee_sync: median(|run| run.grants_per_lessee_sync, 2),
        errors: asked.errors,
        seconds: options.seconds,
        lessor_cpu_ms: median(|run| run.lessor_cpu_ms, 3),
        lessee_cpu_ms: median(|run| run.lessee_cpu_ms, 3),
        client_cpu_ms: median(|run| run.client_cpu_ms, 3),
        journal_on: runs.first().map(|run| run.journal_on.clone()).unwrap_or_default(),
    })
}

/// How often something was done for each of what clients were given.
fn per(all: f64, each: u64) -> Option<f64> {
    (each > 0).then(|| all / each as f64)
}

/// One run with a fleet of its own.
async fn leasehold(options: &Options, clients: u16) -> anyhow::Result<Run> {
    let pair = Pair::start(options.dir.as_deref(), None).await?;
    let measured = measure(&pair, options.seconds, clients).await;
    settled(measured, pair.stop().await)
}

/// What a process had done and used at some instant.
#[derive(Debug)]
struct Mark {
    grants: Option<f64>,
    syncs: Option<f64>,
    cpu: Duration,
}

impl Mark {
    /// Milliseconds of processor time from then to `after`, for each of so many.
    fn used(&self, after: &Self, each: u64) -> Option<f64> {
        per(after.cpu.saturating_sub(self.cpu).as_secs_f64() * 1e3, each)
    }

    /// So many grants for each sync from then to `after`.
    fn per_sync(&self, after: &Self, grants: Option<f64>) -> Option<f64> {
        let syncs = difference(self.syncs, after.syncs).filter(|syncs| *syncs > 0.0)?;
        Some(grants? / syncs)
    }
}

async fn mark(member: &Member) -> anyhow::Result<Mark> {
    let text = Door::of(member)?.get("/metrics").await?;
    Ok(Mark {
        grants: metric(&text, "leasehold_grants_total"),
        syncs: metric(&text, "leasehold_store_syncs_total"),
        cpu: member.usage()?.cpu,
    })
}

async fn measure(pair: &Pair, seconds: u64, clients: u16) -> anyhow::Result<Run> {
    let (lessor, lessee) = (pair.lessor()?, pair.lessee()?);
    let pids = (lessor.file()?.pid, lessee.file()?.pid);
    eprintln!("{clients} clients: lessor is process {}, lessee {}", pids.0, pids.1);
    let want = pair.want(1, "64K", "60s", CLAIM_WITHIN)?;
    let door = Door::of(lessee)?;
    ready(&mut door.open().await?, &want).await?;
    let mut asking = Vec::new();
    for _ in 0..clients {
        asking.push(Lessee { kept: door.open().await?, want: want.clone() });
    }

    // Figures of the nodes are read outside the time that is measured: a look costs them a little.
    let before = [mark(lessor).await?, mark(lessee).await?];
    let cpu_before = machine::cpu_s();
    let asked = load(asking, seconds).await?;
    let cpu = machine::cpu_s() - cpu_before;
    let after = [mark(lessor).await?, mark(lessee).await?];

    let ([lessor, lessee], [lessor_after, lessee_after]) = (&before, &after);
    let grants = difference(lessor.grants, lessor_after.grants);
    Ok(Run {
        grants_per_s: asked.took_ms.len() as f64 / seconds as f64,
        grants_per_sync: lessor.per_sync(lessor_after, grants),
        grants_per_lessee_sync: lessee.per_sync(lessee_after, grants),
        lessor_cpu_ms: lessor.used(lessor_after, asked.came),
        lessee_cpu_ms: lessee.used(lessee_after, asked.came),
        client_cpu_ms: per(cpu * 1e3, asked.came),
        journal_on: machine::file_system(pair.fleet.root()),
        asked,
    })
}

/// Lets clients ask: first so that it does not count, then for so many seconds.
async fn load(clients: Vec<impl Client>, seconds: u64) -> anyhow::Result<Asked> {
    let from = Instant::now() + WARM_UP;
    let until = from + Duration::from_secs(seconds);
    Ok(drive(clients, from, until).await?.1)
}

/// One run of etcd, with data of its own.
async fn peer(etcd: &Etcd, options: &Options, clients: u16) -> anyhow::Result<Run> {
    let base = options.dir.clone().unwrap_or_else(std::env::temp_dir);
    let member = etcd.start(&base).await?;
    eprintln!("{clients} clients: etcd is process {}", member.pid());
    let lessees =
        member.lessees(clients.into(), options.etcd_ttl, options.etcd_share.into()).await?;
    let mark = async || {
        let syncs = member.syncs().await?;
        let cpu = member.usage().context("it has ended")?.cpu;
        anyhow::Ok(Mark { grants: None, syncs, cpu })
    };
    let before = mark().await?;
    let cpu_before = machine::cpu_s();
    let asked = load(lessees, options.seconds).await?;
    let cpu = machine::cpu_s() - cpu_before;
    let after = mark().await?;
    Ok(Run {
        grants_per_s: asked.took_ms.len() as f64 / options.seconds as f64,
        grants_per_sync: before.per_sync(&after, Some(asked.came as f64)),
        grants_per_lessee_sync: None,
        lessor_cpu_ms: before.used(&after, asked.came),
        lessee_cpu_ms: None,
        client_cpu_ms: per(cpu * 1e3, asked.came),
        journal_on: machine::file_system(member.data()),
        asked,
    })
}

fn difference(before: Option<f64>, after: Option<f64>) -> Option<f64> {
    Some(after? - before?)
}

/// Asks the lessee, on a connection of its own.
struct Lessee {
    kept: Kept,
    want: Bytes,
}

impl Client for Lessee {
    async fn ask(&mut self) -> anyhow::Result<Option<Instant>> {
        self.kept.create("/v1/leases", &self.want).await?;
        Ok(Some(Instant::now()))
    }

    async fn again(&mut self) -> anyhow::Result<()> {
        self.kept.again().await
    }
}

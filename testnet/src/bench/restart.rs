//! A restart: how long it takes until a lessor that was killed grants again, with leases that live
//! on and jobs that ran on meanwhile.
//!
//! ```text
//! SIGKILL, and at once:
//! start ──> the API listens          journal, checkpoint and state read, epoch raised   listens_ms
//!       ──> /readyz says yes         jobs adopted, a peer has greeted                   ready_ms
//!       ──> it has granted a lease   ordered at its own API: by its own lessee       granting_ms
//!       ──> the lessee has one       that has held leases and a link all along         lessee_ms
//! then:     every lease is looked for, every job's warden is the process it was
//! ```
//!
//! The last two are asked for beside each other, from the moment when the API listens.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::{Context as _, bail, ensure};
use bytes::Bytes;
use clap::Args;
use futures::{stream, try_join};
use hyper::StatusCode;
use leasehold_node::{
    api::{
        body::{ClaimRequest, Leases, Side, Uploaded},
        want::{JobText, PayloadText},
    },
    work::Process,
};
use serde::Serialize;
use tokio::time::sleep;

use super::{
    Spread,
    api::{Door, Kept, metric, refused},
    block_on, line, machine,
    pair::{Pair, each, lease, obtain},
    rounded, settled,
};

/// How long everything that comes before the first kill may take, and a start.
const PATIENCE: Duration = Duration::from_secs(120);
/// How long nothing happens before the lessor is killed.
const SETTLE: Duration = Duration::from_secs(3);
/// Between two looks at what is timed.
const LOOK: Duration = Duration::from_millis(2);
/// From when on after a start it is said why there is no lease yet.
const SLOW: Duration = Duration::from_secs(1);
/// How long the leases are, and may wait to be claimed: longer than the benchmark.
const LONG: &str = "4h";
/// What a lease under which a job runs has of a core, in thousandths.
const JOB_MILLI: u64 = 10;
/// How much memory the job may use.
const JOB_MEMORY: &str = "1M";

/// A program that waits, an hour at a time, and so uses no processor.
const WAITS: &str = r#"(module
  (import "wasi_snapshot_preview1" "poll_oneoff"
    (func $poll (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (func (export "_start")
    ;; A subscription to the monotonic clock, an hour from now.
    (i32.store (i32.const 80) (i32.const 1))
    (i64.store (i32.const 88) (i64.const 3600000000000))
    (loop $again
      (drop (call $poll (i32.const 64) (i32.const 128) (i32.const 1) (i32.const 192)))
      (br $again))))"#;

/// Options of `bench restart`.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// How many leases live; a job runs under some of them.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(1..=50_000))]
    leases: u32,
    /// How many jobs run.
    #[arg(long, default_value_t = 100, value_parser = clap::value_parser!(u32).range(0..=1_000))]
    jobs: u32,
    /// How often the lessor is killed.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    runs: u32,
    /// Where the nodes live, and their journals [default: the directory for temporary files].
    #[arg(long)]
    dir: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct CaseLine {
    bench: &'static str,
    leases: u32,
    jobs: u32,
    runs: usize,
    /// From the process's start until its API listens, says that it is ready, it has granted a
    /// lease to its own lessee, and one to another node's that was linked before: medians, and the
    /// shortest and longest run.
    listens_ms: f64,
    ready_ms: f64,
    ready_min_ms: f64,
    ready_max_ms: f64,
    granting_ms: f64,
    granting_min_ms: f64,
    granting_max_ms: f64,
    lessee_ms: f64,
    lessee_min_ms: f64,
    lessee_max_ms: f64,
    /// Leases that live on, and jobs that run on under the warden that they had: the least of all
    /// runs.
    kept: usize,
    adopted: usize,
    /// Requests of the other node's lessee that came to nothing before it got its lease: the most
    /// of all runs.
    refused: u32,
    /// Processor time of the process until it had granted, median.
    cpu_ms: f64,
    /// What the journals are on.
    journal_on: String,
}

/// Runs the benchmark.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    block_on(async {
        let measured = Box::pin(case(options)).await?;
        line(&measured)
    })
}

async fn case(options: &Options) -> anyhow::Result<CaseLine> {
    ensure!(options.jobs <= options.leases, "each job needs a lease");
    let mut pair = Pair::start(options.dir.as_deref(), Some(LONG)).await?;
    let measured = measure(&mut pair, options).await;
    settled(measured, pair.stop().await)
}

/// One restart.
#[derive(Debug)]
struct Run {
    listens_ms: f64,
    ready_ms: f64,
    granting_ms: f64,
    lessee_ms: f64,
    kept: usize,
    adopted: usize,
    refused: u32,
    cpu_ms: f64,
}

async fn measure(pair: &mut Pair, options: &Options) -> anyhow::Result<CaseLine> {
    let door = Door::of(pair.lessee()?)?;
    let plain = pair.want(1, "64K", LONG, LONG)?;
    let count = |n: u32| usize::try_from(n).unwrap_or(usize::MAX);
    let mut leases = obtain(&door, &plain, count(options.leases - options.jobs)).await?;
    let want = pair.want(JOB_MILLI, JOB_MEMORY, LONG, LONG)?;
    let working = obtain(&door, &want, count(options.jobs)).await?;
    eprintln!("{} leases; starting {} jobs", options.leases, options.jobs);
    let claim = claim(pair).await?;
    let claims = async |kept: &mut Kept, lease: &str| {
        let path = format!("/v1/leases/{lease}/claim");
        let (status, body) = kept.post(&path, &claim).await?;
        if status == StatusCode::OK { Ok(()) } else { Err(refused(&path, status, &body)) }
    };
    each(&door, &working, claims).await.context("claiming")?;
    leases.extend(working);
    let leases: BTreeSet<String> = leases.into_iter().collect();
    running(pair, options.jobs).await?;

    let mut runs = Vec::new();
    for turn in 1..=options.runs {
        sleep(SETTLE).await;
        let wardens = pair.lessor()?.wardens();
        let run = restart(pair, &plain, &leases, &wardens).await?;
        eprintln!("run {turn} of {}: {run:?}", options.runs);
        runs.push(run);
    }
    let of = |figure: fn(&Run) -> f64| {
        let spread = Spread::of(runs.iter().map(figure)).context("no run")?;
        anyhow::Ok([spread.median, spread.min, spread.max].map(|figure| rounded(figure, 0)))
    };
    let [listens_ms, ..] = of(|run| run.listens_ms)?;
    let [ready_ms, ready_min_ms, ready_max_ms] = of(|run| run.ready_ms)?;
    let [granting_ms, granting_min_ms, granting_max_ms] = of(|run| run.granting_ms)?;
    let [lessee_ms, lessee_min_ms, lessee_max_ms] = of(|run| run.lessee_ms)?;
    let [cpu_ms, ..] = of(|run| run.cpu_ms)?;
    Ok(CaseLine {
        bench: "restart",
        leases: options.leases,
        jobs: options.jobs,
        runs: runs.len(),
        listens_ms,
        ready_ms,
        ready_min_ms,
        ready_max_ms,
        granting_ms,
        granting_min_ms,
        granting_max_ms,
        lessee_ms,
        lessee_min_ms,
        lessee_max_ms,
        kept: runs.iter().map(|run| run.kept).min().unwrap_or(0),
        adopted: runs.iter().map(|run| run.adopted).min().unwrap_or(0),
        refused: runs.iter().map(|run| run.refused).max().unwrap_or(0),
        cpu_ms,
        journal_on: machine::file_system(pair.fleet.root()),
    })
}

/// A claim by which the program runs, once it is uploaded to the lessee.
async fn claim(pair: &Pair) -> anyhow::Result<Bytes> {
    let program = Bytes::from(wat::parse_str(WAITS)?);
    let path = format!("/v1/payloads?size={}", program.len());
    let body = stream::iter([Ok(program)]);
    let uploaded: Uploaded = pair.lessee()?.client()?.upload(&path, body, PATIENCE).await?;
    let Uploaded { root, size, .. } = uploaded;
    let job = JobText {
        runtime: "wasm".into(),
        program: PayloadText { root, size },
        args: Vec::new(),
        env: BTreeMap::new(),
        stdin: None,
        inputs: Vec::new(),
        outputs: Vec::new(),
        release_after: false,
    };
    Ok(Bytes::from(serde_json::to_vec(&ClaimRequest { job })?))
}

/// Waits until all jobs run.
async fn running(pair: &Pair, jobs: u32) -> anyhow::Result<()> {
    let lessor = Door::of(pair.lessor()?)?;
    let begun = Instant::now();
    loop {
        let running = metric(&lessor.get("/metrics").await?, "leasehold_jobs_running");
        if running == Some(f64::from(jobs)) {
            return Ok(());
        }
        if begun.elapsed() > PATIENCE {
            bail!("{running:?} of {jobs} jobs run after {} s", PATIENCE.as_secs());
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Whether to go on after an error.
fn patience(begun: Instant, error: anyhow::Error) -> anyhow::Result<()> {
    if begun.elapsed() > PATIENCE { Err(error) } else { Ok(()) }
}

/// Kills the lessor, starts it again, and looks what has become of everything.
async fn restart(
    pair: &mut Pair,
    want: &Bytes,
    leases: &BTreeSet<String>,
    wardens: &BTreeMap<String, Process>,
) -> anyhow::Result<Run> {
    let lessee = Door::of(pair.lessee()?)?.open().await?;
    pair.kill_lessor()?;
    let begun = Instant::now();
    let ms = || begun.elapsed().as_secs_f64() * 1e3;
    pair.spawn_lessor()?;
    while !pair.lessor_listens(begun)? {
        sleep(LOOK).await;
    }
    let listens_ms = ms();
    let door = Door::of(pair.lessor()?)?;
    let ready = async {
        let mut lessor = door.open().await?;
        while let Err(error) = lessor.get("/readyz").await {
            patience(begun, error)?;
            sleep(LOOK).await;
        }
        anyhow::Ok(ms())
    };
    // Until one comes, and how many did not.
    let first = async |mut kept: Kept| {
        let mut refused = 0;
        loop {
            match lease(&mut kept, want).await {
                Ok(lease) => {
                    let (ms, cpu) = (ms(), pair.lessor()?.usage()?.cpu);
                    kept.release(&lease).await?;
                    return anyhow::Ok((ms, cpu, refused));
                }
                Err(error) => {
                    refused += 1;
                    if begun.elapsed() > SLOW {
                        eprintln!("after {:.0} ms: {error:#}", ms());
                    }
                    patience(begun, error)?;
                    sleep(LOOK).await;
                }
            }
        }
    };
    let own = async { first(door.open().await?).await };
    let (ready_ms, (granting_ms, cpu, _), (lessee_ms, _, refused)) =
        try_join!(ready, own, first(lessee))?;
    let cpu_ms = cpu.as_secs_f64() * 1e3;

    let all: Leases = serde_json::from_slice(&door.get("/v1/leases").await?)?;
    let now = pair.lessor()?.wardens();
    let (mut kept, mut adopted) = (0, 0);
    for line in all.leases.iter().filter(|line| line.side == Side::Lent && !line.is_over()) {
        let Some(id) = line.lease.as_ref().filter(|id| leases.contains(*id)) else { continue };
        kept += 1;
        let same = wardens.get(id).is_some_and(|warden| now.get(id) == Some(warden));
        adopted += usize::from(line.running == Some(true) && same);
    }
    Ok(Run { listens_ms, ready_ms, granting_ms, lessee_ms, kept, adopted, refused, cpu_ms })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_program_is_one() {
        let program = wat::parse_str(WAITS).expect("WebAssembly");
        assert_eq!(program.get(..4), Some(b"\0asm".as_slice()));
    }
}

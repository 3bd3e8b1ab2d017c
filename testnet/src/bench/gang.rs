//! Gangs: how long it takes until leases on several hosts are committed together, while as many
//! gangs compete for the hosts as fit, or more.
//!
//! ```text
//! client --HTTP, kept open--> lessee --orders--> 10 hosts     each judges, keeps, syncs
//!                                    <--grants--
//!                                    --certificate--> 8       each keeps, syncs, tells the others
//!                                    <--words--
//!        <----- 201, whole --------     surplus given back
//! client --release-->  each of the 8, one after the other; then the next gang
//! ```
//!
//! All nodes sell, some of them order, too. A node has room for a few members at once, so that
//! lessees meet hosts that are full: then they are refused, give back and try again.

use std::{
    collections::BTreeSet,
    path::PathBuf,
    time::{Duration, Instant},
};

use anyhow::Context as _;
use bytes::Bytes;
use clap::Args;
use hyper::StatusCode;
use leasehold_node::api::body::Ganged;
use serde::Serialize;
use tokio::time::sleep;

use super::{
    api::{Door, Kept, metric, refused},
    block_on, line,
    load::{Asked, Client, drive},
    machine, rounded, settled, temporary,
};
use crate::fleet::{Fleet, Plan, config};

/// What comes before it counts: links open, caches warm.
const WARM_UP: Duration = Duration::from_secs(2);
/// How long the nodes may take to see each other, and what each offers.
const MAP: Duration = Duration::from_secs(60);
/// What a member has of a core, in thousandths.
const MEMBER_MILLI: u64 = 100;

/// Options of `bench gang`.
#[derive(Debug, Args)]
pub(super) struct Options {
    /// How long each case is measured, in seconds.
    #[arg(long, default_value_t = 30, value_parser = clap::value_parser!(u64).range(1..=600))]
    seconds: u64,
    /// How many nodes there are, all of which sell.
    #[arg(long, default_value_t = 12, value_parser = clap::value_parser!(u16).range(2..=64))]
    nodes: u16,
    /// How many members a gang has.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u16).range(1..=64))]
    size: u16,
    /// How many of the nodes order gangs, one after the other.
    #[arg(long, default_value_t = 4, value_parser = clap::value_parser!(u16).range(1..=64))]
    lessees: u16,
    /// How many members a node has room for at once, case by case.
    #[arg(long, value_delimiter = ',', default_value = "10,3,2")]
    #[arg(value_parser = clap::value_parser!(u16).range(1..=10))]
    room: Vec<u16>,
    /// Where the nodes live, and their journals [default: the directory for temporary files].
    #[arg(long)]
    dir: Option<PathBuf>,
}

#[derive(Debug, Serialize)]
struct CaseLine {
    bench: &'static str,
    nodes: u16,
    size: u16,
    lessees: u16,
    /// Members that a node has room for at once.
    room: u16,
    /// Gangs that became whole, the warm-up's included.
    gangs: u64,
    gangs_per_s: f64,
    /// From a client's request to the answer that all members have committed.
    p50_ms: Option<f64>,
    p99_ms: Option<f64>,
    max_ms: Option<f64>,
    /// Gangs said to be whole that were not: members on fewer hosts, or one that could not be
    /// given back.
    partial: u64,
    /// Requests answered with a no.
    failed: u64,
    /// Requests that were not answered.
    errors: u64,
    /// Orders that lessors refused, and that they granted, for each gang.
    refusals_per_gang: Option<f64>,
    grants_per_gang: Option<f64>,
    /// Processor time of all nodes for each gang.
    cpu_ms: Option<f64>,
    seconds: u64,
    /// What the journals are on.
    journal_on: String,
}

/// Runs the benchmark.
pub(super) fn run(options: &Options) -> anyhow::Result<()> {
    block_on(async {
        for room in &options.room {
            let measured = Box::pin(case(options, *room)).await;
            line(&measured.with_context(|| format!("with room for {room}"))?)?;
        }
        Ok(())
    })
}

async fn case(options: &Options, room: u16) -> anyhow::Result<CaseLine> {
    let dir = options.dir.as_deref().map(temporary).transpose()?;
    let configs = (0..options.nodes).map(|n| {
        let mut config = config(&format!("n{n:02}"));
        config.offer.cpu = format!("{}m", u64::from(room) * MEMBER_MILLI);
        config
    });
    let mut plan = Plan::new(configs.collect());
    plan.dir = dir.as_ref().map(|dir| dir.path().to_path_buf());
    let fleet = Fleet::start(plan).await?;
    let measured = measure(&fleet, options, room).await;
    settled(measured, fleet.stop().await)
}

async fn measure(fleet: &Fleet, options: &Options, room: u16) -> anyhow::Result<CaseLine> {
    fleet.map(MAP).await?;
    let lessees = options.lessees.min(options.nodes);
    eprintln!(
        "{} nodes with room for {room}: gangs of {} for {lessees} lessees",
        options.nodes, options.size
    );
    let want = want(options.size);
    let mut clients = Vec::new();
    for member in fleet.members().iter().take(lessees.into()) {
        let kept = Door::of(member)?.open().await?;
        let want = want.clone();
        let mut lessee = Lessee { kept, want, size: options.size, failed: 0, partial: 0 };
        ready(&mut lessee).await?;
        clients.push(lessee);
    }

    let before = mark(fleet).await?;
    let from = Instant::now() + WARM_UP;
    let until = from + Duration::from_secs(options.seconds);
    let (clients, asked) = drive(clients, from, until).await?;
    let after = mark(fleet).await?;

    let Asked { came: gangs, errors, .. } = asked;
    let per_gang =
        |figure: f64, digits| (gangs > 0).then(|| rounded(figure / gangs as f64, digits));
    let [p50_ms, p99_ms, max_ms] = asked.percentiles([0.5, 0.99, 1.0]);
    Ok(CaseLine {
        bench: "gang",
        nodes: options.nodes,
        size: options.size,
        lessees,
        room,
        gangs,
        gangs_per_s: rounded(asked.took_ms.len() as f64 / options.seconds as f64, 1),
        p50_ms,
        p99_ms,
        max_ms,
        partial: clients.iter().map(|client| client.partial).sum(),
        failed: clients.iter().map(|client| client.failed).sum(),
        errors,
        refusals_per_gang: per_gang(after.refusals - before.refusals, 2),
        grants_per_gang: per_gang(after.grants - before.grants, 2),
        cpu_ms: per_gang((after.cpu - before.cpu).as_secs_f64() * 1e3, 1),
        seconds: options.seconds,
        journal_on: machine::file_system(fleet.root()),
    })
}

/// What all nodes together had done and used at some instant.
#[derive(Debug, Default)]
struct Mark {
    grants: f64,
    refusals: f64,
    cpu: Duration,
}

async fn mark(fleet: &Fleet) -> anyhow::Result<Mark> {
    let mut mark = Mark::default();
    for member in fleet.members() {
        let text = Door::of(member)?.get("/metrics").await?;
        let count = |name| metric(&text, name).context("a counter is missing");
        mark.grants += count("leasehold_grants_total")?;
        mark.refusals += count("leasehold_refusals_total")?;
        mark.cpu += member.usage()?.cpu;
    }
    Ok(mark)
}

/// A tenth of a core each, without a job: members wait to be claimed, and are given back.
fn want(size: u16) -> Bytes {
    let want = serde_json::json!({ "nodes": size, "want": {
        "cpu": format!("{MEMBER_MILLI}m"), "memory": "16M", "disk": "0", "ttl": "60s",
        "max_price": "1000000", "budget": "1000000",
    } });
    Bytes::from(want.to_string())
}

/// Waits until a gang can be had: a map comes before links, and offers somewhat later.
async fn ready(lessee: &mut Lessee) -> anyhow::Result<()> {
    let deadline = Instant::now() + MAP;
    loop {
        let (status, body) = lessee.kept.post("/v1/gangs", &lessee.want).await?;
        if status == StatusCode::CREATED {
            return lessee.give_back(&body).await;
        }
        if Instant::now() > deadline {
            return Err(refused("/v1/gangs", status, &body));
        }
        sleep(Duration::from_millis(50)).await;
    }
}

/// Asks a node for one gang after the other.
struct Lessee {
    kept: Kept,
    want: Bytes,
    size: u16,
    failed: u64,
    partial: u64,
}

impl Lessee {
    /// Looks whether the gang is whole, and gives its members back.
    async fn give_back(&mut self, body: &Bytes) -> anyhow::Result<()> {
        let ganged: Ganged = serde_json::from_slice(body).context("a gang")?;
        let hosts: BTreeSet<_> = ganged.leases.iter().map(|of| of.choice.lessor.as_str()).collect();
        let mut whole = hosts.len() == usize::from(self.size);
        for leased in &ganged.leases {
            if let Err(error) = self.kept.release(&leased.lease).await {
                eprintln!("a member of a whole gang cannot be given back: {error:#}");
                whole = false;
            }
        }
        self.partial += u64::from(!whole);
        Ok(())
    }
}

impl Client for Lessee {
    async fn ask(&mut self) -> anyhow::Result<Option<Instant>> {
        let (status, body) = self.kept.post("/v1/gangs", &self.want).await?;
        let end = Instant::now();
        if status == StatusCode::CREATED {
            self.give_back(&body).await?;
            return Ok(Some(end));
        }
        if self.failed == 0 {
            eprintln!("the first no: {:#}", refused("/v1/gangs", status, &body));
        }
        self.failed += 1;
        Ok(None)
    }

    async fn again(&mut self) -> anyhow::Result<()> {
        self.kept.again().await
    }
}

#[cfg(test)]
mod tests {
    use leasehold_node::api::body::GangRequest;

    use super::*;

    #[test]
    fn what_is_wanted_is_understood() {
        let request: GangRequest = serde_json::from_slice(&want(8)).expect("a request");
        let want = request.want.parse().expect("sound");
        assert_eq!((request.nodes, want.shape.cpu_milli), (8, MEMBER_MILLI));
        assert!(request.job.is_none());
    }
}
